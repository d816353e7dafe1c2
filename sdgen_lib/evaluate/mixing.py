"""Real and generated images together: in which ratio, how many, beside which augmentation, up to how many real ones.

(Azizi et al. 2023; Fan et al. 2024.) It works with every generator: all that it knows is how to draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..classify.augment import AUGMENTATIONS
from ..classify.networks import NETWORKS
from ..methods.named import generator_of
from ..work.workspace import Source, Workspace
from .filters import RANDOM, Filter
from .worth import BOTH, GENERATED, Study, studied

REAL_AND_BOTH = ("real", "both")
COUNTS = (20, 50, 100, 200, 500, 1000, 2000, 5000)


def studies(ws: Workspace) -> dict[str, Study]:
    """The studies by name, for a run's sizes. A value may also have "images", how many real ones there are."""
    s, n = ws.settings, len(ws.data.train)
    ratios = {f"{real}:{made}": {"ratio": (real, made)} for real, made in ((7, 1), (1, 1), (1, 7))}
    amounts = sorted({1, 2, 3, 5, 10, s.worth_multiple} & set(range(1, s.worth_multiple + 1)))
    half = {"x0.5": {"multiple": 1, "kept": Filter(RANDOM, 0.5), "steps_of": s.worth_multiple}}
    if s.larger_sets != "nested":  # filters need sets whose images have a place of their own
        half = {}
    counts = [count for count in COUNTS if 2 * ws.data.num_classes <= count < n]
    return {
        "ratio": Study("real to generated images in a batch", BOTH, {"as one set": {}} | ratios),
        "amount": Study(
            "generated images, times the real ones",
            (*GENERATED, *BOTH),
            half | {f"x{k}": {"multiple": k, "steps_of": s.worth_multiple} for k in amounts},
        ),
        "augmentation": Study("augmentation", REAL_AND_BOTH, {name: {"augmentation": name} for name in AUGMENTATIONS}),
        "network": Study("network", REAL_AND_BOTH, {name: {"network": name} for name in NETWORKS}),
        "labels": Study(
            "labels of the generated images (TCKR)",
            (*GENERATED, *BOTH),
            {"the class asked for": {}, "a teacher's": {"soft": True}},
        ),
        "training": Study(
            "what is equal in all rows", (*REAL_AND_BOTH, *GENERATED), {"steps": {}, "epochs": {"equal_epochs": True}}
        ),
        "real": Study("real images", REAL_AND_BOTH, {str(count): {"images": count} for count in (*counts, n)}),
    }


def study(ws: Workspace, generator: str, name: str, multiple: int) -> dict[tuple[str, str], dict[str, Any]]:
    """The rows of a study by (value, kind), see `worth.studied`; ``generator`` as in `methods.named.generator_of`.

    Of fewer real images the generator, too, has learnt from these alone.
    """

    def place(how: dict[str, Any]) -> tuple[Workspace, Source]:
        count = how.pop("images", None)
        return generator_of(ws.few(count) if count else ws, generator)

    return studied(studies(ws), name, place, multiple)


def learning_curve(
    ws: Workspace, generator: str, counts: Sequence[int], multiple: int
) -> dict[tuple[str, str], dict[str, Any]]:
    """Rows by (count, "real" or "both") for these numbers of real images, all with as many steps as the largest.

    Of each number of real images a generator of its own learns; x``multiple`` generated images.
    """
    sizes = {count: len(ws.few(count).data.train) for count in counts}
    most = multiple * max(sizes.values())
    values = {str(count): {"images": count, "steps_of": most / size} for count, size in sizes.items()}
    known = {"real": Study("real images", REAL_AND_BOTH, values)}
    return studied(known, "real", lambda how: generator_of(ws.few(how.pop("images")), generator), multiple)


def crossing(counts: Sequence[int], gains: Sequence[float]) -> float:
    """From how many real images on the ``gains`` of generated ones are gone.

    ``counts``: rising; ``gains``: one each, in any unit. Between two counts a straight line over their logarithm says
    where. The first count where they are gone from the start; infinite where they never are; NaN where one is not known
    before they are gone.
    """
    if len(counts) != len(gains) or list(counts) != sorted(set(counts)):
        raise ValueError(f"The counts {list(counts)} must rise, with a gain for each; there are {len(gains)} gains.")
    for k, gain in enumerate(gains):
        if np.isnan(gain):
            return float("nan")
        if gain <= 0:
            if k == 0:
                return float(counts[0])
            share = gains[k - 1] / (gains[k - 1] - gain)
            return float(np.exp(np.log(counts[k - 1]) + share * (np.log(counts[k]) - np.log(counts[k - 1]))))
    return float("inf")
