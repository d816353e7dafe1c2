"""What a run is made of: its settings, data, backbone, latents, folder, and the networks it trains."""

from __future__ import annotations

import functools
import os
import textwrap
from pathlib import Path
from typing import Any

import torch

from . import backbone as backbones
from . import cost, data, devices, runs, train
from .class_encoder import ClassEncoder
from .settings import Settings, followed


def classifier_options(settings: Settings, in_search: bool = False) -> dict[str, Any]:
    """The keyword arguments of `classifier.train_classifier` that a run's settings fix; a search may wait longer."""
    device = devices.default_device()
    return dict(
        width=settings.classifier_width, shortcut=settings.classifier_shortcut, epochs=settings.classifier_epochs,
        batch_size=settings.classifier_batch_size, epoch_images=settings.classifier_epoch_images,
        epoch_limit=settings.classifier_epoch_limit,
        learning_rate=settings.classifier_learning_rate,
        label_smoothing=settings.label_smoothing,
        plateau_patience=in_search and settings.search_plateau_patience or settings.plateau_patience,
        stop_patience=in_search and settings.search_stop_patience or settings.stop_patience, device=device,
        dtype=devices.classifier_dtype(settings.precision, device),
    )  # fmt: skip


class Parts:
    """One run's data, backbone and folder: the data loaded and checked at once, the backbone when first needed."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.data = data.load(
            settings.dataset, settings.image_size, settings.seed, base_dir=Path(__file__).resolve().parents[1]
        )
        self.run = runs.Run(settings, self.data.slug)

    def __str__(self) -> str:
        s, d = self.settings, self.data
        folder = os.path.relpath(self.run.path)
        changed = ", ".join(f"{name}={getattr(s, name)!r}" for name in s.given if name != "backbone")
        lines = [
            f"dataset   {s.dataset}: {d.num_classes} classes, {len(d.train)} training, {len(d.val)} validation and "
            f"{len(d.test)} test images of {d.image_size}x{d.image_size} pixels",
            f"backbone  {s.backbone}, on {devices.default_device()}",
            f"recipe    {s.recipe}" + (f", with {changed}" if changed else ""),
            f"follows   {followed(s)}",
            f"seed      {s.seed}",
        ]  # fmt: skip
        how = dict(width=120, subsequent_indent=" " * 10, break_long_words=False, break_on_hyphens=False)
        return "\n".join([*(textwrap.fill(line, **how) for line in lines), f"results   {folder}"])

    @functools.cached_property
    def backbone(self) -> backbones.Backbone:
        return backbones.load(self.settings.backbone, precision=self.settings.precision)

    @functools.cached_property
    def compiles(self) -> bool:
        """Whether the UNet is compiled for sampling: as ``compile_unet`` says, or (auto) where that was measured to be
        faster and the run's searches and sets take so many passes that it makes up for the minute it takes."""
        s = self.settings
        if s.compile_unet == "auto":
            steps = ("2_tune", "4_retune", "5_datasets")
            passes = sum(cost.count(s, step, len(self.data.train), len(self.data.val))["pass"] for step in steps)
            return self.backbone.gains_by_compiling and passes >= 100_000
        return s.compile_unet == "yes"

    @functools.cached_property
    def latents(self) -> dict[str, train.Latents]:
        """The train and val splits after the VAE, encoded once and kept in the run folder."""
        path = self.run.path / "latents.safetensors"
        with self.run.lock(path.name):
            if not runs.is_whole(path):
                print("Encoding the real images once with the VAE ...")
                splits = ("train", "val")
                runs.save_tensors(path, {s: self.backbone.encode(getattr(self.data, s).images) for s in splits})
        tensors = runs.load_tensors(path)
        device = self.backbone.device
        return {s: train.Latents(tensors[s].to(device), getattr(self.data, s).labels.to(device)) for s in tensors}

    def new_class_encoder(self) -> ClassEncoder:
        """An untrained Class-Encoder for this data and backbone."""
        s, tokens = self.settings, self.settings.class_encoder_tokens or self.backbone.tokens
        start = self.backbone.text_context([""])[0] if s.class_encoder_start == "empty_prompt" else None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(s.seed)
            encoder = ClassEncoder(self.data.num_classes, tokens, self.backbone.width, start, s.class_encoder_rank)
        return encoder.to(self.backbone.device)

    def unet_weights(self, finetune_epoch: int | None) -> dict[str, torch.Tensor] | None:
        """A checkpoint of step 3, for `Backbone.set_unet`; ``None``, the pretrained UNet, for None."""
        if finetune_epoch is None:
            return None
        path = train.checkpoint_path(self.run.folder("3_finetune"), finetune_epoch)
        if not path.exists():
            raise FileNotFoundError(
                f"{path} is gone (keep_unets='used' deletes what no table needs): delete {path.parent} and the "
                "steps after it, and they are made again."
            )
        return runs.load_tensors(path)
