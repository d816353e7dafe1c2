"""Pictures of Diffusion Inversion: variants by noise and by mixing, and a walk between two training images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ipywidgets
import torch
from matplotlib.figure import Figure

from ..machine.seeds import image_noise
from ..methods.inversion import InversionMethod
from . import figures
from .widgets import Explorer, Words, picture, show

WALK = 11  # pictures of a walk, both ends among them
COLOURS = {"real": figures.GREEN, "generated": figures.BLUE, "both": figures.ORANGE}
WORDS = {"real": "real", "generated": "generated", "both": "real + generated"}
Rows = Mapping[tuple[str, str], Mapping[str, Any]]
START = "inversion pictures"  # the set whose noise the pictures start from


def one_of_each(method: InversionMethod, count: int = 6) -> list[int]:
    """The first training image of each of the first ``count`` classes, and more of these where there are fewer."""
    labels = method.ws.data.train.labels
    ranked = sorted(range(len(labels)), key=lambda row: (int((labels[:row] == labels[row]).sum()), int(labels[row])))
    return ranked[:count]


def by_noise(method: InversionMethod, rows: Sequence[int], strengths: Sequence[float]) -> Figure:
    """Each row a training image and variants of its vector with more and more noise (the paper's figure 10).

    A row keeps its starting noise and the direction of the noise on its vector.
    """
    vectors, pictures = method.vectors().vectors, []
    for row in rows:
        direction = image_noise(method.ws.settings.seed, "direction", [row], vectors.shape[1:])
        contexts = torch.cat([vectors[row : row + 1] + strength * direction for strength in strengths])
        pictures.append(_drawn(method, row, contexts))
    return _beside_the_real(method, rows, pictures, [f"{strength:g}" for strength in strengths])


def by_mixing(method: InversionMethod, pairs: Sequence[tuple[int, int]], shares: Sequence[float]) -> Figure:
    """Each row two training images, and what lies between their vectors (the paper's figure 9)."""
    pictures = [_drawn(method, pair[0], mixed(method, *pair, shares)) for pair in pairs]
    real = method.ws.data.train.images
    pictures = [torch.cat([drawn, real[second : second + 1]]) for drawn, (_, second) in zip(pictures, pairs)]
    names = [*(f"{share:g}" for share in shares), "real"]
    return _beside_the_real(method, [first for first, _ in pairs], pictures, names)


def mixed(method: InversionMethod, first: int, second: int, shares: Sequence[float]) -> torch.Tensor:
    """(1 - alpha) c_first + alpha c_second for each share alpha: float (n, tokens, width)."""
    vectors, alpha = method.vectors().vectors, torch.tensor(shares)[:, None, None]
    return (1 - alpha) * vectors[first] + alpha * vectors[second]


def _drawn(method: InversionMethod, row: int, contexts: torch.Tensor) -> torch.Tensor:
    noise = image_noise(method.ws.settings.seed, START, [row], method.ws.backbone.latent_shape)
    return method.draw(contexts, noise)


def _beside_the_real(
    method: InversionMethod, rows: Sequence[int], pictures: Sequence[torch.Tensor], names: Sequence[str]
) -> Figure:
    train, class_names = method.ws.data.train, method.ws.data.class_names
    beside = [torch.cat([train.images[row : row + 1], drawn]) for row, drawn in zip(rows, pictures)]
    return figures.image_grid(beside, [class_names[train.labels[row]] for row in rows], ["real", *names], scale=0.8)


def study_figure(rows: Rows, title: str, real: Sequence[float] | None = None) -> Figure:
    """A study's rows, by (value, kind): a dot a classifier, a mark at their mean, an own colour for each kind.

    ``real``: accuracies of classifiers of the real images alone, drawn as a line where the study has no such row.
    """
    values = list(dict.fromkeys(value for value, _ in rows))
    kinds = list(dict.fromkeys(kind for _, kind in rows))
    figure, ax = figures.new_axes(size=(max(5.0, 0.9 * len(values) + 2), 3))
    for k, kind in enumerate(kinds):
        beside, colour = 0.16 * (k - (len(kinds) - 1) / 2), COLOURS[kind]
        for i, value in enumerate(values):
            accuracies = rows[value, kind]["test"]
            ax.plot([i + beside] * len(accuracies), accuracies, "o", ms=3, alpha=0.5, color=colour)
            mean = sum(accuracies) / len(accuracies)
            ax.plot(i + beside, mean, "_", ms=16, mew=2, color=colour, label=WORDS[kind] if i == 0 else None)
    if real is not None:
        ax.axhline(sum(real) / len(real), color=COLOURS["real"], lw=1, ls="--", label=f"{WORDS['real']} alone")
    figures.percent_axis(ax)
    ax.set(xticks=range(len(values)), xlabel=title, ylabel="accuracy on real test images")
    ax.set_xticklabels(values)
    ax.legend(fontsize=8)
    return figure


class Walk(Explorer):
    """A slider between the vectors of two training images: the picture at each share of the second one.

    ``share``, ``first`` and ``second`` are the three controls; both images are told by their rows.
    """

    def __init__(self, method: InversionMethod, first: int, second: int):
        self.method, last = method, len(method.ws.data.train) - 1
        self.share = ipywidgets.FloatSlider(value=0.5, min=0, max=1, step=1 / (WALK - 1), description="share")
        how = {"min": 0, "max": last, "continuous_update": False}
        self.first = ipywidgets.IntSlider(value=first, description="from image", **how)
        self.second = ipywidgets.IntSlider(value=second, description="to image", **how)
        self.image, self.words = picture(), Words()
        self._walk()
        for control in (self.first, self.second):
            control.observe(lambda _: (self._walk(), show(self.image, self._draw())), "value")
        self.share.observe(lambda _: show(self.image, self._draw()), "value")
        show(self.image, self._draw())
        super().__init__(
            ipywidgets.VBox([ipywidgets.HBox([self.first, self.second]), self.share, self.image, self.words]),
            self._still,
            "A walk between the vectors of two training images; sliders in a live notebook",
        )

    def _walk(self) -> None:
        """Draws the whole way at once: the slider then only picks."""
        shares = [i / (WALK - 1) for i in range(WALK)]
        contexts = mixed(self.method, self.first.value, self.second.value, shares)
        self.way = _drawn(self.method, self.first.value, contexts)

    def _draw(self) -> Figure:
        train, names = self.method.ws.data.train, self.method.ws.data.class_names
        i, ends = round(self.share.value * (WALK - 1)), (self.first.value, self.second.value)
        pictures = torch.cat([train.images[[ends[0]]], self.way[[i]], train.images[[ends[1]]]])
        self.words.say(f"{self.share.value:.0%} of the second vector; all pictures of a walk start from the same noise")
        classes = [names[train.labels[row]] for row in ends]
        titles = [f"real, {classes[0]}", f"{self.share.value:.1f}", f"real, {classes[1]}"]
        return figures.image_grid([pictures], [""], titles, scale=1.4)

    def _still(self) -> Figure:
        train = self.method.ws.data.train
        ends = (self.first.value, self.second.value)
        pictures = torch.cat([train.images[[ends[0]]], self.way, train.images[[ends[1]]]])
        names = ["real", *(f"{i / (WALK - 1):.1f}" for i in range(WALK)), "real"]
        return figures.image_grid([pictures], [""], names, scale=0.8)
