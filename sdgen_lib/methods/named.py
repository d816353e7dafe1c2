"""The generators of all methods by name, for what works with every one of them."""

from __future__ import annotations

from ..config.messages import unknown_name
from ..work.workspace import Source, Workspace
from .augmented import AugmentedMethod, unclip_beside
from .class_encoder import ROWS, ClassEncoderMethod
from .inversion import InversionMethod

GENERATORS = (*ROWS, "inversion", "augmented")


def generator_of(ws: Workspace, name: str) -> tuple[Workspace, Source]:
    """Where the sets of a generator are made, and the generator: one of `GENERATORS`, learnt from the run's own images.

    Augmented conditioning draws with another backbone, so its workspace is another one. "after 1", which no search has
    found a point for, samples at ``worth_steps`` and ``worth_guidance``. Raises ValueError for an unknown name.
    """
    if name not in GENERATORS:
        raise unknown_name("generator", name, GENERATORS)
    if name == "inversion":
        return ws, InversionMethod(ws).source()
    if name == "augmented":
        ws = ws.on(unclip_beside(ws.settings))
        return ws, AugmentedMethod(ws).source()
    s = ws.settings
    point = {"default_steps": s.worth_steps, "default_guidance": s.worth_guidance}
    if name == "after 1" and (given := {key: value for key, value in point.items() if value is not None}):
        ws = ws.varied(**given)
    return ws, ClassEncoderMethod(ws).source(name)
