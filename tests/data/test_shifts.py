"""Shifted test sets: against scikit-image, Pillow, and files of the same corruptions made by other code."""

import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import color

from sdgen_lib import data
from sdgen_lib.data import Split, shifts
from sdgen_lib.data.shifts import CORRUPTIONS, SEVERITIES, STRENGTHS, corrupted, same_classes

FILES = Path("/work/shared/data")
RANDOM = ("gaussian_noise", "shot_noise", "impulse_noise", "occlusion")


def some(count=6, size=32, seed=0):
    """Pictures with slopes and noise, of every brightness."""
    numbers = torch.Generator().manual_seed(seed)
    coarse = torch.rand((count, 3, 4, 4), generator=numbers)
    images = torch.nn.functional.interpolate(coarse, size=size, mode="bilinear")
    images = images + 0.05 * torch.randn(images.shape, generator=numbers)
    return Split((images.clamp(0, 1) * 255).byte(), torch.arange(count) % 3)


def distance(one, other):
    return float((one.images.float() - other.images.float()).abs().mean())


@pytest.mark.parametrize("size", [8, 28, 32, 64])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_each_severity_is_further_from_the_images(name, size):
    clean = some(size=size)
    before = clean.images.clone()
    found = [corrupted(clean, name, severity, seed=0) for severity in SEVERITIES]
    assert torch.equal(clean.images, before)
    for split in found:
        assert split.images.dtype == torch.uint8 and split.images.shape == clean.images.shape
        assert torch.equal(split.labels, clean.labels)
    away = [distance(clean, split) for split in found]
    assert away[0] < away[-1]
    if size >= 28:  # of 8 pixels several severities make the same boxes
        assert away == sorted(away)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_an_images_random_numbers_are_its_own(name):
    whole, part = some(6), some(6).take([0, 1, 2])
    found, again = (corrupted(split, name, 4, seed=3).images for split in (whole, part))
    assert torch.equal(found[:3], again)
    assert torch.equal(found, corrupted(some(6), name, 4, seed=3).images)
    other = corrupted(whole, name, 4, seed=4).images
    assert torch.equal(found, other) == (name not in RANDOM)
    twice = corrupted(whole.take([0, 0]), name, 4, seed=3).images
    assert torch.equal(*twice) == (name not in RANDOM)


def test_a_function_takes_a_batch_too():
    images = some(4).images
    for name, corruption in CORRUPTIONS.items():
        one_by_one = torch.cat([corruption(image[None], 5, torch.Generator()) for image in images])
        together = corruption(images, 5, torch.Generator())
        assert together.shape == images.shape and together.dtype == torch.uint8
        assert torch.equal(together, one_by_one) == (name not in RANDOM)


def test_unknown_names_and_severities():
    with pytest.raises(ValueError, match="Unknown corruption 'jpg'. Did you mean 'jpeg'"):
        corrupted(some(), "jpg", 1, 0)
    for severity in (0, 6, -1, 2.5, "3"):
        with pytest.raises(ValueError, match="^severity is .*; it must be a whole number from 1 to 5.$"):
            corrupted(some(0), "contrast", severity, 0)
        with pytest.raises(ValueError, match="it must be a whole number from 1 to 5"):
            CORRUPTIONS["occlusion"](some().images, severity, torch.Generator())


# --- each against another's arithmetic ---


@pytest.mark.parametrize("severity", SEVERITIES)
def test_brightness_is_scikit_images_hsv(severity):
    images = some(4).images
    images[0, :, :5] = 0
    images[1, 1:] = 0
    images[2, :, ::2, ::2] = 255
    found = corrupted(Split(images, torch.zeros(4).long()), "brightness", severity, 0).images
    for image, brighter in zip(images, found):
        hsv = color.rgb2hsv(image.permute(1, 2, 0).numpy())
        hsv[..., 2] = np.clip(hsv[..., 2] + STRENGTHS["brightness"][severity - 1], 0, 1)
        expected = 255 * color.hsv2rgb(hsv)
        assert np.abs(brighter.permute(1, 2, 0).numpy() - expected).max() <= 0.51  # rounding


def pillows(images, change):
    return torch.stack(
        [
            torch.from_numpy(np.array(change(Image.fromarray(image.permute(1, 2, 0).numpy())))).permute(2, 0, 1)
            for image in images
        ]
    )


@pytest.mark.parametrize(("severity", "quality"), [(1, 80), (5, 40)])
def test_jpeg_is_pillows(severity, quality):
    def compressed(picture):
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=quality)
        return Image.open(file)

    split = some(4)
    assert torch.equal(corrupted(split, "jpeg", severity, 0).images, pillows(split.images, compressed))


@pytest.mark.parametrize(("severity", "small"), [(1, 30), (5, 20)])
def test_pixelate_is_pillows_boxes(severity, small):
    def pixelated(picture):
        return picture.resize((small, small), Image.BOX).resize((32, 32), Image.BOX)

    split = some(4)
    assert torch.equal(corrupted(split, "pixelate", severity, 0).images, pillows(split.images, pixelated))


@pytest.mark.parametrize(("size", "sigma"), [(32, 1.0), (28, 1.0), (64, 2.0)])
def test_blur_is_scipys_gaussian_inside(size, sigma):
    from scipy.ndimage import gaussian_filter

    split = some(3, size)
    found = corrupted(split, "gaussian_blur", 5, 0).images.numpy()
    expected = gaussian_filter(split.images.numpy().astype(float), (0, 0, sigma, sigma), mode="mirror", truncate=4)
    assert np.abs(found - expected).max() <= 0.51


def test_contrast_keeps_the_mean_of_each_channel():
    split = some(5)
    found = corrupted(split, "contrast", 5, 0).images.float()
    assert torch.allclose(found.mean((2, 3)), split.images.float().mean((2, 3)), atol=0.1)
    ratio = found.std((2, 3)) / split.images.float().std((2, 3))
    assert torch.allclose(ratio, torch.full_like(ratio, 0.15), atol=0.01)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_noises_have_the_spread_they_should(severity):
    """Of grey 128, far from both ends; a photon count of mean m has the variance m."""
    grey = Split(torch.full((40, 3, 32, 32), 128, dtype=torch.uint8), torch.zeros(40).long())
    x = 128 / 255
    spreads = {
        "gaussian_noise": STRENGTHS["gaussian_noise"][severity - 1],
        "shot_noise": (x / STRENGTHS["shot_noise"][severity - 1]) ** 0.5,
    }
    for name, expected in spreads.items():
        found = corrupted(grey, name, severity, 0).images.float() / 255
        assert float(found.std()) == pytest.approx(expected, rel=0.03)
        assert float(found.mean()) == pytest.approx(x, abs=0.002)
    found = corrupted(grey, "impulse_noise", severity, 0).images
    share = STRENGTHS["impulse_noise"][severity - 1] / 2
    for value in (0, 255):
        assert float((found == value).float().mean()) == pytest.approx(share, rel=0.1)
    assert sorted(found.unique().tolist()) == [0, 128, 255]


def test_an_occlusion_is_a_grey_square_wholly_inside():
    split, corners = Split(torch.zeros(60, 3, 20, 20, dtype=torch.uint8), torch.zeros(60).long()), set()
    for image in corrupted(split, "occlusion", 4, 0).images:
        rows, columns = (image == 127).all(0).nonzero(as_tuple=True)
        assert len(rows) == 100 and (image == 127).sum() == 300
        assert rows.max() - rows.min() == columns.max() - columns.min() == 9
        corners.add((int(rows.min()), int(columns.min())))
    assert len(corners) > 30 and {0, 10} <= {top for top, _ in corners}


# --- files made by other code ---


@pytest.fixture(scope="module")
def cifar():
    """The clean test images, and what others made of them, by name."""
    names = ("subset", "noise", "jpeg")
    paths = {name: FILES / f"cifar10-{name}.npz" for name in names}
    if not all(path.exists() for path in paths.values()):
        pytest.skip(f"{FILES} does not hold cifar10-subset, -noise and -jpeg")
    return {name: data.load(path).test for name, path in paths.items()}


@pytest.mark.parametrize(("theirs", "name", "severity"), [("noise", "gaussian_noise", 3), ("jpeg", "jpeg", 5)])
def test_the_same_corruption_by_other_code(cifar, theirs, name, severity):
    clean, other, found = cifar["subset"], cifar[theirs], corrupted(cifar["subset"], name, severity, 0)
    assert distance(clean, found) == pytest.approx(distance(clean, other), rel=0.01)
    ours, others = (float((split.images.float() - clean.images.float()).std()) for split in (found, other))
    assert ours == pytest.approx(others, rel=0.01)
    for less in (severity - 1, min(severity + 1, 5)):
        if less != severity:  # the neighbouring severities are told apart
            away = distance(clean, corrupted(clean, name, less, 0))
            assert abs(away / distance(clean, other) - 1) > 0.05


def test_jpeg_is_theirs_to_the_pixel_but_for_rounding(cifar):
    found = corrupted(cifar["subset"], "jpeg", 5, 0)
    assert distance(found, cifar["jpeg"]) < 0.1 * distance(found, cifar["subset"])


# --- another dataset's images ---


def dataset(names, labels=None, size=8, name="other"):
    labels = torch.arange(len(names)) if labels is None else torch.tensor(labels)
    split = Split(torch.arange(len(labels)).view(-1, 1, 1, 1).expand(-1, 3, size, size).byte(), labels)
    return data.ImageData(name, name, tuple(names), split, split, split)


def test_classes_are_matched_by_name_and_images_resized():
    found = same_classes(dataset(["cat", "dog", "猫"], size=16), dataset(["猫", "cat", "dog"], labels=[0, 1, 2, 0]))
    assert found.labels.tolist() == [2, 0, 1, 2] and found.labels.dtype == torch.int64
    assert found.images.shape == (4, 3, 16, 16) and found.images.dtype == torch.uint8
    assert found.images[:, 0, 0, 0].tolist() == [0, 1, 2, 3]


def test_without_names_the_numbers_are_the_classes():
    digits, file = [str(i) for i in range(12)], [f"class {i}" for i in range(12)]
    for ours, theirs in ((digits, file), (file, digits), (file, file)):
        assert same_classes(dataset(ours), dataset(theirs)).labels.tolist() == list(range(12))
    with pytest.raises(
        ValueError, match="lacks '0', .*'4' and 7 more and has besides 'class 0', .*'class 4' and 5 more; give"
    ):
        same_classes(dataset(digits), dataset(file[:10]))


def test_other_classes_are_named():
    ours = dataset(["cat", "dog"], name="ours")
    message = "^The classes of 'other' are not those of 'ours': it lacks 'dog' and has besides 'cow', 'emu'; give a"
    with pytest.raises(ValueError, match=message):
        same_classes(ours, dataset(["cow", "cat", "emu"]))
    with pytest.raises(ValueError, match="it lacks 'dog'; give"):
        same_classes(ours, dataset(["cat"]))
    with pytest.raises(ValueError, match="it has besides 'a\N{REPLACEMENT CHARACTER}b'; give"):
        same_classes(ours, dataset(["cat", "dog", "a\x1bb"]))


def test_two_sets_of_handwritten_digits():
    paths = [FILES / f"{name}.npz" for name in ("mnist", "usps")]
    if not all(path.exists() for path in paths):
        pytest.skip(f"{FILES} does not hold mnist and usps")
    mnist, usps = (data.load(path) for path in paths)
    found = same_classes(mnist, usps)
    assert len(found) == 2007 and found.images.shape[1:] == mnist.test.images.shape[1:]
    assert torch.equal(found.labels, usps.test.labels)
    shuffled = dataclasses.replace(
        usps, class_names=tuple(reversed(usps.class_names)), test=Split(usps.test.images, 9 - usps.test.labels)
    )
    assert torch.equal(same_classes(mnist, shuffled).labels, usps.test.labels)


def test_every_corruption_has_its_strengths():
    assert set(CORRUPTIONS) == set(STRENGTHS)
    assert all(len(strengths) == len(SEVERITIES) for strengths in STRENGTHS.values())
    assert all(getattr(shifts, name) is corruption for name, corruption in CORRUPTIONS.items())
