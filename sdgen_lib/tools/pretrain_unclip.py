"""How the shipped tiny unCLIP was made: ``python -m sdgen_lib pretrain --unclip --out FOLDER``.

It starts from the tiny Stable Diffusion (`pretrain`), whose VAE, text encoder and tokenizer it keeps. A small CLIP
image encoder learns which caption belongs to which picture of the same procedural source, and to tell the picture's
latents; then the UNet goes on learning with the encoder's embedding added to that of its timestep, as unCLIP's does.
The folder opens as diffusers' ``StableUnCLIPImg2ImgPipeline``.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableUnCLIPImg2ImgPipeline, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from torch import nn
from tqdm.auto import tqdm
from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTokenizer, CLIPVisionConfig
from transformers import CLIPVisionModelWithProjection as Encoder

from ..diffusion.unclip import NOISING, ImageEncoder
from ..machine.devices import autocast
from . import source_images
from .pretraining import Frozen, Log, Source, Steps, sample_timesteps, to_unit

EMBEDDING = 128  # numbers of an image's embedding
TEXT_DROPPED, IMAGE_DROPPED = 0.5, 0.1  # at a tenth for the text, too, the image was hardly used
CHECK, SAVE = 250, 500  # steps from one to the next


def build_encoder() -> Encoder:
    """A CLIP image encoder for pictures of 32 pixels, random weights: 0.8 M parameters."""
    config = CLIPVisionConfig(
        hidden_size=EMBEDDING,
        intermediate_size=4 * EMBEDDING,
        projection_dim=EMBEDDING,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=source_images.SIZE,
        patch_size=8,
    )
    return Encoder(config)


def build_processor() -> CLIPImageProcessor:
    """Any image -> its middle square, 32 pixels, -1..1."""
    side = source_images.SIZE
    return CLIPImageProcessor(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )


class Clip(nn.Module):
    """The encoder in training: with a map of the frozen text encoder's answer, a temperature, and a map to latents."""

    def __init__(self, encoder: Encoder, text_width: int, latents: int):
        super().__init__()
        self.encoder = encoder
        self.text_projection = nn.Linear(text_width, EMBEDDING, bias=False)
        self.to_latents = nn.Linear(EMBEDDING, latents)
        self.logit_scale = nn.Parameter(torch.tensor(2.66))  # ln(1 / 0.07), CLIP's start

    def forward(self, images: torch.Tensor, texts: torch.Tensor, ids: torch.Tensor, latents: torch.Tensor):
        """(CLIP loss, reconstruction loss) of B pictures in -1..1; texts (B, width), caption ids, latents (B, ..).

        Pictures of one caption are each other's positives: with few captions a batch holds many twice.
        """
        embeddings = self.encoder(images).image_embeds
        one, other = F.normalize(embeddings, dim=1), F.normalize(self.text_projection(texts), dim=1)
        logits = self.logit_scale.clamp(max=4.6).exp() * one @ other.T
        same = (ids[:, None] == ids[None]).all(-1).float()
        target = same / same.sum(1, keepdim=True)
        clip = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        return clip, F.mse_loss(self.to_latents(embeddings), latents.flatten(1))


def train_encoder(encoder: Encoder, frozen: Frozen, text_encoder: CLIPTextModel, steps: int, source: Source, log: Log):
    """The averaged encoder after ``steps`` steps; pictures are distorted, so that what they show counts."""
    width, device = text_encoder.config.hidden_size, source.device
    latent_numbers = frozen.vae.config.latent_channels * (source_images.SIZE // 4) ** 2
    clip = Clip(encoder, width, latent_numbers).to(device)
    training = Steps([clip], steps, lr=1e-3, ema_decay=0.995)
    for step in (bar := tqdm(range(1, steps + 1), desc="image encoder")):
        if step % 100 == 1:  # each picture of a pool is used twice, distorted anew each time
            images, captions = source.draw(50 * source.batch)
            latents, ids = frozen.latents(images), frozen.tokens(captions)
            with torch.no_grad():
                texts = torch.cat([text_encoder(part).pooler_output for part in ids.split(1024)])
        rows = source.rows(len(images)).to(device)
        pictures = to_unit(source.distort(images[rows]))
        with autocast(device, torch.bfloat16):
            aligned, rebuilt = clip(pictures, texts[rows], ids[rows], latents[rows])
        training.take(aligned.float() + rebuilt.float())
        if step % CHECK == 0 or step == steps:
            log({"phase": "encoder", "step": step, "loss": float(aligned), "latents": float(rebuilt)})
            bar.set_postfix(clip=f"{float(aligned):.2f}", latents=f"{float(rebuilt):.2f}")
    return training.ema[0].encoder


def normalizer_of(encoder: ImageEncoder, images: torch.Tensor) -> StableUnCLIPImageNormalizer:
    """With the mean and standard deviation of these pictures' embeddings."""
    found, normalizer = encoder.embeddings(images), StableUnCLIPImageNormalizer(EMBEDDING)
    with torch.no_grad():
        normalizer.mean.copy_(found.mean(0, keepdim=True))
        normalizer.std.copy_(found.std(0, keepdim=True))
    return normalizer.requires_grad_(False)


def unclip_unet(base: UNet2DConditionModel) -> UNet2DConditionModel:
    """``base`` with an MLP for [embedding, noise level], which at first adds nothing to the timestep's embedding."""
    config = dict(base.config) | {
        "class_embed_type": "projection",
        "projection_class_embeddings_input_dim": 2 * EMBEDDING,
    }
    unet = UNet2DConditionModel.from_config(config)
    unet.load_state_dict(base.state_dict(), strict=False)
    nn.init.zeros_(unet.class_embedding.linear_2.weight)
    nn.init.zeros_(unet.class_embedding.linear_2.bias)
    return unet


class Probe:
    """The loss on held-out pictures with nothing, the caption, the image, both, and another picture's image."""

    def __init__(self, frozen: Frozen, encoder: ImageEncoder, text_encoder: CLIPTextModel, source: Source):
        images, captions, generator = source.held_out(54321)
        self.frozen, self.latents = frozen, frozen.latents(images)
        self.t = torch.randint(0, 1000, (len(images),), generator=generator).to(source.device)
        self.noise = torch.randn(self.latents.shape, generator=generator).to(source.device)
        level = torch.zeros(len(images), EMBEDDING)
        told = encoder.told(encoder.embeddings(images), 0, level)
        with torch.no_grad():
            text = text_encoder(frozen.tokens(captions)).last_hidden_state
            empty = text_encoder(frozen.tokens([""])).last_hidden_state.expand_as(text)
        nothing = torch.zeros_like(told)
        self.told = {
            "none": (empty, nothing),
            "text": (text, nothing),
            "image": (empty, told),
            "both": (text, told),
            "wrong image": (empty, told.roll(1, 0)),
        }

    @torch.no_grad()
    def losses(self, unet: nn.Module) -> dict[str, float]:
        return {
            kind: float(self.frozen.loss_told(unet, self.latents, context, self.t, self.noise, told))
            for kind, (context, told) in self.told.items()
        }


def train_unet(
    unet: UNet2DConditionModel,
    encoder: ImageEncoder,
    frozen: Frozen,
    text_encoder: CLIPTextModel,
    steps: int,
    source: Source,
    log: Log,
    save: Callable[[UNet2DConditionModel], None],
) -> None:
    """Epsilon prediction on pictures that are told by text, by embedding, by both or by neither."""
    # What is new learns fastest; then the maps by which an embedding of the timestep reaches the convolutions.
    faster = {id(p): 1.5e-3 for name, p in unet.named_parameters() if "time_emb_proj" in name}
    faster |= {id(p): 3e-3 for p in unet.class_embedding.parameters()}
    training = Steps([unet], steps, lr=5e-4, ema_decay=0.998, faster=faster)
    probe = Probe(frozen, encoder, text_encoder, source)
    losses = unet_losses(unet, encoder, frozen, text_encoder, steps, source)
    for step, loss in (bar := tqdm(enumerate(losses, 1), desc="unCLIP UNet", total=steps)):
        training.take(loss)
        if step % CHECK == 0 or step == steps:
            found = probe.losses(training.ema[0])
            log({"phase": "unclip", "step": step, "loss": float(loss.detach()), **found})
            bar.set_postfix({kind: f"{value:.4f}" for kind, value in found.items()})
        if step % SAVE == 0 or step == steps:
            save(training.ema[0])


def unet_losses(
    unet: UNet2DConditionModel,
    encoder: ImageEncoder,
    frozen: Frozen,
    text_encoder: CLIPTextModel,
    steps: int,
    source: Source,
) -> Iterator[torch.Tensor]:
    """The loss of each batch; each picture of a pool is used five times. The noise level is 1000 u^2, u uniform."""
    generator, device, batch = source.generator, source.device, source.batch
    with torch.no_grad():
        empty = text_encoder(frozen.tokens([""])).last_hidden_state
    for step in range(steps):
        if step % 500 == 0:
            images, captions = source.draw(100 * batch)
            latents, ids, embeddings = frozen.latents(images), frozen.tokens(captions), encoder.embeddings(images)
            with torch.no_grad():
                contexts = torch.cat([text_encoder(part).last_hidden_state for part in ids.split(1024)])
        rows = source.rows(len(images)).to(device)

        def dropped(share: float) -> torch.Tensor:
            return (torch.rand(batch, generator=generator) < share).to(device)

        context = torch.where(dropped(TEXT_DROPPED)[:, None, None], empty, contexts[rows])
        level = (torch.rand(batch, generator=generator).square() * 1000).long()
        told = encoder.told(embeddings[rows], level.to(device), torch.randn(batch, EMBEDDING, generator=generator))
        told = torch.where(dropped(IMAGE_DROPPED)[:, None], torch.zeros_like(told), told)
        noise = torch.randn(batch, *latents.shape[1:], generator=generator).to(device)
        t = sample_timesteps(batch, generator).to(device)
        yield frozen.loss_told(unet, latents[rows], context, t, noise, told)


def make(base: Path, out: Path, encoder_steps: int, unet_steps: int, source: Source, log: Log) -> None:
    """Makes the unCLIP folder ``out`` from the Stable Diffusion folder ``base``."""
    device = source.device

    def part(kind: type, name: str) -> nn.Module:
        return kind.from_pretrained(base, subfolder=name, use_safetensors=True).float().requires_grad_(False).to(device)

    vae, text_encoder = part(AutoencoderKL, "vae"), part(CLIPTextModel, "text_encoder")
    tokenizer = CLIPTokenizer.from_pretrained(base, subfolder="tokenizer")
    scheduler = DDIMScheduler.from_pretrained(base, subfolder="scheduler")
    frozen = Frozen(vae, tokenizer, scheduler.alphas_cumprod.to(device), device)
    # Telling pictures from each other is harder, and teaches more, with more of them at once.
    many = dataclasses.replace(source, batch=2 * source.batch)
    network = train_encoder(build_encoder(), frozen, text_encoder, encoder_steps, many, log)
    noising, processor = DDPMScheduler(**NOISING), build_processor()
    encoder = ImageEncoder(
        network, processor, StableUnCLIPImageNormalizer(EMBEDDING), noising.alphas_cumprod.to(device), device
    )
    encoder.normalizer = normalizer_of(encoder, source.draw(4096)[0]).to(device)

    def save(unet: UNet2DConditionModel) -> None:
        StableUnCLIPImg2ImgPipeline(
            feature_extractor=processor,
            image_encoder=copy.deepcopy(network).half(),
            image_normalizer=copy.deepcopy(encoder.normalizer),
            image_noising_scheduler=noising,
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            unet=copy.deepcopy(unet).half(),
            scheduler=scheduler,
            vae=copy.deepcopy(vae).half(),
        ).save_pretrained(out, safe_serialization=True)

    unet = unclip_unet(part(UNet2DConditionModel, "unet")).requires_grad_(True).to(device)
    train_unet(unet, encoder, frozen, text_encoder, unet_steps, source, log, save)
