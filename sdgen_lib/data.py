"""Images with class labels, from a name, a MedMNIST-style ``.npz`` file or a folder, as one `ImageData`.

The named datasets are read by `data_named`, files and folders by `data_files`; here the missing splits are made.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from . import data_files, data_named
from .settings import shown, unknown_name

TEST_FRACTION, VAL_FRACTION, CIFAR_VAL_FRACTION = 0.25, 0.15, 0.2  # of all the images, of those for training
DIGITS_SIZE, FOLDER_SIZE = 16, 32


@dataclass(frozen=True, eq=False)
class Split:
    """images: uint8 ``(N, 3, H, W)``, 0..255; labels: int64 ``(N,)``, 0..C-1."""

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices) -> Split:
        """The images and labels at `indices` (a sequence of whole numbers), in that order."""
        indices = torch.as_tensor(indices, dtype=torch.long)
        return Split(self.images[indices], self.labels[indices])


@dataclass(frozen=True, eq=False)
class ImageData:
    """A dataset in three splits; ``name`` is as it was asked for, ``slug`` is its name as a folder."""

    name: str
    slug: str
    class_names: tuple[str, ...]
    train: Split
    val: Split
    test: Split

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def image_size(self) -> int:
        """Height (= width) in pixels."""
        return self.train.images.shape[-2]

    @property
    def class_counts(self) -> torch.Tensor:
        """Training images per class: int64 ``(C,)``."""
        return torch.bincount(self.train.labels, minlength=self.num_classes)


def load(
    dataset: str | os.PathLike, image_size: int | None = None, seed: int = 0, base_dir: Path | None = None
) -> ImageData:
    """Load a dataset as uint8 RGB images ``(N, 3, H, W)``, int64 labels ``(N,)`` and class names.

    Args:
        dataset: one of `data_named.names()` (a name wins over a folder called the same: write ``./digits`` for
            the folder), or the path of an ``.npz`` file (MedMNIST's layout) or of a folder (one
            sub-folder of images per class, or these inside ``train/``, ``test/`` and maybe ``val/``).
            ``:N`` after it, as in ``digits:200``, keeps N training images, in the classes' proportions.
        image_size: side in pixels; None is the dataset's own: 16 for ``digits`` (8x8 scans, enlarged
            bilinearly), 32 for a folder, and for everything else the size it is stored in.
        seed: picks the validation images where the source has no such split, and the N kept images.
            The test images never depend on it, so results over seeds compare.
        base_dir: a relative path that does not exist in the working directory is looked for here.

    Raises:
        TypeError: `dataset` is neither text nor a path.
        ValueError: an unknown name, a wrong ``:N``, or data that cannot be used; says what to mend.
        FileNotFoundError: no such file or folder; says where it was looked for.
        ConnectionError: a download failed; says where to put the files by hand.
    """
    if not isinstance(dataset, (str, os.PathLike)):
        known = ", ".join(["digits", *data_named.CIFAR, *data_named.MEDMNIST])
        raise TypeError(
            f"dataset is {dataset!r}; it must be text: a name ({known}), or the path of a .npz file or of a folder."
        )
    if image_size is not None and (type(image_size) is not int or not 8 <= image_size <= 1024):
        raise ValueError(f"image_size is {image_size!r}; it must be a whole number from 8 to 1024, or None.")
    name, count = _split_count(os.fspath(dataset), base_dir)
    slug, val_fraction = name.lower(), VAL_FRACTION
    if slug in data_named.names():
        class_names, parts = data_named.read(slug)
        default_size = DIGITS_SIZE if slug == "digits" else parts["train"][0].shape[1]
        if slug in data_named.CIFAR:
            val_fraction = CIFAR_VAL_FRACTION
    elif (path := _find(name, base_dir)).is_dir():
        slug, class_names, parts = data_files.read_folder(path, image_size or FOLDER_SIZE)
        default_size = FOLDER_SIZE
    else:
        slug, class_names, parts = data_files.read_npz(path)
        default_size = parts["train"][0].shape[1]
    data = ImageData(os.fspath(dataset), slug, class_names, **_three_splits(parts, seed, val_fraction))
    _check_classes(data, name)
    if count is not None:
        data = _keep(data, count, seed, name)
    size = image_size or default_size
    slug = data.slug if size == default_size else f"{data.slug}-{size}px"
    train, val, test = (Split(resize(s.images, size), s.labels) for s in (data.train, data.val, data.test))
    return replace(data, slug=slug, train=train, val=val, test=test)


def resize(images: torch.Tensor, size: int, antialias: bool = True) -> torch.Tensor:
    """Bilinear, antialiased unless told: uint8 ``(N, 3, H, W)`` -> uint8 ``(N, 3, size, size)``; as is if that size."""
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(f"images are {images.dtype} {tuple(images.shape)}; they must be uint8 (N, 3, H, W).")
    if images.shape[-2:] == (size, size):
        return images
    out = torch.empty(*images.shape[:2], size, size, dtype=torch.uint8, device=images.device)
    # In float, because torch's uint8 kernel rounds differently from one kind of CPU to another; a few
    # hundred at a time, because all of CIFAR in float would fill a small machine's memory.
    for start in range(0, len(images), 256):
        batch = images[start : start + 256].float()
        batch = torch.nn.functional.interpolate(batch, size=(size, size), mode="bilinear", antialias=antialias)
        out[start : start + 256] = batch.round().clamp(0, 255).to(torch.uint8)
    return out


# --- what was asked for -------------------------------------------------------------------------------


def _split_count(text: str, base_dir) -> tuple[str, int | None]:
    """``"digits:200"`` -> ``("digits", 200)``; ``"digits"`` -> ``("digits", None)``."""
    name, colon, count = text.rpartition(":")
    if not colon:
        return text, None
    if re.fullmatch(r"[0-9]{1,18}", count):
        return name, int(count)
    if name.lower() in data_named.names() or (name and any(place.exists() for place in _places(name, base_dir))):
        raise ValueError(
            f"{text!r} asks for {count!r} training images; write a whole number after the colon, as in '{name}:200'."
        )
    return text, None


def _places(name: str, base_dir) -> list[Path]:
    try:
        path = Path(name).expanduser()
    except RuntimeError as error:
        raise ValueError(f"dataset {shown(name)} has no home folder: give another path.") from error
    return [path.absolute()] + ([(Path(base_dir) / path).absolute()] if base_dir is not None else [])


def _find(name: str, base_dir) -> Path:
    """The existing file or folder that `name` means."""
    if reason := data_named.refusal(re.sub(r"_(28|64|128|224)$", "", name.lower())):
        raise ValueError(
            f"{name!r} cannot be used, because {reason}; choose a set of 2-D images with one label each, "
            "such as 'pathmnist'."
        )
    places = list(dict.fromkeys(_places(name, base_dir))) if name else []
    for place in places:
        if place.is_dir() or (place.is_file() and place.suffix == ".npz"):
            return place
        if place.exists():
            raise ValueError(f"{place} is neither a folder nor a .npz file; a dataset must be one of the two.")
    if name.startswith((".", "~")) or name.endswith(".npz") or "/" in name or os.sep in name:
        tried = " or ".join(map(str, places))
        raise FileNotFoundError(f"No file or folder at {tried}; correct the path {shown(name)}.")
    raise unknown_name("dataset", name, data_named.names())


def _check_classes(data: ImageData, name: str) -> None:
    if data.num_classes < 2:
        raise ValueError(f"{name!r} has one class, {data.class_names[0]!r}; at least 2 classes are needed.")
    for where, split in (("training", data.train), ("test", data.test)):
        counts = torch.bincount(split.labels, minlength=data.num_classes)
        missing = [data.class_names[i] for i in torch.nonzero(counts == 0).flatten().tolist()]
        if missing:
            raise ValueError(
                f"{name!r} has no {where} image of class {', '.join(map(repr, missing[:5]))}; every class "
                "needs one there (a class needs 3 images or more where the splits are made here)."
            )


# --- splits -------------------------------------------------------------------------------------------


def _to_split(images: np.ndarray, labels: np.ndarray) -> Split:
    """uint8 ``(N, H, W)`` or ``(N, H, W, 3)`` and integer ``(N,)`` or ``(N, 1)`` arrays -> `Split`."""
    if images.ndim == 3:
        images = np.repeat(images[..., None], 3, axis=-1)
    images = np.require(images.transpose(0, 3, 1, 2), requirements=["C", "W"])  # W: torch shares its memory
    return Split(torch.from_numpy(images), torch.from_numpy(labels.reshape(-1).astype(np.int64)))


def _stratified(labels: torch.Tensor, count: int, seed: int) -> np.ndarray:
    """`count` indices, sorted: a seeded choice in the classes' proportions, one or more of each class.

    Image k of a class of n has rank k/n and the lowest ranks are taken (Adams' apportionment). Unlike
    scikit-learn's ``train_test_split`` this leaves no class out, and 200 images are part of the 400.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    shuffled, rank = labels.numpy()[order], np.empty(len(labels))
    for label in np.unique(shuffled):
        at = np.flatnonzero(shuffled == label)
        rank[at] = np.arange(len(at)) / len(at)
    return np.sort(order[np.argsort(rank, kind="stable")[:count]])


def _split_off(split: Split, fraction: float, seed: int) -> tuple[Split, Split]:
    """(the rest, about `fraction` of the images), both stratified."""
    count = max(round(fraction * len(split)), len(split.labels.unique()))
    chosen = np.zeros(len(split), dtype=bool)
    chosen[_stratified(split.labels, count, seed)] = True
    return split.take(np.flatnonzero(~chosen)), split.take(np.flatnonzero(chosen))


def _three_splits(parts: data_files.Parts, seed: int, val_fraction: float = VAL_FRACTION) -> dict[str, Split]:
    """train, val and test: as given, or val taken from train, or all three from one part called "all".

    A test split made here is the same for every seed.
    """
    splits = {part: _to_split(*arrays) for part, arrays in parts.items()}
    if "all" in splits:
        splits["train"], splits["test"] = _split_off(splits.pop("all"), TEST_FRACTION, seed=0)
    if "val" not in splits:
        splits["train"], splits["val"] = _split_off(splits["train"], val_fraction, seed)
    return splits


def _keep(data: ImageData, count: int, seed: int, name: str) -> ImageData:
    """The `count` training images of ``name:count``; val and test stay whole."""
    if not data.num_classes <= count <= len(data.train):
        raise ValueError(
            f"'{name}:{count}' asks for {count} training images; it must be from {data.num_classes} "
            f"(the number of classes) to {len(data.train)} (all there are)."
        )
    train = data.train.take(_stratified(data.train.labels, count, seed))
    return replace(data, slug=f"{data.slug}-{count}", train=train)
