"""A block of the synthetic set, batch by batch: each is a file until the block is whole, and any process may make it.

Also a command, for several GPUs or nodes that share a disk; notebook 07 then finds the blocks made:

    accelerate launch --num_processes 8 -m sdgen_lib.shards -p dataset pathmnist -p recipe paper --blocks 10
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import datetime
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from . import runs

# (labels, index of the first in the whole set) -> uint8 (N, 3, H, W)
Draw = Callable[[torch.Tensor, int], torch.Tensor]


def _save(path: Path, images: Iterator[np.ndarray], shape: tuple[int, ...], labels: torch.Tensor) -> None:
    with runs.whole_file(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        runs.write_npy(archive, "images", np.uint8, shape, images)
        runs.write_npy(archive, "labels", np.int64, tuple(labels.shape), [labels.numpy()])


def make_block(
    path: Path, draw: Draw, labels: torch.Tensor, point: dict[str, Any], *, first_index: int, batch_size: int,
    rank: int = 0, ranks: int = 1, wait: Callable[[], None] = lambda: None, progress: str | None = None,
) -> None:  # fmt: skip
    """Makes the file ``path`` (.npz: images uint8 (N, H, W, 3), labels int64 (N,)) unless it is there for this point.

    ``point``: where it samples, kept beside it as ``.json``. Batch k is drawn by rank ``k % ranks``, with the images
    that it would hold in one process: the block is the same, byte for byte, whatever the number of ranks. All of them
    call this; ``wait()`` returns once they all have called it. A killed one goes on with the first batch that is not
    there.
    """
    note = path.with_suffix(".json")
    shards = [path.with_name(f"{path.stem}_{k:05d}.npz") for k in range(-(-len(labels) // batch_size))]
    if rank == 0 and runs.load_json(note) != point:  # what is there was drawn elsewhere
        for old in (path, *path.parent.glob(f"{path.stem}_*.npz")):
            runs.discard(old)
        runs.save_json(note, point)
    wait()
    done = runs.is_whole(path)
    wait()  # nobody may find it that the others have to make
    if not done:
        _draw(shards, draw, labels, first_index, batch_size, rank, ranks, progress)
        wait()
        if rank == 0:
            shape = (len(labels), *_images(shards[0]).shape[1:])
            _save(path, (_images(shard) for shard in shards), shape, labels)
    if rank == 0:
        for shard in path.parent.glob(f"{path.stem}_*.npz"):  # whoever made the block may have been killed before this
            runs.discard(shard)
    wait()


def _draw(
    shards: list[Path], draw: Draw, labels: torch.Tensor, first_index: int, batch_size: int, rank: int, ranks: int,
    progress: str | None,
) -> None:  # fmt: skip
    """This rank's part of the shards, those that are there left out."""
    with tqdm(total=len(labels), desc=progress, unit="image", disable=progress is None or rank > 0) as bar:
        for k, shard in enumerate(shards):
            rows = slice(k * batch_size, (k + 1) * batch_size)
            if k % ranks == rank and not runs.is_whole(shard):
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


def main(argv: list[str] | None = None) -> None:
    from accelerate import PartialState

    from . import devices, settings
    from .course import Course

    parser = argparse.ArgumentParser(prog="accelerate launch --num_processes N -m sdgen_lib.shards",
                                     description=__doc__.splitlines()[0])  # fmt: skip
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), dest="parameters",
                        help="a parameter, as a notebook takes it")  # fmt: skip
    parser.add_argument("--blocks", type=int, help="blocks to make; the recipe's max_multiple without it")
    args = parser.parse_args(argv)
    given = {}
    for name, value in args.parameters:
        try:
            given[name] = ast.literal_eval(value)  # numbers and None; everything else is text
        except (ValueError, SyntaxError):
            given[name] = value
    try:
        asked = settings.resolve(**given)
        if args.blocks is not None and args.blocks < 1:
            raise ValueError(f"--blocks must be 1 or more, not {args.blocks}.")
    except ValueError as error:
        parser.error(str(error))
    # Every process waits for the slowest: as long as it takes.
    state = PartialState(cpu=devices.default_device() == "cpu", timeout=datetime.timedelta(days=30))
    course = Course(asked)
    course.point("after 4")  # the steps before: one process does them, the others wait and find them done
    with course.run.lock("5_datasets") if state.is_main_process else contextlib.nullcontext():
        for block in range(asked.larger_sets == "nested", (args.blocks or asked.max_multiple) + 1):
            course.make_block(block, state.process_index, state.num_processes, state.wait_for_everyone)
    if state.is_main_process:
        print(f"{course.run.path / '5_datasets'} holds the blocks, made by {state.num_processes} processes.")
    state.destroy_process_group()


if __name__ == "__main__":
    main()
