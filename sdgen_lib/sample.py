"""Labels and seeds -> images: the one place that drives a sampler, in batches."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import numpy as np
import torch
from tqdm.auto import tqdm

from . import data, memory
from .backbone import Backbone
from .class_encoder import ClassEncoder
from .diffusion import SAMPLERS, guided_noise


def initial_noise(seed: int, set_name: str, indices, shape: tuple[int, ...]) -> torch.Tensor:
    """The starting noise of images ``indices`` of a set: float32 (len(indices), *shape), on the CPU.

    Each image has its own generator, seeded from (run seed, set, index): it starts from the same noise whatever the
    batch size, the shard or the number of workers.
    """
    rows = []
    for index in indices:
        entropy = np.random.SeedSequence([seed, zlib.crc32(set_name.encode()), int(index)]).generate_state(1, np.uint64)
        rows.append(torch.randn(shape, generator=torch.Generator().manual_seed(int(entropy[0]) >> 1)))
    return torch.stack(rows)


def balanced_labels(num_images: int, num_classes: int) -> torch.Tensor:
    """int64 (num_images,): 0, 1, .., C-1, 0, 1, ..: uniform over classes, every prefix too."""
    return torch.arange(num_images) % num_classes


@torch.no_grad()
def generate_latents(
    backbone: Backbone, context: torch.Tensor, unconditional: torch.Tensor, noise: torch.Tensor, *,
    num_inference_steps: int, guidance_scale: float, sampler: str = "ddim", callback=None,
) -> torch.Tensor:  # fmt: skip
    """One batch: context (B, tokens, width), unconditional (tokens, width), noise (B, C, H, W) -> latents (B, C, H, W).

    ``context`` may come from the Class-Encoder or from the text encoder.
    """
    one_context = backbone.one_context()

    def guided(latents, t):
        with one_context:
            return guided_noise(backbone.predict_noise, latents, t, context, unconditional, guidance_scale)

    noise = noise.to(backbone.device)
    return SAMPLERS[sampler](guided, noise, num_inference_steps, backbone.alphas_cumprod, callback)


def generate(
    backbone: Backbone, class_encoder: ClassEncoder, class_labels: torch.Tensor, *, num_inference_steps: int,
    guidance_scale: float, seed: int = 0, set_name: str = "set", first_index: int = 0, image_size: int | None = None,
    antialias: bool = True, unconditional: str = "zero", sampler: str = "ddim", batch_size: int = 128,
    progress: str | None = None, on_batch: Callable[[int], None] | None = None,
) -> torch.Tensor:  # fmt: skip
    """Draws one image for each label: uint8 (N, 3, image_size, image_size), on the CPU.

    ``class_labels`` int64 (N,); ``num_inference_steps`` (IS) 1..1000; ``guidance_scale`` (UGS) >= 0;
    ``first_index`` the position in the set of the first label, so that a set can be made in shards;
    ``image_size`` pixels (None: the backbone's), ``antialias`` on the way there; ``batch_size`` images at once, fewer
    where the accelerator's memory runs out; ``progress`` a title for a progress bar; ``on_batch(images done)``.
    """
    if not guidance_scale >= 0:
        raise ValueError(f"guidance_scale must be at least 0, not {guidance_scale!r}.")
    contexts = class_encoder.contexts().detach()
    empty_prompt = backbone.text_context([""])[0] if unconditional == "empty_prompt" else None
    away_from = class_encoder.unconditional(unconditional, empty_prompt).detach()
    images: list[torch.Tensor] = []
    micro = memory.MicroBatch(batch_size)
    with tqdm(total=len(class_labels), desc=progress, unit="image", disable=progress is None) as bar:
        for start in range(0, len(class_labels), batch_size):
            labels = class_labels[start : start + batch_size]
            indices = range(first_index + start, first_index + start + len(labels))
            noise = initial_noise(seed, set_name, indices, backbone.latent_shape)
            batch: list[torch.Tensor] = []

            def work(part: slice):
                latents = generate_latents(
                    backbone, contexts[labels[part].to(contexts.device)], away_from, noise[part],
                    num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, sampler=sampler,
                )  # fmt: skip
                small = data.resize(backbone.decode(latents), image_size or backbone.image_size, antialias)
                batch.append(small.cpu())  # the one copy off the device

            micro.run(len(labels), batch.clear, work)
            images += batch
            bar.update(len(labels))
            if on_batch:
                on_batch(start + len(labels))
    return torch.cat(images)
