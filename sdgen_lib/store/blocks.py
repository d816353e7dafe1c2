"""A block of a synthetic set, batch by batch: each is a file until the block is whole, and any rank may make it."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from ..machine.ranks import ALONE, Ranks
from . import files

BLOCK = "images.npz"
# (labels, index of the first in the whole set) -> uint8 (N, 3, H, W)
Draw = Callable[[torch.Tensor, int], torch.Tensor]


def _save(path: Path, images: Iterator[np.ndarray], shape: tuple[int, ...], labels: torch.Tensor) -> None:
    with files.whole_file(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        files.write_npy(archive, "images", np.uint8, shape, images)
        files.write_npy(archive, "labels", np.int64, tuple(labels.shape), [labels.numpy()])


def make_block(
    folder: Path,
    draw: Draw,
    labels: torch.Tensor,
    *,
    first_index: int,
    batch_size: int,
    ranks: Ranks = ALONE,
    progress: str | None = None,
) -> None:
    """Makes ``folder/images.npz``: images uint8 (N, H, W, 3), labels int64 (N,).

    The ranks take turns at its batches, each with the images that it would hold in one process: the block is the same,
    byte for byte, whatever their number. A killed one goes on with the first batch that is not there.
    """
    # Named after the rows that they hold: an earlier attempt may have had batches of another size.
    starts = range(0, len(labels), batch_size)
    shards = [folder / f"part_{first:08d}_{len(labels[first : first + batch_size])}.npz" for first in starts]
    if not _is_readable(folder / BLOCK, len(labels)):
        _draw(shards, draw, labels, first_index, batch_size, ranks, progress)
        ranks.wait()
        if ranks.first:
            shape = (len(labels), *_images(shards[0]).shape[1:])
            _save(folder / BLOCK, (_images(shard) for shard in shards), shape, labels)
    if ranks.first:
        for shard in folder.glob("part_*.npz"):  # whoever made the block may have been killed before this
            shard.unlink(missing_ok=True)
    ranks.wait()


def _draw(
    shards: list[Path],
    draw: Draw,
    labels: torch.Tensor,
    first_index: int,
    batch_size: int,
    ranks: Ranks,
    progress: str | None,
) -> None:
    """This process's part of the shards, those that are there left out."""
    with tqdm(total=len(labels), desc=progress, unit="image", disable=progress is None or not ranks.first) as bar:
        for k, shard in enumerate(shards):
            rows = slice(k * batch_size, (k + 1) * batch_size)
            if k % ranks.count == ranks.rank and not _is_readable(shard, len(labels[rows])):
                images = draw(labels[rows], first_index + k * batch_size).permute(0, 2, 3, 1).numpy()
                _save(shard, iter([images]), images.shape, labels[rows])
            bar.update(len(labels[rows]))


def _is_readable(path: Path, count: int) -> bool:
    """Whether an unfinished block, or a batch of it, is there and whole: its archive has a checksum of its own."""
    try:
        return len(_images(path)) == count
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        return False


def _images(path: Path) -> np.ndarray:
    """The images of a block or batch: uint8 (N, H, W, 3). Raises as `read_block`."""
    with zipfile.ZipFile(path) as archive:
        return _array(archive, path, "images", np.uint8, 4)


def read_block(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """A block's images, uint8 (N, H, W, 3), and labels, int64 (N,).

    A run folder may be someone else's, so what the file says of its size is checked before numpy makes room for it:
    ours are not compressed, and hold what their header says. Raises ValueError, KeyError, EOFError or BadZipFile for
    another.
    """
    with zipfile.ZipFile(path) as archive:
        return _array(archive, path, "images", np.uint8, 4), _array(archive, path, "labels", np.int64, 1)


def _array(archive: zipfile.ZipFile, path: Path, name: str, expected: type, dimensions: int) -> np.ndarray:
    member = archive.getinfo(f"{name}.npy")
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file) if version == (1, 0) else ((), False, None)
        size = math.prod(shape) * np.dtype(expected).itemsize
        ours = len(shape) == dimensions and min(shape) >= 0 and dtype == expected
        ours = ours and member.file_size == file.tell() + size
    if not ours or member.compress_type != zipfile.ZIP_STORED or size > path.stat().st_size:
        raise ValueError(f"{path} is no block of images as sdgen writes them: delete its folder to have it made.")
    with archive.open(member) as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def load_images(path: Path) -> torch.Tensor:
    """A block's images: uint8 (N, 3, H, W)."""
    return torch.from_numpy(_images(path)).permute(0, 3, 1, 2)
