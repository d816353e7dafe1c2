"""Files that appear whole or not at all, and locks between processes."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import sys
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import filelock
import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

T = TypeVar("T")
WINDOWS = sys.platform == "win32"
WINDOWS_PATH = 259  # characters of a path there, unless long paths are switched on
LARGEST_JSON = 2**26  # bytes; ours have some thousands
NO_LOCKS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


class DamagedFile(ValueError):
    """A file that is not what was written; it has been moved aside."""


# --- locks ---


@contextlib.contextmanager
def lock(path: Path, waiting_for: str | None = None) -> Iterator[None]:
    """Holds the lock file ``path``; another process that wants it waits, having said so.

    The operating system keeps the lock, so that it ends with its process, however that ends. In a folder that cannot be
    written to there is nothing to guard, and a file system without locks cannot.
    """
    guard = filelock.FileLock(path)
    try:
        guard.acquire(blocking=False)
    except filelock.Timeout:
        if waiting_for:
            print(f"Waiting: another process is working on {waiting_for} ...", flush=True)
        guard.acquire()
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    try:
        yield
    finally:
        guard.release()


# --- names ---


def portable(name: str) -> str:
    """``name`` as a file or folder may be called on every system; most names are that already.

    Windows allows none of ``<>:"/\\|?*``, no control characters, no dot or space at the end, and no device's name, as
    ``con`` or ``aux.npz``, in capitals or not. "_" is the name of nothing.
    """
    plain = re.sub(r'[<>:"/\\|?*\x00-\x1f]+', "-", name).rstrip(". ")
    device = re.fullmatch(r"(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³]) *(\..*)?", plain, re.IGNORECASE)
    return f"_{plain}" if device or not plain else plain


# --- writing ---


def patiently(work: Callable[[], T]) -> T:
    """``work()``; on Windows tried again for a second where it is not permitted.

    There a file that another process has open can be neither replaced nor deleted, nor be opened while it is being
    replaced. Everywhere else a permission that is missing stays missing.
    """
    for pause in (0.02, 0.05, 0.1, 0.2, 0.3, 0.4) if WINDOWS else ():
        try:
            return work()
        except PermissionError:
            time.sleep(pause)
    return work()


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path``; what was written there replaces ``path`` at the end, at once, or not at all.

    Raises OSError that says what to do if the folder cannot be written to or the disk is full. An error in reading
    something else meanwhile, another file or the pieces of `write_npy`, is raised as it is.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb+") as file:  # "rb" would do on Linux; Windows syncs only what may be written
            os.fsync(file.fileno())
        patiently(lambda: os.replace(temporary, path))
        _sync_folder(path.parent)
    except (OSError, SafetensorError) as error:
        if _of_reading(error, path):
            raise
        raise _not_written(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _of_reading(error: Exception, path: Path) -> bool:
    """Whether an error that came up while ``path`` was written is one of reading something else."""
    if getattr(error, "of_reading", False):
        return True
    name = getattr(error, "filename", None)
    if not isinstance(name, (str, os.PathLike)):
        return False
    named, folder = Path(name), path.parent
    temporary = named.parent == folder and named.name.startswith(".")
    return not temporary and named not in (path, folder, *folder.parents)


def _read(pieces: Iterable[T]) -> Iterator[T]:
    """The ``pieces``; an OSError in making one is marked as an error of reading."""
    try:
        yield from pieces
    except OSError as error:
        error.of_reading = True
        raise


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside ``path``; it becomes ``path`` at the end, at once, or is removed.

    Raises FileExistsError if ``path`` is already there: nothing of the reader's is ever replaced.
    """
    path = Path(path).expanduser().absolute()
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"{path} is already there: give a folder that does not exist yet, or remove it.")
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if path.exists():  # empty, as seen above; not every system replaces a folder
            path.rmdir()
        patiently(lambda: os.replace(temporary, path))
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _not_written(path: Path, error: Exception) -> OSError:
    number = getattr(error, "errno", None) or errno.EIO
    reason = getattr(error, "strerror", None) or str(error)
    if WINDOWS and len(str(path)) + 10 > WINDOWS_PATH:  # a temporary name is longer
        reason += f"; its path has {len(str(path))} characters, and Windows takes {WINDOWS_PATH}"
    return OSError(
        number, f"{path} could not be written ({reason}): make room there or allow writing, or give another runs_dir"
    )


def _sync_folder(folder: Path) -> None:
    """The new name of a file survives a power cut only once its folder is on the disk."""
    with contextlib.suppress(OSError):  # some file systems have no such thing
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_leftovers(folder: Path) -> None:
    """Deletes the temporary files that killed writers left in ``folder``. The caller holds the folder's lock."""
    for path in folder.glob(".*"):
        ours = path.suffix[1:].isdecimal()
        theirs = re.fullmatch(r"\.tmp\w{6}", path.name)  # safetensors writes beside what it was told to write, too
        if (ours or theirs) and path.is_file():
            path.unlink(missing_ok=True)


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Tensors by name -> one .safetensors file, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode  # as of any new file here; safetensors lets nobody else read its own
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary, metadata)
        temporary.chmod(mode)


def write_npy(archive: zipfile.ZipFile, name: str, dtype: np.dtype, shape: tuple[int, ...], pieces: Iterable) -> None:
    """Writes an array of ``shape`` as member ``name`` of an .npz archive, from pieces along its first axis.

    The result is what `numpy.savez` would write; the array is never held whole.
    """
    with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for piece in _read(pieces):
            file.write(np.ascontiguousarray(piece, dtype).tobytes())


def save_json(path: Path, value: Any) -> None:
    """Writes ``value`` as JSON, whole or not at all. Raises TypeError for what JSON cannot hold."""
    content = (json.dumps(value, indent=1) + "\n").encode()  # as bytes: a line's end is the same on every system
    with whole_file(path) as temporary:
        temporary.write_bytes(content)


def move_aside(path: Path) -> Path:
    """Renames a damaged file, and says so; returns where it is now."""
    aside = path.with_name(path.name + ".damaged")
    with contextlib.suppress(FileNotFoundError):  # another process was faster
        patiently(lambda: os.replace(path, aside))
    print(f"{path.name} is damaged; it was moved aside to {aside} and is made again.", flush=True)
    return aside


# --- reading ---


def checksum(path: Path) -> str:
    """The SHA-256 of a file, as hexadecimal text."""
    with patiently(lambda: open(path, "rb")) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Reads a .safetensors file. Raises FileNotFoundError, or DamagedFile once a damaged file has been moved aside."""
    try:
        found = patiently(lambda: load_file(path))
    except SafetensorError as error:
        move_aside(path)
        raise DamagedFile(f"{path} was damaged and has been moved aside; run this again to remake it.") from error
    if WINDOWS:  # where a file cannot be replaced as long as tensors are mapped to it
        found = {name: tensor.clone() for name, tensor in found.items()}
    return found


def load_json(path: Path, default: Any = None) -> Any:
    """What ``path`` holds, or ``default`` where there is no such file or no JSON of ours in it. Changes nothing."""
    try:
        if path.stat().st_size > LARGEST_JSON:
            return default
        return json.loads(patiently(path.read_bytes))
    except (OSError, ValueError, RecursionError):
        return default
