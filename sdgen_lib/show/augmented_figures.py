"""Pictures of augmented conditioning: what the model is told, and what it draws from it."""

from __future__ import annotations

from collections.abc import Sequence

import ipywidgets
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.figure import Figure

from ..config.messages import printable
from ..config.settings import AUGMENTED
from ..data import Split
from ..data.tails import groups
from ..methods.augmented import TEXT, AugmentedMethod
from . import figures
from .widgets import Explorer, Words, picture, show

START = "augmented pictures"  # the set whose noise the pictures start from
GROUP_COLOURS = {"many": figures.GREEN, "medium": figures.BLUE, "few": figures.ORANGE}
PROBABILITIES = tuple(k / 10 for k in range(11))


def drawn(
    method: AugmentedMethod, conditioner, label: int, count: int, guidance_scale: float | None = None
) -> torch.Tensor:
    """``count`` images of a class: uint8 (count, 3, H, W). Picture k starts from the same noise in every row."""
    draw, s = method.generator(TEXT, guidance_scale), method.ws.settings
    draw.conditioner = conditioner
    return draw([label] * count, seed=s.seed, set_name=START)


def wall(method: AugmentedMethod, pair: Sequence[int], count: int = 8) -> Figure:
    """A row of images for the class alone and for each of the ten conditionings, all from two real images of a class.

    ``pair``: their rows in the training set, shown on top.
    """
    real, label, names = _pair(method, pair)
    rows, row_names = [_padded(real.images, count)], ["the two images"]
    for name in (TEXT, *AUGMENTED):
        conditioner = method.conditioner(name, real=real)
        rows.append(drawn(method, conditioner, label, count))
        row_names.append("class alone" if name == TEXT else name)
    return figures.image_grid(rows, row_names, scale=0.75, title=names[label])


def mixed_pixels(method: AugmentedMethod, pair: Sequence[int], count: int = 8) -> Figure:
    """What the image encoder sees of two images that are mixed in pixels."""
    real, label, names = _pair(method, pair)
    labels, indices, seed = torch.full((count,), label), torch.arange(count), method.ws.settings.seed
    rows, row_names = [_padded(real.images, count)], ["the two images"]
    for name in ("mixup", "cutmix"):
        rows.append(method.conditioner(name, real=real).mixed_pixels(labels, indices, seed))
        row_names.append(name)
    return figures.image_grid(rows, row_names, scale=0.75, title=names[label])


def neighbours(method: AugmentedMethod, split: Split, rows: Sequence[int], count: int = 6) -> Figure:
    """Each row an image of ``split`` and the training images whose embeddings are nearest to its own, by the cosine."""
    train = method.ws.data.train
    known = F.normalize(method.embeddings(train), dim=1)
    asked = F.normalize(method.embeddings(split.take(list(rows))), dim=1)
    nearest = (asked @ known.T).topk(min(count, len(train)), dim=1).indices
    names = method.ws.data.class_names
    pictures = [torch.cat([split.images[row : row + 1], train.images[near]]) for row, near in zip(rows, nearest)]
    columns = ["asked for", *(f"nearest {k + 1}" for k in range(nearest.shape[1]))]
    return figures.image_grid(pictures, [names[split.labels[row]] for row in rows], columns, scale=0.8)


def embedding_map(method: AugmentedMethod, split: Split) -> Figure:
    """The embeddings of ``split`` in two dimensions, their first principal components: a dot an image, by class."""
    found = method.embeddings(split)
    centred = found - found.mean(0)
    _, _, directions = torch.linalg.svd(centred, full_matrices=False)
    at = centred @ directions[:2].T
    explained = float(at.var(0).sum() / centred.var(0).sum())
    figure, ax = figures.new_axes(size=(5.6, 4.4))
    for label, name in enumerate(map(printable, method.ws.data.class_names)):
        of_class = at[split.labels == label]
        ax.scatter(of_class[:, 0], of_class[:, 1], s=9, label=name, color=colormaps["tab20"](label % 20))
    ax.set(xlabel="first component", ylabel="second component", title=f"{explained:.0%} of the embeddings' variance")
    ax.legend(fontsize=7, ncols=2)
    return figure


def tail_bars(class_names: Sequence[str], counts: Sequence[int]) -> Figure:
    """The real images of each class of a long tail, the largest class first, coloured by `data.tails.groups`."""
    order = sorted(range(len(counts)), key=lambda label: -counts[label])
    figure, ax = figures.new_axes(size=(max(4.0, 0.4 * len(counts) + 1.5), 2.6))
    for name, classes in groups(counts).items():
        at = [i for i, label in enumerate(order) if label in classes]
        ax.bar(at, [counts[order[i]] for i in at], color=GROUP_COLOURS[name], label=name)
    ax.set(ylabel="real images", xticks=range(len(order)))
    ax.set_xticklabels([printable(class_names[label]) for label in order], rotation=45, ha="right", fontsize=7)
    ax.legend(fontsize=8)
    return figure


def label_kept(method: AugmentedMethod, judge: torch.nn.Module, conditioning: str, count: int = 150) -> float:
    """The share of drawn images that ``judge``, a classifier of real images, takes for the class asked for: 0..1."""
    labels = torch.arange(count) % method.ws.data.num_classes
    images = method.generator(conditioning)(labels, seed=method.ws.settings.seed, set_name=START)
    judge.eval()
    device = next(judge.parameters()).device
    with torch.no_grad():
        found = torch.cat([judge(part.to(device)).argmax(1).cpu() for part in images.split(256)])
    return float((found == labels).float().mean())


class DropoutSlider(Explorer):
    """A slider for the share of an image's embedding that is dropped: from that image to its class alone."""

    def __init__(self, method: AugmentedMethod, row: int, count: int = 8):
        self.method, self.row, self.count = method, row, count
        self.p = ipywidgets.FloatSlider(value=0.4, min=0, max=1, step=0.1, description="dropout")
        self.image, self.words = picture(), Words()
        real, label, _ = _pair(method, [row])
        self.way = [
            drawn(method, method.conditioner("random image + dropout", dropout=p, real=real), label, count)
            for p in PROBABILITIES
        ]
        self.p.observe(lambda _: show(self.image, self._draw()), "value")
        show(self.image, self._draw())
        super().__init__(
            ipywidgets.VBox([self.p, self.image, self.words]),
            self._still,
            "Images with more and more of the embedding dropped; a slider in a live notebook",
        )

    def _draw(self) -> Figure:
        real = self.method.ws.data.train.images[self.row : self.row + 1]
        self.words.say(f"{self.p.value:.0%} of the embedding's numbers are dropped; each picture keeps its noise")
        pictures = torch.cat([real, self.way[round(self.p.value * 10)]])
        return figures.image_grid([pictures], [""], ["real", *[""] * self.count], scale=1.0)

    def _still(self) -> Figure:
        rows = [self.way[round(10 * p)] for p in (0.0, 0.4, 1.0)]
        return figures.image_grid(rows, ["p = 0", "p = 0.4", "p = 1"], scale=0.75)


def _pair(method: AugmentedMethod, rows: Sequence[int]) -> tuple[Split, int, tuple[str, ...]]:
    """The training images at ``rows``, which are of one class, that class, and all names."""
    real = method.ws.data.train.take(list(rows))
    return real, int(real.labels[0]), method.ws.data.class_names


def _padded(images: torch.Tensor, count: int) -> torch.Tensor:
    """``images``, and white ones until there are ``count``."""
    blank = torch.full((max(0, count - len(images)), *images.shape[1:]), 255, dtype=torch.uint8)
    return torch.cat([images, blank])
