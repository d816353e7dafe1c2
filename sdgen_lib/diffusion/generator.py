"""What every method ends in, and all that evaluation, sets, audits and exports know of it: a `Generator`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from ..config.messages import unknown_name
from ..machine.passes import Pass, Work
from .backbone import Backbone
from .conditions import Conditioner
from .generate import generate
from .samplers import passes_per_step

Labels = Sequence[int | str] | torch.Tensor


class Generator(Protocol):
    """Class labels in, images out."""

    class_names: tuple[str, ...]
    fingerprint: str  # of all that its images depend on, but for labels, seed and index

    def __call__(
        self,
        class_labels: Labels,
        *,
        seed: int = 0,
        set_name: str = "generator",
        first_index: int = 0,
        progress: str | None = None,
    ) -> torch.Tensor:
        """One image for each label, uint8 (N, 3, H, W): image i depends on its label and (seed, set, index) alone."""

    def work(self, num_images: int) -> Work:
        """The passes that so many images cost."""


@dataclasses.dataclass
class LatentGenerator:
    """A `Generator` by latent diffusion: a backbone, a conditioner, and the point at which it samples.

    ``unet``: a name for the UNet's weights and a function that loads them (see `Backbone.put_unet`); None leaves those
    that are there. ``compiles``: whole batches pass a compiled UNet. ``image_size``: pixels, the side of its images.
    """

    backbone: Backbone
    conditioner: Conditioner
    class_names: tuple[str, ...]
    num_inference_steps: int
    guidance_scale: float
    sampler: str = "ddim"
    image_size: int | None = None
    antialias: bool = True
    batch_size: int = 128
    compiles: bool = False
    unet: tuple[str, Callable[[], dict[str, torch.Tensor] | None]] | None = None
    fingerprint: str = ""

    def __call__(
        self,
        class_labels: Labels,
        *,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int = 0,
        set_name: str = "generator",
        first_index: int = 0,
        batch_size: int | None = None,
        progress: str | None = None,
    ) -> torch.Tensor:
        """One image for each label: uint8 (N, 3, image_size, image_size), on the CPU.

        ``class_labels``: class numbers 0..C-1, or class names. ``None`` for the two settings is the generator's point.
        Raises ValueError for a class that it does not know and for settings that cannot be sampled.
        """
        labels = self.label_numbers(class_labels)
        self.prepare(len(labels))
        return generate(
            self.backbone,
            self.conditioner,
            labels,
            num_inference_steps=self.num_inference_steps if num_inference_steps is None else num_inference_steps,
            guidance_scale=self.guidance_scale if guidance_scale is None else guidance_scale,
            seed=seed,
            set_name=set_name,
            first_index=first_index,
            image_size=self.image_size,
            antialias=self.antialias,
            sampler=self.sampler,
            batch_size=batch_size or self.batch_size,
            compiled=self.compiles,
            progress=progress,
        )

    def prepare(self, num_images: int) -> None:
        """Puts the weights in place and then, if that many images fill a batch, compiles the UNet."""
        if self.unet:
            self.backbone.put_unet(*self.unet)
        if self.compiles and num_images >= self.batch_size:
            self.backbone.compile_unet(2 * self.batch_size)  # guidance passes each image twice

    def work(self, num_images: int) -> Work:
        """The passes at the generator's own point."""
        passes = passes_per_step(self.guidance_scale) * self.num_inference_steps
        unet = Pass("compiled unet" if self.compiles else "unet", self.batch_size)
        return {unet: passes * num_images, Pass("decode", self.batch_size): num_images}

    def label_numbers(self, class_labels: Labels) -> torch.Tensor:
        """Class numbers or names -> int64 (N,). Raises ValueError for an empty list or an unknown class."""
        if isinstance(class_labels, str):
            raise ValueError(f"class_labels must be a list, one entry an image: [{class_labels!r}].")
        found = class_labels.tolist() if isinstance(class_labels, torch.Tensor) else class_labels
        numbers = [self._number(label) for label in found]
        if not numbers:
            raise ValueError("class_labels is empty: give one class number or name for each image.")
        return torch.tensor(numbers)

    def _number(self, label: int | str) -> int:
        if isinstance(label, str):
            if label not in self.class_names:
                raise unknown_name("class", label, self.class_names)
            return self.class_names.index(label)
        if label != int(label) or not 0 <= label < len(self.class_names):
            last = len(self.class_names) - 1
            raise ValueError(f"A class label must be from 0 to {last} ({', '.join(self.class_names)}), not {label}.")
        return int(label)
