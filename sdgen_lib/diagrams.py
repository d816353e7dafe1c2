"""The method as a picture: what is frozen, trained and searched in a chapter."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from . import figures
from .settings import unknown_name

ENCODERS = ("Class-Encoder", "text encoder")  # the first part is one of them
PARTS = (*ENCODERS, "UNet", "VAE", "ResNet20")
FLOW = ("context", "latents", "images")  # what goes from one part to the next
FILL = {"frozen": "#EEEEEE", "trained": figures.ORANGE, "to come": "white"}  # the word is in the box too


def method(
    trained: Collection[str] = (), searched: Mapping[str, str] | None = None, encoder: str = "Class-Encoder",
    to_come: Collection[str] = (),
) -> Figure:  # fmt: skip
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
    arrow = {"arrowstyle": "->", "color": figures.GREY}
    for i, name in enumerate([encoder, "UNet", "VAE", "ResNet20"]):
        state = "trained" if name in trained else "to come" if name in to_come else "frozen"
        line = ":" if state == "to come" else "-"
        ax.add_patch(FancyBboxPatch((i - 0.3, -0.2), 0.6, 0.5, boxstyle="round,pad=0.02", fc=FILL[state],
                                    ec="black" if state == "trained" else figures.GREY, ls=line, lw=1.4))  # fmt: skip
        ax.text(i, 0.14, name, ha="center", va="center", fontsize=9.5, weight="bold")
        ax.text(i, -0.08, state, ha="center", va="center", fontsize=9)
        ax.annotate("", (i - 0.33, 0.05), (i - 0.67, 0.05), arrowprops=arrow)
        if i:
            ax.text(i - 0.5, 0.1, FLOW[i - 1], ha="center", va="bottom", fontsize=8)
        if name in searched:
            ax.text(i, -0.6, f"searched: {searched[name]}", ha="center", va="center", fontsize=9, color=figures.BLUE,
                    weight="bold")  # fmt: skip
            ax.annotate("", (i, -0.24), (i, -0.5), arrowprops={**arrow, "color": figures.BLUE})
    ax.text(
        -0.72, 0.05, "caption" if encoder == "text encoder" else "class\nlabel", ha="right", va="center", fontsize=9
    )
    ax.annotate("", (3.7, 0.05), (3.33, 0.05), arrowprops=arrow)
    ax.text(3.72, 0.05, "CAS", va="center", fontsize=10, weight="bold")
    return figure
