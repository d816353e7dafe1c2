"""What work will cost on this machine: counted passes times measured seconds, each at its own batch and size."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from ..classify import build
from ..config.settings import Settings
from ..diffusion.backbone import Backbone
from ..diffusion.conditions import Condition
from ..machine.devices import classifier_dtype
from ..machine.memory import MicroBatch
from ..machine.parallel import best_at_once, side_by_side
from ..machine.passes import Pass, Work

PRUNED_SHARE = 0.7  # of the classifier epochs the pruner of a small search lets run (`bench search`); a large one less
COMPILED_SHARE = 0.65  # of an uncompiled pass's time, on two CPU cores (see `Backbone.compile_unet`)
TABLE_STEPS = 4  # of each classifier, when they are timed side by side
_measured: dict[tuple, float] = {}  # a machine is as fast for the next run as for this one


def seconds(backbone: Backbone, work: Work) -> float:
    """The seconds that ``work`` takes here: of each kind of pass a few are timed, once in a process."""
    return sum(images * _unit(backbone, _no_larger(kind, images)) for kind, images in work.items() if images)


def _no_larger(kind: Pass, images: float) -> Pass:
    """A pass of no more images than there are: an estimate must not take longer than the work."""
    return kind._replace(batch=max(1, min(kind.batch, math.ceil(images))))


def readable(seconds: float) -> str:
    """12 -> '12 s', 200 -> '3 min', 9000 -> '2.5 h', 400000 -> '4.6 days'."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172800 else f"{seconds / 86400:.1f} days"


def search_passes(s: Settings) -> float:
    """The UNet passes of two searches as long as the first, about: guidance doubles each.

    Of settings that every search reads, so that no other one makes its trials anew (see `Workspace.drawing`).
    """
    return (s.steps_min + s.steps_max) * 2 * s.n_trials * s.num_images


def _unit(backbone: Backbone, kind: Pass) -> float:
    """Seconds an image takes in a pass of this kind."""
    key = (backbone.name, str(backbone.device), backbone.dtype, kind)
    if key not in _measured:
        _measured[key] = MEASURES[kind.kind](backbone, kind)
    return _measured[key]


def _timed(device: str, batch: int, work: Callable[[int], object], repeats: int = 2) -> float:
    """Seconds an image takes in ``work(batch)``; with fewer at once where the memory does not suffice."""
    micro = MicroBatch(batch)

    def all_at_once() -> None:
        micro.run(batch, lambda: None, lambda part: work(part.stop - part.start))
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize()

    all_at_once()  # warm-up
    start = time.perf_counter()
    for _ in range(repeats):
        all_at_once()
    return (time.perf_counter() - start) / repeats / batch


def _predicted(backbone: Backbone, batch: int) -> torch.Tensor:
    device = backbone.device
    latents = torch.zeros(batch, *backbone.latent_shape, device=device)
    t = torch.zeros(batch, dtype=torch.int64, device=device)
    context = torch.zeros(batch, backbone.tokens, backbone.width, device=device, requires_grad=True)
    return backbone.predict_noise(latents, t, Condition(context)).float().sum()


def _unet(backbone: Backbone, kind: Pass) -> float:
    with torch.no_grad():
        return _timed(backbone.device, kind.batch, lambda n: _predicted(backbone, n))


def _compiled_unet(backbone: Backbone, kind: Pass) -> float:
    """To compile it now would take longer. Elsewhere than where the share was measured, nothing is taken off."""
    return (COMPILED_SHARE if backbone.gains_by_compiling else 1.0) * _unit(backbone, Pass("unet", kind.batch))


def _context_gradient(backbone: Backbone, kind: Pass) -> float:
    return _timed(backbone.device, kind.batch, lambda n: _predicted(backbone, n).backward())


def _weight_gradient(backbone: Backbone, kind: Pass) -> float:
    """With the weights in float32, as they train; to 16 bits and back nothing is lost."""
    backbone.unet_dtype(torch.float32)
    backbone.unet.requires_grad_(True)
    try:
        return _timed(backbone.device, kind.batch, lambda n: _predicted(backbone, n).backward())
    finally:
        for parameter in backbone.unet.parameters():
            parameter.requires_grad_(False).grad = None
        backbone.unet_dtype(backbone.dtype)


def _encode(backbone: Backbone, kind: Pass) -> float:
    side = kind.pixels or backbone.image_size
    return _timed(
        backbone.device, kind.batch, lambda n: backbone.encode(torch.zeros(n, 3, side, side, dtype=torch.uint8))
    )


def _decode(backbone: Backbone, kind: Pass) -> float:
    def work(n: int) -> torch.Tensor:
        return backbone.decode(torch.zeros(n, *backbone.latent_shape, device=backbone.device))

    return _timed(backbone.device, kind.batch, work)


def _classifiers(backbone: Backbone, kind: Pass) -> float:
    """A step of ResNet20's training, of one or of as many side by side as are trained at a time."""
    o, device = dict(kind.options), backbone.device
    count, dtype = best_at_once(o["count"]) if o["count"] > 1 else 1, classifier_dtype(o["precision"], device)

    def net() -> torch.nn.Module:
        found = build("resnet20", o["num_classes"], width=o["width"], shortcut=o["shortcut"], dtype=dtype)
        return found.to(device, memory_format=torch.channels_last)

    with torch.random.fork_rng(devices=[]):
        nets = [net() for _ in range(count)]
    steps = TABLE_STEPS if count > 1 else 1

    def step(net: torch.nn.Module, batch: int) -> None:
        images = torch.zeros(batch, 3, kind.pixels, kind.pixels, dtype=torch.uint8, device=device)
        images = images.contiguous(memory_format=torch.channels_last)
        F.cross_entropy(net(images), torch.zeros(batch, dtype=torch.int64, device=device)).backward()

    def work(batch: int) -> None:
        works = [lambda look, net=net: [step(net, batch) for _ in range(steps)] for net in nets]
        list(side_by_side(works, count))

    return _timed(device, kind.batch, work) / steps / count


MEASURES: dict[str, Callable[[Backbone, Pass], float]] = {
    "unet": _unet,
    "compiled unet": _compiled_unet,
    "context gradient": _context_gradient,
    "weight gradient": _weight_gradient,
    "encode": _encode,
    "decode": _decode,
    "classifier": _classifiers,
    "classifiers": _classifiers,
}
