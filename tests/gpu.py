"""What only a CUDA card can show: ``python -m tests.gpu --out DIR``, some five minutes; without a card it says so.

Checks that a killed training goes on to the same result, in 32 and 16 bits, whole UNet and LoRA; that a compiled UNet
draws what the eager one draws; that a micro course runs from end to end. Then measures: the phases of a full-size
Stable Diffusion 2 with random weights, the sampler and step 1 against their peers. Writes ``gpu.json`` and ``gpu.txt``.

The rest of the packages may come as wheels from a folder:
``pip install --no-index --no-deps --target SITE WHEELS/*.whl; PYTHONPATH=SITE:. python -m tests.gpu --out DIR``.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sdgen_lib import data
from sdgen_lib.config.settings import resolve
from sdgen_lib.course import ROWS, Course
from sdgen_lib.diffusion import backbone, lora
from sdgen_lib.diffusion.generate import balanced_labels, generate
from sdgen_lib.diffusion.training import Latents, fit
from sdgen_lib.methods.class_encoder import ClassEncoder
from sdgen_lib.tools import bench

PRECISIONS, PARTS, EPOCHS = ("fp32", "bf16", "fp16"), ("Class-Encoder", "UNet", "LoRA"), 3
BENCHMARKS = {
    "phases, batch 16": ["phases", "--backbone", "sd2-random", "--batch", "16", "--precision", "bf16", "fp16"],
    "phases, batch 64": ["phases", "--backbone", "sd2-random", "--batch", "64", "--precision", "bf16"],
    "sampler, SD 2": ["sampler", "--backbone", "sd2-random", "--batch", "128"],
    "step 1, SD 2": ["train", "--backbone", "sd2-random", "--images", "256"],
    "step 1, tiny": ["train", "--backbone", "tiny"],
    "ResNet20": ["classifier"],
}


def trained(model: backbone.Backbone, part: str) -> tuple[dict[str, torch.nn.Parameter], ClassEncoder]:
    """What trains, by name, and the Class-Encoder, both as at the beginning."""
    torch.manual_seed(0)
    encoder = ClassEncoder(10, model.tokens, model.width).to(model.device)
    if part == "Class-Encoder":
        model.set_unet()
        return dict(encoder.named_parameters()), encoder
    encoder.requires_grad_(False)
    model.set_unet(dtype=torch.float32 if part == "UNet" else None)
    return dict(model.unet.named_parameters()) if part == "UNet" else lora.add(model.unet, 4), encoder


def resumed(precision: str, part: str) -> dict[str, float]:
    """The mean difference between the weights of an unbroken training and of one that was broken after an epoch."""
    model, digits = backbone.load("tiny", "cuda", precision), data.load("digits")
    images = Latents(model.encode(digits.train.images[:256]), digits.train.labels[:256].to("cuda"))
    how = dict(epochs=EPOCHS, batch_size=32, learning_rate=1e-3, weight_decay=0.0, clip_norm=10.0, seed=0)

    def train(stop_after: int, resume: dict[str, torch.Tensor] | None = None) -> tuple[dict, dict, float]:
        parameters, encoder = trained(model, part)
        for epoch in fit(parameters, model, encoder.conditioner(), images, resume=resume, **how):
            if epoch.number == stop_after:
                state = {name: value.detach().cpu().clone() for name, value in epoch.state.tensors().items()}
                return parameters, state, epoch.loss
        raise AssertionError("fewer epochs than were asked for")

    _, whole, loss = train(EPOCHS)
    _, half, _ = train(1)
    _, again, loss_again = train(EPOCHS, half)
    names = [name for name in whole if name.startswith("model.")]

    def apart(one: dict, other: dict) -> float:
        """The mean difference of all weights.

        Their largest tells little: Adam moves a weight whose gradient is next to nothing by its sign, and that the
        order decides in which a card adds up.
        """
        gaps = [(one[name].float() - other[name].float()).abs() for name in names]
        return float(sum(gap.sum() for gap in gaps) / sum(gap.numel() for gap in gaps))

    difference, moved = apart(whole, again), apart(whole, half)
    assert moved > 0 and difference <= 0.02 * moved, f"{difference} apart, where two epochs moved by {moved}"
    assert abs(loss_again - loss) <= 0.01 * loss, f"losses {loss} and {loss_again}"
    return {"mean difference": difference, "moved": moved, "loss": loss, "loss again": loss_again}


def compiled() -> dict[str, float]:
    """A compiled UNet against the eager one, in pixels and seconds."""
    model = backbone.load("tiny", "cuda")
    torch.manual_seed(0)
    table = ClassEncoder(10, model.tokens, model.width).to("cuda").conditioner().table()

    def drawn(fast: bool) -> tuple[torch.Tensor, float]:
        how = dict(num_inference_steps=10, guidance_scale=2.0, compiled=fast)
        generate(model, table, balanced_labels(128, 10), **how)  # warm-up
        torch.cuda.synchronize()
        start = time.perf_counter()
        images = generate(model, table, balanced_labels(128, 10), **how)
        return images, time.perf_counter() - start

    eager, eager_seconds = drawn(False)
    start = time.perf_counter()
    model.compile_unet(256)
    compiling = time.perf_counter() - start
    fast, fast_seconds = drawn(True)
    apart = (eager.int() - fast.int()).abs()
    assert apart.float().mean() < 2, f"{apart.float().mean()} grey levels apart on average"
    found = {"largest pixel difference": int(apart.max()), "mean pixel difference": float(apart.float().mean())}
    return found | {"compiling s": compiling, "eager s": eager_seconds, "compiled s": fast_seconds}


def micro_course(**changes: Any) -> dict[str, float]:
    """A very small course from end to end, and once more from what it left."""
    small = dict(dataset="digits:100", backbone="tiny", recipe="demo", transfer_epochs=2, finetune_epochs=2, n_trials=3)
    small |= dict(transfer_epoch_images="none", finetune_epoch_images="none")
    small |= dict(num_images=40, classifier_epochs=3, classifier_seeds=2, max_multiple=2, default_steps=5)
    small |= dict(steps_min=5, steps_max=6)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        course = Course(resolve(**small, **changes, runs_dir=folder))
        rows = {row: course.cas(row)["test"][0] for row in ROWS}
        sets = course.scaling()
        took = time.perf_counter() - start
        assert Course(resolve(**small, **changes, runs_dir=folder)).scaling() == sets
    return {"seconds": took, **rows, **{name: row["test"][0] for name, row in sets.items()}}


def benchmark(arguments: list[str]) -> list[dict[str, Any]]:
    """The rows of a benchmark on the card."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        bench.main([*arguments, "--device", "cuda", "--json", str(out)])
        return json.loads(out.read_text())["rows"]


def cases() -> dict[str, Callable[[], Any]]:
    """Every check and measurement by its name."""
    found: dict[str, Callable[[], Any]] = {}
    for precision, part in itertools.product(PRECISIONS, PARTS):
        found[f"resumed: {part}, {precision}"] = lambda precision=precision, part=part: resumed(precision, part)
    found["micro course"] = micro_course
    found["micro course, LoRA, fp16"] = lambda: micro_course(finetune_method="lora", precision="fp16")
    found["compiled UNet"] = compiled
    for name, arguments in BENCHMARKS.items():
        found[name] = lambda arguments=arguments: benchmark(arguments)
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("."), help="where gpu.json and gpu.txt go")
    parser.add_argument("--only", nargs="*", help="beginnings of names of cases")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("skipped: there is no CUDA card here")
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"card": torch.cuda.get_device_name(), "torch": torch.__version__, "cases": {}}
    lines = [f"{report['card']}, torch {report['torch']}"]
    for name, case in cases().items():
        if args.only and not name.startswith(tuple(args.only)):
            continue
        start = time.perf_counter()
        try:
            with open(args.out / "log.txt", "a") as log, contextlib.redirect_stderr(log):
                result, outcome = case(), "ok"
        except Exception as error:
            result, outcome = f"{type(error).__name__}: {error}"[:1000], "FAILED"
        report["cases"][name] = {"outcome": outcome, "seconds": time.perf_counter() - start, "result": result}
        lines.append(f"{outcome:6}  {time.perf_counter() - start:6.1f} s  {name}  {_brief(result)}")
        print(lines[-1], flush=True)
        (args.out / "gpu.json").write_text(json.dumps(report, indent=1) + "\n")  # after each: a lease may end
        (args.out / "gpu.txt").write_text("\n".join(lines) + "\n")
    return int(any(case["outcome"] == "FAILED" for case in report["cases"].values()))


def _brief(result: Any) -> str:
    if isinstance(result, dict):
        return ", ".join(f"{key} {value:.4g}" for key, value in result.items())
    return result if isinstance(result, str) else f"{len(result)} rows"


if __name__ == "__main__":
    sys.exit(main())
