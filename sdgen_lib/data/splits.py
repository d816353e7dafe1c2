"""The splits that a source does not have, and the ``N`` training images of ``name:N``."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from ..config.messages import printable
from .images import ImageData, Split
from .parts import Parts

TEST_FRACTION = 0.25  # of all the images
VAL_FRACTION, CIFAR_VAL_FRACTION = 0.15, 0.2  # of those for training


def three_splits(parts: Parts, seed: int, val_fraction: float = VAL_FRACTION) -> dict[str, Split]:
    """train, val and test: as given, or val taken from train, or all three from one part called "all".

    `seed` picks the validation images. A test split made here is the same for every seed.
    """
    splits = {part: to_split(*arrays) for part, arrays in parts.items()}
    if "all" in splits:
        splits["train"], splits["test"] = _split_off(splits.pop("all"), TEST_FRACTION, seed=0)
    if "val" not in splits:
        splits["train"], splits["val"] = _split_off(splits["train"], val_fraction, seed)
    return splits


def keep(data: ImageData, count: int, seed: int, name: str) -> ImageData:
    """`data` with `count` of its training images, in the classes' proportions; val and test stay whole.

    Raises:
        ValueError: `count` is less than the number of classes or more than there are; names ``name:count``.
    """
    if not data.num_classes <= count <= len(data.train):
        raise ValueError(
            f"'{printable(name)}:{count}' asks for {count} training images; it must be from {data.num_classes} "
            f"(the number of classes) to {len(data.train)} (all there are)."
        )
    train = data.train.take(stratified(data.train.labels, count, seed))
    return replace(data, slug=f"{data.slug}-{count}", train=train)


def stratified(labels: torch.Tensor, count: int, seed: int) -> np.ndarray:
    """`count` indices into `labels` (int64 ``(N,)``), sorted: a seeded choice in the classes' proportions.

    There is at least one of each class. Image k of a class of n has rank k/n, and the lowest ranks are taken
    (Adams' apportionment). Unlike scikit-learn's ``train_test_split`` this leaves no class out, and the 200 images
    of a seed are among its 400.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    shuffled, rank = labels.numpy()[order], np.empty(len(labels))
    for label in np.unique(shuffled):
        at = np.flatnonzero(shuffled == label)
        rank[at] = np.arange(len(at)) / len(at)
    return np.sort(order[np.argsort(rank, kind="stable")[:count]])


def _split_off(split: Split, fraction: float, seed: int) -> tuple[Split, Split]:
    """(the rest, about `fraction` of the images), both stratified."""
    count = max(round(fraction * len(split)), len(split.labels.unique()))
    chosen = np.zeros(len(split), dtype=bool)
    chosen[stratified(split.labels, count, seed)] = True
    return split.take(np.flatnonzero(~chosen)), split.take(np.flatnonzero(chosen))


def to_split(images: np.ndarray, labels: np.ndarray) -> Split:
    """uint8 ``(N, H, W)`` or ``(N, H, W, 3)`` and integer ``(N,)`` or ``(N, 1)`` arrays -> `Split`."""
    if images.ndim == 3:
        images = np.repeat(images[..., None], 3, axis=-1)
    images = np.require(images.transpose(0, 3, 1, 2), requirements=["C", "W"])  # W: torch shares its memory
    return Split(torch.from_numpy(images), torch.from_numpy(labels.reshape(-1).astype(np.int64)))
