"""What a step will cost on this machine: counted passes times measured seconds."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from .classifier import ResNet20
from .devices import classifier_dtype
from .settings import Settings, resolve
from .train import FIXED_NOISES

if TYPE_CHECKING:
    from .course import Course
    from .tune import Space

PRUNED_SHARE = 0.6  # of the classifier epochs a pruner lets run, roughly: a third of trials in full, the rest a third
STEPS = ("1_transfer", "2_tune", "3_finetune", "4_retune", "5_datasets")


def _seconds(work: Callable[[], object], repeats: int = 2) -> float:
    work()  # warm-up
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def measure(course: Course) -> dict[str, float]:
    """Seconds per image on this machine of: a UNet pass, one more with the gradient of its input, one with the
    gradient of its weights, and one classifier training step."""
    if hasattr(course, "_unit_costs"):
        return course._unit_costs
    model, settings = course.backbone, course.settings
    device = torch.device(model.device)

    def unet(batch: int) -> torch.Tensor:
        latents = torch.zeros(batch, *model.latent_shape, device=device)
        t = torch.zeros(batch, dtype=torch.int64, device=device)
        context = torch.zeros(batch, model.tokens, model.width, device=device, requires_grad=True)
        return model.predict_noise(latents, t, context).float().sum()

    def classifier(batch: int) -> torch.Tensor:
        images = torch.zeros(batch, *course.data.train.images.shape[1:], dtype=torch.uint8, device=device)
        images = images.contiguous(memory_format=torch.channels_last)
        return F.cross_entropy(net(images), torch.zeros(batch, dtype=torch.int64, device=device))

    found = {}
    with torch.no_grad():
        found["pass"] = _seconds(lambda: unet(settings.sample_batch_size)) / settings.sample_batch_size
    batch = settings.transfer_batch_size
    found["transfer"] = _seconds(lambda: unet(batch).backward()) / batch
    model.unet.requires_grad_(True)
    batch = settings.finetune_batch_size
    found["finetune"] = _seconds(lambda: unet(batch).backward()) / batch
    for parameter in model.unet.parameters():
        parameter.requires_grad_(False).grad = None
    dtype = classifier_dtype(settings.precision, model.device)
    net = ResNet20(course.data.num_classes, settings.classifier_width, dtype)
    net, batch = net.to(device, memory_format=torch.channels_last), settings.classifier_batch_size
    found["classifier"] = _seconds(lambda: classifier(batch).backward()) / batch
    course._unit_costs = found
    return found


def estimate(
    settings: Settings, step: str, num_train: int, num_val: int, unit: dict[str, float], space: Space | None = None
) -> float:
    """Seconds that ``step`` takes: guidance doubles a sampling pass; ``num_train``, ``num_val`` real images."""
    s = settings
    if step in ("1_transfer", "3_finetune"):
        prefix = step[2:]
        held_out = 3 * FIXED_NOISES * num_val * unit["pass"]  # the right label, a wrong one and none
        return getattr(s, f"{prefix}_epochs") * (num_train * unit[prefix] + held_out)
    steps = sum(space.IS if space else (s.steps_min, s.steps_max)) / 2
    sampling = 2 * steps * unit["pass"]
    if step in ("2_tune", "4_retune"):
        training = PRUNED_SHARE * s.classifier_epochs * max(s.num_images, s.classifier_epoch_images)
        return s.n_trials * (s.num_images * sampling + training * unit["classifier"])
    sizes = [num_train, *(k * num_train for k in range(1, s.max_multiple + 1))]  # real, x1 .. xK
    training = s.classifier_seeds * s.classifier_epochs * sum(max(n, s.classifier_epoch_images) for n in sizes)
    return s.max_multiple * num_train * sampling + training * unit["classifier"]


def readable(seconds: float) -> str:
    """12 -> '12 s', 200 -> '3 min', 9000 -> '2.5 h', 400000 -> '4.6 days'."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172800 else f"{seconds / 86400:.1f} days"


def text(course: Course, step: str, space: Space | None = None) -> str:
    """'about 3 min on this machine', for the line before a long run."""
    seconds = estimate(course.settings, step, len(course.data.train), len(course.data.val), measure(course), space)
    return f"about {readable(seconds)} on this machine"


def table(course: Course) -> dict[str, dict[str, str]]:
    """The estimate of every step, for this run's recipe and for the paper's: {step: {recipe: '3 min'}}."""
    unit, n = measure(course), (len(course.data.train), len(course.data.val))
    paper = resolve(recipe="paper", backbone=course.settings.backbone)
    columns = {"this recipe": course.settings, "-p recipe paper": paper}
    return {step: {name: readable(estimate(s, step, *n, unit)) for name, s in columns.items()} for step in STEPS}
