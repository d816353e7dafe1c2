"""A model's fingerprint follows its content and nothing else."""

import dataclasses
import json
import os
import shutil

import pytest

from sdgen_lib.diffusion import weights
from sdgen_lib.diffusion.weights import PARTS, Source, fingerprint


def write(folder, unet=b"weights of the UNet", half=None):
    """A folder with all the parts of a model; its files are no real ones. ``half``: what the float16 weights hold."""
    for part in PARTS:
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps({"part": part}))
    for part, stem in weights.WEIGHTS.items():
        (folder / part / f"{stem}.safetensors").write_bytes(unet if part == "unet" else b"weights")
        if half is not None:
            (folder / part / f"{stem}.fp16.safetensors").write_bytes(half)
    (folder / "tokenizer" / "merges.txt").write_text("a b")
    return folder


def of(folder, half=False):
    return fingerprint(weights.find(str(folder), half))


def test_the_place_does_not_count_and_the_content_does(tmp_path):
    one, two = write(tmp_path / "one" / "model"), write(tmp_path / "two" / "model")
    other = write(tmp_path / "three" / "model", unet=b"weights of the uNet")
    assert len(of(one)) == 64 and int(of(one), 16) >= 0
    assert of(one) == of(two) != of(other)  # of one name, all three


def test_a_folder_may_be_named_from_anywhere(tmp_path, monkeypatch):
    one, other = of(write(tmp_path / "one" / "model")), of(write(tmp_path / "other" / "model", unet=b"others"))
    for folder, expected in (("one", one), ("other", other)):
        monkeypatch.chdir(tmp_path / folder)
        assert of("./model") == expected


@pytest.mark.parametrize(
    "name",
    [
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "tokenizer/merges.txt",
        "scheduler/config.json",
    ],
)
def test_each_byte_that_is_read_counts_also_in_a_running_process(tmp_path, name):
    path = write(tmp_path / "model") / name
    before, content = of(tmp_path / "model"), path.read_bytes()
    found = []
    for second, now in enumerate((bytes([content[0] ^ 1]) + content[1:], content)):  # of the same size
        path.write_bytes(now)
        os.utime(path, (second, second))  # some file systems keep time too coarsely for this test
        found.append(of(tmp_path / "model"))
    assert found[0] != before == found[1]


def test_what_is_not_read_does_not_count(tmp_path):
    folder = write(tmp_path / "model", half=b"half")
    before = of(folder), of(folder, half=True)
    assert before[0] != before[1]
    (folder / "README.md").write_text("about")
    (folder / "unet" / "notes.md").write_text("about")
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"pickled")
    (folder / "samples").mkdir()
    assert (of(folder), of(folder, half=True)) == before
    (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"another half")
    assert of(folder) == before[0] and of(folder, half=True) != before[1]
    for part, stem in weights.WEIGHTS.items():
        (folder / part / f"{stem}.fp16.safetensors").unlink()
    assert of(folder) == of(folder, half=True) == before[0]


@pytest.mark.parametrize("shard", ["model.fp16-00001-of-00002.safetensors", "model-00001-of-00002.fp16.safetensors"])
def test_weights_in_several_files_count(tmp_path, shard):
    """By either of the names that diffusers has given them."""
    folder = write(tmp_path / "model", half=b"half")
    source = weights.find(str(folder), half=True)
    before = fingerprint(source)
    path = folder / "unet" / f"diffusion_pytorch_{shard}"
    path.write_bytes(b"one half of a half")
    between = fingerprint(source)
    path.write_bytes(b"another half of a half")
    assert len({before, between, fingerprint(source)}) == 3


def test_a_snapshot_of_the_hub_is_its_commit(tmp_path):
    """Its files need not be read, which takes a while for gigabytes."""
    source = Source(tmp_path / "none", dict.fromkeys(weights.WEIGHTS), "c0ffee" * 6)
    again = Source(tmp_path / "another cache", dict.fromkeys(reversed(weights.WEIGHTS)), "c0ffee" * 6)
    later = dataclasses.replace(source, revision="deca1f" * 6)
    rounded = dataclasses.replace(source, variants={**source.variants, "unet": "fp16"})
    assert fingerprint(source) == fingerprint(again) and len(fingerprint(source)) == 64
    assert len({fingerprint(s) for s in (source, later, rounded)}) == 3


def test_the_tiny_model_is_a_copy_of_itself(tiny, tmp_path):
    copy = shutil.copytree(weights.TINY, tmp_path / "model")
    assert tiny.fingerprint == of("tiny") == of(copy)
