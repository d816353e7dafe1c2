"""Any generated set beside real images, whoever made it: CAS, real + generated, quality, copies, other test sets."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from ..classify import Mixture
from ..data import Split
from ..store.run import Step
from ..work.workspace import Workspace
from . import metrics, quality
from .rows import Training, row_step
from .worth import steps_for

AUGMENTATION = "randaugment"  # what generated images have to beat


@dataclasses.dataclass(frozen=True)
class Judged:
    """What is known of a generated set: ``rows`` as `rows.accuracies` gives them, by name; the ``assessment`` of each
    image and class; ``whole`` and ``held_out``: `metrics.compare` of generated images, and of as many real validation
    images: the measures depend on how many there are; ``leaks``: which generated images are twins (`quality.twins`) of
    the real "validation" and "test" images, bool (M,) each; ``real_leaks``: which real training images are, (N,)."""

    generated: Split
    rows: Mapping[str, Mapping[str, Any]]
    assessment: quality.Assessment
    whole: Mapping[str, Any]
    held_out: Mapping[str, Any]
    leaks: Mapping[str, torch.Tensor]
    real_leaks: Mapping[str, torch.Tensor]


def rows_of(ws: Workspace, generated: Split, tests: Mapping[str, Split] | None = None) -> dict[str, Step]:
    """The steps of the rows by name: real, generated and both, with equal classifier steps, plain and augmented.

    ``tests``: other test sets by name. A generated set is known by its content: another one has other rows.
    """
    real, both = ws.data.train, Mixture((ws.data.train, generated))
    sets = {"real": real, "generated": generated, "real + generated": both}
    steps = {}
    for augmentation in ("none", AUGMENTATION):
        for name, images in sets.items():
            given = {} if name == "real" else {"generated": generated.fingerprint}
            steps[name if augmentation == "none" else f"{name}, {augmentation}"] = row_step(
                ws,
                f"judged/{name.replace(' + ', '_and_')}",
                lambda _, images=images: Training(images),
                len(images),
                inputs=given,
                options={"augmentation": augmentation, **steps_for(ws, max(len(real), len(generated)))},
                tests=tests,
                label=name if augmentation == "none" else f"{name}, {augmentation}",
            )
    return steps


def judged(ws: Workspace, generated: Split, tests: Mapping[str, Split] | None = None) -> Judged:
    """All of it; rows that are there are not made again. ``generated``: images of the data's size, and its labels.

    Neighbourhoods of the whole sets are of `metrics.NEIGHBOURS` images, of fewer where a set is smaller. Raises
    ValueError for fewer than two real training, real validation or generated images.
    """
    data = ws.data
    counts = {"real training": len(data.train), "real validation": len(data.val), "generated": len(generated)}
    for kind, count in counts.items():
        if count < 2:
            raise ValueError(f"There is {count} {kind} image; to compare sets takes two of each kind at least.")
    network = quality.judge_of(ws)
    assessment = quality.assess(network, data.train, data.val, generated, data.class_names)
    rows = {name: dict(ws.run.result(step).facts) for name, step in rows_of(ws, generated, tests).items()}
    features = metrics.extractor("resnet20", network)
    known, k = features(data.train.images), min(metrics.NEIGHBOURS, *(count - 1 for count in counts.values()))
    count, random = min(len(generated), len(data.val)), torch.Generator()
    parts = [
        images.take(torch.randperm(len(images), generator=random.manual_seed(ws.settings.seed))[:count])
        for images in (generated, data.val)
    ]
    whole, held_out = (metrics.compare(known, features(part.images), features.name, k) for part in parts)
    held = {"validation": data.val, "test": data.test}
    leaks, real_leaks = (
        {name: quality.twins(images.images, among.images) for name, images in held.items()}
        for among in (generated, data.train)
    )
    return Judged(generated, rows, assessment, whole, held_out, leaks, real_leaks)
