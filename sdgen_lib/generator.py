"""A trained generator: saved as one folder, loaded and used without the run it came from.

The folder is a Stable Diffusion checkpoint in the diffusers layout, with the fine-tuned UNet in it, and beside it
``class_encoder.safetensors`` and ``generator.json`` (class names, the best point, how it samples).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from . import backbone as backbones
from . import runs, sample
from .class_encoder import ClassEncoder
from .course import Course
from .settings import unknown_name

FACTS, ENCODER = "generator.json", "class_encoder.safetensors"
FORMAT = 1  # of the folder; a later one that this code cannot read has a higher number
SET_NAME = "generator"  # its images start from noise of no trial, table or synthetic set


@dataclasses.dataclass
class Generator:
    """Class labels in, images out. ``num_inference_steps`` and ``guidance_scale`` are the run's best point."""

    backbone: backbones.Backbone
    class_encoder: ClassEncoder
    class_names: tuple[str, ...]
    num_inference_steps: int
    guidance_scale: float
    unconditional: str
    sampler: str
    image_size: int  # pixels, the side of the images it returns
    antialias: bool = True

    def __call__(
        self, class_labels: Sequence[int | str] | torch.Tensor, *, num_inference_steps: int | None = None,
        guidance_scale: float | None = None, seed: int = 0, first_index: int = 0, batch_size: int = 128,
        progress: str | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """One image for each label: uint8 (N, 3, image_size, image_size), on the CPU.

        ``class_labels``: class numbers 0..C-1, or class names. ``None`` for the two settings is the best point.
        Image i depends on (seed, first_index + i) and its label, not on the batch it is drawn in.
        Raises ValueError for a class that it does not know and for settings that cannot be sampled.
        """
        return sample.generate(
            self.backbone, self.class_encoder, self.label_numbers(class_labels), seed=seed, set_name=SET_NAME,
            num_inference_steps=self.num_inference_steps if num_inference_steps is None else num_inference_steps,
            guidance_scale=self.guidance_scale if guidance_scale is None else guidance_scale,
            first_index=first_index, image_size=self.image_size, antialias=self.antialias,
            unconditional=self.unconditional, sampler=self.sampler, batch_size=batch_size, progress=progress,
        )  # fmt: skip

    def label_numbers(self, class_labels: Sequence[int | str] | torch.Tensor) -> torch.Tensor:
        """Class numbers or names -> int64 (N,). Raises ValueError for an empty list or an unknown class."""
        if isinstance(class_labels, str):
            raise ValueError(f"class_labels must be a list, one entry an image: [{class_labels!r}].")
        numbers = []
        for label in class_labels.tolist() if isinstance(class_labels, torch.Tensor) else class_labels:
            if isinstance(label, str):
                if label not in self.class_names:
                    raise unknown_name("class", label, self.class_names)
                label = self.class_names.index(label)
            if label != int(label) or not 0 <= label < len(self.class_names):
                last = len(self.class_names) - 1
                raise ValueError(
                    f"A class label must be from 0 to {last} ({', '.join(self.class_names)}), not {label}."
                )
            numbers.append(int(label))
        if not numbers:
            raise ValueError("class_labels is empty: give one class number or name for each image.")
        return torch.tensor(numbers)


def save(course: Course, folder: Path, row: str = "after 4") -> None:
    """Writes the generator of a row of table 1 into ``folder``, which exists and is empty.

    Weights are float32 safetensors, so that its images are the run's, bit for bit on the same machine.
    """
    point = course.point(row)
    class_encoder, backbone = course.use(point["transfer_epoch"], point["finetune_epoch"]), course.backbone
    course.reset()  # the next drawing puts the UNet back into the precision it computes in
    backbone.set_unet(course.unet_weights(point["finetune_epoch"]), torch.float32)
    scheduler = DDIMScheduler.from_pretrained(backbone.source.folder, subfolder="scheduler")
    StableDiffusionPipeline(
        vae=backbone.vae, unet=backbone.unet, text_encoder=backbone.text_encoder, tokenizer=backbone.tokenizer,
        scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder, safe_serialization=True)  # fmt: skip
    runs.save_tensors(Path(folder) / ENCODER, class_encoder.state_dict())
    s = course.settings
    runs.save_json(Path(folder) / FACTS, {
        "format": FORMAT, "class_names": list(course.data.class_names), "num_inference_steps": point["IS"],
        "guidance_scale": point["UGS"], "unconditional": s.unconditional, "sampler": s.sampler,
        "antialias": s.antialias, "tokens": class_encoder.tokens, "rank": s.class_encoder_rank,
        "image_size": course.data.image_size, "trained_on": s.dataset, "backbone": s.backbone, "recipe": s.recipe,
        "seed": s.seed, "row": row, "point": point,
    })  # fmt: skip


def load(folder: str | Path, device: str | None = None, precision: str = "auto") -> Generator:
    """The generator in ``folder``, as `save` left it; ``device`` and ``precision`` as `backbone.load`.

    Raises FileNotFoundError where the folder or a part of it is missing, ValueError for one of a later format.
    """
    folder = Path(folder).expanduser()
    if not (folder / FACTS).is_file():
        raise FileNotFoundError(
            f"{folder.absolute()} is no saved generator: it has no {FACTS}. "
            "Make one with: python -m sdgen_lib.export RUN_FOLDER --to generator OUT"
        )
    facts = runs.load_json(folder / FACTS)
    if facts["format"] > FORMAT:
        raise ValueError(f"{folder / FACTS} is of format {facts['format']}; this version reads up to {FORMAT}.")
    if not (folder / ENCODER).is_file():
        raise FileNotFoundError(f"{folder / ENCODER} is missing: copy the whole folder again.")
    backbone = backbones.load(str(folder.absolute()), device, precision)
    class_encoder = ClassEncoder(len(facts["class_names"]), facts["tokens"], backbone.width, rank=facts["rank"])
    class_encoder.load_state_dict(runs.load_tensors(folder / ENCODER))
    return Generator(
        backbone, class_encoder.to(backbone.device).requires_grad_(False).eval(), tuple(facts["class_names"]),
        **{name: facts[name] for name in
           ("num_inference_steps", "guidance_scale", "unconditional", "sampler", "image_size", "antialias")},
    )  # fmt: skip
