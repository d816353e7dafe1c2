"""The benchmarks that are whole runs: a search with and without pruning, fast images and exact ones, a short course."""

from __future__ import annotations

import argparse
import functools
import statistics
import tempfile
from typing import Any

from . import course, data, runs, sample, settings, tune
from .bench_tools import compare, load


def pruning(o: argparse.Namespace) -> list[dict[str, Any]]:
    """The default first search, with pruning and without, over ``--repeats`` seeds: classifier epochs and best CAS.

    The standard error of one seed is that of its three classifiers. A search has a spread of its own, many times
    larger: the last row has the mean difference of the seeds' pairs and its standard error. Runs in `runs/bench-pruned`
    and `runs/bench-whole`; what is there of an earlier call is reused.
    """
    rows = []
    for seed in range(o.repeats):
        found = {}
        for kind, extra in (("pruned", {}), ("whole", {"pruning": False})):
            folder = str(runs.default_runs_dir() / f"bench-{kind}")
            run = course.Course(settings.resolve("demo", o.backbone, seed=seed, runs_dir=folder, **extra))
            frame = tune.trials_frame(run.search())
            row = run.cas("after 2")
            found[kind] = (int(frame.classifier_epochs.sum()), row["test"])
        (epochs, cas), (all_epochs, whole_cas) = found["pruned"], found["whole"]
        rows.append({
            "what": f"search, seed {seed}", "classifier epochs": epochs, "without pruning": all_epochs,
            "share": epochs / all_epochs,
            "CAS": statistics.mean(cas), "CAS without pruning": statistics.mean(whole_cas),
            "standard error": statistics.stdev(whole_cas) / len(whole_cas) ** 0.5,
        })  # fmt: skip
    return rows + ([over_seeds(rows)] if len(rows) > 1 else [])


def over_seeds(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The last row of `pruning`: sums of the epochs, means of the CAS, the paired differences' mean and error."""
    total = {key: sum(row[key] for row in rows) for key in ("classifier epochs", "without pruning")}
    differences = [row["CAS"] - row["CAS without pruning"] for row in rows]
    return {
        "what": f"search, {len(rows)} seeds", **total, "share": total["classifier epochs"] / total["without pruning"],
        **{key: statistics.mean(row[key] for row in rows) for key in ("CAS", "CAS without pruning")},
        "difference": statistics.mean(differences),
        "its standard error": statistics.stdev(differences) / len(rows) ** 0.5,
    }  # fmt: skip


def exactness(o: argparse.Namespace) -> list[dict[str, Any]]:
    """The images of row "after 2" as a run draws them and once more in float32, uncompiled: pixels and CAS of both.

    Over ``--repeats`` seeds, three classifiers on each set; the runs are those of `pruning`.
    """
    rows, exact = [], load(o.backbone, o.device, "fp32")
    for seed in range(o.repeats):
        folder = str(runs.default_runs_dir() / "bench-pruned")
        run = course.Course(settings.resolve("demo", o.backbone, seed=seed, runs_dir=folder))
        found, labels = run.cas("after 2"), sample.balanced_labels(run.settings.num_images, run.data.num_classes)
        point = found["point"]
        images = run.draw(point, labels, "table 1")
        run.backbone, run.compiles = exact, False
        run.reset()
        exact_images = run.draw(point, labels, "table 1")
        ((_, scores),) = run.scores({"float32: CAS": functools.partial(data.Split, exact_images, labels)})
        row: dict[str, Any] = {"what": f"images after 2, seed {seed}, IS {point['IS']}, UGS {point['UGS']:.2f}"}
        for name, cas in (("CAS", found["test"]), ("CAS in float32", [score.test_accuracy for score in scores])):
            row[name], row[f"{name}, deviation"] = statistics.mean(cas), statistics.stdev(cas)
        apart = (images.int() - exact_images.int()).abs()
        row["largest pixel difference"], row["mean pixel difference"] = int(apart.max()), float(apart.float().mean())
        rows.append(row)
    return rows


def whole_course(o: argparse.Namespace) -> list[dict[str, Any]]:
    """The five steps of a short course, against the same in float32 without pruning."""
    small = dict(recipe="demo", backbone=o.backbone, dataset="digits:200", transfer_epochs=4, finetune_epochs=2,
                 n_trials=6, num_images=200, classifier_seeds=1, max_multiple=1)  # fmt: skip

    def run(**changes: Any) -> None:
        with tempfile.TemporaryDirectory() as folder:
            found = course.Course(settings.resolve(**small, runs_dir=folder, **changes))
            found.cas("after 1"), found.cas("after 4"), found.scaling()

    name, peer = "short course on digits:200", "the same in float32, nothing pruned"
    return [compare(name, run, lambda: run(precision="fp32", pruning=False), peer, 1, o.device, max(1, o.repeats // 2))]
