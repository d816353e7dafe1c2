"""Files that appear whole or not at all, whose damage is noticed, and locks between processes.

A file inside a run folder has its SHA-256 in the folder's ``manifest.json``, under "files". One that does not match, or
cannot be read, is renamed to ``<name>.damaged``; whoever made it makes it again.
"""

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

MANIFEST = "manifest.json"
_checked: dict[Path, tuple[int, int, int]] = {}  # what was found whole, so that gigabytes are not read twice


class DamagedFile(ValueError):
    """A file that is not what was written; it has been moved aside."""


# --- locks ---


def lock_path(path: Path) -> Path:
    """Where the lock of ``path`` lies: beside it, or of what is in a run folder, and of the folder, beside that."""
    run_folder = path.parent if path.name == MANIFEST else manifest.parent if (manifest := _manifest_of(path)) else None
    if run_folder is None:
        return path.with_name(f".{path.name}.lock")
    return run_folder.with_name(f".{run_folder.name}.{'.'.join(path.relative_to(run_folder).parts)}.lock")


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
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
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
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
            _note_checksum(path, file)
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


def remove_leftovers(folder: Path, name: str = "") -> None:
    """Deletes the temporary files that killed writers of ``name`` (all, if empty) left; for who holds their lock."""
    for path in folder.glob(".*"):
        ours = path.name.startswith(f".{name}") and path.suffix[1:].isdecimal()
        # safetensors writes beside what it was told to write, too
        theirs = re.fullmatch(r"\.tmp\w{6}", path.name) and (not name or name.endswith(".safetensors"))
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
    """An array of ``shape`` as member ``name`` of an .npz archive, from pieces along its first axis: what `numpy.savez`
    would write, without holding it whole."""
    with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for piece in pieces:
            file.write(np.ascontiguousarray(piece, dtype).tobytes())


def save_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=1) + "\n"
    with whole_file(path) as temporary:
        temporary.write_text(text)


# --- checksums ---


def _manifest_of(path: Path) -> Path | None:
    """The manifest of the run folder that ``path`` lies in."""
    if path.name == MANIFEST:
        return None
    return next((folder / MANIFEST for folder in path.parents[:2] if (folder / MANIFEST).is_file()), None)


@contextlib.contextmanager
def changed_manifest(path: Path) -> Iterator[dict[str, Any]]:
    """The manifest ``path``, to be changed; written at the end. Two processes change it one after the other."""
    with lock(lock_path(path)):
        manifest = load_manifest(path)
        before = json.dumps(manifest)
        yield manifest
        if json.dumps(manifest) != before or not path.exists():
            remove_leftovers(path.parent, MANIFEST)
            save_json(path, manifest)


def load_manifest(path: Path) -> dict[str, Any]:
    """{"steps": {...}, "files": {...}, ...}; empty if there is none; a damaged one is moved aside."""
    manifest = load_json(path, {})
    kinds = {"steps": dict, "files": list}  # of what stands in each part under a name
    parts = {part: manifest.get(part, {}) if isinstance(manifest, dict) else None for part in kinds}
    if not all(isinstance(of, dict) and all(isinstance(v, kinds[part]) for v in of.values())
               for part, of in parts.items()):  # fmt: skip
        move_aside(path)
        manifest = {}
    return {**manifest, "steps": manifest.get("steps", {}), "files": manifest.get("files", {})}


def _note_checksum(path: Path, file) -> None:
    """Puts the checksum of what will be ``path`` into the manifest, before it appears there.

    Beside it stays the last one: whoever is killed in between leaves the old file.
    """
    if manifest_path := _manifest_of(path):
        checksum = hashlib.file_digest(file, "sha256").hexdigest()
        with changed_manifest(manifest_path) as manifest:
            name = path.relative_to(manifest_path.parent).as_posix()
            older = [other for other in manifest["files"].get(name, []) if other != checksum]
            manifest["files"][name] = [checksum, *older[:1]]


def note_checksum(path: Path) -> None:
    """As `whole_file` does, for a finished file that was written in another way."""
    with open(path, "rb") as file:
        _note_checksum(path, file)


def forget_checksum(path: Path) -> None:
    """For a file that is going to change in another way than by `whole_file`."""
    if manifest_path := _manifest_of(path):
        with changed_manifest(manifest_path) as manifest:
            manifest["files"].pop(path.relative_to(manifest_path.parent).as_posix(), None)


def discard(path: Path) -> None:
    """Deletes a file that is no longer needed, and its checksum; nothing if it is not there."""
    if path.exists():
        forget_checksum(path)
        path.unlink(missing_ok=True)


def move_aside(path: Path) -> Path:
    """Renames a damaged file, and says so; returns where it is now."""
    aside = path.with_name(path.name + ".damaged")
    with contextlib.suppress(FileNotFoundError):  # another process was faster
        os.replace(path, aside)
    print(f"{path.name} is damaged; it was moved aside to {aside} and is made again.", flush=True)
    return aside


def is_whole(path: Path) -> bool:
    """Whether there is a file ``path`` and, in a run folder, it is what was written; if not it is moved aside."""
    if not path.is_file():
        return False
    stat = path.stat()
    seen = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
    manifest_path = _manifest_of(path)
    if manifest_path is None or _checked.get(path) == seen:
        return True
    expected = load_manifest(manifest_path)["files"].get(path.relative_to(manifest_path.parent).as_posix())
    if expected:
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() not in expected:
                move_aside(path)
                return False
    _checked[path] = seen
    return True


# --- reading ---


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Raises FileNotFoundError, or DamagedFile once the damaged file has been moved aside."""
    if path.is_file() and is_whole(path):
        try:
            return load_file(path)
        except SafetensorError:
            move_aside(path)
    elif not path.with_name(path.name + ".damaged").exists():
        raise FileNotFoundError(f"No file {path}; delete its folder, so that the step is done again.")
    raise DamagedFile(f"{path} was damaged and has been moved aside; run this again to remake it.")


def load_json(path: Path, default: Any = None) -> Any:
    """What ``path`` holds, or ``default`` without it; one that is damaged is moved aside."""
    if not is_whole(path):
        return default
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        move_aside(path)
        return default
