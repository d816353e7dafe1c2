"""What augmented conditioning is worth: long tails (the paper's section 4.1), few images of each class (4.2), guidance.

Rows are those of `rows.row_step`: the classifiers of a table take equally many steps and the same seeds.
"""

from __future__ import annotations

import dataclasses
import functools
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
from ..methods.named import GENERATORS, generator_of
from ..store import files
from ..store.run import Step
from ..work.workspace import Source, Workspace
from . import metrics, quality
from .rows import Training, row_step
from .sets import records, synthetic
from .worth import GENERATED, KINDS, Study, steps_for, studied

FILLING = "filling.safetensors"
FILL_VERSION = 1  # raised whenever the same settings would fill a tail otherwise
PRIORS = ("none", "real", "batch")
PENALTIES = (0.001, 0.01, 0.1, 1.0)  # of `probe`, from strong to weak


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
    """A row of the long tail's table.

    ``filled``: what draws the images that the classes lack, a conditioning or another method's generator
    (`methods.named.GENERATORS`), or None; ``oversample``: the real images are repeated to balance; ``half``: a batch
    is half real, half generated; ``prior``: one of `PRIORS`; ``augmentation``: as `classify.train_classifier` takes it.
    """

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
#: The same by the other methods' generators, each learnt from the tail, and the class alone with an augmentation.
OTHERS = {
    "filled: Class-Encoder": Row(filled="after 1"),
    "filled: Diffusion Inversion": Row(filled="inversion"),
    "filled: text, randaugment": Row(filled="text", augmentation="randaugment"),
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


def filling_step(ws: Workspace, source: Source, drawn: int = 0) -> Step:
    """What a long tail lacks to balance, drawn once for all rows that are filled so: `FILLING`, with what is on record
    of each image (see `sets.records`). Arguments as `tail_step` takes them."""
    lacking = missing_labels(ws.data.train, ws.data.num_classes)

    def make(folder: Path, view: View) -> dict[str, Any]:
        generator = source.build()
        told = source.facts.get("conditioning", source.name)
        images = generator(lacking, seed=view.seed, set_name=f"long tail {drawn}", progress=told)
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


def tail_step(ws: Workspace, row: Row, source: Source | None = None, drawn: int = 0) -> Step:
    """One row of the long tail's table; ``ws`` is `tailed`. ``source``: what fills it, where the row is filled;
    ``drawn``: which set of generated images."""
    real, classes = ws.data.train, ws.data.num_classes
    lacking = missing_labels(real, classes)
    fills = bool(row.filled) and len(lacking) > 0  # of balanced images nothing is lacking
    filling = filling_step(ws, source, drawn) if fills else None
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


def filled_by(method: AugmentedMethod, name: str | None, beside: Workspace | None) -> tuple[Workspace, Source | None]:
    """Where a row that ``name`` fills is made, and what draws its images; arguments as `tail_rows` takes them."""
    if name not in GENERATORS:
        return method.ws, method.source(name) if name else None
    if beside is None:
        raise ValueError(f"{name!r} is another method's generator: give the tailed run of its model, too (beside).")
    return generator_of(beside, name)


def tail_rows(
    method: AugmentedMethod, rows: Mapping[str, Row] | None = None, drawn: int = 0, beside: Workspace | None = None
) -> dict[str, dict]:
    """The rows of the long tail's table by name, those that are not there made first.

    ``method`` is of a `tailed` run; ``rows``: None for `TAIL`; ``drawn``: which set of generated images. ``beside``:
    for `OTHERS`, the tailed run with the backbone of the other methods.
    Raises ValueError where a row needs it and there is none, and for a generator that is not known.
    """
    found = {}
    for name, row in (TAIL if rows is None else rows).items():
        ws, source = filled_by(method, row.filled, beside)
        found[name] = dict(ws.run.result(tail_step(ws, row, source, drawn)).facts)
    return found


def fillings_measured(
    method: AugmentedMethod,
    whole: Workspace,
    rows: Mapping[str, Row] | None = None,
    drawn: int = 0,
    beside: Workspace | None = None,
) -> dict[str, dict[str, Any]]:
    """How far each filling of ``rows`` is from real images of the same classes: `metrics.compare`, by what filled.

    ``whole``: the run with all its real training images; a classifier of these gives the features, and as many of them
    of each class as were drawn (fewer where there are fewer) are what it is compared with. "real validation images" are
    measured so, too. The other arguments as in `tail_rows`. Empty where nothing is lacking.
    """
    lacking = missing_labels(method.ws.data.train, whole.data.num_classes)
    if not len(lacking):
        return {}
    features = metrics.extractor("resnet20", quality.judge_of(whole))
    counts = torch.bincount(lacking, minlength=whole.data.num_classes)
    known, val = features(of_counts(whole.data.train, counts).images), of_counts(whole.data.val, counts)
    found = {"real validation images": metrics.compare(known, features(val.images), features.name)}
    for name in dict.fromkeys(row.filled for row in (TAIL if rows is None else rows).values() if row.filled):
        ws, source = filled_by(method, name, beside)
        images = files.load_tensors(ws.run.file(filling_step(ws, source, drawn), FILLING))["images"]
        found[name] = metrics.compare(known, features(images), features.name)
    return found


def of_counts(split: Split, counts: torch.Tensor) -> Split:
    """The first ``counts``, int64 (C,), images of each class, or all of a class that has fewer."""
    rows = [(split.labels == label).nonzero()[:count, 0] for label, count in enumerate(counts.tolist())]
    return split.take(torch.cat(rows))


# --- a frozen network ---


def probe(method: AugmentedMethod, training: Split) -> dict[str, float]:
    """A linear classifier on the model's own image embeddings, the encoder frozen: "val" and "test" accuracy, 0..1.

    (The paper's section 4.2 trains a linear head on frozen features, too.) scikit-learn's logistic regression on
    standardised embeddings; of several strengths of its penalty the validation images choose. It has no random start.
    Raises ValueError for images of a single class.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if len(training.labels.unique()) < 2:
        raise ValueError("A classifier is trained on two classes or more, and all of these images are of one.")
    data = method.ws.data
    known, labels = method.embeddings(training).numpy(), training.labels.numpy()
    held = {
        name: (method.embeddings(split).numpy(), split.labels.numpy())
        for name, split in {"val": data.val, "test": data.test}.items()
    }
    fitted = [
        make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=2000)).fit(known, labels)
        for strength in PENALTIES
    ]
    best = max(fitted, key=lambda model: model.score(*held["val"]))
    return {name: float(best.score(*those)) for name, those in held.items()}


# --- one choice at a time ---

SHOTS = (1, 2, 4, 8, 16)


def studies(method: AugmentedMethod) -> dict[str, Study]:
    """The studies by name, for a run's sizes.

    A value may also have a "conditioning", a "guidance_scale", "images", how many real images there are, and "leaks":
    its images are drawn from real ones of the whole training set, as the released few-shot code does it.
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
        "leak": Study(
            "which real images it draws from (released: all)",
            ("generated", "both"),
            {
                "those it has": {"conditioning": "random image"},
                "the whole training set: LEAKS": {"conditioning": "random image", "leaks": True},
            },
        ),
    }


def study(
    method: AugmentedMethod, name: str, multiple: int, whole: Split | None = None
) -> dict[tuple[str, str], dict[str, Any]]:
    """The rows of a study by (value, kind), see `worth.studied`.

    ``whole``: all training images, of which the run has a part; what "leak" draws from. Raises ValueError where it
    needs them and there are none.
    """

    return studied(studies(method), name, functools.partial(_place, method, whole), multiple)


def _place(method: AugmentedMethod, whole: Split | None, how: dict[str, Any]) -> tuple[Workspace, Source]:
    """Where a study's value is tried, and what draws for it; takes out of ``how`` what is no argument of a row."""
    count, conditioning = how.pop("images", None), how.pop("conditioning", None)
    scale = how.pop("guidance_scale", None)
    leaks = how.pop("leaks", False)
    if leaks and whole is None:
        raise ValueError('The study "leak" draws from the whole training set: give it, too (whole).')
    varied = {key: how.pop(key) for key in tuple(how) if key.startswith("augmented_")}
    ws = method.ws.few(count) if count else method.ws
    ws = ws.varied(**varied) if varied else ws
    return ws, AugmentedMethod(ws).source(conditioning, scale, whole if leaks else None)


def probes(
    method: AugmentedMethod, name: str, multiple: int, whole: Split | None = None
) -> dict[tuple[str, str], dict[str, float]]:
    """As `study`, but what is trained is a linear head on the frozen image encoder: `probe`'s, by (value, kind).

    Beside them ("real", "real"): the run's own images alone.
    """
    chosen = studies(method)[name]
    found = {("real", "real"): probe(method, method.ws.data.train)}
    for value, changes in chosen.values.items():
        ws, source = _place(method, whole, dict(changes))
        real, generated = ws.data.train, synthetic(ws, source, multiple)
        both = Split(torch.cat([real.images, generated.images]), torch.cat([real.labels, generated.labels]))
        sets = {"real": real, "generated": generated, "both": both}
        found |= {(value, kind): probe(AugmentedMethod(ws), sets[kind]) for kind in chosen.kinds}
    return found
