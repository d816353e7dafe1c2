"""The style of the course's figures, pages of images, and confusion matrices: what is drawn without a run."""

from __future__ import annotations

import contextlib
import re
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..data import Split
from .names import as_text, printable

STYLE = {
    "figure.dpi": 90,
    "savefig.dpi": 90,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "font.size": 10,
}
# Okabe and Ito's colour-blind safe palette.
BLUE, ORANGE, GREEN, PINK, GREY = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#666666"


class CourseFigure(Figure):
    """A figure that says once, in one line, which letters no font here has; matplotlib warns of each, each time."""

    told = False

    def draw(self, renderer: Any) -> None:
        with self._one_line_for_missing_letters():
            super().draw(renderer)

    def get_tightbbox(self, *args: Any, **kwargs: Any) -> Any:
        with self._one_line_for_missing_letters():
            return super().get_tightbbox(*args, **kwargs)

    @contextlib.contextmanager
    def _one_line_for_missing_letters(self) -> Iterator[None]:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            yield
        missing = {}
        for warning in found:
            if glyph := re.match(r"Glyph (\d+) .*missing from", str(warning.message)):
                missing[chr(int(glyph[1]))] = None
            else:
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        if missing and not CourseFigure.told:
            CourseFigure.told = True
            letters = " ".join(c if c.isprintable() else f"U+{ord(c):04X}" for c in list(missing)[:10])
            print(
                f"No font here has {letters}{' ..' if len(missing) > 10 else ''}: boxes stand for them. For Chinese, "
                "Japanese and Korean install one (Debian, Colab: apt-get install fonts-noto-cjk), delete "
                f"{matplotlib.get_cachedir()}/fontlist*.json and restart the kernel."
            )


def new_axes(*shape: int, size: tuple[float, float]) -> tuple[Figure, Any]:
    """A figure in the course's style and its axes, as `plt.subplots`; size in inches."""
    as_text()  # here too, for who has reset matplotlib's style
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(*shape, figsize=size, layout="constrained", FigureClass=CourseFigure)
    plt.close(figure)  # shown once, by the cell that returns it
    return figure, axes


def percent_axis(ax: Axes) -> None:
    """Fractions on the vertical axis are written as percent."""
    ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")


def image_grid(
    rows: Sequence[torch.Tensor],
    row_names: Sequence[str],
    column_names: Sequence[str] = (),
    scale: float = 0.62,
    title: str = "",
) -> Figure:
    """Rows of uint8 images (N, 3, H, W), drawn without smoothing; names at the left and on top."""
    columns = max(1, *(len(row) for row in rows))
    row_names, column_names = map(_labels, (row_names, column_names))
    left = 0.09 * max(_width(name) for name in row_names) + 0.1
    size = (left + scale * columns, scale * len(rows) + (0.28 if len(column_names) else 0) + (0.3 if title else 0))
    figure, axes = new_axes(len(rows), columns, size=size)
    axes = np.array(axes).reshape(len(rows), columns)
    for row_axes, row, name in zip(axes, rows, row_names):
        for ax in row_axes:
            ax.set_xticks([])
            ax.set_yticks([])
            ax.grid(False)
            ax.spines[:].set_visible(False)
        for ax, image in zip(row_axes, row):
            ax.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
        row_axes[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
    for ax, name in zip(axes[0], column_names):
        ax.set_title(name, fontsize=9)
    if title:
        figure.suptitle(title, fontsize=11)
    figure.get_layout_engine().set(w_pad=0.01, h_pad=0.01, wspace=0.01, hspace=0.01)
    return figure


def _labels(names: Sequence[object]) -> list[str]:
    """Names as they can be drawn; those of several lines keep them."""
    return ["\n".join(map(printable, str(name).split("\n"))) for name in names]


def _width(name: str) -> int:
    """Of its longest line, in letters; Chinese, Japanese and Korean ones are two wide."""
    return max(sum(1 + (unicodedata.east_asian_width(c) in "WF") for c in line) for line in name.split("\n"))


def by_class(
    images: torch.Tensor,
    labels: torch.Tensor,
    class_names: Sequence[str],
    per_class: int = 8,
    title: str = "",
    max_classes: int = 10,
) -> Figure:
    """A page with one row per class (the first ``max_classes``): its first ``per_class`` images."""
    classes = range(min(len(class_names), max_classes))
    rows = [images[labels == c][:per_class] for c in classes]
    return image_grid(rows, [class_names[c] for c in classes], title=title)


def real_beside_synthetic(real: Split, synthetic: Split, class_names: Sequence[str], per_class: int = 6) -> Figure:
    """One row per class: real images at the left, generated ones at the right."""
    classes = range(min(len(class_names), 10))
    rows = []
    for c in classes:
        left, right = (split.images[split.labels == c][:per_class] for split in (real, synthetic))
        gap = torch.full_like(real.images[:1], 255)
        rows.append(torch.cat([left, gap.expand(1 + per_class - len(left), -1, -1, -1), right]))
    names = [""] * (2 * per_class + 1)
    names[per_class // 2], names[per_class + 1 + per_class // 2] = "real", "synthetic"
    return image_grid(rows, [class_names[c] for c in classes], names)


def confusions(matrices: dict[str, np.ndarray], class_names: Sequence[str]) -> Figure:
    """Confusion matrices (C, C) side by side, by their title: rows the true class; the shade is the row's share."""
    count = len(class_names)
    side = max(3.4, 0.34 * count + 1.4)  # the title needs so much
    figure, axes = new_axes(1, len(matrices), size=(side * len(matrices), side))
    for ax, (title, matrix) in zip(np.atleast_1d(axes), matrices.items()):
        share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
        ax.imshow(share, cmap="Blues", vmin=0, vmax=1)
        for true, said in zip(*matrix.nonzero()):
            ink = "white" if share[true, said] > 0.5 else "black"
            ax.text(said, true, matrix[true, said], ha="center", va="center", fontsize=8, color=ink)
        names = [printable(name if len(name) < 14 else name[:12] + "..") for name in class_names]
        ax.set_xticks(range(count), names, rotation=90 if max(map(_width, names)) > 2 else 0, fontsize=8)
        ax.set_yticks(range(count), names, fontsize=8)
        ax.set_title(title, fontsize=10)
        ax.set(xlabel="predicted class", ylabel="true class")
        ax.grid(False)
    return figure
