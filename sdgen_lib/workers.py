"""The processes that share one search: each takes the next trial, and what a dead one was working on is done again."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import filelock
import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from .storage import place_of

HEARTBEAT_SECONDS, GRACE_SECONDS = 30, 120  # a worker not heard of for so long is dead
MAX_RETRIES = 3


class Workers:
    """The processes that share a study: who is alive, and what the dead ones leave behind.

    Beside a journal file each worker holds a lock file, which the operating system frees when it dies; its trials carry
    the file's name. In a database a worker writes into its trial every now and then, and who hears nothing of a trial
    for long enough, by a clock of its own, takes its worker for dead. (Optuna's own heartbeat does not notice a worker
    that was killed before its first beat, and does not reach through the gRPC proxy.)
    """

    def __init__(self, storage: str):
        place = place_of(storage)
        self.journal = place if isinstance(place, Path) else None
        self.name = f".worker-{uuid.uuid4().hex}.lock"
        self._lock = None
        self._heard: dict[int, tuple[int, float]] = {}  # by trial: its worker's last beat, and when we saw that first

    def __enter__(self) -> Workers:
        if self.journal:
            self.journal.parent.mkdir(parents=True, exist_ok=True)
            self._lock = filelock.FileLock(self.journal.with_name(self.name))
            self._lock.acquire()
        return self

    def __exit__(self, *_) -> None:
        if self._lock:
            self.journal.with_name(self.name).unlink(missing_ok=True)
            self._lock.release()

    @contextlib.contextmanager
    def signed(self, trial: optuna.Trial) -> Iterator[None]:
        """While in here, this process works on ``trial``, and the others can see it."""
        trial.set_user_attr("worker", self.name)
        if self.journal:
            yield
            return
        finished = threading.Event()

        def beat() -> None:
            for count in itertools.count(1):
                if finished.wait(HEARTBEAT_SECONDS):
                    return
                with contextlib.suppress(Exception):  # taken over by another, or no connection: the next may pass
                    trial.set_user_attr("beat", count)

        heart = threading.Thread(target=beat, daemon=True)
        heart.start()
        try:
            yield
        finally:
            finished.set()
            heart.join()

    def revive(self, study: optuna.Study) -> None:
        """Enqueues the parameters of dead workers' running trials again, and fails these.

        In that order, so that nobody finds one lacking and begins another. Two that do it at once enqueue it twice,
        and `retried_before` tells the second.
        """
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if self._is_dead(trial):
                retry(study, trial)
                with contextlib.suppress(UpdateFinishedTrialError, ValueError):  # another was faster, or it lives
                    study.tell(trial.number, state=TrialState.FAIL)

    def _is_dead(self, trial: FrozenTrial) -> bool:
        worker = trial.user_attrs.get("worker")
        if worker == self.name:
            return False
        if worker is None or self.journal is None:  # without a name: killed before it could sign, or about to sign
            beat, now = trial.user_attrs.get("beat", 0), time.monotonic()
            if trial.number not in self._heard or self._heard[trial.number][0] != beat:
                self._heard[trial.number] = (beat, now)
            return now - self._heard[trial.number][1] > GRACE_SECONDS
        path = self.journal.with_name(Path(worker).name)
        try:
            with filelock.FileLock(path, blocking=False):
                path.unlink(missing_ok=True)
                return True
        except filelock.Timeout:
            return False


def retried_before(trial: optuna.Trial, earlier: list[FrozenTrial]) -> bool:
    """Whether one of the ``earlier`` trials is a dead worker's trial again, which ``trial`` would be once more."""
    again = trial.user_attrs.get("retry_of")
    return again is not None and any(t.user_attrs.get("retry_of") == again for t in earlier)


def retry(study: optuna.Study, trial: FrozenTrial) -> None:
    """Enqueues a dead worker's trial again: its parameters alone, not the rungs that it has passed."""
    retries = trial.user_attrs.get("retries", 0) + 1
    if trial.params and retries <= MAX_RETRIES:
        study.enqueue_trial(trial.params, user_attrs={"retries": retries, "retry_of": trial.number})
