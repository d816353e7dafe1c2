"""Which generated images to keep: filters as data, by what is known of each image, class by class.

A filter keeps the classes' shares as they are, so that rows differ by the images and not by the class mix.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch

from ..config.messages import shown, unknown_name
from ..data import Split
from ..machine.seeds import derived
from ..store.run import Step
from ..work.workspace import Source, Workspace
from . import quality
from .quality import SCORES
from .sets import block_labels, blocks_of, synthetic, synthetic_blocks

LEAST = 0.001  # of the images: a filter that draws again draws up to a thousand times as many
RANDOM = "random"  # the control: as many images, chosen without looking


@dataclasses.dataclass(frozen=True)
class Filter:
    """Keep the best share ``keep`` of each class's images ``by`` one of `quality.SCORES`, or by "random".

    ``redraw``: so many more are drawn that as many are left as without a filter; else the rest is dropped, and the set
    is smaller. ``worst``: keep the other end, to see what a score is about.
    Written as text it is "confidence:0.5", with ":redraw" and ":worst" after it; `parse` reads that. Raises ValueError
    for an unknown score, and for a share that is not from `LEAST` to 1.
    """

    by: str
    keep: float
    redraw: bool = False
    worst: bool = False

    def __post_init__(self):
        if self.by not in (*SCORES, RANDOM):
            raise unknown_name("score", self.by, (*SCORES, RANDOM))
        if not LEAST <= self.keep <= 1:
            raise ValueError(f"A filter keeps a share from {LEAST} to 1 of the images, not {shown(self.keep)}.")

    def __str__(self) -> str:
        short = f"{self.keep:g}"
        return (
            f"{self.by}:{short if float(short) == self.keep else self.keep}"
            + ":redraw" * self.redraw
            + ":worst" * self.worst
        )

    @classmethod
    def parse(cls, text: str) -> Filter:
        """The filter that ``str`` of it says; raises ValueError for other text, with what is allowed."""
        by, *rest = text.split(":")
        flags = {"redraw", "worst"}
        try:
            keep = float(rest[0])
            if extra := [word for word in rest[1:] if word not in flags]:
                raise ValueError(extra[0])
        except (IndexError, ValueError) as error:
            raise ValueError(
                f"{shown(text)} is no filter: write a score, a share and maybe redraw or worst, as in confidence:0.5 "
                f"or nearness:0.8:redraw. Scores: {', '.join((*SCORES, RANDOM))}."
            ) from error
        return cls(by, keep, "redraw" in rest, "worst" in rest)

    def drawn(self, multiple: int) -> int:
        """How many times the real set's size has to be drawn for a set of ``multiple`` times."""
        return self._looked_at(multiple) if self.redraw else multiple

    def _looked_at(self, count: int) -> int:
        """Of how many images ``count`` are the share to keep, rounded up (1e-9: 21 / 0.7 is 30)."""
        return math.ceil(count / self.keep - 1e-9)

    def rows(self, scores: Mapping[str, torch.Tensor], labels: torch.Tensor, seed: int = 0, most=None) -> torch.Tensor:
        """The rows of the images to keep: int64 (K,), in order; at least one of each class.

        ``scores``: float (M,) by name; those of a class that are equal are kept in the order of the set. ``labels``:
        int64 (M,). ``seed``: of "random". ``most``: how many of each class are kept, int64 (C,), of so many of its
        first images that this is the share; None: the share of all.
        """
        by = self._scores(scores, labels, seed)
        kept = []
        for label in labels.unique().tolist():
            own = (labels == label).nonzero()[:, 0]
            count = max(1, round(self.keep * len(own))) if most is None else int(most[label])
            own = own if most is None else own[: self._looked_at(count)]
            kept.append(own[by[own].argsort(descending=True, stable=True)[:count]])
        return torch.cat(kept).sort().values

    def _scores(self, scores: Mapping[str, torch.Tensor], labels: torch.Tensor, seed: int) -> torch.Tensor:
        if self.by == RANDOM:
            return torch.rand(len(labels), generator=torch.Generator().manual_seed(derived(seed, "random filter")))
        found = scores[self.by].nan_to_num()
        return -found if self.worst else found


def filtered_needs(ws: Workspace, source: Source, multiple: int, kept: Filter) -> tuple[Step, ...]:
    """The steps that a filtered set of ``multiple`` times the real one's size is made of; raises as `rows_kept`."""
    _check(ws)
    return tuple(quality.scores_step(ws, source, block) for block in blocks_of(ws, kept.drawn(multiple)))


def _check(ws: Workspace) -> None:
    if ws.settings.larger_sets != "nested":
        raise ValueError("Filters need larger_sets='nested': of random parts it is not known which image is which.")


def filtered(ws: Workspace, source: Source, multiple: int, kept: Filter) -> Split:
    """The synthetic set of ``multiple`` times the real one's size after the filter, made if it is not there."""
    rows = rows_kept(ws, source, multiple, kept)
    return synthetic_blocks(ws, source, blocks_of(ws, kept.drawn(multiple))).take(rows)


def rows_kept(ws: Workspace, source: Source, multiple: int, kept: Filter) -> torch.Tensor:
    """Which images of the blocks that are drawn for it the filtered set has: int64 (K,), in order.

    Raises ValueError for sets drawn at random (``larger_sets``), whose images have no place of their own.
    """
    _check(ws)
    numbers = blocks_of(ws, kept.drawn(multiple))
    labels = block_labels(ws, ws.settings.class_mix)
    most = None
    if kept.redraw:  # as many of each class as the set would have without a filter
        most = torch.bincount(labels.repeat(multiple), minlength=ws.data.num_classes)
    scores = quality.scores_of(ws, source, numbers)
    return kept.rows(scores, labels.repeat(len(numbers)), ws.settings.seed, most)


def set_of(ws: Workspace, source: Source, multiple: int, kept: Filter | None) -> Split:
    """The synthetic set with or without a filter."""
    return filtered(ws, source, multiple, kept) if kept else synthetic(ws, source, multiple)


def images_of(ws: Workspace, multiple: int, kept: Filter | None) -> int:
    """How many images `set_of` has."""
    if not kept or kept.redraw:
        return multiple * len(ws.data.train)
    counts = torch.bincount(block_labels(ws, ws.settings.class_mix).repeat(multiple))
    return sum(max(1, round(kept.keep * int(count))) for count in counts if count)
