"""The forms in which a set of images is taken away: PNG files by class, MedMNIST's .npz, the Hub's parquet.

Each is written block by block: a set may be larger than the memory.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..data import ImageData, Split
from ..data.folders import folder_names
from ..store import files

BLOCK_IMAGES = 2048  # of a split in memory, which has no blocks of its own
HUB_PARTS = {"train": "train", "val": "validation", "test": "test"}


@dataclasses.dataclass(frozen=True)
class Part:
    """``count`` images in ``pieces``; ``blocks()`` yields each as (uint8 (n, H, H, 3), int64 (n,)), n as it comes."""

    count: int
    pieces: int
    blocks: Callable[[], Iterator[tuple[np.ndarray, np.ndarray]]]


def part_of(split: Split) -> Part:
    """A split in memory as a part."""

    def blocks() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for start in range(0, len(split), BLOCK_IMAGES):
            rows = slice(start, start + BLOCK_IMAGES)
            yield split.images[rows].permute(0, 2, 3, 1).contiguous().numpy(), split.labels[rows].numpy()

    return Part(len(split), -(-len(split) // BLOCK_IMAGES), blocks)


def write_folder(data: ImageData, folder: Path, parts: Mapping[str, Part]) -> dict[str, Any]:
    """``train/<class>/000001.png`` ..: torchvision's `ImageFolder`. ``data`` names the classes."""
    names = folder_names(data.class_names)
    for part, content in parts.items():
        for name in names:
            (folder / part / name).mkdir(parents=True)
        number = 0
        for images, labels in content.blocks():
            for image, label in zip(images, labels):
                number += 1
                Image.fromarray(image).save(folder / _place(part, names[label], number, content.count))
    return {}


def _place(part: str, name: str, number: int, count: int) -> str:
    """The path of image ``number``, from 1, of the ``count`` of a part; ``name``: its class's folder."""
    return f"{part}/{name}/{number:0{len(str(count))}d}.png"


def write_npz(data: ImageData, folder: Path, parts: Mapping[str, Part]) -> dict[str, Any]:
    """``<slug>.npz`` in MedMNIST's layout, as `numpy.savez_compressed` would write it."""
    size, names = data.image_size, data.class_names
    kind = np.uint8 if len(names) <= 256 else np.int64
    with zipfile.ZipFile(folder / f"{data.slug}.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for part, content in parts.items():
            seen: list[np.ndarray] = []  # the labels of what is written
            images = (images for images, labels in content.blocks() if not seen.append(labels))
            files.write_npy(archive, f"{part}_images", np.uint8, (content.count, size, size, 3), images)
            files.write_npy(archive, f"{part}_labels", kind, (content.count, 1), seen)
        text = np.array(names)  # not of MedMNIST's layout, whose readers pass over it; `data.load` reads it
        files.write_npy(archive, "class_names", text.dtype, text.shape, [text])
    return {}


def write_parquet(data: ImageData, folder: Path, parts: Mapping[str, Part]) -> dict[str, Any]:
    """``data/train-00000-of-00003.parquet`` ..., a file for each block; returns what the card's header says of it."""
    pa, pq = _pyarrow()
    (folder / "data").mkdir()
    features = {"image": {"_type": "Image"}, "label": {"names": list(data.class_names), "_type": "ClassLabel"}}
    schema = pa.schema(
        [("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("label", pa.int64())],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    for part, content in parts.items():
        for k, (images, labels) in enumerate(content.blocks()):
            rows = [{"bytes": _png(image), "path": None} for image in images]
            path = folder / "data" / f"{HUB_PARTS[part]}-{k:05d}-of-{content.pieces:05d}.parquet"
            table = pa.table({"image": rows, "label": labels}, schema=schema)
            pq.write_table(table, path, row_group_size=100)  # small: a viewer reads one group for a page
    patterns = [{"split": HUB_PARTS[part], "path": f"data/{HUB_PARTS[part]}-*"} for part in parts]
    return {"configs": [{"config_name": "default", "data_files": patterns}]}


def _pyarrow() -> tuple[Any, Any]:
    """Imported here, because nothing else needs it. Raises ImportError that says how to get it."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(
            "Parquet files need pyarrow: pip install pyarrow, or export to folder or npz instead."
        ) from error
    return pyarrow, pyarrow.parquet


def _png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="png")
    return file.getvalue()


def write_records(folder: Path, data: ImageData, records: Mapping[str, np.ndarray], in_folders: bool) -> None:
    """``records.csv``: a row for each generated image, in the order of the set, numbered from 1.

    ``records``: (N,) by name, "label" among them. ``in_folders``: with the path of each image's file, as `write_folder`
    names it.
    """
    names, count = folder_names(data.class_names), len(next(iter(records.values())))
    with (folder / "records.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["number", *(["file"] if in_folders else []), *records])
        columns = [column.tolist() for column in records.values()]
        for number, (label, *row) in enumerate(zip(records["label"], *columns), start=1):
            cells = [f"{value:.5g}" if isinstance(value, float) else value for value in row]
            path = [_place("train", names[label], number, count)] if in_folders else []
            table.writerow([number, *path, *cells])


# (data, which names the classes; an empty folder; the parts by name) -> more lines for the card's header
WRITERS = {"folder": write_folder, "npz": write_npz, "parquet": write_parquet}
