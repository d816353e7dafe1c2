"""What generated images are worth beside real ones: classifiers of equally many steps on real, generated or both.

Each row trains its classifiers for the same number of steps, looks at the validation images as often, and takes the
same classifier seeds: rows differ by what is trained on, and are compared seed by seed (`show.tables.compared`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch

from ..classify import Attack, Mixture
from ..config.messages import unknown_name
from ..config.settings import View
from ..data import Split, resize
from ..store.run import Step
from ..work.workspace import Source, Workspace
from .rows import Training, row_step
from .sets import block_step, blocks_of, set_topics, synthetic

KINDS = ("real", "generated", "both")
GENERATED, BOTH = ("generated",), ("both",)


@dataclasses.dataclass(frozen=True)
class Study:
    """One choice of a method. ``title``: of the choice; ``kinds``: what is trained on for each value, of `KINDS`.

    ``values``: by their names, what each one changes: settings, by their names, arguments of `worth_step`, and what
    else the method's own ``study`` knows.
    """

    title: str
    kinds: tuple[str, ...]
    values: Mapping[str, Mapping[str, Any]]


def equal_steps(ws: Workspace, multiple: int) -> dict[str, int]:
    """The options of `classify.train_classifier` that make rows comparable: those of the largest set, x``multiple``.

    "steps" of the optimiser, and an epoch's images, after which the validation images are looked at.
    """
    return steps_for(ws, multiple * len(ws.data.train))


def steps_for(ws: Workspace, images: int) -> dict[str, int]:
    """As `equal_steps`, for a largest set of so many images."""
    s = ws.settings
    images = max(images, s.classifier_epoch_images)
    images = min(images, s.classifier_epoch_limit or images)
    steps = s.classifier_epochs * math.ceil(images / s.classifier_batch_size)
    return {"steps": steps, "epoch_images": images, "epoch_limit": images}


def worth_step(
    ws: Workspace,
    source: Source | None,
    kind: str,
    *,
    multiple: int = 1,
    ratio: tuple[int, int] | None = None,
    augmentation: str = "none",
    network: str = "resnet20",
    steps_of: int | None = None,
    tests: Mapping[str, Split] | None = None,
    attacks: Mapping[str, Attack] | None = None,
) -> Step:
    """One row: ``kind`` of `KINDS`, with x``multiple`` generated images of ``source`` (None for "real").

    ``ratio``: real to generated images in each batch of "both"; None: as if the sets were one. ``steps_of``: the
    classifiers train as long as those of the set of so many times the real one's size (None: ``multiple``).
    ``augmentation``, ``network``: as in `classify.train_classifier`. ``tests``, ``attacks``: as in `rows.row_step`.
    Raises ValueError for an unknown kind.
    """
    if kind not in KINDS:
        raise unknown_name("kind", kind, KINDS)
    real, n = ws.data.train, len(ws.data.train)
    needs = () if kind == "real" else tuple(block_step(ws, source, block) for block in blocks_of(ws, multiple))

    def training(view: View) -> Training:
        if kind == "real":
            return Training(real)
        generated, facts = synthetic(ws, source, multiple), {"point": dict(source.point()), **source.facts}
        return Training(generated if kind == "generated" else Mixture((real, generated), ratio), facts)

    images = {"real": n, "generated": multiple * n, "both": (multiple + 1) * n}[kind]
    return row_step(
        ws,
        f"worth/{kind}",
        training,
        images,
        needs=needs,
        topics=() if kind == "real" else set_topics(ws, multiple),
        inputs={"ratio": list(ratio) if ratio else None},
        options={"augmentation": augmentation, "network": network, **equal_steps(ws, steps_of or multiple)},
        tests=tests,
        attacks=attacks,
    )


def worth(ws: Workspace, source: Source | None, kind: str, **how: Any) -> dict[str, Any]:
    """A row, made if it is not there, as `rows.accuracies` gives it; arguments as `worth_step`."""
    return dict(ws.run.result(worth_step(ws, source, kind, **how)).facts)


def through_vae(ws: Workspace) -> Split:
    """The real training images after encoding and decoding: what the autoencoder alone takes away."""
    latents, size = ws.latents["train"].latents, ws.data.image_size
    decoded = [ws.backbone.decode(part) for part in latents.split(ws.settings.sample_batch_size)]
    images = torch.cat([resize(part, size, ws.settings.antialias).cpu() for part in decoded])
    return dataclasses.replace(ws.data.train, images=images)


def through_vae_step(ws: Workspace, steps_of: int = 1) -> Step:
    """The row of classifiers trained on `through_vae`, as long as those of `worth_step` with this ``steps_of``.

    (Zhou et al. 2023, table 1: what a generator of these latents can reach at most.)
    """
    return row_step(
        ws,
        "worth/through_vae",
        lambda view: Training(through_vae(ws)),
        len(ws.data.train),
        needs=(ws.latents_step,),
        topics=("sampling",),
        roots=("model",),
        options=equal_steps(ws, steps_of),
    )
