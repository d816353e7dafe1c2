"""Where trials are kept: a journal that stays valid, and one search by many processes, of which some die."""

import contextlib
import datetime
import importlib.util
import json
import multiprocessing
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
from optuna.storages import JournalStorage, RetryHeartbeatStaleTrialCallback
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from sdgen_lib.search.search import PARAMETERS, trials_frame
from sdgen_lib.search.study import FINISHED, keep, open_study, resume_study, share_study, without_password
from tests.search import search_worker
from tests.search.search_worker import images_of, run

ROOT = Path(__file__).parents[2]


# --- servers ---


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


SERVE = """
import sys, optuna
storage = optuna.storages.get_storage(sys.argv[1])
optuna.storages.run_grpc_proxy_server(storage, host="127.0.0.1", port=int(sys.argv[2]))
"""


@pytest.fixture
def grpc_proxy(tmp_path):
    """The URL of Optuna's gRPC proxy in front of an SQLite file."""
    if importlib.util.find_spec("grpc") is None:
        pytest.skip("no gRPC (pip install grpcio protobuf)")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", SERVE, f"sqlite:///{tmp_path / 'behind.db'}", str(port)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            time.sleep(0.2)
        yield f"grpc://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


@pytest.fixture(params=["sqlite", "postgresql", "grpc"])
def storage(request, tmp_path):
    """A ``storage`` of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'search.db'}"
    return request.getfixturevalue({"grpc": "grpc_proxy"}.get(request.param, request.param))


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
    context.set_forkserver_preload(["tests.search.search_worker"])

    def begin(*arguments):
        process = context.Process(target=search_worker.take_part, args=arguments, daemon=True)
        process.start()
        return process

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *sys.path]))
        yield begin


def wait_for(*workers, seconds=120):
    """Their exit codes."""
    deadline = time.monotonic() + seconds
    for worker in workers:
        worker.join(max(0.0, deadline - time.monotonic()))
    return [worker.exitcode for worker in workers]  # None: it still runs


def point_of(trial):
    return tuple(trial.params[name] for name in PARAMETERS)


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_workers_share_a_search_and_one_is_killed(storage, start, tmp_path):
    """What it was doing is done again, where signs of life reach the database. Everyone keeps the same search."""
    n_trials, name = 6, "digits: 2_tune 0123456789ab"
    dead = start(storage, name, tmp_path, n_trials, 1, 2)
    assert wait_for(dead) == [-signal.SIGKILL]
    (lost,) = [t for t in open_study(storage, name).trials if t.state == TrialState.RUNNING]
    time.sleep(4.1)  # the database counts whole seconds
    living = [start(storage, name, tmp_path, n_trials, 3) for _ in range(2)]
    assert wait_for(*living) == [0, 0]
    trials = open_study(storage, name).trials
    begun = [json.loads(line) for line in (tmp_path / "begun").read_text().splitlines()]
    assert {pid for pid, *_ in begun} == {worker.pid for worker in (dead, *living)}
    assert [tuple(point) for pid, *point in begun if pid == dead.pid][1] == point_of(lost)
    again = [t for t in trials if RetryHeartbeatStaleTrialCallback.retried_trial_number(t) == lost.number]
    if storage.startswith("grpc://"):
        assert trials[lost.number].state == TrialState.RUNNING and not again  # for ever, and nobody waited
    else:
        assert trials[lost.number].state == TrialState.FAIL
        assert any(t.state in FINISHED for t in again) and {point_of(t) for t in again} == {point_of(lost)}
    assert n_trials <= sum(t.state in FINISHED for t in trials) <= n_trials + 1  # the last two ran at the same time
    first, second = [trials_frame(open_study(tmp_path / f"{worker.pid}.log", name)) for worker in living]
    assert len(first) == n_trials and first.equals(second)


def failed_by_another(storage, study):
    """The running trial is taken for dead."""
    (mine,) = [t for t in study.trials if t.state == TrialState.RUNNING]
    open_study(storage, study.study_name).tell(mine.number, state=TrialState.FAIL)
    return mine.number


@pytest.mark.parametrize("notices", ["generating", "telling"])
def test_a_worker_taken_for_dead_goes_on_with_the_next_trial(notices, digits, formula, tmp_path, monkeypatch):
    """It was only slow: what it was doing is another's now, and its own result is dropped."""
    storage, taken, seen = f"sqlite:///{tmp_path / 'search.db'}", [], []
    study = share_study(storage, "slow")

    def images(*point):
        if notices == "generating" and not taken:
            taken.append(failed_by_another(storage, study))
        return images_of(*point)

    def train(*args, **options):
        result = search_worker.train_classifier(*args, **options)
        if notices == "telling" and not taken:
            taken.append(failed_by_another(storage, study))
        return result

    monkeypatch.setattr("sdgen_lib.search.search.train_classifier", train)
    run(study, digits, images, on_trial=lambda study: seen.append(len(study.trials)))
    assert [t.state in FINISHED for t in study.trials] == [False, True, True, True] and taken == [0]
    assert seen == [2, 3, 4]


@pytest.mark.parametrize("taken", [False, True])
def test_an_error_of_a_trial_is_not_taken_for_that(taken, digits, formula, tmp_path):
    storage = f"sqlite:///{tmp_path / 'search.db'}"
    study = share_study(storage, "broken")

    def images(*point):
        if taken:
            failed_by_another(storage, study)
        raise ValueError("no images")

    with pytest.raises(ValueError, match="Cannot tell" if taken else "no images"):
        run(study, digits, images)
    assert [t.state for t in study.trials] == [TrialState.FAIL]


def test_a_trial_without_a_sign_of_life_is_not_waited_for(digits, formula, tmp_path):
    """Its worker was killed before the first one."""
    study = share_study(f"sqlite:///{tmp_path / 'search.db'}", "dead")
    with pytest.warns(UserWarning, match="Heartbeat"):
        study.ask()
    run(study, digits)
    assert [t.state in FINISHED for t in study.trials] == [False, True, True, True]


def test_a_stale_trial_is_queued_again_three_times_at_most(digits, formula, tmp_path):
    """One that kills its worker each time must not kill them all."""
    study, points = share_study(f"sqlite:///{tmp_path / 'search.db'}", "deadly"), []

    class Killed(BaseException):
        """What a killed process looks like from inside: nothing catches it."""

    def killed(*point):
        raise Killed

    for _ in range(5):
        with pytest.raises(Killed):
            run(study, digits, killed)
        points.append(point_of(study.trials[-1]))
        with contextlib.closing(sqlite3.connect(tmp_path / "search.db")) as database, database:
            database.execute("UPDATE trial_heartbeats SET heartbeat = datetime('now', '-121 seconds')")
    assert len(set(points[:4])) == 1 and points[4] != points[0]
    assert [t.state for t in study.trials] == 4 * [TrialState.FAIL] + [TrialState.RUNNING]


# --- the copy in the run folder ---


@pytest.mark.parametrize("n_trials", [3, 4, 5])
def test_the_search_is_the_finished_trials_of_the_lowest_numbers(tmp_path, n_trials):
    """Whatever the workers' clocks said; what runs or has failed is no part of it."""
    study, now = open_study(tmp_path / "shared.log", "step 2"), datetime.datetime(2030, 1, 1)
    study.tell(study.ask(), state=TrialState.FAIL)
    study.ask()
    for value, minute in ((0.0, 5), (0.1, 2), (0.2, 4), (0.3, 4), (0.4, 1)):
        trial = optuna.trial.create_trial(value=value)
        trial.datetime_complete = now + datetime.timedelta(minutes=minute)
        study.add_trial(trial)
    copy = keep(study, tmp_path / "copy.log", n_trials)
    assert [t.value for t in copy.trials] == [0.0, 0.1, 0.2, 0.3, 0.4][:n_trials]
    assert {t.state for t in copy.trials} == {TrialState.COMPLETE}


def test_fewer_trials_than_asked_for_are_all_kept(tmp_path):
    study = with_trials(tmp_path / "shared.log", 3)
    assert len(keep(study, tmp_path / "copy.log", 9).trials) == 3
    assert len(study.trials) == 3  # nothing is written down before there are enough


@pytest.mark.parametrize("where", ["shared.log", "sqlite"])
def test_every_worker_keeps_what_the_first_one_kept(tmp_path, where):
    """Workers that were busy then finish a trial of a lower number, and one by a clock that is a year behind."""
    place = f"sqlite:///{tmp_path}/search.db" if where == "sqlite" else tmp_path / where
    study = open_study(place, "step 2")
    late = study.ask()
    for value in range(4):
        study.tell(study.ask(), value)
    first = keep(study, tmp_path / "first.log", 4)
    study.tell(late, 9.0)
    behind = optuna.trial.create_trial(value=8.0)
    behind.datetime_start = behind.datetime_complete = datetime.datetime.now() - datetime.timedelta(days=365)
    study.add_trial(behind)
    late_ones = keep(open_study(place, "step 2"), tmp_path / "late.log", 4)
    assert [t.value for t in first.trials] == [t.value for t in late_ones.trials] == [0.0, 1.0, 2.0, 3.0]


def test_of_two_workers_that_ask_at_once_the_earlier_word_counts(tmp_path, monkeypatch):
    """Each has seen that nothing is written down yet; the second has seen one trial more."""
    study = open_study(tmp_path / "shared.log", "step 2")
    late = study.ask()
    for value in range(4):
        study.tell(study.ask(), value)
    other, add_trial, kept = open_study(tmp_path / "shared.log", "step 2"), study.add_trial, []

    def slower(trial):  # while this one is about to write, the other one does all of its part
        kept.append(keep(other, tmp_path / "other.log", 4))
        study.tell(late, 9.0)
        add_trial(trial)

    monkeypatch.setattr(study, "add_trial", slower)
    kept.append(keep(study, tmp_path / "mine.log", 4))
    assert [t.value for t in kept[0].trials] == [t.value for t in kept[1].trials] == [0.0, 1.0, 2.0, 3.0]


def test_what_was_noted_of_a_search_is_copied_with_it(tmp_path):
    """What rescoring found (plain numbers and text) among it; a copy that has notes of its own keeps them."""
    study = with_trials(tmp_path / "shared.log", 5)
    found = [{"point": {"UGS": 0.1 + 0.2}, "seeds": [2**62 + 1], "values": [1 / 3, 0.1]}]
    study.set_user_attr("rescored", found)
    keep(study, tmp_path / "copy.log", 4)
    for again in (open_study(tmp_path / "copy.log", "step 2"), resume_study(tmp_path / "copy.log", "step 2")):
        assert again.user_attrs == {"rescored": found} and len(again.trials) == 4
    again.set_user_attr("own", 1)
    assert keep(study, tmp_path / "copy.log", 4).user_attrs == {"rescored": found, "own": 1}


def test_a_queued_trial_that_was_half_done_is_queued_again_in_its_place(tmp_path):
    """One that its sampler chose is not; nor one whose point another trial has by now."""
    study = open_study(tmp_path / "journal.log", "step 2")
    for guidance in (1.0, 2.0, 3.0):
        study.enqueue_trial({"UGS": guidance}, user_attrs={"known": True})
    study.tell(study.ask(), 0.5)
    half_done = study.ask()
    half_done.suggest_float("UGS", 0, 7.5)
    half_done.report(0.3, 1)
    study.tell(half_done, state=TrialState.FAIL)
    study.ask()
    study.ask().suggest_float("UGS", 0, 7.5)
    study.enqueue_trial({"UGS": 3.0})
    trials = resume_study(tmp_path / "journal.log", "step 2").trials
    assert [t.state for t in trials] == [TrialState.COMPLETE, TrialState.WAITING, TrialState.WAITING]
    assert [t.system_attrs["fixed_params"]["UGS"] for t in trials] == [1.0, 2.0, 3.0]
    assert trials[1].user_attrs == {"known": True} and not trials[1].intermediate_values and not trials[1].params


def test_processes_that_share_a_search_try_a_known_point_once(tmp_path, formula, digits):
    known = [{"IS": 7, "UGS": 4.25, "epoch": 3}, {"IS": 8, "UGS": 1.0, "epoch": 2}]
    place, begun = f"sqlite:///{tmp_path}/search.db", []

    def joined_by_another(*point):  # while the first one's first trial runs, the second one does the rest
        if not begun:
            begun.append(point)
            run(share_study(place, "step 2"), digits, n_trials=3, known=known)
        return images_of(*point)

    study = run(share_study(place, "step 2"), digits, joined_by_another, n_trials=4, known=known)
    points = [t.params for t in study.trials]
    assert points[:2] == known and len(points) == 4 and all(points.count(point) == 1 for point in known)


def test_a_copy_is_left_as_it_is(tmp_path):
    study = with_trials(tmp_path / "shared.log", 5)
    kept = keep(study, tmp_path / "run" / "journal.log", 3)
    assert finished_of(kept) == finished_of(study)[:3]
    before = (tmp_path / "run" / "journal.log").read_bytes()
    study.add_trial(optuna.trial.create_trial(value=2.0))
    assert finished_of(keep(study, tmp_path / "run" / "journal.log", 3)) == finished_of(kept)
    assert (tmp_path / "run" / "journal.log").read_bytes() == before
    assert len(keep(study, tmp_path / "run" / "journal.log", 6).trials) == 6
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"journal.log", ".journal.log.lock"}


# --- what cannot be opened ---

CANNOT_BE_OPENED = [
    "postgresql+psycopg://me:secret@127.0.0.1:1/none",
    "postgresql+psycopg://127.0.0.1:1/none?user=me&password=secret",
    "nosuchdb://me:secret@host/x",
    "sqlite:////proc/no/such.db",
    "://",
    "sqlite://me:secret@host/x",
    "mysql+nosuchdriver://me:secret@localhost/x",
]


@pytest.mark.parametrize("url", CANNOT_BE_OPENED)
def test_a_storage_that_cannot_be_opened(url):
    with pytest.raises(ValueError, match="^storage .* cannot be opened .*: give an Optuna URL such as") as error:
        open_study(url, "step 2")
    assert "secret" not in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("place", ["search.log", "/tmp/search.db", "postgresql:me@host", ""])
def test_a_storage_that_is_no_url(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="^storage '.*' is no Optuna URL .*: give sqlite:///search.db for") as error:
        share_study(place, "step 2")
    assert "\n" not in str(error.value) and not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("sqlite:///search.db", "sqlite:///search.db"),
        ("postgresql://host/name", "postgresql://host/name"),
        ("postgresql://me@host/name", "postgresql://host/name"),
        ("postgresql://me:secret@host:5432/name", "postgresql://host:5432/name"),
        ("postgresql://me:se/cret@host/name", "postgresql://host/name"),
        ("postgresql://me:secret/with?all@of@it@host/name", "postgresql://host/name"),
        ("postgresql://host/name?user=me&password=secret", "postgresql://host/name?user=me&password=***"),
        ("postgresql://host/name?password=sec@ret&a=b", "postgresql://host/name?password=***&a=b"),
        ("mysql+pymysql://host/name?passwd=secret", "mysql+pymysql://host/name?passwd=***"),
        ("postgresql://host/name?sslpassword=secret", "postgresql://host/name?sslpassword=***"),
    ],
)
def test_without_password(url, shown):
    assert without_password(url) == shown


# --- the journal ---


def finished_of(study):
    return [(t.params, t.value, t.datetime_complete) for t in study.get_trials(deepcopy=False)]


def with_trials(path, count):
    study = open_study(path, "step 2")
    study.sampler = optuna.samplers.RandomSampler(seed=0)
    study.optimize(lambda trial: trial.suggest_float("UGS", 0, 7.5), n_trials=count)
    return study


def test_reading_a_journal_writes_nothing(tmp_path):
    with_trials(tmp_path / "journal.log", 2)
    before = (tmp_path / "journal.log").read_bytes()
    assert len(open_study(tmp_path / "journal.log", "step 2").trials) == 2
    assert len(resume_study(tmp_path / "journal.log", "step 2").trials) == 2
    assert (tmp_path / "journal.log").read_bytes() == before


def note(path, **notes):
    """As optuna-dashboard stores a note typed into it, and as Optuna's own `set_user_attr` stores an attribute."""
    storage = JournalStorage(JournalFileBackend(str(path)))
    study = optuna.load_study(study_name="step 2", storage=storage)
    for key, value in notes.items():
        study.set_user_attr(key, value)
        storage.set_study_system_attr(storage.get_study_id_from_name("step 2"), f"dashboard:1:note_str:{key}", value)


def notes_of(path):
    storage = JournalStorage(JournalFileBackend(str(path)))
    study_id = storage.get_study_id_from_name("step 2")
    return storage.get_study_user_attrs(study_id), storage.get_study_system_attrs(study_id)


def test_a_journal_that_optunas_tools_write_to_stays_valid(tmp_path, formula, digits, capsys):
    """The finished search is neither damaged nor run again, and the notes stay, also when a half-done trial goes."""
    path, options = tmp_path / "journal.log", {"n_trials": 4, "shared": False}
    before = trials_frame(run(resume_study(path, "step 2"), digits, **options))
    note(path, best="the third")
    begun = []
    again = run(resume_study(path, "step 2"), digits, lambda *point: begun.append(point), **options)
    assert trials_frame(again).equals(before) and not begun
    again.ask()
    assert trials_frame(resume_study(path, "step 2")).equals(before)
    assert notes_of(path) == ({"best": "the third"}, {"dashboard:1:note_str:best": "the third"})
    assert not path.with_name("journal.log.damaged").exists() and "damaged" not in capsys.readouterr().out


def test_a_queued_trial_stays(tmp_path, formula, digits):
    """Somebody asks for two points; the process dies in the first, and another goes on: with both, in their order."""
    study = open_study(tmp_path / "journal.log", "step 2")
    for point in ((7, 1.5, 2), (8, 2.5, 3)):
        study.enqueue_trial(dict(zip(PARAMETERS, point)))
    study.ask()  # the first of the two, half done
    found = run(resume_study(tmp_path / "journal.log", "step 2"), digits, n_trials=2, shared=False)
    assert [point_of(trial) for trial in found.trials] == [(7, 1.5, 2), (8, 2.5, 3)]


@pytest.mark.parametrize("writer", ["the next append", "resume"])
def test_a_half_written_line_is_cut_off(tmp_path, writer):
    path = tmp_path / "journal.log"
    expected = finished_of(with_trials(path, 3))
    with open(path, "ab") as file:
        file.write(b'{"op_code":6,"worker_id":"x","trial_')
    study = open_study(path, "step 2") if writer == "the next append" else resume_study(path, "step 2")
    study.add_trial(optuna.trial.create_trial(value=0.5))
    found = finished_of(open_study(path, "step 2"))
    assert found[:3] == expected and found[3][:2] == ({}, 0.5)
    assert not path.with_name("journal.log.damaged").exists()


@pytest.mark.parametrize("damage", [b"\x00" * 40, b'{"op_code":6,"worker', b"[1]", b'{"op_code"\r'])
def test_what_follows_a_damaged_line_is_done_again(tmp_path, capsys, damage):
    path = tmp_path / "journal.log"
    expected = finished_of(with_trials(path, 4))
    lines = path.read_bytes().splitlines(keepends=True)
    begun = [k for k, line in enumerate(lines) if b'"op_code":4' in line]  # where each trial begins
    assert len(begun) == 4
    lines[begun[2] + 1] = damage + b"\n"
    path.write_bytes(b"".join(lines))
    assert finished_of(resume_study(path, "step 2")) == expected[:2]
    assert "journal.log is damaged" in capsys.readouterr().out
    assert path.with_name("journal.log.damaged").read_bytes() == b"".join(lines)


def test_a_half_done_trial_leaves_no_trace(tmp_path):
    study = with_trials(tmp_path / "journal.log", 3)
    study.ask().suggest_float("UGS", 0, 7.5)
    resumed = resume_study(tmp_path / "journal.log", "step 2")
    assert finished_of(resumed) == finished_of(study)[:3] and resumed.ask().number == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == [".journal.log.lock", "journal.log"]


@pytest.mark.parametrize("line", [b'{"op_code": "none"}\n', b'{"op_bode": 4}\n', b"{}\n", b"[]\n"])
def test_a_journal_with_a_line_that_is_no_entry_is_begun_anew(tmp_path, line):
    journal = tmp_path / "journal.log"
    open_study(journal, "step 2").add_trial(optuna.trial.create_trial(value=0.5))
    journal.write_bytes(journal.read_bytes() + line)
    found = resume_study(journal, "step 2")
    assert len(found.trials) <= 1  # as much as was left of it
    assert len(open_study(journal, "step 2").trials) == len(found.trials)
    assert list(tmp_path.glob("journal.log.damaged"))
