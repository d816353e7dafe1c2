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
from ..search.search import PARAMETERS, rescored_frame, trials_frame
from .figures import BLUE, GREY, ORANGE, PINK, new_axes, percent_axis

LABELS = {"IS": "IS (inference steps)", "UGS": "UGS (guidance scale)", "epoch": "epoch of the checkpoint"}
PANELS = (("IS", "UGS"), ("epoch", "value"))  # of `trials_by_parameter`, (x, y) each
KINDS = {False: (BLUE, "o", "complete"), True: (GREY, "X", "pruned")}  # of trials: told apart in grey, too
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
        ax.plot(history.index, history[column], line, color=colour, label=name)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set(xlabel="epoch", ylabel="mean squared error of the noise", title=title)
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))  # beside the axes: inside it would hide a curve
    return figure


# --- trials ---


def _coloured(ax: Axes, frame: pd.DataFrame, x: str, y: str, least_span: float) -> ScalarMappable:
    """Draws each trial as a point, the complete ones coloured by accuracy; returns the scale, in percent.

    A pruned trial is a grey cross: its accuracy is that of a shorter training. ``least_span``: the scale spans at least
    so many percent, also where all trials scored alike.
    """
    complete = frame[~frame.pruned.astype(bool)]
    low = 100 * complete.value.min() if len(complete) else 0.0
    high = max(100 * complete.value.max() if len(complete) else 0.0, low + least_span)
    scale = ScalarMappable(plt.Normalize(low, high), "viridis")
    for pruned, (colour, marker, label) in KINDS.items():
        part = frame[frame.pruned == pruned]
        if len(part):
            look = {"color": colour} if pruned else {"c": 100 * part.value, "norm": scale.norm, "cmap": scale.cmap}
            ax.scatter(part[x], part[y], marker=marker, s=70, edgecolor="white", label=label, **look)
    return scale


def trials(study: optuna.Study, title: str = "") -> Figure:
    """Each trial as a point: IS against UGS, coloured by accuracy (pruned ones as crosses), and the best so far.

    It also draws a search that has no finished trial yet, or only pruned ones: then there is no best.
    """
    frame = trials_frame(study).astype({"pruned": bool})
    complete = frame.value.where(~frame.pruned).astype(float)
    figure, (left, right) = new_axes(1, 2, size=(9.2, 3.4))
    scale = _coloured(left, frame, "IS", "UGS", least_span=1e-4)
    figure.colorbar(scale, ax=left, label="accuracy on real images (%)")
    if complete.notna().any():
        best = best_trial(frame)
        left.scatter([best.IS], [best.UGS], label="chosen", **RING)
    left.set(xlabel=LABELS["IS"], ylabel=LABELS["UGS"])
    for pruned, (colour, marker, label) in KINDS.items():
        at = np.flatnonzero(frame.pruned == pruned)
        right.scatter(at + 1, frame.value.iloc[at], color=colour, marker=marker, s=25, label=label)
    best_so_far = complete.cummax().ffill()
    right.step(range(1, len(frame) + 1), best_so_far, where="post", color=ORANGE, label="best so far")
    right.set(xlabel="trial", ylabel="accuracy on real images")
    for ax in (left, right):
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(frame):
            ax.legend(fontsize=8)
    percent_axis(right)
    if title:
        figure.suptitle(title)
    return figure


def rescored(study: optuna.Study) -> Figure:
    """What the best few trials were picked for, and what several classifiers on images drawn anew say of them.

    A first value far above the mean was luck. Raises ValueError where no trial was rescored.
    """
    frame = rescored_frame(study)
    if not len(frame):
        raise ValueError("No trial of this search was rescored: set rescored to 2 or more.")
    figure, ax = new_axes(size=(6.4, 0.5 * len(frame) + 1.4))
    at = np.arange(len(frame))
    ax.hlines(at, frame["first value"], frame["mean"], color=GREY, linewidth=1)
    ax.scatter(frame["first value"], at, marker="D", color=ORANGE, zorder=3, label="first value, one classifier")
    ax.errorbar(
        frame["mean"],
        at,
        xerr=frame["standard error"].fillna(0),
        fmt="o",
        color=BLUE,
        capsize=4,
        label=f"drawn anew: mean ± standard error of {frame.classifiers.max()}",
    )
    points = [f"IS {row.IS:.0f}, UGS {row.UGS:.2f}, epoch {row.epoch:.0f}" for row in frame.itertuples()]
    names = [point + ("  (chosen)" if is_chosen else "") for point, is_chosen in zip(points, frame.chosen)]
    ax.set_yticks(at, names)
    ax.invert_yaxis()
    ax.set(xlabel="accuracy on real images")
    ax.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    return figure


def trials_by_parameter(frame: pd.DataFrame, chosen: int | None = None) -> Figure:
    """All four numbers of each trial (rows of `trials_frame`): IS and UGS, epoch and CAS; ``chosen`` is ringed."""
    figure, axes = new_axes(1, 2, size=(9.2, 3.4))
    for ax, (x, y) in zip(axes, PANELS):
        scale = _coloured(ax, frame, x, y, least_span=1)
        if chosen is not None:
            ax.scatter(frame.loc[chosen, x], frame.loc[chosen, y], **RING)
        ax.set(xlabel=LABELS[x], ylabel=LABELS.get(y, "CAS (real images of the search)"))
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].legend(fontsize=8)
    percent_axis(axes[1])
    figure.colorbar(scale, ax=axes, label="CAS (%)")
    return figure


def slices(study: optuna.Study) -> Figure:
    """Accuracy against each parameter on its own: where the good trials lie."""
    frame = trials_frame(study)
    figure, axes = new_axes(1, 3, size=(9.6, 3.0))
    for ax, name in zip(axes, PARAMETERS):
        for pruned, (colour, marker, label) in KINDS.items():
            part = frame[frame.pruned == pruned]
            ax.scatter(part[name], part.value, color=colour, marker=marker, s=30, alpha=0.8, label=label)
        ax.set(xlabel=LABELS[name])
        if name != "UGS":
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        percent_axis(ax)
    axes[0].set_ylabel("accuracy on real images")
    axes[0].legend(fontsize=8)
    return figure


def contour(study: optuna.Study, x: str = "IS", y: str = "UGS") -> Figure:
    """Accuracy over two parameters as a random forest expects it, where the third is the best trial's.

    The forest (as fANOVA's, of 64 trees) learns from all trials and is told how many classifier epochs each one had, so
    that pruned trials are no valleys; it is asked for whole trials. The points are the trials, at whatever third value.
    Without a complete trial, or where all scored alike, only these are drawn.
    """
    frame = trials_frame(study).astype({"pruned": bool})
    figure, ax = new_axes(size=(5.6, 3.8))
    enough = len(frame) >= 4 and frame[x].nunique() > 1 and frame[y].nunique() > 1
    best = best_trial(frame) if len(frame) else None
    if enough and not best.pruned and np.ptp(frame.value) > 1e-3:  # else there is no landscape, only rounding
        across, up = (np.linspace(frame[name].min(), frame[name].max(), GRID) for name in (x, y))
        expected = 100 * _expected(frame, best, {x: across, y: up})
        filled = ax.pcolormesh(across, up, expected, shading="nearest", cmap="viridis")
        figure.colorbar(filled, ax=ax, label="expected accuracy on real images (%)")
        (third,) = set(PARAMETERS) - {x, y}
        ax.set_title(f"a random forest's expectation at {third} {best[third]:.4g}", fontsize=9)
    for pruned, (_, marker, label) in KINDS.items():
        part = frame[frame.pruned == pruned]
        ax.scatter(part[x], part[y], color="white", edgecolor="black", s=30, marker=marker, label=label)
    ax.set(xlabel=LABELS[x], ylabel=LABELS[y])
    for name, axis in ((x, ax.xaxis), (y, ax.yaxis)):
        if name != "UGS":
            axis.set_major_locator(MaxNLocator(integer=True))
    ax.grid(False)
    if len(frame):
        figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    return figure


def best_trial(frame: pd.DataFrame) -> pd.Series:
    """The row of `trials_frame` that the search chose; of a pruned trial, the most accurate, where none is complete."""
    return frame.loc[frame.chosen.idxmax() if frame.chosen.any() else frame.value.astype(float).idxmax()]


def _expected(frame: pd.DataFrame, best: pd.Series, grid: dict[str, np.ndarray]) -> np.ndarray:
    """What a forest expects of whole trials on a grid {x: (X,), y: (Y,)}, all else as the best one's: (Y, X)."""
    from sklearn.ensemble import RandomForestRegressor  # a second, which the other figures need not wait for

    told = [*PARAMETERS, "classifier_epochs"]
    forest = RandomForestRegressor(n_estimators=64, random_state=0).fit(frame[told], frame.value)
    points = pd.DataFrame({name: np.full(GRID * GRID, float(best[name])) for name in told})
    for name, values in zip(grid, np.meshgrid(*grid.values())):
        points[name] = values.ravel()
    return forest.predict(points).reshape(GRID, GRID)


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
    ax.legend(fontsize=8)
    return figure
