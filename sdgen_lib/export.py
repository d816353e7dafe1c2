"""What a finished run leaves to take away: the generated set in three formats, and the trained generator.

``python -m sdgen_lib.export RUN_FOLDER --to folder|npz|parquet|generator OUT``

Each is a new folder with a card (README.md), and appears whole or not at all. A generated set is the training part;
the real validation and test images go with it, so that CAS can be measured. Blocks are written one at a time: a set may
be larger than the memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import re
import tempfile
import unicodedata
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from . import cards, data, generator, runs
from .course import ROWS, Course
from .settings import Settings, unknown_name

# What each row of table 1 needs to be finished.
NEEDED = {"after 1": "1_transfer", "after 2": "2_tune", "after 3": "3_finetune", "after 4": "4_retune"}
CHAPTERS = {"1_transfer": "02", "2_tune": "03", "3_finetune": "05", "4_retune": "06", "5_datasets": "07"}


@dataclasses.dataclass(frozen=True)
class Part:
    """``count`` images; ``blocks()`` yields them as (uint8 (n, H, H, 3), int64 (n,)), n as it comes."""

    count: int
    blocks: Callable[[], Iterator[tuple[np.ndarray, np.ndarray]]]


def export(
    course: Course, to: str, out: str | Path, multiple: int | None = None, real: bool = True, row: str = "after 4"
) -> Path:
    """Writes what a finished run made into the new folder ``out``; returns its path.

    ``to``: "folder" (PNG files, ``train/<class>/000001.png``: torchvision's ImageFolder), "npz" (``<dataset>.npz`` in
    MedMNIST's layout), "parquet" (Hugging Face ``datasets``, images and class labels typed) or "generator" (the model
    itself: `sdgen_lib.load`). ``multiple``: how many blocks of the set, each of the real set's size (None: all there
    are). ``real``: with the real validation and test images beside it. ``row``: of table 1, the generator's.
    Raises ValueError for an unknown format or row, FileExistsError if ``out`` is there, and FileNotFoundError if the
    run has not come so far; says which chapter makes what is missing.
    """
    if to not in (*WRITERS, "generator"):
        raise unknown_name("format", to, [*WRITERS, "generator"])
    if row not in ROWS:
        raise ValueError(f"row must be one of {', '.join(ROWS)}, not {row!r}.")
    out = Path(out).expanduser().absolute()
    needed = NEEDED[row] if to == "generator" else "5_datasets"
    for step in [step for step in CHAPTERS if step <= needed]:
        if not course.run.is_done(step):
            raise FileNotFoundError(f"{course.run.path} has no finished {step}: run chapter {CHAPTERS[step]} first.")
    with runs.whole_folder(out) as folder:
        if to == "generator":
            generator.save(course, folder, row)
            card = cards.generator_card(course, out.name, row)
        else:
            parts = _parts(course, multiple, real)
            blocks = parts["train"].count // len(course.data.train)
            header = WRITERS[to](course, folder, parts)
            counts = {name: part.count for name, part in parts.items()}
            names = folder_names(course.data.class_names)
            card = cards.dataset_card(course, to, out.name, blocks, counts, names, **header)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return out


def course_of(run_folder: str | Path) -> Course:
    """The course whose results are in ``run_folder``, with the settings that its manifest holds.

    Raises FileNotFoundError if it is no run folder, ValueError if it is not where its settings say or its data changed.
    """
    path = Path(run_folder).expanduser().resolve()
    if not (path / "manifest.json").is_file():
        raise FileNotFoundError(f"{path} is no run folder (no manifest.json): give runs/<dataset>/<backbone>-...")
    saved = runs.load_json(path / "manifest.json").get("settings", {})
    fields = {f.name for f in dataclasses.fields(Settings)}
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in saved.items() if name in fields}
    settings = dataclasses.replace(Settings(**values), runs_dir=str(path.parents[1]))
    root = Path(__file__).resolve().parents[1]
    slug = data.load(settings.dataset, settings.image_size, settings.seed, base_dir=root).slug
    with tempfile.TemporaryDirectory() as empty:  # where a run of these settings and data would be
        expected = runs.Run(dataclasses.replace(settings, runs_dir=empty), slug).path.relative_to(empty)
    if path.parts[-2:] != expected.parts:
        raise ValueError(
            f"{path} was made from {settings.dataset!r}, whose results belong in {expected}. If the folder was moved, "
            "move it back; if the data changed, this run is no longer theirs."
        )
    return Course(settings)


# --- what is written ---


def _parts(course: Course, multiple: int | None, real: bool) -> dict[str, Part]:
    folder, point, there = course.run.path / "5_datasets", course.block_point(), 0
    while runs.load_json(folder / f"block_{there + 1:02d}.json") == point and runs.is_whole(
        folder / f"block_{there + 1:02d}.npz"
    ):
        there += 1
    wanted = there if multiple is None else multiple
    if not 1 <= wanted <= there:
        raise FileNotFoundError(
            f"{folder} holds x1 .. x{there} of the synthetic set, not x{wanted}: "
            f"run chapter 07 with max_multiple={max(wanted, 1)}, or take fewer."
        )

    def generated():
        for block in range(1, wanted + 1):
            with np.load(folder / f"block_{block:02d}.npz", allow_pickle=False) as file:
                yield file["images"], file["labels"]

    def of(split: data.Split):
        def blocks(size: int = 2048):
            for start in range(0, len(split), size):
                rows = slice(start, start + size)
                yield split.images[rows].permute(0, 2, 3, 1).contiguous().numpy(), split.labels[rows].numpy()

        return Part(len(split), blocks)

    parts = {"train": Part(wanted * len(course.data.train), generated)}
    return parts | ({"val": of(course.data.val), "test": of(course.data.test)} if real else {})


def folder_names(class_names: Sequence[str]) -> list[str]:
    """Class names as folder names on any system, all different, and sorted as the classes are numbered.

    `ImageFolder` numbers classes by the sorted names of their folders: where that would be another order, or two names
    would be one on some system, or a name is not allowed there, all get their number in front.
    """
    names = []
    for name in class_names:
        plain = re.sub(r"[^\w .+-]+", "-", unicodedata.normalize("NFC", name)).strip(" .-")
        names.append(plain.encode()[:80].decode(errors="ignore").rstrip(" .-"))
    folded = [name.casefold() for name in names]
    reserved = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.I)  # no file of Windows may be called so
    fine = names == sorted(names) and len(set(folded)) == len(names)
    if fine and all(name and not reserved.fullmatch(name) for name in names):
        return names
    digits = len(str(len(names) - 1))
    return [f"{i:0{digits}d}_{name}".rstrip("_") for i, name in enumerate(names)]


def _write_folder(course: Course, folder: Path, parts: dict[str, Part]) -> dict:
    names = folder_names(course.data.class_names)
    for part, content in parts.items():
        for name in names:
            (folder / part / name).mkdir(parents=True)
        number, digits = 0, len(str(content.count))
        for images, labels in content.blocks():
            for image, label in zip(images, labels):
                number += 1
                Image.fromarray(image).save(folder / part / names[label] / f"{number:0{digits}d}.png")
    return {}


def _write_npz(course: Course, folder: Path, parts: dict[str, Part]) -> dict:
    """As `numpy.savez_compressed` would, but block by block."""
    size, names = course.data.image_size, course.data.class_names
    kind = np.uint8 if len(names) <= 256 else np.int64
    with zipfile.ZipFile(folder / f"{course.data.slug}.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for part, content in parts.items():
            images, labels = (image for image, _ in content.blocks()), (label for _, label in content.blocks())
            runs.write_npy(archive, f"{part}_images", np.uint8, (content.count, size, size, 3), images)
            runs.write_npy(archive, f"{part}_labels", kind, (content.count, 1), labels)
        text = np.array(names)  # not of MedMNIST's layout, whose readers pass over it; `data.load` reads it
        runs.write_npy(archive, "class_names", text.dtype, text.shape, [text])
    return {}


HUB_PARTS = {"train": "train", "val": "validation", "test": "test"}


def _write_parquet(course: Course, folder: Path, parts: dict[str, Part]) -> dict:
    """``data/train-00000-of-00003.parquet`` ..., a file for each block; returns what the card's header says of it."""
    import pyarrow as pa  # here, because nothing else needs it
    import pyarrow.parquet as pq

    (folder / "data").mkdir()
    features = {"image": {"_type": "Image"}, "label": {"names": list(course.data.class_names), "_type": "ClassLabel"}}
    schema = pa.schema(
        [("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("label", pa.int64())],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    for part, content in parts.items():
        files = sum(1 for _ in content.blocks())
        for k, (images, labels) in enumerate(content.blocks()):
            rows = [{"bytes": _png(image), "path": None} for image in images]
            path = folder / "data" / f"{HUB_PARTS[part]}-{k:05d}-of-{files:05d}.parquet"
            table = pa.table({"image": rows, "label": labels}, schema=schema)
            pq.write_table(table, path, row_group_size=100)  # small: a viewer reads one group for a page
    return {"configs": [{"config_name": "default", "data_files": [
        {"split": HUB_PARTS[part], "path": f"data/{HUB_PARTS[part]}-*"} for part in parts]}]}  # fmt: skip


def _png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="png")
    return file.getvalue()


WRITERS = {"folder": _write_folder, "npz": _write_npz, "parquet": _write_parquet}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m sdgen_lib.export", description="Takes away what a run made.")
    parser.add_argument("run_folder", help="runs/<dataset>/<backbone>-<recipe>-seed<k>, through chapter 07")
    parser.add_argument("--to", required=True, choices=[*WRITERS, "generator"])
    parser.add_argument("out", help="the folder to make")
    parser.add_argument("--multiple", type=int, help="take x1 .. xK of the generated set only (default: all there is)")
    parser.add_argument("--generated-only", action="store_true", help="leave the real validation and test images out")
    parser.add_argument("--row", default="after 4", choices=ROWS, help="whose generator (default: after 4)")
    args = parser.parse_args(argv)
    try:
        out = export(course_of(args.run_folder), args.to, args.out, args.multiple, not args.generated_only, args.row)
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from error
    print(f"Written to {out}; its README.md says what it is and how to load it.")


if __name__ == "__main__":
    main()
