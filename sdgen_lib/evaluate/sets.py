"""Step 5: synthetic sets of 1, 2, .. times the real one's size, on disk, block by block."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..config.settings import View
from ..data import Split
from ..diffusion.generate import balanced_labels
from ..diffusion.generator import Generator
from ..machine.seeds import derived
from ..store import blocks, files
from ..store.run import Step
from ..work.workspace import Source, Workspace

SET, SET_APART = "synthetic", "synthetic x1"  # the names of the sets, which their images' noise is derived from
RECORDS = "records.safetensors"  # of each image of a block, see `records`
REAL_IMAGES = ("real_image", "second_real_image")
APART = 0  # the number of the block that is x1 where larger sets are drawn at random


def block_step(ws: Workspace, source: Source, block: int) -> Step:
    """The step of block ``block`` of the synthetic set: 1, 2, .., or `APART`.

    A block is as large as the real training set, with its class counts (``class_mix`` "balanced": equal ones). Image i
    of block b is image (b - 1) N + i of one set, and has its own noise.
    """

    def make(folder: Path, s: View) -> dict[str, Any]:
        generator, labels = source.build(), block_labels(ws, s.class_mix)
        set_name, first_index = (SET, (block - 1) * len(labels)) if block else (SET_APART, 0)
        if ws.ranks.first:
            files.save_tensors(folder / RECORDS, records(generator, labels, s.seed, first_index))

        def draw(labels: torch.Tensor, first: int) -> torch.Tensor:
            return generator(labels, seed=s.seed, set_name=set_name, first_index=first)

        blocks.make_block(
            folder,
            draw,
            labels,
            first_index=first_index,
            batch_size=s.sample_batch_size,
            ranks=ws.ranks,
            progress=f"synthetic block {block}",
        )
        return {"point": dict(source.point()), "num_images": len(labels)}

    return Step(
        f"5_datasets/block_{block:02d}",
        make,
        topics=("set", "seed", *source.step.topics),
        needs=source.step.needs,
        roots=tuple(dict.fromkeys(("data", *source.step.roots))),
        inputs={"block": block, **source.inputs()},
        work=lambda: source.passes(len(ws.data.train)),
        together=True,
    )


def records(generator: Generator, labels: torch.Tensor, seed: int, first_index: int) -> dict[str, torch.Tensor]:
    """What is on record of each image of a block with these ``labels``, int64 (N,): int64 (N,) by name.

    "label"; "index": the image's place in its set, from ``first_index``: with the seed and the set's name its noise can
    be had again; and the rows of the one or two real training images that it was drawn from, `REAL_IMAGES`, where the
    generator is told of such: whose likeness it may be.
    """
    indices = torch.arange(first_index, first_index + len(labels))
    found = {"label": labels, "index": indices}
    real_rows = getattr(getattr(generator, "conditioner", None), "real_rows", None)
    return found | (dict(zip(REAL_IMAGES, real_rows(labels, indices, seed).T)) if real_rows else {})


def block_labels(ws: Workspace, class_mix: str) -> torch.Tensor:
    """The labels of a block: int64 (N,), N the real training set's size."""
    real = ws.data.train.labels.sort().values
    return balanced_labels(len(real), ws.data.num_classes) if class_mix == "balanced" else real


def blocks_of(ws: Workspace, multiple: int) -> list[int]:
    """The numbers of the blocks that the set of ``multiple`` times the real size is made of, or taken from.

    With ``larger_sets`` "nested", x1 is block 1, x2 the first two, and so on: prefixes of one set. With "random", as in
    the released code, x1 is a block apart and x2 .. are random parts of blocks 1 to ``max_multiple``.
    Raises ValueError for a multiple that this run's settings do not reach.
    """
    s = ws.settings
    if multiple < 1:
        raise ValueError(f"A synthetic set is 1 or more times the real one, not {multiple}.")
    if s.larger_sets == "nested":
        return list(range(1, multiple + 1))
    if multiple == 1:
        return [APART]
    if multiple > s.max_multiple:
        raise ValueError(
            f"With larger_sets='random', x{multiple} needs max_multiple={multiple}; it is {s.max_multiple}."
        )
    return list(range(1, s.max_multiple + 1))


def set_topics(ws: Workspace, multiple: int) -> tuple[str, ...]:
    """What the set of ``multiple`` times the real size reads of the settings, beside what its blocks do."""
    return ("seed",) if ws.settings.larger_sets == "nested" or multiple == 1 else ("seed", "larger_sets")


def synthetic(ws: Workspace, source: Source, multiple: int) -> Split:
    """The synthetic set of ``multiple`` times the real one's size, made if it is not there."""
    s, whole = ws.settings, synthetic_blocks(ws, source, blocks_of(ws, multiple))
    if s.larger_sets == "nested" or multiple == 1:
        return whole
    return whole.take(random_part(ws, multiple))


def random_part(ws: Workspace, multiple: int) -> torch.Tensor:
    """Which images of its blocks the random set of ``multiple`` times the real one's size has: int64, in its order."""
    s, n = ws.settings, len(ws.data.train)
    random = torch.Generator().manual_seed(derived(s.seed, "random part", multiple))
    return torch.randperm(s.max_multiple * n, generator=random)[: multiple * n]


def synthetic_blocks(ws: Workspace, source: Source, numbers: Sequence[int]) -> Split:
    """The blocks of these numbers, one after the other, made if they are not there."""
    paths = [ws.run.file(block_step(ws, source, number), blocks.BLOCK) for number in numbers]
    labels = block_labels(ws, ws.settings.class_mix).repeat(len(paths))
    return Split(torch.cat([blocks.load_images(path) for path in paths]), labels)
