"""The benchmarks that are whole runs: a search with and without pruning, fast images and exact ones, a short course."""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from ..config import settings
from ..course import Course, Point
from ..data import Split
from ..diffusion.generate import balanced_labels
from ..evaluate import rows as tables
from ..search.search import trials_frame
from ..store.run import default_runs_dir
from .bench_tools import compare, load


def runs_dir() -> Path:
    """Where the runs of `pruning` and `exactness` are kept, so that the next call reuses them: ``runs/bench``."""
    return default_runs_dir() / "bench"


def pruning(o: argparse.Namespace) -> list[dict[str, Any]]:
    """The default first search, with pruning and without, over ``--repeats`` seeds: classifier epochs and best CAS.

    The standard error of one seed is that of its three classifiers. A search has a spread of its own, many times
    larger: the last row has the mean difference of the seeds' pairs and its standard error.
    """
    rows = [pruned_and_whole(o.backbone, seed) for seed in range(o.repeats)]
    return rows + ([over_seeds(rows)] if len(rows) > 1 else [])


def pruned_and_whole(backbone: str, seed: int) -> dict[str, Any]:
    """A row of `pruning`: the two searches of one seed, which share their step 1."""
    found = {}
    for pruned in (True, False):
        asked = settings.resolve("demo", backbone, seed=seed, runs_dir=str(runs_dir()), pruning=pruned)
        course = Course(asked)
        epochs = int(trials_frame(course.tune()).classifier_epochs.sum())
        found[pruned] = epochs, course.cas("after 2")["test"]
    (epochs, cas), (all_epochs, whole_cas) = found[True], found[False]
    return {
        "what": f"search, seed {seed}",
        "classifier epochs": epochs,
        "without pruning": all_epochs,
        "share": epochs / all_epochs,
        "CAS": statistics.mean(cas),
        "CAS without pruning": statistics.mean(whole_cas),
        "standard error": statistics.stdev(whole_cas) / len(whole_cas) ** 0.5,
    }


def over_seeds(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The last row of `pruning`: sums of the epochs, means of the CAS, the paired differences' mean and error."""
    total = {key: sum(row[key] for row in rows) for key in ("classifier epochs", "without pruning")}
    differences = [row["CAS"] - row["CAS without pruning"] for row in rows]
    return {
        "what": f"search, {len(rows)} seeds",
        **total,
        "share": total["classifier epochs"] / total["without pruning"],
        **{key: statistics.mean(row[key] for row in rows) for key in ("CAS", "CAS without pruning")},
        "difference": statistics.mean(differences),
        "its standard error": statistics.stdev(differences) / len(rows) ** 0.5,
    }


def exactness(o: argparse.Namespace) -> list[dict[str, Any]]:
    """The images of row "after 2" as a run draws them and once more in float32, uncompiled: pixels and CAS of both.

    Over ``--repeats`` seeds, three classifiers on each set; the runs are those of `pruning`.
    """
    rows = []
    for seed in range(o.repeats):
        course = Course(settings.resolve("demo", o.backbone, seed=seed, runs_dir=str(runs_dir())))
        rows.append(drawn_and_exact(course, f"seed {seed}"))
    return rows


def drawn_and_exact(course: Course, name: str) -> dict[str, Any]:
    """A row of `exactness`, of one run."""
    ws, data, s = course.workspace, course.data, course.settings
    found, drawn = course.cas("after 2"), course.generator("after 2")
    point, labels = Point(**found["point"]), balanced_labels(s.num_images, data.num_classes)
    exact_backbone = load(s.backbone, course.backbone.device, "fp32")
    exact = dataclasses.replace(drawn, backbone=exact_backbone, compiles=False)
    images, exact_images = (draw(labels, seed=s.seed, set_name="table 1") for draw in (drawn, exact))
    scored = tables.scores(ws, s, Split(exact_images, labels), {"test": data.test}, {}, "float32")
    row: dict[str, Any] = {
        "what": f"images after 2, {name}, IS {point.num_inference_steps}, UGS {point.guidance_scale:.2f}"
    }
    for kind, cas in (("CAS", found["test"]), ("CAS in float32", [r.tests["test"].accuracy for r in scored])):
        row[kind], row[f"{kind}, deviation"] = statistics.mean(cas), statistics.stdev(cas)
    return row | pixel_difference(images, exact_images)


def pixel_difference(images: torch.Tensor, others: torch.Tensor) -> dict[str, float]:
    """How far uint8 images of one shape are apart, in grey levels 0..255."""
    apart = (images.int() - others.int()).abs()
    return {"largest pixel difference": int(apart.max()), "mean pixel difference": float(apart.float().mean())}


def whole_course(o: argparse.Namespace) -> list[dict[str, Any]]:
    """The five steps of a short course, against the same in float32 without pruning."""
    small = dict(
        recipe="demo",
        backbone=o.backbone,
        dataset="digits:200",
        transfer_epochs=4,
        finetune_epochs=2,
        finetune_epoch_images=5000,
        n_trials=6,
        num_images=200,
        classifier_seeds=1,
        max_multiple=1,
    )

    def run(**changes: Any) -> None:
        with tempfile.TemporaryDirectory() as folder:
            course = Course(settings.resolve(**small, runs_dir=folder, **changes))
            course.cas("after 1"), course.cas("after 4"), course.scaling()

    name, peer = "short course on digits:200", "the same in float32, nothing pruned"
    return [compare(name, run, lambda: run(precision="fp32", pruning=False), peer, 1, o.device, max(1, o.repeats // 2))]
