"""A generator: labels in, images out; its weights in place, and its work told before it is done."""

import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch

from sdgen_lib.diffusion import backbone
from sdgen_lib.diffusion.conditions import ContextTable
from sdgen_lib.diffusion.generate import generate
from sdgen_lib.diffusion.generator import LatentGenerator
from sdgen_lib.machine.passes import Pass

NAMES = ("one", "circle", "square")


@pytest.fixture
def generator(tiny_copy):
    contexts = tiny_copy.text_context(["white digit 1 on black", "black circle on white", "red square on blue"])
    table = ContextTable(contexts, tiny_copy.text_context([""])[0])
    return LatentGenerator(tiny_copy, table, NAMES, num_inference_steps=3, guidance_scale=2.0, batch_size=4)


def test_it_draws_at_its_point(generator):
    labels = torch.tensor([0, 2, 1])
    how = dict(num_inference_steps=3, guidance_scale=2.0, set_name="generator")
    expected = generate(generator.backbone, generator.conditioner, labels, **how)
    assert torch.equal(generator(labels), expected) and expected.shape == (3, 3, 32, 32)
    for asked in ([0, 2, 1], ["one", "square", "circle"], ["one", 2, "circle"], [0.0, 2.0, 1.0]):
        assert torch.equal(generator(asked), expected)
    how = {**how, "num_inference_steps": 2, "guidance_scale": 0.0, "seed": 3, "set_name": "other", "first_index": 9}
    expected = generate(generator.backbone, generator.conditioner, labels, batch_size=1, **how)
    assert torch.equal(generator(labels, **how, batch_size=1), expected)


def test_it_is_said_in_a_line(generator):
    assert len(repr(generator)) < 400 and "num_inference_steps=3, guidance_scale=2.0" in repr(generator)


def test_its_images_are_as_it_was_made_to_draw_them(generator):
    how = dict(image_size=16, antialias=False, sampler="dpm-solver++")
    made = dataclasses.replace(generator, **how)
    point = dict(num_inference_steps=3, guidance_scale=2.0, set_name="generator")
    expected = generate(generator.backbone, generator.conditioner, torch.tensor([1]), **how, **point)
    assert torch.equal(made(["circle"]), expected) and expected.shape == (1, 3, 16, 16)


WRONG = [
    ("one", r"must be a list, one entry an image: \['one'\]"),
    ([], "class_labels is empty"),
    (["one", "sqare"], "Unknown class 'sqare'. Did you mean 'square'"),
    ([0, 3], r"from 0 to 2 \(one, circle, square\), not 3"),
    ([-1], "not -1"),
    ([0.5], "not 0.5"),
    (torch.tensor([2, 7]), "not 7"),
    (1, r"must be a list, one entry an image: \[1\]"),
    (None, "must be a list of class numbers or names, one for each image, not None"),
    ({"one": 1}, "must be a list of class numbers or names"),
    (torch.tensor(1), "must be a list of class numbers or names"),
    ([None], "from 0 to 2 .*, not None"),
    ([float("nan")], "not nan"),
    ([float("inf")], "not inf"),
    ([1 + 2j], "not .1"),
    ([True], "not True"),
    ([object()], "not <object"),
    (torch.tensor([[0, 1]]), r"must be a flat list, .* is \[0, 1\]"),
    (np.zeros((2, 2), int), "must be a flat list"),
    ([[0], ["one"]], "must be a flat list"),
]
GIVEN = [
    ({"num_inference_steps": 2.5}, "num_inference_steps must be a whole number from 1 to 1000, not 2.5"),
    ({"num_inference_steps": 0}, "not 0"),
    ({"num_inference_steps": 1001}, "not 1001"),
    ({"num_inference_steps": "10"}, "not '10'"),
    ({"num_inference_steps": True}, "not True"),
    ({"guidance_scale": "2"}, "guidance_scale must be a number of at least 0, not '2'"),
    ({"guidance_scale": -0.5}, "not -0.5"),
    ({"guidance_scale": float("nan")}, "not nan"),
    ({"guidance_scale": float("inf")}, "not inf"),
    ({"batch_size": 0}, "batch_size must be a whole number of at least 1, not 0"),
    ({"seed": -1}, "seed must be a whole number from 0 to 4294967295, not -1"),
    ({"seed": 0.5}, "seed must be .* not 0.5"),
    ({"first_index": -1}, "first_index must be a whole number of at least 0, not -1"),
]


@pytest.mark.parametrize(("given", "message"), GIVEN)
def test_settings_that_cannot_be_sampled(generator, given, message):
    with pytest.raises(ValueError, match=message):
        generator([0], **given)


def test_whole_numbers_of_any_kind(generator):
    how = {"num_inference_steps": np.int64(1), "guidance_scale": np.float32(1.5), "batch_size": np.int32(2)}
    expected = generator([2, 0], num_inference_steps=1, guidance_scale=1.5)
    for labels in ([2.0, np.int8(0)], np.array([2, 0]), (torch.tensor(2), 0), torch.tensor([2, 0], dtype=torch.uint8)):
        assert torch.equal(generator(labels, **how), expected)


@pytest.mark.parametrize(("labels", "message"), WRONG)
def test_labels_that_it_does_not_know(generator, labels, message):
    with pytest.raises(ValueError, match=message):
        generator(labels)


def test_its_weights_are_put_in_place_first(generator):
    unet = generator.backbone.unet
    other = {name: 0.5 * value for name, value in unet.state_dict().items()}
    before, seen = generator([0, 1]), []
    changed = dataclasses.replace(generator, unet=("other", lambda: seen.append(1) or other))
    drawn = changed([0, 1])
    assert not torch.equal(drawn, before) and all(torch.equal(v, other[k]) for k, v in unet.state_dict().items())
    pretrained = dataclasses.replace(generator, unet=(backbone.PRETRAINED, lambda: None))
    assert torch.equal(pretrained([0, 1]), before)
    assert torch.equal(changed([0, 1]), drawn) and torch.equal(changed([0, 1]), drawn) and len(seen) == 2


def test_it_compiles_what_fills_a_batch_once_its_weights_are_there(generator, monkeypatch):
    asked = []
    monkeypatch.setattr(
        backbone.Backbone, "compile_unet", lambda self, batch, *_: asked.append((batch, self.unet_key, self.unet.dtype))
    )
    generator.backbone.set_unet(dtype=torch.bfloat16)
    unet = ("other", generator.backbone.unet.state_dict)
    dataclasses.replace(generator, unet=unet).prepare(4)
    compiling = dataclasses.replace(generator, unet=unet, compiles=True)
    compiling.prepare(3)
    assert asked == []
    compiling.prepare(4)
    assert asked == [(8, "other", torch.float32)]  # guidance passes each image twice


@pytest.mark.parametrize("guidance_scale", [0.0, 0.5, 1.0, 3.0])
def test_its_work_is_what_it_does(generator, monkeypatch, guidance_scale):
    done, decode = Counter(), backbone.Backbone.decode
    generator.guidance_scale = guidance_scale
    generator.backbone.unet.register_forward_pre_hook(lambda unet, given: done.update(unet=len(given[0])))

    def counted_decode(self, latents):
        done.update(decode=len(latents))
        return decode(self, latents)

    monkeypatch.setattr(backbone.Backbone, "decode", counted_decode)
    generator([0, 1, 2, 0, 1])
    assert generator.work(5) == {Pass("unet", 4): done["unet"], Pass("decode", 4): done["decode"]}
    assert dataclasses.replace(generator, compiles=True).work(5)[Pass("compiled unet", 4)] == done["unet"]
