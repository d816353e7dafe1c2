"""What generated images are worth beside real ones: classifiers of equally many steps on real, generated or both.

Each row trains its classifiers for the same number of steps, looks at the validation images as often, and takes the
same classifier seeds: rows differ by what is trained on, and are compared seed by seed (`show.tables.compared`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..classify import Attack, Mixture
from ..classify.networks import probabilities_of
from ..config.messages import unknown_name
from ..config.settings import View
from ..data import Split, resize
from ..store.run import Step
from ..work.workspace import Source, Workspace
from .filters import Filter, filtered_needs, images_of, set_of
from .quality import judge_of, judge_step
from .rows import Training, row_step
from .sets import block_step, blocks_of, set_topics

KINDS = ("real", "generated", "both")
GENERATED, BOTH = ("generated",), ("both",)
EQUAL_EPOCHS = {"epoch_images": 1, "epoch_limit": None}  # an epoch is the set itself, however small or large


@dataclasses.dataclass(frozen=True)
class Study:
    """One choice of a method. ``title``: of the choice; ``kinds``: what is trained on for each value, of `KINDS`.

    ``values``: by their names, what each one changes: settings, by their names, arguments of `worth_step`, and what
    else the place of the study knows, see `studied`.
    """

    title: str
    kinds: tuple[str, ...]
    values: Mapping[str, Mapping[str, Any]]


def equal_steps(ws: Workspace, multiple: float) -> dict[str, int]:
    """The options of `classify.train_classifier` that make rows comparable: those of the largest set, x``multiple``.

    "steps" of the optimiser, and an epoch's images, after which the validation images are looked at.
    """
    return steps_for(ws, round(multiple * len(ws.data.train)))


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
    steps_of: float | None = None,
    kept: Filter | None = None,
    soft: bool = False,
    equal_epochs: bool = False,
    tests: Mapping[str, Split] | None = None,
    attacks: Mapping[str, Attack] | None = None,
) -> Step:
    """One row: ``kind`` of `KINDS`, with x``multiple`` generated images of ``source`` (None for "real").

    ``ratio``: real to generated images in each batch of "both"; None: as if the sets were one. ``steps_of``: the
    classifiers train as long as those of the set of so many times the real one's size (None: ``multiple``).
    ``augmentation``, ``network``: as in `classify.train_classifier`. ``kept``: a filter of the generated images.
    ``equal_epochs``: instead, they see each image of their set equally often, and a larger set takes more steps.
    ``soft``: their labels are the probabilities that `quality.judge_of` gives them (a teacher of real images).
    ``tests``, ``attacks``: as in `rows.row_step`.
    Raises ValueError for an unknown kind.
    """
    if kind not in KINDS:
        raise unknown_name("kind", kind, KINDS)
    real, n = ws.data.train, len(ws.data.train)
    if kind == "real":
        kept, soft, needs = None, False, ()
    elif kept:
        needs = filtered_needs(ws, source, multiple, kept)
    else:
        needs = tuple(block_step(ws, source, block) for block in blocks_of(ws, multiple))

    def training(view: View) -> Training:
        if kind == "real":
            return Training(real)
        generated, facts = set_of(ws, source, multiple, kept), {"point": dict(source.point()), **source.facts}
        if soft:
            told = probabilities_of(judge_of(ws), generated.images)
            generated = dataclasses.replace(generated, labels=told)
        return Training(generated if kind == "generated" else Mixture((real, generated), ratio), facts)

    made = 0 if kind == "real" else images_of(ws, multiple, kept)
    images = {"real": n, "generated": made, "both": n + made}[kind]
    chosen = {"kept": dataclasses.asdict(kept)} if kept else {}
    chosen |= {"soft": True} if soft else {}
    return row_step(
        ws,
        f"worth/{kind}",
        training,
        images,
        needs=(*needs, judge_step(ws)) if soft else needs,
        topics=() if kind == "real" else set_topics(ws, multiple),
        inputs={"ratio": list(ratio) if ratio else None, **chosen},
        options={
            "augmentation": augmentation,
            "network": network,
            **(EQUAL_EPOCHS if equal_epochs else equal_steps(ws, steps_of or multiple)),
        },
        tests=tests,
        attacks=attacks,
        label=", ".join([kind, *([augmentation] if augmentation != "none" else []), *([str(kept)] if kept else [])]),
    )


def worth(ws: Workspace, source: Source | None, kind: str, **how: Any) -> dict[str, Any]:
    """A row, made if it is not there, as `rows.accuracies` gives it; arguments as `worth_step`."""
    return dict(ws.run.result(worth_step(ws, source, kind, **how)).facts)


#: From what a value changes, a dict from which it takes what is not an argument of `worth_step`, to where its rows are
#: made and what they are drawn with.
Place = Callable[[dict[str, Any]], tuple[Workspace, Source]]


def studied(
    known: Mapping[str, Study], name: str, place: Place, multiple: int
) -> dict[tuple[str, str], dict[str, Any]]:
    """The rows of the study ``name`` by (value, kind), those that are not there made first.

    x``multiple`` images, and as many classifier steps as for these, unless a value says otherwise. Raises ValueError
    for an unknown study.
    """
    if name not in known:
        raise unknown_name("study", name, known)
    found = {}
    for value, changes in known[name].values.items():
        how = {"multiple": multiple, "steps_of": multiple} | dict(changes)
        ws, source = place(how)
        for kind in known[name].kinds:
            found[value, kind] = worth(ws, source if kind != "real" else None, kind, **how)
    return found


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
