"""Decoded pictures, kept so that a folder of photographs is decoded once."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np

from ..store import files
from .npz import read_arrays

VERSION = 1  # raised when `pictures.decode` makes other pixels of a file


def place(folder: Path, digest: str, size: int) -> Path:
    """Where the pictures of a dataset lie, by the SHA-256 of all its names and bytes and by their side in pixels."""
    return folder / f"{digest}-{size}px-v{VERSION}.npz"


def load(path: Path, count: int, size: int) -> np.ndarray | None:
    """The `count` pictures, uint8 ``(count, size, size, 3)``; None where they are not there, or not whole."""
    with contextlib.suppress(ValueError, OSError):
        images = read_arrays(path, ("images",)).get("images")  # the archive's own checksum finds what was changed
        if images is not None and (images.dtype, images.shape) == (np.uint8, (count, size, size, 3)):
            return images
    return None


def save(path: Path, images: np.ndarray) -> None:
    """Keeps the pictures, whole or not at all; where nothing can be written they are decoded again next time."""
    with contextlib.suppress(OSError), files.whole_file(path) as temporary, temporary.open("wb") as file:
        np.savez(file, images=images)
