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
from ..data.shifts import CORRUPTIONS
from ..data.tails import per_group
from ..evaluate.elsewhere import by_shift
from ..evaluate.scaling import REAL, scaling_work
from ..methods.class_encoder import ClassEncoderMethod
from ..work import cost
from .figures import BLUE, GREEN, GREY, ORANGE, PINK, new_axes, percent_axis

Rows = Mapping[str, Mapping[str, Any]]  # of a table, by name: facts as `evaluate.rows.accuracies` has them, and more

# The lines below an accuracy. The two errors have names of their own: they are of different things.
OVER_CLASSIFIERS = "mean ± st. dev. of its classifiers"
BY_TEST_IMAGES = "standard error by the test images, points"
LARGEST = "always the largest class"
ROUNDING = 1e-6  # an accuracy is a float32's mean: 70 of 100 may be less than 0.7


def percent(values: Sequence[float]) -> str:
    """Fractions -> "94.1 ± 0.7": their mean in percent and, of several, the standard deviation."""
    spread = f" ± {100 * _spread(values):.1f}" if len(values) > 1 else ""
    return f"{100 * np.mean(values):.1f}{spread}"


def _spread(values: Sequence[float]) -> float:
    """The standard deviation of a row's classifiers; of one it is not known: NaN."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")


# --- the tables ---


def table_1(course: Course) -> pd.DataFrame:
    """`cas_table` of the rows that this run has with these settings; none is made."""
    return cas_table(course.rows_made(1), course.settings.dataset)


def table_2(course: Course) -> pd.DataFrame:
    """`scaling_table` of the rows that this run has with these settings; none is made."""
    return scaling_table(course.rows_made(2), course.settings.dataset)


def cas_table(rows: Rows, dataset: str) -> pd.DataFrame:
    """Table 1: CAS after each step in percent, mean ± standard deviation over classifiers. Empty without rows.

    Below it, always: the standard error that the test images leave, the balanced accuracy, and the answer "always the
    largest class"; an empty cell where an older row does not say it. Last the published row of the same dataset where
    there is one, marked as published.
    """
    what = "CAS %" + _on_test(rows)
    table = pd.DataFrame({name: _accuracy(rows[name], what) | _how_drawn(rows[name]) for name in sorted(rows)})
    return _with_published(table, dataset, paper.TABLE_1, "CAS % ({}, 4000 images)")


def scaling_table(rows: Rows, dataset: str) -> pd.DataFrame:
    """Table 2: accuracy in percent of classifiers trained on real images, and on x1 .. xK. Empty without rows.

    What stands below it is as in `cas_table`.
    """
    what = "accuracy %" + _on_test(rows)
    columns = {name: _accuracy(row, what) | {"training images": row["num_images"]} for name, row in rows.items()}
    table = pd.DataFrame(columns)
    return _with_published(table, dataset, paper.TABLE_2, "accuracy % ({})")


def _on_test(rows: Rows) -> str:
    return " (selected on the TEST set)" if any(row.get("select_on") == "test" for row in rows.values()) else ""


def worth_table(rows: Rows, beside: str | None = "real") -> pd.DataFrame:
    """Rows of `evaluate.worth`, one below the other: accuracies in percent, and each one's difference to ``beside``.

    The difference is paired by classifier seeds, with its 95 % interval, in points; see `compared`. ``beside`` None: no
    differences. Empty without rows.
    """
    table = {}
    for name, row in rows.items():
        shown = {
            f"accuracy %, {OVER_CLASSIFIERS}": percent(row["test"]),
            BY_TEST_IMAGES: f"{100 * standard_error(np.mean(row['test']), row['num_test']):.1f}",
            "balanced %": percent(row["balanced_test"]),
            f"{LARGEST} %": percent([row["largest_class"]]),
            "images": row["num_images"],
            "steps": row["steps"][0],
        }
        if beside in rows:
            mean, low, high, verdict = compared(row["test"], rows[beside]["test"])
            within = "" if np.isnan(low) else f" [{low:+.1f}, {high:+.1f}]"
            shown[f"minus {beside}"] = "" if name == beside else f"{mean:+.1f}{within}: {verdict}"
        table[name] = shown
    return pd.DataFrame.from_dict(table, orient="index")


def tail_table(rows: Rows, counts: Sequence[int]) -> pd.DataFrame:
    """Rows of a long tail: balanced accuracies in percent, of all classes and of those of many, medium and few images.

    ``counts``: the real images of each class, see `data.tails.groups`. Differences to "real", if there is that row, are
    of balanced accuracy, paired by classifier seeds; see `compared`. Empty without rows.
    """
    table = {}
    for name, row in rows.items():
        shown = {f"balanced %, {OVER_CLASSIFIERS}": percent(row["balanced_test"])}
        for group, values in per_group(row["per_class"], counts).items():
            shown[f"{group} %"] = "" if np.isnan(values).all() else f"{100 * np.nanmean(values):.1f}"
        shown |= {"images": row["num_images"], "steps": row["steps"][0]}
        if "real" in rows:
            mean, low, high, verdict = compared(row["balanced_test"], rows["real"]["balanced_test"])
            within = "" if np.isnan(low) else f" [{low:+.1f}, {high:+.1f}]"
            shown["minus real"] = "" if name == "real" else f"{mean:+.1f}{within}: {verdict}"
        table[name] = shown
    return pd.DataFrame.from_dict(table, orient="index")


def elsewhere_table(rows: Rows) -> pd.DataFrame:
    """Rows of `evaluate.elsewhere`, one below the other, in percent, mean ± standard deviation over classifiers.

    The accuracy on the own test images; on each shifted set, of a corruption the mean over its severities; how many
    points less that is, of the corruptions in the mean, with the deviation over pairs of equal classifiers; the
    expected calibration error on the own images; the accuracy under each attack. An empty cell where a row does not
    say it. Empty without rows.
    """
    table = {}
    for name, row in rows.items():
        shown = {f"accuracy %, {OVER_CLASSIFIERS}": percent(row["test"])}
        shifted = by_shift(row)
        shown |= {f"{test} %": percent(accuracies) for test, accuracies in shifted.items()}
        corruptions = [accuracies for test, accuracies in shifted.items() if test in CORRUPTIONS]
        dropped = {"corruptions": np.mean(corruptions, axis=0)} if corruptions else {}
        dropped |= {test: accuracies for test, accuracies in shifted.items() if test not in CORRUPTIONS}
        shown |= {f"drop, {what}": percent(np.subtract(row["test"], there)) for what, there in dropped.items()}
        known = [error for error in row.get("calibration", []) if error is not None]
        shown["calibration error %"] = percent(known) if known else ""
        shown |= {f"{attack} %": percent(accuracies) for attack, accuracies in row.get("attacks", {}).items()}
        table[name] = shown
    return pd.DataFrame.from_dict(table, orient="index").fillna("")


def _accuracy(row: Mapping[str, Any], what: str) -> dict[str, str]:
    """A row's accuracy on real test images, and what has to be known to judge it; "" for what the row does not say."""
    accuracies = row["test"]
    error = f"{100 * standard_error(np.mean(accuracies), row['num_test']):.1f}" if "num_test" in row else ""
    return {
        f"{what}, {OVER_CLASSIFIERS}": percent(accuracies),
        BY_TEST_IMAGES: error,
        f"balanced {what}, {OVER_CLASSIFIERS}": percent(row["balanced_test"]) if "balanced_test" in row else "",
        f"{LARGEST} %": percent([row["largest_class"]]) if "largest_class" in row else "",
    }


def standard_error(share: float, count: int) -> float:
    """Of an accuracy of ``share`` (0..1) on ``count`` test images: what another choice of these would change.

    sqrt(p (1 - p) / n) with two right and two wrong images more, as Agresti and Coull (1998) count: it is never 0. Of
    the mean of several classifiers it is an upper bound.
    """
    near = (share * count + 2) / (count + 4)
    return float(np.sqrt(near * (1 - near) / (count + 4)))


def compared(values: Sequence[float], others: Sequence[float]) -> tuple[float, float, float, str]:
    """How far two rows lie apart, by pairs of classifiers of equal seeds: (mean, low, high, verdict), in points.

    ``values``, ``others``: accuracies, as fractions, of as many classifiers. From low to high is the 95 % interval of
    the mean, Student's; it covers the classifiers' random starts alone. A single pair has none: NaN; nor have pairs
    that are all equally far apart, as few classifiers on few test images may be. The verdict is "better" or "worse"
    where the interval leaves 0 out, "no difference is shown" where it does not.
    Raises ValueError for rows of different numbers of classifiers, or of none.
    """
    if len(values) != len(others) or not len(values):
        raise ValueError(
            f"The rows have {len(values)} and {len(others)} classifiers; pairs need the same number, one or more: make "
            "both rows with the same classifier_seeds."
        )
    pairs = 100 * np.subtract(values, others)
    mean = float(pairs.mean())
    if len(pairs) < 2:
        return mean, float("nan"), float("nan"), "a single pair cannot tell"
    if np.ptp(pairs) < 100 * ROUNDING < abs(mean):
        return mean, float("nan"), float("nan"), "equal in every pair, which cannot tell"
    reach = float(stdtrit(len(pairs) - 1, 0.975) * pairs.std(ddof=1) / np.sqrt(len(pairs)))
    verdict = "better" if mean > reach else "worse" if mean < -reach else "no difference is shown"
    return mean, mean - reach, mean + reach, verdict


def taught_too_little(rows: Rows) -> list[str]:
    """A sentence for each row whose classifiers are no better than an answer that looks at no image."""
    said = []
    for name, row in rows.items():
        mean, largest = np.mean(row["test"]), row.get("largest_class", 0.0)
        known = "num_classes" in row and "balanced_test" in row  # not of an older row
        balanced, chance = (row["balanced_test"], 1 / row["num_classes"]) if known else ([0.0], 0.0)
        told_apart = np.mean(balanced) - np.nan_to_num(_spread(balanced)) > chance + ROUNDING
        if mean < largest - ROUNDING:
            said.append(
                f"{name}: {mean:.1%} is below the {largest:.1%} of always answering the largest class. "
                + (
                    f"The balanced accuracy, {percent(balanced)} %, is above chance, {chance:.1%}: what was learnt of "
                    "the small classes costs more images of the largest one."
                    if told_apart
                    else "These images taught the classifiers less than that."
                )
            )
        if known and not told_apart:
            above = ", by more than its spread" if np.mean(balanced) > chance + ROUNDING else ""
            said.append(
                f"{name}: the balanced accuracy, {percent(balanced)} %, is not above chance, {chance:.1%}{above}."
            )
    return said


def chosen_set(rows: Rows) -> str | None:
    """Which of x1 .. xK the validation images choose: that of the highest mean; of equal ones the first, the smallest.

    None where no row says what it had.
    """
    means = {name: np.mean(row["val"]) for name, row in rows.items() if name != REAL and "val" in row}
    return next((name for name, mean in means.items() if mean >= max(means.values()) - ROUNDING), None)


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


DATA_SHARE = 0.25  # of a figure's height, at least: a line so far below the data that they had less is only named
SMALLEST_SPAN = 0.04  # of a figure's vertical axis: smaller differences are not blown up


def steps_figure(course: Course) -> Figure:
    """CAS after each step, a dot for every classifier, with chance and the answer "always the largest class".

    Raises ValueError without a row of table 1.
    """
    rows = _made(course, 1)
    figure, ax = new_axes(size=(6.8, 3.8))
    values = {name: rows[name]["test"] for name in sorted(rows)}
    _dots(ax, values)
    ax.set(ylabel="CAS (real test images)")
    _levels(ax, _largest_class(rows) | {"chance": (1 / course.data.num_classes, GREY, ":")}, [*values.values()])
    return _finished(figure, ax)


def scaling_figure(course: Course) -> Figure:
    """Accuracy against the size of the synthetic set, beside real data; bars and band are the standard deviation.

    Raises ValueError without a row of table 2.
    """
    rows = _made(course, 2)
    figure, ax = new_axes(size=(6.8, 3.8))
    values = {name: row["test"] for name, row in rows.items()}
    if real := values.get(REAL):
        ax.axhline(np.mean(real), color=GREEN, linestyle="--", label=f"real images: {_said(real)}")
        if len(real) > 1:
            ax.axhspan(np.mean(real) - _spread(real), np.mean(real) + _spread(real), color=GREEN, alpha=0.15)
    _dots(ax, {name: found for name, found in values.items() if name != REAL})
    ax.set(xlabel="size of the synthetic set, times the real one", ylabel="accuracy on real test images")
    _levels(ax, _largest_class(rows), [*values.values()])
    return _finished(figure, ax)


def _said(*rows: Sequence[float]) -> str:
    """What is drawn of rows with so many classifiers: "mean ± st. dev. of 3 classifiers"."""
    counts = sorted({len(row) for row in rows})
    if counts == [1]:
        return "one classifier"
    return f"mean ± st. dev. of {' or '.join(map(str, counts))} classifiers"


def _dots(ax: Axes, values: Mapping[str, Sequence[float]]) -> None:
    """A dot for each classifier of generated images, and beside the dots of a row their mean and standard deviation."""
    names, rows = list(values), list(values.values())
    for at, row in enumerate(rows):
        label = None if at else "generated images: each classifier"
        ax.scatter([at] * len(row), row, color=ORANGE, s=18, zorder=3, label=label)
    if any(len(row) > 1 for row in rows):
        at = np.arange(len(rows)) + 0.03 * len(rows)  # beside the dots, by a share of the width
        means, spreads = [np.mean(row) for row in rows], [_spread(row) for row in rows]
        ax.errorbar(at, means, spreads, fmt="o", color=BLUE, capsize=4, label=f"generated images: {_said(*rows)}")
    ax.set_xticks(range(len(names)), names)
    ax.set_xlim(-0.5, max(len(names), 1) - 0.5)


def _largest_class(rows: Rows) -> dict[str, tuple[float, str, str]]:
    """The level of that answer, its colour and its dashes; none for rows that do not say it."""
    known = [row["largest_class"] for row in rows.values() if "largest_class" in row]
    return {LARGEST: (max(known), PINK, "-.")} if known else {}


def _levels(ax: Axes, levels: Mapping[str, tuple[float, str, str]], rows: Sequence[Sequence[float]]) -> None:
    """Lines to judge the rows by, and the vertical limits: what is drawn of the rows, and the lines.

    A line above the rows is always seen. One so far below that the rows would lie in a narrow strip is named in the
    legend alone, with where it is.
    """
    ends = [end for row in rows for end in (*row, np.mean(row) - _spread(row), np.mean(row) + _spread(row))]
    low, high = np.nanmin(ends), max(np.nanmax(ends), *(level for level, _, _ in levels.values()), 0)
    span = max(high - low, SMALLEST_SPAN)
    high = max(high, min((low + high + span) / 2, 1))
    bottom = min([high - span, *(level for level, _, _ in levels.values() if span >= DATA_SHARE * (high - level))])
    for name, (level, color, dashes) in levels.items():
        where = "" if level >= bottom else " (below the axis)"
        ax.axhline(level, color=color, linestyle=dashes, label=f"{name}: {100 * level:.1f} %{where}")
    margin = 0.08 * (high - bottom)
    ax.set_ylim(max(bottom - margin, -0.02), min(high + margin, 1.02))


def _finished(figure: Figure, ax: Axes) -> Figure:
    """With a legend below the axes, where it covers nothing, and percent on the vertical one."""
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
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
