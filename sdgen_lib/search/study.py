"""Where a search keeps its trials: a journal file for one process, an Optuna storage for several.

A search of one process goes on after a kill as if there had been none. With a ``storage``, any number of processes
share a search: Optuna's heartbeat finds the trials of dead workers, and its retry queues them again.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import re
import shutil
import time
import warnings
from pathlib import Path
from urllib.parse import urlsplit

import filelock
import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.storages import GrpcStorageProxy, JournalStorage, RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from ..config.messages import shown
from ..store.files import move_aside, whole_file

# What Optuna raises at a line of a journal that is JSON and no entry.
UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, AssertionError)
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
HEARTBEAT_SECONDS, GRACE_SECONDS = 30, 120  # a worker's signs of life; a trial without one for so long is queued again
MAX_RETRIES = 3
QUEUED = "fixed_params"  # Optuna's attribute of a queued trial: the parameters that it is to try
SEARCH = "numbers of the search's trials"  # the attribute that `keep` goes by
SQLITE_SECONDS = 60  # a process waits so long while others write


# --- opening ---


def open_study(where: Path | str, name: str) -> optuna.Study:
    """Opens the study ``name``, made if missing, in a journal file (a path) or an Optuna storage (text: its URL).

    Any process may read it while it runs; reading writes nothing.
    Raises ValueError, without the URL's password, if the text is no URL or the storage cannot be opened.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # the progress bar says it better
    if isinstance(where, Path):
        where.parent.mkdir(parents=True, exist_ok=True)
        return _load_or_create(JournalStorage(_Journal(where)), name)
    if "://" not in where:
        raise ValueError(
            f"storage {shown(where)} is no Optuna URL (a journal file is for a search of one process): give "
            "sqlite:///search.db for several on one machine, postgresql://user@host/name for many, or leave it out."
        )
    try:
        return _connected(where, name)
    except Exception as error:
        reason = shown(without_password((str(error) or type(error).__name__).splitlines()[0]))
        raise ValueError(
            f"storage {shown(without_password(where))} cannot be opened ({reason}): give an Optuna URL such as "
            "sqlite:///search.db or postgresql://user@host/name, start its server, or install its driver."
        ) from None


def share_study(storage_url: str, name: str) -> optuna.Study:
    """Opens the study ``name`` in a storage that several processes were given; it may hold many searches.

    In a database (SQLite for the processes of one machine, PostgreSQL or MySQL for those of many) the worker of a
    running trial gives a sign of life every ``HEARTBEAT_SECONDS``. Whenever a worker begins a trial, it fails those
    without a sign for ``GRACE_SECONDS`` and queues their parameters again, each at most ``MAX_RETRIES`` times; queued
    trials are taken first. A worker killed before its first sign leaves a trial that stays running for ever.
    So does every worker killed behind Optuna's gRPC proxy, which passes no signs of life on. Nobody waits for such
    trials: the others do new ones until enough are finished.

    Raises ValueError as `open_study`.
    """
    return open_study(storage_url, name)


def without_password(url: str) -> str:
    """A storage URL as it may be shown: without user and password, those in its query included."""
    url = re.sub(r"([?&]\w*(?:pass|pwd)\w*=)[^&]*", r"\1***", url, flags=re.IGNORECASE)
    return re.sub(r"://(?:[^:/@]*:.*@|[^/?]*@)", "://", url)  # a password may hold "/" and "?"


def _connected(url: str, name: str) -> optuna.Study:
    """As `_load_or_create`. Of several workers that make the tables of a new database at once, one is the first."""
    for pause in (0.2, 0.4, 0.8, 1.6):
        try:
            return _load_or_create(_storage(url), name)
        except Exception as error:
            if "already exists" not in str(error) and type(error).__name__ != "IntegrityError":
                raise
            time.sleep(pause)
    return _load_or_create(_storage(url), name)


def _storage(url: str) -> optuna.storages.BaseStorage:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        if url.startswith("grpc://"):
            parts = urlsplit(url)
            return GrpcStorageProxy(host=parts.hostname or "localhost", port=parts.port or 13000)
        return RDBStorage(
            url,
            engine_kwargs={"connect_args": {"timeout": SQLITE_SECONDS}} if url.startswith("sqlite") else None,
            heartbeat_interval=HEARTBEAT_SECONDS,
            grace_period=GRACE_SECONDS,
            heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(max_retry=MAX_RETRIES),
        )


def _load_or_create(storage: optuna.storages.BaseStorage, name: str) -> optuna.Study:
    with contextlib.suppress(KeyError):
        return optuna.load_study(study_name=name, storage=storage)
    return optuna.create_study(storage=storage, study_name=name, direction="maximize", load_if_exists=True)


# --- the journal of one process ---


class _Journal(JournalFileBackend):
    """Optuna's journal file under a lock of the operating system, which ends with its process.

    A line that a killed process left half written would spoil the next one: it is cut off first.
    """

    def __init__(self, path: Path):
        self._path, self._guard = path, filelock.FileLock(_lock_path(path))
        super().__init__(str(path), lock_obj=self._guard)

    def append_logs(self, logs) -> None:
        with self._guard, open(self._path, "rb+") as file:
            if size := file.seek(0, os.SEEK_END):
                file.seek(size - 1)
                if file.read(1) != b"\n":
                    file.seek(0)
                    file.truncate(file.read().rfind(b"\n") + 1)
            super().append_logs(logs)


def _lock_path(journal: Path) -> Path:
    return journal.with_name(f".{journal.name}.lock")


def resume_study(journal: Path, name: str) -> optuna.Study:
    """As `open_study`, for the one process that goes on with a search: without what a killed one left half done.

    Such a trial must leave no trace: its number would shift those of the later ones, by which Hyperband deals out its
    brackets, and the rungs that it reached would count as a competitor's. What Optuna's tools wrote stays: attributes
    of the study (optuna-dashboard keeps its notes there) and trials that were queued. A queued one that was half done
    is queued again, in its old place.
    """
    if journal.exists():
        _mend(journal)
    try:
        study = open_study(journal, name)
    except UNREADABLE:
        move_aside(journal)
        study = open_study(journal, name)
    trials = study.get_trials(deepcopy=False)
    if all(_is_whole(t) for t in trials):
        return study
    kept = _queued_again(trials)
    notes = study._storage.get_study_system_attrs(study._study_id)  # as `optuna.copy_study` reads them
    return _write(journal, study, kept, notes)


def _is_whole(trial: FrozenTrial) -> bool:
    return trial.state in (*FINISHED, TrialState.WAITING)


def _queued_again(trials: list[FrozenTrial]) -> list[FrozenTrial]:
    """The whole trials; of the half-done ones those that were queued, as they were then, each point once."""
    kept, points = [], [t.system_attrs[QUEUED] for t in trials if _is_whole(t) and QUEUED in t.system_attrs]
    for trial in trials:
        point = trial.system_attrs.get(QUEUED)
        if _is_whole(trial):
            kept.append(trial)
        elif point and point not in points:
            points.append(point)
            again = {"user_attrs": trial.user_attrs, "system_attrs": {QUEUED: point}}
            kept.append(optuna.trial.create_trial(state=TrialState.WAITING, **again))
    return kept


def keep(study: optuna.Study, journal: Path, n_trials: int) -> optuna.Study:
    """Copies a shared search into a run folder, which then needs no database to be read; returns the copy.

    The search is the ``n_trials`` finished trials of the lowest numbers at the moment that the first worker asks for
    them. Workers that were busy then finish a few more, which are left out: every worker keeps the same ones. A journal
    that holds as many is left as it is.
    """
    first = _agreed(study, n_trials)
    if journal.exists():
        _mend(journal)
        kept = open_study(journal, study.study_name)
        if len(kept.get_trials(deepcopy=False, states=FINISHED)) == len(first):
            return kept
    return _write(journal, study, first, {})


def _agreed(study: optuna.Study, n_trials: int) -> list[FrozenTrial]:
    """The trials that are the search, by number; all finished ones where they are fewer than ``n_trials``.

    Whoever finds none written down writes them down, as a failed trial's attribute: the storage numbers trials one
    after the other, also where two workers write at once, and what the lower number says counts. The workers' clocks
    have no say.
    """

    def written() -> list[int] | None:
        failed = study.get_trials(deepcopy=False, states=(TrialState.FAIL,))
        lists = (trial.user_attrs.get(SEARCH, ()) for trial in failed)
        return next((numbers for numbers in lists if len(numbers) == n_trials), None)

    finished = study.get_trials(deepcopy=False, states=FINISHED)
    if len(finished) < n_trials:
        return finished
    if not (numbers := written()):
        numbers = [trial.number for trial in finished[:n_trials]]
        complete = [t.number for t in finished if t.state == TrialState.COMPLETE]
        if complete and not set(numbers) & set(complete):  # many workers at once: all the first ones were pruned
            numbers[-1] = complete[0]  # a search without a best trial would be of no use
        study.add_trial(optuna.trial.create_trial(state=TrialState.FAIL, user_attrs={SEARCH: numbers}))
        numbers = written()
    return [t for t in study.get_trials(deepcopy=False, states=FINISHED) if t.number in numbers]


def _write(journal: Path, study: optuna.Study, trials: list[FrozenTrial], notes: dict) -> optuna.Study:
    """Puts a journal of these trials of ``study`` and these system attributes in the place of whatever is there."""
    with filelock.FileLock(_lock_path(journal)), whole_file(journal) as temporary:
        copy = open_study(temporary, study.study_name)
        for key, value in study.user_attrs.items():
            copy.set_user_attr(key, value)
        for key, value in notes.items():
            copy._storage.set_study_system_attr(copy._study_id, key, value)
        copy.add_trials(trials)
        with contextlib.suppress(OSError):  # of the temporary file; nobody holds it any more
            _lock_path(temporary).unlink()
    return open_study(journal, study.study_name)


def _mend(journal: Path) -> None:
    """Cuts a journal off where it stops being one; the trials from there on are done again.

    A last line without its end is what a kill leaves. Anything else is damage: a copy of the file is kept beside it.
    """
    with filelock.FileLock(_lock_path(journal)):
        content = journal.read_bytes()
        whole = sum(map(len, itertools.takewhile(_is_entry, io.BytesIO(content))))
        rest = content[whole:]
        if not rest:
            return
        if not rest.startswith(b"{") or b"\n" in rest:
            shutil.copyfile(journal, journal.with_name(journal.name + ".damaged"))
            print(f"{journal.name} is damaged; a copy is beside it, and what follows the damage is done again.")
        os.truncate(journal, whole)


def _is_entry(line: bytes) -> bool:
    try:
        return line.endswith(b"\n") and isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False
