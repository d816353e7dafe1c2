"""What every method is handed: one run's settings, data, backbone and results."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .. import data
from ..config.messages import shown
from ..config.settings import SHARED, Settings, View, resolve
from ..data.sources import checkout, split_count
from ..diffusion import backbone as backbones
from ..diffusion import weights
from ..diffusion.conditions import Conditioner
from ..diffusion.generator import Generator, LatentGenerator
from ..diffusion.samplers import passes_per_step
from ..diffusion.training import Latents
from ..machine.devices import classifier_dtype, default_device
from ..machine.passes import Pass, Work
from ..machine.ranks import ALONE, Ranks
from ..store import files
from ..store.run import Run, Step, run_path
from . import cost

LATENTS = "latents.safetensors"


@dataclasses.dataclass(frozen=True)
class Source:
    """A generator that may not be there yet: what a table's row, a synthetic set or an export is drawn with.

    ``step``: what it depends on (its ``make`` is never called, nothing of it is stored). ``build()``: the generator,
    once the results that it needs are there. ``point()``: where it samples, for tables and cards; ``facts``: what else
    they say of it. ``passes(images)``: what drawing so many costs, also while it is not there yet.
    """

    name: str
    step: Step
    build: Callable[[], Generator]
    point: Callable[[], Mapping[str, Any]]
    passes: Callable[[int], Work]
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if not self.name or self.name != files.portable(self.name):
            raise ValueError(f"A source's name is a part of a folder's name; {shown(self.name)} cannot be one.")

    def inputs(self) -> dict[str, Any]:
        """What tells results drawn with this generator from another's that needs and reads the same."""
        return {"generator": [self.step.name, self.step.version], **self.step.inputs}


def never_made(folder: Path, s: View) -> Mapping[str, Any]:
    """The ``make`` of a source's step, which says what its generator depends on and is no stored result."""
    raise AssertionError("a source is no stored result")


def load_data(settings: Settings) -> data.ImageData:
    """The real images that the settings name. The decoded pictures of a folder are kept beside the runs' folders."""
    kept = run_path(settings, "decoded").parent
    return data.load(settings.dataset, settings.image_size, settings.seed, base_dir=checkout(), keep_in=kept)


class Workspace:
    """One run's data, backbone and results; the data is loaded and checked at once, the backbone when first needed.

    ``real`` and ``path``: data that is loaded already, and the run's folder, where they are not what the settings name.
    """

    def __init__(
        self, settings: Settings, ranks: Ranks = ALONE, real: data.ImageData | None = None, path: Path | None = None
    ):
        self.settings, self.ranks = settings, ranks
        self.data = real or load_data(settings)
        path = path or run_path(settings, self.data.slug)
        self.run = Run(settings, path, self._roots(), self._announcement, ranks)

    def planned(self, settings: Settings) -> Workspace:
        """The same data and model with other settings and no result yet: its steps can be counted, and not be made."""
        other = copy.copy(self)
        other.settings, other.run = settings, _NothingMade()
        return other

    def few(self, count: int | None) -> Workspace:
        """With so many of the training images, in the classes' proportions and at least one a class (None: all)."""
        n = len(self.data.train)
        count = n if count is None else max(count, self.data.num_classes)
        if count >= n:
            return self
        name, _ = split_count(self.settings.dataset, checkout())
        settings = dataclasses.replace(self.settings, dataset=f"{name}:{count}")
        other = Workspace(settings, self.ranks)
        other.__dict__["backbone"] = self.backbone  # the model is loaded once
        return other

    def on(self, backbone: str) -> Workspace:
        """The same data with another backbone: a run of its own, beside this one."""
        if backbone == self.settings.backbone:
            return self
        return Workspace(dataclasses.replace(self.settings, backbone=backbone), self.ranks, self.data)

    def holding(self, real: data.ImageData) -> Workspace:
        """The same run with other images, say fewer: what was made of the one is not taken for the other's."""
        other = Workspace(self.settings, self.ranks, real, self.run.path)
        other.__dict__["backbone"] = self.backbone  # the model is loaded once
        return other

    def varied(self, **changes: Any) -> Workspace:
        """The same data, model and folder with some settings changed; what does not read these is shared.

        Raises ValueError as `settings.resolve` does, and for a setting that the data or the model hang on.
        """
        s = self.settings
        fixed = sorted({"dataset", "backbone", "image_size", "precision", "recipe", "seed"} & set(changes))
        if fixed:
            raise ValueError(f"{', '.join(fixed)} cannot be varied within a run: make another one.")
        given = {name: getattr(s, name) for name in (*s.given, *SHARED, "storage")} | changes
        given = {name: "none" if value is None and name in s.given else value for name, value in given.items()}
        other = copy.copy(self)
        other.settings = resolve(**given)
        other.run = Run(other.settings, self.run.path, other._roots(), other._announcement, self.ranks)
        return other

    def _roots(self) -> dict[str, Callable[[], str]]:
        return {"data": lambda: self.data.fingerprint, "model": lambda: self._source_fingerprint}

    @functools.cached_property
    def _source_fingerprint(self) -> str:
        return weights.fingerprint(self._files())

    def _files(self) -> weights.Source:
        return backbones.find(self.settings.backbone, self.settings.precision)

    def _announcement(self, step: Step) -> str:
        if step.work is None:
            return f"{step.title}."
        return f"{step.title} (about {cost.readable(cost.seconds(self.backbone, step.work()))} on this machine)."

    @functools.cached_property
    def backbone(self) -> backbones.Backbone:
        return backbones.load(self.settings.backbone, precision=self.settings.precision)

    # --- the real images after the VAE ---

    @property
    def latents_step(self) -> Step:
        splits = {name: getattr(self.data, name) for name in ("train", "val")}

        def make(folder: Path, s: View) -> dict[str, Any]:
            encoded = {name: self.backbone.encode(split.images) for name, split in splits.items()}
            files.save_tensors(folder / LATENTS, encoded)
            return {name: len(split) for name, split in splits.items()}

        images = sum(map(len, splits.values()))
        return Step(
            "latents",
            make,
            topics=("precision",),
            roots=("data", "model"),
            work=lambda: {Pass("encode", 16, self.data.image_size): images},
            title="Encoding the real images once with the VAE",
        )

    @functools.cached_property
    def latents(self) -> dict[str, Latents]:
        """The train and val splits after the VAE, encoded once and kept."""
        tensors, device = files.load_tensors(self.run.file(self.latents_step, LATENTS)), self.backbone.device
        return {s: Latents(tensors[s].to(device), getattr(self.data, s).labels.to(device)) for s in tensors}

    # --- what several rooms ask for ---

    def compiles(self) -> bool:
        """Whether the UNet is compiled for sampling: as ``compile_unet`` says, or (auto) where that was measured to be
        faster and the run's searches take so many passes that it makes up for the minute it takes."""
        s = self.settings
        if s.compile_unet == "auto":
            return cost.search_passes(s) >= 100_000 and backbones.compiling_pays(self._files())
        return s.compile_unet == "yes"

    def drawing(self) -> dict[str, int]:
        """What tells images drawn here from those of the same generator drawn otherwise, among a step's inputs.

        Only whole batches pass a compiled UNet, and in 16 bits its images differ: "compiled" is the batch's size.
        """
        return {"compiled": self.settings.sample_batch_size} if self.compiles() else {}

    def unet_pass(self) -> str:
        """The kind of pass that sampling takes, see `Pass`."""
        return "compiled unet" if self.compiles() else "unet"

    def latent_generator(
        self,
        s: View,
        conditioner: Conditioner,
        num_inference_steps: int,
        guidance_scale: float,
        fingerprint: str,
        unet: tuple[str, Callable[[], Any]] | None = None,
    ) -> LatentGenerator:
        """What a method's conditioner draws with on this run's data; ``s`` has the topics "sampling" and "how"."""
        return LatentGenerator(
            self.backbone,
            conditioner,
            self.data.class_names,
            num_inference_steps,
            guidance_scale,
            sampler=s.sampler,
            image_size=self.data.image_size,
            antialias=s.antialias,
            batch_size=s.sample_batch_size,
            compiles=self.compiles(),
            unet=unet,
            fingerprint=fingerprint,
        )

    def drawn(self, num_inference_steps: float, guidance_scale: float, images: float) -> Work:
        """The passes that drawing so many images costs."""
        batch, passes = self.settings.sample_batch_size, passes_per_step(guidance_scale)
        return {Pass(self.unet_pass(), batch): passes * num_inference_steps * images, Pass("decode", batch): images}


class _NothingMade:
    """In a run's place: nothing is there, and there is no folder for it."""

    def peek(self, step: Step) -> None:
        return None


def classifier_options(s: Settings | View, in_search: bool = False) -> dict[str, Any]:
    """The keyword arguments of `classify.train_classifier` that the settings fix; a search may wait longer."""
    device = default_device()
    plateau, stop = s.plateau_patience, s.stop_patience
    if in_search:
        plateau, stop = s.search_plateau_patience or plateau, s.search_stop_patience or stop
    return dict(
        width=s.classifier_width,
        shortcut=s.classifier_shortcut,
        epochs=s.classifier_epochs,
        batch_size=s.classifier_batch_size,
        epoch_images=s.classifier_epoch_images,
        epoch_limit=s.classifier_epoch_limit,
        val_images=s.classifier_val_images,
        learning_rate=s.classifier_learning_rate,
        label_smoothing=s.label_smoothing,
        plateau_patience=plateau,
        stop_patience=stop,
        device=device,
        dtype=classifier_dtype(s.precision, device),
    )


def classifier_work(s: Settings | View, num_images: int, pixels: int, num_classes: int, count: int = 1) -> Work:
    """What ``count`` trainings on so many images cost at most; several of them side by side."""
    in_epoch = max(num_images, s.classifier_epoch_images)
    in_epoch = min(in_epoch, s.classifier_epoch_limit or in_epoch)
    options = (("num_classes", num_classes), ("width", s.classifier_width), ("shortcut", s.classifier_shortcut))
    options += (("precision", s.precision), ("count", count))
    kind = "classifier" if count == 1 else "classifiers"
    return {Pass(kind, s.classifier_batch_size, pixels, options): count * s.classifier_epochs * in_epoch}
