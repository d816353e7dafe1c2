"""Pictures as cameras and programs write them, against Pillow and against colours put together by hand."""

import io
import warnings

import numpy as np
import pytest
from PIL import Image, ImageOps

from sdgen_lib.data import pictures

from .drawn import encoded


def flat(content: bytes) -> list[int]:
    """The one colour that a picture has once it is read."""
    found = pictures.decode(content, 8)
    assert found.shape == (8, 8, 3) and found.dtype == np.uint8 and (found == found[0, 0]).all()
    return found[0, 0].tolist()


RED, BLUE = Image.new("RGB", (24, 24), (255, 0, 0)), Image.new("RGB", (24, 24), (0, 0, 255))


def test_of_a_phones_photograph_the_first_picture_is_taken():
    content = encoded(RED.copy(), "MPO", save_all=True, append_images=[BLUE.copy()])
    assert Image.open(io.BytesIO(content)).n_frames == 2
    assert flat(content) == [254, 0, 0]


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_animations_and_pages_are_refused(kind):
    with pytest.raises(ValueError, match="2 frames; give each a file of its own"):
        pictures.decode(encoded(RED.copy(), kind, save_all=True, append_images=[BLUE.copy()]), 8)


def palette(**options) -> bytes:
    image = Image.new("P", (9, 9), 1)
    image.putpalette([0, 0, 0, 200, 40, 10])
    return encoded(image, **options)


MODES = {
    "a palette": (palette(), [200, 40, 10]),
    "a transparent colour of a palette": (palette(transparency=1), [255] * 3),
    "another colour's": (palette(transparency=0), [200, 40, 10]),
    "half transparent": (encoded(Image.new("RGBA", (9, 9), (0, 0, 0, 51))), [204] * 3),
    "grey": (encoded(Image.new("L", (9, 9), 100)), [100] * 3),
    "grey, half transparent": (encoded(Image.new("LA", (9, 9), (0, 51))), [204] * 3),
    "one bit": (encoded(Image.new("1", (9, 9), 1)), [255] * 3),
    "inks": (encoded(Image.new("CMYK", (9, 9), (255, 128, 0, 0)), "TIFF"), [0, 127, 255]),
    "WebP": (encoded(Image.new("RGB", (9, 9), (200, 40, 10)), "WEBP", lossless=True), [200, 40, 10]),
    "GIF": (encoded(Image.new("L", (9, 9), 100), "GIF"), [100] * 3),
    "BMP": (encoded(Image.new("RGB", (9, 9), (200, 40, 10)), "BMP"), [200, 40, 10]),
    "PPM": (encoded(Image.new("RGB", (9, 9), (200, 40, 10)), "PPM"), [200, 40, 10]),
}


@pytest.mark.parametrize("kind", MODES)
def test_every_kind_becomes_rgb(kind):
    content, colour = MODES[kind]
    assert flat(content) == colour


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bits_are_refused_and_not_clipped(kind):
    with pytest.raises(ValueError, match="not 8 bits a channel; convert it"):
        pictures.decode(encoded(Image.fromarray(np.full((9, 9), 4000, np.uint16)), kind), 8)


def test_inks_in_a_jpeg():
    found = np.array(flat(encoded(Image.new("CMYK", (64, 64), (0, 0, 0, 255)), "JPEG")))
    assert (found < 5).all()


def photograph(width: int, height: int, **options) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (height // 40, width // 40, 3), dtype=np.uint8)
    return encoded(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC), "JPEG", **options)


def test_a_photograph_is_unpacked_small_and_looks_the_same(monkeypatch):
    content = photograph(1600, 1200)
    unpacked = []
    fit = ImageOps.fit
    monkeypatch.setattr(ImageOps, "fit", lambda image, *args: unpacked.append(image.size) or fit(image, *args))
    found = pictures.decode(content, 32)
    assert unpacked == [(200, 150)]  # an eighth: still more than 32 pixels twice
    whole = fit(Image.open(io.BytesIO(content)), (32, 32), Image.Resampling.BILINEAR)
    assert np.abs(found.astype(int) - np.asarray(whole)).mean() < 2
    pictures.decode(content, 600)
    assert unpacked[1:] == [(1600, 1200)]


def test_a_turned_photograph_is_turned_also_when_it_is_unpacked_small():
    exif = Image.Exif()
    exif[0x0112] = 6  # Orientation: the upper rows stand at the right
    picture = Image.new("RGB", (800, 800))
    picture.paste((255, 255, 255), (0, 0, 800, 400))
    for content in (encoded(picture, "JPEG", exif=exif), encoded(picture, "PNG", exif=exif)):
        found = pictures.decode(content, 16)[:, :, 0]
        assert (found[:, 9:] > 250).all() and (found[:, :7] < 5).all()


def test_no_memory_address_in_what_is_said():
    with pytest.raises(ValueError, match="^of no allowed format, or damaged$"):
        pictures.decode(b"hello", 8)


@pytest.mark.parametrize(
    ("size", "kind"), [((9280, 6944), "JPEG"), ((9248, 6936), "JPEG"), ((9280, 6944), "PNG"), ((12000, 9000), "JPEG")]
)
def test_phones_of_64_and_108_megapixels(size, kind):
    content = encoded(Image.new("L", size, 100), kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow warns of bombs from 90 megapixels on
        assert flat(content) == [100] * 3


@pytest.mark.parametrize(
    ("size", "kind", "most"), [((12000, 9000), "PNG", "70,000,000"), ((12000, 10001), "JPEG", "120,000,000")]
)
def test_more_pixels_than_the_memory_should_hold(size, kind, most):
    with pytest.raises(ValueError, match=f"{size[0]} x {size[1]} pixels; 1 to {most} in all"):
        pictures.decode(encoded(Image.new("L", size), kind), 8)
