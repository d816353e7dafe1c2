"""Tables of a run's results beside the published numbers, figures of them, and what the steps will cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ..config import paper
from ..config.settings import resolve
from ..course import Course
from ..evaluate.scaling import REAL, scaling_work
from ..methods.class_encoder import ClassEncoderMethod
from ..work import cost
from .figures import BLUE, GREEN, GREY, ORANGE, new_axes, percent_axis

APART = 0.01  # where accuracy and balanced accuracy differ by so much, a table holds both
Rows = Mapping[str, Mapping[str, Any]]  # of a table, by name: facts as `evaluate.rows.accuracies` has them, and more


def percent(values: Sequence[float]) -> str:
    """Fractions -> "94.1 ± 0.7": their mean in percent and, of several, the standard deviation."""
    spread = f" ± {100 * np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{100 * np.mean(values):.1f}{spread}"


# --- the tables ---


def table_1(course: Course) -> pd.DataFrame:
    """`cas_table` of the rows that this run has with these settings; none is made."""
    return cas_table(course.rows_made(1), course.settings.dataset)


def table_2(course: Course) -> pd.DataFrame:
    """`scaling_table` of the rows that this run has with these settings; none is made."""
    return scaling_table(course.rows_made(2), course.settings.dataset)


def cas_table(rows: Rows, dataset: str) -> pd.DataFrame:
    """Table 1: CAS after each step in percent, mean ± standard deviation over classifiers. Empty without rows.

    Below it the published row of the same dataset where there is one, marked as published.
    """
    on_test = any(row.get("select_on") == "test" for row in rows.values())
    what = "CAS %" + (" (selected on the TEST set)" if on_test else "")
    accuracies = _accuracies(rows, what)
    table = pd.DataFrame({name: accuracies[name] | _how_drawn(rows[name]) for name in sorted(rows)})
    return _with_published(table, dataset, paper.TABLE_1, "CAS % ({}, 4000 images)")


def scaling_table(rows: Rows, dataset: str) -> pd.DataFrame:
    """Table 2: accuracy in percent of classifiers trained on real images, and on x1 .. xK. Empty without rows.

    The published row is as in `cas_table`.
    """
    accuracies = _accuracies(rows, "accuracy %")
    table = pd.DataFrame({name: accuracies[name] | {"training images": rows[name]["num_images"]} for name in rows})
    return _with_published(table, dataset, paper.TABLE_2, "accuracy % ({})")


def _accuracies(rows: Rows, what: str) -> dict[str, dict[str, str]]:
    """Each row's accuracy on real test images; where the classes' sizes matter, what else has to be known of it."""
    found = {name: {what: percent(row["test"])} for name, row in rows.items()}
    balanced = {name: row["balanced_test"] for name, row in rows.items() if "balanced_test" in row}
    if any(abs(np.mean(values) - np.mean(rows[name]["test"])) >= APART for name, values in balanced.items()):
        for name, values in balanced.items():
            found[name][f"balanced {what}"] = percent(values)
            found[name]["always the largest class %"] = percent([rows[name]["largest_class"]])
    return found


def _how_drawn(row: Mapping[str, Any]) -> dict[str, Any]:
    """Where a row samples, in the paper's words; a method without fine-tuning has no epochs."""
    point = row["point"]
    epochs = [str(point[name] or "-") for name in ("transfer_epoch", "finetune_epoch") if name in point]
    found = {"IS": point.get("num_inference_steps"), "UGS": point.get("guidance_scale"), "epochs": "/".join(epochs)}
    found["UGS"] = None if found["UGS"] is None else round(found["UGS"], 2)
    return found | {"images": row["num_images"], "generation s": round(row["seconds"], 1)}


def _with_published(table: pd.DataFrame, dataset: str, published: pd.DataFrame, what: str) -> pd.DataFrame:
    name = paper.name_of(dataset)
    if name and len(table):
        table.loc[f"published {what.format(name)}"] = published.loc[name].reindex(table.columns)
    return table.fillna("")


# --- figures of them ---


def steps_figure(course: Course) -> Figure:
    """CAS after each step, a dot for every classifier, with chance level.

    Raises ValueError without a row of table 1.
    """
    rows = _made(course, 1)
    figure, ax = new_axes(size=(6.4, 3.4))
    names = sorted(rows)
    ax.plot(names, [np.mean(rows[n]["test"]) for n in names], "-o", color=BLUE, label="mean")
    for name in names:
        dots = ax.scatter([name] * len(rows[name]["test"]), rows[name]["test"], color=ORANGE, s=18, zorder=3)
    dots.set_label("each classifier")
    ax.axhline(1 / course.data.num_classes, color=GREY, linestyle=":", label="chance")
    ax.set(ylabel="CAS (real test images)", ylim=(0, 1))
    ax.legend()
    percent_axis(ax)
    return figure


def scaling_figure(course: Course) -> Figure:
    """Accuracy against the size of the synthetic set, beside real data; bars and band are the classifiers' spread.

    Raises ValueError without a row of table 2.
    """
    rows = _made(course, 2)
    figure, ax = new_axes(size=(6.4, 3.4))
    real, names = rows.get(REAL, {}).get("test"), [name for name in rows if name != REAL]
    if real:
        ax.axhline(np.mean(real), color=GREEN, linestyle="--", label="trained on real images")
        ax.axhspan(np.min(real), np.max(real), color=GREEN, alpha=0.15)
    means = np.array([np.mean(rows[n]["test"]) for n in names])
    errors = [means - [min(rows[n]["test"]) for n in names], [max(rows[n]["test"]) for n in names] - means]
    ax.errorbar(names, means, yerr=errors, fmt="-o", color=BLUE, capsize=4, label="trained on synthetic images")
    ax.set(xlabel="size of the synthetic set, times the real one", ylabel="accuracy on real test images")
    count = max(len(row["test"]) for row in rows.values())
    ax.legend(title=f"mean, lowest and highest of {count}" if count > 1 else None)
    percent_axis(ax)
    return figure


def _made(course: Course, table: int) -> dict[str, dict[str, Any]]:
    if rows := course.rows_made(table):
        return rows
    raise ValueError(f"Table {table} has no rows yet: course.{'cas(row)' if table == 1 else 'scaling()'} makes them.")


# --- what it will cost ---


def cost_table(course: Course) -> pd.DataFrame:
    """What each step costs on this machine from its beginning, for this recipe and for the paper's: "3 min".

    Each column is counted with its own settings, and timed at its own batch and image size; the data and the model are
    this run's.
    """
    s, backbone = course.settings, course.backbone
    plans = {"this recipe": s, "-p recipe paper": resolve("paper", backbone=s.backbone, precision=s.precision)}
    columns = {}
    for name, settings in plans.items():
        method = ClassEncoderMethod(course.workspace.planned(settings))
        works = {step.name: step.work() for step in method.steps()}
        works["5_datasets"] = scaling_work(method.ws, method.source("after 4"))
        columns[name] = {step: cost.readable(cost.seconds(backbone, work)) for step, work in works.items()}
    return pd.DataFrame(columns)
