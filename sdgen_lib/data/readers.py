"""Readers of the reader's own images: an ``.npz`` in MedMNIST's layout, or a folder with a sub-folder per class.

They return numpy arrays; `splits` makes the missing splits. What cannot be used is a ValueError that names
the file and says what to mend. Nothing in a file is trusted: what it says of its size is held against the free
memory before anything is unpacked, nothing is unpickled, and no picture format is opened that runs programs.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import re
import zipfile
from pathlib import Path

import numpy as np
import psutil
from PIL import Image, ImageOps

from ..config.messages import shown

PARTS = ("train", "val", "test")
# Not Pillow's whole list: EPS, for one, starts Ghostscript.
IMAGE_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
IMAGE_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")  # 8 bits a channel
MAX_PIXELS, MAX_IMAGE_BYTES = 64_000_000, 256_000_000
MAX_CLASS_NAME = 200

# {"train": (images, labels), ...}: uint8 (N, H, H) or (N, H, H, 3); whole numbers (N,) or (N, 1), 0..C-1.
Parts = dict[str, tuple[np.ndarray, np.ndarray]]


# --- .npz ---


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


def _memory_limit() -> int:
    """Bytes that an unpacked dataset may take: half of what is free, for grey images become RGB and splits copies."""
    return psutil.virtual_memory().available // 2


def _npz_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of the layout that the file holds; others in it are not read."""
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is not a .npz file (no whole zip archive); write it with numpy.savez.")
    wanted = {f"{part}_{kind}.npy" for part in PARTS for kind in ("images", "labels")} | {"class_names.npy"}
    arrays, key = {}, "its list of arrays"
    try:
        with zipfile.ZipFile(path) as archive:
            members = [member for member in archive.infolist() if member.filename in wanted]
            if len({member.filename for member in members}) < len(members):
                raise ValueError("an array is there twice")
            size, limit = sum(member.file_size for member in members), _memory_limit()
            if size > limit:
                raise ValueError(
                    f"unpacked they take {size / 2**20:,.0f} MB, and at most {limit / 2**20:,.0f} MB, half of this "
                    "machine's free memory, may be used: keep fewer or smaller images"
                )
            for member in members:
                key = member.filename.removesuffix(".npy")
                with archive.open(member) as file:
                    arrays[key] = _read_array(file, member.file_size)
    except Exception as error:  # a damaged archive makes its parsers raise nearly anything
        raise ValueError(
            f"{path}: {key} cannot be read ({_reason(error)}); write it with numpy.savez, as plain numbers."
        ) from error
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


def _npz_class_names(given: np.ndarray | None, labels: list[np.ndarray], path: Path) -> tuple[str, ...]:
    """The file's own ``class_names``, or "class 0", "class 1", ... ; checks the labels against them."""
    found = sorted({int(label) for part in labels for label in np.unique(part)})
    if given is None:
        class_names = tuple(f"class {i}" for i in range(len(found)))
    elif given.dtype.kind != "U" or given.ndim != 1 or len(set(given.tolist())) != len(given):
        raise ValueError(f"{path}: class_names is {given.dtype} {given.shape}; it must be C different strings.")
    else:
        class_names = tuple(given.tolist())
    _check_class_names(class_names, path)
    if found[0] < 0 or found[-1] >= len(class_names):
        some = ", ".join(map(str, found[:5])) + (f", ... {found[-1]}" if len(found) > 5 else "")
        raise ValueError(
            f"{path}: the labels (train_labels and the others) are {some}; {len(class_names)} classes must "
            f"be numbered 0 to {len(class_names) - 1}."
        )
    return class_names


# --- folders ---


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
    _check_class_names(class_names, path)
    digest, parts = hashlib.sha256(), {}
    for part, folder in (folders or {"all": path}).items():
        parts[part] = _read_classes(folder, class_names, size, path, digest)
    return _slug(path.resolve().name, digest), class_names, parts


def _visible(folder: Path) -> list[Path]:
    try:
        return sorted((p for p in folder.iterdir() if not p.name.startswith(".")), key=lambda p: p.name)
    except OSError as error:
        raise ValueError(f"{folder} cannot be read ({error.strerror}); allow reading it, or leave it out.") from error


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
    """uint8 ``(size, size, 3)``: the shorter side resized (bilinear), the longer one cut to its centre.

    What is transparent becomes white.
    """
    try:
        if not file.is_file():  # a named pipe would keep us waiting for ever
            raise ValueError("it is no file")
        if file.stat().st_size > MAX_IMAGE_BYTES:
            raise ValueError(f"it is larger than {MAX_IMAGE_BYTES // 10**6} MB")
        content = file.read_bytes()
        picture = _whole_picture(content)
    except Exception as error:  # a damaged picture makes its decoder raise nearly anything
        name = str(file) if str(file).isprintable() else repr(str(file))  # a line break in a name is no line break here
        raise ValueError(f"{name} is not an image that can be read ({_reason(error)}); mend or remove it.") from error
    relative = os.fsencode(file.relative_to(root).as_posix())
    digest.update(b"%s\0%d\0" % (relative, len(content)) + content)
    return np.asarray(ImageOps.fit(picture, (size, size), Image.Resampling.BILINEAR))


def _whole_picture(content: bytes) -> Image.Image:
    """A file's one picture in RGB; raises ValueError or the decoder's own error."""
    image = Image.open(io.BytesIO(content), formats=IMAGE_FORMATS)  # reads the header only
    width, height = image.size
    if not 0 < width * height <= MAX_PIXELS:
        raise ValueError(f"it has {width} x {height} pixels; 1 to {MAX_PIXELS:,} in all are allowed")
    if max(width, height) > 200 * min(width, height):
        raise ValueError(f"it has {width} x {height} pixels; a side may be 200 times the other at most")
    if getattr(image, "n_frames", 1) > 1:
        raise ValueError(f"it has {image.n_frames} frames; give each a file of its own")
    if image.mode not in IMAGE_MODES:
        raise ValueError(f"its pixels are {image.mode}, not 8 bits a channel; convert it to 8-bit RGB or grey")
    # Phones store a portrait as a landscape plus a note that it is turned: turn it.
    image = ImageOps.exif_transpose(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


# --- both ---


def _reason(error: Exception) -> str:
    """What a reader said, on one line."""
    return shown(str(error), 300)[1:-1] or type(error).__name__


def _check_class_names(class_names: tuple[str, ...], path: Path) -> None:
    """They are printed and drawn, never used as a path: any printable text will do, "T-shirt/top" too."""
    for name in class_names:
        if not name.strip() or not name.isprintable() or len(name) > MAX_CLASS_NAME:
            raise ValueError(
                f"{path} has a class called {shown(name)}; a class name must be printable text of 1 to "
                f"{MAX_CLASS_NAME} characters."
            )


def _slug(stem: str, digest) -> str:
    """A folder-safe name that changes with the content."""
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", stem)[:80].strip(".-") or "data"
    return f"{stem}-{digest.hexdigest()[:8]}"
