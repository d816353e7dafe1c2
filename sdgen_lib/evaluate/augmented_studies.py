"""What augmented conditioning is worth: long tails (the paper's section 4.1), few images of each class (4.2), guidance.

Rows are those of `rows.row_step`: the classifiers of a table take equally many steps and the same seeds.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..classify import Mixture
from ..config.messages import unknown_name
from ..config.settings import View
from ..data import Split
from ..data.tails import long_tailed
from ..methods.augmented import AugmentedMethod
from ..store import files
from ..store.run import Step
from ..work.workspace import Source, Workspace
from .rows import Training, row_step
from .sets import records
from .worth import GENERATED, KINDS, Study, steps_for, studied

FILLING = "filling.safetensors"
FILL_VERSION = 1  # raised whenever the same settings would fill a tail otherwise
PRIORS = ("none", "real", "batch")


def tailed(ws: Workspace) -> Workspace:
    """The same run on a long-tailed version of its training images, as its settings say."""
    s = ws.settings
    return ws.holding(long_tailed(ws.data, s.augmented_tail_factor, s.augmented_tail_largest, s.seed))


def oversampled(split: Split, num_classes: int) -> Split:
    """Each class's images over and over, until it has as many as the largest; the order is the split's own."""
    counts = torch.bincount(split.labels, minlength=num_classes)
    rows = [
        (split.labels == label)
        .nonzero()[:, 0]
        .repeat(math.ceil(int(counts.max()) / max(1, int(count))))[: counts.max()]
        for label, count in enumerate(counts)
    ]
    return split.take(torch.cat(rows).sort().values)


def missing_labels(split: Split, num_classes: int) -> torch.Tensor:
    """The classes of the images that each class lacks beside the largest: int64 (M,), sorted."""
    counts = torch.bincount(split.labels, minlength=num_classes)
    return torch.arange(num_classes).repeat_interleave(counts.max() - counts)


def prior_of(kind: str, real: torch.Tensor, made: torch.Tensor, num_classes: int) -> list[float] | None:
    """The classes' shares that a balanced softmax takes (Ren et al. 2020): "real", those of the real images (released
    code); "batch", those of a batch that is half real, half generated; "none", no balanced softmax.

    ``real`` and ``made``: the labels, int64; without any of the second a batch is all real.
    """
    if kind not in PRIORS:
        raise unknown_name("prior", kind, PRIORS)
    if kind == "none":
        return None
    shares = torch.bincount(real, minlength=num_classes) / len(real)
    if kind == "batch" and len(made):
        shares = 0.5 * shares + 0.5 * torch.bincount(made, minlength=num_classes) / len(made)
    return shares.tolist()


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the long tail's table. ``filled``: a conditioning that draws what the classes lack, or None;
    ``oversample``: the real images are repeated to balance; ``half``: a batch is half real, half generated;
    ``prior``: one of `PRIORS`; ``augmentation``: as `classify.train_classifier` takes it."""

    filled: str | None = None
    oversample: bool = False
    half: bool = False
    prior: str = "none"
    augmentation: str = "none"


#: The rows that chapter 11 shows, by name.
TAIL = {
    "real": Row(),
    "oversampled": Row(oversample=True),
    "oversampled, randaugment": Row(oversample=True, augmentation="randaugment"),
    "filled: text": Row(filled="text"),
    "filled: random image": Row(filled="random image"),
    "filled: embedding cutmix + dropout": Row(filled="embedding cutmix + dropout"),
    "filled: random image, randaugment": Row(filled="random image", augmentation="randaugment"),
}
#: The training of the paper's section 4.1: half-real batches and balanced softmax, with either prior.
AS_PUBLISHED = {
    "real, balanced softmax": Row(prior="real"),
    "half real, random image, prior of real": Row(filled="random image", half=True, prior="real"),
    "half real, random image, prior of batch": Row(filled="random image", half=True, prior="batch"),
    "half real, embedding cutmix + dropout, prior of real": Row("embedding cutmix + dropout", half=True, prior="real"),
    "half real, embedding cutmix + dropout, prior of batch": Row(
        "embedding cutmix + dropout", half=True, prior="batch"
    ),
}


def filling_step(method: AugmentedMethod, conditioning: str, drawn: int = 0) -> Step:
    """What a long tail lacks to balance, drawn once for all rows that are filled so: `FILLING`, with what is on record
    of each image (see `sets.records`). ``method``, ``drawn``: as `tail_step` takes them."""
    ws, source = method.ws, method.source(conditioning)
    lacking = missing_labels(ws.data.train, ws.data.num_classes)

    def make(folder: Path, view: View) -> dict[str, Any]:
        generator = source.build()
        images = generator(lacking, seed=view.seed, set_name=f"long tail {drawn}", progress=conditioning)
        on_record = records(generator, lacking, view.seed, first_index=0)
        files.save_tensors(folder / FILLING, {"images": images, **on_record})
        return {"point": dict(source.point()), "num_images": len(images)}

    return Step(
        "long_tail/filling",
        make,
        topics=("seed", *source.step.topics),
        needs=source.step.needs,
        roots=tuple(dict.fromkeys(("data", *source.step.roots))),
        inputs={"drawn": drawn, **source.inputs()},
        version=FILL_VERSION,
        work=lambda: source.passes(len(lacking)),
    )


def tail_step(method: AugmentedMethod, row: Row, drawn: int = 0) -> Step:
    """One row of the long tail's table; ``method`` is of a `tailed` run. ``drawn``: which set of generated images."""
    ws, real, classes = method.ws, method.ws.data.train, method.ws.data.num_classes
    lacking = missing_labels(real, classes)
    fills = bool(row.filled) and len(lacking) > 0  # of balanced images nothing is lacking
    filling = filling_step(method, row.filled, drawn) if fills else None
    balanced = len(real) + len(lacking)

    def training(view: View) -> Training:
        if filling is None:
            return Training(oversampled(real, classes) if row.oversample else real)
        made = Split(files.load_tensors(ws.run.file(filling, FILLING))["images"], lacking)
        return Training(
            Mixture((real, made), (1, 1) if row.half else None), {"point": ws.run.result(filling).facts["point"]}
        )

    prior = prior_of(row.prior, real.labels, lacking if filling else lacking[:0], classes)
    return row_step(
        ws,
        "long_tail",
        training,
        balanced if row.filled or row.oversample else len(real),
        needs=(filling,) if filling else (),
        inputs={"row": dataclasses.asdict(row), "prior": prior},
        options={
            "augmentation": row.augmentation,
            **({"class_prior": tuple(prior)} if prior else {}),
            **steps_for(ws, balanced),
        },
    )


def tail_rows(method: AugmentedMethod, rows: Mapping[str, Row] | None = None, drawn: int = 0) -> dict[str, dict]:
    """The rows of the long tail's table by name, those that are not there made first."""
    asked = (TAIL if rows is None else rows).items()
    return {name: dict(method.ws.run.result(tail_step(method, row, drawn)).facts) for name, row in asked}


# --- one choice at a time ---

SHOTS = (1, 2, 4, 8, 16)


def studies(method: AugmentedMethod) -> dict[str, Study]:
    """The studies by name, for a run's sizes.

    A value may also have a "conditioning", a "guidance_scale", and "images", how many real images there are.
    """
    ws = method.ws
    most = len(ws.data.train) // ws.data.num_classes
    told = ("text", "random image", "random image + dropout", "embedding cutmix + dropout")
    return {
        "conditionings": Study(
            "what is done to the image (table 1)", GENERATED, {n: {"conditioning": n} for n in told}
        ),
        "guidance": Study(
            "UGS (table 3)", GENERATED, {f"{v:g}": {"guidance_scale": v} for v in (1.0, 2.0, 4.0, 7.0, 10.0)}
        ),
        "dropout": Study(
            "share of the embedding that is dropped (figure 6)",
            GENERATED,
            {
                f"{v:g}": {"conditioning": "random image + dropout", "augmented_dropout": v}
                for v in (0.0, 0.2, 0.4, 0.7, 1.0)
            },
        ),
        "strength": Study(
            "strength of img2img",
            GENERATED,
            {f"{v:g}": {"conditioning": "img2img", "augmented_strength": v} for v in (0.25, 0.5, 0.75, 1.0)},
        ),
        "shots": Study(
            "real images of each class",
            KINDS,
            {str(k): {"images": k * ws.data.num_classes} for k in (*(k for k in SHOTS if k < most), most)},
        ),
    }


def study(method: AugmentedMethod, name: str, multiple: int) -> dict[tuple[str, str], dict[str, Any]]:
    """The rows of a study by (value, kind), see `worth.studied`."""

    def place(how: dict[str, Any]) -> tuple[Workspace, Source]:
        count, conditioning = how.pop("images", None), how.pop("conditioning", None)
        scale = how.pop("guidance_scale", None)
        varied = {key: how.pop(key) for key in tuple(how) if key.startswith("augmented_")}
        ws = method.ws.few(count) if count else method.ws
        ws = ws.varied(**varied) if varied else ws
        return ws, AugmentedMethod(ws).source(conditioning, scale)

    return studied(studies(method), name, place, multiple)
