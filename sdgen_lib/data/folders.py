"""Reader of a folder with a sub-folder of images per class, or of ready-made splits that hold such sub-folders.

What cannot be used is a ValueError that names the folder or the files and says what to mend. What is passed over,
other than the leftovers of systems and programs, is said in a note.
"""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from ..config.messages import printable
from . import kept, pictures
from .images import BAR_AFTER
from .parts import PARTS, Found, check_class_names, check_memory, composed, make_slug, reason

SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "validate", "eval", "evaluation", "dev"),
    "test": ("test", "testing"),
}
SPLITS_TEXT = (
    "splits are called train/, test/ and maybe val/ (or training/, testing/, valid/, validation/, validate/, eval/, "
    "evaluation/, dev/)"
)
# What Macs, Windows and network disks leave everywhere, beside the hidden files; in lower case.
LEFTOVERS = {"__macosx", "@eadir", "#recycle", "@recycle", "$recycle.bin", "system volume information", "lost+found"}
LEFTOVERS |= {"thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "picasa.ini", "icon\r"}
# And the files that they leave beside each file: Windows' streams ("cat.png:Zone.Identifier"), which its Linux and
# network disks make files of; Synology's disks; the edits of a picture by iPhones, Lightroom, darktable, RawTherapee.
LEFT_BESIDE = ("zone.identifier", "zone.identifier:$data", ":encryptable", ":afp_afpinfo", ":afp_resource")
LEFT_BESIDE += (":com.dropbox.attrs", ":com.dropbox.attributes", "@synoeastream", "@synoresource")
LEFT_BESIDE += (".aae", ".xmp", ".pp3")
# Only to tell a folder of pictures from one of tables or notes; what a file is, its content says.
PICTURE_SUFFIXES = {*".png .jpg .jpeg .jpe .jfif .mpo .bmp .gif .tif .tiff .webp .ppm .pgm .pbm .heic .avif".split()}


def read_folder(path: Path, size: int, keep_in: Path | None = None) -> Found:
    """The images of the class folders in `path`, or in its splits; every image becomes ``(size, size, 3)``.

    A class is all the images in its folder and in the folders below that. The decoded images are kept in the folder
    `keep_in`, and found there again as long as no name and no byte of the dataset changes.
    """
    splits, notes = _splits(path)
    folders = splits or {"all": path}
    classes = {part: _class_folders(folder, is_split=bool(splits)) for part, folder in folders.items()}
    first = next(iter(folders))
    class_names = tuple(sorted({composed(folder.name) for folder in classes[first]}))
    check_class_names(class_names, path)
    files, labels, parts = [], [], {}
    for part, folder in folders.items():
        begin, deep = len(files), {}
        for class_folder in classes[part]:
            name = composed(class_folder.name)
            if name not in class_names:
                first_name = folders[first].name
                raise ValueError(
                    f"{printable(class_folder)} is a class that {first_name}/ does not have; add it there or remove it."
                )
            found = list(_files(class_folder))
            if not found:
                raise ValueError(f"{printable(class_folder)} is an empty class folder; put images in it or remove it.")
            if inner := {
                file.relative_to(class_folder).parts[0]: None for file in found if file.parent != class_folder
            }:
                _refuse_splits_in_a_class(class_folder, inner)
                deep[class_folder.name] = list(inner)
            files += found
            labels += [class_names.index(name)] * len(found)
        parts[part] = slice(begin, len(files))
        notes += _notes(folder, deep)
    images, digest = _read_images(files, path, size, keep_in)
    labels = np.array(labels)
    slug = make_slug(path.resolve().name, digest)
    return Found(
        slug,
        class_names,
        {part: (images[rows], labels[rows]) for part, rows in parts.items()},
        tuple(notes),
        {part: tuple(file.relative_to(path).as_posix() for file in files[rows]) for part, rows in parts.items()},
    )


# --- which folders are what ---


def _visible(folder: Path) -> list[Path]:
    """What is in a folder, by name, without what is hidden and without what systems and programs leave there."""
    try:
        found = [p for p in folder.iterdir() if not _is_left(p)]
    except OSError as error:
        raise ValueError(
            f"{printable(folder)} cannot be read ({error.strerror}); allow reading it, or leave it out."
        ) from error
    return sorted(found, key=lambda p: composed(p.name))


def _is_left(path: Path) -> bool:
    """Whether it is hidden, or what a system or a program leaves."""
    name = path.name.lower()
    return name.startswith(".") or name in LEFTOVERS or (name.endswith(LEFT_BESIDE) and not os.path.isdir(path))


def _folders(folder: Path) -> list[Path]:
    """The folders in a folder. A link to a folder is refused: it may lead anywhere, or round in a circle."""
    found = [path for path in _visible(folder) if os.path.isdir(path)]
    for path in found:
        if path.is_symlink():
            raise ValueError(f"{printable(path)} is a link to a folder; put the folder itself there, or remove it.")
    return found


def _files(folder: Path) -> Iterator[Path]:
    """Everything in a folder, and in the folders in it, that is no folder."""
    for path in _visible(folder):
        if os.path.isdir(path) and not path.is_symlink():
            yield from _files(path)
        else:
            yield path


def _pictures(folder: Path) -> list[Path]:
    """What looks like a picture directly in a folder."""
    return [p for p in _visible(folder) if p.suffix.lower() in PICTURE_SUFFIXES and not os.path.isdir(p)]


def _holds_pictures(folder: Path) -> bool:
    """Whether something that looks like a picture is in a folder, or in the folders in it."""
    return bool(_pictures(folder)) or any(map(_holds_pictures, _folders(folder)))


def _class_folders(folder: Path, is_split: bool) -> list[Path]:
    """The folders in `folder`; raises ValueError where there are none, or where the classes seem to lie deeper."""
    found = _folders(folder)
    if not found:
        what = "has no images" if is_split and not list(_files(folder)) else "has no sub-folders"
        raise ValueError(f"{printable(folder)} {what}; it must hold one sub-folder of images per class.")
    inner = folder
    while len(below := _folders(inner)) == 1 and not _pictures(inner):
        inner = below[0]
    if inner != folder and len(below) > 1:
        do = f"move them up into {printable(folder)}" if is_split else "give that"
        raise ValueError(
            f"{printable(folder)} holds one folder, {_listed(found)}; the classes seem to lie in {printable(inner)}: "
            f"{do}."
        )
    return found


def _part(name: str) -> str | None:
    """The part that a folder of this name is."""
    return next((part for part, names in SPLITS.items() if name.lower() in names), None)


def _part_alike(name: str) -> str | None:
    """The part that a word in the name speaks of, as in ``test_set``, ``seg-train``, ``ValImages`` or ``trainset``."""
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)
    return next((part for word in words if (part := _part(word.lower().removesuffix("set")))), None)


def _splits(path: Path) -> tuple[dict[str, Path], list[str]]:
    """The ready-made splits in `path` by their part, none if it holds classes; and what is to be said of the choice.

    Splits are folders of folders: a folder called train that holds pictures is a class.
    """
    folders = _folders(path)
    flat = [f for f in folders if _part_alike(f.name) and not _folders(f) and _pictures(f)]
    splits = [f for f in folders if _part(f.name) and f not in flat]
    alike = [f for f in folders if not _part(f.name) and _part_alike(f.name) and f not in flat and _folders(f)]
    if not splits:
        if len({_part_alike(f.name) for f in alike}) > 1:
            raise ValueError(f"{printable(path)}: {_listed(alike)} look like splits; {SPLITS_TEXT}: rename them.")
        several = len({_part_alike(f.name) for f in flat}) > 1
        if (several or len(flat) == 1) and flat == [f for f in folders if _holds_pictures(f)]:  # and no class
            holds = "hold" if several else "holds"
            raise ValueError(
                f"{printable(path)}: {_listed(flat)} {holds} images and no class folders; a split holds a sub-folder "
                "of images per class (labels in a table are not read): sort the images into such folders."
            )
        note = (
            f"{_listed(flat)} of {printable(path)}: taken for classes, since they hold images; a split holds a folder "
            "per class"
        )
        return {}, [note] if several else []
    if flat:
        raise ValueError(
            f"{printable(flat[0])} holds images and no class folders; beside {_listed(splits)} it must hold one "
            "sub-folder per class, or be moved away."
        )
    if alike:
        raise ValueError(
            f"{printable(path)} holds {_listed(alike)} beside {_listed(splits)}; {SPLITS_TEXT}: rename it, or "
            "move it away."
        )
    found: dict[str, Path] = {}
    for folder in splits:
        if (other := found.setdefault(_part(folder.name), folder)) != folder:
            raise ValueError(
                f"{printable(path)} holds {other.name}/ and {folder.name}/, the same split twice; keep one of them."
            )
    others = [f for f in folders if f not in splits]
    if not {"train", "test"} <= set(found):
        beside, one = f", beside {_listed(others)}" if others else "", found.get("train", splits[0])
        raise ValueError(
            f"{printable(path)} holds {_listed(splits)} only{beside}; ready-made splits need both train/ and test/. "
            f"Add what is missing, or give one folder of classes, as {printable(one)}, to have the splits made."
        )
    notes = [f"{_listed(others)} of {printable(path)} beside {_listed(splits)}: not used"] if others else []
    return {part: found[part] for part in PARTS if part in found}, notes


def _refuse_splits_in_a_class(folder: Path, inner: Iterable[str]) -> None:
    if {"train", "test"} <= {_part(name) for name in inner}:
        raise ValueError(
            f"{printable(folder)} is a class folder with splits in it; splits must hold the classes, as in "
            f"train/{printable(folder.name)} and test/{printable(folder.name)}. If it is a dataset of its own, give "
            f"{printable(folder)}."
        )


def _notes(folder: Path, deep: dict[str, list[str]]) -> list[str]:
    """What may surprise in how `folder` was read; `deep` has the names of the folders in its class folders."""
    notes = []
    if loose := _pictures(folder):
        notes.append(
            f"{len(loose)} image(s) of {printable(folder)} beside the class folders, as {printable(loose[0].name)}: "
            "not used"
        )
    if deep:
        name, inner = next(iter(deep.items()))
        notes.append(
            f"{len(deep)} class folder(s) of {printable(folder)} hold folders, as {printable(name)}/ holds "
            f"{_listed(inner)}: all images below a class folder are of its class"
        )
    return notes


def _listed(folders: Iterable[Path | str]) -> str:
    names = [f"{_cut(printable(Path(folder).name), 60)}/" for folder in folders]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[:length] + "..."


# --- their images ---


def _read_images(files: list[Path], root: Path, size: int, keep_in: Path | None):
    """(uint8 ``(N, size, size, 3)``, the running digest of all the names and bytes)."""
    try:
        check_memory(len(files) * size * size * 3)
    except ValueError as error:
        raise ValueError(
            f"{printable(root)}: {len(files)} images of {size}x{size} pixels are too many: {error}."
        ) from error
    bad: dict[Path, Exception] = {}
    place, digest = None, hashlib.sha256()
    if keep_in is not None and not keep_in.is_symlink():  # a linked folder may be anywhere
        before = hashlib.sha256()
        for _ in _contents(files, root, bad, before, "Reading"):
            pass  # only hashed
        place = kept.place(keep_in, before.hexdigest(), size)
        if not bad and (images := kept.load(place, len(files), size)) is not None:
            return images, before
    images = np.empty((len(files), size, size, 3), np.uint8)
    odd: dict[Path, Exception] = {}
    for i, content in _contents(files, root, bad, digest, "Decoding"):
        with warnings.catch_warnings(record=True) as said:  # a decoder does not know what the file is called
            warnings.simplefilter("always")
            try:
                images[i] = pictures.decode(content, size)
            except Exception as error:  # a damaged picture makes its decoder raise nearly anything
                bad[files[i]] = error
        if said:
            odd[files[i]] = said[0].message
    if bad:
        raise _unreadable({file: bad[file] for file in files if file in bad}, root)
    if odd:
        warnings.warn(f"{len(odd)} image(s) of {printable(root)} are odd, and used: {_some(odd, root)}", stacklevel=5)
    if place and place == kept.place(keep_in, digest.hexdigest(), size):  # else something was changed meanwhile
        kept.save(place, images)
    return images, digest


def _contents(files: list[Path], root: Path, bad: dict, digest, doing: str) -> Iterator[tuple[int, bytes]]:
    """(number, content) of each file that can be read, its name and bytes added to `digest`; the others go to `bad`."""
    for i, file in enumerate(tqdm(files, desc=f"{doing} {printable(root.name)}", unit="image", delay=BAR_AFTER)):
        if file in bad:
            continue
        try:
            content = pictures.read(file, root)
        except (OSError, ValueError) as error:
            bad[file] = error
            continue
        name = os.fsencode(composed(file.relative_to(root).as_posix()))
        digest.update(b"%s\0%d\0" % (name, len(content)) + content)
        yield i, content


def _unreadable(bad: dict[Path, Exception], root: Path) -> ValueError:
    """All that is wrong in a dataset at once: the first five files with the reasons, and how many there are."""
    allowed = f"Allowed are {pictures.FORMATS_TEXT}, one picture a file."
    if len(bad) == 1:
        ((file, error),) = bad.items()
        why = f"{printable(file)} is not an image that can be read ({reason(error)})"
        return ValueError(f"{why}; mend or remove it. {allowed}")
    return ValueError(
        f"{printable(root)} holds {len(bad)} files that are not images that can be read: {_some(bad, root)}; mend or "
        f"remove them. {allowed}"
    )


def _some(reasons: dict[Path, Exception], root: Path) -> str:
    """The first five of the files with the reasons, and how many more there are."""
    some = [f"{_cut(printable(f.relative_to(root)), 80)} ({reason(reasons[f], 80)})" for f in list(reasons)[:5]]
    return ", ".join(some) + (f" and {len(reasons) - 5} more" if len(reasons) > 5 else "")


# --- folders that this package writes ---


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


def only_train(path: Path) -> Path:
    """The folder train/ of one that holds nothing else but files, if that holds the classes; else the folder itself."""
    folders = _folders(path)
    return folders[0] if [f.name for f in folders] == ["train"] and _folders(folders[0]) else path
