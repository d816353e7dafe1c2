"""The saved generator: what was saved is what is loaded, whoever wrote the folder."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import pytest
import safetensors.torch
import strange_names
import torch

import sdgen_lib
from sdgen_lib.diffusion import backbone as backbones
from sdgen_lib.diffusion import lora, weights
from sdgen_lib.diffusion.conditions import Condition, ContextTable
from sdgen_lib.diffusion.generator import LatentGenerator
from sdgen_lib.share import generator

LABELS = torch.tensor([2, 0, 1])
NAMES = ("ant", "bee", "cat")


def table_of(backbone, tokens=3, seed=0):
    noise = torch.Generator().manual_seed(seed)
    contexts = torch.randn(len(NAMES) + 1, tokens, backbone.width, generator=noise)
    return ContextTable(contexts[:-1], contexts[-1])


@pytest.fixture
def made(tiny_copy):
    return LatentGenerator(
        tiny_copy, table_of(tiny_copy), NAMES, 2, 1.5, "dpm-solver++", image_size=20, antialias=False, fingerprint="f"
    )


@pytest.fixture(scope="module")
def saved(tiny, tmp_path_factory):
    """A folder that no test changes."""
    folder = tmp_path_factory.mktemp("saved")
    generator.save(LatentGenerator(tiny, table_of(tiny), NAMES, 2, 1.5, image_size=16), folder, {"row": "by hand"})
    return folder


@pytest.fixture
def copied(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copied")


def write_facts(folder, **changes):
    facts = json.loads((folder / "generator.json").read_text())
    facts = {name: value for name, value in {**facts, **changes}.items() if value is not ...}
    (folder / "generator.json").write_text(json.dumps(facts))


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- round trips ---


def test_what_is_loaded_draws_the_same_images(made, tmp_path):
    drawn = made(LABELS, seed=4)
    generator.save(made, tmp_path, {"trained_on": "by hand", "num_inference_steps": "not this one"})
    loaded = generator.load(tmp_path, "cpu", "fp32")
    assert torch.equal(loaded(LABELS, seed=4), drawn)
    assert torch.equal(loaded(["cat", "ant", 1], seed=4), drawn)
    assert torch.equal(loaded(LABELS[1:], seed=4, first_index=1), drawn[1:])
    assert not torch.equal(loaded(LABELS, seed=5), drawn)
    facts = json.loads((tmp_path / "generator.json").read_text())
    assert (facts["format"], facts["trained_on"], facts["num_inference_steps"]) == (2, "by hand", 2)
    for name in ("class_names", "guidance_scale", "sampler", "antialias", "image_size", "fingerprint"):
        assert getattr(loaded, name) == getattr(made, name)


@pytest.mark.parametrize("kind", ["whole", "lora", "pretrained"])
def test_the_unet_is_the_generators_own(made, tmp_path, kind):
    if kind == "whole":
        tuned = {name: 1.05 * value for name, value in made.backbone.unet.state_dict().items()}
    elif kind == "lora":
        tuned = {name: p.detach() + 0.05 for name, p in lora.add(made.backbone.unet, 2).items()}
        lora.remove(made.backbone.unet)
    else:
        tuned = None
        with torch.no_grad():  # what lies in the UNet now is not what this generator asks for
            made.backbone.unet.conv_out.weight.mul_(2)
        made.backbone.unet_key = "other"
    own = dataclasses.replace(made, unet=("own", lambda: tuned))
    drawn = own(LABELS)
    generator.save(own, tmp_path, {})
    assert torch.equal(generator.load(tmp_path, "cpu", "fp32")(LABELS), drawn)
    assert torch.equal(own(LABELS), drawn)  # saving left the backbone as usable as it was
    plain = dataclasses.replace(made, unet=("pretrained", lambda: None))(LABELS)
    assert torch.equal(plain, drawn) == (kind == "pretrained")


def test_in_16_bits(tmp_path):
    backbone = backbones.load("tiny", "cpu", "bf16")
    made = LatentGenerator(backbone, table_of(backbone), NAMES, 2, 1.5, image_size=16)
    drawn = made(LABELS)
    generator.save(made, tmp_path, {})
    assert backbone.unet.dtype == torch.bfloat16
    stored = safetensors.torch.load_file(tmp_path / "unet/diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float32}
    assert torch.equal(generator.load(tmp_path, "cpu", "bf16")(LABELS), drawn)


def test_diffusers_reads_it(saved, tiny):
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(saved)
    expected = tiny.unet.state_dict()
    state = pipeline.unet.state_dict()
    assert set(state) == set(expected) and all(torch.equal(state[name], expected[name]) for name in state)
    assert {path.suffix for path in saved.rglob("*") if path.is_file()} <= {".json", ".safetensors", ".txt"}


def test_no_file_says_where_the_model_was(tmp_path):
    private = shutil.copytree(weights.TINY, tmp_path / "private-place" / "model")
    backbone = backbones.load(str(private), "cpu", "fp32")
    (tmp_path / "out").mkdir()
    generator.save(LatentGenerator(backbone, table_of(backbone), NAMES, 2, 1.5), tmp_path / "out", {})
    assert len(contents(tmp_path / "out")) > 8
    assert [path for path, content in contents(tmp_path / "out").items() if b"private-place" in content] == []


HEAVY = """
import sys
import sdgen_lib
images = sdgen_lib.load(sys.argv[1], device="cpu", precision="fp32")([0, "cat"], num_inference_steps=1)
assert images.shape == (2, 3, 16, 16)
print(sorted({"optuna", "pandas", "sklearn", "matplotlib", "ipywidgets", "medmnist"} & sys.modules.keys()))
"""


def test_drawing_brings_none_of_what_searches_and_notebooks_need(saved):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", HEAVY, str(saved)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


# --- what can be saved ---


class Told:
    """A conditioner whose every image is told something else."""

    def __call__(self, labels, indices=None, seed=0):
        return Condition(torch.randn(len(labels), 3, 64))

    def unconditional(self):
        return Condition(torch.zeros(1, 3, 64))


def test_only_what_is_fixed_can_be_saved(made, tmp_path):
    with pytest.raises(
        ValueError, match="one fixed context for each class.*a vector for each training image.*Told has neither"
    ) as error:
        generator.save(dataclasses.replace(made, conditioner=Told()), tmp_path, {})
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="one fixed context for each class"):
        generator.save(lambda labels: None, tmp_path, {})
    assert list(tmp_path.iterdir()) == []


# --- format 1 ---


@pytest.mark.parametrize(
    ("rank", "unconditional", "tokens"),
    [(None, "zero", 5), (None, "class_mean", 5), (None, "empty_prompt", 8), (2, "zero", 5)],
)
def test_format_1(tiny, tmp_path, rank, unconditional, tokens):
    """As the first version of this package wrote it: the weights of a linear map from one-hot labels to contexts."""
    folder, outputs = shutil.copytree(weights.TINY, tmp_path / "old"), tokens * tiny.width
    if rank is None:
        weight, bias = torch.randn(outputs, 3), torch.randn(outputs)
        tensors = {"linear.weight": weight, "linear.bias": bias}
    else:
        first, begin, second = torch.randn(rank, 3), torch.randn(rank), torch.randn(outputs, rank)
        weight, bias = second @ first, second @ begin
        tensors = {"linear.0.weight": first, "linear.0.bias": begin, "linear.1.weight": second}
    safetensors.torch.save_file(tensors, folder / "class_encoder.safetensors")
    facts = {
        "format": 1,
        "class_names": list(NAMES),
        "num_inference_steps": 2,
        "guidance_scale": 1.5,
        "unconditional": unconditional,
        "sampler": "ddim",
        "antialias": True,
        "tokens": tokens,
        "rank": rank,
        "image_size": 16,
        "trained_on": "digits",
        "backbone": "tiny",
        "recipe": "demo",
        "seed": 0,
        "row": "after 4",
        "point": {"IS": 2, "UGS": 1.5, "transfer_epoch": 1, "finetune_epoch": 1},
    }
    (folder / "generator.json").write_text(json.dumps(facts, indent=1))
    loaded = sdgen_lib.load(folder, "cpu", "fp32")
    contexts = (weight.T + bias).view(3, tokens, tiny.width)
    prompt = tiny.text_context([""])[0]
    empty = {"zero": bias.view(tokens, tiny.width), "class_mean": contexts.mean(0), "empty_prompt": prompt}
    torch.testing.assert_close(loaded.conditioner.contexts, contexts)
    torch.testing.assert_close(loaded.conditioner.empty, empty[unconditional])
    again = LatentGenerator(tiny, loaded.conditioner, NAMES, 2, 1.5, image_size=16)
    assert torch.equal(loaded(LABELS), again(LABELS))


def test_damaged_folders_of_format_1(tiny, tmp_path):
    folder = shutil.copytree(weights.TINY, tmp_path / "old")
    safetensors.torch.save_file({"linear.weight": torch.zeros(4, 4)}, folder / "class_encoder.safetensors")
    facts = dict(format=1, class_names=["a", "b"], num_inference_steps=2, guidance_scale=1.0, sampler="ddim")
    facts |= dict(antialias=True, image_size=16, tokens=5, rank=None, unconditional="zero")
    (folder / "generator.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match="class_encoder.safetensors is damaged.*not of these classes"):
        generator.load(folder, "cpu")
    write_facts(folder, tokens=None)
    with pytest.raises(ValueError, match='"tokens" is None, not a whole number'):
        generator.load(folder, "cpu")


# --- damaged and foreign folders ---


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no JSON object"),
        ("{", "no JSON object"),
        ("[1]", "no JSON object"),
        ("[" * 100_000, "no JSON object"),
        ("{}", '"format" is None'),
        ('{"format": "2"}', "\"format\" is '2'"),
        ('{"format": true}', '"format" is True'),
        ('{"format": 0}', '"format" is 0'),
        ('{"format": 99}', "of format 99; this version reads up to 3"),
        ('{"format": 2}', '"class_names" is None, not a list of different texts'),
        ('{"format": 1, "class_names": []}', r'"class_names" is \[\]'),
    ],
)
def test_a_foreign_generator_json(copied, text, words):
    (copied / "generator.json").write_text(text)
    check_refused(copied, words)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("class_names", "ant", "not a list of different texts"),
        ("class_names", ["ant", 2, "cat"], "not a list of different texts"),
        ("class_names", ["ant", "ant", "cat"], "not a list of different texts"),
        ("num_inference_steps", 0, "from 1 to 1000"),
        ("num_inference_steps", True, "from 1 to 1000"),
        ("guidance_scale", -1, "not from 0 to 1000"),
        ("guidance_scale", float("nan"), "not from 0 to 1000"),
        ("guidance_scale", None, "not from 0 to 1000"),
        ("sampler", "euler", "one of ddim, dpm-solver"),
        ("sampler", ["ddim"], "one of ddim"),
        ("antialias", 1, "true or false"),
        ("image_size", 10**6, "from 8 to 1024"),
        ("image_size", ..., "from 8 to 1024"),
    ],
)
def test_a_wrong_value_in_generator_json(copied, name, value, words):
    write_facts(copied, **{name: value})
    check_refused(copied, f'"{name}" is .*{words}')


@pytest.mark.parametrize("name", strange_names.UNSEEN)
def test_a_class_whose_name_cannot_be_seen(copied, name):
    write_facts(copied, class_names=["ant", name, "cat"])
    check_refused(copied, "a class name must be printable text")


def check_refused(folder, words, error=ValueError):
    before = contents(folder)
    with pytest.raises(error, match=words) as caught:
        generator.load(folder, "cpu", "fp32")
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    assert contents(folder) == before


def test_wrong_contexts(copied, tiny):
    path = copied / "conditioner.safetensors"
    good = safetensors.torch.load_file(path)
    for wrong in (
        {"contexts": good["contexts"]},
        {"contexts": good["contexts"][:2], "empty": good["empty"]},
        {"contexts": good["contexts"][..., 1:], "empty": good["empty"][..., 1:]},
        {"contexts": good["contexts"], "empty": good["empty"][:1]},
        {"contexts": good["contexts"][0], "empty": good["empty"]},
    ):
        safetensors.torch.save_file({name: value.contiguous() for name, value in wrong.items()}, path)
        check_refused(copied, "not of these classes and this model")
    path.write_bytes(b"\x08" + 7 * b"\0" + b"no heade")
    check_refused(copied, "conditioner.safetensors is damaged")
    path.unlink()
    check_refused(copied, "conditioner.safetensors is missing", FileNotFoundError)


def test_a_folder_that_is_no_generator(tmp_path):
    with pytest.raises(FileNotFoundError, match="no generator.json.*sdgen_lib export RUN_FOLDER --to generator"):
        sdgen_lib.load(tmp_path)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (["zero"], "'zero'.*Allowed: ant, bee"),
        ([3], "from 0 to 2.*not 3"),
        ([-1], "not -1"),
        ([0.5], "not 0.5"),
        ([], "empty"),
        ("ant", r"\['ant'\]"),
    ],
)
def test_wrong_labels(saved, labels, words):
    with pytest.raises(ValueError, match=words):
        generator.load(saved, "cpu", "fp32")(labels)


# --- damaged in ways that a reader would not notice at once ---


@pytest.mark.parametrize("name", ["contexts", "empty"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_contexts_that_are_no_numbers_are_not_drawn_with(saved, tmp_path, name, value):
    folder = shutil.copytree(saved, tmp_path / "copy")
    tensors = safetensors.torch.load_file(folder / "conditioner.safetensors")
    tensors[name].view(-1)[3] = value
    safetensors.torch.save_file(tensors, folder / "conditioner.safetensors")
    with pytest.raises(ValueError, match="not all finite numbers"):
        generator.load(folder, "cpu")


@pytest.mark.parametrize("value", [1e308, 10**400, 1001, -1])
def test_a_guidance_that_no_setting_may_have_is_damage(saved, tmp_path, value):
    folder = shutil.copytree(saved, tmp_path / "copy")
    facts = json.loads((folder / "generator.json").read_text())
    (folder / "generator.json").write_text(json.dumps(facts | {"guidance_scale": value}))
    with pytest.raises(ValueError, match='"guidance_scale" is .*, not from 0 to 1000') as error:
        generator.load(folder, "cpu")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("unet/config.json", "{"),
        ("unet/config.json", "[]"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": "x"}),
        ("vae/config.json", {"scaling_factor": "x"}),
        ("vae/config.json", {"scaling_factor": 0}),
        ("unet/config.json", {"block_out_channels": [32, 32]}),
        ("unet/config.json", {"cross_attention_dim": 40}),
        ("text_encoder/config.json", {"vocab_size": 7}),
    ],
)
def test_a_wrong_configuration_is_named(saved, tmp_path, path, content):
    folder = shutil.copytree(saved, tmp_path / "copy")
    if isinstance(content, dict):
        content = json.dumps(json.loads((folder / path).read_text()) | content)
    (folder / path).write_text(content)
    with pytest.raises((ValueError, OSError)) as error:
        generator.load(folder, "cpu", "fp32")
    assert str(folder) in str(error.value) and "\n" not in str(error.value)
