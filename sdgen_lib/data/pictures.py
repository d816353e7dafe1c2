"""A picture file as a square RGB array, from whoever's camera or program it comes.

Nothing in the file is trusted: its size is checked before it is unpacked, and no format is opened that runs programs.
What cannot be used is a ValueError that says why, or the decoder's own error.
"""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# Not Pillow's whole list: EPS, for one, starts Ghostscript.
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
FORMATS_TEXT = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")  # 8 bits a channel
# Phones of "64 megapixels" make pictures of 9280 x 6944, those of 108 make 12 000 x 9000, as JPEGs. A JPEG is unpacked
# small (see `draft` below); of another kind 70 million pixels take 800 MB on the way where they are transparent, and
# 100 kB of file are enough to ask for that.
MAX_PIXELS, MAX_JPEG_PIXELS, MAX_BYTES = 70_000_000, 120_000_000, 256_000_000


def read(file: Path, root: Path) -> bytes:
    """The content of one file of the dataset in `root`. A link may lead to another file of it, and nowhere else."""
    if file.is_symlink() and not Path(os.path.realpath(file)).is_relative_to(os.path.realpath(root)):
        raise ValueError("it is a link that leads out of the dataset; put the file itself there")
    if not file.is_file():  # a named pipe would keep us waiting for ever
        raise ValueError("it is no file")
    size = file.stat().st_size
    if not 0 < size <= MAX_BYTES:
        raise ValueError("it is empty" if not size else f"it is larger than {MAX_BYTES // 10**6} MB")
    return file.read_bytes()


def decode(content: bytes, size: int) -> np.ndarray:
    """uint8 ``(size, size, 3)``: the shorter side resized (bilinear), the longer one cut to its centre.

    What is transparent becomes white. A picture that a camera stored lying on its side is turned.
    """
    return np.asarray(ImageOps.fit(_picture(content, size), (size, size), Image.Resampling.BILINEAR))


def _picture(content: bytes, size: int) -> Image.Image:
    """A file's one picture in RGB, its shorter side of `size` pixels or more, if it has so many."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # its 90 megapixels are not our limits
            image = Image.open(io.BytesIO(content), formats=FORMATS)  # reads the header only
    except UnidentifiedImageError as error:
        raise ValueError("of no allowed format, or damaged") from error
    except Image.DecompressionBombError as error:  # Pillow's own limit lies above ours
        raise ValueError(
            f"it has more than the {MAX_JPEG_PIXELS:,} pixels that are allowed; make it smaller"
        ) from error
    width, height = image.size
    most = MAX_JPEG_PIXELS if image.format in ("JPEG", "MPO") else MAX_PIXELS
    if not 0 < width * height <= most:
        raise ValueError(f"it has {width} x {height} pixels; 1 to {most:,} in all are allowed; make it smaller")
    if max(width, height) > 200 * min(width, height):
        raise ValueError(f"it has {width} x {height} pixels; a side may be 200 times the other at most")
    # Phones store a photograph with helpers behind it, a depth map or a preview, as MPO: it is the first picture.
    if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
        raise ValueError(f"it has {image.n_frames} frames; give each a file of its own")
    if image.mode not in MODES:
        raise ValueError(f"its pixels are {image.mode}, not 8 bits a channel; convert it to 8-bit RGB or grey")
    image.draft(None, (2 * size, 2 * size))  # a JPEG is unpacked at a half, a quarter or an eighth where that is enough
    image = ImageOps.exif_transpose(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
