"""Where a search's trials are kept: a journal file, or any storage of Optuna's that several machines reach.

A search of one process keeps its trials in the run folder and goes on after a kill as if there had been none. With
``storage`` given, any number of processes share one search (see `workers`).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
import warnings
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import filelock
import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.storages import JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from . import files
from .settings import shown

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)


class _Journal(JournalFileBackend):
    """Optuna's journal file under a lock of the operating system, which ends with its process.

    A line that a killed process left half written would spoil the next one: it is cut off first.
    """

    def __init__(self, path: Path):
        self._path, self._guard = path, filelock.FileLock(files.lock_path(path))
        super().__init__(str(path), lock_obj=self._guard)

    def append_logs(self, logs) -> None:
        with self._guard, open(self._path, "rb+") as file:
            if size := file.seek(0, os.SEEK_END):
                file.seek(size - 1)
                if file.read(1) != b"\n":
                    file.seek(0)
                    file.truncate(file.read().rfind(b"\n") + 1)
            super().append_logs(logs)


def without_password(url: str) -> str:
    """A storage URL as it may be shown."""
    return re.sub("//[^/]*@", "//", url)


def _open(where: Path | str) -> optuna.storages.BaseStorage:
    if isinstance(where, Path):
        where.parent.mkdir(parents=True, exist_ok=True)
        return JournalStorage(_Journal(where))
    if where.startswith("grpc://"):
        parts = urlsplit(where)
        return optuna.storages.GrpcStorageProxy(host=parts.hostname or "localhost", port=parts.port or 13000)
    return RDBStorage(where)


def open_study(where: Path | str, name: str) -> optuna.Study:
    """The study ``name``, made if missing, in the journal file ``where`` (a path) or an Optuna storage (a URL).

    Any process may read it while it runs; reading writes nothing.
    Raises ValueError, without the URL's password, if the storage cannot be opened.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # the progress bar says it better
    for attempt in range(5):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ExperimentalWarning)
                storage = _open(where)
            with contextlib.suppress(KeyError):
                return optuna.load_study(study_name=name, storage=storage)
            return optuna.create_study(storage=storage, study_name=name, direction="maximize", load_if_exists=True)
        except Exception as error:
            if isinstance(where, Path):
                raise
            # Of several workers that make the tables of a new database at once, one is the first.
            if attempt < 4 and ("already exists" in str(error) or type(error).__name__ == "IntegrityError"):
                time.sleep(0.2 * 2**attempt)
                continue
            reason = shown(without_password((str(error) or type(error).__name__).splitlines()[0]))
            raise ValueError(
                f"storage {shown(without_password(where))} cannot be opened ({reason}): give an Optuna URL such as "
                "sqlite:///search.db or postgresql://user@host/name, start its server, or install its driver."
            ) from None
    raise AssertionError("the last attempt returns or raises")


# --- one process ---


def _mend(journal: Path) -> None:
    """Cuts a journal off where it stops being one; the trials from there on are done again."""
    with filelock.FileLock(files.lock_path(journal)):
        whole, lines = 0, journal.read_bytes().splitlines(keepends=True)
        for line in lines:
            try:
                if not line.endswith(b"\n") or not isinstance(json.loads(line), dict):
                    break
            except (ValueError, RecursionError):
                break
            whole += len(line)
        if whole < sum(map(len, lines)):
            if not (lines[-1].startswith(b"{") and whole == sum(map(len, lines[:-1]))):  # more than a half-written end
                shutil.copyfile(journal, journal.with_name(journal.name + ".damaged"))
                print(f"{journal.name} is damaged; a copy is beside it, and what follows the damage is done again.")
            os.truncate(journal, whole)


def _write(journal: Path, study: optuna.Study, trials: list[FrozenTrial]) -> optuna.Study:
    """A journal of these trials of ``study`` alone, in the place of whatever is there."""
    with filelock.FileLock(files.lock_path(journal)), files.whole_file(journal) as temporary:
        copy = open_study(temporary, _local_name(study))
        for key, value in study.user_attrs.items():
            copy.set_user_attr(key, value)
        copy.add_trials(trials)
        files.lock_path(temporary).unlink(missing_ok=True)
    files.forget_checksum(journal)
    return open_study(journal, _local_name(study))


def _local_name(study: optuna.Study) -> str:
    """A study's name in its run folder: a shared storage puts the folder before it."""
    return study.study_name.rpartition(": ")[2]


def resume_study(journal: Path, name: str, settings: dict[str, Any] | None = None) -> optuna.Study:
    """As `open_study`, for the one process that goes on with a search: without what a killed one left half done.

    Such a trial must leave no trace: its number would shift those of the later ones, by which Hyperband deals out its
    brackets, and the rungs that it reached would count as a competitor's. What was begun with other ``settings`` is
    begun anew.
    """
    if journal.exists():
        _mend(journal)
    study = open_study(journal, name)
    trials = study.get_trials(deepcopy=False)
    finished = [t for t in trials if t.state in FINISHED]
    if not _is_of(study, settings):
        journal.unlink()
        study = open_study(journal, name)
        _is_of(study, settings)
    elif len(finished) < len(trials):
        study = _write(journal, study, finished)
    return study


def _is_of(study: optuna.Study, settings: dict[str, Any] | None) -> bool:
    """Whether a study was begun with these settings; one that has none yet gets them."""
    if settings is None:
        return True
    asked = json.loads(json.dumps(settings))  # tuples become lists, as in the storage
    if not study.user_attrs and not study.get_trials(deepcopy=False):
        study.set_user_attr("settings", asked)
        return True
    return study.user_attrs.get("settings", asked) == asked


def keep(study: optuna.Study, journal: Path) -> optuna.Study:
    """A copy of the finished trials in a run folder, which then needs no database to be read."""
    finished = sorted(study.get_trials(deepcopy=False, states=FINISHED), key=lambda t: t.number)
    if journal.exists():
        kept = open_study(journal, _local_name(study))
        if len(kept.get_trials(deepcopy=False, states=FINISHED)) == len(finished):
            return kept
    return _write(journal, study, finished)


# --- many processes ---


def place_of(storage: str) -> Path | str:
    """A ``storage`` parameter: a URL as it is, anything else the path of a journal file."""
    return storage if "://" in storage else Path(storage).expanduser()


def share_study(storage: str, name: str, settings: dict[str, Any]) -> optuna.Study:
    """As `open_study`, in a storage that several processes were given; it may hold the searches of many runs.

    Raises ValueError if the study there was begun with other settings: their trials do not compare.
    """
    study = open_study(place_of(storage), name)
    if not _is_of(study, settings):
        begun = study.user_attrs["settings"]
        changed = sorted(key for key, value in json.loads(json.dumps(settings)).items() if begun.get(key) != value)
        raise ValueError(
            f"storage {shown(without_password(storage))} holds study {name!r} begun with other values of "
            f"{', '.join(changed)}: give another storage, or the same settings."
        )
    return study
