"""Table 1: the Classification Accuracy Score of a generator (Ravuri and Vinyals 2019; arXiv 2405.02698, section 4)."""

from __future__ import annotations

import time
from typing import Any

from ..config.settings import View
from ..data import Split
from ..diffusion.generate import balanced_labels
from ..store.run import Step
from ..work.workspace import Source, Workspace
from .rows import Training, row_step


def check_every_class_is_drawn(num_images: int, num_classes: int, setting: str = "num_images") -> None:
    """Raises ValueError where ``num_images`` images, uniform over the classes, would leave some class out.

    ``setting``: where the number comes from, for the message.
    """
    if num_images < num_classes:
        raise ValueError(
            f"{setting} is {num_images} and the data has {num_classes} classes: give {num_classes} or more."
        )


def cas_step(ws: Workspace, source: Source) -> Step:
    """The step of a generator's row of table 1: ``num_images`` images, uniform over classes, from noise of no trial."""
    s = ws.settings

    def training(view: View) -> Training:
        generator = source.build()
        labels = balanced_labels(view.num_images, ws.data.num_classes)
        generator.prepare(len(labels))  # its time is not generation's
        start = time.perf_counter()
        images = generator(labels, seed=view.seed, set_name="table 1", progress=f"{source.name}: generating")
        seconds = time.perf_counter() - start
        facts = {"point": dict(source.point()), "seconds": seconds, **source.facts}
        return Training(Split(images, labels), facts)

    return row_step(
        ws,
        f"table_1/{source.name.replace(' ', '_')}",
        training,
        s.num_images,
        needs=source.step.needs,
        topics=("cas", *source.step.topics),
        roots=source.step.roots,
        inputs=source.inputs(),
        before=lambda: source.passes(s.num_images),
    )


def cas(ws: Workspace, source: Source) -> dict[str, Any]:
    """A row of table 1, made if it is not there.

    "test": the CAS with each classifier seed, as fractions; "balanced_test", "val" beside it; "point": where it
    samples; "seconds": what generation took; "num_images"; and the source's own facts.
    """
    return dict(ws.run.result(cas_step(ws, source)).facts)
