"""The diffusion loss: pure functions over ``predict_noise``, that read like the paper.

``predict_noise(latents, t, condition)`` is the UNet: latents (B, C, H, W), t int64 (B,) in 0..999, a `Condition` of B
images -> the predicted noise (B, C, H, W). ``alphas_cumprod`` is the schedule, float (1000,): the share of signal
variance that is left at each timestep.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .conditions import Condition

Predict = Callable[[torch.Tensor, torch.Tensor, Condition], torch.Tensor]


def add_noise(latents: torch.Tensor, noise: torch.Tensor, alpha_bar: torch.Tensor) -> torch.Tensor:
    """x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise (Ho et al. 2020, eq. 4); alpha_bar (B,) or a scalar."""
    alpha_bar = alpha_bar.view(-1, 1, 1, 1)
    return alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * noise


def example_losses(
    predict_noise: Predict,
    latents: torch.Tensor,
    condition: Condition,
    t: torch.Tensor,
    noise: torch.Tensor,
    alphas_cumprod: torch.Tensor,
    weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """The squared error between the noise and its prediction (Ho et al. 2020, eq. 14), of each image: float (B,).

    ``weight`` float (B,): of each image's error (None: 1 for all); see `Backbone.loss_weight`.
    """
    noisy = add_noise(latents, noise, alphas_cumprod[t])
    errors = (predict_noise(noisy, t, condition).float() - noise).square().mean(dim=(1, 2, 3))
    return errors if weight is None else weight * errors


def diffusion_loss(
    predict_noise: Predict,
    latents: torch.Tensor,
    condition: Condition,
    t: torch.Tensor,
    noise: torch.Tensor,
    alphas_cumprod: torch.Tensor,
    weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """The mean of `example_losses` over the batch: a scalar."""
    return example_losses(predict_noise, latents, condition, t, noise, alphas_cumprod, weight).mean()
