"""Images with class labels, in memory, and their size."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tqdm.auto import tqdm

RESIZED_AT_ONCE = 2**22  # pixels, 50 MB in float; all of CIFAR would fill a small machine's memory
BAR_AFTER = 3  # seconds


@dataclass(frozen=True, eq=False)
class Split:
    """images: uint8 ``(N, 3, H, W)``, 0..255; labels: int64 ``(N,)``, 0..C-1."""

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the images and labels, 64 hex digits."""
        digest = hashlib.sha256()
        _add(digest, "images", self.images, "u1")
        _add(digest, "labels", self.labels, "<f4" if self.labels.is_floating_point() else "<i8")
        return digest.hexdigest()

    def take(self, indices: Sequence[int] | np.ndarray | torch.Tensor) -> Split:
        """The images and labels at `indices` (whole numbers), in that order."""
        indices = torch.as_tensor(indices, dtype=torch.long)
        return Split(self.images[indices], self.labels[indices])


@dataclass(frozen=True, eq=False)
class ImageData:
    """A dataset in three splits; ``name`` is as it was asked for, ``slug`` is its name as a folder.

    ``notes``: what of its folder was not taken, or was taken in a way that may surprise; one line each.
    """

    name: str
    slug: str
    class_names: tuple[str, ...]
    train: Split
    val: Split
    test: Split
    notes: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def image_size(self) -> int:
        """Height (= width) in pixels."""
        return self.train.images.shape[-2]

    @property
    def class_counts(self) -> torch.Tensor:
        """Training images per class: int64 ``(C,)``."""
        return torch.bincount(self.train.labels, minlength=self.num_classes)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the content, 64 hex digits: the class names, then each split's images and labels.

        The name, the slug, the notes and where the data came from are not part of it.
        """
        digest = hashlib.sha256(json.dumps(self.class_names).encode() + b"\n")
        for name in ("train", "val", "test"):
            split = getattr(self, name)
            _add(digest, f"{name} images", split.images, "u1")
            _add(digest, f"{name} labels", split.labels, "<i8")
        return digest.hexdigest()


def _add(digest, name: str, tensor: torch.Tensor, dtype: str) -> None:
    """Add a tensor's name, dtype, shape and bytes (row-major, in numpy's `dtype`) to a running `digest`."""
    array = np.ascontiguousarray(tensor.cpu().numpy(), dtype=dtype)
    digest.update(f"{name} {dtype} {array.shape}\n".encode())
    digest.update(array.reshape(-1))


def resize(images: torch.Tensor, size: int, antialias: bool = True) -> torch.Tensor:
    """Bilinear, antialiased unless told: uint8 ``(N, 3, H, W)`` -> uint8 ``(N, 3, size, size)``; as is if that size.

    Raises:
        ValueError: `images` has another dtype or another number of dimensions.
    """
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(f"images are {images.dtype} {tuple(images.shape)}; they must be uint8 (N, 3, H, W).")
    if images.shape[-2:] == (size, size):
        return images
    resized = torch.empty(*images.shape[:2], size, size, dtype=torch.uint8, device=images.device)
    # In float, because torch's uint8 kernel rounds differently from one kind of CPU to another.
    at_once = max(1, RESIZED_AT_ONCE // max(size * size, images[0, 0].numel() if len(images) else 0))
    how = dict(desc=f"Resizing to {size}x{size}", unit="image", delay=BAR_AFTER, disable=len(images) <= at_once)
    with tqdm(total=len(images), **how) as bar:  # the sampler's batches need none
        for start in range(0, len(images), at_once):
            rows = slice(start, start + at_once)
            batch = images[rows].float()
            batch = torch.nn.functional.interpolate(batch, size=(size, size), mode="bilinear", antialias=antialias)
            resized[rows] = batch.round().clamp(0, 255).to(torch.uint8)
            bar.update(len(batch))
    return resized
