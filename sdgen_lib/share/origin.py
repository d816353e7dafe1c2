"""Where something that is taken out of a run came from, as the run's records say it; not as it is asked for now."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..config.settings import unlike_recipe
from ..data import ImageData, named
from ..diffusion.weights import NAMES
from ..evaluate.cas import cas_step
from ..evaluate.scaling import REAL, scaling_step
from ..store.run import RECORD, Result, results, settings_used, upstream
from ..work.workspace import Source, Workspace

PUT_TOGETHER = ("larger_sets", "max_multiple")  # in the record of a row whose set is a random part of the blocks


@dataclasses.dataclass(frozen=True)
class Origin:
    """What cards and `generator.json` say of what they go with; no path of this machine is in it.

    ``row``: the source's name. ``point``: where it samples. ``settings``: every setting that it depends on, with the
    value that was really used. ``steps``: the results that it was made from, by their names.
    """

    dataset: str
    backbone: str
    recipe: str
    seed: int
    row: str
    point: Mapping[str, Any]
    settings: Mapping[str, Any]
    steps: tuple[str, ...]

    @property
    def changed(self) -> dict[str, Any]:
        """The settings that are not the recipe's."""
        return unlike_recipe(self.settings, self.recipe)


def of_set(ws: Workspace, source: Source, multiple: int, block: Result) -> Origin:
    """The origin of a synthetic set, from the record of one of its blocks."""
    steps = [name for name in upstream(ws.run.path, block) if name != block.name]
    used = settings_used(ws.run.path, block) | _put_together(ws, multiple)
    return _origin(ws, source, block.facts["point"], used, steps)


def _put_together(ws: Workspace, multiple: int) -> dict[str, Any]:
    """The settings that make a set a random part of its blocks; none for any other set."""
    if multiple == 1 or ws.settings.larger_sets != "random":
        return {}
    return {name: getattr(ws.settings, name) for name in PUT_TOGETHER}


def of_generator(ws: Workspace, source: Source) -> Origin:
    """The origin of a generator whose steps are all finished."""
    used: dict[str, Any] = {}
    steps: dict[str, Result] = {}
    for need in source.step.needs:
        found = ws.run.peek(need)
        used |= settings_used(ws.run.path, found)
        steps |= upstream(ws.run.path, found)
    used |= ws.settings.view(*source.step.topics).to_dict()  # its fingerprint holds these and those
    return _origin(ws, source, source.point(), used, steps)


def _origin(
    ws: Workspace, source: Source, point: Mapping[str, Any], used: Mapping[str, Any], steps: Iterable[str]
) -> Origin:
    s = ws.settings
    dataset, backbone = public_dataset(ws.data), public_backbone(s.backbone)
    return Origin(dataset, backbone, s.recipe, s.seed, source.name, dict(point), dict(used), tuple(steps))


# --- names without a private path ---


def public_dataset(data: ImageData) -> str:
    """The name of a named set ("digits:200"); of any other its slug, which tells nothing of where it lies."""
    return data.name if named.known(data.name.split(":")[0]) else data.slug


def public_backbone(backbone: str) -> str:
    """The name of a named model or a Hub id, maybe with ``@`` and a revision; of a folder its last part.

    It is said to be a folder: one called sd2 is not the model of that name.
    """
    plain = backbone.partition("@")[0]
    looks_like_an_id = plain.count("/") == 1 and not plain.startswith((".", "/", "~")) and "\\" not in plain
    if plain in NAMES or (looks_like_an_id and not Path(backbone).is_dir()):
        return backbone
    last = backbone.replace("\\", "/").rstrip("/").split("/")[-1]
    return f"{last} (a local folder)".lstrip()


# --- what was measured with it ---


def made_at(result: Result) -> tuple[str, int]:
    """When a result was finished. Records hold whole seconds; where these are equal, the file's own time decides."""
    return result.record["finished"], (result.folder / RECORD).stat().st_mtime_ns


def newest_first(run_folder: Path, name: str) -> list[Result]:
    """The finished results of a step in a run folder."""
    return sorted(results(run_folder, name), key=made_at, reverse=True)


def cas_of_set(ws: Workspace, source: Source, multiple: int) -> Result | None:
    """The newest row of table 2 that was trained on exactly this synthetic set; None if there is none.

    With which classifier settings it was trained, the row's record says.
    """
    step = scaling_step(ws, source, f"x{multiple}")
    needs = ws.run.needs(step)
    for row in newest_first(ws.run.path, step.name):
        said = row.record
        put_together = {name: said["settings"][name] for name in PUT_TOGETHER if name in said["settings"]}
        if (
            said["needs"] == needs
            and said["inputs"] == dict(step.inputs)
            and put_together == _put_together(ws, multiple)
        ):
            return row
    return None


def cas_of_real(ws: Workspace, source: Source, beside: Result | None) -> Result | None:
    """The newest row "real" of table 2 of this data, made with the classifier settings of the row ``beside`` it."""
    inputs = dict(scaling_step(ws, source, REAL).inputs)
    for row in newest_first(ws.run.path, "table_2/real"):
        used = row.record["settings"]
        alike = beside is None or all(beside.record["settings"].get(name) == used[name] for name in used)
        if row.record["roots"] == {"data": ws.data.fingerprint} and row.record["inputs"] == inputs and alike:
            return row
    return None


def cas_of_generator(ws: Workspace, source: Source) -> Result | None:
    """The newest row of table 1 of exactly this generator; None if there is none."""
    step = cas_step(ws, source)
    needs = ws.run.needs(step)
    roots = {root: ws.run.roots[root]() for root in step.roots}
    own = ws.settings.view(*source.step.topics).to_dict().items()
    for row in newest_first(ws.run.path, step.name):
        said = row.record
        inputs = {**said["inputs"], "num_images": step.inputs["num_images"]}  # of how many images, the row says
        if said["needs"] == needs and said["roots"] == roots and inputs == dict(step.inputs):
            if own <= said["settings"].items():
                return row
    return None
