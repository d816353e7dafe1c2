"""A dataset from what was asked for: a name, a MedMNIST-style ``.npz`` file or a folder, as one `ImageData`.

The named datasets are read by `named`, files by `npz`, folders by `folders`; the missing splits are made by `splits`.
"""

from __future__ import annotations

import os
import re
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..config.messages import printable, shown, unknown_name
from . import named, splits
from .folders import folder_names, only_train, read_folder
from .images import ImageData, Split, resize
from .npz import read_npz
from .parts import Found, Parts, check_memory
from .shifts import listed, matched

DIGITS_SIZE, FOLDER_SIZE = 16, 32  # pixels
IMAGE_SIZES = range(8, 1025)
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar")


def load(
    dataset: str | os.PathLike,
    image_size: int | None = None,
    seed: int = 0,
    base_dir: Path | None = None,
    keep_in: Path | None = None,
) -> ImageData:
    """Load a dataset as uint8 RGB images ``(N, 3, H, W)``, int64 labels ``(N,)`` and class names.

    Args:
        dataset: one of `named.names()` (a name wins over a folder called the same: write ``./digits`` for
            the folder), or the path of an ``.npz`` file (MedMNIST's layout) or of a folder (one
            sub-folder of images per class, or these inside ``train/``, ``test/`` and maybe ``val/``, or as
            else these are called, see `folders.SPLITS`).
            ``:N`` after it, as in ``digits:200``, keeps N training images, in the classes' proportions.
            What is an existing path with all that stands in it is that path, and not a path and ``:N``.
        image_size: side in pixels; None is the dataset's own: 16 for ``digits`` (8x8 scans, enlarged
            bilinearly), 32 for a folder, and for everything else the size it is stored in.
        seed: picks the validation images where the source has no such split, and the N kept images.
            The test images never depend on it, so results over seeds compare.
        base_dir: a relative path that does not exist in the working directory is looked for here;
            None where there is no such folder (see `checkout`).
        keep_in: a folder where the decoded pictures of a folder are kept, so that they are decoded once; None: they
            are not kept.

    What of a folder was passed over, or may not be as it was meant, is warned of, and is in the data's ``notes``.

    Raises:
        TypeError: `dataset` is neither text nor a path.
        ValueError: an unknown name, a wrong ``:N``, or data that cannot be used; says what to mend.
        FileNotFoundError: no such file or folder; says where it was looked for.
        ConnectionError: a download failed; says where to put the files by hand.
    """
    _check_arguments(dataset, image_size)
    name, count = split_count(os.fspath(dataset), base_dir)
    found, default_size = _read(name, image_size, base_dir, keep_in)
    val_fraction = splits.CIFAR_VAL_FRACTION if found.slug in named.CIFAR else splits.VAL_FRACTION
    _check_grey(found.parts, name)
    three = splits.three_splits(found.parts, seed, val_fraction)
    data = ImageData(os.fspath(dataset), found.slug, found.class_names, **three, notes=found.notes)
    _check_classes(data, set(found.parts), name)
    for note in found.notes:
        warnings.warn(note, stacklevel=2)
    if count is not None:
        data = splits.keep(data, count, seed, name)
    size = image_size or default_size
    _check_size(data, size, name)
    slug = data.slug if size == default_size else f"{data.slug}-{size}px"
    train, val, test = (Split(resize(s.images, size), s.labels) for s in (data.train, data.val, data.test))
    return replace(data, slug=slug, train=train, val=val, test=test)


@dataclass(frozen=True, eq=False)
class Generated:
    """Generated images to be judged, and, of a folder, the path in it that each of them comes from, with "/"."""

    images: Split
    files: tuple[str, ...] = ()


def load_generated(dataset: str | os.PathLike, data: ImageData, base_dir: Path | None = None) -> Generated:
    """Generated images to judge beside ``data``: in its size, with its labels; all of them are for training.

    ``dataset``: a path as in `load`, without ``:N``. Of splits the training images are taken; of a folder of classes,
    of one that holds train/ alone, and of a file with training images alone, all. Labels of a file without class names
    count the classes of ``data``; folders may be called as `folder_names` calls its classes. A class of which no image
    was generated is warned of. Raises as `load`, and ValueError for a class that ``data`` has not.
    """
    name = os.fspath(dataset)
    _check_arguments(name, None)
    if (count := split_count(name, base_dir)[1]) is not None:
        raise ValueError(f"{shown(name)}: all generated images are judged; leave :{count} out.")
    if named.known(name) is not None:
        found, _ = _read(name, data.image_size, base_dir, None)
    elif (path := _find(name, base_dir)).is_file():
        found = read_npz(path, ("train",), data.class_names)
    else:
        found = read_folder(only_train(path), data.image_size)
        theirs = dict(zip(folder_names(data.class_names), data.class_names))
        if set(found.class_names) <= set(theirs):
            found = replace(found, class_names=tuple(theirs[name] for name in found.class_names))
    name_of_part = "all" if "all" in found.parts else "train"
    part = found.parts.get(name_of_part)
    if part is None:
        raise ValueError(
            f"{name!r} has no training images: put the generated images into train/, or into class folders."
        )
    for note in found.notes:
        warnings.warn(note, stacklevel=2)
    _check_grey({"train": part}, name)
    check_memory(len(part[0]) * 3 * data.image_size**2)
    split = matched(data, name, found.class_names, splits.to_split(*part), all_of_them=False)
    missing = [data.class_names[k] for k in set(range(data.num_classes)) - set(split.labels.tolist())]
    if missing:
        warnings.warn(f"{printable(name)} has no image of class {listed(missing)}.", stacklevel=2)
    return Generated(split, found.files.get(name_of_part, ()))


def checkout() -> Path | None:
    """The folder of the course that this package lies in, known by its ``notebooks/``; None for an installed package.

    It is the `base_dir` of a notebook's relative paths. The folder of an installed package is site-packages, where
    ``numpy`` would be a folder of images.
    """
    folder = Path(__file__).resolve().parents[2]
    return folder if (folder / "notebooks").is_dir() else None


# --- what was asked for ---


def _check_arguments(dataset, image_size) -> None:
    if not isinstance(dataset, (str, os.PathLike)):
        known = ", ".join(["digits", *named.CIFAR, *named.MEDMNIST])
        is_number = isinstance(dataset, (int, float)) and not isinstance(dataset, bool)
        hint = f" For a folder called so: './{dataset}', or papermill's -r dataset {dataset}." if is_number else ""
        raise TypeError(
            f"dataset is {shown(dataset)}; it must be text: a name ({known}), or the path of a .npz file or of a "
            f"folder.{hint}"
        )
    if image_size is not None and (type(image_size) is not int or image_size not in IMAGE_SIZES):
        raise ValueError(f"image_size is {image_size!r}; it must be a whole number from 8 to 1024, or None.")


def split_count(text: str, base_dir: Path | None) -> tuple[str, int | None]:
    """``"digits:200"`` -> ``("digits", 200)``; ``"digits"`` and the path ``"photos 12:30"`` -> themselves and None."""
    name, colon, count = text.rpartition(":")
    is_name = named.known(name) is not None
    if not colon or (not is_name and _exists(text, base_dir)):
        return text, None
    if re.fullmatch(r"[0-9]{1,18}", count):
        return name, int(count)
    if is_name or _exists(name, base_dir):
        raise ValueError(
            f"{text!r} asks for {count!r} training images; write a whole number after the colon, as in "
            f"'{printable(name)}:200'."
        )
    return text, None


def _read(name: str, image_size: int | None, base_dir: Path | None, keep_in: Path | None) -> tuple[Found, int]:
    """What a name, a file or a folder holds, and its own image size."""
    if (slug := named.known(name)) is not None:
        found = Found(slug, *named.read(slug))
        return found, DIGITS_SIZE if slug == "digits" else _side(found.parts)
    path = _find(name, base_dir)
    if path.is_dir():
        return read_folder(path, image_size or FOLDER_SIZE, keep_in), FOLDER_SIZE
    found = read_npz(path)
    return found, _side(found.parts)


def _side(parts: Parts) -> int:
    """Height (= width) of the training images in pixels."""
    return parts["train"][0].shape[1]


def _places(name: str, base_dir: Path | None) -> list[Path]:
    try:
        path = Path(name).expanduser()
    except RuntimeError as error:
        raise ValueError(f"dataset {shown(name)} has no home folder: give another path.") from error
    return [path.absolute()] + ([(Path(base_dir) / path).absolute()] if base_dir is not None else [])


def _exists(name: str, base_dir: Path | None) -> bool:
    return bool(name) and any(map(os.path.exists, _places(name, base_dir)))


def _find(name: str, base_dir: Path | None) -> Path:
    """The existing file or folder that `name` means."""
    if reason := named.refusal(re.sub(r"_(28|64|128|224)$", "", name.lower())):
        raise ValueError(
            f"{name!r} cannot be used, because {reason}; choose a set of 2-D images with one label each, "
            "such as 'pathmnist'."
        )
    places = list(dict.fromkeys(_places(name, base_dir))) if name else []
    for place in places:  # os.path and not Path: a name too long for a file is no path, and no error
        if os.path.isdir(place) or (os.path.isfile(place) and place.suffix.lower() == ".npz"):
            return place
        if os.path.exists(place):
            hint = " (unpack an archive first)" if place.suffix.lower() in ARCHIVES else ""
            raise ValueError(
                f"{printable(place)} is neither a folder nor a .npz file; a dataset must be one of the two{hint}."
            )
    tried = shown(" or ".join(map(str, places)), 1000)[1:-1]
    if name.startswith((".", "~")) or name.lower().endswith(".npz") or "/" in name or os.sep in name:
        raise FileNotFoundError(f"No file or folder at {tried}; correct the path {shown(name)}.")
    also = f" Or the path of a folder or of a .npz file: there is none at {tried}." if places else ""
    raise ValueError(f"{unknown_name('dataset', name, named.names())}{also}")


def _check_size(data: ImageData, size: int, name: str) -> None:
    """Raises ValueError where the resized images would not fit into the memory."""
    count = sum(len(split) for split in (data.train, data.val, data.test) if split.images.shape[-1] != size)
    _check_room(count, size, name)


def _check_grey(parts: Parts, name: str) -> None:
    """Raises ValueError where the grey images would not fit into the memory as RGB."""
    grey = [images for images, _ in parts.values() if images.ndim == 3]
    if grey:
        _check_room(sum(map(len, grey)), grey[0].shape[1], name)


def _check_room(count: int, size: int, name: str) -> None:
    try:
        check_memory(count * 3 * size * size)
    except ValueError as error:
        raise ValueError(f"{name!r}: {count} images of {size}x{size} pixels are too many: {error}.") from error


def _check_classes(data: ImageData, given: set[str], name: str) -> None:
    """Raises ValueError for a class without an image to train with or to test; `given` are the source's own parts."""
    if data.num_classes < 2:
        raise ValueError(f"{name!r} has one class, {data.class_names[0]!r}; at least 2 classes are needed.")
    for where, split in (("training", data.train), ("test", data.test)):
        counts = torch.bincount(split.labels, minlength=data.num_classes)
        missing = [data.class_names[i] for i in torch.nonzero(counts == 0).flatten().tolist()]
        if missing:
            in_val = set(missing) & {data.class_names[i] for i in data.val.labels.tolist()}
            if "all" in given:
                why = "a class needs 3 images or more where the splits are made here"
            elif where == "training" and "val" not in given and in_val:
                why = "the only one is taken for validation: put 2 or more into train, or give val images too"
            else:
                why = f"add some to the {where} images, or leave the class out"
            raise ValueError(
                f"{name!r} has no {where} image of class {', '.join(map(repr, missing[:5]))}; every class "
                f"needs one there ({why})."
            )
