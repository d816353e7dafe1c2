"""What a finished run leaves to take away: the generated set in three formats, and the trained generator.

``python -m sdgen_lib export RUN_FOLDER --to folder|npz|parquet|generator OUT``

Each is a new folder with a card (README.md), and appears whole or not at all. A generated set is the training part;
the real validation and test images go with it, so that CAS can be measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from ..config.messages import shown, unknown_name
from ..data import ImageData
from ..data.folders import folder_names
from ..evaluate import quality
from ..evaluate.filters import Filter, rows_kept
from ..evaluate.sets import (
    APART,
    REAL_IMAGES,
    RECORDS,
    SET,
    SET_APART,
    block_labels,
    block_step,
    blocks_of,
    random_part,
    synthetic_blocks,
)
from ..methods.class_encoder import ROWS, ClassEncoderMethod
from ..store import blocks, files
from ..store.run import Result, Step
from ..work.workspace import Source, Workspace
from . import cards, generator, origin
from .formats import WRITERS, Part, part_of, write_records
from .reopen import CHAPTERS, choices, readable, run_path_of, workspace_of

FORMATS = (*WRITERS, "generator")


def export(
    ws: Workspace,
    source: Source,
    to: str,
    out: str | Path,
    multiple: int | None = None,
    real: bool = True,
    kept: Filter | None = None,
) -> Path:
    """Writes what was made with ``source`` into the new folder ``out``; returns its path.

    ``to``: "folder" (PNG files, ``train/<class>/000001.png``: torchvision's ImageFolder), "npz" (``<dataset>.npz`` in
    MedMNIST's layout), "parquet" (Hugging Face ``datasets``, images and class labels typed) or "generator" (the model
    itself: `sdgen_lib.load`). ``multiple``: the set of so many times the real one's size, exactly that of
    `evaluate.sets.synthetic` (None: the largest that is finished). ``real``: with the real validation and test images
    beside it. ``kept``: a filter of the generated images. Of a set, ``records.csv`` has a row for each generated image.
    Nothing is drawn that is not there; what a filter needs to know of the images is measured.
    Raises ValueError for an unknown format, a generator that cannot be saved and a filter where it cannot be,
    FileExistsError if ``out`` is there, and FileNotFoundError if the run has not come so far; says which chapter makes
    what is missing.
    """
    if to not in FORMATS:
        raise unknown_name("format", to, FORMATS)
    out = Path(out).expanduser().absolute()
    if to == "generator":
        if kept:
            raise ValueError(f"A filter chooses images, and a generator is none: leave {shown(str(kept))} out.")
        _check_finished(ws, source.step.needs)
    else:
        if multiple is None:
            largest = _largest(ws, source)
            multiple = max(1, int(largest * kept.keep + 1e-9)) if kept and kept.redraw else largest
        found = _blocks(ws, source, kept.drawn(multiple) if kept else multiple)
        generated = _generated(ws, source, multiple, found, kept)
    with files.whole_folder(out) as folder:
        if to == "generator":
            card = _write_generator(ws, source, folder, out.name)
        else:
            card = _write_set(ws, source, to, folder, out.name, multiple, found[0], generated, real, kept)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return out


# --- what is finished ---


def _check_finished(ws: Workspace, steps: Iterable[Step]) -> None:
    """Raises FileNotFoundError for the first of ``steps`` that is not finished."""
    for step in steps:
        if ws.run.peek(step) is None:
            chapter = CHAPTERS.get(step.name.split("/")[0])
            first = f"run chapter {chapter} first" if chapter else "make it first"
            raise FileNotFoundError(f"{ws.run.path} has no finished {step.name} for these settings: {first}.")


def _is_there(ws: Workspace, source: Source, number: int) -> bool:
    return ws.run.peek(block_step(ws, source, number)) is not None


def _largest(ws: Workspace, source: Source) -> int:
    """How many times the real set's size the largest finished set is; 1 where there is none."""
    multiple = 1
    if ws.settings.larger_sets == "nested":
        while _is_there(ws, source, multiple + 1):
            multiple += 1
    elif all(_is_there(ws, source, number) for number in blocks_of(ws, ws.settings.max_multiple)):
        multiple = ws.settings.max_multiple
    return multiple


def _blocks(ws: Workspace, source: Source, multiple: int) -> list[Result]:
    """The finished blocks that a set is made of; raises FileNotFoundError where one is missing or damaged."""
    numbers = blocks_of(ws, multiple)
    steps = {number: block_step(ws, source, number) for number in numbers}
    found = {number: ws.run.peek(step) for number, step in steps.items()}
    missing = [number for number, result in found.items() if result is None]
    if missing and 1 not in missing and ws.settings.larger_sets == "nested":
        raise FileNotFoundError(
            f"{ws.run.path} holds x1 .. x{missing[0] - 1} of this synthetic set, not x{multiple}: run chapter 07 with "
            f"max_multiple={multiple}, or take fewer."
        )
    if missing:
        _check_finished(ws, (*source.step.needs, *steps.values()))
    for result in found.values():
        for name in {blocks.BLOCK, *({RECORDS} & set(result.record["files"]))}:
            if files.checksum(result.folder / name) != result.record["files"].get(name):
                raise FileNotFoundError(f"{result.folder / name} is damaged: delete it, then run chapter 07.")
    return list(found.values())


# --- what is written ---


def _write_generator(ws: Workspace, source: Source, folder: Path, name: str) -> str:
    """Writes the generator; returns its card."""
    said = origin.of_generator(ws, source)
    facts = {key: value for key, value in dataclasses.asdict(said).items() if key not in ("dataset", "steps")}
    made = source.build()
    generator.save(made, folder, {"trained_on": ws.data.slug, **facts})
    point = {"steps": made.num_inference_steps, "guidance": made.guidance_scale}
    return cards.generator_card(said, ws.data, origin.cas_of_generator(ws, source), out=name, point=point)


def _write_set(
    ws: Workspace,
    source: Source,
    to: str,
    folder: Path,
    name: str,
    multiple: int,
    block: Result,
    generated: tuple[Part, Mapping[str, np.ndarray]],
    real: bool,
    kept: Filter | None,
) -> str:
    """Writes the ``generated`` images with their records, of which ``block`` is the first; returns their card."""
    parts, records = {"train": generated[0]}, generated[1]
    if real:
        parts |= {"val": part_of(ws.data.val), "test": part_of(ws.data.test)}
    header = WRITERS[to](ws.data, folder, parts)
    write_records(folder, ws.data, records, in_folders=to == "folder")
    row = None if kept else origin.cas_of_set(ws, source, multiple)
    return cards.dataset_card(
        origin.of_set(ws, source, multiple, block),
        ws.data,
        {f"generated, x{multiple}": row, "real": origin.cas_of_real(ws, source, row)},
        form=to,
        out=name,
        multiple=multiple,
        counts={part: content.count for part, content in parts.items()},
        folders=folder_names(ws.data.class_names),
        header=header,
        kept=str(kept) if kept else "",
    )


def _generated(
    ws: Workspace, source: Source, multiple: int, found: Sequence[Result], kept: Filter | None
) -> tuple[Part, dict[str, np.ndarray]]:
    """The images of `evaluate.filters.set_of`, and their records; of whole sets one block at a time is in memory."""

    def in_turn() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for result in found:
            yield _read_block(result.folder / blocks.BLOCK, ws.data)

    rows = None
    if kept:
        rows = rows_kept(ws, source, multiple, kept)
    elif len(found) > 1 and ws.settings.larger_sets == "random":
        rows = random_part(ws, multiple)
    records = _records(ws, source, found)  # after the filter has measured what it needs to know
    if rows is None:
        return Part(multiple * len(ws.data.train), len(found), in_turn), records
    for _ in in_turn():  # each is looked at before all are unpacked
        pass
    images = synthetic_blocks(ws, source, [result.record["inputs"]["block"] for result in found]).take(rows)
    return part_of(images), {name: column[rows.numpy()] for name, column in records.items()}


def _records(ws: Workspace, source: Source, found: Sequence[Result]) -> dict[str, np.ndarray]:
    """The records of finished blocks, one after the other, by name; with each image's scores where all have them."""
    labels, tables = block_labels(ws, ws.settings.class_mix), []
    for result in found:
        number = result.record["inputs"]["block"]
        table = {"label": labels, "index": torch.arange(len(labels)) + max(0, number - 1) * len(labels)}
        if RECORDS in result.record["files"]:  # an earlier version had none
            table = files.load_tensors(result.folder / RECORDS) | table
        if ws.run.peek(scored := quality.scores_step(ws, source, number)):
            table |= files.load_tensors(ws.run.file(scored, quality.TABLE))
        tables.append(table)
    known = [n for n in ("label", "index", *REAL_IMAGES, *quality.SCORES) if all(n in table for table in tables)]
    if any(table[name].shape != labels.shape for table in tables for name in known):
        raise ValueError(f"A {RECORDS} or {quality.TABLE} in {ws.run.path} has not a row for each image.")
    said = {"method": source.name, "seed": ws.settings.seed, "set": SET_APART if number == APART else SET}
    whole = {name: np.full(len(tables) * len(labels), value) for name, value in said.items()}
    return whole | {name: torch.cat([table[name] for table in tables]).numpy() for name in known}


def _read_block(path: Path, data: ImageData) -> tuple[np.ndarray, np.ndarray]:
    """A block of ``data``: images uint8 (N, H, H, 3) and labels int64 (N,), N the training set's size.

    Raises ValueError for any other content: a run folder may be anyone's.
    """
    expected = (len(data.train), data.image_size, data.image_size, 3)
    try:
        images, labels = blocks.read_block(path)
    except (ValueError, KeyError, EOFError, NotImplementedError, RuntimeError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} is no block of this dataset's images ({shown(str(error))}): run chapter 07, which makes it anew."
        ) from error
    if images.shape != expected or labels.shape != expected[:1]:
        raise ValueError(f"{path} holds images {images.shape} and labels {labels.shape}, not images {expected}.")
    if labels.min() < 0 or labels.max() >= data.num_classes:
        raise ValueError(f"{path} has labels from {labels.min()} to {labels.max()}, not 0 to {data.num_classes - 1}.")
    return images, labels


# --- from the command line ---


def main(argv: Sequence[str] | None = None) -> None:
    """``python -m sdgen_lib export``; a wrong argument or a run that cannot give it ends with one line."""
    args = _parser().parse_intermixed_args(argv)  # OUT may be left out, and options stand before it
    try:
        if args.list:
            print(_listed(run_path_of(args.run_folder), [args.to] if args.to else ["folder", "generator"], args.row))
            return
        if not args.to or not args.out:
            raise ValueError("Say what to take away and where to: --to folder|npz|parquet|generator OUT (or --list).")
        ws = workspace_of(
            args.run_folder, args.to, args.row, dataset=args.dataset, backbone=args.backbone, result=args.result
        )
        source = ClassEncoderMethod(ws).source(args.row)
        kept = Filter.parse(args.filter) if args.filter else None
        with readable(ws.run.path):  # the card looks at the other results, too
            out = export(ws, source, args.to, args.out, args.multiple, not args.generated_only, kept)
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from error
    print(f"Written to {out}; its README.md says what it is and how to load it.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sdgen_lib export", description="Takes away what a run made.")
    parser.add_argument("run_folder", help="runs/<dataset>/<backbone>-<recipe>-seed<k>")
    parser.add_argument("out", nargs="?", help="the folder to make")
    parser.add_argument("--to", choices=FORMATS, help="what to take away, and in which format")
    parser.add_argument("--multiple", type=int, help="the set of so many times the real one's size (default: largest)")
    parser.add_argument("--generated-only", action="store_true", help="leave the real validation and test images out")
    parser.add_argument("--filter", metavar="TEXT", help="which images to keep, as in confidence:0.5 (chapter 13)")
    parser.add_argument("--row", default=ROWS[-1], choices=ROWS, help=f"whose generator (default: {ROWS[-1]})")
    parser.add_argument("--result", metavar="FINGERPRINT", help="one of --list (default: the newest)")
    parser.add_argument("--list", action="store_true", help="show what there is, and in what it is unlike its recipe")
    parser.add_argument("--dataset", metavar="PATH", help="the run's dataset: its name, or where it is now")
    parser.add_argument("--backbone", metavar="NAME", help="the run's backbone: a name, a Hub id, or where it is now")
    return parser


def _listed(run_folder: Path, kinds: Sequence[str], row: str) -> str:
    """What there is of each kind, oldest first."""
    lines = []
    for to in kinds:
        found = choices(run_folder, to, row)
        lines.append(f"{'generators' if to == 'generator' else 'generated sets'}, {row}: {len(found)}")
        lines += [f"  {choice.line}" for choice in found]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
