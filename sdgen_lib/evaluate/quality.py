"""How good each generated image is, and each class: what a classifier of real images and their features say of it.

Nothing here looks at test images. The judge is a ResNet20 of the real training images, with a seed that no table's
classifier has: a filter by its answers is not scored by itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F

from ..classify import ResNet20
from ..classify.networks import probabilities_of
from ..config.settings import View
from ..data import Split
from ..machine.devices import classifier_dtype, default_device
from ..machine.passes import Work
from ..machine.seeds import derived
from ..store import files
from ..store.run import Step
from ..work.workspace import Source, Workspace, classifier_options, classifier_work
from . import metrics
from .metrics import NEIGHBOURS
from .sets import block_step, synthetic_blocks

JUDGE, TABLE = "judge.safetensors", "scores.safetensors"
VERSION = 2  # raised whenever the same settings would give other scores
#: What is known of each generated image; of all of them more is better.
SCORES = {
    "confidence": "the probability that a classifier of real images gives the class asked for",
    "agreement": "1 where the class asked for is that classifier's answer, else 0",
    "nearness": "minus the distance to the nearest real image of the class, in the classifier's features",
    "density": "in how many balls around real images of the class it lies, over k (Naeem et al. 2020)",
    "authenticity": "its distance to the nearest real image over that one's to its own: 1 or less is a copy",
    "contrast": "the standard deviation of its pixel values (0..255): 0 is one colour alone",
}


def image_scores(network: ResNet20, real: Split, generated: Split, k: int = NEIGHBOURS) -> dict[str, torch.Tensor]:
    """`SCORES` of each generated image beside the ``real`` ones: float32 (M,) by name.

    ``network``: trained on real images, see `metrics.judge`; its last layer but one gives the features. A class with
    k real images or fewer takes its balls with what it has; with one it has none, and its images' density is 0.
    Raises ValueError for a generated class of which there is no real image.
    """
    features = metrics.extractor("resnet20", network)
    told = probabilities_of(network, generated.images)
    of_real, of_generated = features(real.images), features(generated.images)
    nearness, density = (torch.zeros(len(generated)) for _ in range(2))
    for label in generated.labels.unique().tolist():
        rows, own = generated.labels == label, of_real[real.labels == label]
        if not len(own):
            raise ValueError(f"There are generated images of class number {label} and no real one to judge them by.")
        nearness[rows] = -metrics.nearest(own, of_generated[rows])[1].float()
        if len(own) > 1:
            density[rows] = metrics.densities(own, of_generated[rows], min(k, len(own) - 1)).float()
    return {
        "confidence": told.gather(1, generated.labels[:, None])[:, 0],
        "agreement": (told.argmax(1) == generated.labels).float(),
        "nearness": nearness,
        "density": density,
        "authenticity": metrics.authenticities(of_real, of_generated).float(),
        "contrast": torch.stack([image.float().std(correction=0) for image in generated.images]),
    }


def suspects(scores: Mapping[str, torch.Tensor], of_real: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Which images look wrong, bool (M,) each: "another class", "unlike any", "copy", "blank".

    ``of_real``: the scores of real images that the judge did not learn from. "Another class": the judge answers so.
    "Unlike any": farther from the real images of its class than 99 of 100 real ones are. "Copy": see `SCORES`; of an
    image that the judge learnt from. "Blank": with less than half of the contrast that any of the real ones has.
    """
    return {
        "another class": scores["agreement"] == 0,
        "unlike any": scores["nearness"] < torch.quantile(of_real["nearness"], 0.01),
        "copy": scores["authenticity"] <= 1,
        "blank": scores["contrast"] < 0.5 * of_real["contrast"].min(),
    }


def twins(held: torch.Tensor, generated: torch.Tensor) -> torch.Tensor:
    """Which generated images are one of the ``held`` images, or nearly: bool (M,).

    uint8 (N, 3, H, W), one image or more, and (M, 3, H, W): real images that classifiers are chosen or tested by. The
    pixels are averaged to 8 x 8, so that a copy that was resized or saved as JPEG is still one; a mirrored one is not.
    Nearly: it is nearer to a held image than a quarter of that one's distance to its own nearest. Of the images of five
    datasets that were saved as JPEG (quality 75) 96 to 100 of 100 were found; of training images among the test images
    none, but for BreastMNIST, where 71 of 546 are there, too.
    """
    of_held, of_generated = (
        F.interpolate(images.float(), (8, 8), mode="area").flatten(1) for images in (held, generated)
    )
    if len(held) == 1:
        return (of_generated == of_held).all(1)
    return metrics.authenticities(of_held, of_generated) < 0.25


@dataclasses.dataclass(frozen=True)
class Planted:
    """A set with mistakes in it: ``groups`` says which image is of which kind, bool (M,) each."""

    images: Split
    groups: Mapping[str, torch.Tensor]


def planted(images: Split, num_classes: int, share: float, seed: int) -> Planted:
    """``share`` of the images gets another class's label, and as many are painted grey; the rest is left alone.

    To try `suspects` on. Raises ValueError for one class alone, and a share that is not from 0 to a half.
    """
    if num_classes < 2 or not 0 <= share <= 0.5:
        raise ValueError(f"Planting takes 2 classes or more and a share from 0 to 0.5, not {num_classes} and {share}.")
    random = torch.Generator().manual_seed(derived(seed, "planted mistakes"))
    order, count = torch.randperm(len(images), generator=random), min(round(share * len(images)), len(images) // 2)
    groups = {name: torch.zeros(len(images), dtype=torch.bool) for name in ("mislabelled", "blank", "left alone")}
    for name, rows in zip(groups, (order[:count], order[count : 2 * count], order[2 * count :])):
        groups[name][rows] = True
    pixels, labels, moved = images.images.clone(), images.labels.clone(), groups["mislabelled"]
    labels[moved] = (labels[moved] + torch.randint(1, num_classes, (count,), generator=random)) % num_classes
    pixels[groups["blank"]] = 127
    return Planted(Split(pixels, labels), groups)


def class_quality(
    scores: Mapping[str, torch.Tensor],
    of_real: Mapping[str, torch.Tensor],
    network: ResNet20,
    real: Split,
    generated: Split,
    class_names: Sequence[str],
    k: int = NEIGHBOURS,
) -> pd.DataFrame:
    """One row a class, the one whose images look most like another's first, in percent where it is a share.

    ``scores`` and ``of_real`` as in `suspects`; ``real``: images that the judge did not learn from, since those that it
    did lie closer together in its features than any others. Precision, density, coverage and the Frechet distance are
    those of the class alone (`metrics.per_class`), with a smaller k where the smallest class has few real images: balls
    that reach to the class's last image would hold anything. A class of one image has none of them.
    """
    counts = torch.bincount(real.labels, minlength=len(class_names))[generated.labels.unique()]
    k = min([k, *(max(1, (count - 1) // 2) for count in counts.tolist() if count > 1)])
    features, wrong = metrics.extractor("resnet20", network), suspects(scores, of_real)
    measured = metrics.per_class(
        features(real.images), features(generated.images), real.labels, generated.labels, features.name, k
    )
    table = {}
    for label in generated.labels.unique().tolist():
        rows, found = generated.labels == label, measured[label]
        table[class_names[label]] = {
            "real validation images": found["num_real"],
            "generated": found["num_generated"],
            "confidence %": 100 * float(scores["confidence"][rows].mean()),
            "taken for the class %": 100 * float(scores["agreement"][rows].mean()),
            **{f"{name} %": 100 * float(flags[rows].float().mean()) for name, flags in wrong.items()},
            "precision %": 100 * found["precision"],
            "density": found["density"],
            "coverage %": 100 * found["coverage"],
            metrics.distance_name(features.name): found["fd"],
        }
    return pd.DataFrame.from_dict(table, orient="index").sort_values("taken for the class %", kind="stable")


# --- as steps of a run ---


def judge_step(ws: Workspace) -> Step:
    """The classifier of real images that scores generated ones, trained once."""

    def make(folder: Path, s: View) -> dict[str, Any]:
        network = metrics.judge(
            ws.data.train, ws.data.val, ws.data.num_classes, s.seed, **_options(classifier_options(s))
        )
        files.save_tensors(folder / JUDGE, network.state_dict())
        return {}

    def work() -> Work:
        s = ws.settings
        pixels = s.image_size or ws.data.image_size
        return classifier_work(s, len(ws.data.train), pixels, ws.data.num_classes)

    return Step(
        "quality/judge",
        make,
        topics=("classifier", "precision", "seed"),
        roots=("data",),
        version=VERSION,
        work=work,
        title="A classifier of the real images, to judge generated ones",
    )


def _options(options: dict[str, Any]) -> dict[str, Any]:
    """Of `classify.train_classifier`, without what `metrics.judge` names itself."""
    return {name: value for name, value in options.items() if name != "seed"}


def judge_of(ws: Workspace) -> ResNet20:
    """The run's judge, trained if it is not there: in eval mode, on this machine's device."""
    s, device = ws.settings, default_device()
    network = ResNet20(
        ws.data.num_classes, s.classifier_width, classifier_dtype(s.precision, device), s.classifier_shortcut
    )
    network.load_state_dict(files.load_tensors(ws.run.file(judge_step(ws), JUDGE)))
    return network.to(device).eval()


def scores_step(ws: Workspace, source: Source, block: int) -> Step:
    """The `image_scores` of block ``block`` of a synthetic set."""
    made = block_step(ws, source, block)

    def make(folder: Path, s: View) -> dict[str, Any]:
        files.save_tensors(
            folder / TABLE, image_scores(judge_of(ws), ws.data.train, synthetic_blocks(ws, source, [block]))
        )
        return {}

    return Step(
        f"quality/block_{block:02d}",
        make,
        topics=("classifier", "precision"),
        needs=(made, judge_step(ws)),
        roots=("data",),
        version=VERSION,
    )


def scores_of(ws: Workspace, source: Source, numbers: Sequence[int]) -> dict[str, torch.Tensor]:
    """The scores of the images of several blocks, one after the other: float32 (M,) by name."""
    tables = [files.load_tensors(ws.run.file(scores_step(ws, source, block), TABLE)) for block in numbers]
    return {name: torch.cat([table[name] for table in tables]) for name in SCORES}


def scores_of_real(ws: Workspace) -> dict[str, torch.Tensor]:
    """The scores of the real validation images, which the judge did not learn from."""
    return image_scores(judge_of(ws), ws.data.train, ws.data.val)


@dataclasses.dataclass(frozen=True)
class Assessment:
    """What is known of a generated set's images: ``scores`` and ``of_real`` as in `suspects`, ``classes`` as
    `class_quality` gives it; ``nearest``: the row of the nearest real training image of each, int64 (M,)."""

    scores: Mapping[str, torch.Tensor]
    of_real: Mapping[str, torch.Tensor]
    classes: pd.DataFrame
    nearest: torch.Tensor


def assess(network: ResNet20, real: Split, val: Split, generated: Split, class_names: Sequence[str]) -> Assessment:
    """All of it for any generated set. ``real``: what the judge learnt from; ``val``: real images that it did not."""
    scores, of_real = (image_scores(network, real, images) for images in (generated, val))
    classes = class_quality(scores, of_real, network, val, generated, class_names)
    features = metrics.extractor("resnet20", network)
    nearest, _ = metrics.nearest(features(real.images), features(generated.images))
    return Assessment(scores, of_real, classes, nearest)
