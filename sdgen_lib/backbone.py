"""A pretrained latent diffusion model: its VAE, UNet, noise schedule and the text encoder's frozen contexts."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
import transformers
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from transformers import CLIPTextModel, CLIPTokenizer

from . import backbone_files, lora, memory
from .devices import autocast, compiled, compute_dtype, default_device, keep_freed_memory


class OneContext:
    """A context manager, to be entered again and again, for UNet passes that are all given the same context.

    What the linear ``maps`` make of it, the keys and values of cross-attention, depends on nothing else: it is computed
    in the first pass and kept, where a sampler would have it computed at every step.
    """

    def __init__(self, maps: list[torch.nn.Module]):
        self._forwards = {linear: self._once(linear.forward) for linear in maps}

    @staticmethod
    def _once(forward: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
        kept: list[torch.Tensor] = []

        def answer(context: torch.Tensor) -> torch.Tensor:
            if not kept:
                kept.append(forward(context))
            return kept[0]

        return answer

    def __enter__(self) -> None:
        for linear, forward in self._forwards.items():
            linear.forward = forward

    def __exit__(self, *_) -> None:
        for linear in self._forwards:
            del linear.forward  # the class's own is seen again


@dataclasses.dataclass
class Backbone:
    """A pretrained latent diffusion model, everything frozen. Build it with `load`."""

    name: str
    vae: AutoencoderKL
    unet: UNet2DConditionModel
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    alphas_cumprod: torch.Tensor  # float (1000,), on the device
    device: str
    dtype: torch.dtype  # of matrix products, and of the frozen UNet's weights
    prediction: str = "epsilon"  # or "v_prediction": what the UNet itself answers with
    source: backbone_files.Source | None = None

    def __post_init__(self):
        if self.device == "cpu" and self.dtype == torch.bfloat16:
            # PyTorch's fused attention is slow here, its backward pass most: three plain products beat it (`bench`).
            self.unet.set_attn_processor(AttnProcessor())
        self._fast: dict[int, Callable | None] = {}  # by number of latents

    @property
    def image_size(self) -> int:
        """Pixels, the side of what it generates: 128 as in the paper, or less where the model's own size is less."""
        return min(self.unet.config.sample_size * self._vae_factor, 128)

    @property
    def _vae_factor(self) -> int:
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def tokens(self) -> int:
        """Length of the text encoder's context (SD: 77; tiny: 8)."""
        return self.tokenizer.model_max_length

    @property
    def width(self) -> int:
        """Width of the context (SD 2: 1024, SD 1: 768; tiny: 64)."""
        return self.unet.config.cross_attention_dim

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image's latents."""
        side = self.image_size // self._vae_factor
        return (self.vae.config.latent_channels, side, side)

    def autocast(self):
        """Context manager: matrix products in ``dtype``, weights stay as they are."""
        return autocast(self.device, self.dtype)

    def predict_noise(self, latents: torch.Tensor, t: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """The noise the UNet sees. latents (B, C, H, W), t int64 (B,), context (B, tokens, width) -> (B, C, H, W).

        A model that predicts v = sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) x_0 (Salimans and Ho 2022, appendix D)
        is translated: noise = sqrt(alpha_bar) v + sqrt(1 - alpha_bar) x_t.
        """
        weights, unet = self.unet.dtype, self.unet
        if weights == self.dtype and not torch.is_grad_enabled():
            unet = self._fast.get(len(latents)) or unet
        with contextlib.nullcontext() if weights == self.dtype else self.autocast():
            predicted = unet(latents.to(weights), t, encoder_hidden_states=context.to(weights)).sample
        if self.prediction == "epsilon":
            return predicted
        alpha_bar = self.alphas_cumprod[t].view(-1, 1, 1, 1)
        return alpha_bar.sqrt() * predicted.float() + (1 - alpha_bar).sqrt() * latents

    def compile_unet(self, batch: int) -> None:
        """From now on ``batch`` latents at once, no more and no fewer, pass a compiled UNet while no gradient is asked.

        Each number of latents would be compiled anew. Two CPU cores take 40 s for the tiny model, seconds in
        later processes, and then pass it 1.5 times as fast; Stable Diffusion's UNet they pass more slowly.
        """
        if batch not in self._fast:
            latents = torch.zeros(batch, *self.latent_shape, device=self.device, dtype=self.dtype)
            t = torch.zeros(batch, dtype=torch.int64, device=self.device)
            context = torch.zeros(batch, self.tokens, self.width, device=self.device, dtype=self.dtype)
            self._fast[batch] = compiled(self.unet, latents, t, encoder_hidden_states=context)

    def one_context(self) -> OneContext:
        """For passes that are all given the same context (see `OneContext`); those of a compiled UNet stay whole."""
        if any(self._fast.values()):
            return OneContext([])
        attentions = [module for path, module in self.unet.named_modules() if path.endswith(".attn2")]
        return OneContext([linear for a in attentions for linear in (a.to_k, a.to_v)])

    @property
    def gains_by_compiling(self) -> bool:
        """Where it was measured to: a small UNet on a CPU, whose time goes into many small steps."""
        return self.device == "cpu" and sum(p.numel() for p in self.unet.parameters()) < 50_000_000

    def loss_weight(self, t: torch.Tensor) -> torch.Tensor | None:
        """What makes the squared error of the noise that of the UNet's own target: (B,), or None for 1.

        An error of v is 1 / sqrt(alpha_bar) times the error of the noise it implies.
        """
        return None if self.prediction == "epsilon" else 1 / self.alphas_cumprod[t]

    def set_unet(self, weights: dict[str, torch.Tensor] | None = None, dtype: torch.dtype | None = None) -> None:
        """Puts ``weights`` into the UNet, or the pretrained ones (None), held in ``dtype`` (None: ``self.dtype``).

        ``weights`` are those of a whole UNet, or a LoRA's, which are added to the pretrained ones.
        """
        lora.remove(self.unet)
        updates = weights if weights and lora.is_lora(weights) else None
        if weights is None or updates:
            pretrained = UNet2DConditionModel.from_pretrained(
                self.source.folder, subfolder="unet", use_safetensors=True, variant=self.source.variants["unet"]
            )
            if updates:
                lora.merge(pretrained, updates)
            weights = pretrained.state_dict()
        self.unet_dtype(dtype or self.dtype)
        self.unet.load_state_dict(weights)

    def unet_dtype(self, dtype: torch.dtype) -> None:
        torch.nn.Module.to(self.unet, dtype=dtype)  # diffusers' own `to` warns of a list that is empty here

    @torch.no_grad()
    def encode(self, images: torch.Tensor, batch_size: int = 128) -> torch.Tensor:
        """uint8 images (N, 3, h, w), any size -> float32 latents (N, C, H, W), scaled as the UNet expects.

        Resized bilinearly to ``image_size`` and mapped to [-1, 1] as in the paper (section 4); the mean of the
        VAE's posterior, no noise, so that the same image always gives the same latents.
        """
        latents: list[torch.Tensor] = []

        def work(rows: slice):
            part = images[rows].to(self.device).float() / 127.5 - 1
            if part.shape[-1] != self.image_size:
                smaller = part.shape[-1] > self.image_size
                part = F.interpolate(part, size=self.image_size, mode="bilinear", antialias=smaller)
            with self.autocast():
                latents.append(self.vae.encode(part).latent_dist.mode().float())

        memory.MicroBatch(batch_size).run(len(images), latents.clear, work)
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
        return self.text_encoder(ids).last_hidden_state.to(self.device)


def load(name: str = "tiny", device: str | None = None, precision: str = "auto") -> Backbone:
    """Loads a backbone by name, from a local diffusers folder or by Hub id (see `backbone_files.find`).

    Stable Diffusion generates at 128 pixels as in the paper, the tiny model at its native 32. What is frozen is held
    in the precision it computes in: 16 bits halve a big model's memory and, on a CPU, its time. Raises ValueError for
    an unknown name or a model of another kind, and OSError, with the ways out, where its files are missing or cannot
    be downloaded.
    """
    device = device or default_device()
    dtype = compute_dtype(precision, device)
    if device == "cpu":
        keep_freed_memory()
    source = backbone_files.find(name, half=dtype != torch.float32)
    backbone_files.check_text_to_image(source)
    scheduler = DDPMScheduler.from_pretrained(source.folder, subfolder="scheduler")
    prediction = scheduler.config.prediction_type
    if prediction not in ("epsilon", "v_prediction"):
        raise ValueError(f"{name!r} predicts {prediction!r}; 'epsilon' and 'v_prediction' work here.")
    if not scheduler.alphas_cumprod.min() > 0:
        raise ValueError(f"{name!r} has a noise schedule that ends without any signal, which DDIM cannot start from.")
    transformers.utils.logging.disable_progress_bar()  # of reading a file; downloads keep theirs

    def part(kind, subfolder: str, **options):
        weights = dict(use_safetensors=True, variant=source.variants[subfolder], **options)
        return kind.from_pretrained(source.folder, subfolder=subfolder, **weights).requires_grad_(False).eval()

    try:
        return Backbone(
            name=name, source=source, device=device, dtype=dtype, prediction=prediction,
            vae=part(AutoencoderKL, "vae", torch_dtype=torch.float32).to(device),
            unet=part(UNet2DConditionModel, "unet", torch_dtype=dtype).to(device),
            # Used for a handful of prompts, so it stays out of the accelerator's memory.
            text_encoder=part(CLIPTextModel, "text_encoder", dtype=torch.float32),
            tokenizer=CLIPTokenizer.from_pretrained(source.folder, subfolder="tokenizer"),
            alphas_cumprod=scheduler.alphas_cumprod.to(device),
        )  # fmt: skip
    except OSError as error:
        raise OSError(f"Could not read the backbone {name!r} in {source.folder}: {error}") from error
