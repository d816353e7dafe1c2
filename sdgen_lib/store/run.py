"""The results of a run: each is addressed by what it depends on, made once, and reused.

A result lies in ``<runs_dir>/<dataset>/<backbone>-<recipe>-seed<k>/<step>/<fingerprint>/``. Its fingerprint is a hash
of the step's name and version, of every setting that it reads, of its inputs' fingerprints, and through these of the
data's content and the backbone's files. With another setting it is another result, beside the first one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from ..config.messages import shown
from ..config.settings import Settings, View
from ..machine.ranks import ALONE, Ranks
from . import files

RECORD = "record.json"
STATE = ".state.safetensors"  # what a killed `make` goes on from; it goes once the result is on record
SAME = " #"  # between a name and its number, where a step needs several results of one name
DIGITS = 12  # of a fingerprint, in a folder's name
VERSIONS = ("torch", "diffusers", "transformers", "optuna", "numpy")
# What a record is made of, as far as anybody reads it.
KINDS = dict(name=str, fingerprint=str, settings=dict, needs=dict, inputs=dict, run=dict, facts=dict, finished=str)
KINDS["files"] = dict
DISCARDED = "discarded"  # in a record: the names of files that were deleted, since nothing was going to read them
GROWING = (".log", ".lock")  # what other tools may append to has no checksum
Work = Mapping[str, float]  # images by kind of pass, see `work.cost`


@dataclasses.dataclass(frozen=True)
class Step:
    """A named piece of work whose result is kept.

    ``make(folder, settings)`` writes files into ``folder`` and returns facts that JSON can hold; it is handed the
    settings of ``topics`` alone (and those that say how, never what: topic "how"), so that it cannot read one that its
    fingerprint leaves out. A killed ``make`` is called again on the folder as it was left.

    ``needs``: the steps whose results it reads. ``roots``: "data" and "model", where it reads those itself. ``inputs``:
    plain values that tell it from its sisters (a block's number). ``version``: raise it when the same settings would
    give another result. ``work()``: the passes it costs, ``title``: what is said before it begins. ``together``: all
    ranks of a launch call ``make``; else the first one does, and the others wait.
    """

    name: str
    make: Callable[[Path, View], Mapping[str, Any]]
    topics: tuple[str, ...] = ()
    needs: tuple[Step, ...] = ()
    roots: tuple[str, ...] = ()
    inputs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    version: int = 1
    work: Callable[[], Work] | None = None
    title: str = ""
    together: bool = False


@dataclasses.dataclass(frozen=True)
class Result:
    """A finished step: its folder, and what `record.json` there says of it."""

    folder: Path
    record: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.record["name"]

    @property
    def facts(self) -> Mapping[str, Any]:
        return self.record["facts"]

    @property
    def fingerprint(self) -> str:
        return self.record["fingerprint"]


def digest(value: Any) -> str:
    """The SHA-256 of a JSON value, whatever the order of its keys, as hexadecimal text."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def default_runs_dir() -> Path:
    """`runs/` of the checkout, or of the working directory where the package is installed without one.

    JupyterLab's kernels start in notebooks/, and papermill in the caller's folder: both find the same results.
    """
    checkout = Path(__file__).resolve().parents[2]
    return (checkout if (checkout / "notebooks").is_dir() else Path.cwd()) / "runs"


def run_path(settings: Settings, dataset_slug: str) -> Path:
    """The folder of a run, of names that every system allows.

    Raises ValueError where ``runs_dir`` begins at a home folder that is not there.
    """
    try:
        base = Path(settings.runs_dir).expanduser() if settings.runs_dir else default_runs_dir()
    except RuntimeError as error:
        raise ValueError(f"runs_dir {shown(settings.runs_dir)} has no home folder: give another path.") from error
    backbone = re.sub(r"[^A-Za-z0-9._-]+", "-", re.split(r"[/\\]", settings.backbone.rstrip("/\\"))[-1])
    backbone = backbone[:80].lstrip(".") or "local"
    if re.search(r"[/\\]", settings.backbone):  # a folder or Hub id: two of one name do not share a folder
        backbone += "-" + hashlib.sha256(settings.backbone.encode()).hexdigest()[:8]
    return base / files.portable(dataset_slug) / files.portable(f"{backbone}-{settings.recipe}-seed{settings.seed}")


class Run:
    """One run's folder and the results in it.

    ``roots``: functions that return the fingerprints of the data and of the model, by these names; the model's is
    called when it is first needed. ``announce(step)`` returns what is said before a step with a title begins.

    Raises OSError if the folder cannot be made, and ValueError if a link in it leads out of it: a folder from someone
    else must not make us write elsewhere.
    """

    def __init__(
        self,
        settings: Settings,
        path: Path,
        roots: Mapping[str, Callable[[], str]],
        announce: Callable[[Step], str] | None = None,
        ranks: Ranks = ALONE,
    ):
        self.settings, self.path, self.roots, self.ranks = settings, path, roots, ranks
        self.announce = announce or (lambda step: step.title)
        self._alone = ranks.count == 1
        self._seen_whole: dict[Path, tuple[int, int, int]] = {}  # gigabytes are not hashed twice
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(
                error.errno, f"The results' folder {path} cannot be made ({error.strerror}): give another runs_dir"
            ) from error
        for inner in path.rglob("*"):
            if inner.name == STATE and (inner.parent / RECORD).is_file():  # killed before it could go
                with contextlib.suppress(OSError):  # read-only: it may stay
                    inner.unlink(missing_ok=True)
            if inner.is_symlink() and not Path(os.path.realpath(inner)).is_relative_to(os.path.realpath(path)):
                raise ValueError(f"{inner} is a link that leads out of {path}: delete it or give another runs_dir.")
        if is_of_older_version(path) and ranks.first:
            print(
                f"{path} holds results of an older version of sdgen. They are left as they are and not used; new ones "
                "are made beside them."
            )

    # --- addresses ---

    def fingerprint(self, step: Step) -> str:
        """Hexadecimal text of 64 digits: the same for the same work, another one for any other."""
        return digest(
            {
                "name": step.name,
                "version": step.version,
                "settings": self.settings.view(*step.topics).to_dict(),
                "inputs": dict(step.inputs),
                "needs": self.needs(step),
                "roots": {root: self.roots[root]() for root in step.roots},
            }
        )

    def needs(self, step: Step) -> dict[str, str]:
        """The fingerprints of what a step reads, by name; the second one of a name is "name #2"."""
        found: dict[str, str] = {}
        for need in step.needs:
            same = sum(name.partition(SAME)[0] == need.name for name in found)
            found[f"{need.name}{SAME}{same + 1}" if same else need.name] = self.fingerprint(need)
        return found

    def folder(self, step: Step) -> Path:
        """Where the result of ``step`` is or will be; not made here."""
        return self.path / step.name / self.fingerprint(step)[:DIGITS]

    @contextlib.contextmanager
    def lock(self, step: Step) -> Iterator[None]:
        """Waits until no other process is making ``step``, then holds it."""
        folder = self.folder(step)
        with contextlib.suppress(OSError):  # read-only: there is nothing to guard
            folder.parent.mkdir(parents=True, exist_ok=True)
        with files.lock(folder.with_name(f".{folder.name}.lock"), waiting_for=f"{step.name} in {self.path}"):
            yield

    # --- results ---

    def peek(self, step: Step) -> Result | None:
        """The result of ``step`` if it is finished, with all its files; nothing is made."""
        found = read_result(self.folder(step))
        return found if found and found.record.get("fingerprint") == self.fingerprint(step) else None

    def result(self, step: Step) -> Result:
        """The result of ``step``; made first, with the steps that it needs, if it is not there."""
        if self._alone and (found := self.peek(step)):
            return found
        for need in step.needs:
            self.result(need)
        wait = (lambda: None) if self._alone else self.ranks.wait
        with self.lock(step) if self._alone or self.ranks.first else contextlib.nullcontext():
            wait()
            found = self.peek(step)  # another process may have made it meanwhile
            is_there = self.agreed(found is not None)
            wait()  # until every rank has looked
            if not is_there and step.together:
                self._make(step)
            elif not is_there and (self._alone or self.ranks.first):
                with self.alone():
                    self._make(step)
            wait()  # until it is on record
        return (found if is_there else None) or self.peek(step)

    def agreed(self, answer: bool) -> bool:
        """The first rank's ``answer``, in all of them: they must not part over what each one saw on its disk.

        All ranks call this together. While one is `alone`, its own answer counts.
        """
        return answer if self._alone else self.ranks.first_says(answer)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """While in here, this rank does not wait for the others when it asks for a result."""
        before, self._alone = self._alone, True
        try:
            yield
        finally:
            self._alone = before

    def _make(self, step: Step) -> None:
        if step.together and self._alone and self.ranks.count > 1:  # a file of it was damaged meanwhile
            raise RuntimeError(f"{step.name} has to be made again, by all processes together: start this again.")
        folder = self.folder(step)
        folder.mkdir(parents=True, exist_ok=True)
        if self.ranks.first:
            if (folder / RECORD).exists() and _record_in(folder) is None:
                print(f"{folder / RECORD} is damaged (not as it was written): the result is made again.")
            self.forget(step)  # until a record is written anew this is unfinished
            files.remove_leftovers(folder)
            if step.title:
                print(self.announce(step))
        start = time.perf_counter()
        facts = step.make(folder, self.settings.view(*step.topics, "how"))
        if self.ranks.first:
            files.save_json(folder / RECORD, self._record(step, folder, facts, time.perf_counter() - start))
            (folder / STATE).unlink(missing_ok=True)

    def _record(self, step: Step, folder: Path, facts: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        s = self.settings
        record = {
            "name": step.name,
            "version": step.version,
            "fingerprint": self.fingerprint(step),
            "settings": s.view(*step.topics).to_dict(),
            "inputs": dict(step.inputs),
            "needs": self.needs(step),
            "roots": {root: self.roots[root]() for root in step.roots},
            "run": {"dataset": s.dataset, "backbone": s.backbone, "recipe": s.recipe, "seed": s.seed},
            "data": s.view("data").to_dict(),  # in the key by the data's own hash; for whoever compares results
            "facts": dict(facts),
            "seconds": round(seconds, 1),
            "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "python": platform.python_version(),
            "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
            "files": {
                path.relative_to(folder).as_posix(): None if path.suffix in GROWING else files.checksum(path)
                for path in sorted(folder.rglob("*"))
                if path.is_file() and not path.name.startswith(".") and path.suffix != ".damaged"
                if path.name != RECORD
            },
        }
        record = json.loads(json.dumps(record))  # as it will be read: keys are text, tuples lists
        return record | {"sum": digest(record)}

    def file(self, step: Step, name: str) -> Path:
        """The path of a file of the step's result, checked against its checksum.

        The result is made anew where the file is damaged, or was discarded.

        Raises FileNotFoundError where the result has no such file.
        """
        for _ in range(2):
            result = self.result(step)
            path = result.folder / name
            if not self.agreed(name not in result.record.get(DISCARDED, ())):
                if self._alone or self.ranks.first:
                    print(f"{step.name}: {name} was deleted, since nothing read it (keep_unets); it is made again.")
                    self.forget(step)
                continue
            if name not in result.record["files"]:
                raise FileNotFoundError(f"{result.folder} has no {name}; it holds {', '.join(result.record['files'])}.")
            if self.agreed(self._is_whole(path, result.record["files"][name])):
                return path
            if self._alone or self.ranks.first:
                files.move_aside(path)
        raise files.DamagedFile(f"{path} was damaged once more while it was made: check the disk.")

    def _is_whole(self, path: Path, expected: str | None) -> bool:
        try:
            stat = path.stat()
        except FileNotFoundError:  # another process has just moved it aside
            return False
        seen = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
        if expected is None or self._seen_whole.get(path) == seen:
            return True
        if files.checksum(path) != expected:
            return False
        self._seen_whole[path] = seen
        return True

    def forget(self, step: Step) -> None:
        """The result of ``step`` no longer counts as finished; its files stay, for `make` to go on from."""
        (self.folder(step) / RECORD).unlink(missing_ok=True)

    def discard(self, step: Step, names: set[str]) -> None:
        """Deletes files of a finished result that nothing is going to read; `file` makes them again."""
        with self.lock(step):
            result = self.peek(step)
            if result is None or not names & set(result.record["files"]):
                return
            kept = {name: found for name, found in result.record["files"].items() if name not in names}
            gone = sorted(set(result.record.get(DISCARDED, ())) | (names & set(result.record["files"])))
            record = {key: value for key, value in result.record.items() if key != "sum"}
            record |= {"files": kept, DISCARDED: gone}
            files.save_json(result.folder / RECORD, record | {"sum": digest(record)})
            for name in names & set(result.record["files"]):
                (result.folder / name).unlink(missing_ok=True)


# --- what lies in a folder ---


def read_result(folder: Path) -> Result | None:
    """The finished result in ``folder``; None where there is none, a file of it is missing or its record is damaged."""
    record = _record_in(folder)
    whole = record is not None and all(_is_there(folder, name) for name in record["files"])
    return Result(folder, record) if whole else None


def _record_in(folder: Path) -> dict[str, Any] | None:
    """What ``record.json`` says, if it is as it was written."""
    record = files.load_json(folder / RECORD)
    if not isinstance(record, dict) or record.get("sum") != digest({k: v for k, v in record.items() if k != "sum"}):
        return None
    return record if all(isinstance(record.get(name), kind) for name, kind in KINDS.items()) else None


def _is_there(folder: Path, name: str) -> bool:
    """Whether ``folder`` holds the file; never looks outside of it, whatever a record from someone else names."""
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        return False
    try:
        return (folder / name).is_file()
    except (OSError, ValueError):  # a name that is too long, or has a NUL in it
        return False


def results(run_folder: Path, name: str = "**") -> list[Result]:
    """The finished results in a run folder, oldest first; ``name`` is a step's, or a pattern of its folder."""
    found = (read_result(path.parent) for path in Path(run_folder).glob(f"{name}/*/{RECORD}"))
    return sorted((r for r in found if r), key=lambda r: (r.record["finished"], r.record["fingerprint"]))


def upstream(run_folder: Path, result: Result) -> dict[str, Result]:
    """``result`` and all the results that it was made from, by their names. One that was deleted is left out."""
    found, to_see = {result.name: result}, [result]
    while to_see:
        for name, fingerprint in to_see.pop().record["needs"].items():
            folder = Path(run_folder) / name.partition(SAME)[0] / fingerprint[:DIGITS]
            if name not in found and (need := read_result(folder)):
                found[name] = need
                to_see.append(need)
    return found


def settings_used(run_folder: Path, result: Result) -> dict[str, Any]:
    """Every setting that ``result`` depends on, with the value that was really used."""
    used: dict[str, Any] = {}
    for part in reversed(upstream(run_folder, result).values()):  # what the result itself says comes last
        used |= part.record["settings"] | how_drawn(part)
    return used


def how_drawn(result: Result) -> dict[str, Any]:
    """The settings of topic "how" that the images in a result hang on, see `Workspace.drawing`; none for most."""
    batch = result.record["inputs"].get("compiled")
    return {"compile_unet": "yes", "sample_batch_size": batch} if batch else {}


def is_of_older_version(run_folder: Path) -> bool:
    """Whether a run folder holds results of the layout without fingerprints."""
    manifest = files.load_json(Path(run_folder) / "manifest.json")
    return isinstance(manifest, dict) and bool(manifest.get("steps"))
