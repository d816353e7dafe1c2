"""Scores of a trained classifier on named test sets: the CAS, if it was trained on generated images.

And how well it knows how often it is right, and what is left of its accuracy when it is attacked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from ..data import Split
from .attacks import Attack
from .mixtures import Mixture
from .networks import accuracy, fraction_right, logits_of, predict
from .training import looked_at, train_classifier

BINS = 15  # of the confidence (Guo et al. 2017)


@dataclass(frozen=True)
class Score:
    """What one classifier reached on one test set, as fractions 0..1.

    ``per_class``: the recall of each class: the fraction of its images that were recognised; nan where the test set has
    no image of it. ``balanced_accuracy``: the mean of those that are not nan. ``calibration_error``: see
    `calibration_error`; nan where the confidence is not known. It is not compared: nan equals nothing.
    """

    accuracy: float
    balanced_accuracy: float
    per_class: tuple[float, ...]
    predicted: torch.Tensor = field(compare=False, repr=False)  # classes of the test images, int64 (N,)
    calibration_error: float = field(default=math.nan, compare=False)

    @classmethod
    def of(
        cls, predicted: torch.Tensor, labels: torch.Tensor, num_classes: int, confidence: torch.Tensor | None = None
    ) -> Score:
        """The score of ``predicted`` classes, int64 (N,), where the ``labels``, int64 (N,), are right.

        ``confidence``: the probability that the classifier gave each of its predictions, float (N,). Raises ValueError
        if there is none, if they are not as many, for a class outside 0 .. ``num_classes`` - 1, or for a confidence
        outside 0..1.
        """
        _check_classes("The predictions", predicted, num_classes)
        _check_classes("The labels", labels, num_classes)
        if len(predicted) != len(labels):
            raise ValueError(f"There are {len(predicted)} predictions for {len(labels)} labels; give one for each.")
        counts = torch.bincount(labels, minlength=num_classes).tolist()
        right = torch.bincount(labels[predicted == labels], minlength=num_classes).tolist()
        per_class = tuple(hits / count if count else math.nan for hits, count in zip(right, counts))
        present = [recall for recall, count in zip(per_class, counts) if count]
        error = math.nan if confidence is None else calibration_error(confidence, predicted == labels)
        return cls(fraction_right(predicted, labels), sum(present) / len(present), per_class, predicted, error)


def calibration_error(confidence: torch.Tensor, right: torch.Tensor) -> float:
    """The expected calibration error, 0..1 (Guo et al. 2017, equation 3), with 15 bins of equal width.

    Images are put into bins by their ``confidence``, float (N,), (0, 1/15], (1/15, 2/15] and so on. It is the distance
    between a bin's mean confidence and its share of ``right`` predictions, bool (N,), averaged over the images. nan
    where a confidence is nan, as of a classifier whose training came to nothing. Raises ValueError unless they are as
    many, and for a confidence outside 0..1.
    """
    if confidence.shape != right.shape:
        raise ValueError(f"There are {len(confidence)} confidences for {len(right)} predictions; give one for each.")
    if outside := confidence[(confidence < 0) | (confidence > 1)].tolist():
        raise ValueError(f"A confidence is {outside[0]}; each must be a probability, 0..1.")
    if confidence.isnan().any():
        return math.nan
    confidence = confidence.double()
    bins = (confidence * BINS).ceil().long().clamp(min=1) - 1
    gaps = torch.zeros(BINS, dtype=torch.float64).index_add_(0, bins, right.double() - confidence)
    return float(gaps.abs().sum() / len(confidence))


@dataclass(frozen=True)
class Result:
    """One classifier at the epoch with the best real validation accuracy, and its score on each test set.

    ``val_accuracy``: of this epoch, on all validation images, also where fewer were looked at after each epoch.

    ``epochs`` and ``steps`` (of the optimiser) are those of the whole training, early stopping included.
    ``attacks``: the accuracy, 0..1, on the attacked images of the test set "test", by the attacks' names.
    """

    val_accuracy: float
    best_epoch: int
    epochs: int
    steps: int
    tests: dict[str, Score]
    attacks: dict[str, float] = field(default_factory=dict)


def score(
    training: Split | Mixture,
    val: Split,
    tests: dict[str, Split],
    num_classes: int,
    *,
    attacks: Mapping[str, Attack] | None = None,
    on_step: Callable[[int], None] | None = None,
    **options,
) -> Result:
    """Trains a classifier and tests it on each of the real ``tests``: the CAS, if ``training`` was generated.

    (Ravuri and Vinyals 2019.) ``options`` as in `train_classifier`. ``attacks``: of the images in
    ``tests["test"]``, by name. Raises ValueError as `train_classifier` does, and before anything is trained: for
    attacks without these, images that are not uint8 (N, 3, H, W), labels outside 0 .. ``num_classes`` - 1 (those of
    ``training`` may be probabilities), or a set to choose or test with that is empty.
    """
    if attacks and "test" not in tests:
        raise ValueError(f"attacks are of the test set 'test', and there is none; the tests are {sorted(tests)}.")
    parts = training.parts if isinstance(training, Mixture) else (training,)
    for number, part in enumerate(parts, 1):
        name = "training" if len(parts) == 1 else f"part {number} of training"
        _check_images(name, part)
        if len(part) and not part.labels.is_floating_point():  # a part may be empty; all together are `Mixture`'s error
            _check_classes(f"The labels of {name}", part.labels, num_classes)
    for name, split in {"val": val, **{f"tests[{name!r}]": test for name, test in tests.items()}}.items():
        _check_images(name, split)
        _check_classes(f"The labels of {name}", split.labels, num_classes)
    steps = 0

    def count(taken: int) -> None:
        nonlocal steps
        steps = taken
        if on_step:
            on_step(taken)

    model, history = train_classifier(training, val, num_classes, on_step=count, **options)
    best = max(history)
    val_accuracy = best if looked_at(val, options.get("val_images")) is val else accuracy(model, val)
    scores = {name: _scored(model, test, num_classes) for name, test in tests.items()}
    attacked = {name: _attacked(model, tests["test"], attack) for name, attack in (attacks or {}).items()}
    return Result(val_accuracy, history.index(best) + 1, len(history), steps, scores, attacked)


def _scored(model: nn.Module, test: Split, num_classes: int) -> Score:
    logits = logits_of(model, test.images)
    return Score.of(logits.argmax(1), test.labels, num_classes, logits.softmax(1).amax(1))


def _attacked(model: nn.Module, test: Split, attack: Attack) -> float:
    return fraction_right(predict(model, attack(model, test.images, test.labels)), test.labels)


def _check_images(name: str, split: Split) -> None:
    """Raises ValueError unless the images of ``split`` are uint8 (N, 3, H, W), one for each label."""
    images = split.images
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(
            f"The images of {name} are {images.dtype} {tuple(images.shape)}; they must be uint8 (N, 3, H, W), 0..255."
        )
    if len(images) != len(split.labels):
        raise ValueError(f"{name} has {len(images)} images and {len(split.labels)} labels; give one for each.")


def _check_classes(name: str, classes: torch.Tensor, num_classes: int) -> None:
    """Raises ValueError unless ``classes`` are whole numbers (N,), at least one, from 0 to ``num_classes`` - 1."""
    if classes.ndim != 1 or classes.is_floating_point() or classes.is_complex() or classes.dtype == torch.bool:
        raise ValueError(f"{name} are {classes.dtype} {tuple(classes.shape)}; they must be whole numbers (N,).")
    if not len(classes):
        raise ValueError(f"{name} are none: there is no image to measure with; give one or more.")
    if outside := sorted({int(c) for c in (classes.min(), classes.max()) if not 0 <= c < num_classes}):
        raise ValueError(
            f"{name} hold {' and '.join(map(str, outside))}; with {num_classes} classes they must be "
            f"0 .. {num_classes - 1}."
        )
