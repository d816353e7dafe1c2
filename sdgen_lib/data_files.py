"""Readers of the reader's own images: an ``.npz`` in MedMNIST's layout, or a folder with a sub-folder per class.

They return numpy arrays; `data` makes the missing splits. What cannot be used is a ValueError that names
the file and says what to mend.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import zipfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

PARTS = ("train", "val", "test")

# {"train": (images, labels), ...}: uint8 (N, H, H) or (N, H, H, 3); whole numbers (N,) or (N, 1), 0..C-1.
Parts = dict[str, tuple[np.ndarray, np.ndarray]]


# --- .npz --------------------------------------------------------------------------------------------


def read_npz(path: Path) -> tuple[str, tuple[str, ...], Parts]:
    """(slug, class names, parts) of ``{train,val,test}_images`` and ``_labels``; the val pair may be missing."""
    found = _npz_arrays(path)
    parts = PARTS if {"val_images", "val_labels"} & set(found) else ("train", "test")
    missing = [f"{part}_{kind}" for part in parts for kind in ("images", "labels")]
    missing = [key for key in missing if key not in found]
    if missing:
        raise ValueError(
            f"{path} has no array {', '.join(missing)} (it has {', '.join(found) or 'none of its layout'}); "
            "it must hold train_images, train_labels, test_images and test_labels, as MedMNIST's files do."
        )
    arrays = {part: (found[f"{part}_images"], found[f"{part}_labels"]) for part in parts}
    side = arrays["train"][0].shape[1:2]
    for part, (images, labels) in arrays.items():
        _check_images(images, side, f"{path}: {part}_images")
        _check_labels(labels, len(images), f"{path}: {part}_labels")
    class_names = _npz_class_names(found.get("class_names"), [labels for _, labels in arrays.values()], path)
    with path.open("rb") as file:
        slug = _slug(path.stem, hashlib.file_digest(file, "sha256"))
    return slug, class_names, arrays


def _npz_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of the layout that the file holds; others in it are not read."""
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is not a .npz file (no whole zip archive); write it with numpy.savez.")
    wanted = {f"{part}_{kind}" for part in PARTS for kind in ("images", "labels")}
    arrays, key = {}, "its list of arrays"
    try:
        with np.load(path, allow_pickle=False) as file:
            for key in [key for key in file.files if key in wanted | {"class_names"}]:
                arrays[key] = np.asarray(file[key])
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"{path}: {key} cannot be read ({error}); write it with numpy.savez, as plain numbers."
        ) from error
    return arrays


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


def _npz_class_names(given: np.ndarray | None, labels: list[np.ndarray], path: Path) -> tuple[str, ...]:
    """The file's own ``class_names``, or "class 0", "class 1", ... ; checks the labels against them."""
    found = sorted({int(label) for part in labels for label in np.unique(part)})
    if given is None:
        class_names = tuple(f"class {i}" for i in range(len(found)))
    elif given.dtype.kind != "U" or given.ndim != 1 or len(set(given.tolist())) != len(given):
        raise ValueError(f"{path}: class_names is {given.dtype} {given.shape}; it must be C different strings.")
    else:
        class_names = tuple(given.tolist())
    if found[0] < 0 or found[-1] >= len(class_names):
        shown = ", ".join(map(str, found[:5])) + (f", ... {found[-1]}" if len(found) > 5 else "")
        raise ValueError(
            f"{path}: the labels (train_labels and the others) are {shown}; {len(class_names)} classes must "
            f"be numbered 0 to {len(class_names) - 1}."
        )
    return class_names


# --- folders -----------------------------------------------------------------------------------------


def read_folder(path: Path, size: int) -> tuple[str, tuple[str, ...], Parts]:
    """(slug, class names, parts) of class folders, or of ``train/``, ``test/`` and maybe ``val/`` holding them.

    The parts are those three, or one called "all"; every image becomes ``(size, size, 3)``.
    """
    folders = {part: path / part for part in PARTS if (path / part).is_dir()}
    if folders and not {"train", "test"} <= set(folders):
        raise ValueError(f"{path} holds {'/, '.join(folders)}/ only; ready-made splits need both train/ and test/.")
    class_names = tuple(folder.name for folder in _visible(folders.get("train", path)) if folder.is_dir())
    if not class_names:
        raise ValueError(f"{folders.get('train', path)} has no sub-folders; it must hold one per class.")
    digest, parts = hashlib.sha256(), {}
    for part, folder in (folders or {"all": path}).items():
        parts[part] = _read_classes(folder, class_names, size, path, digest)
    return _slug(path.resolve().name, digest), class_names, parts


def _visible(folder: Path) -> list[Path]:
    return sorted((p for p in folder.iterdir() if not p.name.startswith(".")), key=lambda p: p.name)


def _read_classes(
    folder: Path, class_names: tuple[str, ...], size: int, root: Path, digest
) -> tuple[np.ndarray, np.ndarray]:
    """Every image under the class folders of `folder`; adds what it reads to the running `digest`."""
    images, labels = [], []
    for class_folder in (p for p in _visible(folder) if p.is_dir()):
        if class_folder.name not in class_names:
            raise ValueError(f"{class_folder} is a class that train/ does not have; add it there or remove it.")
        files = _visible(class_folder)
        if not files:
            raise ValueError(f"{class_folder} is an empty class folder; put images in it or remove it.")
        for file in files:
            images.append(_read_image(file, size, root, digest))
            labels.append(class_names.index(class_folder.name))
    if not images:
        raise ValueError(f"{folder} has no images; it must hold one sub-folder of images per class.")
    return np.stack(images), np.array(labels)


def _read_image(file: Path, size: int, root: Path, digest) -> np.ndarray:
    """uint8 ``(size, size, 3)``: the shorter side resized (bilinear), the longer one cut to its centre."""
    try:
        content = file.read_bytes()
        # Phones store a portrait as a landscape plus a note that it is turned: turn it.
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file} is not an image that can be read ({error}); mend or remove it.") from error
    relative = os.fsencode(file.relative_to(root).as_posix())
    digest.update(b"%s\0%d\0" % (relative, len(content)) + content)
    return np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR))


# --- both --------------------------------------------------------------------------------------------


def _slug(stem: str, digest) -> str:
    """A folder-safe name that changes with the content."""
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", stem)[:80].strip(".-") or "data"
    return f"{stem}-{digest.hexdigest()[:8]}"
