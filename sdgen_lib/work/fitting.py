"""A training inside a step's folder: its checkpoints and history, and the state that a killed one goes on from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..diffusion.conditions import Conditioner
from ..diffusion.training import Latents, fit
from ..machine.ranks import Ranks
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
    trainable: Mapping[str, torch.nn.Parameter],
    conditioner: Conditioner,
    train: Latents,
    *,
    epochs: int,
    batch_size: int,
    probe: Probe,
    title: str,
    gradient_checkpointing: bool = False,
    checkpoint_dtype: torch.dtype | None = None,
    ranks: Ranks | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Trains as `diffusion.training.fit` does, which takes the ``options``, and keeps what each epoch leaves.

    Into ``folder`` go ``history.json``: a row an epoch, {"train": loss, ..what ``probe()`` measures}; and
    ``epoch_001.safetensors`` ..: what trains, in ``checkpoint_dtype`` (None: as it is). ``ranks``: who shares the
    training (None: the workspace's). Returns the history.
    """
    ranks = ranks or ws.ranks
    history, resume = _left(folder)
    micro = files.load_json(folder / MICRO_BATCH, {"size": batch_size, "gradient_checkpointing": False})
    training = fit(
        trainable,
        ws.backbone,
        conditioner,
        train,
        epochs=epochs,
        batch_size=batch_size,
        resume=resume,
        at_once=micro["size"],
        gradient_checkpointing=gradient_checkpointing or micro["gradient_checkpointing"],
        ranks=ranks,
        title=title,
        **options,
    )
    with tqdm(total=epochs, initial=len(history), desc=title, unit="epoch", disable=not ranks.first) as bar:
        for epoch in training:
            history.append({"train": epoch.loss, **probe()})
            if ranks.first:
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
    ranks.wait()
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
