"""What the trainings of both tiny models share: a training's steps, the stream of pictures, the frozen parts."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from ..machine.devices import autocast
from . import source_images, source_scenes

HELD_OUT = 512  # pictures that nothing trains on
Log = Callable[[dict], None]


def to_unit(images: torch.Tensor) -> torch.Tensor:
    """uint8 0..255 -> float32 -1..1."""
    return images.float() / 127.5 - 1


class Steps:
    """One training's optimiser, learning rate (linear warm-up, cosine to zero), clipping, and averaged modules.

    ``ema``: copies of ``modules`` whose weights are an exponential moving average with decay
    min(``ema_decay``, n / (n + 10)) at step n, so that the random start is soon forgotten.
    ``faster``: learning rates of their own, by the ``id`` of a parameter.
    """

    def __init__(
        self,
        modules: Sequence[torch.nn.Module],
        total: int,
        lr: float,
        ema_decay: float = 0.999,
        faster: Mapping[int, float] = {},
    ):
        self.modules, self.total, self.decay, self.step = modules, total, ema_decay, 0
        self.parameters = [p for m in modules for p in m.parameters()]
        self.ema = [copy.deepcopy(m).requires_grad_(False).eval() for m in modules]
        rates = [faster.get(id(p), lr) for p in self.parameters]
        groups = [
            {"params": [p for p, own in zip(self.parameters, rates) if own == rate], "lr": rate}
            for rate in dict.fromkeys(rates)
        ]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=1e-4, fused=True)
        rates, warmup = torch.optim.lr_scheduler, min(200, total // 10 + 1)
        rising = rates.LinearLR(self.optimizer, 0.05, total_iters=warmup)
        falling = rates.CosineAnnealingLR(self.optimizer, max(1, total - warmup))
        self.schedule = rates.SequentialLR(self.optimizer, [rising, falling], milestones=[warmup])

    def take(self, loss: torch.Tensor) -> None:
        """One step of the optimiser down the gradient of ``loss``, a scalar."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.step += 1
        decay = min(self.decay, self.step / (self.step + 10))
        with torch.no_grad():
            for average, module in zip(self.ema, self.modules):
                torch._foreach_lerp_(list(average.parameters()), list(module.parameters()), 1 - decay)


@dataclasses.dataclass(frozen=True)
class Source:
    """The source domain as a stream of batches, drawn on the device that trains: a GPU draws a hundred times faster.

    ``generator``, on the CPU: the chance of everything else, and the seed of the pictures' own.
    """

    generator: torch.Generator
    batch: int
    with_digits: bool
    device: str

    @functools.cached_property
    def chance(self) -> torch.Generator:
        """The generator of the pictures, on the device."""
        return self._seeded(int(torch.randint(2**31, (1,), generator=self.generator)))

    def _seeded(self, seed: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(seed)

    def draw(self, n: int) -> tuple[torch.Tensor, list[str]]:
        """``n`` pictures, uint8 (n, 3, 32, 32), on the device, and their captions."""
        chance = self.chance
        with torch.device(self.device):
            return source_images.draw(n, chance, self.with_digits)

    def distort(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 (n, 3, 32, 32) on the device -> the same, see `source_images.distort`."""
        chance = self.chance
        with torch.device(self.device):
            return source_images.distort(images, chance)

    def roughen(self, images: torch.Tensor) -> torch.Tensor:
        """float (n, 3, 32, 32) in -1..1 on the device -> the same, see `source_scenes.roughen`."""
        chance = self.chance
        with torch.device(self.device):
            return source_scenes.roughen(images, chance)

    def rows(self, pool: int) -> torch.Tensor:
        """Which pictures of a pool the next batch is made of: int64 (batch,)."""
        return torch.randint(pool, (self.batch,), generator=self.generator)

    def held_out(self, seed: int) -> tuple[torch.Tensor, list[str], torch.Generator]:
        """Pictures as `draw`, the same ones each time, their captions, and a generator for what else is fixed."""
        with torch.device(self.device):
            drawn = source_images.draw(HELD_OUT, self._seeded(seed), self.with_digits)
        return *drawn, torch.Generator().manual_seed(seed)


def sample_timesteps(n: int, generator: torch.Generator) -> torch.Tensor:
    """Half uniform over 0..999, half over 250..950, where it is decided *which* thing is drawn."""
    everywhere = torch.randint(0, 1000, (n,), generator=generator)
    middle = torch.randint(250, 950, (n,), generator=generator)
    return torch.where(torch.rand(n, generator=generator) < 0.5, everywhere, middle)


@dataclasses.dataclass(frozen=True)
class Frozen:
    """What the training of the UNet stands on: the finished VAE, the tokenizer, the schedule (on the device)."""

    vae: AutoencoderKL
    tokenizer: CLIPTokenizer
    alphas_cumprod: torch.Tensor
    device: str

    @torch.no_grad()
    def latents(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 images (N, 3, 32, 32) -> latents (N, C, 8, 8) on the device, drawn from the VAE's posterior."""
        parts = [self.vae.encode(to_unit(part).to(self.device)).latent_dist.sample() for part in images.split(512)]
        return torch.cat(parts) * self.vae.config.scaling_factor

    def tokens(self, captions: list[str]) -> torch.Tensor:
        """int64 (len(captions), tokens) on the device."""
        padded = dict(padding="max_length", truncation=True, return_tensors="pt")
        return self.tokenizer(captions, **padded).input_ids.to(self.device)

    def loss(
        self,
        unet: UNet2DConditionModel,
        text_encoder: CLIPTextModel,
        latents: torch.Tensor,
        ids: torch.Tensor,
        t: torch.Tensor,
        noise: torch.Tensor,
    ) -> torch.Tensor:
        """The diffusion loss, a scalar: latents and noise (B, C, 8, 8), captions ids (B, tokens), t int64 (B,)."""
        with autocast(self.device, torch.bfloat16):
            context = text_encoder(ids).last_hidden_state
        return self.loss_told(unet, latents, context, t, noise)

    def loss_told(
        self,
        unet: UNet2DConditionModel,
        latents: torch.Tensor,
        context: torch.Tensor,
        t: torch.Tensor,
        noise: torch.Tensor,
        embedding: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As `loss`, of latents that are told a context (B, tokens, width) and, of an unCLIP UNet, an embedding."""
        alpha_bar = self.alphas_cumprod[t].view(-1, 1, 1, 1)
        noisy = alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * noise
        with autocast(self.device, torch.bfloat16):
            predicted = unet(noisy, t, encoder_hidden_states=context, class_labels=embedding).sample
        return F.mse_loss(predicted.float(), noise)
