"""Small steps that an adversary takes with each image: as far as ``epsilon`` in every value, in grey levels of 0..255.

The adversary knows the classifier: it climbs the classifier's own loss at the right label.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ..machine.seeds import image_noise

BATCH_SIZE = 256


@dataclass(frozen=True)
class Attack:
    """An attack: ``steps`` of ``step`` grey levels uphill, never further than ``epsilon`` from the image.

    ``random_start``: it begins at a random place as near, which ``seed`` decides. One step of ``epsilon`` from the
    image itself is `fgsm`, all others are `pgd`'s. Raises ValueError for numbers that are no attack.
    """

    epsilon: float
    step: float
    steps: int = 1
    random_start: bool = False
    seed: int = 0

    def __post_init__(self):
        for name in ("epsilon", "step"):
            if isinstance(value := getattr(self, name), bool) or not isinstance(value, int | float):
                raise ValueError(f"{name} is {value!r}; it must be a number of grey levels of 0..255.")
        if not 0 <= self.epsilon < math.inf:
            raise ValueError(f"epsilon is {self.epsilon}; it must be 0 or more, in grey levels of 0..255.")
        if not 0 < self.step < math.inf and self.epsilon:
            raise ValueError(f"step is {self.step}; it must be above 0, in grey levels of 0..255.")
        if type(self.steps) is not int or self.steps < 1:
            raise ValueError(f"steps is {self.steps}; it must be a whole number from 1.")

    def __call__(
        self, model: nn.Module, images: torch.Tensor, labels: torch.Tensor, batch_size: int = BATCH_SIZE
    ) -> torch.Tensor:
        """uint8 (N, 3, H, W), int64 (N,) -> attacked images, float32 (N, 3, H, W), 0..255, on the CPU.

        The model answers as in evaluation, and is left as it was, its parameters without a gradient of this. A grey
        image's three channels are attacked each on its own. Which images are in a batch changes nothing but rounding.
        """
        device, found = next(model.parameters()).device, []
        with _evaluating(model):
            for first in range(0, len(images), batch_size):
                part = images[first : first + batch_size].float()
                start = self._start(part, first)
                found.append(self._climbed(model, part, start, labels[first : first + batch_size], device))
        return torch.cat(found) if found else images.float()

    def _start(self, images: torch.Tensor, first: int) -> torch.Tensor:
        """Uniform within epsilon of the images ``first``, ``first`` + 1, ..: each has random numbers of its own."""
        if not self.random_start:
            return images
        normal = image_noise(self.seed, "attack", range(first, first + len(images)), images.shape[1:])
        uniform = 2 * torch.special.ndtr(normal) - 1  # -1..1
        return self._allowed(images + self.epsilon * uniform, images)

    def _climbed(
        self, model: nn.Module, images: torch.Tensor, start: torch.Tensor, labels: torch.Tensor, device: torch.device
    ) -> torch.Tensor:
        images, attacked, labels = images.to(device), start.to(device), labels.to(device)
        for _ in range(self.steps):
            with torch.enable_grad():
                attacked = attacked.detach().requires_grad_()
                loss = F.cross_entropy(model(attacked), labels, reduction="sum")  # each image's gradient is its own
                (uphill,) = torch.autograd.grad(loss, attacked)  # the parameters get none
            attacked = self._allowed(attacked.detach() + self.step * uphill.sign(), images)
        return attacked.cpu()

    def _allowed(self, attacked: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """What is too far from the images, or is no grey level, is moved to the nearest that is allowed."""
        return attacked.clamp(images - self.epsilon, images + self.epsilon).clamp(0, 255)


def fgsm(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, epsilon: float) -> torch.Tensor:
    """The fast gradient sign method (Goodfellow et al. 2015, section 4): x + epsilon sign(grad_x loss(x, y)).

    Arguments and what is returned as in `Attack`; ``epsilon`` in grey levels of 0..255.
    """
    return Attack(epsilon, epsilon)(model, images, labels)


def pgd(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor, epsilon: float, step: float, steps: int, seed: int = 0
) -> torch.Tensor:
    """Projected gradient descent (Madry et al. 2018, section 2.1) from a random place within ``epsilon`` of each image.

    Arguments and what is returned as in `Attack`; image i's start depends on ``seed`` and i alone.
    """
    return Attack(epsilon, step, steps, random_start=True, seed=seed)(model, images, labels)


#: The attacks that tables have, by their names there: a perturbation of 2/255 is hardly seen.
ATTACKS: dict[str, Attack] = {
    "FGSM 2/255": Attack(epsilon=2, step=2),
    "PGD 2/255 (10 steps)": Attack(epsilon=2, step=0.5, steps=10, random_start=True),
}


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; each of its parts is in its own mode again afterwards."""
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
