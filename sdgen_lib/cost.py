"""What a step will cost on this machine: counted passes times measured seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from . import devices
from .classifier import ResNet20
from .memory import MicroBatch
from .settings import Settings, resolve
from .train import FIXED_NOISES

if TYPE_CHECKING:
    from .course import Course
    from .tune import Space

PRUNED_SHARE = 0.7  # of the classifier epochs the pruner of a small search lets run (`bench search`); a large one less
COMPILED_SHARE = 0.65  # of an uncompiled pass's time, on two CPU cores (see `Backbone.compile_unet`)
TABLE_STEPS = 4  # of each classifier, when they are timed side by side
STEPS = ("1_transfer", "2_tune", "3_finetune", "4_retune", "5_datasets")


MEASURED_WITH = ("precision", "sample_batch_size", "transfer_batch_size", "finetune_batch_size", "finetune_method",
                 "classifier_batch_size", "classifier_width", "classifier_shortcut", "classifier_seeds",
                 "max_multiple")  # fmt: skip
_measured: dict[tuple, dict[str, float]] = {}  # a machine is as fast for the next run as for this one
KINDS = ("pass", "transfer", "finetune", "encode", "decode", "classifier", "table")


def _seconds(batch: int, work: Callable[[int], object], repeats: int = 2) -> float:
    """Seconds an image takes in ``work(batch)``; with fewer at once where the memory does not suffice."""
    micro = MicroBatch(batch)

    def all_at_once():
        micro.run(batch, lambda: None, lambda part: work(part.stop - part.start))
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    all_at_once()  # warm-up
    start = time.perf_counter()
    for _ in range(repeats):
        all_at_once()
    return (time.perf_counter() - start) / repeats / batch


def measure(course: Course, kinds: Iterable[str] = KINDS) -> dict[str, float]:
    """Seconds per image on this machine of these ``kinds`` at least: a UNet pass, one more with the gradient of its
    context (step 1), one with the gradient of its weights (step 3), the VAE's two halves, a step of classifier
    training, alone and with as many side by side as the tables train."""
    s, side = course.settings, course.data.image_size
    of = (s.backbone, side, course.data.num_classes, course.compiles, *(getattr(s, name) for name in MEASURED_WITH))
    found, model = _measured.setdefault(of, {}), course.backbone
    device = torch.device(model.device)

    def unet(batch: int) -> torch.Tensor:
        latents = torch.zeros(batch, *model.latent_shape, device=device)
        t = torch.zeros(batch, dtype=torch.int64, device=device)
        context = torch.zeros(batch, model.tokens, model.width, device=device, requires_grad=True)
        return model.predict_noise(latents, t, context).float().sum()

    @torch.no_grad()
    def sampling() -> float:
        seconds = _seconds(s.sample_batch_size, unet)
        return seconds * COMPILED_SHARE if course.compiles else seconds  # to compile it now would take longer

    def decode() -> float:
        return _seconds(s.sample_batch_size, lambda n: model.decode(torch.zeros(n, *model.latent_shape, device=device)))

    def encode() -> float:
        return _seconds(16, lambda n: model.encode(torch.zeros(n, 3, side, side, dtype=torch.uint8)))

    def transfer() -> float:
        return _seconds(s.transfer_batch_size, lambda n: unet(n).backward())

    def finetune() -> float:
        if s.finetune_method != "full":  # few weights, which cost little beside the way back through the frozen ones
            return measure(course, ["transfer"])["transfer"]
        model.unet_dtype(torch.float32)  # as it trains; to 16 bits and back nothing is lost
        model.unet.requires_grad_(True)
        seconds = _seconds(s.finetune_batch_size, lambda n: unet(n).backward())
        for parameter in model.unet.parameters():
            parameter.requires_grad_(False).grad = None
        model.unet_dtype(model.dtype)
        return seconds

    def training(at_once: int) -> float:
        dtype = devices.classifier_dtype(s.precision, model.device)
        nets = [ResNet20(course.data.num_classes, s.classifier_width, dtype, s.classifier_shortcut)
                .to(device, memory_format=torch.channels_last) for _ in range(at_once)]  # fmt: skip

        def step(net: ResNet20, batch: int) -> None:
            images = torch.zeros(batch, 3, side, side, dtype=torch.uint8, device=device)
            images = images.contiguous(memory_format=torch.channels_last)
            F.cross_entropy(net(images), torch.zeros(batch, dtype=torch.int64, device=device)).backward()

        def side_by_side(batch: int) -> None:
            works = [lambda look, net=net: [step(net, batch) for _ in range(TABLE_STEPS)] for net in nets]
            list(devices.side_by_side(works, at_once))

        return _seconds(s.classifier_batch_size, side_by_side) / TABLE_STEPS / at_once

    table_at_once = devices.best_at_once((s.max_multiple + 1) * s.classifier_seeds)
    ways = {"pass": sampling, "transfer": transfer, "finetune": finetune, "encode": encode, "decode": decode,
            "classifier": lambda: training(1), "table": lambda: training(table_at_once)}  # fmt: skip
    for kind in kinds:
        if kind not in found:
            found[kind] = ways[kind]()
    return found


def count(settings: Settings, step: str, num_train: int, num_val: int, space: Space | None = None) -> dict[str, float]:
    """Images that go through each of `KINDS` in ``step``; ``num_train``, ``num_val`` real images.

    Guidance doubles a sampling pass. What a search will draw is not known: the middle of its range of IS stands for it.
    """
    s, images = settings, dict.fromkeys(KINDS, 0.0)
    if step in ("1_transfer", "3_finetune"):
        epochs = getattr(s, f"{step[2:]}_epochs")
        images[step[2:]] = epochs * num_train
        images["pass"] = epochs * 3 * FIXED_NOISES * num_val  # held out: the right label, a wrong one and none
        images["encode"] = num_train + num_val if step == "1_transfer" else 0
        return images

    def epoch(n: int) -> int:  # images that a classifier sees in one
        n = max(n, s.classifier_epoch_images)
        return min(n, s.classifier_epoch_limit or n)

    steps = sum(space.IS if space else (s.steps_min, s.steps_max)) / 2
    if step in ("2_tune", "4_retune"):
        trials = s.n_trials_retune if step == "4_retune" and s.n_trials_retune else s.n_trials
        generated = trials * s.num_images
        share = PRUNED_SHARE if s.pruning else 1.0
        images["classifier"] = trials * share * s.classifier_epochs * epoch(s.num_images)
    else:
        sizes = [num_train, *(k * num_train for k in range(1, s.max_multiple + 1))]  # real, x1 .. xK
        generated = sizes[-1] + (num_train if s.larger_sets == "random" else 0)
        images["table"] = s.classifier_seeds * s.classifier_epochs * sum(map(epoch, sizes))
    images["decode"], images["pass"] = generated, 2 * steps * generated
    return images


def estimate(
    settings: Settings, step: str, num_train: int, num_val: int, unit: dict[str, float], space: Space | None = None
) -> float:
    """Seconds that ``step`` takes where an image of each of `KINDS` takes ``unit`` seconds."""
    return sum(n * unit[kind] for kind, n in count(settings, step, num_train, num_val, space).items() if n)


def readable(seconds: float) -> str:
    """12 -> '12 s', 200 -> '3 min', 9000 -> '2.5 h', 400000 -> '4.6 days'."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172800 else f"{seconds / 86400:.1f} days"


def text(course: Course, step: str, space: Space | None = None) -> str:
    """'about 3 min on this machine', for the line before a long run."""
    of = (course.settings, step, len(course.data.train), len(course.data.val))
    unit = measure(course, [kind for kind, n in count(*of, space).items() if n])
    seconds = estimate(*of, unit, space)
    return f"about {readable(seconds)} on this machine"


def table(course: Course) -> dict[str, dict[str, str]]:
    """The estimate of every step, for this run's recipe and for the paper's: {step: {recipe: '3 min'}}."""
    unit, n = measure(course), (len(course.data.train), len(course.data.val))
    paper = resolve(recipe="paper", backbone=course.settings.backbone)
    columns = {"this recipe": course.settings, "-p recipe paper": paper}
    return {step: {name: readable(estimate(s, step, *n, unit)) for name, s in columns.items()} for step in STEPS}
