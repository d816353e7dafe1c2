"""Kills every step of a very small run at random moments, lets it go on, and compares it with an unbroken run.

    python -m tests.soak --kills 300

Each attempt at a step is a process of its own, forked from this one, which has everything imported and the model
loaded. It is ended by SIGKILL, either just before a random one of the calls by which Python opens, renames, makes or
deletes files, or after a random time. Then a new process goes on, is killed again, and so on; at last one is let
through. What it leaves must be what the unbroken run left: checkpoints, images, trials, tables and records, but for
clocks. So it must be when three processes do the run in one folder at the same time, and when one file of each kind is
damaged by a bit: who needs it has to notice and to make it again.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import optuna
import torch

from sdgen_lib.config import settings
from sdgen_lib.course import ROWS, Course
from sdgen_lib.diffusion import backbone
from sdgen_lib.evaluate.scaling import scaling_work
from sdgen_lib.machine.passes import total
from sdgen_lib.search.study import SEARCH
from sdgen_lib.store.run import RECORD, read_result
from sdgen_lib.work import cost
from tests import small

# What a run is made of, in order; each needs those before it.
STEPS: dict[str, Callable[[Course], object]] = {
    "latents": lambda c: c.latents,
    "1_transfer": lambda c: c.transfer(),
    "2_tune": lambda c: c.tune(),
    "3_finetune": lambda c: c.finetune(),
    "4_retune": lambda c: c.retune(),
    "table_1": lambda c: [c.cas(row) for row in ROWS],
    "table_2": lambda c: (c.scaling(), c.predicted("x1")),  # and the blocks of 5_datasets
}
JOURNAL = "journal.log"
# One file of each kind, as its step's folder and its name; {transfer} and {finetune} are the best epochs.
DAMAGED = (
    "latents/latents.safetensors",
    "1_transfer/epoch_003.safetensors",
    "1_transfer/epoch_{transfer:03d}.safetensors",
    "1_transfer/history.json",
    f"2_tune/{JOURNAL}",
    "3_finetune/epoch_{finetune:03d}.safetensors",
    "3_finetune/history.json",
    f"4_retune/{JOURNAL}",
    "5_datasets/block_01/images.npz",
    "table_2/x1/predicted.safetensors",
    *(f"{step}/{RECORD}" for step in ("latents", "1_transfer", "2_tune", "3_finetune", "4_retune")),
    *(f"{step}/{RECORD}" for step in ("5_datasets/block_02", "table_1/after_2", "table_2/x2")),
)
FILE_EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")
CLOCKS = ("seconds", "generation_seconds", "finished", "sum")  # a record's sum covers its clocks
# Longer than other tests' smallest run, so that there is something to go on with.
SMALL = small.SMALL | dict(transfer_epochs=3, n_trials=6, classifier_epochs=4)


# --- a process that may be killed ---


def in_a_process(work: Callable[[], object], kill_after_events: int | None = None, kill_after_s: float | None = None):
    """Runs ``work()`` in a fork of this process. (how it ended: 0, or a negative signal; file events; seconds)."""
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        _child(work, kill_after_events, write)
    os.close(write)
    start = time.monotonic()
    if kill_after_s is not None:
        while os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
            if time.monotonic() - start > kill_after_s:
                os.kill(child, signal.SIGKILL)
                break
            time.sleep(0.002)
    with os.fdopen(read) as pipe:
        events = int(pipe.read() or 0)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return ended, events, time.monotonic() - start


def _child(work: Callable[[], object], kill_after_events: int | None, write: int) -> None:
    """Does ``work()`` and ends this process; the number of file events is written into the pipe."""
    status = 1
    try:
        events, kill, pid = 0, os.kill, os.getpid()

        def count(event: str, _) -> None:
            nonlocal events
            if event in FILE_EVENTS:
                if events == kill_after_events:
                    kill(pid, signal.SIGKILL)
                events += 1

        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # reports of damage and progress bars; errors stay
        with open(os.devnull, "w") as devnull, contextlib.redirect_stderr(devnull):
            sys.addaudithook(count)
            work()
        os.write(write, str(events).encode())
        status = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(status)


# --- what a run has left ---


def without_clocks(value):
    if isinstance(value, dict):
        return {key: without_clocks(item) for key, item in value.items() if key not in CLOCKS}
    return [without_clocks(item) for item in value] if isinstance(value, list) else value


def study_in(where: Path | str) -> optuna.Study:
    """The one study in a journal file, or in the database of a URL."""
    if isinstance(where, Path):
        where = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(where)))
    (name,) = optuna.get_all_study_names(where)
    return optuna.load_study(study_name=name, storage=where)


def contents(trial: optuna.trial.FrozenTrial) -> tuple:
    """What a trial is, but for its number and its clocks."""
    attributes = without_clocks(trial.user_attrs)
    return trial.state.name, trial.params, trial.value, trial.intermediate_values, attributes


def trials_of(journal: Path) -> list[tuple]:
    return [(trial.number, *contents(trial)) for trial in study_in(journal).get_trials(deepcopy=False)]


def state_of(folder: Path) -> dict[str, object]:
    """Every file of a run folder by its name: its bytes, or what it says but clocks (trials, records)."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() or path.suffix == ".lock":
            continue
        if path.name == JOURNAL:
            found[name] = trials_of(path)
        elif path.name == RECORD:
            found[name] = without_clocks(json.loads(path.read_text()))
        else:
            found[name] = path.read_bytes()
    return found


def differences(found: dict[str, object], expected: dict[str, object]) -> list[str]:
    return [name for name in sorted({**found, **expected}) if found.get(name) != expected.get(name)]


def run_folder(folder: Path) -> Path:
    (found,) = (folder / "runs").glob("*/*/")
    return found


def place(run: Path, name: str) -> Path:
    """The path of "<step>/<file>" in a run folder that has one result of the step."""
    step, _, file = name.rpartition("/")
    (result,) = (path for path in (run / step).glob("*/") if not path.name.startswith("."))
    return result / file


# --- the soak ---


def attempts(folder: Path) -> Callable[..., Callable[[], None]]:
    """``attempts(folder)(step, ..)`` -> a function that does these steps of the run in ``folder``."""
    torch.set_num_threads(1)  # a fork inherits no threads, and sums would be in another order
    small.write_dataset(folder / "small.npz")
    model = backbone.load("tiny", device="cpu", precision="fp32")

    def course(runs_dir: Path, **changes) -> Course:
        made = Course(settings.resolve(**SMALL, **changes, dataset=str(folder / "small.npz"), runs_dir=str(runs_dir)))
        made.workspace.backbone = model
        return made

    def attempt(*steps: str, **changes) -> Callable[[], None]:
        def work() -> None:
            made = course(folder / "runs", **changes)
            for step in steps:
                STEPS[step](made)

        return work

    _measure(course(folder / "measured"))
    return attempt


def _measure(course: Course) -> None:
    """Times each kind of pass now: each attempt would do it anew, to say how long a step will take."""
    ws, steps = course.workspace, course.method.steps()
    work = [ws.latents_step.work(), *(step.work() for step in steps), scaling_work(ws, course.source())]
    cost.seconds(course.backbone, total(work))


def restore(copy: Path, runs_dir: Path) -> None:
    """Puts the copy of a runs folder in its place; nothing where there is no copy."""
    shutil.rmtree(runs_dir, ignore_errors=True)
    if copy.exists():
        shutil.copytree(copy, runs_dir)


def unbroken(folder: Path, attempt: Callable[..., Callable[[], None]], report: Callable[[str], None]):
    """Does all steps without a kill. By step: what was left, and (file events, seconds).

    The runs as they were before each step are copied to ``folder/before``.
    """
    after, length = {}, {}
    for step in STEPS:
        if (folder / "runs").exists():
            shutil.copytree(folder / "runs", folder / "before" / step)
        ended, events, seconds = in_a_process(attempt(step))
        assert ended == 0, f"{step} failed without being killed"
        after[step], length[step] = state_of(run_folder(folder)), (events, seconds)
        report(f"{step}: {seconds:.1f} s and {events} file events unbroken")
    shutil.copytree(folder / "runs", folder / "before" / "nothing is left to do")
    return after, length


def killed(
    step: str, attempt: Callable[..., Callable[[], None]], length: tuple[int, float], chance: random.Random
) -> list[dict]:
    """Kills a step up to three times and then lets it go on; how it was killed."""
    (events, seconds), story = length, []
    for _ in range(chance.randint(1, 3)):
        if chance.random() < 0.6:
            how = {"kill_after_events": chance.randrange(events)}
        else:
            how = {"kill_after_s": chance.uniform(0, seconds)}
        ended, *_ = in_a_process(attempt(step), **how)
        assert ended in (0, -signal.SIGKILL), f"{step} failed after {story}"
        if ended:
            story.append(how)
    ended, *_ = in_a_process(attempt(step))
    assert ended == 0, f"{step} could not go on after {story}"
    return story


def together(
    folder: Path, attempt: Callable[..., Callable[[], None]], seconds: float, chance: random.Random, processes: int = 3
) -> int:
    """That many processes do the whole run in one new folder at the same time; it must be as if one had.

    Each is killed once, at a random moment of the ``seconds`` that one alone takes, and another begins in its place.
    """
    expected = state_of(run_folder(folder))
    shutil.rmtree(folder / "runs")

    def one(moment: float) -> int:
        ended, *_ = in_a_process(attempt(*STEPS), kill_after_s=moment)
        assert ended in (0, -signal.SIGKILL)
        return in_a_process(attempt(*STEPS))[0]

    with ThreadPoolExecutor(processes) as pool:  # threads that only wait: each for a process that it forks
        ended = list(pool.map(one, [chance.uniform(0, seconds) for _ in range(processes)]))
    assert ended == [0] * processes, f"{processes} processes on one folder ended with {ended}"
    assert not (wrong := differences(state_of(run_folder(folder)), expected)), f"together they left other {wrong}"
    return processes


def read_only(folder: Path, attempt: Callable[..., Callable[[], None]]) -> None:
    """A finished run on a disk that cannot be written to is read as ever."""

    def refuse(event: str, arguments) -> None:
        path = Path(os.fsdecode(arguments[0])) if arguments and isinstance(arguments[0], (str, bytes, Path)) else None
        if path is None or not path.is_relative_to(folder / "runs"):
            return
        writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes or event in FILE_EVENTS[1:] and not (event == "os.mkdir" and path.exists()):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    def work() -> None:
        sys.addaudithook(refuse)
        attempt(*STEPS)()

    before = state_of(run_folder(folder))
    ended, *_ = in_a_process(work)
    assert ended == 0, "a finished run could not be read where nothing can be written"
    assert not differences(state_of(run_folder(folder)), before)


# --- damage ---


def flip_a_bit(path: Path) -> None:
    """In the middle of a file; in a journal, so that the line in the middle is none any more."""
    content = bytearray(path.read_bytes())
    at = len(content) // 2
    if path.name == JOURNAL:  # which has no checksum: other tools write into it, too
        at = content.rindex(b"\n{", 0, at) + 1
    content[at] ^= 1
    path.write_bytes(content)


def damage(folder: Path, attempt: Callable[..., Callable[[], None]], report: Callable[[str], None]) -> int:
    """Flips a bit in one file of each kind in a finished run and asks for everything again; how many files."""
    run, whole = run_folder(folder), folder / "before" / "nothing is left to do"
    restore(whole, folder / "runs")
    expected = state_of(run)
    best = read_result(place(run, "4_retune/")).facts["best"]["epoch"]
    transfer = read_result(place(run, "2_tune/")).facts["best"]["epoch"]
    for name in dict.fromkeys(name.format(transfer=transfer, finetune=best) for name in DAMAGED):
        restore(whole, folder / "runs")
        damaged = place(run, name)
        if not name.startswith("table_"):  # else nothing but the tables would be read
            for record in run.glob(f"table_?/*/*/{RECORD}"):
                record.unlink()
        flip_a_bit(damaged)
        ended, *_ = in_a_process(attempt(*STEPS))
        assert ended == 0, f"a damaged {name} ended the run"
        found = state_of(run)
        aside = found.pop(f"{damaged.relative_to(run).as_posix()}.damaged", None)
        assert (aside is None) == (damaged.name == RECORD), f"a damaged {name} was not kept aside"
        assert not (wrong := differences(found, expected)), f"a damaged {name} led to other {', '.join(wrong)}"
        report(f"{name}: damaged, and made again the same")
    return len(DAMAGED)


# --- a shared search ---


def share(folder: Path, attempt: Callable[..., Callable[[], None]], processes: int = 2) -> None:
    """That many processes share the first search; each keeps the trials that the first one to be done wrote down."""
    restore(folder / "before" / "2_tune", folder / "runs")
    storage, n_trials = f"sqlite:///{folder / 'shared.db'}", SMALL["n_trials"]
    with ThreadPoolExecutor(processes) as pool:
        work = attempt("2_tune", storage=storage)
        ended = list(pool.map(lambda _: in_a_process(work)[0], range(processes)))
    assert ended == [0] * processes, f"{processes} workers ended with {ended}"
    trials = study_in(storage).get_trials(deepcopy=False)
    assert all(trial.state.is_finished() for trial in trials)
    written = [trial.user_attrs[SEARCH] for trial in trials if SEARCH in trial.user_attrs]  # by whoever asked first
    drawn = [trial for trial in trials if SEARCH not in trial.user_attrs]
    first = [trial for trial in drawn if trial.number in written[0]]
    kept = trials_of(place(run_folder(folder), f"2_tune/{JOURNAL}"))
    assert len(drawn) < n_trials + processes and len(first) == n_trials
    assert kept == [(k, *contents(trial)) for k, trial in enumerate(first)]
    assert "shared.db" not in place(run_folder(folder), f"2_tune/{RECORD}").read_text()


# --- all of it ---


def soak(folder: Path, kills: int, seed: int, report: Callable[[str], None] = print) -> dict[str, int]:
    """All of the above; the steps are killed in turn until there were ``kills``.

    Returns how many of each step, and what the rest counted. AssertionError on a difference.
    """
    attempt, runs_dir = attempts(folder), folder / "runs"
    after, length = unbroken(folder, attempt, report)
    chance, count = random.Random(seed), dict.fromkeys(STEPS, 0)
    while sum(count.values()) < kills:
        for step in STEPS:
            restore(folder / "before" / step, runs_dir)
            story = killed(step, attempt, length[step], chance)
            wrong = differences(state_of(run_folder(folder)), after[step])
            assert not wrong, f"after {story} {step} left other {', '.join(wrong)}; see {runs_dir}"
            count[step] += len(story)
    report(f"{sum(count.values())} kills: the same")
    alone = sum(seconds for _, seconds in length.values())
    count["together"] = together(folder, attempt, alone, chance)
    report(f"{count['together']} processes at the same time, each killed once: the same")
    read_only(folder, attempt)
    report("where nothing can be written: read as ever")
    count["damaged"] = damage(folder, attempt, report)
    share(folder, attempt)
    report("2 workers on one search: no trial lost, none done twice")
    restore(folder / "before" / "nothing is left to do", runs_dir)  # the whole run, to look at
    return count


@contextlib.contextmanager
def place_for(folder: Path | None) -> Iterator[Path]:
    """The folder, made if it is not there; a temporary one without it."""
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
    else:
        with tempfile.TemporaryDirectory() as temporary:
            yield Path(temporary)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="kept afterwards; without it a temporary one is used")
    args = parser.parse_args(argv)
    start = time.monotonic()
    with place_for(args.folder) as folder:
        count = soak(folder, args.kills, args.seed)
    damaged, processes = count.pop("damaged"), count.pop("together")
    found = {"kills": sum(count.values()), "of": count, "together": processes, "damaged": damaged}
    print(json.dumps({**found, "seconds": round(time.monotonic() - start)}))


if __name__ == "__main__":
    main()
