"""The one training loop, of step 1 (the Class-Encoder) and step 3 (the UNet): what trains is a parameter."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
import torch
from torch import nn
from tqdm.auto import tqdm

from . import memory, runs
from .backbone import Backbone
from .class_encoder import ClassEncoder
from .diffusion import diffusion_loss
from .ranks import ALONE, Ranks

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
    batch_size: int = 256,
) -> dict[str, float]:  # fmt: skip
    """The diffusion loss on held-out images with their right label, a wrong one and the unconditional context.

    Timesteps and noise are fixed, so that epochs compare. A model that uses the label shows right < empty and
    right < wrong; a loss that falls while the three draw together has forgotten the class.
    """
    n, classes = len(held_out.labels), class_encoder.num_classes
    generator, micro = torch.Generator().manual_seed(0), memory.MicroBatch(batch_size)
    contexts, totals = class_encoder.contexts(), dict.fromkeys(("right", "wrong", "empty"), 0.0)
    device, labels = backbone.device, held_out.labels
    for _ in range(FIXED_NOISES):
        t = torch.randint(0, len(backbone.alphas_cumprod), (n,), generator=generator)
        noise = torch.randn(held_out.latents.shape, generator=generator)
        shift = torch.randint(1, classes, (n,), generator=generator).to(labels.device)
        for kind, context_of in (
            ("right", lambda rows: contexts[labels[rows]]),
            ("wrong", lambda rows: contexts[(labels[rows] + shift[rows]) % classes]),
            ("empty", lambda rows: unconditional.expand(len(labels[rows]), -1, -1)),
        ):
            sums: list[float] = []

            def work(rows: slice):
                at = t[rows].to(device)
                loss = diffusion_loss(
                    backbone.predict_noise, held_out.latents[rows], context_of(rows), at, noise[rows].to(device),
                    backbone.alphas_cumprod, backbone.loss_weight(at),
                )  # fmt: skip
                sums.append(float(loss) * len(at))

            micro.run(n, sums.clear, work)
            totals[kind] += sum(sums) / (n * FIXED_NOISES)
    return totals


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimiser's state by flat names, 'optimizer.<parameter number>.<quantity>': what safetensors can hold."""
    parameters = optimizer.param_groups[0]["params"]
    return {f"optimizer.{i}.{k}": torch.as_tensor(v)
            for i, p in enumerate(parameters) for k, v in optimizer.state[p].items()}  # fmt: skip


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    parameters = optimizer.param_groups[0]["params"]
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, number, quantity = name.split(".")
            parameter = parameters[int(number)]
            if quantity == "step":  # torch counts in a float on the CPU, bitsandbytes in a plain number
                value = value if value.is_floating_point() else int(value)
            else:
                value = value.to(parameter.device)
            optimizer.state[parameter][quantity] = value


def optimizer_for(
    parameters: list[nn.Parameter], name: str, *, learning_rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    """AdamW (the released code's Keras Adam decays decoupled too), or with a state of 8 bits (Dettmers et al. 2022).

    ``name`` "auto" takes 8 bits where weights, gradients and a float32 state, 16 bytes a parameter, would fill more
    than 60 % of a CUDA card: the whole UNet of Stable Diffusion on 15 GiB. Raises ImportError, with the ways out, where
    bitsandbytes is needed and missing.
    """
    device = parameters[0].device
    if name == "auto":
        needed = 16 * sum(p.numel() for p in parameters)
        small = device.type == "cuda" and needed > 0.6 * torch.cuda.get_device_properties(device).total_memory
        name = "adamw-8bit" if small else "adamw"
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, fused=True)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ImportError(
            "Training this UNet here needs an optimiser state of 8 bits: pip install bitsandbytes, or choose "
            "finetune_method='lora', or optimizer='adamw' if the memory suffices."
        ) from error
    return AdamW8bit(parameters, lr=learning_rate, weight_decay=weight_decay)


def fit(
    trainable: Mapping[str, nn.Parameter], backbone: Backbone, class_encoder: ClassEncoder, train: Latents,
    held_out: Latents, folder: Path, *, epochs: int, batch_size: int, learning_rate: float, weight_decay: float,
    clip_norm: float, seed: int, unconditional: str = "zero", optimizer: str = "auto",
    gradient_checkpointing: bool = False, ranks: Ranks = ALONE, title: str = "training",
) -> pd.DataFrame:  # fmt: skip
    """Trains ``trainable`` with the diffusion loss: parameters, by name, of the Class-Encoder or the backbone's UNet.

    All else stays frozen. AdamW, global clip norm, cosine decay to zero over all steps (paper, section 3, step 1).
    Every epoch leaves a checkpoint ``epoch_001.safetensors`` .. in ``folder``, and the state from which a killed
    training goes on to the same result: each epoch's order, timesteps and noise come from (seed, epoch) alone.

    Several ``ranks`` share each batch and add their gradients up: the result is one process's, up to rounding.
    Where the accelerator's memory runs out, gradient checkpointing is switched on, then a batch goes through in parts
    whose gradients add up to the batch's; the part size is kept in ``folder/micro_batch.json``. float16 scales the
    loss. Returns one row per epoch, index ``epoch``: train (loss), and right, wrong, empty (see `held_out_losses`).
    Raises FloatingPointError if the loss stops being finite; the checkpoints of earlier epochs stay.
    """
    trainable = {name: p.requires_grad_(True) for name, p in trainable.items()}
    parameters = list(trainable.values())
    adam = optimizer_for(parameters, optimizer, learning_rate=learning_rate, weight_decay=weight_decay)
    # Small gradients vanish in float16 unless the loss is made large first; elsewhere this does nothing.
    scaler = torch.amp.GradScaler(torch.device(backbone.device).type, enabled=backbone.dtype == torch.float16)
    n = len(train.labels)
    steps_per_epoch = math.ceil(n / batch_size)
    total_steps = epochs * steps_per_epoch
    empty_prompt = backbone.text_context([""])[0] if unconditional == "empty_prompt" else None
    history: list[dict[str, float]] = runs.load_json(folder / "history.json", [])
    state_path = folder / "state.safetensors"
    if history and state_path.exists():
        state = runs.load_tensors(state_path)
        history = history[: int(state["epoch"])]
        with torch.no_grad():
            for name, parameter in trainable.items():
                parameter.copy_(state[f"model.{name}"])
        _load_optimizer(adam, state)
        if scaler.is_enabled():
            scaler.load_state_dict({**scaler.state_dict(), "scale": float(state["loss_scale"])})
    else:
        history = []
    ranks.wait()  # until all of them have read where to go on from

    def relief() -> bool:
        if backbone.unet.is_gradient_checkpointing:
            return False
        backbone.unet.enable_gradient_checkpointing()
        return True

    known = runs.load_json(folder / "micro_batch.json", {"size": batch_size, "gradient_checkpointing": False})
    if gradient_checkpointing or known["gradient_checkpointing"]:
        backbone.unet.enable_gradient_checkpointing()
    micro = memory.MicroBatch(min(known["size"], batch_size), relief)

    bar = tqdm(total=epochs, initial=len(history), desc=title, unit="epoch", disable=not ranks.first)
    for epoch in range(len(history) + 1, epochs + 1):
        generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
        losses: list[torch.Tensor] = []  # of each batch; looked at once an epoch, so that a card need not wait
        for step, rows in enumerate(torch.randperm(n, generator=generator).split(batch_size)):
            t = torch.randint(0, len(backbone.alphas_cumprod), (len(rows),), generator=generator)
            noise = torch.randn(len(rows), *train.latents.shape[1:], generator=generator)
            whole, mine = len(rows), slice(ranks.rank, None, ranks.count)
            rows, t = rows[mine].to(train.labels.device), t[mine].to(backbone.device)
            noise = noise[mine].to(backbone.device)
            batch_losses: list[torch.Tensor] = []

            def begin():
                adam.zero_grad(set_to_none=True)
                batch_losses.clear()

            def work(part: slice):
                loss = diffusion_loss(
                    backbone.predict_noise, train.latents[rows[part]],
                    class_encoder.contexts()[train.labels[rows[part]]], t[part], noise[part],
                    backbone.alphas_cumprod, backbone.loss_weight(t[part]),
                ) * (len(rows[part]) / whole)  # fmt: skip
                scaler.scale(loss).backward()
                batch_losses.append(loss.detach())

            micro.run(len(rows), begin, work)
            batch_loss = sum(batch_losses, start=torch.zeros((), device=backbone.device))
            if ranks.count > 1:
                for p in parameters:  # there were fewer rows than ranks
                    p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                ranks.add_up([batch_loss, *(p.grad for p in parameters)])
            done = (epoch - 1) * steps_per_epoch + step
            for group in adam.param_groups:
                group["lr"] = learning_rate * 0.5 * (1 + math.cos(math.pi * done / total_steps))
            scaler.unscale_(adam)
            nn.utils.clip_grad_norm_(parameters, clip_norm)
            scaler.step(adam)
            scaler.update()
            losses.append(batch_loss * (whole / n))
        train_loss = torch.stack(losses).cpu()
        if not torch.isfinite(train_loss).all():
            first = int((~torch.isfinite(train_loss)).nonzero()[0])
            raise FloatingPointError(
                f"Loss of {title}, epoch {epoch}, is {float(train_loss[first])} from batch {first + 1} of "
                f"{steps_per_epoch} on: lower the learning rate of {learning_rate:g}. The checkpoints of earlier "
                f"epochs are in {folder.name}/."
            )
        away_from = class_encoder.unconditional(unconditional, empty_prompt)
        kinds = held_out_losses(backbone, class_encoder, held_out, away_from)
        history.append({"train": float(train_loss.sum()), **kinds})
        if ranks.first:
            large = sum(p.numel() for p in parameters) > 1_000_000  # a UNet: half precision halves the disk
            kept = {name: p.half() if large else p for name, p in trainable.items()}
            runs.save_tensors(checkpoint_path(folder, epoch), kept)
            runs.save_json(folder / "history.json", history)
            runs.save_tensors(state_path, {"epoch": torch.tensor(epoch), "loss_scale": torch.tensor(scaler.get_scale()),
                                           **{f"model.{name}": p for name, p in trainable.items()},
                                           **_optimizer_tensors(adam)})  # fmt: skip
            used = {"size": micro.size, "gradient_checkpointing": backbone.unet.is_gradient_checkpointing}
            if used != known:
                runs.save_json(folder / "micro_batch.json", used)
        bar.set_postfix({name: f"{value:.4f}" for name, value in history[-1].items()})
        bar.update()
    bar.close()
    adam.zero_grad(set_to_none=True)
    backbone.unet.disable_gradient_checkpointing()
    for parameter in parameters:
        parameter.requires_grad_(False)
    return pd.DataFrame(history, index=pd.RangeIndex(1, len(history) + 1, name="epoch"))
