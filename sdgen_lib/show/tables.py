"""Tables of a run's results beside the published numbers, figures of them, and what the steps will cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.special import stdtrit  # Student's quantile; scikit-learn brings scipy

from ..config import paper
from ..config.settings import resolve
from ..course import Course
from ..evaluate.scaling import REAL, scaling_work
from ..methods.class_encoder import ClassEncoderMethod
from ..work import cost
from .figures import BLUE, GREEN, GREY, ORANGE, PINK, new_axes, percent_axis

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
    """Each row's accuracy on real test images, and what has to be known to judge it."""
    found: dict[str, dict[str, str]] = {}
    for name, row in rows.items():
        found[name] = {what: percent(row["test"])}
        if "num_test" in row:
            error = standard_error(np.mean(row["test"]), row["num_test"])
            found[name]["standard error by the test images"] = f"{100 * error:.1f}"
        if "balanced_test" in row:
            found[name][f"balanced {what}"] = percent(row["balanced_test"])
        if "largest_class" in row:
            found[name]["always the largest class %"] = percent([row["largest_class"]])
    return found


def standard_error(share: float, count: int) -> float:
    """Of an accuracy of ``share`` (0..1) on ``count`` test images: what another choice of these would change.

    Of a binomial, at the share that Agresti and Coull (1998) take, which is never 0 or 1.
    """
    near = (share * count + 2) / (count + 4)
    return float(np.sqrt(near * (1 - near) / (count + 4)))


def compared(values: Sequence[float], others: Sequence[float]) -> tuple[float, float, float, str]:
    """How far two rows lie apart, by pairs of classifiers of equal seeds: (mean, low, high, verdict), in points.

    ``values``, ``others``: accuracies, as fractions, of as many classifiers. From low to high is the 95 % interval of
    the mean, Student's; it covers the classifiers' random starts alone. A single pair has none: NaN. The verdict is
    "better" or "worse" where the interval leaves 0 out, "no difference is shown" where it does not.
    """
    pairs = 100 * np.subtract(values, others)
    mean = float(pairs.mean())
    if len(pairs) < 2:
        return mean, float("nan"), float("nan"), "a single pair cannot tell"
    reach = float(stdtrit(len(pairs) - 1, 0.975) * pairs.std(ddof=1) / np.sqrt(len(pairs)))
    verdict = "better" if mean > reach else "worse" if mean < -reach else "no difference is shown"
    return mean, mean - reach, mean + reach, verdict


def taught_too_little(rows: Rows) -> list[str]:
    """A sentence for each row whose classifiers are no better than an answer that looks at no image."""
    said = []
    for name, row in rows.items():
        mean, largest = np.mean(row["test"]), row.get("largest_class", 0)
        if mean < largest:
            said.append(
                f"{name}: {mean:.1%} is below the {largest:.1%} of always answering the largest class. These images "
                "taught the classifiers less than that."
            )
        chance = 1 / row["num_classes"] if "num_classes" in row else 0
        balanced = row.get("balanced_test", [1.0])
        if np.mean(balanced) - (np.std(balanced, ddof=1) if len(balanced) > 1 else 0) <= chance:
            said.append(
                f"{name}: the balanced accuracy, {np.mean(balanced):.1%}, is no better than chance, {chance:.1%}."
            )
    return said


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
    """CAS after each step, a dot for every classifier, with chance and the answer "always the largest class".

    Raises ValueError without a row of table 1.
    """
    rows = _made(course, 1)
    figure, ax = new_axes(size=(7.4, 3.4))
    names = sorted(rows)
    _dots(ax, {name: rows[name]["test"] for name in names}, "generated images")
    ax.axhline(1 / course.data.num_classes, color=GREY, linestyle=":", label="chance")
    ax.set(ylabel="CAS (real test images)")
    _finished(ax, rows)
    return figure


def _dots(ax: Axes, values: Mapping[str, Sequence[float]], what: str) -> None:
    """A dot for each classifier, and mean and standard deviation of each row beside them."""
    names = list(values)
    for name in names:
        dots = ax.scatter([name] * len(values[name]), values[name], color=ORANGE, s=18, zorder=3)
    if names:
        dots.set_label("each classifier")
    means = [np.mean(values[name]) for name in names]
    spreads = [np.std(values[name], ddof=1) if len(values[name]) > 1 else 0.0 for name in names]
    label = f"{what}: mean" + (" ± standard deviation" if any(len(v) > 1 for v in values.values()) else "")
    at = np.arange(len(names)) + 0.12  # beside the dots, which it would cover
    ax.errorbar(at, means, yerr=spreads, fmt="o", color=BLUE, capsize=4, label=label)


def _finished(ax: Axes, rows: Rows) -> None:
    """The line of the largest class, a legend beside the axes, and percent on the vertical one."""
    if largest := max((row.get("largest_class", 0) for row in rows.values()), default=0):
        ax.axhline(largest, color=PINK, linestyle="-.", label="always the largest class")
    ax.margins(x=0.1, y=0.1)
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    percent_axis(ax)


def scaling_figure(course: Course) -> Figure:
    """Accuracy against the size of the synthetic set, beside real data; bars and band are the standard deviation.

    Raises ValueError without a row of table 2.
    """
    rows = _made(course, 2)
    figure, ax = new_axes(size=(7.4, 3.4))
    real, names = rows.get(REAL, {}).get("test"), [name for name in rows if name != REAL]
    if real:
        mean, spread = np.mean(real), np.std(real, ddof=1) if len(real) > 1 else 0.0
        ax.axhline(mean, color=GREEN, linestyle="--", label="real images: mean ± standard deviation")
        ax.axhspan(mean - spread, mean + spread, color=GREEN, alpha=0.15)
    _dots(ax, {name: rows[name]["test"] for name in names}, "generated images")
    ax.set(xlabel="size of the synthetic set, times the real one", ylabel="accuracy on real test images")
    _finished(ax, rows)
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
