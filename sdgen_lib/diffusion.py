"""The diffusion loss and the samplers: short pure functions over ``predict_noise``, that read like the papers.

``predict_noise(latents, t, context)`` is the UNet: latents (B, C, H, W), t int64 (B,) in 0..999, context
(B, tokens, width) -> predicted noise (B, C, H, W). ``alphas_cumprod`` is the schedule, float (1000,): the share of
signal variance left at each timestep.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers import DPMSolverMultistepScheduler

Predict = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Callback = Callable[[int, torch.Tensor, torch.Tensor], None]


def add_noise(latents: torch.Tensor, noise: torch.Tensor, alpha_bar: torch.Tensor) -> torch.Tensor:
    """x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise (Ho et al. 2020, eq. 4); alpha_bar (B,) or a scalar."""
    alpha_bar = alpha_bar.view(-1, 1, 1, 1)
    return alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * noise


def diffusion_loss(
    predict_noise: Predict, latents: torch.Tensor, context: torch.Tensor, t: torch.Tensor, noise: torch.Tensor,
    alphas_cumprod: torch.Tensor, weight: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Mean squared error between the noise and its prediction (Ho et al. 2020, eq. 14): a scalar.

    ``weight`` float (B,): of each image's error (None: 1 for all); see `Backbone.loss_weight`.
    """
    noisy = add_noise(latents, noise, alphas_cumprod[t])
    errors = (predict_noise(noisy, t, context).float() - noise).square().mean(dim=(1, 2, 3))
    return (errors if weight is None else weight * errors).mean()


def guided_noise(
    predict_noise: Predict, latents: torch.Tensor, t: int, context: torch.Tensor, unconditional: torch.Tensor,
    guidance_scale: float,
) -> torch.Tensor:  # fmt: skip
    """eps = eps_uncond + UGS (eps_cond - eps_uncond), for every UGS >= 0 (the released code's formula).

    UGS 0 is the unconditional model, 1 the conditional one, between them they mix; the half with no weight is not
    computed. (The diffusers pipelines switch guidance off for UGS <= 1 and so cannot search [0, 1].)
    ``context`` (B, tokens, width), ``unconditional`` (tokens, width).
    """
    batch = len(latents)
    steps = torch.full((batch,), int(t), dtype=torch.int64, device=latents.device)
    if guidance_scale == 1:
        return predict_noise(latents, steps, context).float()
    unconditional = unconditional.expand(batch, -1, -1)
    if guidance_scale == 0:
        return predict_noise(latents, steps, unconditional).float()
    both = predict_noise(latents.repeat(2, 1, 1, 1), steps.repeat(2), torch.cat([unconditional, context]))
    eps_uncond, eps_cond = both.float().chunk(2)
    return eps_uncond + guidance_scale * (eps_cond - eps_uncond)


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
    guided: Callable[[torch.Tensor, int], torch.Tensor], noise: torch.Tensor, num_inference_steps: int,
    alphas_cumprod: torch.Tensor, callback: Callback | None = None,
) -> torch.Tensor:  # fmt: skip
    """Deterministic DDIM (Song et al. 2021, eq. 12 with eta 0) as the paper's released code runs it.

    Each step goes to the *next timestep of the list*, however uneven, and the last one to alpha_bar = 1.
    ``guided(latents, t)`` -> eps. ``callback(step, latents, predicted x_0)`` sees every step. Returns x_0.
    """
    latents = noise
    timesteps = inference_timesteps(num_inference_steps, len(alphas_cumprod)).tolist()
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
    guided: Callable[[torch.Tensor, int], torch.Tensor], noise: torch.Tensor, num_inference_steps: int,
    alphas_cumprod: torch.Tensor, callback: Callback | None = None,
) -> torch.Tensor:  # fmt: skip
    """DPM-Solver++(2M) (Lu et al. 2022) by diffusers' scheduler; arguments and result as `ddim`."""
    inference_timesteps(num_inference_steps, len(alphas_cumprod))  # refuses what cannot be visited
    betas = 1 - alphas_cumprod.double() / F.pad(alphas_cumprod.double(), (1, -1), value=1.0)
    scheduler = DPMSolverMultistepScheduler(
        num_train_timesteps=len(alphas_cumprod), trained_betas=betas.tolist(), timestep_spacing="linspace"
    )
    scheduler.set_timesteps(num_inference_steps)
    latents = noise * scheduler.init_noise_sigma
    for i, t in enumerate(scheduler.timesteps):
        eps = guided(latents, int(t))
        alpha_bar = alphas_cumprod[int(t)]
        predicted_x0 = (latents - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()
        latents = scheduler.step(eps, t, latents).prev_sample
        if callback:
            callback(i, latents, predicted_x0)
    return latents


SAMPLERS = {"ddim": ddim, "dpm-solver++": dpm_solver}
