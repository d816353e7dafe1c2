"""The chapters as methods of one run: a thin facade over the rooms, which the notebooks hold."""

from __future__ import annotations

import functools
import os
import textwrap
from collections.abc import Callable
from typing import Any

import optuna
import pandas as pd
import torch

from .config.messages import printable
from .config.settings import Settings, followed
from .data import ImageData, Split
from .diffusion.backbone import Backbone
from .diffusion.generator import LatentGenerator
from .diffusion.training import Latents
from .evaluate import cas, scaling, sets
from .machine.devices import default_device
from .machine.ranks import ALONE, Ranks
from .methods.augmented import AugmentedMethod, unclip_beside
from .methods.class_encoder import ROWS, ClassEncoder, ClassEncoderMethod, Point
from .methods.inversion import InversionMethod
from .methods.named import generator_of
from .store.run import Run
from .work.workspace import Source, Workspace, classifier_options

__all__ = ["ROWS", "Course", "Point"]


class Course:
    """One run of the paper's method: its data, backbone and results, and the five steps.

    ``Course(settings)`` loads the data and checks it; the backbone is loaded when first needed. Every step does the
    missing earlier ones first, says so, and returns its result, from the run's folder where it is already there.
    Raises ValueError where ``num_images`` or ``rescoring_images`` are too few for the data's classes, and the errors of
    `Workspace`.
    Attributes: ``settings``, ``workspace``, ``method`` and, of the workspace, ``data``, ``run``, ``backbone``.
    """

    def __init__(self, settings: Settings, ranks: Ranks = ALONE):
        self.settings, self.workspace = settings, Workspace(settings, ranks)
        cas.check_every_class_is_drawn(settings.num_images, self.data.num_classes)
        if settings.rescored and settings.rescoring_images is not None:
            cas.check_every_class_is_drawn(settings.rescoring_images, self.data.num_classes, "rescoring_images")
        self.method = ClassEncoderMethod(self.workspace)

    def __str__(self) -> str:
        s, d = self.settings, self.data
        changed = ", ".join(f"{name}={getattr(s, name)!r}" for name in s.given if name != "backbone")
        lines = [
            f"dataset   {s.dataset}: {d.num_classes} classes, {len(d.train)} training, {len(d.val)} validation and "
            f"{len(d.test)} test images of {d.image_size}x{d.image_size} pixels",
            *(f"note      {printable(note)}" for note in d.notes),
            f"backbone  {s.backbone}, on {default_device()}",
            f"recipe    {s.recipe}" + (f", with {changed}" if changed else ""),
            f"follows   {followed(s)}",
            f"seed      {s.seed}",
            f"results   {_shortest(self.run.path)}",
        ]
        how = dict(width=120, subsequent_indent=" " * 10, break_long_words=False, break_on_hyphens=False)
        return "\n".join(textwrap.fill(line, **how) for line in lines)

    # --- what it is made of ---

    @property
    def data(self) -> ImageData:
        return self.workspace.data

    @property
    def run(self) -> Run:
        return self.workspace.run

    @property
    def backbone(self) -> Backbone:
        return self.workspace.backbone

    @property
    def latents(self) -> dict[str, Latents]:
        """The train and val splits after the VAE."""
        return self.workspace.latents

    @property
    def classifier_options(self) -> dict[str, Any]:
        """The keyword arguments of `classify.train_classifier` that the settings fix."""
        return classifier_options(self.settings)

    def new_class_encoder(self) -> ClassEncoder:
        """An untrained Class-Encoder for this data and backbone."""
        return self.method.new_class_encoder()

    # --- steps 1 to 4 ---

    def transfer(self) -> pd.DataFrame:
        """Step 1: trains the Class-Encoder. One row an epoch: train (loss), right, wrong, empty (held-out losses)."""
        return _history(self.method.transfer())

    def tune(self, on_trial: Callable[[optuna.Study], None] | None = None) -> optuna.Study:
        """Step 2: the first search, over IS, UGS and the Class-Encoder's epoch."""
        return self.method.tune(on_trial)

    def finetune(self) -> pd.DataFrame:
        """Step 3: fine-tunes the UNet. Rows as `transfer`."""
        return _history(self.method.finetune())

    def retune(self, on_trial: Callable[[optuna.Study], None] | None = None) -> optuna.Study:
        """Step 4: the second search, over IS, UGS and the UNet's epoch."""
        return self.method.retune(on_trial)

    # --- Diffusion Inversion ---

    @functools.cached_property
    def inversion(self) -> InversionMethod:
        """Diffusion Inversion of ``inversion_images`` of the training images: a run of its own, beside this one."""
        return InversionMethod(self.workspace.few(self.settings.inversion_images))

    # --- augmented conditioning ---

    @functools.cached_property
    def augmented(self) -> AugmentedMethod:
        """Augmented conditioning on ``augmented_images`` of the training images, with ``augmented_backbone``."""
        s = self.settings
        return AugmentedMethod(self.workspace.few(s.augmented_images).on(unclip_beside(s)))

    # --- real and generated images together ---

    @functools.cached_property
    def worth(self) -> tuple[Workspace, Source]:
        """``worth_images`` of the training images, and ``worth_generator``, learnt from these: chapters 12 to 14."""
        s = self.settings
        return generator_of(self.workspace.few(s.worth_images), s.worth_generator)

    # --- images ---

    def source(self, row: str = "after 4") -> Source:
        """The generator of a row of table 1, as the functions of `evaluate` and `share` take it."""
        return self.method.source(row)

    def generator(self, row: str = "after 4") -> LatentGenerator:
        """The generator of a row of table 1. Does the steps that it needs."""
        return self.method.generator(row)

    def point(self, row: str) -> Point:
        """Where a row of table 1 samples. Does the steps that it needs."""
        return self.method.point(row)

    def draw(self, point: Point, labels: torch.Tensor, set_name: str) -> torch.Tensor:
        """Images of ``labels`` (int64 (N,)) at a point: uint8 (N, 3, H, W), the classifier's size."""
        return self.method.generator_at(point)(labels, seed=self.settings.seed, set_name=set_name)

    # --- tables, and step 5 ---

    def cas(self, row: str) -> dict[str, Any]:
        """A row of table 1 ("after 1" .. "after 4"), see `evaluate.cas.cas`."""
        return cas.cas(self.workspace, self.source(row))

    def synthetic(self, multiple: int) -> Split:
        """Step 5: the synthetic set of ``multiple`` times the real one's size, see `evaluate.sets`."""
        return sets.synthetic(self.workspace, self.source(), multiple)

    def scaling(self) -> dict[str, dict[str, Any]]:
        """The rows of table 2 by name: "real", "x1", .., see `evaluate.scaling`."""
        return scaling.scaling(self.workspace, self.source())

    def predicted(self, name: str) -> torch.Tensor:
        """What the first classifier of a row of table 2 takes the test images for: int64 (N,)."""
        return scaling.predicted(self.workspace, self.source(), name)

    def rows_made(self, table: int) -> dict[str, dict[str, Any]]:
        """The rows of table 1 or 2 that are there for these settings, by name; none is made."""
        if table == 1:
            steps = {row: cas.cas_step(self.workspace, self.source(row)) for row in ROWS}
        else:
            names = scaling.scaling_rows(self.workspace)
            steps = {name: scaling.scaling_step(self.workspace, self.source(), name) for name in names}
        found = {name: self.run.peek(step) for name, step in steps.items()}
        return {name: dict(result.facts) for name, result in found.items() if result}


def _history(rows: list[dict[str, float]]) -> pd.DataFrame:
    return pd.DataFrame(rows, index=pd.RangeIndex(1, len(rows) + 1, name="epoch"))


def _shortest(path: os.PathLike) -> str:
    """A path from the working folder, or, on another drive, the whole of it."""
    try:
        return os.path.relpath(path)
    except ValueError:
        return os.fspath(path)
