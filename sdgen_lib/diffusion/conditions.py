"""What the generator is told of each image. A method is a `Conditioner`; all the rest of the package is shared."""

from __future__ import annotations

import dataclasses
from typing import Protocol

import torch


@dataclasses.dataclass(frozen=True)
class Condition:
    """What B images are told in one pass.

    ``context`` float (B, tokens, width): what cross-attention reads. ``embedding`` float (B, d), or None: what an
    unCLIP model adds to the embedding of the timestep (diffusers' ``class_labels``). ``start`` float (B, C, H, W), or
    None: latents that sampling starts from, made as noisy as they are at ``strength`` (0..1) of the way back from pure
    noise (img2img). It says where to begin: the UNet is not told of it.
    """

    context: torch.Tensor
    embedding: torch.Tensor | None = None
    start: torch.Tensor | None = None
    strength: float = 1.0

    def __len__(self) -> int:
        return len(self.context)

    def __getitem__(self, rows: slice | torch.Tensor) -> Condition:
        """The condition of some of the images."""
        embedding, start = (None if part is None else part[rows] for part in (self.embedding, self.start))
        return Condition(self.context[rows], embedding, start, self.strength)

    def expand(self, count: int) -> Condition:
        """One image's condition (B = 1) for ``count`` images."""
        context, embedding = self.context.expand(count, -1, -1), self.embedding
        return Condition(context, None if embedding is None else embedding.expand(count, -1))

    def followed_by(self, other: Condition) -> Condition:
        """The condition of these images and then of the other ones. Raises ValueError if one alone has embeddings."""
        context = torch.cat([self.context, other.context])
        if self.embedding is None and other.embedding is None:
            return Condition(context)
        if self.embedding is None or other.embedding is None:
            raise ValueError(
                "One condition has an embedding and the other has none: give both of them one, or neither."
            )
        return Condition(context, torch.cat([self.embedding, other.embedding]))

    def where(self, chosen: torch.Tensor, other: Condition) -> Condition:
        """One image's condition ``other`` (B = 1) for the ``chosen`` images, bool (B,); the rest keep their own."""
        other = other.expand(len(self))
        context, embedding = torch.where(chosen[:, None, None], other.context, self.context), self.embedding
        if embedding is not None:
            embedding = torch.where(chosen[:, None], other.embedding, embedding)
        return Condition(context, embedding)


class Conditioner(Protocol):
    """Tells the generator what image i should be, and what "nothing in particular" is."""

    def __call__(self, labels: torch.Tensor, indices: torch.Tensor, seed: int) -> Condition:
        """The condition of B images: ``labels`` and ``indices`` int64 (B,).

        In training, ``indices`` are rows of the training set; in sampling, places in the set that is drawn. Whatever a
        conditioner draws at random comes from (``seed``, index) alone.
        """

    def unconditional(self) -> Condition:
        """The condition that guidance moves away from, for one image (B = 1)."""


class OwnUnconditional(Protocol):
    """What a `Conditioner` has beside it where the condition that guidance moves away from is not one for all."""

    def unconditional_of(self, labels: torch.Tensor, indices: torch.Tensor) -> Condition:
        """The unconditional condition of each of B images; arguments as a `Conditioner`'s."""


class FromRealImages(Protocol):
    """What a `Conditioner` has beside it that tells each image of real ones."""

    def real_rows(self, labels: torch.Tensor, indices: torch.Tensor, seed: int) -> torch.Tensor:
        """The rows of the real training images that each of B images is drawn from: int64 (B, 1 or 2)."""


def unconditional_of(conditioner: Conditioner, labels: torch.Tensor, indices: torch.Tensor) -> Condition:
    """What guidance moves B images away from: a condition of B images, or of one for all of them (B = 1)."""
    if hasattr(conditioner, "unconditional_of"):
        return conditioner.unconditional_of(labels, indices)
    return conditioner.unconditional()


@dataclasses.dataclass(frozen=True)
class ContextTable:
    """A conditioner with one fixed context for each label: the text encoder's for prompts, say.

    ``contexts`` float (C, tokens, width), ``empty`` float (tokens, width).
    """

    contexts: torch.Tensor
    empty: torch.Tensor

    def __call__(self, labels: torch.Tensor, indices: torch.Tensor | None = None, seed: int = 0) -> Condition:
        return Condition(self.contexts[labels.to(self.contexts.device)])

    def unconditional(self) -> Condition:
        return Condition(self.empty[None])
