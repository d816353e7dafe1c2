"""Figures of the two trainings and the two searches."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import optuna
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..config import paper
from ..search.search import FEWEST, PARAMETERS, Compared, compared, rescored_frame, trials_frame
from .figures import BLUE, GREY, ORANGE, PINK, new_axes, percent_axis

LABELS = {"IS": "IS (inference steps)", "UGS": "UGS (guidance scale)", "epoch": "epoch of the checkpoint"}
PANELS = (("IS", "UGS"), ("epoch", "value"))  # of `trials_by_parameter`, (x, y) each
KINDS = {False: (BLUE, "o", "complete"), True: (GREY, "X", "pruned")}  # of trials: told apart in grey, too
PRUNED_LABEL = "pruned: no accuracy to compare"  # where the axis is one of accuracies
GRID = 80  # points of a contour, each way
RING = {"s": 220, "facecolor": "none", "edgecolor": ORANGE, "linewidth": 2}  # around a trial


def loss_curve(history: pd.DataFrame, title: str) -> Figure:
    """The loss of every epoch, in training and on held-out images with the right, a wrong and no label."""
    figure, ax = new_axes(size=(8.0, 3.4))
    styles = {
        "train": (GREY, ":", "training images"),
        "wrong": (ORANGE, "--", "held out, wrong label"),
        "empty": (PINK, "-.", "held out, no label"),
        "right": (BLUE, "-", "held out, right label"),
    }
    for column, (colour, line, name) in styles.items():
        dot = "o" if len(history) == 1 else None  # one epoch is no line
        ax.plot(history.index, history[column], line, color=colour, label=name, marker=dot)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    ax.set(xlabel="epoch", ylabel="mean squared error of the noise", title=title)
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))  # beside the axes: inside it would hide a curve
    return figure


# --- trials ---


def is_pruned(frame: pd.DataFrame) -> pd.Series:
    """Whether each row of `trials_frame` was pruned: bool, also where there is no row."""
    return frame.pruned.astype(bool)


def heights(frame: pd.DataFrame) -> pd.Series:
    """Where each row of `trials_frame` stands on an axis of accuracies: a pruned one on a line below all complete ones.

    A pruned trial's accuracy is that of fewer classifier epochs: among those of complete ones it would mislead.
    """
    complete = frame.value.astype(float).where(~is_pruned(frame))
    if complete.isna().all():
        return complete.fillna(0.0)
    return complete.fillna(complete.min() - max(0.15 * (complete.max() - complete.min()), 0.01))


def _points(ax: Axes, x: pd.Series, y: pd.Series, pruned: pd.Series, size: int, label: str = PRUNED_LABEL) -> None:
    """Draws trials without their accuracies: complete ones as blue dots, pruned ones as grey crosses."""
    for kind, (colour, marker, name) in KINDS.items():
        at = pruned == kind
        ax.scatter(x[at], y[at], color=colour, marker=marker, s=size, label=label if kind else name)


def _coloured(ax: Axes, frame: pd.DataFrame, x: str, y: str, least_span: float) -> ScalarMappable:
    """Draws each trial as a point, the complete ones coloured by accuracy; returns the scale, in percent.

    A pruned trial is a grey cross: its accuracy is that of a shorter training. ``least_span``: the scale spans at least
    so many percent, also where all trials scored alike.
    """
    pruned, at = is_pruned(frame), frame.assign(value=heights(frame))
    values = 100 * frame.value[~pruned].astype(float)
    low = values.min() if len(values) else 0.0
    high = max(values.max() if len(values) else 0.0, low + least_span)
    scale = ScalarMappable(plt.Normalize(low, high), "viridis")
    for kind, (colour, marker, label) in KINDS.items():
        part = at[pruned == kind]
        if len(part):
            look = {"color": colour} if kind else {"c": values, "norm": scale.norm, "cmap": scale.cmap}
            ax.scatter(part[x], part[y], marker=marker, s=70, edgecolor="white", label=label, **look)
    return scale


def trials(study: optuna.Study, title: str = "") -> Figure:
    """Each trial as a point: IS against UGS, coloured by accuracy (pruned ones as grey crosses), and the best so far.

    A ring is around the trial that the search would end with now (`search.chosen`).
    It also draws a search that has no finished trial yet, or only pruned ones: then there is no such trial.
    """
    frame = trials_frame(study)
    pruned = is_pruned(frame)
    complete = frame.value.where(~pruned).astype(float)
    figure, (left, right) = new_axes(1, 2, size=(9.2, 3.4))
    scale = _coloured(left, frame, "IS", "UGS", least_span=1e-4)
    figure.colorbar(scale, ax=left, label="accuracy on real images (%)")
    order = pd.Series(range(1, len(frame) + 1), index=frame.index)
    _points(right, order, heights(frame), pruned, size=25)
    right.step(order, complete.cummax().ffill(), where="post", color=ORANGE, label="best so far")
    if complete.notna().any():
        best = best_trial(frame)
        left.scatter([best.IS], [best.UGS], label="chosen", **RING)
        right.scatter([order[best.name]], [best.value], **RING)
    left.set(xlabel=LABELS["IS"], ylabel=LABELS["UGS"])
    right.set(xlabel="trial", ylabel="accuracy on real images")
    for ax in (left, right):
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        if len(frame):
            ax.legend(fontsize=8)
    percent_axis(right)
    if title:
        figure.suptitle(title)
    return figure


def rescored(study: optuna.Study) -> Figure:
    """How far the first value of each rescored trial was luck: beside it the mean of its classifiers on other noise.

    The bar over a mean is its standard error: of the classifiers, not of the drawn set. The first values stand above
    the means on average, since the trials were picked for them. Raises ValueError where no trial was rescored.
    """
    frame = rescored_frame(study)
    if not len(frame):
        raise ValueError("No trial of this search was rescored: set rescored to 1 or more.")
    figure, ax = new_axes(size=(6.4, 0.5 * len(frame) + 1.4))
    at, count = np.arange(len(frame)), frame.classifiers.max()
    ax.hlines(at, frame["first value"], frame["mean"], color=GREY, linewidth=1)
    ax.scatter(frame["first value"], at, marker="D", color=ORANGE, zorder=3, label="first value, one classifier")
    ax.errorbar(
        frame["mean"],
        at,
        xerr=frame["standard error"].fillna(0),
        fmt="o",
        color=BLUE,
        capsize=4,
        label="drawn anew: " + (f"mean ± standard error of {count}" if count > 1 else "one classifier"),
    )
    points = [f"IS {row.IS:.0f}, UGS {row.UGS:.2f}, epoch {row.epoch:.0f}" for row in frame.itertuples()]
    names = [point + ("  (chosen)" if is_chosen else "") for point, is_chosen in zip(points, frame.chosen)]
    ax.set_yticks(at, names)
    ax.invert_yaxis()
    ax.set(xlabel="accuracy on real images")
    ax.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
    luck = 100 * (frame["first value"] - frame["mean"]).mean()
    side = "above" if luck >= 0 else "below"
    ax.set_title(f"the first values lie {abs(luck):.1f} points {side} the means, on average", fontsize=9)
    ax.margins(y=0.2)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    return figure


def trials_by_parameter(frame: pd.DataFrame, shown: int | None = None) -> Figure:
    """All four numbers of each trial (rows of `trials_frame`): IS and UGS, epoch and CAS.

    A ring is around the trial that the search would end with now, a dotted one around trial ``shown``. A pruned trial
    has no accuracy to compare: it lies on a line below, see `heights`.
    """
    at = frame.assign(value=heights(frame))
    figure, axes = new_axes(1, 2, size=(9.2, 3.4))
    for ax, (x, y) in zip(axes, PANELS):
        scale = _coloured(ax, frame, x, y, least_span=1)
        if not is_pruned(frame).all():
            best = best_trial(at)
            ax.scatter(best[x], best[y], label="chosen", **RING)
        if shown is not None:
            ax.scatter(at.loc[shown, x], at.loc[shown, y], label="shown below", **RING | {"linestyle": ":", "s": 340})
        ax.set(xlabel=LABELS[x], ylabel=LABELS.get(y, "accuracy (real images of the search)"))
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8, markerscale=0.6
    )
    percent_axis(axes[1])
    figure.colorbar(scale, ax=axes, label="accuracy (%)")
    return figure


def slices(study: optuna.Study) -> Figure:
    """Accuracy against each parameter on its own: where the good trials lie. Pruned ones stand on a line below them."""
    frame = trials_frame(study)
    figure, axes = new_axes(1, 3, size=(9.6, 3.0))
    for ax, name in zip(axes, PARAMETERS):
        _points(ax, frame[name], heights(frame), is_pruned(frame), size=30)
        ax.set(xlabel=LABELS[name])
        if name != "UGS":
            ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        percent_axis(ax)
    axes[0].set_ylabel("accuracy on real images")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    return figure


def contour(study: optuna.Study, x: str = "IS", y: str = "UGS", *, pruned: bool | None = None) -> Figure:
    """Accuracy over two parameters as a random forest expects it, where the third is the chosen trial's.

    The forest (as fANOVA's, of 64 trees) learns from trials that can be compared; ``pruned`` as in `search.compared`.
    The title says from which. The points are all trials, at whatever third value: far from those that it learnt from,
    the forest knows nothing. Without a complete trial, or where all scored alike, only the points are drawn.
    """
    frame = trials_frame(study)
    stopped = is_pruned(frame)
    figure, ax = new_axes(size=(5.6, 3.8))
    if not stopped.all():
        found, third = compared(study, pruned), next(name for name in PARAMETERS if name not in (x, y))
        known = pd.DataFrame([t.params for t in found.trials], columns=list(PARAMETERS))
        varied = len(known) >= FEWEST and known[x].nunique() > 1 and known[y].nunique() > 1
        if varied and np.ptp(found.values) > 1e-3:  # else there is no landscape, only rounding
            across, up = (np.linspace(frame[name].min(), frame[name].max(), GRID) for name in (x, y))
            level = best_trial(frame)[third]
            expected = 100 * _expected(known, found, {x: across, y: up, third: np.array([level])})
            filled = ax.pcolormesh(across, up, expected, shading="nearest", cmap="viridis")
            figure.colorbar(filled, ax=ax, label="expected accuracy on real images (%)")
            ax.set_title(f"a random forest's expectation at {third} {level:.4g},\nfrom {found.said}", fontsize=9)
    for kind, (_, marker, label) in KINDS.items():
        part = frame[stopped == kind]
        ax.scatter(part[x], part[y], color="white", edgecolor="black", s=30, marker=marker, label=label, clip_on=False)
    ax.set(xlabel=LABELS[x], ylabel=LABELS[y])
    for name, axis in ((x, ax.xaxis), (y, ax.yaxis)):
        if name != "UGS":
            axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    ax.grid(False)
    if len(frame):
        figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    return figure


def best_trial(frame: pd.DataFrame) -> pd.Series:
    """The row of `trials_frame` that the search chose; of a pruned trial, the most accurate, where none is complete."""
    return frame.loc[frame.chosen.idxmax() if frame.chosen.any() else frame.value.astype(float).idxmax()]


def _expected(known: pd.DataFrame, found: Compared, grid: dict[str, np.ndarray]) -> np.ndarray:
    """What a forest expects on a grid {x: (X,), y: (Y,), third: (1,)}: (Y, X)."""
    from sklearn.ensemble import RandomForestRegressor  # a second, which the other figures need not wait for

    forest = RandomForestRegressor(n_estimators=64, random_state=0).fit(known, found.values)
    points = {name: values.ravel() for name, values in zip(grid, np.meshgrid(*grid.values()))}
    return forest.predict(pd.DataFrame(points)[list(known)]).reshape(GRID, GRID)


def importance_bars(
    ours: pd.DataFrame, published: pd.DataFrame = paper.IMPORTANCES, intervals: Mapping[str, pd.DataFrame] | None = None
) -> Figure:
    """fANOVA importances: our searches (rows of ``ours``) and the mean of the released ones, step by step.

    ``intervals``: for rows of ``ours``, by name, what `bootstrapped_importances` found; a line over each bar goes from
    "low" to "high".
    """
    intervals, lines = intervals or {}, None
    figure, ax = new_axes(size=(7.6, 3.4))
    bars = {f"ours, {name}": row for name, row in ours.iterrows()}
    for step in (2, 4):
        bars[f"published, mean of step {step}"] = published.xs(step, level="step").mean()
    positions, height = np.arange(len(PARAMETERS)), 0.8 / len(bars)
    looks = [dict(color=(BLUE, "#56B4E9")[k % 2]) for k in range(len(ours))]
    looks += [dict(color=c, hatch="///", edgecolor="white") for c in (GREY, "#AAAAAA")]  # told apart in grey, too
    for k, ((label, row), look) in enumerate(zip(bars.items(), looks)):
        at = positions + (k - (len(bars) - 1) / 2) * height
        ax.barh(at, [row[p] for p in PARAMETERS], height * 0.9, label=label, **look)
        if (interval := intervals.get(label.removeprefix("ours, "))) is not None:
            low, high = (interval[end].reindex(list(PARAMETERS)) for end in ("low", "high"))
            lines = ax.hlines(at, low, high, color="black", linewidth=1.5)
    if lines:
        lines.set_label("where its trials, resampled, put it")
    ax.set_yticks(positions, [LABELS[p] for p in PARAMETERS])
    ax.invert_yaxis()
    ax.set(xlabel="share of the variance of the accuracy (fANOVA)", xlim=(0, 1))
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))  # beside the axes: inside it would hide a line
    return figure
