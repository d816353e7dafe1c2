"""Scores of a trained classifier on named test sets: the CAS, if it was trained on generated images."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from ..data import Split
from .mixtures import Mixture
from .networks import fraction_right, predict
from .training import train_classifier


@dataclass(frozen=True)
class Score:
    """What one classifier reached on one test set, as fractions 0..1.

    ``per_class``: the recall of each class: the fraction of its images that were recognised; nan where the test set has
    no image of it. ``balanced_accuracy``: the mean of those that are not nan.
    """

    accuracy: float
    balanced_accuracy: float
    per_class: tuple[float, ...]
    predicted: torch.Tensor = field(compare=False, repr=False)  # classes of the test images, int64 (N,)

    @classmethod
    def of(cls, predicted: torch.Tensor, labels: torch.Tensor, num_classes: int) -> Score:
        """The score of ``predicted`` classes, int64 (N,), where the ``labels``, int64 (N,), are right."""
        counts = torch.bincount(labels, minlength=num_classes).tolist()
        right = torch.bincount(labels[predicted == labels], minlength=num_classes).tolist()
        per_class = tuple(hits / count if count else math.nan for hits, count in zip(right, counts))
        present = [recall for recall, count in zip(per_class, counts) if count]
        return cls(fraction_right(predicted, labels), sum(present) / len(present), per_class, predicted)


@dataclass(frozen=True)
class Result:
    """One classifier at the epoch with the best real validation accuracy, and its score on each test set.

    ``epochs`` and ``steps`` (of the optimiser) are those of the whole training, early stopping included.
    """

    val_accuracy: float
    best_epoch: int
    epochs: int
    steps: int
    tests: dict[str, Score]


def score(
    training: Split | Mixture,
    val: Split,
    tests: dict[str, Split],
    num_classes: int,
    *,
    on_step: Callable[[int], None] | None = None,
    **options,
) -> Result:
    """Trains a classifier and tests it on each of the real ``tests``: the CAS, if ``training`` was generated.

    (Ravuri and Vinyals 2019.) ``options`` and errors as in `train_classifier`.
    """
    steps = 0

    def count(taken: int) -> None:
        nonlocal steps
        steps = taken
        if on_step:
            on_step(taken)

    model, history = train_classifier(training, val, num_classes, on_step=count, **options)
    best = max(history)
    scores = {name: Score.of(predict(model, test.images), test.labels, num_classes) for name, test in tests.items()}
    return Result(best, history.index(best) + 1, len(history), steps, scores)
