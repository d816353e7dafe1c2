"""Pictures of mixtures, filters and per-class quality."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from ..data import Split
from ..evaluate.mixing import crossing
from . import figures
from .tables import compared

Rows = Mapping[tuple[str, str], Mapping[str, Any]]
MOST_CLASSES = 12  # rows of pictures, of a dataset with more classes


def gains(rows: Rows) -> pd.DataFrame:
    """What generated images add at each number of real ones, in points of test accuracy, with the 95 % interval.

    ``rows`` of the study "real", by (count, "real" or "both"); the index is the count, the columns "gain", "low",
    "high": paired by classifier seeds, see `tables.compared`.
    """
    counts = [value for value, kind in rows if kind == "real"]
    found = {int(n): compared(rows[n, "both"]["test"], rows[n, "real"]["test"])[:3] for n in counts}
    return pd.DataFrame.from_dict(found, orient="index", columns=["gain", "low", "high"]).sort_index()


def crossings(rows: Rows) -> dict[str, float]:
    """Where the gain, and the two ends of its interval, come down to nothing: real images, see `mixing.crossing`."""
    table = gains(rows)
    return {name: crossing(list(table.index), list(table[name])) for name in table}


def gain_figure(rows: Rows) -> Figure:
    """The gain of generated images against the number of real ones; the band is its interval."""
    table = gains(rows)
    figure, ax = figures.new_axes(size=(5.6, 3))
    ax.fill_between(table.index, table["low"], table["high"], color=figures.BLUE, alpha=0.2, label="95 % interval")
    ax.plot(table.index, table["gain"], "o-", color=figures.BLUE, label="real + generated, minus real")
    ax.axhline(0, color=figures.GREY, lw=1)
    ax.set(xscale="log", xlabel="real training images", ylabel="points of test accuracy")
    ax.set_xticks(list(table.index), [str(n) for n in table.index])
    ax.minorticks_off()
    ax.legend(fontsize=8)
    return figure


def extremes(images: Split, score: torch.Tensor, class_names: Sequence[str], name: str, count: int = 8) -> Figure:
    """Each class's lowest and highest images by a score: ``count`` of each, as pictures; of `MOST_CLASSES` classes."""
    classes = images.labels.unique().tolist()[:MOST_CLASSES]
    largest = int(torch.bincount(images.labels).max())
    half, pictures = min(count, max(1, largest // 2)), []
    for label in classes:
        own = (images.labels == label).nonzero()[:, 0]
        order = own[score[own].argsort(stable=True)]
        low = min(half, (len(order) + 1) // 2)
        high = min(half, len(order) - low)
        row = torch.full((2 * half, *images.images.shape[1:]), 255, dtype=torch.uint8)  # few images leave places white
        row[:low] = images.images[order[:low]]
        row[2 * half - high :] = images.images[order[len(order) - high :]]
        pictures.append(row)
    titles = [f"lowest {name}", *[""] * (half - 1), f"highest {name}", *[""] * (half - 1)]
    return figures.image_grid(pictures, [class_names[label] for label in classes], titles, scale=0.7)


def filter_figure(rows: Mapping[str, Mapping[str, Any]], coverage: Mapping[str, float]) -> Figure:
    """Each filter's CAS against the coverage of what it keeps: fidelity is bought with diversity."""
    figure, ax = figures.new_axes(size=(7, 3.4))
    for (name, row), marker in zip(rows.items(), itertools.cycle("osD^vP*X")):
        values = row["test"]
        spread = np.std(values, ddof=1) if len(values) > 1 else 0
        ax.errorbar(coverage[name], np.mean(values), spread, fmt=marker, capsize=3, label=name)
    figures.percent_axis(ax)
    ax.set(xlabel="coverage of real images", ylabel="CAS (real test images)")
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure
