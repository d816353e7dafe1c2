"""A pretrained latent diffusion model: its VAE, UNet, noise schedule and the text encoder's frozen contexts."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from transformers import CLIPTextModel, CLIPTokenizer

from ..config.messages import shown
from ..data.parts import reason
from ..machine.allocator import keep_freed_memory
from ..machine.compiling import compiled
from ..machine.devices import as_device, autocast, compute_dtype
from ..machine.memory import MicroBatch
from . import lora
from . import weights as weight_files
from .conditions import Condition

SMALL_UNET = 200_000_000  # bytes of weights: the tiny one has 8 MB, Stable Diffusion's 1.7 GB or more
PRETRAINED = "pretrained"  # the key of the UNet's own weights, see `Backbone.put_unet`


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
    device: str  # as `as_device` names it
    dtype: torch.dtype  # of matrix products, and of the frozen UNet's weights
    prediction: str = "epsilon"  # or "v_prediction": what the UNet itself answers with
    source: weight_files.Source | None = None

    def __post_init__(self):
        self.device = as_device(self.device)
        if self.device == "cpu" and self.dtype == torch.bfloat16:
            # PyTorch's fused attention is slow here, its backward pass most: three plain products beat it (`bench`).
            self.unet.set_attn_processor(AttnProcessor())
        self._fast: dict[tuple[int, int], Callable | None] = {}  # by numbers of latents and tokens
        self._micro_batches: dict[tuple[str, int], MicroBatch] = {}
        self.unet_key: str | None = PRETRAINED  # which weights the UNet holds; None: some that nobody named

    @property
    def fingerprint(self) -> str:
        """A hash of the files that this model was loaded from."""
        return weight_files.fingerprint(self.source)

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

    def predict_noise(self, latents: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        """The noise the UNet sees. latents (B, C, H, W), t int64 (B,), condition of B images -> (B, C, H, W).

        A model that predicts v = sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) x_0 (Salimans and Ho 2022, appendix D)
        is translated: noise = sqrt(alpha_bar) v + sqrt(1 - alpha_bar) x_t.
        """
        return self._predict(self.unet, latents, t, condition)

    def predict_compiled(self, latents: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        """As `predict_noise` without gradients, by the compiled UNet if it `is_compiled_for` latents and context."""
        sizes = len(latents), condition.context.shape[1]
        fast = self._fast[sizes] if self.is_compiled_for(*sizes) else None
        return self._predict(fast or self.unet, latents, t, condition)

    def _predict(self, unet: Callable, latents: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        weights, more = self.unet.dtype, {}
        if self.unet.class_embedding is not None:
            embedding = self._no_image(len(latents)) if condition.embedding is None else condition.embedding
            more["class_labels"] = embedding.to(latents.device, weights)
        elif condition.embedding is not None:
            raise ValueError(
                f"The UNet of {self.name!r} takes no embedding beside the context: only an unCLIP model's does "
                "(backbone='tiny-unclip' or 'sd2.1-unclip')."
            )
        with contextlib.nullcontext() if weights == self.dtype else self.autocast():
            predicted = unet(latents.to(weights), t, encoder_hidden_states=condition.context.to(weights), **more).sample
        if self.prediction == "epsilon":
            return predicted
        alpha_bar = self.alphas_cumprod[t].view(-1, 1, 1, 1)
        return alpha_bar.sqrt() * predicted.float() + (1 - alpha_bar).sqrt() * latents

    def _no_image(self, count: int) -> torch.Tensor:
        """What an unCLIP model is told of no image in particular: zeros, (count, 2 d)."""
        width = self.unet.config.projection_class_embeddings_input_dim
        return torch.zeros(count, width, device=self.device)

    def compile_unet(self, batch: int, tokens: int | None = None) -> None:
        """Makes `predict_compiled` pass ``batch`` latents at once, no more and no fewer, through a compiled UNet.

        ``tokens``: of their contexts (None: as many as the text encoder's have). Each other number would be compiled
        anew. Two CPU cores take 40 s for the tiny model, seconds in later processes, and then pass it 1.5 times as
        fast; Stable Diffusion's UNet they pass more slowly.
        """
        sizes = batch, tokens or self.tokens
        if sizes not in self._fast:
            latents = torch.zeros(batch, *self.latent_shape, device=self.device, dtype=self.dtype)
            t = torch.zeros(batch, dtype=torch.int64, device=self.device)
            context = torch.zeros(*sizes, self.width, device=self.device, dtype=self.dtype)
            more = {} if self.unet.class_embedding is None else {"class_labels": self._no_image(batch).to(self.dtype)}
            self._fast[sizes] = compiled(self.unet, latents, t, encoder_hidden_states=context, **more)

    def is_compiled_for(self, batch: int, tokens: int | None = None) -> bool:
        """Whether `compile_unet` made a UNet for such latents and contexts, for weights of the kind that are there."""
        return self._fast.get((batch, tokens or self.tokens)) is not None and self.unet.dtype == self.dtype

    def one_context(self) -> OneContext:
        """For passes that are all given the same context (see `OneContext`)."""
        attentions = [module for path, module in self.unet.named_modules() if path.endswith(".attn2")]
        return OneContext([linear for a in attentions for linear in (a.to_k, a.to_v)])

    @property
    def gains_by_compiling(self) -> bool:
        """Whether a compiled UNet is worth its time, see `compiling_pays`."""
        return self.source is not None and compiling_pays(self.source, self.device)

    def loss_weight(self, t: torch.Tensor) -> torch.Tensor | None:
        """What makes the squared error of the noise that of the UNet's own target: (B,), or None for 1.

        An error of v is 1 / sqrt(alpha_bar) times the error of the noise it implies.
        """
        return None if self.prediction == "epsilon" else 1 / self.alphas_cumprod[t]

    def put_unet(self, key: str, load: Callable[[], dict[str, torch.Tensor] | None]) -> None:
        """Puts the weights called ``key`` into the UNet, in ``self.dtype``, unless they are there.

        ``load()`` -> as `set_unet` takes them; called only if they are needed. A training of the UNet's weights (`fit`)
        leaves them without a name; whoever changes them by hand sets ``unet_key`` to None.
        """
        if self.unet_key != key:
            self.set_unet(load())
            self.unet_key = key

    def set_unet(self, weights: dict[str, torch.Tensor] | None = None, dtype: torch.dtype | None = None) -> None:
        """Puts ``weights`` into the UNet, or the pretrained ones (None), held in ``dtype`` (None: ``self.dtype``).

        ``weights`` are those of a whole UNet, or a LoRA's, which are added to the pretrained ones. They have no name:
        the next `put_unet` puts its own in their place.
        """
        self.unet_key = None
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

    def micro_batch(self, work: str, size: int) -> MicroBatch:
        """For a kind of ``work``, asked for ``size`` images: one object, which remembers how many fitted at once."""
        return self._micro_batches.setdefault((work, size), MicroBatch(size))

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

        self.micro_batch("encode", batch_size).run(len(images), latents.clear, work)
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


def find(name: str, precision: str = "auto", device: str | torch.device | None = None) -> weight_files.Source:
    """The files that `load` would read for these arguments; downloads what is missing."""
    return weight_files.find(name, half=compute_dtype(precision, as_device(device)) != torch.float32)


def compiling_pays(source: weight_files.Source, device: str | torch.device | None = None) -> bool:
    """Whether a model of these files passes faster compiled; it need not be loaded to know that.

    Where it was measured to: a small UNet on a CPU, whose time goes into many small steps.
    """
    return as_device(device) == "cpu" and weight_files.unet_bytes(source) < SMALL_UNET


def load(name: str = "tiny", device: str | torch.device | None = None, precision: str = "auto") -> Backbone:
    """Loads a backbone by name, from a local diffusers folder or by Hub id (see `weight_files.find`).

    Stable Diffusion generates at 128 pixels as in the paper, the tiny model at its native 32. What is frozen is held
    in the precision it computes in: 16 bits halve a big model's memory and, on a CPU, its time. Raises ValueError for
    an unknown name or device or a model of another kind, and OSError, with the ways out, where its files are missing
    or cannot be downloaded.
    """
    device = as_device(device)
    dtype = compute_dtype(precision, device)
    if device == "cpu":
        keep_freed_memory()
    source = find(name, precision, device)
    weight_files.check_text_to_image(source)
    transformers.utils.logging.disable_progress_bar()  # of reading a file; downloads keep theirs
    try:
        schedule, parts = DDPMScheduler.from_pretrained(source.folder, subfolder="scheduler"), _parts(source, dtype)
    except OSError as error:
        raise OSError(f"Could not read the backbone {name!r} in {source.folder}: {error}") from error
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:  # whatever a wrong value leads to
        raise ValueError(
            f"The backbone {name!r} in {source.folder} is damaged, or its configurations and weights are not of one "
            f"model ({reason(error)}): copy the whole folder again."
        ) from error
    _check_schedule(name, schedule)
    scaling = parts["vae"].config.scaling_factor
    if type(scaling) not in (int, float) or not 0 < scaling < math.inf:
        raise ValueError(f"{source.folder} has a VAE whose scaling_factor is {shown(scaling)}, not a number above 0.")
    return Backbone(
        name=name,
        source=source,
        device=device,
        dtype=dtype,
        prediction=schedule.config.prediction_type,
        alphas_cumprod=schedule.alphas_cumprod.to(device),
        vae=parts.pop("vae").to(device),
        unet=parts.pop("unet").to(device),
        **parts,  # the text encoder is used for a handful of prompts: it stays out of the accelerator's memory
    )


def _check_schedule(name: str, found: DDPMScheduler) -> None:
    """Raises ValueError for a noise schedule that cannot be sampled here."""
    prediction = found.config.prediction_type
    if prediction not in ("epsilon", "v_prediction"):
        raise ValueError(f"{name!r} predicts {prediction!r}; 'epsilon' and 'v_prediction' work here.")
    if not found.alphas_cumprod.min() > 0:
        raise ValueError(f"{name!r} has a noise schedule that ends without any signal, which DDIM cannot start from.")


def _parts(source: weight_files.Source, dtype: torch.dtype) -> dict[str, Any]:
    """The networks, frozen and on the CPU, and the tokenizer, by the names that `Backbone` has for them."""

    def part(kind: type, subfolder: str, **options) -> torch.nn.Module:
        weights = dict(use_safetensors=True, variant=source.variants[subfolder], **options)
        return kind.from_pretrained(source.folder, subfolder=subfolder, **weights).requires_grad_(False).eval()

    return {
        "vae": part(AutoencoderKL, "vae", torch_dtype=torch.float32),
        "unet": part(UNet2DConditionModel, "unet", torch_dtype=dtype),
        "text_encoder": part(CLIPTextModel, "text_encoder", dtype=torch.float32),
        "tokenizer": CLIPTokenizer.from_pretrained(source.folder, subfolder="tokenizer"),
    }
