"""Table 2: classifiers trained on real images, and on x1 .. xK generated ones (arXiv 2405.02698, section 3, step 5)."""

from __future__ import annotations

from typing import Any

import torch

from ..machine.passes import total
from ..store import files
from ..store.run import Step
from ..work import cost
from ..work.workspace import Source, Workspace
from .rows import PREDICTED, Training, row_step
from .sets import block_step, blocks_of, set_topics, synthetic

REAL = "real"


def scaling_step(ws: Workspace, source: Source, name: str) -> Step:
    """The step of a row of table 2, "real" or "x1", "x2", ..; what it depends on is the row's own blocks.

    Raises ValueError for another name.
    """
    n = len(ws.data.train)
    if name == REAL:
        return row_step(ws, "table_2/real", lambda _: Training(ws.data.train), n)
    if not (name.startswith("x") and name[1:].isdecimal() and int(name[1:])):
        raise ValueError(f"A row of table 2 is 'real', 'x1', 'x2', .., not {name!r}.")
    multiple = int(name[1:])
    blocks = tuple(block_step(ws, source, block) for block in blocks_of(ws, multiple))
    return row_step(
        ws,
        f"table_2/{name}",
        lambda _: Training(synthetic(ws, source, multiple), {"point": dict(source.point()), **source.facts}),
        multiple * n,
        needs=blocks,
        topics=set_topics(ws, multiple),
    )


def scaling_rows(ws: Workspace) -> list[str]:
    """The names of the rows of this run's table 2."""
    return [REAL, *(f"x{k}" for k in range(1, ws.settings.max_multiple + 1))]


def scaling(ws: Workspace, source: Source) -> dict[str, dict[str, Any]]:
    """The rows of table 2 by name, those that are not there made first; each as `rows.accuracies` gives it."""
    names = scaling_rows(ws)
    steps = {name: scaling_step(ws, source, name) for name in names}
    todo = [step for step in steps.values() if ws.run.peek(step) is None]
    if todo:
        seconds = cost.seconds(ws.backbone, scaling_work(ws, source))
        print(
            f"Step 5: {names[-1]} synthetic set, {len(todo)} x {ws.settings.classifier_seeds} classifiers "
            f"(about {cost.readable(seconds)} on this machine)."
        )
    for step in todo:  # all blocks first: the classifiers will have the cores to themselves
        for block in step.needs:
            ws.run.result(block)
    return {name: dict(ws.run.result(step).facts) for name, step in steps.items()}


def scaling_work(ws: Workspace, source: Source):
    """What table 2 still costs: the blocks and rows that are not there."""
    rows = [scaling_step(ws, source, name) for name in scaling_rows(ws)]
    blocks = {block.name: block for row in rows for block in row.needs}
    return total(step.work() for step in [*blocks.values(), *rows] if ws.run.peek(step) is None)


def predicted(ws: Workspace, source: Source, name: str) -> torch.Tensor:
    """What the first classifier of a row of table 2 takes the test images for: int64 (N,).

    Raises ValueError for a row that the table has not.
    """
    if name not in scaling_rows(ws):
        known = ", ".join(scaling_rows(ws))
        raise ValueError(f"Table 2 has no row {name!r}. It has: {known} (max_multiple is the last).")
    path = ws.run.file(scaling_step(ws, source, name), PREDICTED)
    return files.load_tensors(path)["test"][0]
