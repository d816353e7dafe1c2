"""Work that can be counted before it is done: so many images through a kind of pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple


class Pass(NamedTuple):
    """A kind of pass whose seconds an image can be measured on a machine.

    ``kind``: "unet" (no gradient), "compiled unet", "context gradient", "weight gradient", "encode", "decode",
    "classifier" (a training step) or "classifiers" (several side by side). ``batch``: images at once. ``pixels``: the
    side of an image, where it is not the model's own. ``options``: of the classifier, as (name, value) pairs.
    """

    kind: str
    batch: int
    pixels: int = 0
    options: tuple[tuple[str, object], ...] = ()


Work = Mapping[Pass, float]  # images of each


def total(works: Iterable[Work]) -> Work:
    """The sum of several works."""
    found: Counter[Pass] = Counter()
    for work in works:
        found.update(work)
    return dict(found)
