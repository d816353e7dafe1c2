"""A training inside a step's folder: its checkpoints and history, and the state that a killed one goes on from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..config.settings import View
from ..diffusion.conditions import Conditioner
from ..diffusion.training import Latents, fit
from ..store import files
from ..store.run import STATE
from .workspace import Workspace

HISTORY, MICRO_BATCH = "history.json", "micro_batch.json"
Probe = Callable[[], Mapping[str, float]]


def checkpoint_name(epoch: int) -> str:
    return f"epoch_{epoch:03d}.safetensors"


def fit_and_keep(
    folder: Path,
    ws: Workspace,
    s: View,
    trainable: Mapping[str, torch.nn.Parameter],
    conditioner: Conditioner,
    train: Latents,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    probe: Probe,
    images_per_epoch: int | None = None,
    own_rates: Mapping[str, float] | None = None,
    checkpoint_dtype: torch.dtype | None = None,
    title: str,
) -> list[dict[str, Any]]:
    """Trains as `diffusion.training.fit` does, and keeps in ``folder`` what each epoch leaves.

    ``history.json``: a row an epoch, {"train": loss, ..what ``probe()`` measures}. ``epoch_001.safetensors`` ..: what
    trains, in ``checkpoint_dtype`` (None: as it is). The settings s are of the topics "training", "seed" and "how".
    Returns the history.
    """
    history, resume = _left(folder)
    micro = files.load_json(folder / MICRO_BATCH, {"size": batch_size, "gradient_checkpointing": False})
    training = fit(
        trainable,
        ws.backbone,
        conditioner,
        train,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        weight_decay=s.weight_decay,
        clip_norm=s.clip_norm,
        seed=s.seed,
        own_rates=own_rates,
        images_per_epoch=images_per_epoch,
        label_dropout=s.label_dropout,
        optimizer=s.optimizer,
        resume=resume,
        at_once=micro["size"],
        gradient_checkpointing=s.gradient_checkpointing or micro["gradient_checkpointing"],
        ranks=ws.ranks,
        title=title,
    )
    with tqdm(total=epochs, initial=len(history), desc=title, unit="epoch", disable=not ws.ranks.first) as bar:
        for epoch in training:
            history.append({"train": epoch.loss, **probe()})
            if ws.ranks.first:
                kept = {name: p.to(checkpoint_dtype or p.dtype) for name, p in trainable.items()}
                files.save_tensors(folder / checkpoint_name(epoch.number), kept)
                files.save_json(folder / HISTORY, history)
                files.save_tensors(folder / STATE, epoch.state.tensors())
                checkpointing = ws.backbone.unet.is_gradient_checkpointing
                used = {"size": epoch.micro_batch.size, "gradient_checkpointing": checkpointing}
                if used != micro:
                    files.save_json(folder / MICRO_BATCH, used)
            bar.set_postfix({name: f"{value:.4f}" for name, value in history[-1].items()})
            bar.update()
    ws.ranks.wait()
    return history


def _left(folder: Path) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor] | None]:
    """The history of the epochs that an earlier attempt finished, and the state after the last of them."""
    history = files.load_json(folder / HISTORY, [])
    if history and (folder / STATE).is_file():
        try:
            state = files.load_tensors(folder / STATE)
        except files.DamagedFile:
            return [], None
        epochs = int(state["epoch"])
        if all((folder / checkpoint_name(epoch)).is_file() for epoch in range(1, epochs + 1)):
            return history[:epochs], state
    return [], None
