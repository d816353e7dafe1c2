"""How the shipped tiny Stable Diffusion was made: ``python -m sdgen_lib.pretrain_tiny --out FOLDER``.

A text-to-image latent diffusion model of the very classes that Stable Diffusion is made of (AutoencoderKL,
UNet2DConditionModel with cross-attention, CLIPTextModel and CLIPTokenizer, epsilon prediction, scaled-linear
betas), only small: 32x32 pictures, 4x8x8 latents, 8 context tokens of width 64. It learns the procedural source
domain of `source_images` from scratch, so no image of any dataset of this course has been seen. Unlike SD, whose
text encoder was trained elsewhere and frozen, the small text encoder learns together with the UNet.

The defaults took 63 minutes on two CPU cores that other work shared. They make weights like the shipped ones, not the
same bytes: the tokenizer's ids come in another order each time.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from . import source_images

TOKENS = 8  # context length: <start>, up to six words, <end>
WIDTH = 64  # of the context vectors


def build_tokenizer(folder: Path, with_digits: bool) -> CLIPTokenizer:
    """A byte-level BPE of CLIP's form whose merges make one token of every word of the captions."""
    captions = [f"soft {c} {name} on {c} leaves" for c in source_images.COLOURS for name in source_images.glyph_names()]
    captions = captions if with_digits else [c for c in captions if "digit" not in c]
    bpe = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=2000, special_tokens=["<|startoftext|>", "<|endoftext|>"], initial_alphabet=alphabet,
        end_of_word_suffix="</w>", show_progress=False,
    )  # fmt: skip
    bpe.train_from_iterator(captions, trainer)
    model = json.loads(bpe.to_str())["model"]
    tokenizer = CLIPTokenizer(vocab=model["vocab"], merges=[tuple(m) for m in model["merges"]], model_max_length=TOKENS)
    tokenizer.save_pretrained(folder)
    return tokenizer


def build_models(tokenizer: CLIPTokenizer) -> tuple[AutoencoderKL, UNet2DConditionModel, CLIPTextModel]:
    """The three networks with random weights."""
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 64), down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, layers_per_block=1, latent_channels=4, norm_num_groups=8,
        sample_size=source_images.SIZE,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(64, 128), layers_per_block=1, cross_attention_dim=WIDTH,
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
        attention_head_dim=4, norm_num_groups=16,
    )  # fmt: skip
    text_encoder = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=TOKENS, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    ))  # fmt: skip
    return vae, unet, text_encoder


def to_unit(images: torch.Tensor) -> torch.Tensor:
    """uint8 0..255 -> float32 -1..1."""
    return images.float() / 127.5 - 1


class Steps:
    """Optimiser, one-cycle-like learning rate (linear warm-up, cosine to zero), clipping and EMA of one training."""

    def __init__(self, modules, total: int, lr: float, ema_decay: float = 0.999):
        self.modules, self.total, self.decay, self.step = modules, total, ema_decay, 0
        self.parameters = [p for m in modules for p in m.parameters()]
        self.ema = [copy.deepcopy(m).requires_grad_(False).eval() for m in modules]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=lr, weight_decay=1e-4, fused=True)
        warmup = min(200, total // 10 + 1)
        self.schedule = torch.optim.lr_scheduler.SequentialLR(
            self.optimizer,
            [torch.optim.lr_scheduler.LinearLR(self.optimizer, 0.05, total_iters=warmup),
             torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, max(1, total - warmup))],
            milestones=[warmup],
        )  # fmt: skip

    def take(self, loss: torch.Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.step += 1
        decay = min(self.decay, self.step / (self.step + 10))
        with torch.no_grad():
            for average, module in zip(self.ema, self.modules):
                torch._foreach_lerp_(list(average.parameters()), list(module.parameters()), 1 - decay)


def train_vae(vae, steps: int, batch: int, generator, with_digits, device, log) -> AutoencoderKL:
    """Reconstruction (squared + absolute error), a small KL term; sets the scaling factor to 1 / std of the latents."""
    training = Steps([vae], steps, lr=2e-3)
    held_out = to_unit(source_images.draw(512, torch.Generator().manual_seed(12345), with_digits)[0]).to(device)
    pool = None
    for step in (bar := tqdm(range(steps), desc="VAE")):
        if step % 100 == 0:
            pool = source_images.draw(100 * batch // 2, generator, with_digits)[0]
        images = to_unit(pool[torch.randint(len(pool), (batch,), generator=generator)]).to(device)
        with torch.autocast(device, dtype=torch.bfloat16):
            posterior = vae.encode(images).latent_dist
            decoded = vae.decode(posterior.sample()).sample
        error = decoded.float() - images
        training.take(error.square().mean() + 0.2 * error.abs().mean() + 1e-4 * posterior.kl().mean() / 256)
        if (step + 1) % 250 == 0 or step + 1 == steps:
            average = training.ema[0]
            with torch.no_grad():
                latents = average.encode(held_out).latent_dist.mode()
                mse = (average.decode(latents).sample.clamp(-1, 1) - held_out).square().mean()
            psnr = float(10 * torch.log10(4 / mse))
            log({"phase": "vae", "step": step + 1, "psnr_db": psnr, "latent_std": float(latents.std())})
            bar.set_postfix(psnr=f"{psnr:.1f} dB")
    vae = training.ema[0]
    vae.register_to_config(scaling_factor=1 / float(latents.std()))
    return vae


def sample_timesteps(n: int, generator: torch.Generator) -> torch.Tensor:
    """Half uniform over 0..999, half over 250..950, where it is decided *which* thing is drawn."""
    everywhere = torch.randint(0, 1000, (n,), generator=generator)
    middle = torch.randint(250, 950, (n,), generator=generator)
    return torch.where(torch.rand(n, generator=generator) < 0.5, everywhere, middle)


def train_unet(unet, text_encoder, vae, tokenizer, alphas, steps, batch, generator, with_digits, device, log, save):
    """Epsilon prediction on captioned pictures, one caption in ten empty; returns the averaged UNet and text encoder.

    Every 500 steps it logs the loss on held-out pictures with their own caption, with another picture's, and with
    the empty one: a model that has learnt *which* glyph a caption names shows right < empty < wrong.
    """
    training = Steps([unet, text_encoder], steps, lr=1e-3)
    alphas = alphas.to(device)

    @torch.no_grad()
    def encode(images):
        parts = [vae.encode(to_unit(part).to(device)).latent_dist.sample() for part in images.split(512)]
        return torch.cat(parts) * vae.config.scaling_factor

    def tokens(captions):
        padded = dict(padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
        return tokenizer(captions, **padded).input_ids

    def loss_of(unet, text_encoder, latents, ids, t, noise):
        a = alphas[t].view(-1, 1, 1, 1)
        noisy = a.sqrt() * latents + (1 - a).sqrt() * noise
        with torch.autocast(device, dtype=torch.bfloat16):
            context = text_encoder(ids).last_hidden_state
            predicted = unet(noisy, t, encoder_hidden_states=context).sample
        return F.mse_loss(predicted.float(), noise)

    fixed = torch.Generator().manual_seed(54321)
    images, captions = source_images.draw(512, fixed, with_digits)
    keep = [i for i, c in enumerate(captions) if "leaves" not in c]
    held_latents, held_ids = encode(images[keep]), tokens([captions[i] for i in keep]).to(device)
    held_t = torch.randint(250, 950, (len(keep),), generator=fixed).to(device)
    held_noise = torch.randn(held_latents.shape, generator=fixed).to(device)
    empty_id = tokens([""]).to(device)

    pool_size = 100 * batch
    for step in (bar := tqdm(range(steps), desc="UNet")):
        if step % 250 == 0:  # each picture of a pool is used 2.5 times before a new pool is drawn
            images, captions = source_images.draw(pool_size, generator, with_digits)
            latents, ids = encode(images), tokens(captions).to(device)
        rows = torch.randint(pool_size, (batch,), generator=generator)
        batch_ids = ids[rows].clone()
        batch_ids[torch.rand(batch, generator=generator) < 0.1] = empty_id
        noise = torch.randn(batch, *latents.shape[1:], generator=generator).to(device)
        t = sample_timesteps(batch, generator).to(device)
        loss = loss_of(unet, text_encoder, latents[rows], batch_ids, t, noise)
        training.take(loss)
        if (step + 1) % 500 == 0 or step + 1 == steps:
            with torch.no_grad():
                right, wrong, empty = (
                    float(loss_of(*training.ema, held_latents, ids_, held_t, held_noise))
                    for ids_ in (held_ids, held_ids.roll(1, 0), empty_id.expand(len(keep), -1))
                )
            losses = {"loss": float(loss.detach()), "right": right, "wrong": wrong, "empty": empty}
            log({"phase": "unet", "step": step + 1, **losses})
            bar.set_postfix(right=f"{right:.3f}", wrong=f"{wrong:.3f}", empty=f"{empty:.3f}")
        if (step + 1) % 1000 == 0 and step + 1 < steps:
            save(*training.ema)
    return training.ema


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the finished model (diffusers layout)")
    parser.add_argument("--vae-steps", type=int, default=1400)
    parser.add_argument("--unet-steps", type=int, default=5000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--without-digits", action="store_true", help="leave the digits 0..9 out of the source domain")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    with_digits = not args.without_digits

    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    start, rows = time.perf_counter(), []

    def log(row: dict) -> None:
        rows.append({"seconds": round(time.perf_counter() - start), **row})
        columns = list(dict.fromkeys(name for r in rows for name in r))
        with open(args.out / "training_log.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows({k: round(v, 5) if isinstance(v, float) else v for k, v in r.items()} for r in rows)

    tokenizer = build_tokenizer(args.out / "tokenizer", with_digits)
    vae, unet, text_encoder = (module.to(args.device) for module in build_models(tokenizer))
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )
    vae = train_vae(vae, args.vae_steps, args.batch_size, generator, with_digits, args.device, log)

    def save(unet, text_encoder) -> None:
        # Half precision: enough for weights that were trained in bfloat16, and half the download. Not the small text
        # encoder: transformers loads it in the dtype it finds, diffusers the other two in float32.
        StableDiffusionPipeline(
            vae=copy.deepcopy(vae).half(), unet=copy.deepcopy(unet).half(),
            text_encoder=text_encoder, tokenizer=tokenizer, scheduler=scheduler,
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        ).save_pretrained(args.out, safe_serialization=True)  # fmt: skip

    averaged = train_unet(
        unet, text_encoder, vae, tokenizer, scheduler.alphas_cumprod, args.unet_steps, args.batch_size,
        generator, with_digits, args.device, log, save,
    )  # fmt: skip
    save(*averaged)


if __name__ == "__main__":
    main()
