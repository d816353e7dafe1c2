"""A block of the synthetic set, batch by batch: each is a file until the block is whole, and any rank may make it."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from . import runs
from .ranks import ALONE, Ranks

# (labels, index of the first in the whole set) -> uint8 (N, 3, H, W)
Draw = Callable[[torch.Tensor, int], torch.Tensor]


def _save(path: Path, images: Iterator[np.ndarray], shape: tuple[int, ...], labels: torch.Tensor) -> None:
    with runs.whole_file(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        runs.write_npy(archive, "images", np.uint8, shape, images)
        runs.write_npy(archive, "labels", np.int64, tuple(labels.shape), [labels.numpy()])


def make_block(
    path: Path, draw: Draw, labels: torch.Tensor, point: dict[str, Any], *, first_index: int, batch_size: int,
    ranks: Ranks = ALONE, progress: str | None = None,
) -> None:  # fmt: skip
    """Makes the file ``path`` (.npz: images uint8 (N, H, W, 3), labels int64 (N,)) unless it is there for this point.

    ``point``: where it samples, kept beside it as ``.json``. The ranks take turns at its batches, each with the
    images that it would hold in one process: the block is the same, byte for byte, whatever their number. A killed one
    goes on with the first batch that is not there.
    """
    note = path.with_suffix(".json")
    shards = [path.with_name(f"{path.stem}_{k:05d}.npz") for k in range(-(-len(labels) // batch_size))]
    if ranks.first and runs.load_json(note) != point:  # what is there was drawn elsewhere
        for old in (path, *path.parent.glob(f"{path.stem}_*.npz")):
            runs.discard(old)
        runs.save_json(note, point)
    ranks.wait()
    done = runs.is_whole(path)
    ranks.wait()  # nobody may find it that the others have to make
    if not done:
        _draw(shards, draw, labels, first_index, batch_size, ranks, progress)
        ranks.wait()
        if ranks.first:
            shape = (len(labels), *_images(shards[0]).shape[1:])
            _save(path, (_images(shard) for shard in shards), shape, labels)
    if ranks.first:
        for shard in path.parent.glob(f"{path.stem}_*.npz"):  # whoever made the block may have been killed before this
            runs.discard(shard)
    ranks.wait()


def _draw(
    shards: list[Path], draw: Draw, labels: torch.Tensor, first_index: int, batch_size: int, ranks: Ranks,
    progress: str | None,
) -> None:  # fmt: skip
    """This process's part of the shards, those that are there left out."""
    with tqdm(total=len(labels), desc=progress, unit="image", disable=progress is None or not ranks.first) as bar:
        for k, shard in enumerate(shards):
            rows = slice(k * batch_size, (k + 1) * batch_size)
            if k % ranks.count == ranks.rank and not runs.is_whole(shard):
                images = draw(labels[rows], first_index + k * batch_size).permute(0, 2, 3, 1).numpy()
                _save(shard, iter([images]), images.shape, labels[rows])
            bar.update(len(labels[rows]))


def _images(path: Path) -> np.ndarray:
    """uint8 (N, H, W, 3). Raises `runs.DamagedFile`."""
    if not runs.is_whole(path):
        raise runs.DamagedFile(f"{path} is damaged or gone; run this again to remake it.")
    with np.load(path, allow_pickle=False) as file:
        return file["images"]


def load_images(path: Path) -> torch.Tensor:
    """A block's images: uint8 (N, 3, H, W)."""
    return torch.from_numpy(_images(path)).permute(0, 3, 1, 2)
