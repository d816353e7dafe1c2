"""The samplers: short pure functions that read like the papers. ``predict_noise`` and the schedule: see `loss`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers import DPMSolverMultistepScheduler

from .conditions import Condition
from .loss import Predict

Callback = Callable[[int, torch.Tensor, torch.Tensor], None]
Guided = Callable[[torch.Tensor, int], torch.Tensor]


def guided_noise(
    predict_noise: Predict,
    latents: torch.Tensor,
    t: int,
    condition: Condition,
    unconditional: Condition,
    guidance_scale: float,
) -> torch.Tensor:
    """eps = eps_uncond + UGS (eps_cond - eps_uncond), for every UGS >= 0 (the released code's formula).

    UGS 0 is the unconditional model, 1 the conditional one, between them they mix; the half with no weight is not
    computed. (The diffusers pipelines switch guidance off for UGS <= 1 and so cannot search [0, 1].)
    ``condition`` of B images; ``unconditional`` of one or of B.
    """
    batch = len(latents)
    steps = torch.full((batch,), int(t), dtype=torch.int64, device=latents.device)
    if guidance_scale == 1:
        return predict_noise(latents, steps, condition).float()
    if len(unconditional) == 1:
        unconditional = unconditional.expand(batch)
    if guidance_scale == 0:
        return predict_noise(latents, steps, unconditional).float()
    both = predict_noise(latents.repeat(2, 1, 1, 1), steps.repeat(2), unconditional.followed_by(condition))
    eps_uncond, eps_cond = both.float().chunk(2)
    return eps_uncond + guidance_scale * (eps_cond - eps_uncond)


@dataclasses.dataclass(frozen=True)
class Start:
    """Where img2img begins: latents of real images, float (B, C, H, W), and how far from them it may go, 0..1."""

    latents: torch.Tensor
    strength: float


def skipped(strength: float, num_inference_steps: int) -> int:
    """The inference steps that img2img leaves out at its start, as diffusers' pipeline counts them.

    ``strength`` 1 leaves out none: the latents are all but gone in the noise; 0 leaves out all, and nothing changes.
    Raises ValueError for a strength outside of 0..1.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must be from 0 to 1, not {strength!r}.")
    return num_inference_steps - min(int(num_inference_steps * strength), num_inference_steps)


def noisy(latents: torch.Tensor, noise: torch.Tensor, alpha_bar: torch.Tensor) -> torch.Tensor:
    """x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps, for an ``alpha_bar`` that is the same for all."""
    return alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * noise


def passes_per_step(guidance_scale: float) -> int:
    """How many times `guided_noise` passes each image through the UNet: 1 where one half has no weight, else 2."""
    return 1 if guidance_scale in (0, 1) else 2


def inference_timesteps(num_inference_steps: int, num_train_timesteps: int = 1000) -> torch.Tensor:
    """The timesteps a sampler visits, downwards: round(i * 999 / (n - 1)) for i = n-1..0 (released code).

    int64 (n,). One step visits 999 alone. Raises ValueError outside 1..1000.
    """
    if not 1 <= num_inference_steps <= num_train_timesteps:
        raise ValueError(f"num_inference_steps must be from 1 to {num_train_timesteps}, not {num_inference_steps!r}.")
    last = num_train_timesteps - 1
    if num_inference_steps == 1:
        return torch.tensor([last])
    steps = torch.arange(num_inference_steps, dtype=torch.float64) * last / (num_inference_steps - 1)
    return steps.round().long().flip(0)


def ddim(
    guided: Guided,
    noise: torch.Tensor,
    num_inference_steps: int,
    alphas_cumprod: torch.Tensor,
    callback: Callback | None = None,
    start: Start | None = None,
) -> torch.Tensor:
    """Deterministic DDIM (Song et al. 2021, eq. 12 with eta 0) as the paper's released code runs it.

    Each step goes to the *next timestep of the list*, however uneven, and the last one to alpha_bar = 1. With a
    ``start`` the first steps are left out, see `skipped`.
    ``guided(latents, t)`` -> eps. ``callback(step, latents, predicted x_0)`` sees every step. Returns x_0.
    """
    timesteps = inference_timesteps(num_inference_steps, len(alphas_cumprod)).tolist()
    latents = noise
    if start is not None:
        timesteps = timesteps[skipped(start.strength, num_inference_steps) :]
        latents = noisy(start.latents, noise, alphas_cumprod[timesteps[0]]) if timesteps else start.latents
    for i, t in enumerate(timesteps):
        alpha_bar = alphas_cumprod[t]
        is_last = i + 1 == len(timesteps)
        alpha_bar_next = torch.ones_like(alpha_bar) if is_last else alphas_cumprod[timesteps[i + 1]]
        eps = guided(latents, t)
        predicted_x0 = (latents - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()
        latents = alpha_bar_next.sqrt() * predicted_x0 + (1 - alpha_bar_next).sqrt() * eps
        if callback:
            callback(i, latents, predicted_x0)
    return latents


def dpm_solver(
    guided: Guided,
    noise: torch.Tensor,
    num_inference_steps: int,
    alphas_cumprod: torch.Tensor,
    callback: Callback | None = None,
    start: Start | None = None,
) -> torch.Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022) by diffusers' scheduler; arguments and result as `ddim`.

    It visits n of n + 1 timesteps that lie evenly from 999 to 0, all but the 0; for n = 1000 all 1000.
    """
    visited = inference_timesteps(num_inference_steps, len(alphas_cumprod))  # refuses what cannot be visited
    exact = alphas_cumprod.cpu().double()  # a Mac's graphics have no float64
    betas = 1 - exact / F.pad(exact, (1, -1), value=1.0)
    scheduler = DPMSolverMultistepScheduler(
        num_train_timesteps=len(alphas_cumprod), trained_betas=betas.tolist(), timestep_spacing="linspace"
    )
    if num_inference_steps < len(alphas_cumprod):
        scheduler.set_timesteps(num_inference_steps)
    else:  # of n + 1 there would be one twice, and a step of length 0: not a number
        scheduler.set_timesteps(timesteps=visited.tolist())
    latents, timesteps = noise * scheduler.init_noise_sigma, scheduler.timesteps
    if start is not None:
        first = skipped(start.strength, num_inference_steps)
        timesteps = timesteps[first:]
        scheduler.set_begin_index(first)
        latents = noisy(start.latents, noise, alphas_cumprod[int(timesteps[0])]) if len(timesteps) else start.latents
    for i, t in enumerate(timesteps):
        eps = guided(latents, int(t))
        alpha_bar = alphas_cumprod[int(t)]
        predicted_x0 = (latents - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()
        latents = scheduler.step(eps, t, latents).prev_sample
        if callback:
            callback(i, latents, predicted_x0)
    return latents


SAMPLERS = {"ddim": ddim, "dpm-solver++": dpm_solver}
