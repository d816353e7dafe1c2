"""What the readers have in common: a dataset as it was found, and the checks of its class names and its size."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, field

import numpy as np
import psutil

from ..config.messages import printable, shown

PARTS = ("train", "val", "test")
MAX_CLASS_NAME = 200

# {"train": (images, labels), ...}: uint8 (N, H, H) or (N, H, H, 3); whole numbers (N,) or (N, 1), 0..C-1.
Parts = dict[str, tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Found:
    """What a reader found: ``parts`` are the splits that are there, or one called "all"; ``notes`` are for the reader
    of a notebook, one line each, of what was not taken as it lies there. ``files``: of a folder, the path in it that
    each image of a part comes from, with "/"."""

    slug: str
    class_names: tuple[str, ...]
    parts: Parts
    notes: tuple[str, ...] = ()
    files: dict[str, tuple[str, ...]] = field(default_factory=dict)


def memory_limit() -> int:
    """Bytes that an unpacked dataset may take: half of what is free, for grey images become RGB and splits copies."""
    return psutil.virtual_memory().available // 2


def check_memory(size: int) -> None:
    """Raises ValueError if ``size`` bytes are more than `memory_limit`."""
    if size > (limit := memory_limit()):
        raise ValueError(
            f"unpacked they take {size / 2**20:,.0f} MB, and at most {limit / 2**20:,.0f} MB, half of this machine's "
            "free memory, may be used: keep fewer or smaller images"
        )


def composed(text: str) -> str:
    """Text in Unicode's composed form (NFC): a Mac's files and archives often hold the same names decomposed."""
    return unicodedata.normalize("NFC", text)


def check_class_names(class_names: tuple[str, ...], where: object) -> None:
    """They are printed and drawn, never used as a path: any printable text will do, "T-shirt/top" too."""
    for name in class_names:
        is_visible = any(c.isprintable() and c != " " for c in name)  # not only spaces and joiners
        if not is_visible or printable(name) != name or len(name) > MAX_CLASS_NAME:
            raise ValueError(
                f"{printable(where)} has a class called {shown(name)}; a class name must be printable text of 1 to "
                f"{MAX_CLASS_NAME} characters."
            )


def make_slug(stem: str, digest) -> str:
    """A folder-safe name that changes with the content."""
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", composed(stem))[:80].strip(".-") or "data"
    return f"{stem}-{digest.hexdigest()[:8]}"


def reason(error: Exception, length: int = 300) -> str:
    """What a reader said, on one line, without the memory addresses of Python's objects."""
    text = getattr(error, "strerror", None) or re.sub(r"\s*<[^<>]* at 0x[0-9a-f]+>", "", str(error))
    return shown(text, length)[1:-1] or type(error).__name__
