"""Readers of the named datasets.

- ``digits``: the 1797 handwritten digits inside scikit-learn; nothing is downloaded.
- ``cifar10``, ``cifar100``: through torchvision.
- ``pathmnist`` ... ``organsmnist``: the 2-D, one-label-per-image sets of MedMNIST v2, at 28 pixels;
  ``pathmnist_64``, ``_128`` and ``_224`` are the larger files that MedMNIST publishes beside them.

Downloads are checked against their MD5 and kept in the folder that the environment variable ``SDGEN_DATA`` names
(``~/.cache/sdgen_lib`` without it).

medmnist, scikit-learn and torchvision's datasets are imported where they are used: they take seconds, and
medmnist makes a folder ``~/.medmnist``, which only users of its sets need.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

import numpy as np

from ..config.messages import printable
from .parts import Parts

CIFAR = ("cifar10", "cifar100")
MEDMNIST = (
    "pathmnist",
    "dermamnist",
    "octmnist",
    "pneumoniamnist",
    "retinamnist",
    "breastmnist",
    "bloodmnist",
    "tissuemnist",
    "organamnist",
    "organcmnist",
    "organsmnist",
)
MEDMNIST_SUFFIXES = ("", "_64", "_128", "_224")  # medmnist's own file names: none is 28 pixels


def names() -> list[str]:
    """Every name that `read` knows."""
    return ["digits", *CIFAR, *(flag + suffix for flag in MEDMNIST for suffix in MEDMNIST_SUFFIXES)]


def known(text: str) -> str | None:
    """The one of `names()` that a text means, in small or capital letters; ``pathmnist_28`` is ``pathmnist``."""
    name = text.lower()
    if name.removesuffix("_28") in MEDMNIST:
        name = name.removesuffix("_28")
    return name if name in names() else None


def read(name: str) -> tuple[tuple[str, ...], Parts]:
    """(class names, parts) of one of `names()`: the splits that are published, or one part called "all".

    Raises:
        ConnectionError: a download failed; says where to put the files by hand.
        ValueError: what was downloaded is not what MedMNIST publishes.
    """
    if name == "digits":
        from sklearn.datasets import load_digits

        scans = load_digits()  # values 0..16
        return tuple("0123456789"), {"all": (np.round(scans.images * (255 / 16)).astype(np.uint8), scans.target)}
    return _read_cifar(name) if name in CIFAR else _read_medmnist(name)


def refusal(flag: str) -> str | None:
    """Why this set of MedMNIST's cannot be used, in lower case and without its size; None for every other name."""
    if flag == "chestmnist":
        return "it is multi-label: one image can have several labels or none"
    if re.fullmatch("(organ|nodule|adrenal|fracture|vessel|synapse)mnist3d", flag):
        return "its samples are 3-D volumes"
    return None


def cache_folder() -> Path:
    folder = Path(os.environ.get("SDGEN_DATA") or "~/.cache/sdgen_lib").expanduser().absolute()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _move_aside(path: Path) -> None:
    """Rename a damaged file to ``<name>.damaged``, and say so."""
    aside = path.with_name(path.name + ".damaged")
    with contextlib.suppress(FileNotFoundError):  # another process was faster
        os.replace(path, aside)
    print(f"{path.name} is damaged; it was moved aside to {printable(aside)} and is downloaded again.", flush=True)


def _no_download(name: str, url: str, target: Path, error: Exception) -> ConnectionError:
    return ConnectionError(
        f"{name!r} could not be downloaded from {url} ({error}); check the network, or put the file at "
        f"{printable(target)} by hand, or use dataset 'digits', which needs no download."
    )


def _read_cifar(name: str) -> tuple[tuple[str, ...], Parts]:
    from torchvision import datasets

    cls, folder = getattr(datasets, name.upper()), cache_folder()
    try:  # torchvision checks the MD5 of what is there, and downloads only what is missing or wrong
        train, test = (cls(folder, train=train, download=True) for train in (True, False))
    except (OSError, RuntimeError) as error:
        raise _no_download(name, cls.url, folder / cls.filename, error) from error
    parts = {part: (split.data, np.array(split.targets)) for part, split in (("train", train), ("test", test))}
    return tuple(train.classes), parts


def _read_medmnist(name: str) -> tuple[tuple[str, ...], Parts]:
    """Class names in the order of their numbers."""
    import medmnist
    from torchvision.datasets.utils import check_integrity

    flag, _, size = name.partition("_")
    suffix = name.removeprefix(flag)
    info, folder, size = medmnist.INFO[flag], cache_folder(), int(size or 28)
    cls, path, md5 = getattr(medmnist, info["python_class"]), folder / f"{name}.npz", info[f"MD5{suffix}"]
    if path.exists() and not check_integrity(path, md5):  # a download that was killed, say
        _move_aside(path)
    if not path.exists():
        try:
            cls("train", download=True, root=folder, size=size)
        except RuntimeError as error:
            path.unlink(missing_ok=True)  # a download that broke off; it was not there before
            raise _no_download(name, info[f"url{suffix}"], path, error.__context__ or error) from error
    if not check_integrity(path, md5):
        raise ValueError(
            f"{printable(path)} is not what MedMNIST publishes: its MD5 is not {md5}; delete it and run again."
        )
    splits = {part: cls(part, root=folder, size=size) for part in ("train", "val", "test")}
    class_names = tuple(info["label"][key] for key in sorted(info["label"], key=int))
    return class_names, {part: (split.imgs, split.labels) for part, split in splits.items()}
