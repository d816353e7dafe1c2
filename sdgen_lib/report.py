"""Figures and tables from finished runs, beside the published numbers.

``python -m sdgen_lib.report [runs folder]`` prints the tables of every finished run.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from . import paper, runs, tune
from .figures import BLUE, GREEN, GREY, ORANGE, PINK, new_axes

LABELS = {"IS": "IS (inference steps)", "UGS": "UGS (guidance scale)", "epoch": "epoch of the checkpoint"}


# --- training and search ---


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


def _cas_axis(ax) -> None:
    ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")


KINDS = {False: (BLUE, "o", "complete"), True: (GREY, "X", "pruned")}  # of trials: told apart in grey, too


def trials(study: optuna.Study, title: str = "") -> Figure:
    """Each trial as a point: IS against UGS, coloured by accuracy (pruned ones as crosses), and the best so far."""
    frame = tune.trials_frame(study)
    figure, (left, right) = new_axes(1, 2, size=(9.2, 3.4))
    low, high = frame.value.min(), max(frame.value.max(), frame.value.min() + 1e-6)
    for pruned, (_, marker, label) in KINDS.items():
        part = frame[frame.pruned == pruned]
        if len(part):
            dots = left.scatter(
                part.IS,
                part.UGS,
                c=100 * part.value,
                vmin=100 * low,
                vmax=100 * high,
                marker=marker,
                s=70,
                cmap="viridis",
                edgecolor="white",
                label=label,
            )
    figure.colorbar(dots, ax=left, label="accuracy on real images (%)")
    best = frame.loc[frame.value.where(~frame.pruned).idxmax()]
    left.scatter([best.IS], [best.UGS], s=220, facecolor="none", edgecolor=ORANGE, linewidth=2, label="best")
    left.set(xlabel=LABELS["IS"], ylabel=LABELS["UGS"])
    left.legend(fontsize=8)
    for pruned, (colour, marker, label) in KINDS.items():
        at = np.flatnonzero(frame.pruned == pruned)
        right.scatter(at + 1, frame.value.iloc[at], color=colour, marker=marker, s=25, label=label)
    right.step(
        range(1, len(frame) + 1),
        frame.value.where(~frame.pruned).cummax().ffill(),
        where="post",
        color=ORANGE,
        label="best so far",
    )
    right.set(xlabel="trial", ylabel="accuracy on real images")
    right.legend(fontsize=8)
    for ax in (left, right):
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    _cas_axis(right)
    if title:
        figure.suptitle(title)
    return figure


PANELS = (("IS", "UGS"), ("epoch", "value"))  # of `trials_by_parameter`, (x, y) each


def trials_by_parameter(frame: pd.DataFrame, chosen: int | None = None) -> Figure:
    """All four numbers of each trial (rows of `tune.trials_frame`): IS and UGS, epoch and CAS; ``chosen`` is ringed."""
    figure, axes = new_axes(1, 2, size=(9.2, 3.4))
    low = 100 * frame.value.min()
    high = max(100 * frame.value.max(), low + 1)  # at least a point wide, where all trials scored alike
    for ax, (x, y) in zip(axes, PANELS):
        for pruned, (_, marker, label) in KINDS.items():
            part = frame[frame.pruned == pruned]
            if len(part):
                dots = ax.scatter(part[x], part[y], c=100 * part.value, vmin=low, vmax=high, marker=marker, s=70,
                                  cmap="viridis", edgecolor="white", label=label)  # fmt: skip
        if chosen is not None:
            ax.scatter(frame.loc[chosen, x], frame.loc[chosen, y], s=220, facecolor="none", edgecolor=ORANGE, lw=2)
        ax.set(xlabel=LABELS[x], ylabel=LABELS.get(y, "CAS (real images of the search)"))
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].legend(fontsize=8)
    _cas_axis(axes[1])
    figure.colorbar(dots, ax=axes, label="CAS (%)")
    return figure


def slices(study: optuna.Study) -> Figure:
    """Accuracy against each parameter on its own: where the good trials lie."""
    frame = tune.trials_frame(study)
    figure, axes = new_axes(1, 3, size=(9.6, 3.0))
    for ax, name in zip(axes, tune.PARAMETERS):
        for pruned, (colour, marker, label) in KINDS.items():
            part = frame[frame.pruned == pruned]
            ax.scatter(part[name], part.value, color=colour, marker=marker, s=30, alpha=0.8, label=label)
        ax.set(xlabel=LABELS[name])
        if name != "UGS":
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        _cas_axis(ax)
    axes[0].set_ylabel("accuracy on real images")
    axes[0].legend(fontsize=8)
    return figure


def contour(study: optuna.Study, x: str = "IS", y: str = "UGS") -> Figure:
    """Accuracy over two parameters, interpolated between the trials (linear on triangles)."""
    frame = tune.trials_frame(study)
    figure, ax = new_axes(size=(5.6, 3.8))
    points = frame.groupby([x, y], as_index=False).value.max()
    spread = np.ptp(points.value) > 1e-3  # else there is no landscape to draw, only rounding
    if len(points) >= 4 and points[x].nunique() > 1 and points[y].nunique() > 1 and spread:
        filled = ax.tricontourf(points[x], points[y], 100 * points.value, levels=10, cmap="viridis")
        figure.colorbar(filled, ax=ax, label="accuracy on real images (%)")
    ax.scatter(points[x], points[y], color="white", edgecolor="black", s=22)
    ax.set(xlabel=LABELS[x], ylabel=LABELS[y])
    for name, axis in ((x, ax.xaxis), (y, ax.yaxis)):
        if name != "UGS":
            axis.set_major_locator(MaxNLocator(integer=True))
    ax.grid(False)
    return figure


def importance_bars(ours: pd.DataFrame, published: pd.DataFrame = paper.IMPORTANCES) -> Figure:
    """fANOVA importances: our searches (rows of ``ours``) and the mean of the released ones, step by step."""
    figure, ax = new_axes(size=(7.6, 3.4))
    bars = {f"ours, {name}": row for name, row in ours.iterrows()}
    for step in (2, 4):
        bars[f"published, mean of step {step}"] = published.xs(step, level="step").mean()
    positions, height = np.arange(len(tune.PARAMETERS)), 0.8 / len(bars)
    looks = [dict(color=(BLUE, "#56B4E9")[k % 2]) for k in range(len(ours))]
    looks += [dict(color=c, hatch="///", edgecolor="white") for c in (GREY, "#AAAAAA")]  # told apart in grey, too
    for k, ((label, row), look) in enumerate(zip(bars.items(), looks)):
        ax.barh(positions + (k - (len(bars) - 1) / 2) * height, [row[p] for p in tune.PARAMETERS], height * 0.9,
                label=label, **look)  # fmt: skip
    ax.set_yticks(positions, [LABELS[p] for p in tune.PARAMETERS])
    ax.invert_yaxis()
    ax.set(xlabel="share of the variance of the accuracy (fANOVA)", xlim=(0, 1))
    ax.legend(fontsize=8)
    return figure


# --- tables ---


def percent(values: Sequence[float]) -> str:
    """Fractions -> "94.1 ± 0.7": their mean in percent and, of several, the standard deviation."""
    spread = f" ± {100 * np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{100 * np.mean(values):.1f}{spread}"


def _note(rows: dict[str, Any]) -> str:
    return " (selected on the TEST set)" if any(r.get("select_on") == "test" for r in rows.values()) else ""


def table_1(run_path: Path, dataset: str) -> pd.DataFrame:
    """Our table 1: CAS after each step, as percent on real test images, mean ± standard deviation over classifiers.

    Below it the published row of the same dataset where there is one, marked as published.
    """
    rows = runs.load_json(Path(run_path) / "table_1.json", {})
    ours = {
        step: {f"CAS %{_note(rows)}": percent(row["test"]),
               "IS": row["point"]["IS"], "UGS": round(row["point"]["UGS"], 2),
               "epochs": "/".join(str(row["point"][f"{p}_epoch"] or "-") for p in ("transfer", "finetune")),
               "images": row["num_images"], "generation s": round(row["seconds"], 1)}
        for step, row in sorted(rows.items())
    }  # fmt: skip
    table = pd.DataFrame(ours)
    name = paper.name_of(dataset)
    if name and len(table):
        table.loc[f"published CAS % ({name}, 4000 images)"] = paper.TABLE_1.loc[name].reindex(table.columns)
    return table.fillna("")


def table_2(run_path: Path, dataset: str) -> pd.DataFrame:
    """Our table 2: accuracy on real test images of classifiers trained on real images, and on x1 .. xK."""
    rows = runs.load_json(Path(run_path) / "table_2.json", {})
    ours = {
        name: {"accuracy %": percent(row["test"]), "training images": row["num_images"]} for name, row in rows.items()
    }
    table = pd.DataFrame(ours)
    name = paper.name_of(dataset)
    if name and len(table):
        table.loc[f"published accuracy % ({name})"] = paper.TABLE_2.loc[name].reindex(table.columns)
    return table.fillna("")


def steps_figure(run_path: Path, chance: float) -> Figure:
    """CAS after each step, a dot for every classifier, with chance level."""
    rows = runs.load_json(Path(run_path) / "table_1.json", {})
    figure, ax = new_axes(size=(6.4, 3.4))
    names = sorted(rows)
    ax.plot(names, [np.mean(rows[n]["test"]) for n in names], "-o", color=BLUE, label="mean")
    for name in names:
        dots = ax.scatter([name] * len(rows[name]["test"]), rows[name]["test"], color=ORANGE, s=18, zorder=3)
    dots.set_label("each classifier")
    ax.axhline(chance, color=GREY, linestyle=":", label="chance")
    ax.set(ylabel="CAS (real test images)", ylim=(0, 1))
    ax.legend()
    _cas_axis(ax)
    return figure


def scaling_figure(run_path: Path) -> Figure:
    """Accuracy against the size of the synthetic set, beside real data; bars and band are the seeds' spread."""
    rows = runs.load_json(Path(run_path) / "table_2.json", {})
    real, names = rows["real"]["test"], [n for n in rows if n != "real"]
    figure, ax = new_axes(size=(6.4, 3.4))
    ax.axhline(np.mean(real), color=GREEN, linestyle="--", label="trained on real images")
    ax.axhspan(np.min(real), np.max(real), color=GREEN, alpha=0.15)
    means = np.array([np.mean(rows[n]["test"]) for n in names])
    errors = [means - [min(rows[n]["test"]) for n in names], [max(rows[n]["test"]) for n in names] - means]
    ax.errorbar(names, means, yerr=errors, fmt="-o", color=BLUE, capsize=4, label="trained on synthetic images")
    ax.set(xlabel="size of the synthetic set, times the real one", ylabel="accuracy on real test images")
    ax.legend(title=f"mean, lowest and highest of {len(real)}" if len(real) > 1 else None)
    _cas_axis(ax)
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    arguments = list(sys.argv[1:] if argv is None else argv)
    base = Path(arguments[0]) if arguments else runs.default_runs_dir()
    found = sorted(path.parent for path in base.glob("*/*/manifest.json"))
    if not found:
        raise SystemExit(f"No run in {base.absolute()}: run the notebooks first (make course).")
    for path in found:
        dataset = runs.load_json(path / "manifest.json")["settings"]["dataset"]
        for number, table in ((1, table_1(path, dataset)), (2, table_2(path, dataset))):
            if len(table):
                print(f"\nTable {number}, {path.relative_to(base)}\n{table.to_string()}")


if __name__ == "__main__":
    main()
