"""The pictures of the tiny model's source domain hold what their captions say."""

import re

import pytest
import torch

from sdgen_lib.tools import source_images, source_scenes


def draw(n=400, seed=0, **options):
    return source_images.draw(n, torch.Generator().manual_seed(seed), **options)


@pytest.fixture(scope="module")
def drawn():
    return draw()


def test_layout(drawn):
    images, captions = drawn
    assert images.dtype == torch.uint8 and images.shape == (400, 3, 32, 32) and len(captions) == 400


def test_the_seed_decides(drawn):
    images, captions = drawn
    torch.manual_seed(99)
    again, same = draw()
    assert torch.equal(images, again) and captions == same
    other, captions_of_other = draw(seed=1)
    assert captions_of_other != captions and not torch.equal(other, images)


CAPTION = r"(soft )?(\w+) (digit \d|letter [a-z]|capital [a-z]|circle|square|triangle|diamond|ring|cross|bar) on (\w+)"


@pytest.fixture(scope="module")
def glyphs(drawn):
    """The pictures of one glyph or shape, and their captions."""
    return [(image, caption) for image, caption in zip(*drawn, strict=True) if re.fullmatch(CAPTION, caption)]


def test_half_of_the_pictures_show_a_glyph_and_their_captions_are_of_one_form(drawn, glyphs):
    colours = set(source_images.COLOURS)
    for _, caption in glyphs:
        found = re.fullmatch(CAPTION, caption)
        assert {found[2], found[4]} <= colours and found[2] != found[4], caption
    assert len(glyphs) == pytest.approx(len(drawn[1]) / 2, abs=60)  # three standard deviations of 400 throws


def nearest_colour(colour):
    names, values = zip(*source_images.COLOURS.items(), strict=True)
    return names[int((torch.tensor(values).float() - colour).square().sum(1).argmin())]


def test_the_corners_have_the_captions_background(glyphs):
    right = total = 0
    for image, caption in glyphs:
        corners = torch.stack([image[:, y, x] for y in (0, 31) for x in (0, 31)]).float()
        right += nearest_colour(corners.median(0).values) == caption.split()[-1]
        total += 1
    assert right > 0.9 * total  # the pen's stretch brings some shapes into the corners


def test_the_glyph_has_the_captions_colour(glyphs):
    """The pixel farthest from the background: the glyph's (sharp pictures; strokes of a pen, so not all are pure)."""
    right = total = 0
    for image, caption in glyphs:
        if not caption.startswith("soft"):
            fore, back = caption.split()[0], caption.split()[-1]
            away = (image.float() - torch.tensor(source_images.COLOURS[back]).float().view(3, 1, 1)).square().sum(0)
            top = away.flatten().topk(8).indices
            right += nearest_colour(image.flatten(1)[:, top].float().median(1).values) == fore
            total += 1
    assert right > 0.85 * total


def test_soft_pictures_are_softer(glyphs):
    """Of black-and-white pictures: the steepest change from a pixel to the next."""
    steepest = {True: [], False: []}
    for image, caption in glyphs:
        if {"white", "black"} <= set(caption.split()):
            steepest[caption.startswith("soft")].append(float(image[0].float().diff(dim=1).abs().max()))
    assert len(steepest[True]) > 30 and len(steepest[False]) > 30
    soft, sharp = (torch.tensor(steepest[kind]).median() for kind in (True, False))
    assert soft < 0.85 * sharp


@pytest.mark.parametrize("with_digits", [True, False])
def test_digits_can_be_left_out(with_digits):
    names = set(source_images.atlas(with_digits))
    digits = {f"digit {k}" for k in range(10)}
    assert names & digits == (digits if with_digits else set())
    assert len(names) == 26 + 26 + 7 + 10 * with_digits
    _, captions = draw(600, with_digits=with_digits)
    assert any("digit" in caption for caption in captions) == with_digits
    assert any(character.isdigit() for caption in captions for character in caption) == with_digits


def test_the_atlas_holds_every_glyph_in_every_font():
    for name, masks in source_images.atlas().items():
        assert masks.shape == (1 if name in source_images.SHAPES else len(source_images.FONTS), 64, 64)
        assert masks.min() == 0 and masks.max() > 0.9
        filled = (masks > 0.5).float().mean((1, 2))
        assert filled.min() > 0.02 and filled.max() < 0.7, name
    atlas = source_images.atlas()
    assert not torch.equal(atlas["letter g"], atlas["capital g"])
    assert len({mask.numpy().tobytes() for mask in atlas["digit 7"]}) > 10  # the fonts differ


def test_shapes_are_those_of_their_names():
    """Share of the unit square that each shape covers, from geometry."""
    area = {name: float(source_images.atlas()[name].mean()) for name in source_images.SHAPES}
    assert area["circle"] == pytest.approx(3.1416 * 0.75**2 / 4, abs=0.03)
    assert area["square"] == pytest.approx(0.65**2, abs=0.04)
    assert area["diamond"] == pytest.approx(0.8**2 / 2, abs=0.03)
    assert area["ring"] == pytest.approx(3.1416 * (0.8**2 - 0.5**2) / 4, abs=0.03)
    assert area["bar"] == pytest.approx(0.25 * 0.8, abs=0.03)


# --- what is no glyph ---

COLOUR, MANY = f"({'|'.join(source_images.COLOURS)})", "(one|two|three|four)"
FORMS = {
    "leaves": "leaves",
    "scenes": f"{COLOUR} (machine|creature) on {COLOUR} under {COLOUR}",
    "things": f"{MANY} {COLOUR} (ball|box) on {COLOUR}",
    "cells": f"{COLOUR} cell {MANY} lobes on {COLOUR}",
    "fundi": f"{COLOUR} disc with (spots|veins) on black",
    "speckle": "grey speckle( with dark hole)?",
    "clouds": f"{COLOUR} and {COLOUR} clouds",
    "gradients": f"{COLOUR} (to|glow in) {COLOUR}",
    "stripes": f"{COLOUR} (stripes|checks) on {COLOUR}",
    "strokes": f"{MANY} {COLOUR} strokes on {COLOUR}",
}


def of(name, n=64, seed=0):
    family = {function.__name__: function for function in source_scenes.FAMILIES}[name]
    return family(n, torch.Generator().manual_seed(seed))


def test_every_family_has_a_form():
    assert {function.__name__ for function in source_scenes.FAMILIES} == set(FORMS)


@pytest.mark.parametrize("name", FORMS)
def test_a_family_draws_different_pictures_of_its_captions_form(name):
    pictures, captions = of(name)
    assert pictures.shape == (64, 3, 32, 32) and pictures.dtype == torch.float32 and pictures.isfinite().all()
    assert all(re.fullmatch(FORMS[name], caption) and len(caption.split()) <= 6 for caption in captions), captions
    assert pictures.clamp(0, 1).flatten(1).std(0).min() > 0.02 or name == "fundi"  # whose corners are always black
    again, same = of(name)
    assert torch.equal(pictures, again) and captions == same and not torch.equal(pictures, of(name, seed=1)[0])


@pytest.mark.parametrize("a", [0.5, 1.0, 1.5])
def test_noise_has_the_power_spectrum_that_was_asked_for(a):
    """Power over frequency, both logarithms: a line of slope -2 a, from the definition."""
    field = source_scenes.noise_field(400, a, a, torch.Generator().manual_seed(0))[:, 0]
    assert field.mean((1, 2)).abs().max() < 1e-4 and field.std((1, 2)).sub(1).abs().max() < 1e-4
    power = torch.fft.rfft2(field).abs().square().mean(0)
    across, down = torch.fft.rfftfreq(32), torch.fft.fftfreq(32)
    frequency = torch.hypot(down[:, None], across[None, :])
    keep = (frequency > 0) & (across[None, :] > 0) & (across[None, :] < 0.5)
    x, y = frequency[keep].log(), power[keep].log()
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    assert float(slope) == pytest.approx(-2 * a, abs=0.1)


def test_a_fundus_lies_in_the_dark_and_a_cell_is_darker_than_its_surroundings():
    fundi = of("fundi")[0]
    assert fundi[:, :, [0, 0, -1, -1], [0, -1, 0, -1]].max() < 0.3
    assert fundi[:, :, 12:20, 12:20].mean() > 0.25
    cells = of("cells")[0].clamp(0, 1)
    middle, rim = cells[:, :, 12:20, 12:20].mean((1, 2, 3)), cells[:, :, [0, 0, -1, -1], [0, -1, 0, -1]].mean((1, 2))
    assert (middle < rim).float().mean() > 0.7


def test_half_of_the_pictures_are_roughened():
    images = torch.zeros(400, 3, 32, 32)
    first, again, other = (source_scenes.roughen(images, torch.Generator().manual_seed(k)) for k in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.abs().max() <= 1 and 150 <= int((first.flatten(1).abs().amax(1) > 0).sum()) <= 250
