"""The Class-Encoder: the linear map that takes the text encoder's place (arXiv 2405.02698, section 3)."""

from __future__ import annotations

import torch
from torch import nn


class ClassEncoder(nn.Module):
    """A linear map from a one-hot class vector to the UNet's context: (B, num_classes) -> (B, tokens, width).

    The paper's is a weight matrix and a bias (``rank`` None). Its released code has two in a row, with a bias on the
    first alone: num_classes -> ``rank`` 500 -> 100 x 768; still linear, begun as Keras does (Glorot uniform, bias 0).
    ``tokens`` need not be the text encoder's number: cross-attention takes any.

    ``start``, float (tokens, width), for ``rank`` None: the context that every class begins with (the empty prompt's,
    say); the weights then begin at zero. ``None`` begins with torch's default random weights. Fed the all-zero vector,
    the map returns what all classes share: the unconditional context of the paper's released code.
    """

    def __init__(
        self, num_classes: int, tokens: int, width: int, start: torch.Tensor | None = None, rank: int | None = None
    ):
        super().__init__()
        self.num_classes, self.tokens, self.width = num_classes, tokens, width
        if rank is None:
            self.linear = nn.Linear(num_classes, tokens * width)
        else:
            self.linear = nn.Sequential(nn.Linear(num_classes, rank), nn.Linear(rank, tokens * width, bias=False))
            for layer in self.linear:
                nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(self.linear[0].bias)
        if start is not None:
            if rank is not None:
                raise ValueError("A Class-Encoder of two maps has no bias to begin at a context: use start=None.")
            nn.init.zeros_(self.linear.weight)
            with torch.no_grad():
                self.linear.bias.copy_(start.reshape(-1))

    def forward(self, one_hot: torch.Tensor) -> torch.Tensor:
        """float (B, num_classes) -> float (B, tokens, width)."""
        return self.linear(one_hot).view(-1, self.tokens, self.width)

    def contexts(self) -> torch.Tensor:
        """The context of each class: float (num_classes, tokens, width). Keeps gradients."""
        return self(torch.eye(self.num_classes, device=self.device))

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def unconditional(self, kind: str = "zero", empty_prompt: torch.Tensor | None = None) -> torch.Tensor:
        """The context that guidance moves away from: float (tokens, width).

        ``kind``: "zero", the map of the zero vector (released code); "class_mean", the mean of the classes'
        contexts (Diffusion Inversion's choice); "empty_prompt", the text encoder's, passed as ``empty_prompt``.
        """
        if kind == "zero":
            return self(torch.zeros(1, self.num_classes, device=self.device))[0]
        if kind == "class_mean":
            return self.contexts().mean(0)
        if kind == "empty_prompt":
            if empty_prompt is None:
                raise ValueError("unconditional='empty_prompt' needs the text encoder's context for the empty prompt.")
            return empty_prompt.to(self.device, torch.float32)
        raise ValueError(f"Unknown unconditional context {kind!r}. Allowed: zero, class_mean, empty_prompt.")
