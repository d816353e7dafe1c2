"""What every picture of the source domain is made with: its size, the named colours, chance."""

from __future__ import annotations

import torch

SIZE = 32  # pixels, the side of every source image
COLOURS = {
    "black": (12, 12, 12),
    "white": (243, 243, 243),
    "grey": (128, 128, 128),
    "red": (205, 45, 45),
    "green": (55, 150, 65),
    "blue": (50, 80, 190),
    "yellow": (230, 210, 70),
    "orange": (230, 135, 45),
    "purple": (130, 65, 160),
    "brown": (125, 85, 50),
    "pink": (235, 150, 180),
    "cyan": (80, 190, 210),
}


def uniform(n: int, low: float, high: float, generator: torch.Generator) -> torch.Tensor:
    """``n`` numbers, uniform in low..high."""
    return torch.rand(n, generator=generator) * (high - low) + low


def colour(names: list[str], generator: torch.Generator) -> torch.Tensor:
    """The colours of these names, each a little off: (n, 3, 1, 1) in 0..1."""
    base = torch.tensor([COLOURS[name] for name in names], dtype=torch.float32) / 255
    return (base + torch.randn(base.shape, generator=generator) * 0.04).clamp(0, 1).view(-1, 3, 1, 1)
