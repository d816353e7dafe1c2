"""The run folder: where each step writes, who may, and the manifest."""

from __future__ import annotations

import contextlib
import datetime
import functools
import hashlib
import importlib.metadata
import os
import platform
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from . import files
from .files import (
    DamagedFile,
    discard,
    forget_checksum,
    is_whole,
    load_json,
    load_tensors,
    note_checksum,
    save_json,
    save_tensors,
    whole_file,
    whole_folder,
    write_npy,
)
from .settings import Settings, shown

__all__ = ["DamagedFile", "discard", "forget_checksum", "is_whole", "load_json", "load_tensors", "note_checksum"]
__all__ += ["save_json", "save_tensors", "whole_file", "whole_folder", "Run", "STEP_FIELDS", "default_runs_dir"]
__all__ += ["one_at_a_time", "write_npy"]

VERSIONS = ("torch", "diffusers", "transformers", "optuna", "numpy")

# The settings that each step's result depends on (and, through its predecessors, nothing else).
STEP_FIELDS = {
    "1_transfer": ("class_encoder_rank", "class_encoder_tokens", "class_encoder_start", "transfer_epochs",
                   "transfer_batch_size", "transfer_learning_rate", "weight_decay", "clip_norm", "image_size"),
    "2_tune": ("unconditional", "sampler", "antialias", "num_images", "steps_min", "steps_max", "guidance_max",
               "select_on", "pruning", "search_plateau_patience", "search_stop_patience", "classifier_width",
               "classifier_shortcut", "classifier_epochs", "classifier_batch_size", "classifier_epoch_images",
               "classifier_epoch_limit",
               "classifier_learning_rate", "label_smoothing", "plateau_patience", "stop_patience"),
    "3_finetune": ("finetune_method", "lora_rank", "optimizer", "finetune_epochs", "finetune_batch_size",
                   "finetune_learning_rate", "weight_decay", "clip_norm"),
    "4_retune": ("num_images",),
    "5_datasets": (),  # each table row and block notes its own
}  # fmt: skip


def default_runs_dir() -> Path:
    """`runs/` beside `notebooks/` in a checkout, so that JupyterLab (whose kernels start in notebooks/) and papermill
    (the caller's folder) share it; of the working directory when the package is installed elsewhere."""
    checkout = Path(__file__).resolve().parents[1]
    return (checkout if (checkout / "notebooks").is_dir() else Path.cwd()) / "runs"


def _refuse_link(path: Path, base: Path) -> None:
    """Raises ValueError if ``path``, which lies in ``base``, is really elsewhere."""
    where = os.path.realpath(path)
    if not Path(where).is_relative_to(os.path.realpath(base)):
        raise ValueError(f"{path} is a link that leads out of {base}, to {where}: delete it or give another runs_dir.")


def one_at_a_time(step: str) -> Callable:
    """A decorator: while one process is in this step of a run, another one waits, and then finds it done.

    Of a method of something with a ``run``.
    """

    def decorate(method: Callable) -> Callable:
        @functools.wraps(method)
        def guarded(self, *args, **options):
            with self.run.lock(step):
                return method(self, *args, **options)

        return guarded

    return decorate


class Run:
    """One run's folder, ``<runs_dir>/<dataset>/<backbone>-<recipe>-seed<k>/``.

    Attributes: ``path``, and ``settings`` as asked for now. ``manifest.json`` holds the settings, versions and
    timings of each finished step, and the checksum of each file.

    Raises OSError if the folder cannot be made, and ValueError if it, or a link in it, leads out of ``runs_dir``: a
    folder from someone else must not make us write elsewhere.
    """

    def __init__(self, settings: Settings, dataset_slug: str):
        self.settings = settings
        try:
            base = Path(settings.runs_dir).expanduser() if settings.runs_dir else default_runs_dir()
        except RuntimeError as error:
            raise ValueError(f"runs_dir {shown(settings.runs_dir)} has no home folder: give another path.") from error
        backbone = re.sub(r"[^A-Za-z0-9._-]+", "-", settings.backbone.rstrip("/").split("/")[-1])[:80].lstrip(".")
        backbone = backbone or "local"
        if "/" in settings.backbone:  # a folder or Hub id: two of one name must not share a run
            backbone += "-" + hashlib.sha256(settings.backbone.encode()).hexdigest()[:8]
        self.path = base / dataset_slug / f"{backbone}-{settings.recipe}-seed{settings.seed}"
        _refuse_link(self.path, base)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(
                error.errno, f"The results' folder {self.path} cannot be made ({error.strerror}): give another runs_dir"
            ) from error
        for path in self.path.rglob("*"):
            _refuse_link(path, self.path)

    @contextlib.contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Waits until no other process holds ``name`` of this run, then holds it; clears what a killed one left."""
        with files.lock(self.path.with_name(f".{self.path.name}.{name}.lock"), waiting_for=f"{name} in {self.path}"):
            with contextlib.suppress(OSError):  # read-only: there is nothing to clear or to write
                self._begin_manifest()
                for folder, prefix in ((self.path, name), (self.path / name, "")):
                    files.remove_leftovers(folder, prefix)
            yield

    def folder(self, step: str) -> Path:
        """The folder of a step, by its name ('1_transfer'); made if missing."""
        (self.path / step).mkdir(exist_ok=True)
        self._begin_manifest()
        return self.path / step

    def _begin_manifest(self) -> None:
        """An empty manifest, where there is none: files are only checked that were written beside one."""
        if not (self.path / files.MANIFEST).exists():
            with files.changed_manifest(self.path / files.MANIFEST):
                pass

    @property
    def manifest(self) -> dict[str, Any]:
        return files.load_manifest(self.path / files.MANIFEST)

    def is_done(self, step: str) -> bool:
        """Whether ``step`` is finished here, with all its files.

        Raises ValueError if it is, but with another value of a setting that was given by hand now: results of
        different settings never mix in one folder.
        """
        manifest, folder = self.manifest, self.path / step
        record = manifest["steps"].get(step)
        if record is None or not folder.is_dir() or not any(folder.iterdir()):
            return False
        if not all((self.path / name).exists() for name in manifest["files"] if name.startswith(f"{step}/")):
            return False  # one was deleted, or found damaged and moved aside
        for name in STEP_FIELDS[step]:
            was, now = record.get("settings", {}).get(name), getattr(self.settings, name)
            if name in self.settings.given and was != now:
                raise ValueError(
                    f"{name}={now!r} was asked for, but {step} of this run was made with {name}={was!r}. "
                    f"Choose another runs_dir or seed, or delete {self.path / step} and the steps after it."
                )
        return True

    def record(self, step: str, seconds: float, **facts: Any) -> None:
        """Notes in the manifest that ``step`` is finished, with its settings, versions and duration."""
        versions = {"python": platform.python_version(), **{v: importlib.metadata.version(v) for v in VERSIONS}}
        with files.changed_manifest(self.path / files.MANIFEST) as manifest:
            manifest["settings"] = self.settings.to_dict()
            manifest["steps"][step] = {
                "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "seconds": round(seconds, 1),
                "settings": {name: getattr(self.settings, name) for name in STEP_FIELDS[step]},
                "versions": versions,
                **facts,
            }
            for name in list(manifest["files"]):  # of an earlier attempt with more of them
                if name.startswith(f"{step}/") and not (self.path / name).exists():
                    del manifest["files"][name]
