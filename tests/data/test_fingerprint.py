"""`ImageData.fingerprint` changes with the content and with nothing else."""

import dataclasses
import hashlib
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sdgen_lib import data
from sdgen_lib.data import ImageData, Split


def split(first: int, count: int = 4) -> Split:
    images = torch.arange(first, first + count * 3 * 2 * 2).to(torch.uint8).view(count, 3, 2, 2)
    return Split(images, torch.arange(count) % 2)


@pytest.fixture
def small() -> ImageData:
    return ImageData("small", "small", ("cat", "dog"), split(0), split(50), split(100))


def test_it_is_the_sha256_of_what_the_docstring_says(small):
    """Written out with struct and bytes, so that fingerprints stay comparable between versions and machines."""
    content = b'["cat", "dog"]\n'
    for name, part in (("train", small.train), ("val", small.val), ("test", small.test)):
        content += f"{name} images u1 (4, 3, 2, 2)\n".encode() + bytes(part.images.flatten().tolist())
        content += f"{name} labels <i8 (4,)\n".encode() + struct.pack("<4q", *part.labels.tolist())
    assert small.fingerprint == hashlib.sha256(content).hexdigest()


def changed_image(d: ImageData, name: str) -> ImageData:
    images = getattr(d, name).images.clone()
    images[-1, -1, -1, -1] += 1
    return dataclasses.replace(d, **{name: Split(images, getattr(d, name).labels)})


def changed_label(d: ImageData, name: str) -> ImageData:
    return dataclasses.replace(d, **{name: Split(getattr(d, name).images, getattr(d, name).labels.flip(0))})


CHANGES = {
    **{f"an image of {name}": lambda d, name=name: changed_image(d, name) for name in ("train", "val", "test")},
    **{f"a label of {name}": lambda d, name=name: changed_label(d, name) for name in ("train", "val", "test")},
    "a class name": lambda d: dataclasses.replace(d, class_names=("cat", "Dog")),
    "class names run together": lambda d: dataclasses.replace(d, class_names=("catdog", "")),
    "the order of the classes": lambda d: dataclasses.replace(d, class_names=("dog", "cat")),
    "the order of the images": lambda d: dataclasses.replace(d, train=d.train.take([2, 1, 0, 3])),
    "one image less": lambda d: dataclasses.replace(d, train=d.train.take([0, 1, 2])),
    "an image moved to another split": lambda d: dataclasses.replace(
        d, train=d.train.take([0, 1, 2]), val=Split(torch.cat([d.train.images[3:], d.val.images]), torch.arange(5) % 2)
    ),
    "the same bytes in another shape": lambda d: dataclasses.replace(
        d, train=Split(d.train.images.reshape(4, 3, 1, 4), d.train.labels)
    ),
    "splits exchanged": lambda d: dataclasses.replace(d, train=d.val, val=d.train),
}


def test_every_change_of_the_content_changes_it(small):
    found = {name: change(small).fingerprint for name, change in CHANGES.items()}
    assert all(re.fullmatch("[0-9a-f]{64}", fingerprint) for fingerprint in found.values())
    assert len({small.fingerprint, *found.values()}) == 1 + len(CHANGES)


def test_names_and_memory_layout_do_not_change_it(small):
    named_otherwise = dataclasses.replace(small, name="./other.npz", slug="other-0123")
    assert named_otherwise.fingerprint == small.fingerprint
    channels_last = small.train.images.contiguous(memory_format=torch.channels_last)
    strided = small.train.labels.repeat_interleave(2)[::2]
    assert not channels_last.is_contiguous() and not strided.is_contiguous()
    assert dataclasses.replace(small, train=Split(channels_last, strided)).fingerprint == small.fingerprint


def test_it_is_computed_once(small, monkeypatch):
    first = small.fingerprint
    monkeypatch.setattr(hashlib, "sha256", None)
    assert small.fingerprint == first


def test_empty_splits_have_one(small):
    empty = small.train.take([])
    assert len({dataclasses.replace(small, val=empty).fingerprint, small.fingerprint}) == 2


def test_of_loaded_data():
    """The seed, the count and the size change what is loaded, so they change it; another process finds the same."""
    asked = [dict(), dict(seed=1), dict(image_size=8)]
    found = [data.load("digits", **options).fingerprint for options in asked]
    found.append(data.load("digits:200").fingerprint)
    assert len(set(found)) == 4 and data.load("Digits").fingerprint == found[0]
    code = "from sdgen_lib import data; print(data.load('digits').fingerprint)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == found[0]


def test_the_same_file_elsewhere_has_the_same_and_a_changed_file_another(tmp_path):
    random = np.random.default_rng(0)
    arrays = {}
    for part in ("train", "val", "test"):
        arrays[f"{part}_images"] = random.integers(0, 256, (6, 8, 8), dtype=np.uint8)
        arrays[f"{part}_labels"] = np.arange(6) % 2
    np.savez(tmp_path / "a.npz", **arrays)
    shutil.copy(tmp_path / "a.npz", tmp_path / "b.npz")
    np.savez_compressed(tmp_path / "c.npz", **arrays)
    arrays["test_images"][0, 0, 0] ^= 1
    np.savez(tmp_path / "d.npz", **arrays)
    a, b, c, d = (data.load(tmp_path / f"{name}.npz").fingerprint for name in "abcd")
    assert a == b == c != d
