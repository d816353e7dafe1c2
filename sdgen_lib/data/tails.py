"""Long-tailed versions of a dataset: few images of most classes, for training alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from .images import ImageData

GROUPS = ("many", "medium", "few")


def tail_counts(available: Sequence[int], factor: float, largest: int | None = None) -> list[int]:
    """How many images of each class a long tail keeps: n_max ``factor`` ** (-rank / (C - 1)) (Cao et al. 2019).

    The class of rank 0 has the most images ``available``, and of equal ones the earlier; n_max is what it has, or
    ``largest``. No class keeps more than it has or fewer than one. ``factor``: how many times the largest class is the
    smallest one; 1 is balance. Raises ValueError for a factor below 1.
    """
    if not factor >= 1:
        raise ValueError(
            f"A long tail's factor must be 1 or more (the largest class beside the smallest), not {factor}."
        )
    order = np.argsort(-np.asarray(available), kind="stable")
    most, last = min(max(available), largest or max(available)), max(1, len(available) - 1)
    counts = [0] * len(available)
    for rank, label in enumerate(order.tolist()):
        counts[label] = min(available[label], max(1, round(most * factor ** (-rank / last))))
    return counts


def long_tailed(data: ImageData, factor: float, largest: int | None, seed: int) -> ImageData:
    """``data`` whose training images have `tail_counts`; which of a class stay is chosen by ``seed``.

    Validation and test images stay whole.
    """
    counts, random = tail_counts(data.class_counts.tolist(), factor, largest), np.random.default_rng(seed)
    labels, kept = data.train.labels.numpy(), []
    for label, count in enumerate(counts):
        kept.append(random.permutation(np.flatnonzero(labels == label))[:count])
    tail = f"{data.slug}-tail-{factor:g}" + (f"-{largest}" if largest else "")
    return replace(data, slug=tail, train=data.train.take(np.sort(np.concatenate(kept))))


def groups(counts: Sequence[int]) -> dict[str, list[int]]:
    """The classes with many, medium and few real images, by name: thirds of the classes, the larger ones first.

    (ImageNet-LT's fixed bounds, above 100 and below 20, leave groups of a small dataset empty.) Of classes that cannot
    be dealt out evenly the medium group gets what is over.
    """
    order = np.argsort(-np.asarray(counts), kind="stable").tolist()
    third = len(order) // 3 or 1
    few = order[max(third, len(order) - third) :]
    return {"many": order[:third], "medium": order[third : len(order) - len(few)], "few": few}


def per_group(per_class: Sequence[Sequence[float | None]], counts: Sequence[int]) -> dict[str, list[float]]:
    """The mean accuracy over the classes of each of `groups`, for each of several classifiers.

    ``per_class``: a list of each class's accuracy for each classifier (None: no test image). NaN for an empty group.
    """
    found = {}
    for name, classes in groups(counts).items():
        accuracies = torch.tensor([[float("nan") if row[c] is None else row[c] for c in classes] for row in per_class])
        found[name] = accuracies.nanmean(1).tolist() if classes else [float("nan")] * len(per_class)
    return found
