"""Labels and seeds -> images: the one place that drives a sampler, in batches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from tqdm.auto import tqdm

from ..config.messages import unknown_name
from ..data import resize
from ..machine.seeds import image_noise
from .backbone import Backbone
from .conditions import Condition, Conditioner, unconditional_of
from .samplers import SAMPLERS, Start, guided_noise, passes_per_step


def balanced_labels(num_images: int, num_classes: int) -> torch.Tensor:
    """int64 (num_images,): 0, 1, .., C-1, 0, 1, ..: uniform over classes, every prefix too."""
    return torch.arange(num_images) % num_classes


@torch.no_grad()
def generate_latents(
    backbone: Backbone,
    condition: Condition,
    unconditional: Condition,
    noise: torch.Tensor,
    *,
    num_inference_steps: int,
    guidance_scale: float,
    sampler: str = "ddim",
    compiled: bool = False,
    callback: Callable | None = None,
) -> torch.Tensor:
    """Samples one batch: conditions of B images and of B or of one, noise (B, C, H, W) -> latents (B, C, H, W).

    ``compiled``: by the UNet that `Backbone.compile_unet` made, if it made one for as many latents as pass at once.
    ``callback``: see `samplers.ddim`. Raises ValueError for an unknown ``sampler``.
    """
    if sampler not in SAMPLERS:
        raise unknown_name("sampler", sampler, SAMPLERS)
    at_once, tokens = passes_per_step(guidance_scale) * len(noise), condition.context.shape[1]
    compiled = compiled and backbone.is_compiled_for(at_once, tokens)
    predict = backbone.predict_compiled if compiled else backbone.predict_noise
    # A compiled UNet stays whole: its cross-attention is compiled with the rest.
    one_context = contextlib.nullcontext() if compiled else backbone.one_context()

    def guided(latents: torch.Tensor, t: int) -> torch.Tensor:
        with one_context:
            return guided_noise(predict, latents, t, condition, unconditional, guidance_scale)

    noise, start = noise.to(backbone.device), None
    if condition.start is not None:
        start = Start(condition.start.to(backbone.device), condition.strength)
    return SAMPLERS[sampler](guided, noise, num_inference_steps, backbone.alphas_cumprod, callback, start)


@torch.no_grad()
def generate(
    backbone: Backbone,
    conditioner: Conditioner,
    class_labels: torch.Tensor,
    *,
    num_inference_steps: int,
    guidance_scale: float,
    seed: int = 0,
    set_name: str = "set",
    first_index: int = 0,
    image_size: int | None = None,
    antialias: bool = True,
    sampler: str = "ddim",
    batch_size: int = 128,
    compiled: bool = False,
    progress: str | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> torch.Tensor:
    """Draws one image for each label: uint8 (N, 3, image_size, image_size), on the CPU.

    ``class_labels`` int64 (N,); ``num_inference_steps`` (IS) 1..1000; ``guidance_scale`` (UGS) >= 0;
    ``first_index`` the position in the set of the first label, so that a set can be made in shards: image i starts from
    noise of (``seed``, ``set_name``, i) alone. ``image_size`` pixels (None: the backbone's), ``antialias`` on the way
    there; ``batch_size`` images at once, fewer where the accelerator's memory runs out; ``compiled``: see
    `generate_latents`; ``progress`` a title for a progress bar; ``on_batch(images done)``.
    """
    if not guidance_scale >= 0:
        raise ValueError(f"guidance_scale must be at least 0, not {guidance_scale!r}.")
    images: list[torch.Tensor] = []
    micro = backbone.micro_batch("generate", batch_size)
    how = dict(num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, sampler=sampler)
    with tqdm(total=len(class_labels), desc=progress, unit="image", disable=progress is None) as bar:
        for start in range(0, len(class_labels), batch_size):
            labels = class_labels[start : start + batch_size]
            indices = torch.arange(first_index + start, first_index + start + len(labels))
            noise = image_noise(seed, set_name, indices.tolist(), backbone.latent_shape)
            batch: list[torch.Tensor] = []

            def work(part: slice) -> None:
                condition = conditioner(labels[part], indices[part], seed)
                away_from = unconditional_of(conditioner, labels[part], indices[part])
                latents = generate_latents(backbone, condition, away_from, noise[part], compiled=compiled, **how)
                small = resize(backbone.decode(latents), image_size or backbone.image_size, antialias)
                batch.append(small.cpu())  # the one copy off the device

            micro.run(len(labels), batch.clear, work)
            images += batch
            bar.update(len(labels))
            if on_batch:
                on_batch(start + len(labels))
    return torch.cat(images)
