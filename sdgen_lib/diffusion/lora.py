"""Low-rank adapters (LoRA, Hu et al. 2022) on the UNet's attention: step 3 without training all of its weights."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel
from diffusers.training_utils import cast_training_params

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]  # the layers that diffusers' own LoRA training adapts


def add(unet: UNet2DConditionModel, rank: int) -> dict[str, torch.nn.Parameter]:
    """Gives each attention projection W an update B A of ``rank``, zero at first; returns the A and B, by name.

    They are float32 whatever the frozen weights are: in 16 bits most small updates would be lost.
    """
    from peft import LoraConfig  # takes seconds to import

    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=ATTENTION))
    cast_training_params(unet, dtype=torch.float32)
    return {name: p for name, p in unet.named_parameters() if ".lora_" in name}


def remove(unet: UNet2DConditionModel) -> None:
    """Takes the updates out again, if there are any; the weights they were for stay as they were."""
    if hasattr(unet, "peft_config"):
        unet.unload_lora()


def is_lora(weights: dict[str, torch.Tensor]) -> bool:
    return any(".lora_" in name for name in weights)


def merge(unet: UNet2DConditionModel, weights: dict[str, torch.Tensor]) -> None:
    """Adds updates, named as `add` names them, to the UNet's weights: sampling then costs nothing extra."""
    unet.load_lora_adapter({name.replace(".default.", "."): value for name, value in weights.items()}, prefix=None)
    unet.fuse_lora()
    remove(unet)
