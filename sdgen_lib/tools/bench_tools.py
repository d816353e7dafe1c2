"""What the benchmarks measure with: clocks, the machine's ceiling, peak memory, and models to measure."""

from __future__ import annotations

import copy
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import psutil
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from torch.utils.flop_counter import FlopCounterMode

from ..diffusion import backbone
from ..diffusion.backbone import Backbone
from ..machine.devices import compute_dtype
from ..methods.class_encoder import ClassEncoder

# Stable Diffusion 2's UNet and VAE (866 and 84 million parameters), as their published configurations say.
SD2_UNET = dict(
    sample_size=64,
    attention_head_dim=[5, 10, 20, 20],
    cross_attention_dim=1024,
    use_linear_projection=True,
    block_out_channels=(320, 640, 1280, 1280),
    layers_per_block=2,
    down_block_types=["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
)
SD2_VAE = dict(
    block_out_channels=(128, 256, 512, 512),
    layers_per_block=2,
    latent_channels=4,
    sample_size=768,
    down_block_types=["DownEncoderBlock2D"] * 4,
    up_block_types=["UpDecoderBlock2D"] * 4,
)
SCHEDULE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
CEILING_REPEATS = 6


# --- models ---


def load(name: str, device: str, precision: str) -> Backbone:
    """A backbone by name; "sd2-random": the full-size Stable Diffusion 2 with random weights, for no download."""
    if name != "sd2-random":
        return backbone.load(name, device, precision)
    dtype = compute_dtype(precision, device)
    with torch.device(device):
        unet, vae = UNet2DConditionModel(**SD2_UNET), AutoencoderKL(**SD2_VAE)
    torch.nn.Module.to(unet, dtype=dtype)
    return Backbone(
        name=name,
        vae=vae.requires_grad_(False).eval(),
        unet=unet.requires_grad_(False).eval(),
        text_encoder=None,
        tokenizer=type("Tokens", (), {"model_max_length": 77})(),
        alphas_cumprod=DDPMScheduler(**SCHEDULE).alphas_cumprod.to(device),
        device=device,
        dtype=dtype,
    )


def pipeline_of(model: Backbone, dtype: torch.dtype) -> StableDiffusionPipeline:
    """diffusers' own pipeline on copies of the same weights, in ``dtype``."""
    unet, vae = (copy.deepcopy(part) for part in (model.unet, model.vae))
    unet.set_attn_processor(AttnProcessor2_0())  # what diffusers itself would have chosen
    found = StableDiffusionPipeline(
        vae=torch.nn.Module.to(vae, dtype),
        unet=torch.nn.Module.to(unet, dtype),
        text_encoder=None,
        tokenizer=None,
        scheduler=DDIMScheduler(**SCHEDULE, clip_sample=False, timestep_spacing="linspace", steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    found.set_progress_bar_config(disable=True)
    return found


def encoder_for(model: Backbone, num_classes: int = 10) -> ClassEncoder:
    """A Class-Encoder with random weights, the same ones each time, on the model's device."""
    torch.manual_seed(0)
    return ClassEncoder(num_classes, model.tokens, model.width).to(model.device)


# --- measuring ---


def synchronise(device: str) -> None:
    """Returns once the device has done all that it was given; a CPU always has."""
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize(device)


def seconds(work: Callable[[], Any], device: str) -> float:
    """How long ``work()`` takes, what it gave the device to do included."""
    synchronise(device)
    start = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - start


def ceiling(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a square matrix product in ``dtype`` on these threads or this card: the best of six."""
    n = 2048 if torch.device(device).type == "cpu" else 8192
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return max(2 * n**3 / seconds(lambda: a @ b, device) for _ in range(CEILING_REPEATS))


def flops(work: Callable[[], Any]) -> int:
    """The floating-point operations of the matrix products, convolutions and attention in ``work()``."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def compare(
    name: str,
    ours: Callable[[], Any],
    peer: Callable[[], Any],
    peer_name: str,
    images: int,
    device: str,
    repeats: int,
    work: float = 0.0,
    top: float = 0.0,
) -> dict[str, Any]:
    """A row: medians in images/s, the ratio (of each turn: median, lowest, highest), the share of the ceiling.

    ``images``: of one turn of either; ``work``: FLOP of a turn of ours (0: unknown); ``top``: the ceiling in FLOP/s.
    """
    ours(), peer()
    turns = [(seconds(ours, device), seconds(peer, device)) for _ in range(repeats)]
    ratios = sorted(theirs / own for own, theirs in turns)
    own, theirs = (statistics.median(column) for column in zip(*turns))
    row = {
        "what": name,
        "ours, images/s": images / own,
        "peer": peer_name,
        "peer, images/s": images / theirs,
        "ratio": statistics.median(ratios),
        "lowest": ratios[0],
        "highest": ratios[-1],
    }
    return row | ({"share of ceiling": work / own / top} if work else {})


class Peak:
    """The most memory in use inside a ``with`` block, in GB: of a CUDA card, or of this process (sampled)."""

    def __init__(self, device: str):
        self.device, self.gigabytes = torch.device(device), 0.0

    @property
    def _is_counted(self) -> bool:
        """Whether torch keeps the peak itself."""
        return self.device.type == "cuda"

    def _look(self) -> None:
        in_use = psutil.Process().memory_info().rss
        if self.device.type == "mps":
            in_use = torch.mps.driver_allocated_memory()
        self.gigabytes = max(self.gigabytes, in_use / 1e9)

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            self._look()

    def __enter__(self) -> Peak:
        if self._is_counted:
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self._stop = threading.Event()
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._is_counted:
            self.gigabytes = torch.cuda.max_memory_allocated(self.device) / 1e9
        else:
            self._stop.set()
            self._thread.join()
            self._look()
