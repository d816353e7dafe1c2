"""What every method ends in, and all that evaluation, sets, audits and exports know of it: a `Generator`."""

from __future__ import annotations

import dataclasses
import math
import numbers
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import torch

from ..config.messages import shown, unknown_name
from ..machine.passes import Pass, Work, total
from .backbone import PRETRAINED, Backbone
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

    ``unet``: a name for the UNet's weights and a function that loads them (see `Backbone.put_unet`); None: the
    pretrained ones, whatever was put in place before. ``compiles``: whole batches pass a compiled UNet.
    ``image_size``: pixels, the side of its images.
    """

    backbone: Backbone = dataclasses.field(repr=False)  # thousands of lines
    conditioner: Conditioner = dataclasses.field(repr=False)
    class_names: tuple[str, ...]
    num_inference_steps: int
    guidance_scale: float
    sampler: str = "ddim"
    image_size: int | None = None
    antialias: bool = True
    batch_size: int = 128
    compiles: bool = False
    unet: tuple[str, Callable[[], dict[str, torch.Tensor] | None]] | None = dataclasses.field(default=None, repr=False)
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
        steps = self.num_inference_steps if num_inference_steps is None else num_inference_steps
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        steps = _whole("num_inference_steps", steps, 1, len(self.backbone.alphas_cumprod))
        if isinstance(scale, (bool, str)) or not isinstance(scale, numbers.Real) or not 0 <= scale < math.inf:
            raise ValueError(f"guidance_scale must be a number of at least 0, not {shown(scale)}.")
        batch_size = self.batch_size if batch_size is None else _whole("batch_size", batch_size, 1)
        seed = _whole("seed", seed, 0, 2**32 - 1)
        first_index = _whole("first_index", first_index, 0)
        self.prepare(len(labels))
        return generate(
            self.backbone,
            self.conditioner,
            labels,
            num_inference_steps=steps,
            guidance_scale=float(scale),
            seed=seed,
            set_name=set_name,
            first_index=first_index,
            image_size=self.image_size,
            antialias=self.antialias,
            sampler=self.sampler,
            batch_size=batch_size,
            compiled=self.compiles,
            progress=progress,
        )

    def prepare(self, num_images: int) -> None:
        """Puts the weights in place and then, if that many images fill a batch, compiles the UNet."""
        self.backbone.put_unet(*(self.unet or (PRETRAINED, lambda: None)))
        if self.compiles and num_images >= self.batch_size:
            tokens = self.conditioner.unconditional().context.shape[1]
            self.backbone.compile_unet(2 * self.batch_size, tokens)  # guidance passes each image twice

    def work(self, num_images: int) -> Work:
        """The passes at the generator's own point."""
        passes = passes_per_step(self.guidance_scale) * self.num_inference_steps
        unet = Pass("compiled unet" if self.compiles else "unet", self.batch_size)
        return {unet: passes * num_images, Pass("decode", self.batch_size): num_images}

    def label_numbers(self, class_labels: Labels) -> torch.Tensor:
        """Class numbers or names -> int64 (N,). Raises ValueError for anything but a list of known classes."""
        if isinstance(class_labels, (str, int)):
            raise ValueError(f"class_labels must be a list, one entry an image: [{class_labels!r}].")
        found = class_labels.tolist() if hasattr(class_labels, "tolist") else class_labels
        if isinstance(found, Mapping) or not isinstance(found, Iterable):
            raise ValueError(
                f"class_labels must be a list of class numbers or names, one for each image, not {shown(class_labels)}."
            )
        numbers = [self._number(label) for label in found]
        if not numbers:
            raise ValueError("class_labels is empty: give one class number or name for each image.")
        return torch.tensor(numbers)

    def _number(self, label: int | str) -> int:
        if isinstance(label, str):
            if label not in self.class_names:
                raise unknown_name("class", label, self.class_names)
            return self.class_names.index(label)
        if isinstance(label, (list, tuple)) or getattr(label, "ndim", 0):
            raise ValueError(
                f"class_labels must be a flat list, one entry an image; one of its entries is {shown(label)}."
            )
        last = len(self.class_names) - 1
        try:
            known = not isinstance(label, bool) and int(label) == label and 0 <= label <= last
        except (TypeError, ValueError, OverflowError):  # None, "not a number", infinity
            known = False
        if not known:
            names = ", ".join(self.class_names[:10]) + (", .." if last > 9 else "")
            raise ValueError(f"A class label must be from 0 to {last} ({names}), not {shown(label)}.")
        return int(label)


@dataclasses.dataclass
class Rounds:
    """A `Generator` of several: the first draws images 0 .. ``period`` - 1 of a set, the next one as many, and so on
    in a circle. All are of the same classes."""

    generators: Sequence[Generator]
    period: int
    fingerprint: str = ""

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.generators[0].class_names

    def __call__(
        self,
        class_labels: Labels,
        *,
        seed: int = 0,
        set_name: str = "generator",
        first_index: int = 0,
        progress: str | None = None,
    ) -> torch.Tensor:
        """As `Generator`: which one draws an image depends on its index alone."""
        images, start = [], 0
        while start < len(class_labels):
            number, done = divmod(first_index + start, self.period)
            part = class_labels[start : start + self.period - done]
            draw = self.generators[number % len(self.generators)]
            how = dict(seed=seed, set_name=set_name, first_index=first_index + start, progress=progress)
            images.append(draw(part, **how))
            start += len(part)
        return torch.cat(images)

    def prepare(self, num_images: int) -> None:
        """As `LatentGenerator`."""
        for generator in self.generators:
            generator.prepare(num_images)

    def work(self, num_images: int) -> Work:
        """The passes of so many images, an equal share by each of the generators."""
        return total(generator.work(num_images / len(self.generators)) for generator in self.generators)


def _whole(name: str, value: object, least: int, most: int | None = None) -> int:
    """``value`` as a whole number of this range; raises ValueError for any other."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least or (most is not None and number > most):
        allowed = f"from {least} to {most}" if most is not None else f"of at least {least}"
        raise ValueError(f"{name} must be a whole number {allowed}, not {shown(value)}.")
    return number
