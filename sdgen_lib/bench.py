"""Speed and memory, measured: ``python -m sdgen_lib.bench WHAT``.

``sampler``, ``train``, ``classifier``, ``search`` and ``course`` run ours and a named peer in one process on the same
weights, batch, steps, guidance and images, by turns after a warm-up: the median of each, their ratio with its spread,
and the share of the machine's own ceiling, a large matrix product of the same dtype measured in the same run.
``images`` shows what speed costs in pixels and CAS, ``scaling`` how time and memory grow, ``phases`` what each part of
the method costs on one backbone.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pandas as pd
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from . import classifier, data, devices, lora, sample, train
from .bench_runs import exactness, pruning, whole_course
from .bench_tools import Peak, ceiling, compare, encoder_for, flops, load, pipeline_of, seconds


def sampler(o: argparse.Namespace) -> list[dict[str, Any]]:
    """Class labels to uint8 images, against diffusers' pipeline: float32 on a CPU, float16 on a card."""
    model = load(o.backbone, o.device, "auto")
    encoder, labels = encoder_for(model), sample.balanced_labels(o.batch, 10)
    options = dict(num_inference_steps=o.steps, guidance_scale=o.guidance, batch_size=min(o.batch, 128))
    if model.gains_by_compiling:  # as a run does
        model.compile_unet(2 * options["batch_size"])
    peer_dtype = torch.float32 if o.device == "cpu" else torch.float16
    pipe = pipeline_of(model, peer_dtype).to(o.device)
    contexts, away = (c.detach().to(peer_dtype) for c in (encoder.contexts()[labels], encoder.unconditional()))
    noise = sample.initial_noise(0, "set", range(o.batch), model.latent_shape).to(o.device, peer_dtype)

    def peer(batch: int = o.batch) -> None:
        for i in range(0, o.batch, batch):
            part = contexts[i : i + batch]
            pipe(prompt_embeds=part, negative_prompt_embeds=away.expand(len(part), -1, -1), output_type="np",
                 latents=noise[i : i + batch], num_inference_steps=o.steps, guidance_scale=o.guidance,
                 height=model.image_size, width=model.image_size)  # fmt: skip

    sizes = [b for b in (8, 16, 32, 64, 128, 256) if b <= o.batch]
    quick = {size: seconds(lambda: peer(size), o.device) for size in sizes} if o.device != "cpu" else {o.batch: 0}
    best = min(quick, key=quick.get)
    one = torch.zeros(1, *model.latent_shape, device=o.device)
    with torch.no_grad():
        t = torch.zeros(1, dtype=torch.long, device=o.device)
        unet = flops(lambda: model.predict_noise(one, t, contexts[:1].float()))
        decode = flops(lambda: model.decode(one))
    work = o.batch * (2 * o.steps * unet + decode)
    row = compare(
        f"sampler, {o.backbone}, batch {o.batch}, IS {o.steps}, UGS {o.guidance:g}",
        lambda: sample.generate(model, encoder, labels, **options), lambda: peer(best),
        f"diffusers {diffusers.__version__} pipeline, {peer_dtype}, batch {best}".replace("torch.", ""), o.batch,
        o.device, o.repeats, work, ceiling(o.device, model.dtype),
    )  # fmt: skip
    row["GFLOP of a UNet pass"], row["GFLOP of a decoding"] = unet / 1e9, decode / 1e9
    if o.device == "cpu" and o.backbone == "tiny":
        exact = sample.generate(load(o.backbone, o.device, "fp32"), encoder, labels, **options).int()
        ours = sample.generate(model, encoder, labels, **options).int()
        row["largest pixel difference to fp32"] = int((ours - exact).abs().max())
        row["mean pixel difference"] = float((ours - exact).abs().float().mean())
    return [row]


def training(o: argparse.Namespace) -> list[dict[str, Any]]:
    """An epoch of step 1, against the loop of a tutorial: a DataLoader of images, each encoded anew, float32.

    At the batch sizes of `demo` and of the paper; both also compute the losses of the same few held-out images.
    """
    model, exact = load(o.backbone, o.device, "auto"), load(o.backbone, o.device, "fp32")
    digits = data.load("digits")
    images, labels = digits.train.images[: o.images], digits.train.labels[: o.images]
    latents = train.Latents(model.encode(images), labels.to(o.device))
    held_out = train.Latents(latents.latents[:8], latents.labels[:8])
    encoder = encoder_for(exact)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-3)

    def step(predict_noise: Callable, x: torch.Tensor, classes: torch.Tensor) -> None:
        t = torch.randint(0, 1000, (len(x),), device=o.device)
        noise, alpha_bar = torch.randn_like(x), exact.alphas_cumprod[t].view(-1, 1, 1, 1)
        context = encoder(F.one_hot(classes, 10).float().to(o.device))
        found = predict_noise(alpha_bar.sqrt() * x + (1 - alpha_bar).sqrt() * noise, t, context)
        optimizer.zero_grad()
        F.mse_loss(found, noise).backward()

    work = len(images) * flops(lambda: step(model.predict_noise, latents.latents[:1], labels[:1]))
    rows = []
    for batch_size in (32, 64):
        loader = DataLoader(TensorDataset(images, labels), batch_size=batch_size, shuffle=True)

        def ours() -> None:
            mine = encoder_for(model)
            with tempfile.TemporaryDirectory() as folder:
                train.fit(
                    dict(mine.named_parameters()), model, mine, latents, held_out, Path(folder), epochs=1,
                    batch_size=batch_size, learning_rate=1e-3, weight_decay=0.0, clip_norm=10.0, seed=0,
                )  # fmt: skip

        def peer() -> None:
            for batch, classes in loader:
                with torch.no_grad():
                    x = exact.encode(batch)
                step(lambda x, t, context: exact.unet(x, t, encoder_hidden_states=context).sample, x, classes)
                optimizer.step()
            train.held_out_losses(exact, encoder, held_out, encoder.unconditional().detach())

        rows.append(compare(
            f"step 1, {o.backbone}, batch {batch_size}", ours, peer, "plain loop with DataLoader, float32", len(images),
            o.device, o.repeats, work, ceiling(o.device, model.dtype),
        ))  # fmt: skip
    return rows


def resnet(o: argparse.Namespace) -> list[dict[str, Any]]:
    """An epoch of ResNet20, against a plain loop with a DataLoader, float32: as in `demo`, and as in the paper.

    One alone, as in a trial of a search, and on a CPU one for each core side by side, as in the tables.
    """
    rows, dtype = [], devices.classifier_dtype("auto", o.device)
    cores = torch.get_num_threads() if o.device == "cpu" else 1
    cases = [(16, 32, 1), (16, 32, cores), (32, 256, 1), (32, 256, cores)]
    for size, batch, at_once in cases if cores > 1 else cases[::2]:
        digits = data.load("digits", image_size=size)
        n, val = len(digits.train), data.Split(digits.val.images[:8], digits.val.labels[:8])
        loader = DataLoader(TensorDataset(digits.train.images, digits.train.labels), batch_size=batch, shuffle=True)
        net = classifier.ResNet20(10).to(o.device)
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)

        def step(images: torch.Tensor, labels: torch.Tensor) -> None:
            loss = F.cross_entropy(net(images.to(o.device)), labels.to(o.device), label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()

        def epoch(look: Callable[..., None]) -> None:
            classifier.train_classifier(
                digits.train.images, digits.train.labels, val, 10, epochs=1, batch_size=batch, device=o.device,
                dtype=dtype, on_epoch=look,
            )  # fmt: skip

        def ours() -> None:
            list(devices.side_by_side([epoch] * at_once, at_once))

        def peer() -> None:
            net.train()
            for _ in range(at_once):
                for images, labels in loader:
                    step(images, labels)
                    optimizer.step()

        work = at_once * n * flops(lambda: step(digits.train.images[:1], digits.train.labels[:1]))
        name = f"ResNet20, {size} pixels, batch {batch}, " + (f"{at_once} side by side" if at_once > 1 else "one")
        rows.append(compare(name, ours, peer, "plain loop with DataLoader, float32", at_once * n, o.device, o.repeats,
                            work, ceiling(o.device, dtype)))  # fmt: skip
    return rows


def scaling(o: argparse.Namespace) -> list[dict[str, Any]]:
    """Time and memory of generation against the number of images, classes and the image size."""
    model = load(o.backbone, o.device, "auto")
    rows = []
    for images, classes, side in ((256, 10, 32), (1024, 10, 32), (4096, 10, 32), (1024, 100, 32), (1024, 1000, 32),
                                  (1024, 10, 28), (1024, 10, 64)):  # fmt: skip
        encoder, labels = encoder_for(model, classes), sample.balanced_labels(images, classes)
        options = dict(num_inference_steps=5, guidance_scale=2.0, image_size=side)
        sample.generate(model, encoder, labels[:128], **options)
        with Peak(o.device) as peak:
            took = seconds(lambda: sample.generate(model, encoder, labels, **options), o.device)
        rows.append({"images": images, "classes": classes, "pixels": side, "seconds": took, "images/s": images / took,
                     "peak GB": peak.gigabytes})  # fmt: skip
    return rows


def phases(o: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds, images/s and peak memory of each part of the method, at the paper's batch sizes or ``--batch``."""
    rows = []
    for precision in o.precision:
        model = load(o.backbone, o.device, precision)
        encoder = encoder_for(model)
        labels = sample.balanced_labels(o.batch, 10).to(o.device)
        latents = torch.randn(o.batch, *model.latent_shape, device=o.device)
        t = torch.randint(0, 1000, (o.batch,), device=o.device)

        def step(parameters: list[torch.nn.Parameter], name: str) -> Callable[[], None]:
            for p in parameters:
                p.requires_grad_(True)
            adam = train.optimizer_for(parameters, name, learning_rate=1e-5, weight_decay=0.0)

            def work() -> None:
                contexts = encoder.contexts()[labels]
                loss = train.diffusion_loss(
                    model.predict_noise, latents, contexts, t, torch.randn_like(latents), model.alphas_cumprod
                )
                loss.backward()
                adam.step()
                adam.zero_grad(set_to_none=True)

            return work

        def add(name: str, work: Callable[[], Any]) -> None:
            print(f"  {precision}: {name} ...", file=sys.stderr, flush=True)
            with Peak(o.device) as peak:
                work()
                took = min(seconds(work, o.device) for _ in range(o.repeats))
            rows.append({"phase": name, "precision": precision, "batch": o.batch, "seconds": took,
                         "images/s": o.batch / took, "peak GB": peak.gigabytes})  # fmt: skip

        add("step 1: Class-Encoder", step(list(encoder.parameters()), "adamw"))
        encoder.requires_grad_(False)
        options = dict(num_inference_steps=o.steps, guidance_scale=o.guidance, batch_size=o.batch)
        add(f"sampling, IS {o.steps}", lambda: sample.generate(model, encoder, labels.cpu(), **options))
        add("encoding", lambda: model.encode(torch.zeros(o.batch, 3, 32, 32, dtype=torch.uint8)))
        low_rank = lora.add(model.unet, 16)
        add("step 3: LoRA", step(list(low_rank.values()), "adamw"))
        lora.remove(model.unet)
        model.unet_dtype(torch.float32)
        for name in o.optimizer:
            add(f"step 3: UNet, {name}", step(list(model.unet.parameters()), name))
    return rows


BENCHMARKS = {"sampler": sampler, "train": training, "classifier": resnet, "search": pruning, "images": exactness,
              "course": whole_course, "scaling": scaling, "phases": phases}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sdgen_lib.bench", description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=BENCHMARKS)
    parser.add_argument("--backbone", default="tiny", help="tiny, sd2-random, or what a run takes")
    parser.add_argument("--device", default=devices.default_device())
    parser.add_argument("--batch", type=int, help="images at once (sampler: 256; phases: 4)")
    parser.add_argument("--steps", type=int, default=25, help="inference steps (IS)")
    parser.add_argument("--guidance", type=float, default=2.0, help="guidance scale (UGS)")
    parser.add_argument("--images", type=int, default=1024, help="training images of `train`")
    parser.add_argument("--repeats", type=int, default=3, help="turns, or seeds of `search` and `images`")
    parser.add_argument("--precision", nargs="+", default=["auto"], help="of `phases`: fp32 bf16 fp16")
    parser.add_argument("--optimizer", nargs="*", default=["adamw"], help="of `phases`: adamw adamw-8bit")
    parser.add_argument("--json", type=Path, help="write the rows there too")
    options = parser.parse_args(arguments)
    options.batch = options.batch or (4 if options.what == "phases" else 256)
    rows = BENCHMARKS[options.what](options)
    for row in rows if options.what not in ("scaling", "phases") else []:
        print("\n".join(f"{name:>34}  {value:.3g}" if isinstance(value, float) else f"{name:>34}  {value}"
                        for name, value in row.items()), end="\n\n")  # fmt: skip
    if options.what in ("scaling", "phases"):
        print(pd.DataFrame(rows).to_string(index=False, float_format=lambda value: f"{value:.3g}"))
    if options.json:
        facts = {"torch": torch.__version__, "threads": torch.get_num_threads(), "device": options.device}
        options.json.write_text(json.dumps({"machine": facts, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
