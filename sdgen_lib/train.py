"""The one training loop, of step 1 (the Class-Encoder) and step 3 (the UNet): what trains is a parameter."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pandas as pd
import torch
from torch import nn
from tqdm.auto import tqdm

from . import runs
from .backbone import Backbone
from .class_encoder import ClassEncoder
from .diffusion import diffusion_loss

FIXED_NOISES = 2  # noises per held-out latent: enough that the loss of two epochs can be compared


@dataclasses.dataclass(frozen=True)
class Latents:
    """A split after the VAE: latents float32 (N, C, H, W) and labels int64 (N,), on the device."""

    latents: torch.Tensor
    labels: torch.Tensor


def checkpoint_path(folder: Path, epoch: int) -> Path:
    return folder / f"epoch_{epoch:03d}.safetensors"


@torch.no_grad()
def held_out_losses(
    backbone: Backbone, class_encoder: ClassEncoder, held_out: Latents, unconditional: torch.Tensor,
    batch_size: int = 128,
) -> dict[str, float]:  # fmt: skip
    """The diffusion loss on held-out images with their right label, a wrong one and the unconditional context.

    Timesteps and noise are fixed, so that epochs compare. A model that uses the label shows right < empty and
    right < wrong; a loss that falls while the three draw together has forgotten the class.
    """
    n, classes = len(held_out.labels), class_encoder.num_classes
    generator = torch.Generator().manual_seed(0)
    contexts, totals = class_encoder.contexts(), dict.fromkeys(("right", "wrong", "empty"), 0.0)
    for _ in range(FIXED_NOISES):
        t = torch.randint(0, len(backbone.alphas_cumprod), (n,), generator=generator)
        noise = torch.randn(held_out.latents.shape, generator=generator)
        shift = torch.randint(1, classes, (n,), generator=generator).to(held_out.labels.device)
        for start in range(0, n, batch_size):
            rows = slice(start, start + batch_size)
            labels = held_out.labels[rows]
            for kind, context in (
                ("right", contexts[labels]),
                ("wrong", contexts[(labels + shift[rows]) % classes]),
                ("empty", unconditional.expand(len(labels), -1, -1)),
            ):
                loss = diffusion_loss(
                    backbone.predict_noise, held_out.latents[rows], context, t[rows].to(backbone.device),
                    noise[rows].to(backbone.device), backbone.alphas_cumprod,
                )  # fmt: skip
                totals[kind] += float(loss) * len(labels) / (n * FIXED_NOISES)
    return totals


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimiser's state by flat names, 'optimizer.<parameter number>.<quantity>': what safetensors can hold."""
    state = optimizer.state_dict()["state"]
    return {f"optimizer.{i}.{k}": torch.as_tensor(v) for i, values in state.items() for k, v in values.items()}


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, number, quantity = name.split(".")
            state.setdefault(int(number), {})[quantity] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def fit(
    trainable: nn.Module, backbone: Backbone, class_encoder: ClassEncoder, train: Latents, held_out: Latents,
    folder: Path, *, epochs: int, batch_size: int, learning_rate: float, weight_decay: float, clip_norm: float,
    seed: int, unconditional: str = "zero", title: str = "training",
) -> pd.DataFrame:  # fmt: skip
    """Trains ``trainable`` (the Class-Encoder, or the backbone's UNet) with the diffusion loss; the rest stays frozen.

    AdamW, global clip norm, cosine decay to zero over all steps (paper, section 3, step 1). Every epoch leaves a
    checkpoint ``epoch_001.safetensors`` .. in ``folder``, and the state from which a killed training goes on to the
    same result: each epoch's order, timesteps and noise come from (seed, epoch) alone.

    Returns one row per epoch, index ``epoch``: train (loss), and right, wrong, empty (see `held_out_losses`).
    Raises FloatingPointError if the loss stops being finite; the checkpoints of earlier epochs stay.
    """
    parameters = [p.requires_grad_(True) for p in trainable.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay)
    n = len(train.labels)
    total_steps = epochs * math.ceil(n / batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * min(step, total_steps) / total_steps))
    )
    empty_prompt = backbone.text_context([""])[0] if unconditional == "empty_prompt" else None
    history: list[dict[str, float]] = runs.load_json(folder / "history.json", [])
    state_path = folder / "state.safetensors"
    if history and state_path.exists():
        state = runs.load_tensors(state_path)
        history = history[: int(state["epoch"])]
        trainable.load_state_dict({k[6:]: v for k, v in state.items() if k.startswith("model.")})
        _load_optimizer(optimizer, state)
        schedule.last_epoch = len(history) * math.ceil(n / batch_size)
        for group, rate in zip(optimizer.param_groups, [schedule.lr_lambdas[0](schedule.last_epoch) * learning_rate]):
            group["lr"] = rate
    else:
        history = []

    bar = tqdm(total=epochs, initial=len(history), desc=title, unit="epoch")
    for epoch in range(len(history) + 1, epochs + 1):
        generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
        losses = torch.zeros(())
        for rows in torch.randperm(n, generator=generator).split(batch_size):
            t = torch.randint(0, len(backbone.alphas_cumprod), (len(rows),), generator=generator)
            noise = torch.randn(len(rows), *train.latents.shape[1:], generator=generator)
            rows = rows.to(train.labels.device)
            loss = diffusion_loss(
                backbone.predict_noise, train.latents[rows], class_encoder.contexts()[train.labels[rows]],
                t.to(backbone.device), noise.to(backbone.device), backbone.alphas_cumprod,
            )  # fmt: skip
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, clip_norm)
            optimizer.step()
            schedule.step()
            losses += loss.detach().cpu() * len(rows) / n
        if not torch.isfinite(losses):
            raise FloatingPointError(
                f"Loss of {title}, epoch {epoch}, is {float(losses)}: lower the learning rate of {learning_rate:g}. "
                f"The checkpoints of earlier epochs are in {folder.name}/."
            )
        away_from = class_encoder.unconditional(unconditional, empty_prompt)
        history.append({"train": float(losses), **held_out_losses(backbone, class_encoder, held_out, away_from)})
        weights = trainable.state_dict()
        large = sum(v.numel() for v in weights.values()) > 1_000_000  # a UNet: half precision halves the disk
        kept = {k: v.half() for k, v in weights.items()} if large else weights
        runs.save_tensors(checkpoint_path(folder, epoch), kept)
        runs.save_json(folder / "history.json", history)
        runs.save_tensors(state_path, {"epoch": torch.tensor(epoch), **{f"model.{k}": v for k, v in weights.items()},
                                       **_optimizer_tensors(optimizer)})  # fmt: skip
        bar.set_postfix({name: f"{value:.4f}" for name, value in history[-1].items()})
        bar.update()
    bar.close()
    optimizer.zero_grad(set_to_none=True)
    trainable.requires_grad_(False)
    return pd.DataFrame(history, index=pd.RangeIndex(1, len(history) + 1, name="epoch"))
