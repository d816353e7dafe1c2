"""The run folder: where each step writes, files that appear whole or not at all, and the manifest."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from .settings import Settings

VERSIONS = ("torch", "diffusers", "transformers", "optuna", "numpy")

# The settings that each step's result depends on (and, through its predecessors, nothing else).
STEP_FIELDS = {
    "1_transfer": ("class_encoder_start", "transfer_epochs", "transfer_batch_size", "transfer_learning_rate",
                   "weight_decay", "clip_norm", "image_size"),
    "2_tune": ("unconditional", "sampler", "num_images", "steps_min", "steps_max", "guidance_max", "select_on",
               "classifier_width", "classifier_epochs", "classifier_batch_size", "classifier_epoch_images",
               "classifier_learning_rate", "label_smoothing", "plateau_patience", "stop_patience"),
    "3_finetune": ("finetune_epochs", "finetune_batch_size", "finetune_learning_rate", "weight_decay", "clip_norm"),
    "4_retune": ("num_images",),
    "5_datasets": (),
}  # fmt: skip


def default_runs_dir() -> Path:
    """`runs/` beside `notebooks/` in a checkout, so that JupyterLab (whose kernels start in notebooks/) and papermill
    (the caller's folder) share it; of the working directory when the package is installed elsewhere."""
    checkout = Path(__file__).resolve().parents[1]
    return (checkout if (checkout / "notebooks").is_dir() else Path.cwd()) / "runs"


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path``; what was written there replaces ``path`` at the end, at once, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
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


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Tensors by name -> one .safetensors file, whole or not at all."""
    with whole_file(path) as temporary:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary, metadata)


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path)


def save_json(path: Path, value: Any) -> None:
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n")


def load_json(path: Path, default: Any = None) -> Any:
    return json.loads(path.read_text()) if path.exists() else default


class Run:
    """One run's folder, ``<runs_dir>/<dataset>/<backbone>-<recipe>-seed<k>/``.

    Attributes: ``path``, and ``settings`` as asked for now. ``manifest.json`` holds the settings, versions and
    timings of each finished step.
    """

    def __init__(self, settings: Settings, dataset_slug: str):
        self.settings = settings
        base = Path(settings.runs_dir).expanduser() if settings.runs_dir else default_runs_dir()
        backbone = re.sub(r"[^A-Za-z0-9._-]+", "-", settings.backbone.rstrip("/").split("/")[-1]).lstrip(".") or "local"
        if "/" in settings.backbone:  # a folder or Hub id: two of one name must not share a run
            backbone += "-" + hashlib.sha256(settings.backbone.encode()).hexdigest()[:8]
        self.path = base / dataset_slug / f"{backbone}-{settings.recipe}-seed{settings.seed}"
        self.path.mkdir(parents=True, exist_ok=True)

    def folder(self, step: str) -> Path:
        """The folder of a step, by its name ('1_transfer'); made if missing."""
        (self.path / step).mkdir(exist_ok=True)
        return self.path / step

    @property
    def manifest(self) -> dict[str, Any]:
        return load_json(self.path / "manifest.json", {"steps": {}})

    def is_done(self, step: str) -> bool:
        """Whether ``step`` is finished here.

        Raises ValueError if it is, but with another value of a setting that was given by hand now: results of
        different settings never mix in one folder.
        """
        record, folder = self.manifest["steps"].get(step), self.path / step
        if record is None or not folder.is_dir() or not any(folder.iterdir()):
            return False
        for name in STEP_FIELDS[step]:
            was, now = record["settings"].get(name), getattr(self.settings, name)
            if name in self.settings.given and was != now:
                raise ValueError(
                    f"{name}={now!r} was asked for, but {step} of this run was made with {name}={was!r}. "
                    f"Choose another runs_dir or seed, or delete {self.path / step} and the steps after it."
                )
        return True

    def record(self, step: str, seconds: float, **facts: Any) -> None:
        """Notes in the manifest that ``step`` is finished, with its settings, versions and duration."""
        manifest = self.manifest
        manifest["settings"] = self.settings.to_dict()
        manifest["steps"][step] = {
            "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "seconds": round(seconds, 1),
            "settings": {name: getattr(self.settings, name) for name in STEP_FIELDS[step]},
            "versions": {"python": platform.python_version(), **{v: importlib.metadata.version(v) for v in VERSIONS}},
            **facts,
        }
        save_json(self.path / "manifest.json", manifest)
