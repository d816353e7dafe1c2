"""One search by many processes, on a journal, SQLite and PostgreSQL: none lost, none twice, the dead ones' redone."""

import contextlib
import importlib.util
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
import torch
from optuna.trial import TrialState

from sdgen_lib import tune
from sdgen_lib.workers import retry
from tests import search_worker
from tests.search_worker import IN_A_HURRY, SETTINGS, SPACE

ROOT = Path(__file__).parents[1]


# --- a server ---


def postgresql_programs() -> Path | None:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return found[-1].parent if found else None


@pytest.fixture(scope="module")
def postgresql(tmp_path_factory):
    """The URL of a PostgreSQL server of our own, with an empty database; gone afterwards."""
    programs = postgresql_programs()
    if programs is None:
        pytest.skip("PostgreSQL is not installed (apt-get install postgresql)")
    if not any(importlib.util.find_spec(driver) for driver in ("psycopg", "psycopg2")):
        pytest.skip("no driver for PostgreSQL (pip install 'psycopg[binary]')")
    with contextlib.ExitStack() as stack:
        folder = Path("/tmp") / f"sdgen-postgresql-{os.getpid()}"  # a socket's path must be short
        folder.mkdir()
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        user = {}
        if os.geteuid() == 0:  # the server refuses to run as root
            shutil.chown(folder, "postgres", "postgres")
            user = {"user": "postgres", "group": "postgres", "extra_groups": []}

        def run(*command):
            subprocess.run(command, check=True, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT, **user)

        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        run(programs / "initdb", "-D", folder / "db", "-A", "trust", "-U", "sdgen", "--no-sync")
        options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder}"
        run(programs / "pg_ctl", "-D", folder / "db", "-w", "-o", options, "-l", folder / "log", "start")
        stack.callback(run, programs / "pg_ctl", "-D", folder / "db", "-m", "immediate", "stop")
        driver = "psycopg" if importlib.util.find_spec("psycopg") else "psycopg2"
        yield f"postgresql+{driver}://sdgen@127.0.0.1:{port}/postgres"


@pytest.fixture
def grpc_proxy(tmp_path):
    """The URL of Optuna's gRPC proxy in front of an SQLite file."""
    if importlib.util.find_spec("grpc") is None:
        pytest.skip("no gRPC (pip install grpcio protobuf)")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve = ("import optuna, sys; optuna.storages.run_grpc_proxy_server("
             "optuna.storages.RDBStorage(sys.argv[1]), host='127.0.0.1', port=int(sys.argv[2]))")  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    server = subprocess.Popen([sys.executable, "-c", serve, f"sqlite:///{tmp_path / 'behind.db'}", str(port)],
                              env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    try:
        for _ in range(600):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            time.sleep(0.2)
        yield f"grpc://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


@pytest.fixture(params=["journal", "sqlite", "postgresql", "grpc"])
def shared(request, tmp_path, monkeypatch):
    """A ``storage`` parameter of each kind; workers are missed after seconds, not minutes."""
    for patch in IN_A_HURRY:
        monkeypatch.setattr(*patch)
    if request.param in ("postgresql", "grpc"):
        return request.getfixturevalue({"grpc": "grpc_proxy"}.get(request.param, request.param))
    return str(tmp_path / "search.log") if request.param == "journal" else f"sqlite:///{tmp_path / 'search.db'}"


# --- workers ---


@pytest.fixture(scope="module")
def digits():
    return search_worker.digits()


@pytest.fixture
def formula(monkeypatch):
    for patch in search_worker.FORMULA:
        monkeypatch.setattr(*patch)


@pytest.fixture(scope="module")
def start():
    """``start(*arguments)`` -> a process that runs `search_worker.take_part`.

    Not forked from this one, whose threads (gRPC's, PyTorch's) a fork would leave half there: from a server of forks.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.search_worker"])

    def begin(*arguments):
        process = context.Process(target=search_worker.take_part, args=arguments, daemon=True)
        process.start()
        return process

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *sys.path]))
        yield begin


def wait_for(workers, seconds=300):
    """Their exit codes."""
    deadline = time.monotonic() + seconds
    for worker in workers:
        worker.join(max(0.0, deadline - time.monotonic()))
    return [worker.exitcode for worker in workers]  # None: it still runs


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_workers_share_a_search_and_take_over_a_dead_ones_trial(shared, count, start, tmp_path):
    begun, n_trials, name = tmp_path / "begun", 14, f"run {count}: step 2"
    workers = [start(shared, name, begun, n_trials, 2 if k == 0 else None) for k in range(count)]
    assert wait_for(workers) == [-signal.SIGKILL] + [0] * (count - 1)
    study = tune.share_study(shared, name, SETTINGS)
    trials = study.get_trials(deepcopy=False)
    finished = [t for t in trials if t.state in tune.FINISHED]
    assert len(finished) == n_trials and not any(t.state in (TrialState.RUNNING, TrialState.WAITING) for t in trials)
    points = [tuple(t.params[p] for p in tune.PARAMETERS) for t in finished]
    assert len(set(points)) == n_trials  # none twice, and the workers draw different ones
    works = [json.loads(line) for line in begun.read_text().splitlines()]
    # Begun in vain: the dead one's, and where this machine is very busy, those of workers that were taken for dead.
    in_vain = [t for t in trials if t.state == TrialState.FAIL and t.params]
    assert len(works) == n_trials + len(in_vain) and len({pid for pid, *_ in works}) == count
    dead = [tuple(point) for pid, *point in works if pid == workers[0].pid]
    assert len(dead) == 2 and sum(tuple(point) == dead[1] for _, *point in works) >= 2  # the last of them, again
    (again,) = [t for t in finished if tuple(t.params[p] for p in tune.PARAMETERS) == dead[1]]
    assert trials[again.user_attrs["retry_of"]].state == TrialState.FAIL


@pytest.mark.parametrize("signs", [True, False])
def test_a_trial_whose_worker_died_before_its_first_beat_is_done_again(signs, digits, formula, tmp_path, monkeypatch):
    """In a database: as much of it as was written is there, and nothing ever comes after."""
    monkeypatch.setattr("sdgen_lib.workers.GRACE_SECONDS", 0.5)
    monkeypatch.setattr(tune, "POLL_SECONDS", 0.1)
    where = f"sqlite:///{tmp_path / 'search.db'}"
    study = tune.share_study(where, "dead: step 2", SETTINGS)
    dead = study.ask()
    if signs:
        dead.set_user_attr("worker", ".worker-dead.lock")
        point = dead.suggest_int("IS", 5, 20), dead.suggest_float("UGS", 0.0, 7.5), dead.suggest_int("epoch", 1, 4)
    with tune.Workers(where) as workers:
        tune.search(study, SPACE, lambda *p: torch.tensor(p, dtype=torch.float64), digits.train.labels, digits,
                    n_trials=3, select_on="val", seed=0, classifier_options={"epochs": 2}, workers=workers)  # fmt: skip
    finished = [t for t in study.trials if t.state in tune.FINISHED]
    assert len(finished) == 3 and study.trials[0].state == TrialState.FAIL
    again = [t for t in finished if t.user_attrs.get("retry_of") == 0]
    assert [tuple(t.params[p] for p in tune.PARAMETERS) for t in again] == ([point] if signs else [])


def test_a_dead_workers_trial_that_two_enqueue_is_done_once(digits, formula, tmp_path, monkeypatch):
    """Two that miss it at the same moment both enqueue it; the search still has its n trials, that one among them."""
    monkeypatch.setattr("sdgen_lib.workers.GRACE_SECONDS", 0.5)
    monkeypatch.setattr(tune, "POLL_SECONDS", 0.1)
    where = str(tmp_path / "search.log")
    study = tune.share_study(where, "twice: step 2", SETTINGS)
    dead = study.ask()
    point = {"IS": dead.suggest_int("IS", 7, 7), "UGS": dead.suggest_float("UGS", 1.5, 1.5),
             "epoch": dead.suggest_int("epoch", 2, 2)}  # fmt: skip
    for _ in range(2):
        retry(study, study.trials[0])
    with tune.Workers(where) as workers:  # the dead one's trial is not failed before the first of the two begins
        tune.search(study, SPACE, lambda *p: torch.tensor(p, dtype=torch.float64), digits.train.labels, digits,
                    n_trials=4, select_on="val", seed=0, classifier_options={"epochs": 2}, workers=workers)  # fmt: skip
    finished = [t for t in study.trials if t.state in tune.FINISHED]
    assert len(finished) == 4 and [t.params for t in finished].count(point) == 1


def test_a_worker_taken_for_dead_goes_on_with_the_next_trial(digits, formula, tmp_path):
    """It was only slow: what it was doing is another's now, and its own result is dropped."""
    where, taken = str(tmp_path / "search.log"), []
    study = tune.share_study(where, "slow: step 2", SETTINGS)

    def images_of(*point):
        if not taken:
            (mine,) = [t for t in study.get_trials(deepcopy=False) if t.state == TrialState.RUNNING]
            other = tune.share_study(where, "slow: step 2", SETTINGS)
            other.tell(mine.number, state=TrialState.FAIL)
            taken.append(mine.number)
        return torch.tensor(point, dtype=torch.float64)

    with tune.Workers(where) as workers:
        tune.search(study, SPACE, images_of, digits.train.labels, digits, n_trials=3, select_on="val", seed=0,
                    classifier_options={"epochs": 2}, workers=workers)  # fmt: skip
    assert [t.state in tune.FINISHED for t in study.trials] == [False, True, True, True] and taken == [0]


def test_an_error_of_a_trial_is_not_taken_for_that(digits, formula, tmp_path):
    def images_of(*point):
        raise ValueError("no images")

    where = str(tmp_path / "search.log")
    with tune.Workers(where) as workers, pytest.raises(ValueError, match="no images"):
        study = tune.share_study(where, "broken", SETTINGS)
        tune.search(study, SPACE, images_of, digits.train.labels, digits, n_trials=3, select_on="val", seed=0,
                    classifier_options={"epochs": 2}, workers=workers)  # fmt: skip


@pytest.mark.slow
def test_the_run_folder_keeps_a_copy(shared, start, tmp_path):
    """With which it can be read where the storage cannot be reached."""
    assert wait_for([start(shared, "digits/tiny: step 2", tmp_path / "begun", 5, None)]) == [0]
    study = tune.share_study(shared, "digits/tiny: step 2", SETTINGS)
    kept = tune.keep(study, tmp_path / "2_tune" / "journal.log")
    read = tune.open_study(tmp_path / "2_tune" / "journal.log", "step 2")
    for copy in (kept, read, tune.keep(study, tmp_path / "2_tune" / "journal.log")):
        assert tune.trials_frame(copy).equals(tune.trials_frame(study)) and copy.best_params == study.best_params


def test_a_study_of_other_settings_is_refused(shared):
    tune.share_study(shared, "other: step 2", SETTINGS)
    tune.share_study(shared, "other: step 2", SETTINGS)
    with pytest.raises(ValueError, match="'other: step 2' begun with other values of num_images: give another storage"):
        tune.share_study(shared, "other: step 2", {**SETTINGS, "num_images": 4000})


# --- what cannot be opened ---


@pytest.mark.parametrize(
    "url",
    ["postgresql+psycopg://me:secret@127.0.0.1:1/none", "nosuchdb://me:secret@host/x", "sqlite:////proc/no/such.db",
     "://", "sqlite://me:secret@host/x", "mysql+nosuchdriver://me:secret@localhost/x"],
)  # fmt: skip
def test_a_storage_that_cannot_be_opened(url):
    with pytest.raises(ValueError, match="^storage .* cannot be opened .*: give an Optuna URL such as") as error:
        tune.open_study(url, "step 2")
    assert "secret" not in str(error.value) and "\n" not in str(error.value)


# --- the journal ---


def finished_of(study):
    return [(t.number, t.params, t.value) for t in study.get_trials(deepcopy=False)]


def with_trials(path, count):
    study = tune.open_study(path, "step 2")
    study.sampler = optuna.samplers.RandomSampler(seed=0)
    study.optimize(lambda trial: trial.suggest_float("UGS", 0, 7.5), n_trials=count)
    return study


def test_reading_a_journal_writes_nothing(tmp_path):
    with_trials(tmp_path / "journal.log", 2)
    before = (tmp_path / "journal.log").read_bytes()
    assert len(tune.open_study(tmp_path / "journal.log", "step 2").trials) == 2
    assert (tmp_path / "journal.log").read_bytes() == before


@pytest.mark.parametrize("writer", ["the next append", "resume"])
def test_a_half_written_line_is_cut_off(tmp_path, writer):
    path = tmp_path / "journal.log"
    expected = finished_of(with_trials(path, 3))
    with open(path, "ab") as file:
        file.write(b'{"op_code":6,"worker_id":"x","trial_')
    study = tune.open_study(path, "step 2") if writer == "the next append" else tune.resume_study(path, "step 2")
    study.add_trial(optuna.trial.create_trial(value=0.5))
    found = finished_of(tune.open_study(path, "step 2"))
    assert found[:3] == expected and found[3] == (3, {}, 0.5)
    assert not path.with_name("journal.log.damaged").exists()


def test_what_follows_a_damaged_line_is_done_again(tmp_path, capsys):
    path = tmp_path / "journal.log"
    expected = finished_of(with_trials(path, 4))
    lines = path.read_bytes().splitlines(keepends=True)
    begun = [k for k, line in enumerate(lines) if b'"op_code":4' in line]  # where each trial begins
    assert len(begun) == 4
    lines[begun[2] + 1] = b"\x00" * 40 + b"\n"
    path.write_bytes(b"".join(lines))
    assert finished_of(tune.resume_study(path, "step 2")) == expected[:2]
    assert "journal.log is damaged" in capsys.readouterr().out
    assert path.with_name("journal.log.damaged").read_bytes() == b"".join(lines)


def test_other_settings_begin_a_new_journal(tmp_path):
    path = tmp_path / "journal.log"
    tune.resume_study(path, "step 2", SETTINGS)
    with_trials(path, 2)
    assert len(tune.resume_study(path, "step 2", SETTINGS).trials) == 2
    stale = tune.open_study(path, "step 2").ask()
    assert stale.number == 2
    assert len(tune.resume_study(path, "step 2", SETTINGS).trials) == 2  # the copy keeps what it is of
    assert len(tune.resume_study(path, "step 2", {**SETTINGS, "num_images": 5}).trials) == 0
