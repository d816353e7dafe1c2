"""Pictures of shifted test sets: what the corruptions look like, and what they cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from ..config.messages import printable
from ..data import Split
from ..data.shifts import CORRUPTIONS, SEVERITIES, corrupted
from ..evaluate import elsewhere
from . import figures

COLOURS = (figures.GREEN, figures.BLUE, figures.ORANGE, figures.PINK, figures.GREY)
DASHES = ("-", "--", ":", "-.")
Rows = Mapping[str, Mapping[str, Any]]


def examples(
    split: Split, names: Sequence[str] = tuple(CORRUPTIONS), severity: int = SEVERITIES[-1], row: int = 0, seed: int = 0
) -> Figure:
    """One image, the one at ``row``: each row of the grid a corruption, from the image itself to ``severity``.

    Raises ValueError for an unknown corruption or a severity that is not 1 to 5.
    """
    for name in names:
        corrupted(split.take([]), name, severity, seed)  # says what is wrong before anything is drawn
    image = split.take([*range(row + 1)])  # those before it too: its random numbers are then its own in the set
    pictures = [
        torch.stack([image.images[row], *(corrupted(image, name, s, seed).images[row] for s in SEVERITIES[:severity])])
        for name in names
    ]
    columns = ["clean", *(f"{s}" for s in SEVERITIES[:severity])]
    return figures.image_grid(pictures, [name.replace("_", " ") for name in names], columns, scale=0.8)


def by_severity(rows: Rows) -> Figure:
    """Accuracy against severity, a line a row: the mean over the corruptions, at 0 that on the images themselves.

    The band is the standard deviation of the row's classifiers. Raises ValueError for a row without corruptions.
    """
    figure, ax = figures.new_axes(size=(6.4, 3.6))
    counts = sorted({len(row["test"]) for row in rows.values()})
    for k, (name, row) in enumerate(rows.items()):
        found = elsewhere.by_severity(row)
        if not found:
            raise ValueError(f"The row {printable(name)!r} has no corrupted test set: make it with elsewhere_row.")
        points = {0: row["test"], **found}
        means = np.array([np.mean(values) for values in points.values()])
        colour, dashes = COLOURS[k % len(COLOURS)], DASHES[k // len(COLOURS) % len(DASHES)]
        ax.plot(list(points), means, marker="o", ms=4, color=colour, linestyle=dashes, label=printable(name))
        if len(row["test"]) > 1:
            spread = np.array([np.std(values, ddof=1) for values in points.values()])
            ax.fill_between(list(points), means - spread, means + spread, color=colour, alpha=0.15, linewidth=0)
    figures.percent_axis(ax)
    band = f"; band: st. dev. of {' or '.join(map(str, counts))} classifiers" if counts and counts[-1] > 1 else ""
    ax.set(xlabel="severity (0: the test images themselves)", ylabel="accuracy", title=f"mean over corruptions{band}")
    ax.title.set_fontsize(9)
    ax.set_xticks([0, *SEVERITIES])
    ax.legend(fontsize=8)
    return figure
