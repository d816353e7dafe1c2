"""What goes into a classifier's batches: one set of images, or a mixture of several."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Integral

import torch

from ..data import Split
from ..machine.seeds import derived
from .augment import probabilities


@dataclass(frozen=True)
class Mixture:
    """Several sets to train one classifier on.

    ``parts``: their labels are int64 (N,) classes or float (N, C) probabilities.
    ``ratio``: how many images of each part a batch holds: (1, 7) is one real image to seven generated ones. None: the
    parts are one set, as if concatenated.
    ``weights``: what each part's images count in the loss. None: all the same.

    Raises ValueError if the parts do not fit together, or `ratio` or `weights` do not fit them.
    """

    parts: tuple[Split, ...]
    ratio: tuple[int, ...] | None = None
    weights: tuple[float, ...] | None = None

    def __post_init__(self):
        counts = [len(part) for part in self.parts]
        if not sum(counts):
            raise ValueError("A classifier needs at least one image to train on; there is none.")
        shapes = sorted({tuple(part.images.shape[1:]) for part in self.parts})
        if len(shapes) > 1:
            raise ValueError(f"The parts' images have the shapes {shapes}; they must have one: see data.resize.")
        for name in ("ratio", "weights"):
            given = getattr(self, name)
            if given is not None and len(given) != len(counts):
                raise ValueError(f"{name} has {len(given)} numbers; it must have one for each of {len(counts)} parts.")
        if self.weights is not None and not all(0 < weight < math.inf for weight in self.weights):
            raise ValueError(f"weights are {self.weights}; they must be above 0 (a ratio may leave a part out).")
        if self.ratio is not None:
            if not all(isinstance(share, Integral) and share >= 0 for share in self.ratio) or not any(self.ratio):
                raise ValueError(f"ratio is {self.ratio}; it must be whole numbers from 0, not all of them 0.")
            if any(share and not count for share, count in zip(self.ratio, counts)):
                raise ValueError(f"ratio is {self.ratio}, but the parts have {counts} images.")

    def __len__(self) -> int:
        """Images of all the parts together."""
        return sum(len(part) for part in self.parts)

    def shares(self, batch_size: int) -> list[int]:
        """How many images of each part a batch holds by `ratio`: exact, or rounded by the largest remainders.

        Raises ValueError if a part that has a share gets no image.
        """
        total = sum(self.ratio)
        counts = [batch_size * share // total for share in self.ratio]
        remainders = [batch_size * share % total for share in self.ratio]
        largest_first = sorted(range(len(counts)), key=remainders.__getitem__, reverse=True)
        for part in largest_first[: batch_size - sum(counts)]:
            counts[part] += 1
        if any(share and not count for share, count in zip(self.ratio, counts)):
            raise ValueError(f"A batch of {batch_size} is too small for the ratio {self.ratio}: a part gets no image.")
        return counts

    def joined(self, num_classes: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Images uint8 (N, 3, H, W), labels int64 (N,) or float32 (N, C), weights float32 (N,) or None, of all parts.

        Raises ValueError for probabilities of another number of classes.
        """
        labels = [part.labels for part in self.parts]
        if any(part.is_floating_point() for part in labels):
            labels = [probabilities(part, num_classes) for part in labels]
            if any(part.shape[1:] != (num_classes,) for part in labels):
                raise ValueError(f"Labels that are probabilities must have {num_classes} columns, one for each class.")
        weights = None
        if self.weights is not None:
            weights = torch.cat([torch.full((len(part),), float(w)) for part, w in zip(self.parts, self.weights)])
        if len(self.parts) == 1:  # no copy
            return self.parts[0].images, labels[0], weights
        return torch.cat([part.images for part in self.parts]), torch.cat(labels), weights


class Queue:
    """The rows ``first .. first + size - 1``, in a random order, then all of them in another, and so on without end."""

    def __init__(self, first: int, size: int, seed: int):
        self.first, self.size, self.order = first, size, torch.Generator().manual_seed(seed)
        self.waiting = torch.empty(0, dtype=torch.int64)

    def take(self, count: int) -> torch.Tensor:
        """The next ``count`` rows, int64."""
        while len(self.waiting) < count:
            self.waiting = torch.cat([self.waiting, self.first + torch.randperm(self.size, generator=self.order)])
        taken, self.waiting = self.waiting[:count], self.waiting[count:]
        return taken


def batch_sizes(epoch_size: int, batch_size: int, smallest: int = 1) -> list[int]:
    """How many images each batch of an epoch holds: ``batch_size``, and the last one what is left.

    What is left joins the batch before it if it is fewer than ``smallest``. Raises ValueError if a whole batch is too.
    """
    if min(epoch_size, batch_size) < smallest:
        raise ValueError(
            f"This network needs {smallest} images in each training step (batch normalisation), and a batch has "
            f"{min(epoch_size, batch_size)}: raise batch_size ({batch_size}) or the images of an epoch ({epoch_size})."
        )
    sizes = [batch_size] * (epoch_size // batch_size)
    if rest := epoch_size % batch_size:
        sizes.append(rest)
    if sizes[-1] < smallest:
        last = sizes.pop()
        sizes[-1] += last
    return sizes


class Batches:
    """The batches of a training, as rows of the joined parts: iterated once for each epoch, it goes on where it was."""

    def __init__(self, mixture: Mixture, epoch_size: int, batch_size: int, smallest: int, seed: int):
        if mixture.ratio is None:
            self.queues = [Queue(0, len(mixture), seed)]
            self.counts = [[size] for size in batch_sizes(epoch_size, batch_size, smallest)]
        else:
            sizes = [len(part) for part in mixture.parts]
            firsts = itertools.accumulate(sizes, initial=0)
            seeds = [derived(seed, "classifier's part", part) for part in range(len(sizes))]
            self.queues = [Queue(*queue) for queue in zip(firsts, sizes, seeds)]
            # A batch is always a whole one: a smaller one could not keep the ratio.
            steps = len(batch_sizes(max(epoch_size, batch_size), batch_size, smallest))
            self.counts = [mixture.shares(batch_size)] * steps

    def __len__(self) -> int:
        """Steps of an epoch."""
        return len(self.counts)

    def __iter__(self) -> Iterator[torch.Tensor]:
        for counts in self.counts:
            yield torch.cat([queue.take(count) for queue, count in zip(self.queues, counts)])
