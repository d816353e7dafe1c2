"""The method as a picture: what is frozen, trained and searched in a chapter."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from ..config.messages import unknown_name
from . import figures

# The first part is one of these, and this is what it takes.
ENCODERS = {
    "Class-Encoder": "class\nlabel",
    "text encoder": "caption",
    "image vectors": "training\nimage",
    "image encoder": "class and\nimage",
}
PARTS = (*ENCODERS, "UNet", "VAE", "ResNet20")
FLOW = ("context", "latents", "images")  # what goes from one part to the next
FILL = {"frozen": "#EEEEEE", "trained": figures.ORANGE, "to come": "white"}  # the word is in the box too
ARROW = {"arrowstyle": "->", "color": figures.GREY}


def method(
    trained: Collection[str] = (),
    searched: Mapping[str, str] | None = None,
    encoder: str = "Class-Encoder",
    to_come: Collection[str] = (),
) -> Figure:
    """The way from a label to CAS; each part says whether it is frozen, trained, or not met before a later chapter.

    ``trained`` and ``to_come``: of `PARTS`; ``searched``: the knobs turned on a part, as ``{"UNet": "IS, UGS"}``;
    ``encoder``: which of `ENCODERS` stands first. Raises ValueError for another name.
    """
    searched = searched or {}
    for name in (*trained, *searched, *to_come, encoder):
        if name not in PARTS:
            raise unknown_name("part", name, PARTS)
    low = -0.75 if searched else -0.3  # room for the knobs
    figure, ax = figures.new_axes(size=(9.2, 1.4 * (0.4 - low)))
    ax.set(xlim=(-1.05, 4.0), ylim=(low, 0.4))
    ax.axis("off")
    for i, name in enumerate([encoder, "UNet", "VAE", "ResNet20"]):
        state = "trained" if name in trained else "to come" if name in to_come else "frozen"
        _part(ax, i, name, state)
        if name in searched:
            _knobs(ax, i, searched[name])
    ax.text(-0.72, 0.05, ENCODERS[encoder], ha="right", va="center", fontsize=9)
    ax.annotate("", (3.7, 0.05), (3.33, 0.05), arrowprops=ARROW)
    ax.text(3.72, 0.05, "CAS", va="center", fontsize=10, weight="bold")
    return figure


def _part(ax: Axes, i: int, name: str, state: str) -> None:
    """The box of part ``i``, and the arrow that leads to it."""
    look = {"ec": "black" if state == "trained" else figures.GREY, "ls": ":" if state == "to come" else "-", "lw": 1.4}
    ax.add_patch(FancyBboxPatch((i - 0.3, -0.2), 0.6, 0.5, boxstyle="round,pad=0.02", fc=FILL[state], **look))
    ax.text(i, 0.14, name, ha="center", va="center", fontsize=9.5, weight="bold")
    ax.text(i, -0.08, state, ha="center", va="center", fontsize=9)
    ax.annotate("", (i - 0.33, 0.05), (i - 0.67, 0.05), arrowprops=ARROW)
    if i:
        ax.text(i - 0.5, 0.1, FLOW[i - 1], ha="center", va="bottom", fontsize=8)


def _knobs(ax: Axes, i: int, names: str) -> None:
    """What is searched on part ``i``, below it."""
    look = {"ha": "center", "va": "center", "fontsize": 9, "color": figures.BLUE, "weight": "bold"}
    ax.text(i, -0.6, f"searched: {names}", **look)
    ax.annotate("", (i, -0.24), (i, -0.5), arrowprops={**ARROW, "color": figures.BLUE})
