"""Reader of an ``.npz`` in MedMNIST's layout.

Nothing in the file is trusted: what it says of its size is held against the free memory before anything is unpacked,
and nothing is unpickled. What cannot be used is a ValueError that names the file and says what to mend.
"""

from __future__ import annotations

import hashlib
import math
import zipfile
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from ..config.messages import printable, shown
from .parts import PARTS, Found, check_class_names, check_memory, composed, make_slug, reason

LAYOUT = (*(f"{part}_{kind}" for part in PARTS for kind in ("images", "labels")), "class_names")


def read_npz(path: Path, parts: Sequence[str] | None = None, class_names: Sequence[str] | None = None) -> Found:
    """The splits in ``{train,val,test}_images`` and ``_labels``; the val pair may be missing.

    ``parts``: the splits to read, where those are not all. ``class_names``: the names of a file that has none itself.
    """
    found = read_arrays(path, LAYOUT)
    parts = parts or (PARTS if {"val_images", "val_labels"} & set(found) else ("train", "test"))
    missing = [f"{part}_{kind}" for part in parts for kind in ("images", "labels")]
    missing = [key for key in missing if key not in found]
    if missing:
        with zipfile.ZipFile(path) as archive:
            others = [name.removesuffix(".npy") for name in archive.namelist()]
        has = shown(", ".join(others), 120)[1:-1] or "none"
        *before, last = [f"{part}_{kind}" for part in parts if part != "val" for kind in ("images", "labels")]
        raise ValueError(
            f"{printable(path)} has no array {', '.join(missing)} (it has {has}); "
            f"it must hold {', '.join(before)} and {last}, as MedMNIST's files do."
        )
    arrays = {part: (found[f"{part}_images"], found[f"{part}_labels"]) for part in parts}
    side = arrays["train"][0].shape[1:2]
    for part, (images, labels) in arrays.items():
        _check_images(images, side, f"{printable(path)}: {part}_images")
        _check_labels(labels, len(images), f"{printable(path)}: {part}_labels")
    if class_names is not None and "class_names" not in found:
        found["class_names"] = np.array(class_names)
    class_names = _class_names(found.get("class_names"), [labels for _, labels in arrays.values()], path)
    with path.open("rb") as file:
        slug = make_slug(path.stem, hashlib.file_digest(file, "sha256"))
    return Found(slug, class_names, arrays)


def read_arrays(path: Path, keys: Collection[str]) -> dict[str, np.ndarray]:
    """Those of the arrays called ``keys`` that the file holds; others in it are not read."""
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{printable(path)} is not a .npz file (no whole zip archive); write it with numpy.savez.")
    wanted = {f"{key}.npy" for key in keys}
    arrays, key = {}, "its list of arrays"
    try:
        with zipfile.ZipFile(path) as archive:
            members = [member for member in archive.infolist() if member.filename in wanted]
            if len({member.filename for member in members}) < len(members):
                raise ValueError("an array is there twice")
            check_memory(sum(member.file_size for member in members))
            for member in members:
                key = member.filename.removesuffix(".npy")
                with archive.open(member) as file:
                    arrays[key] = _read_array(file, member.file_size)
    except Exception as error:  # a damaged archive makes its parsers raise nearly anything
        form = "text: class_names.astype(str)" if key == "class_names" else "plain numbers"
        raise ValueError(
            f"{printable(path)}: {key} cannot be read ({reason(error)}); write it with numpy.savez, as {form}."
        ) from (error)
    return arrays


def _read_array(file: zipfile.ZipExtFile, size: int) -> np.ndarray:
    """One ``.npy`` of ``size`` bytes. Its header is checked first: numpy would make room for whatever that says."""
    version = np.lib.format.read_magic(file)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"its .npy has version {version}, and 1.0 and 2.0 are known")
    shape, fortran, dtype = readers[version](file)
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are never loaded")
    promised = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or promised != size - file.tell():
        raise ValueError(f"its header promises {promised} bytes of shape {shape}, and {size - file.tell()} follow")
    content = file.read()
    if len(content) != promised:
        raise ValueError(f"it breaks off after {len(content)} of {promised} bytes")
    return np.frombuffer(content, dtype).reshape(shape, order="F" if fortran else "C")


def _check_images(images: np.ndarray, side: tuple, where: str) -> None:
    grey_or_rgb = images.ndim == 3 or (images.ndim == 4 and images.shape[3] == 3)
    if images.dtype != np.uint8:
        raise ValueError(f"{where} is {images.dtype}; it must be uint8, values 0 to 255.")
    if not grey_or_rgb or images.size == 0 or images.shape[1:3] != side * 2:
        raise ValueError(
            f"{where} has shape {images.shape}; it must be (N, H, H) or (N, H, H, 3), N of 1 or more, with "
            "one H for all the splits."
        )


def _check_labels(labels: np.ndarray, count: int, where: str) -> None:
    if labels.dtype.kind not in "iu":
        raise ValueError(f"{where} is {labels.dtype}; it must hold whole numbers, 0 to C-1, in an integer type.")
    if labels.shape not in ((count,), (count, 1)):
        raise ValueError(f"{where} has shape {labels.shape}; its {count} images need ({count},) or ({count}, 1).")


def _class_names(given: np.ndarray | None, labels: list[np.ndarray], path: Path) -> tuple[str, ...]:
    """The file's own ``class_names``, or "class 0", "class 1", ... ; checks the labels against them."""
    found = sorted({int(label) for part in labels for label in np.unique(part)})
    if given is None:
        class_names = tuple(f"class {i}" for i in range(len(found)))
    else:
        is_text = given.dtype.kind == "U" and given.ndim == 1
        class_names = tuple(composed(name) for name in given.tolist()) if is_text else ()
        if not is_text or len(set(class_names)) != len(given):
            raise ValueError(
                f"{printable(path)}: class_names is {given.dtype} {given.shape}; it must be C different strings, as of "
                "class_names.astype(str)."
            )
    check_class_names(class_names, path)
    if found[0] < 0 or found[-1] >= len(class_names):
        some = ", ".join(map(str, found[:5])) + (f", ... {found[-1]}" if len(found) > 5 else "")
        if len(class_names) > 1:
            rule = f"{len(class_names)} classes must be numbered 0 to {len(class_names) - 1}"
        elif given is None:
            rule = "that is one class, and at least 2 are needed, numbered 0, 1 and so on"
        else:
            rule = f"class_names holds {'one name' if class_names else 'no names'}, and each class needs one"
        raise ValueError(f"{printable(path)}: the labels (train_labels and the others) are {some}; {rule}.")
    return class_names
