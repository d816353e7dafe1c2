"""A run folder opened again from its records alone: which results there are to take away, and how they were made.

A folder may come from someone else: what its records say is checked as a notebook's parameters are, and must lead to
the very fingerprints that the results have. On their word alone nothing is downloaded, and no path is opened outside of
the folder that the runs lie in: whoever takes something away names the dataset and the model that it may be read from.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import data
from ..config.messages import shown
from ..config.recipes import RECIPES
from ..config.settings import Settings, fields_read_by, resolve, unlike_recipe
from ..data import ImageData, named
from ..data.sources import IMAGE_SIZES, checkout
from ..diffusion import backbone as backbones
from ..diffusion import weights
from ..evaluate.sets import APART, block_step
from ..methods.class_encoder import ROWS, SAMPLING, ClassEncoderMethod
from ..store.run import DIGITS, RECORD, Result, digest, how_drawn, is_of_older_version, results, settings_used, upstream
from ..work.workspace import Workspace
from .origin import PUT_TOGETHER, made_at

CHAPTERS = {"1_transfer": "02", "2_tune": "03", "3_finetune": "05", "4_retune": "06", "5_datasets": "07"}
STEPS = tuple(CHAPTERS)[:4]
BLOCK = re.compile(r"5_datasets/block_(\d+)")
NOT_OF_A_STEP = fields_read_by("how", "data", "model")  # what no record's settings need hold
SHIPPED_MODEL = "tiny"
DRAWING = fields_read_by(*SAMPLING, "default_point")


@dataclasses.dataclass(frozen=True)
class Choice:
    """Something that a run folder has to give: a synthetic set or a generator, and how it was made.

    ``base``: a block of the set, or the last of the generator's steps. ``settings``: those really used.
    ``results``: all results that were made of it or with it, oldest first. ``line``: what tells it from the others.
    """

    base: Result
    settings: Mapping[str, Any]
    results: tuple[Result, ...]
    line: str

    @property
    def newest(self) -> Result:
        return self.results[-1]


def _choice(base: Result, settings: Mapping[str, Any], found: Sequence[Result]) -> Choice:
    in_order = tuple(sorted(found, key=made_at))
    unlike = unlike_recipe(settings, base.record["run"]["recipe"])
    texts = ", ".join(f"{name}={value!r}" for name, value in unlike.items()) or "as the recipe"
    newest = in_order[-1]
    line = f"{newest.fingerprint[:DIGITS]}  {newest.record['finished']}  {newest.name}  {texts}"
    return Choice(base, settings, in_order, "".join(c if c.isprintable() else "?" for c in line))


class Reopened(Workspace):
    """A workspace whose data and backbone must be those that a result on record was made with."""

    def __init__(self, settings: Settings, real: ImageData, run_folder: Path, model: str | None, asked: bool):
        """``model``: the fingerprint on record. ``asked``: whether the backbone was asked for, not just recorded."""
        self._model, self._asked = model, asked
        super().__init__(settings, real=real, path=run_folder)

    @functools.cached_property
    def _source_fingerprint(self) -> str:  # as recorded: a set of images can be taken away without the model
        return self._model or weights.fingerprint(self._files())

    def _files(self) -> weights.Source:
        name = self.settings.backbone
        if not self._asked and name != SHIPPED_MODEL and not _lies_in(name, self.run.path.parents[1]):
            raise ValueError(_not_on_its_word("backbone", name))
        return backbones.find(self.settings.backbone, self.settings.precision)

    @functools.cached_property
    def backbone(self) -> backbones.Backbone:
        name = self.settings.backbone
        try:
            found = self._files()
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error} Where it is now: --backbone PATH.") from error
        if self._model not in (None, weights.fingerprint(found)):
            raise ValueError(
                f"The backbone {shown(name)} is not the one that this result was made with (other files, or the same "
                "in another precision): take the result away where it was made, or give --backbone PATH."
            )
        return backbones.load(name, precision=self.settings.precision)


def workspace_of(
    run_folder: str | Path,
    to: str = "folder",
    row: str = ROWS[-1],
    *,
    dataset: str | None = None,
    backbone: str | None = None,
    result: str | None = None,
) -> Workspace:
    """The workspace that something in ``run_folder`` was made in, with the settings that were really used.

    ``to`` and ``row``: what is to be taken away, see `choices`; the newest of its kind, or the one with ``result``, the
    beginning of a fingerprint. ``dataset`` and ``backbone``: what these are, or where they are now; what they hold must
    be what it was. None: as recorded, where that means what ships with the package, a named set that was downloaded
    before, or a path in the folder of the runs. Raises FileNotFoundError if it is no run folder, the run has not come
    so far or its dataset is not where it was, and ValueError if what its records say cannot be used, does not lead to
    these results, or would have to be asked for.
    """
    path = run_path_of(run_folder)
    choice = _chosen(path, to, row, result)
    with readable(path):
        run, roots, how = choice.base.record["run"], {}, {}
        for part in upstream(path, choice.base).values():
            roots, how = roots | part.record["roots"], how | how_drawn(part)
        unlike = unlike_recipe(choice.settings, str(run["recipe"]))
        used = {name: "none" if value is None else value for name, value in unlike.items() if name not in NOT_OF_A_STEP}
        used |= {"compile_unet": "no"} | how
        place = _place(run["dataset"], dataset)
        if dataset is None and not _may_be_read(run["dataset"], path.parents[1]):
            raise ValueError(_not_on_its_word("dataset", run["dataset"]))
        whose = {"recipe": str(run["recipe"]), "backbone": backbone or run["backbone"], "seed": run["seed"]}
        asked = {**used, **whose, "runs_dir": str(path.parent.parent), "dataset": place}
        recorded, fingerprint, model = run["dataset"], roots["data"], roots.get("model")
    settings, real = _data(path, asked, recorded, fingerprint, moved=dataset is not None)
    ws = Reopened(settings, real, path, model, asked=backbone is not None)
    _check(ws, choice, row)
    return ws


def run_path_of(run_folder: str | Path) -> Path:
    """The absolute path of a run folder. Raises FileNotFoundError if it is none, ValueError for one of older layout."""
    path = Path(run_folder).expanduser().resolve()
    if any(next(path.glob(f"{name}/*/{RECORD}"), None) for name in (*STEPS, "latents", "5_datasets/*")):
        return path
    if is_of_older_version(path):
        raise ValueError(
            f"{path} holds results of an older version of sdgen, which this one cannot take away: use that version, or "
            "run the chapters again."
        )
    raise FileNotFoundError(
        f"{path} is no run folder (no {RECORD} of a finished step): give runs/<dataset>/<backbone>-<recipe>-seed<k>."
    )


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """In here, a record of another shape is a ValueError that says so."""
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"A record in {path} is not what this version of sdgen writes ({error!r}).") from error


# --- what there is ---


def choices(run_folder: Path, to: str, row: str) -> list[Choice]:
    """What a run folder has to give, oldest first.

    ``to`` "generator": the generators of a ``row`` of table 1; any other format: the synthetic sets drawn with them.
    """
    if row not in ROWS:
        raise ValueError(f"row must be one of {', '.join(ROWS)}, not {row!r}.")
    needed = set(STEPS[: ROWS.index(row) + 1])
    with readable(run_folder):
        found = _generators(run_folder, row, needed) if to == "generator" else _sets(run_folder, row, needed)
        return sorted(found, key=lambda choice: made_at(choice.newest))


def _generators(path: Path, row: str, needed: set[str]) -> Iterator[Choice]:
    """For each of the last step's results one; several for "after 1", whose point is a setting that the row holds."""
    last = STEPS[ROWS.index(row)]
    rows = [r for r in results(path, f"table_1/{row.replace(' ', '_')}") if set(r.record["needs"]) == needed]
    rows = [r for r in rows if _is_by(r, row)]
    for final in results(path, last):
        measured = [r for r in rows if r.record["needs"][last] == final.fingerprint]
        drawn = {digest(own): own for own in map(_drawing, measured)} or {digest({}): {}}
        for key, own in drawn.items():
            theirs = [r for r in measured if digest(_drawing(r)) == key] + [final] * (len(drawn) == 1)
            yield _choice(final, settings_used(path, final) | own, theirs)


def _is_by(result: Result, row: str) -> bool:
    """Whether the paper's generator of this row drew a result, and not another method's that needs the same steps."""
    # as `ClassEncoderMethod.source` names it
    return result.record["inputs"].get("generator", [None])[0] == f"generator/{row}"


def _drawing(row: Result) -> dict[str, Any]:
    """The settings that the images of a row of table 1 were drawn with."""
    return {name: value for name, value in row.record["settings"].items() if name in DRAWING}


def _sets(path: Path, row: str, needed: set[str]) -> Iterator[Choice]:
    """One for each way in which the blocks of one generator were put together to sets."""
    generators: dict[str, dict[int, Result]] = {}
    for result in results(path, "5_datasets/block_*"):
        record = result.record
        how = {name: value for name, value in record["inputs"].items() if name != "block"}
        if set(record["needs"]) == needed and _is_by(result, row) and set(how) - {"compiled"} == {"generator"}:
            generator = digest([how, *(record[name] for name in ("needs", "settings", "roots"))])
            generators.setdefault(generator, {})[record["inputs"]["block"]] = result
    rows = results(path, "table_2/x*")
    for blocks in generators.values():
        own = {block.fingerprint for block in blocks.values()}
        measured = [r for r in rows if r.record["needs"] and set(r.record["needs"].values()) <= own]
        measured.sort(key=made_at)
        ways: dict[str, tuple[dict[str, Any], list[Result]]] = {}
        for result in [*blocks.values(), *measured]:
            way = _put_together(result, blocks, measured)
            ways.setdefault(digest(way), (way, []))[1].append(result)
        base = blocks[min(blocks)]  # two finished within a second are in no order
        for way, theirs in ways.values():
            yield _choice(base, settings_used(path, base) | way, theirs)


def _put_together(result: Result, blocks: Mapping[int, Result], rows: Sequence[Result]) -> dict[str, Any]:
    """How larger sets are made of the blocks, as the record of a row or block of them tells.

    Only rows of random parts have it in their settings. For a block it is what block `APART` tells, which is made for
    random parts alone; where there is none, the recipe's way.
    """
    drawn = result.record["settings"]
    if "max_multiple" in drawn:
        return {name: drawn[name] for name in PUT_TOGETHER}
    apart = blocks[APART].fingerprint if APART in blocks else None
    usual = RECIPES.get(result.record["run"]["recipe"], {}).get("larger_sets", Settings.larger_sets)
    random = apart is not None or usual == "random"
    if not BLOCK.fullmatch(result.name):
        random = apart in result.record["needs"].values()
    if not random:
        return {"larger_sets": "nested"}
    known = [r.record["settings"]["max_multiple"] for r in rows if "max_multiple" in r.record["settings"]]
    return {"larger_sets": "random", "max_multiple": known[-1] if known else max(*blocks, 1)}


def _chosen(path: Path, to: str, row: str, wanted: str | None) -> Choice:
    found = choices(path, to, row)
    if not found:
        raise FileNotFoundError(_nothing(path, to, row))
    if wanted is None:
        return found[-1]
    meant = [choice for choice in found if any(r.fingerprint.startswith(wanted) for r in choice.results)]
    if len(meant) != 1:
        there = "\n".join(choice.line for choice in found)
        raise ValueError(f"{len(meant)} of these have a result {shown(wanted)}; give the beginning of one:\n{there}")
    return meant[0]


def _nothing(path: Path, to: str, row: str) -> str:
    """What to do where there is nothing to take away."""
    for step in [*STEPS[: ROWS.index(row) + 1], *(() if to == "generator" else ("5_datasets",))]:
        if not results(path, step if step in STEPS else f"{step}/*"):
            return f"{path} has no finished {step}: run chapter {CHAPTERS[step]} first."
    return f"{path} has no finished {'generator' if to == 'generator' else 'set'} of row {row!r}: run chapter 07 first."


# --- what may be opened on a record's word ---


def _may_be_read(dataset: str, runs_dir: Path) -> bool:
    """Whether a recorded dataset can be read without a download, and without leaving the folder of the runs."""
    name = re.sub(r":\d+$", "", dataset)
    if known := named.known(name):
        return _is_here(known)
    return _lies_in(name, runs_dir) or _lies_in(dataset, runs_dir)


def _is_here(name: str) -> bool:
    """Whether a named dataset ships with the package or was downloaded before."""
    folder = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}.get(name, f"{name}.npz")
    return name == "digits" or (named.cache_folder() / folder).exists()


def _lies_in(path: str, folder: Path) -> bool:
    """Whether a recorded path is there and in ``folder``, all links followed. No other path is even looked at."""
    folder = folder.resolve()
    try:
        place = Path(os.path.abspath(os.path.expanduser(path)))
        return place.is_relative_to(folder) and place.resolve(strict=True).is_relative_to(folder)
    except (OSError, RuntimeError, ValueError):
        return False


def _not_on_its_word(what: str, recorded: str) -> str:
    """The error's text; what it proposes to type is one word of the shell, whatever the record holds."""
    text = shown(recorded)
    again = f"--{what} {shlex.quote(recorded)}" if recorded.isprintable() and len(recorded) < 200 else f"--{what} .."
    return (
        f"By its record this run was made with the {what} {text}. Nothing is opened or downloaded on a record's word "
        f"alone, since a run folder may be anyone's: if that is right, add {again} (or where it is now)."
    )


# --- what it was made with ---


def _place(recorded: str, now: str | None) -> str:
    """The dataset's place: as recorded, or where it is ``now``, with the number of images that is kept of it."""
    count = re.search(r":\d+$", recorded)
    return recorded if now is None else str(now) + (count[0] if count and not re.search(r":\d+$", str(now)) else "")


def _data(
    run_folder: Path, asked: Mapping[str, Any], recorded: str, fingerprint: str, moved: bool
) -> tuple[Settings, ImageData]:
    """The real images that a result was made from, and the settings that lead to them.

    The images' size is no step's setting: it is in the slug, the folder's name, where it is not the dataset's own.
    """
    slug, own = run_folder.parent.name, None
    if (size := re.search(r"-(\d+)px$", slug)) and int(size[1]) in IMAGE_SIZES:
        own = int(size[1])
    tried = set()
    for image_size in (own, None, "none"):
        settings = resolve(**asked, image_size=image_size)
        if settings.image_size in tried:
            continue
        tried.add(settings.image_size)
        try:
            real = data.load(settings.dataset, settings.image_size, settings.seed, base_dir=checkout())
        except (FileNotFoundError, ValueError) as error:
            if moved or named.known(recorded.split(":")[0]):
                raise
            raise FileNotFoundError(
                f"The run's dataset {shown(recorded)} cannot be read here: say where it is now with --dataset PATH. "
                f"({error})"
            ) from error
        if real.fingerprint == fingerprint:
            return settings, dataclasses.replace(real, name=recorded, slug=slug)
    raise ValueError(
        f"The dataset {shown(settings.dataset)} does not hold what this result was made from (other images, labels or "
        "class names): give --dataset PATH of the one that does, or another --result (--list shows them)."
    )


def _check(ws: Workspace, choice: Choice, row: str) -> None:
    """Raises ValueError unless the settings lead to the very result that they were read from."""
    method, base = ClassEncoderMethod(ws), choice.base
    if number := BLOCK.fullmatch(base.name):
        step = block_step(ws, method.source(row), int(number[1]))
    else:
        step = method.steps()[STEPS.index(base.name)]
    if ws.run.fingerprint(step) != base.fingerprint:
        raise ValueError(
            f"{base.folder} was not made by this version of the paper's method: what is said of it would be wrong. "
            "Make it again in its chapter; what other methods made is taken away with share.export.export(...)."
        )
