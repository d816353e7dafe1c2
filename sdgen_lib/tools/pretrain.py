"""How the shipped tiny Stable Diffusion was made: ``python -m sdgen_lib pretrain --out FOLDER``.

A text-to-image latent diffusion model of the very classes that Stable Diffusion is made of (AutoencoderKL,
UNet2DConditionModel with cross-attention, CLIPTextModel and CLIPTokenizer, epsilon prediction, scaled-linear
betas), only small: 32x32 pictures, 8x8x8 latents, 8 context tokens of width 64. It learns the procedural source
domain of `source_images` from scratch, so no image of any dataset of this course has been seen. Unlike SD, whose
text encoder was trained elsewhere and frozen, the small text encoder learns together with the UNet.

The shipped weights come from four minutes on one NVIDIA H200: 4866 steps of the VAE with 256 pictures, 8232 of the UNet
with 512. The losses, the rates and the source were these; 13 processes drew the pictures meanwhile (6.3 million), each
training's loss and gradient were one CUDA graph, and the rate's cosine ran over the seconds. Without the graph such a
card waits for Python: a step took 50 to 100 ms instead of 17. The defaults are for two CPU cores and about an hour.
No two runs make the same bytes: the tokenizer's ids come in another order each time.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ..diffusion.weights import TINY
from ..machine.devices import as_device, autocast, default_device
from . import pretrain_unclip, source_images, source_scenes
from .pretraining import Frozen, Log, Source, Steps, sample_timesteps, to_unit

TOKENS = 8  # context length: <start>, up to six words, <end>
WIDTH = 64  # of the context vectors
CHANNELS = 8  # of the latents: with Stable Diffusion's four a photograph of 32 pixels comes back blurred
SCHEDULE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")  # Stable Diffusion's
CHECK_VAE, CHECK_UNET, SAVE_UNET = 250, 500, 1000  # steps from one to the next


def build_tokenizer(folder: Path, with_digits: bool) -> CLIPTokenizer:
    """A byte-level BPE of CLIP's form whose merges make one token of every word of the captions, saved in a folder."""
    things = source_images.glyph_names(with_digits)
    captions = [f"soft {c} {name} on {c}" for c in source_images.COLOURS for name in things]
    captions += source_scenes.captions()
    bpe = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator(captions, trainer)
    model = json.loads(bpe.to_str())["model"]
    tokenizer = CLIPTokenizer(vocab=model["vocab"], merges=[tuple(m) for m in model["merges"]], model_max_length=TOKENS)
    tokenizer.save_pretrained(folder)
    return tokenizer


def build_models(
    tokenizer: CLIPTokenizer, channels: int = CHANNELS
) -> tuple[AutoencoderKL, UNet2DConditionModel, CLIPTextModel]:
    """The three networks with random weights; ``channels`` numbers of a latent for each 4 x 4 pixels."""
    vae = AutoencoderKL(
        block_out_channels=(32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=8,
        sample_size=source_images.SIZE,
        # After 500 steps of 32, dB of the source and of CIFAR-10: with attention 22.7 and 20.6, without 24.7 and 21.3;
        # roughened, with attention 23.0 and 20.9, without 26.0 and 22.1.
        mid_block_add_attention=False,
    )
    for block in (module for module in vae.modules() if isinstance(module, ResnetBlock2D)):
        torch.nn.init.zeros_(block.conv2.weight)  # a residual block begins as the identity, and learns faster
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(64, 128),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        attention_head_dim=4,
        norm_num_groups=16,
    )
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return vae, unet, CLIPTextModel(text)


# --- the VAE ---


def train_vae(vae: AutoencoderKL, steps: int, source: Source, log: Log) -> AutoencoderKL:
    """Reconstruction (squared + absolute error), a small KL term; sets the scaling factor to 1 / std of the latents."""
    training = Steps([vae], steps, lr=2e-3)
    held_out = to_unit(source.held_out(12345)[0])
    for step, loss in (bar := tqdm(enumerate(vae_losses(vae, steps, source), 1), desc="VAE", total=steps)):
        training.take(loss)
        if step % CHECK_VAE == 0 or step == steps:
            psnr, latent_std = vae_quality(training.ema[0], held_out)
            log({"phase": "vae", "step": step, "psnr_db": psnr, "latent_std": latent_std})
            bar.set_postfix(psnr=f"{psnr:.1f} dB")
    vae = training.ema[0]
    vae.register_to_config(scaling_factor=1 / latent_std)
    return vae


def vae_losses(vae: AutoencoderKL, steps: int, source: Source) -> Iterator[torch.Tensor]:
    """The loss of each batch; each picture of a pool is used four times before a new pool is drawn.

    Half of them are roughened: a VAE that saw nothing else than the source keeps 28 dB of it and 23 of a photograph.
    """
    for step in range(steps):
        if step % 200 == 0:
            pool = source.draw(50 * source.batch)[0]
        images = source.roughen(to_unit(pool[source.rows(len(pool)).to(source.device)]))
        with autocast(source.device, torch.bfloat16):
            posterior = vae.encode(images).latent_dist
            decoded = vae.decode(posterior.sample()).sample
        error = decoded.float() - images
        yield error.square().mean() + 0.2 * error.abs().mean() + 1e-4 * posterior.kl().mean() / 256


@torch.no_grad()
def vae_quality(vae: AutoencoderKL, images: torch.Tensor) -> tuple[float, float]:
    """(peak signal-to-noise ratio in dB of what comes back, standard deviation of the latents) of images in -1..1."""
    latents = vae.encode(images).latent_dist.mode()
    mse = (vae.decode(latents).sample.clamp(-1, 1) - images).square().mean()
    return float(10 * torch.log10(4 / mse)), float(latents.std())


# --- the UNet and the text encoder ---


class Probe:
    """The loss on held-out pictures with their own caption, with another picture's, and with the empty one.

    A model that has learnt *which* glyph a caption names shows right < empty < wrong.
    """

    def __init__(self, frozen: Frozen, source: Source):
        images, captions, generator = source.held_out(54321)
        keep = [i for i, caption in enumerate(captions) if " on " in caption]  # one that says what is to be seen
        ids = frozen.tokens([captions[i] for i in keep])
        self.frozen, self.latents = frozen, frozen.latents(images[keep])
        self.t = torch.randint(250, 950, (len(keep),), generator=generator).to(source.device)
        self.noise = torch.randn(self.latents.shape, generator=generator).to(source.device)
        self.ids = {"right": ids, "wrong": ids.roll(1, 0), "empty": frozen.tokens([""]).expand(len(keep), -1)}

    @torch.no_grad()
    def losses(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel) -> dict[str, float]:
        return {
            kind: float(self.frozen.loss(unet, text_encoder, self.latents, ids, self.t, self.noise))
            for kind, ids in self.ids.items()
        }


def train_unet(
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    frozen: Frozen,
    steps: int,
    source: Source,
    log: Log,
    save: Callable[[UNet2DConditionModel, CLIPTextModel], None],
) -> None:
    """Epsilon prediction on captioned pictures; saves the averaged UNet and text encoder now and then, and at last."""
    training = Steps([unet, text_encoder], steps, lr=1e-3)
    probe = Probe(frozen, source)
    losses = unet_losses(unet, text_encoder, frozen, steps, source)
    for step, loss in (bar := tqdm(enumerate(losses, 1), desc="UNet", total=steps)):
        training.take(loss)
        if step % CHECK_UNET == 0 or step == steps:
            found = probe.losses(*training.ema)
            log({"phase": "unet", "step": step, "loss": float(loss.detach()), **found})
            bar.set_postfix({kind: f"{value:.3f}" for kind, value in found.items()})
        if step % SAVE_UNET == 0 or step == steps:
            save(*training.ema)


def unet_losses(
    unet: UNet2DConditionModel, text_encoder: CLIPTextModel, frozen: Frozen, steps: int, source: Source
) -> Iterator[torch.Tensor]:
    """The loss of each batch, one caption in ten empty; each picture of a pool is used five times."""
    empty, pool, generator = frozen.tokens([""]), 100 * source.batch, source.generator
    for step in range(steps):
        if step % 500 == 0:
            images, captions = source.draw(pool)
            latents, ids = frozen.latents(images), frozen.tokens(captions)
        rows = source.rows(pool).to(source.device)
        batch_ids = ids[rows]
        batch_ids[(torch.rand(source.batch, generator=generator) < 0.1).to(source.device)] = empty
        noise = torch.randn(source.batch, *latents.shape[1:], generator=generator).to(source.device)
        t = sample_timesteps(source.batch, generator).to(source.device)
        yield frozen.loss(unet, text_encoder, latents[rows], batch_ids, t, noise)


# --- the command ---


def _folder(text: str) -> Path:
    """A folder that may be made; an empty name would be the working directory."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty: name a folder")
    return Path(text)


def options_of(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line's options. Raises SystemExit for wrong ones."""
    description = "Train the tiny Stable Diffusion from scratch, on pictures made of fonts and chance."
    parser = argparse.ArgumentParser(prog="python -m sdgen_lib pretrain", description=description)
    parser.add_argument("--out", type=_folder, required=True, help="folder for the finished model (diffusers layout)")
    parser.add_argument("--vae-steps", type=int, default=1400)
    parser.add_argument("--unet-steps", type=int, default=5000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--latent-channels", type=int, default=CHANNELS, help="numbers for each 4 x 4 pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--without-digits", action="store_true", help="leave the digits 0..9 out of the source domain")
    parser.add_argument(
        "--unclip", action="store_true", help="make an unCLIP model from a finished one, which also takes an image"
    )
    parser.add_argument("--base", type=_folder, default=TINY, help="that one's folder; the shipped tiny model")
    parser.add_argument("--encoder-steps", type=int, default=1200, help="of the image encoder of --unclip")
    parser.add_argument("--device", default=default_device(), help="cpu, cuda, cuda:1, mps")
    options = parser.parse_args(argv)
    try:
        options.device = as_device(options.device)
    except ValueError as error:
        parser.error(str(error))
    return options


def log_into(path: Path) -> Log:
    """``log(row)`` adds a row to the table in ``path``, a .csv file, with the seconds since now before it."""
    start, rows = time.perf_counter(), []

    def log(row: dict) -> None:
        rows.append({"seconds": round(time.perf_counter() - start), **row})
        columns = list(dict.fromkeys(name for r in rows for name in r))
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows({k: round(v, 5) if isinstance(v, float) else v for k, v in r.items()} for r in rows)

    return log


def main(argv: Sequence[str] | None = None) -> None:
    """The command ``pretrain``: makes the model in the folder ``--out``, and its training log beside it."""
    o = options_of(argv)
    o.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(o.seed)
    source = Source(torch.Generator().manual_seed(o.seed), o.batch_size, not o.without_digits, o.device)
    log = log_into(o.out / "training_log.csv")
    if o.unclip:
        pretrain_unclip.make(o.base, o.out, o.encoder_steps, o.unet_steps, source, log)
        return
    tokenizer = build_tokenizer(o.out / "tokenizer", source.with_digits)
    vae, unet, text_encoder = (module.to(o.device) for module in build_models(tokenizer, o.latent_channels))
    scheduler = DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=True, steps_offset=1)
    vae = train_vae(vae, o.vae_steps, source, log)

    def save(unet: UNet2DConditionModel, text_encoder: CLIPTextModel) -> None:
        # Half precision: enough for weights that were trained in bfloat16, and half the download. Not the small text
        # encoder: transformers loads it in the dtype it finds, diffusers the other two in float32.
        StableDiffusionPipeline(
            vae=copy.deepcopy(vae).half(),
            unet=copy.deepcopy(unet).half(),
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).save_pretrained(o.out, safe_serialization=True)

    frozen = Frozen(vae, tokenizer, scheduler.alphas_cumprod.to(o.device), o.device)
    train_unet(unet, text_encoder, frozen, o.unet_steps, source, log, save)


if __name__ == "__main__":
    main()
