"""Files that appear whole or not at all, and locks between processes."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

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


# --- writing ---


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path``; what was written there replaces ``path`` at the end, at once, or not at all.

    Raises OSError that says what to do if the folder cannot be written to or the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb+") as file:  # "rb" would do on Linux; Windows syncs only what may be written
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, SafetensorError) as error:
        raise _not_written(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


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
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _not_written(path: Path, error: Exception) -> OSError:
    number = getattr(error, "errno", None) or errno.EIO
    reason = getattr(error, "strerror", None) or str(error)
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
        for piece in pieces:
            file.write(np.ascontiguousarray(piece, dtype).tobytes())


def save_json(path: Path, value: Any) -> None:
    """Writes ``value`` as JSON, whole or not at all. Raises TypeError for what JSON cannot hold."""
    text = json.dumps(value, indent=1) + "\n"
    with whole_file(path) as temporary:
        temporary.write_text(text)


def move_aside(path: Path) -> Path:
    """Renames a damaged file, and says so; returns where it is now."""
    aside = path.with_name(path.name + ".damaged")
    with contextlib.suppress(FileNotFoundError):  # another process was faster
        os.replace(path, aside)
    print(f"{path.name} is damaged; it was moved aside to {aside} and is made again.", flush=True)
    return aside


# --- reading ---


def checksum(path: Path) -> str:
    """The SHA-256 of a file, as hexadecimal text."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Reads a .safetensors file. Raises FileNotFoundError, or DamagedFile once a damaged file has been moved aside."""
    try:
        return load_file(path)
    except SafetensorError as error:
        move_aside(path)
        raise DamagedFile(f"{path} was damaged and has been moved aside; run this again to remake it.") from error


def load_json(path: Path, default: Any = None) -> Any:
    """What ``path`` holds, or ``default`` where there is no such file or no JSON in it. Changes nothing."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return default
