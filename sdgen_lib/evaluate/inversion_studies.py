"""What Diffusion Inversion's choices are worth: the studies of the paper's figures 6 to 8 and tables 4, 5, 7, 8 and 9.

A study is data: values of one choice, and what each value changes. Its rows are those of `evaluate.worth`, with equal
classifier steps and seeds, and the vectors are learned anew only where a choice asks for other ones.
"""

from __future__ import annotations

from typing import Any

from ..classify.networks import NETWORKS
from ..methods.inversion import InversionMethod
from ..work.workspace import Source, Workspace
from .worth import BOTH, GENERATED, KINDS, Study, studied


def _settings(name: str, *values: Any) -> dict[str, dict[str, Any]]:
    return {f"{value:g}" if isinstance(value, float) else str(value): {name: value} for value in values}


def studies(method: InversionMethod) -> dict[str, Study]:
    """The studies by name, for a run's checkpoints and sizes.

    A value may also have a "checkpoint" of the vectors, from 1, and "inversion_images", how many real images there are.
    """
    s = method.ws.settings
    checkpoints = {f"{method.visits(k)}": {"checkpoint": k} for k in range(1, s.inversion_checkpoints + 1)}
    few = [n for n in (10, 20, 50, 100, 200, 500) if method.ws.data.num_classes <= n < len(method.ws.data.train)]
    ratios = {f"{real}:{made}": {"ratio": (real, made)} for real, made in ((7, 1), (3, 1), (1, 1), (1, 3), (1, 7))}
    return {
        "visits": Study("visits of each vector (figure 8a)", GENERATED, checkpoints),
        "guidance": Study("UGS (figure 8a)", GENERATED, _settings("inversion_guidance", 1.0, 1.5, 2.0, 3.0, 4.0)),
        "steps": Study("inference steps, IS (figure 8b)", GENERATED, _settings("inversion_steps", 5, 10, 20, 50)),
        "unconditional": Study(
            "guidance leads away from (figure 8b)",
            GENERATED,
            _settings("inversion_unconditional", "mean", "class_mean", "empty_prompt"),
        ),
        "noise": Study(
            "noise on a vector (figure 8c)", GENERATED, _settings("inversion_noise", 0.0, 0.1, 0.2, 0.4, 0.8)
        ),
        "interpolation": Study(
            "share of another vector (figure 8d)",
            GENERATED,
            _settings("inversion_interpolation", 0.0, 0.1, 0.2, 0.3, 0.5),
        ),
        "generated": Study(
            "generated images, times the real ones (figure 1)",
            GENERATED,
            {f"x{k}": {"multiple": k} for k in range(1, s.max_multiple + 1)},
        ),
        "real": Study(
            "real images (figure 6)",
            KINDS,
            {str(n): {"inversion_images": n} for n in (*few, len(method.ws.data.train))},
        ),
        "ratio": Study("real to generated images in a batch (table 7)", BOTH, ratios),
        "augmentation": Study(
            "augmentation (table 4)",
            KINDS,
            {
                name: {"augmentation": name}
                for name in ("none", "crop_flip", "autoaugment", "randaugment", "cutout", "mixup", "cutmix", "augmix")
            },
        ),
        "network": Study("network (figure 7c)", KINDS, {name: {"network": name} for name in NETWORKS}),
    }


def study(method: InversionMethod, name: str, multiple: int) -> dict[tuple[str, str], dict[str, Any]]:
    """The rows of a study by (value, kind), see `worth.studied`."""

    def place(how: dict[str, Any]) -> tuple[Workspace, Source]:
        checkpoint, count = how.pop("checkpoint", None), how.pop("inversion_images", None)
        varied = {key: how.pop(key) for key in tuple(how) if key.startswith("inversion_")}
        ws = method.ws.few(count).varied(**varied) if count or varied else method.ws
        return ws, InversionMethod(ws).source(checkpoint)

    return studied(studies(method), name, place, multiple)
