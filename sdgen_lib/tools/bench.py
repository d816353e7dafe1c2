"""Speed and memory, measured: ``python -m sdgen_lib bench WHAT``.

``sampler``, ``train``, ``inversion``, ``classifier``, ``search`` and ``course`` run ours and a named peer in one
process on the same weights, batch, steps, guidance and images, by turns after a warm-up: the median of each, their
ratio with its spread, and the share of the machine's own ceiling, a large matrix product of the same dtype measured in
the same run.
``images`` shows what speed costs in pixels and CAS, ``scaling`` how time and memory grow, ``phases`` what each part of
the method costs on one backbone. ``luck`` tells how often the first search ends where a long one ends.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from .. import data
from ..classify import ResNet20, train_classifier
from ..diffusion import lora
from ..diffusion.backbone import Backbone
from ..diffusion.conditions import Condition
from ..diffusion.generate import balanced_labels, generate
from ..diffusion.loss import add_noise, diffusion_loss
from ..diffusion.training import Latents, fit, held_out_losses, optimizer_for
from ..machine.devices import as_device, classifier_dtype, default_device
from ..machine.parallel import side_by_side
from ..machine.seeds import image_noise
from ..methods.class_encoder import ClassEncoder
from ..methods.inversion import VectorTable
from ..store import files
from .bench_luck import luck
from .bench_runs import exactness, pixel_difference, pruning, whole_course
from .bench_tools import Peak, ceiling, compare, encoder_for, flops, load, pipeline_of, seconds

PEER = "plain loop with DataLoader, float32"
SIZES = (  # of `scaling`: images, classes, pixels
    *((256, 10, 32), (1024, 10, 32), (4096, 10, 32)),
    *((1024, 100, 32), (1024, 1000, 32)),
    *((1024, 10, 28), (1024, 10, 64)),
)


# --- sampling ---


def sampler(o: argparse.Namespace) -> list[dict[str, Any]]:
    """Class labels to uint8 images, against diffusers' pipeline: float32 on a CPU, float16 on a card."""
    model, labels = load(o.backbone, o.device, "auto"), balanced_labels(o.batch, 10)
    encoder, batch_size = encoder_for(model), min(o.batch, 128)
    if model.gains_by_compiling:  # as a run does
        model.compile_unet(2 * batch_size)
    peer_dtype = torch.float32 if o.device == "cpu" else torch.float16
    peer = pipeline_peer(model, encoder, labels, peer_dtype, o)

    def ours(model: Backbone = model, compiled: bool = model.gains_by_compiling) -> torch.Tensor:
        how = dict(num_inference_steps=o.steps, guidance_scale=o.guidance, batch_size=batch_size, compiled=compiled)
        return generate(model, encoder.conditioner().table(), labels, **how)

    sizes = [size for size in (8, 16, 32, 64, 128, 256) if size <= o.batch] or [o.batch]
    quick = {size: seconds(lambda: peer(size), o.device) for size in sizes} if o.device != "cpu" else {o.batch: 0}
    best = min(quick, key=quick.get)
    unet, decode = sampling_flops(model, encoder)
    row = compare(
        f"sampler, {o.backbone}, batch {o.batch}, IS {o.steps}, UGS {o.guidance:g}",
        ours,
        lambda: peer(best),
        f"diffusers {diffusers.__version__} pipeline, {str(peer_dtype).removeprefix('torch.')}, batch {best}",
        o.batch,
        o.device,
        o.repeats,
        o.batch * (2 * o.steps * unet + decode),
        ceiling(o.device, model.dtype),
    )
    row["GFLOP of a UNet pass"], row["GFLOP of a decoding"] = unet / 1e9, decode / 1e9
    if o.device == "cpu" and o.backbone == "tiny":
        away = pixel_difference(ours(), ours(load(o.backbone, o.device, "fp32"), compiled=False))
        row["largest pixel difference to fp32"] = away["largest pixel difference"]
        row["mean pixel difference"] = away["mean pixel difference"]
    return [row]


@torch.no_grad()
def pipeline_peer(
    model: Backbone, encoder: ClassEncoder, labels: torch.Tensor, dtype: torch.dtype, o: argparse.Namespace
) -> Callable[[int], None]:
    """``peer(batch)``: diffusers' own pipeline draws an image for each of ``labels``, ``batch`` at once."""
    pipe = pipeline_of(model, dtype).to(model.device)
    contexts = encoder.contexts()[labels.to(model.device)].to(dtype)
    away = encoder.unconditional().to(dtype)
    noise = image_noise(0, "set", range(len(labels)), model.latent_shape).to(model.device, dtype)
    how = dict(num_inference_steps=o.steps, guidance_scale=o.guidance, output_type="np")
    how |= dict(height=model.image_size, width=model.image_size)

    def peer(batch: int) -> None:
        for i in range(0, len(labels), batch):
            part = contexts[i : i + batch]
            unconditional = away.expand(len(part), -1, -1)
            pipe(prompt_embeds=part, negative_prompt_embeds=unconditional, latents=noise[i : i + batch], **how)

    return peer


@torch.no_grad()
def sampling_flops(model: Backbone, encoder: ClassEncoder) -> tuple[int, int]:
    """The FLOP of one image's UNet pass, and of its decoding."""
    latents = torch.zeros(1, *model.latent_shape, device=model.device)
    t = torch.zeros(1, dtype=torch.long, device=model.device)
    condition = Condition(encoder.contexts()[:1])
    return flops(lambda: model.predict_noise(latents, t, condition)), flops(lambda: model.decode(latents))


def scaling(o: argparse.Namespace) -> list[dict[str, Any]]:
    """Time and memory of generation against the number of images, classes and the image size."""
    model, rows = load(o.backbone, o.device, "auto"), []
    for images, classes, side in SIZES:
        conditioner, labels = encoder_for(model, classes).conditioner().table(), balanced_labels(images, classes)
        options = dict(num_inference_steps=5, guidance_scale=2.0, image_size=side)
        generate(model, conditioner, labels[:128], **options)
        with Peak(o.device) as peak:
            took = seconds(lambda: generate(model, conditioner, labels, **options), o.device)
        row = {"images": images, "classes": classes, "pixels": side, "seconds": took}
        rows.append(row | {"images/s": images / took, "peak GB": peak.gigabytes})
    return rows


# --- training ---


def training(o: argparse.Namespace) -> list[dict[str, Any]]:
    """An epoch of step 1, against the loop of a tutorial: a DataLoader of images, each encoded anew, float32.

    At the batch sizes of `demo` and of the paper; both also compute the losses of the same few held-out images.
    """
    model, exact = load(o.backbone, o.device, "auto"), load(o.backbone, o.device, "fp32")
    digits = data.load("digits")
    images, labels = digits.train.images[: o.images], digits.train.labels[: o.images]
    latents = Latents(model.encode(images), labels.to(o.device))
    held_out = Latents(latents.latents[:8], latents.labels[:8])
    one = (model, encoder_for(model), latents.latents[:1], latents.labels[:1])
    work = len(images) * flops(lambda: plain_step(*one))
    rows = []
    for batch_size in (32, 64):

        def ours() -> None:
            epoch_of_ours(model, latents, held_out, batch_size)

        rows.append(
            compare(
                f"step 1, {o.backbone}, batch {batch_size}",
                ours,
                plain_epoch(exact, images, labels, held_out, batch_size),
                PEER,
                len(images),
                o.device,
                o.repeats,
                work,
                ceiling(o.device, model.dtype),
            )
        )
    return rows


def epoch_of_ours(model: Backbone, train: Latents, held_out: Latents, batch_size: int) -> None:
    """An epoch as step 1 of a run does it: what it leaves to go on from is written to the disk."""
    encoder = encoder_for(model)
    trainable, conditioner = dict(encoder.named_parameters()), encoder.conditioner()
    how = dict(batch_size=batch_size, learning_rate=1e-3, weight_decay=0.0, clip_norm=10.0, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        for epoch in fit(trainable, model, conditioner, train, epochs=1, **how):
            held_out_losses(model, conditioner, held_out, encoder.num_classes)
            files.save_tensors(Path(folder) / "epoch.safetensors", trainable)
            files.save_tensors(Path(folder) / "state.safetensors", epoch.state.tensors())


def plain_epoch(
    model: Backbone, images: torch.Tensor, labels: torch.Tensor, held_out: Latents, batch_size: int
) -> Callable[[], None]:
    """The peer's epoch: ``images`` uint8 (N, 3, h, w) and ``labels`` int64 (N,) come from a DataLoader."""
    encoder = encoder_for(model)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-3)
    loader = DataLoader(TensorDataset(images, labels), batch_size=batch_size, shuffle=True)

    def epoch() -> None:
        for batch, classes in loader:
            with torch.no_grad():
                latents = model.encode(batch)
            optimizer.zero_grad()
            plain_step(model, encoder, latents, classes.to(model.device))
            optimizer.step()
        held_out_losses(model, encoder.conditioner(), held_out, encoder.num_classes)

    return epoch


def plain_step(model: Backbone, encoder: ClassEncoder, latents: torch.Tensor, labels: torch.Tensor) -> None:
    """The gradients of the diffusion loss as tutorials write it; all arguments are on the model's device."""
    t = torch.randint(0, len(model.alphas_cumprod), (len(latents),), device=latents.device)
    noise = torch.randn_like(latents)
    context = encoder(F.one_hot(labels, encoder.num_classes).float())
    found = model.predict_noise(add_noise(latents, noise, model.alphas_cumprod[t]), t, Condition(context))
    F.mse_loss(found.float(), noise).backward()


def inversion(o: argparse.Namespace) -> list[dict[str, Any]]:
    """Visits of Diffusion Inversion's vectors, one of each, against a plain float32 loop on the same UNet.

    Both at batches of 128 (`demo`) and of 50 (the released code); the images are encoded beforehand on both sides.
    """
    model, exact = load(o.backbone, o.device, "auto"), load(o.backbone, o.device, "fp32")
    digits = data.load("digits")
    images, labels = digits.train.images[: o.images], digits.train.labels[: o.images]
    latents = Latents(model.encode(images), labels.to(o.device))
    start = torch.zeros(model.tokens, model.width)
    rows = []
    for batch_size in (128, 50):
        how = dict(epochs=1, batch_size=batch_size, learning_rate=0.03, weight_decay=0.0, clip_norm=math.inf, seed=0)
        how |= dict(optimizer="row-adam", schedule="constant")

        def ours() -> None:
            table = VectorTable(start, len(latents), sparse=True).to(o.device)
            for _ in fit({"vectors": table.table.weight}, model, table, latents, **how):
                pass

        peer = plain_inversion(exact, latents, start, batch_size)
        name = f"inversion, {o.backbone}, batch {batch_size}"
        rows.append(compare(name, ours, peer, "a plain loop, float32, AdamW", len(latents), o.device, o.repeats))
    return rows


def plain_inversion(model: Backbone, train: Latents, start: torch.Tensor, batch_size: int) -> Callable[[], None]:
    """The peer's loop over the latents, as one would write it first: a dense table, AdamW."""
    table = start.expand(len(train), -1, -1).clone().to(model.device).requires_grad_()
    optimizer = torch.optim.AdamW([table], lr=0.03)

    def visits() -> None:
        for rows in torch.randperm(len(train)).split(batch_size):
            latents = train.latents[rows]
            t = torch.randint(0, len(model.alphas_cumprod), (len(rows),), device=model.device)
            noise = torch.randn_like(latents)
            noisy = add_noise(latents, noise, model.alphas_cumprod[t])
            optimizer.zero_grad()
            F.mse_loss(model.predict_noise(noisy, t, Condition(table[rows])).float(), noise).backward()
            optimizer.step()

    return visits


# --- the classifier ---


def resnet(o: argparse.Namespace) -> list[dict[str, Any]]:
    """An epoch of ResNet20, against a plain loop with a DataLoader, float32: as in `demo`, and as in the paper.

    One alone, as in a trial of a search, and on a CPU one for each core side by side, as in the tables.
    """
    cores = torch.get_num_threads() if o.device == "cpu" else 1
    rows = []
    for size, batch in ((16, 32), (32, 256)):
        digits = data.load("digits", image_size=size)
        rows += [resnet_row(o, digits, batch, at_once) for at_once in ((1, cores) if cores > 1 else (1,))]
    return rows


def resnet_row(o: argparse.Namespace, digits: data.ImageData, batch: int, at_once: int) -> dict[str, Any]:
    """A row of `resnet`: ``at_once`` classifiers at a time, ours side by side, the peer's one after the other."""
    train, val = digits.train, data.Split(digits.val.images[:8], digits.val.labels[:8])
    loader = DataLoader(TensorDataset(train.images, train.labels), batch_size=batch, shuffle=True)
    net, dtype = ResNet20(10).to(o.device), classifier_dtype("auto", o.device)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)

    def step(images: torch.Tensor, labels: torch.Tensor) -> None:
        loss = F.cross_entropy(net(images.to(o.device)), labels.to(o.device), label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()

    def epoch(look: Callable[..., None]) -> None:
        how = dict(epochs=1, batch_size=batch, device=o.device, dtype=dtype, on_epoch=look)
        train_classifier(train, val, 10, **how)

    def peer() -> None:
        net.train()
        for _ in range(at_once):
            for images, labels in loader:
                step(images, labels)
                optimizer.step()

    beside = f"{at_once} side by side" if at_once > 1 else "one"
    return compare(
        f"ResNet20, {digits.image_size} pixels, batch {batch}, {beside}",
        lambda: list(side_by_side([epoch] * at_once, at_once)),
        peer,
        PEER,
        at_once * len(train),
        o.device,
        o.repeats,
        at_once * len(train) * flops(lambda: step(train.images[:1], train.labels[:1])),
        ceiling(o.device, dtype),
    )


# --- each part of the method ---


def phases(o: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds, images/s and peak memory of each part of the method, at the paper's batch sizes or ``--batch``."""
    rows = []
    for precision in o.precision:
        model = load(o.backbone, o.device, precision)
        for name, work in parts(model, o):
            print(f"  {precision}: {name} ...", file=sys.stderr, flush=True)
            with Peak(o.device) as peak:
                work()
                took = min(seconds(work, o.device) for _ in range(o.repeats))
            row = {"phase": name, "precision": precision, "batch": o.batch, "seconds": took}
            rows.append(row | {"images/s": o.batch / took, "peak GB": peak.gigabytes})
    return rows


def parts(model: Backbone, o: argparse.Namespace) -> Iterable[tuple[str, Callable[[], Any]]]:
    """The parts of the method by name, to be done once they are named: the next one changes the model."""
    encoder, labels = encoder_for(model), balanced_labels(o.batch, 10)
    yield "step 1: Class-Encoder", training_step(model, encoder, labels, list(encoder.parameters()), "adamw")
    encoder.requires_grad_(False)
    options = dict(num_inference_steps=o.steps, guidance_scale=o.guidance, batch_size=o.batch)
    conditioner = encoder.conditioner().table()
    yield f"sampling, IS {o.steps}", lambda: generate(model, conditioner, labels, **options)
    yield "encoding", lambda: model.encode(torch.zeros(o.batch, 3, 32, 32, dtype=torch.uint8))
    yield "step 3: LoRA", training_step(model, encoder, labels, list(lora.add(model.unet, 16).values()), "adamw")
    lora.remove(model.unet)
    model.unet_dtype(torch.float32)
    for name in o.optimizer:
        unet = list(model.unet.parameters())
        yield f"step 3: UNet, {name}", training_step(model, encoder, labels, unet, name)


def training_step(
    model: Backbone, encoder: ClassEncoder, labels: torch.Tensor, parameters: list[nn.Parameter], optimizer: str
) -> Callable[[], None]:
    """A training step of these parameters on random latents, one for each of ``labels``."""
    latents = torch.randn(len(labels), *model.latent_shape, device=model.device)
    t = torch.randint(0, len(model.alphas_cumprod), (len(labels),), device=model.device)
    conditioner = encoder.conditioner()
    for parameter in parameters:
        parameter.requires_grad_(True)
    adam = optimizer_for({1e-5: parameters}, optimizer, weight_decay=0.0)

    def work() -> None:
        noise = torch.randn_like(latents)
        diffusion_loss(model.predict_noise, latents, conditioner(labels), t, noise, model.alphas_cumprod).backward()
        adam.step()
        adam.zero_grad(set_to_none=True)

    return work


# --- the command ---

BENCHMARKS: dict[str, Callable[[argparse.Namespace], list[dict[str, Any]]]] = {
    "sampler": sampler,
    "train": training,
    "classifier": resnet,
    "search": pruning,
    "images": exactness,
    "course": whole_course,
    "luck": luck,
    "scaling": scaling,
    "phases": phases,
    "inversion": inversion,
}
AS_TABLE = ("scaling", "phases")  # rows of one kind; the others have a name and a peer


def main(argv: Sequence[str] | None = None) -> int:
    """The command ``bench``: prints what it measures; returns 0."""
    o = options_of(argv)
    rows = BENCHMARKS[o.what](o)
    if o.what in AS_TABLE:
        print(pd.DataFrame(rows).to_string(index=False, float_format=lambda value: f"{value:.3g}"))
    else:
        print("\n\n".join(as_text(row) for row in rows), end="\n\n")
    if o.json:
        facts = {"torch": torch.__version__, "threads": torch.get_num_threads(), "device": o.device}
        o.json.write_text(json.dumps({"machine": facts, "rows": rows}, indent=1) + "\n")
    return 0


def options_of(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line's options. Raises SystemExit for wrong ones."""
    description = "Speed and memory, measured beside named peers on the same work."
    parser = argparse.ArgumentParser(prog="python -m sdgen_lib bench", description=description)
    parser.add_argument("what", choices=BENCHMARKS)
    parser.add_argument("--backbone", default="tiny", help="tiny, sd2-random, or what a run takes")
    parser.add_argument("--dataset", default="digits", help="of `luck`: what a run takes")
    parser.add_argument("--device", default=default_device(), help="cpu, cuda, cuda:1, mps")
    parser.add_argument("--batch", type=int, help="images at once (sampler: 256; phases: 4)")
    parser.add_argument("--steps", type=int, default=25, help="inference steps (IS)")
    parser.add_argument("--guidance", type=float, default=2.0, help="guidance scale (UGS)")
    parser.add_argument("--images", type=int, default=1024, help="training images of `train` and `inversion`")
    parser.add_argument("--repeats", type=int, default=3, help="turns, seeds (`search`, `images`), searches (`luck`)")
    parser.add_argument("--precision", nargs="+", default=["auto"], help="of `phases`: fp32 bf16 fp16")
    parser.add_argument("--optimizer", nargs="*", default=["adamw"], help="of `phases`: adamw adamw-8bit")
    parser.add_argument("--json", type=Path, help="write the rows there too")
    options = parser.parse_args(argv)
    try:
        options.device = as_device(options.device)
    except ValueError as error:
        parser.error(str(error))
    options.batch = options.batch or (4 if options.what == "phases" else 256)
    return options


def as_text(row: dict[str, Any]) -> str:
    """A row as lines of a name and a value, numbers with three digits."""
    shown = {name: f"{value:.3g}" if isinstance(value, float) else value for name, value in row.items()}
    return "\n".join(f"{name:>34}  {value}" for name, value in shown.items())


if __name__ == "__main__":
    sys.exit(main())
