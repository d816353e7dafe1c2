"""A model whose right answers are known, and a conditioner that learns them: trainings of milliseconds."""

import torch
from torch import nn

from sdgen_lib.diffusion.conditions import Condition
from sdgen_lib.diffusion.training import Latents
from sdgen_lib.machine.memory import MicroBatch

VALUES = torch.tensor([[1.0, 0.0, -1.0, 0.5], [-1.0, 2.0, 0.0, 0.0], [0.0, 0.0, 1.0, -2.0]])  # of three classes


class FlatModel:
    """Stands for a backbone that knows everything about its data: images of one value per channel, set by the context.

    Latents are (4, 2, 2), contexts (1, 4), ten timesteps whose alpha_bar is 0.5: an error e of a channel's value
    costs exactly e squared in the loss.
    """

    device, dtype = "cpu", torch.float32
    alphas_cumprod = torch.full((10,), 0.5)

    def __init__(self):
        self.unet = self
        self.is_gradient_checkpointing = False

    def predict_noise(self, latents, t, condition):
        """The exact noise of noisy flat images: the context (B, 1, 4) holds the value of each latent channel."""
        alpha_bar = self.alphas_cumprod[t].view(-1, 1, 1, 1)
        return (latents - alpha_bar.sqrt() * condition.context.view(-1, 4, 1, 1)) / (1 - alpha_bar).sqrt()

    def loss_weight(self, t):
        return None

    def micro_batch(self, work, size):
        return MicroBatch(size)

    # --- what a training asks of a UNet ---

    def parameters(self):
        return iter(())

    def enable_gradient_checkpointing(self):
        self.is_gradient_checkpointing = True

    def disable_gradient_checkpointing(self):
        self.is_gradient_checkpointing = False


class SmallCard(FlatModel):
    """As a `FlatModel`, on a card where ``most`` images fit at once, with gradient checkpointing ``relieved``."""

    def __init__(self, most, relieved=None):
        super().__init__()
        self.most, self.relieved, self.sizes = most, relieved or most, []

    def predict_noise(self, latents, t, condition):
        if torch.is_grad_enabled():
            if len(latents) > (self.relieved if self.is_gradient_checkpointing else self.most):
                raise torch.OutOfMemoryError("tried to allocate too much\nand more lines")
            self.sizes.append(len(latents))
        return super().predict_noise(latents, t, condition)


class Contexts(nn.Module):
    """A `Conditioner` that learns a context for each label; the unconditional one is zero."""

    def __init__(self, contexts):
        super().__init__()
        self.contexts = nn.Parameter(contexts.clone())  # (C, tokens, width)

    def forward(self, labels, indices=None, seed=0):
        return Condition(self.contexts[labels])

    def unconditional(self):
        return Condition(torch.zeros_like(self.contexts[:1]))


def flat_contexts(values=None):
    """Of three classes; all zero unless ``values`` (3, 4) are given."""
    return Contexts(torch.zeros(3, 1, 4) if values is None else values[:, None])


def flat_latents(count):
    labels = torch.arange(count) % 3
    return Latents(VALUES[labels].view(-1, 4, 1, 1).expand(-1, -1, 2, 2).clone(), labels)
