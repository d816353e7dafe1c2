"""The pictures of the tiny model's source domain hold what their captions say."""

import re

import pytest
import torch

from sdgen_lib.tools import source_images


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


def test_captions_are_of_one_form(drawn):
    colours, textures = set(source_images.COLOURS), 0
    for caption in drawn[1]:
        if caption in ("leaves", "soft leaves"):
            textures += 1
            continue
        found = re.fullmatch(CAPTION, caption)
        assert found and {found[2], found[4]} <= colours and found[2] != found[4], caption
    assert 15 <= textures <= 75  # one in ten


def nearest_colour(colour):
    names, values = zip(*source_images.COLOURS.items(), strict=True)
    return names[int((torch.tensor(values).float() - colour).square().sum(1).argmin())]


def test_the_corners_have_the_captions_background(drawn):
    right = total = 0
    for image, caption in zip(*drawn, strict=True):
        if "leaves" not in caption:
            corners = torch.stack([image[:, y, x] for y in (0, 31) for x in (0, 31)]).float()
            right += nearest_colour(corners.median(0).values) == caption.split()[-1]
            total += 1
    assert right > 0.9 * total  # the pen's stretch brings some shapes into the corners


def test_the_glyph_has_the_captions_colour(drawn):
    """The pixel farthest from the background: the glyph's (sharp pictures; strokes of a pen, so not all are pure)."""
    right = total = 0
    for image, caption in zip(*drawn, strict=True):
        if "leaves" not in caption and not caption.startswith("soft"):
            fore, back = caption.split()[0], caption.split()[-1]
            away = (image.float() - torch.tensor(source_images.COLOURS[back]).float().view(3, 1, 1)).square().sum(0)
            top = away.flatten().topk(8).indices
            right += nearest_colour(image.flatten(1)[:, top].float().median(1).values) == fore
            total += 1
    assert right > 0.85 * total


def test_soft_pictures_are_softer(drawn):
    """Of black-and-white pictures: the steepest change from a pixel to the next."""
    steepest = {True: [], False: []}
    for image, caption in zip(*drawn, strict=True):
        if {"white", "black"} <= set(caption.split()):
            steepest[caption.startswith("soft")].append(float(image[0].float().diff(dim=1).abs().max()))
    assert len(steepest[True]) > 50 and len(steepest[False]) > 50
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
