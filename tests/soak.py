"""Kills every step of a very small run at random moments, lets it go on, and compares it with an unbroken run.

    python -m tests.soak --kills 300

Each attempt at a step is a process of its own, forked from this one, which has everything imported and the model
loaded. It is ended by SIGKILL, either just before a random one of the calls by which Python opens, renames, makes or
deletes files, or after a random time. Then a new process goes on, is killed again, and so on; at last one is let
through. What it leaves must be what the unbroken run left: checkpoints, images, trials, tables and the manifest, but
for clocks. So it must be when three processes do the run in one folder at the same time, and when one file of each
kind is damaged by a bit: who needs it has to move it aside and to make it again.
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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import optuna
import torch

from sdgen_lib import backbone, course, settings

# What a run is made of, in order; each needs those before it.
STEPS: dict[str, Callable[[course.Course], object]] = {
    "latents": lambda c: c.latents,
    "1_transfer": lambda c: c.transfer(),
    "2_tune": lambda c: c.search(),
    "3_finetune": lambda c: c.finetune(),
    "4_retune": lambda c: c.research(),
    "table_1": lambda c: [c.cas(row) for row in course.ROWS],
    "5_datasets": lambda c: c.scaling(),
}
DAMAGED = ("latents.safetensors", "1_transfer/epoch_003.safetensors", "1_transfer/history.json", "2_tune/journal.log",
           "3_finetune/history.json", "3_finetune/epoch_{best}.safetensors", "4_retune/journal.log",
           "5_datasets/block_01.npz", "5_datasets/block_02.json", "table_1.json", "manifest.json")  # fmt: skip
FILE_EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")
CLOCKS = ("seconds", "generation_seconds", "finished")
SMALL = dict(
    backbone="tiny", recipe="demo", precision="fp32", transfer_epochs=3, finetune_epochs=2, transfer_batch_size=4,
    finetune_batch_size=4, sample_batch_size=4, n_trials=6, num_images=6, steps_min=1, steps_max=2, default_steps=2,
    classifier_width=4, classifier_epochs=4, classifier_batch_size=4, classifier_epoch_images=1, classifier_seeds=2,
    max_multiple=2,
)  # fmt: skip


def write_dataset(path: Path) -> None:
    """Two classes, dark and bright, 8 pixels: 6 images to train on, 4 to validate, 4 to test."""
    noise, parts = np.random.default_rng(0), {}
    for part, count in (("train", 6), ("val", 4), ("test", 4)):
        labels = np.arange(count) % 2
        parts[f"{part}_labels"] = labels
        parts[f"{part}_images"] = (noise.integers(0, 100, (count, 8, 8)) + 120 * labels[:, None, None]).astype(np.uint8)
    np.savez(path, **parts)


def in_a_process(work: Callable[[], object], kill_after_events: int | None = None, kill_after_s: float | None = None):
    """Runs ``work()`` in a fork of this process. (how it ended: 0, or a negative signal; file events; seconds)."""
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        status = 1
        try:
            events, kill = 0, os.kill
            pid = os.getpid()

            def count(event: str, _) -> None:
                nonlocal events
                if event in FILE_EVENTS:
                    if events == kill_after_events:
                        kill(pid, signal.SIGKILL)
                    events += 1

            sink = os.open(os.devnull, os.O_WRONLY)
            os.dup2(sink, 1)  # progress bars and reports of damage; errors stay
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


# --- what a run has left ---


def without_clocks(value):
    if isinstance(value, dict):
        return {key: without_clocks(item) for key, item in value.items() if key not in CLOCKS}
    return [without_clocks(item) for item in value] if isinstance(value, list) else value


def trials_of(journal: Path) -> list:
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(journal)))
    name = optuna.get_all_study_names(storage)[0]
    return [(t.number, t.state.name, t.params, t.value, t.intermediate_values, without_clocks(t.user_attrs))
            for t in optuna.load_study(study_name=name, storage=storage).get_trials(deepcopy=False)]  # fmt: skip


def state_of(folder: Path) -> dict[str, object]:
    """Every file of a run folder by its name: its bytes, or what it says but clocks (trials, tables, manifest)."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() or path.suffix == ".lock":
            continue
        if path.name == "journal.log":
            found[name] = trials_of(path)
        elif path.suffix == ".json":
            found[name] = without_clocks(json.loads(path.read_text()))
        else:
            found[name] = path.read_bytes()
    # Of which files the manifest has sums; that these are right shows where they are read again.
    found["manifest.json"] = {**found["manifest.json"], "files": sorted(found["manifest.json"]["files"])}
    return found


def differences(found: dict[str, object], expected: dict[str, object]) -> list[str]:
    return [name for name in sorted({**found, **expected}) if found.get(name) != expected.get(name)]


# --- the soak ---


def run_folder(folder: Path) -> Path:
    (found,) = (folder / "runs").glob("*/*/")
    return found


def attempts(folder: Path) -> Callable[..., Callable[[], None]]:
    """``attempts(folder)(step, ..)`` -> a function that does these steps of the run in ``folder``."""
    torch.set_num_threads(1)  # a fork inherits no threads, and sums would be in another order
    write_dataset(folder / "small.npz")
    model = backbone.load("tiny", device="cpu", precision="fp32")

    def attempt(*steps: str, **changes) -> Callable[[], None]:
        def work() -> None:
            asked = settings.resolve(
                **SMALL, **changes, dataset=str(folder / "small.npz"), runs_dir=str(folder / "runs")
            )
            made = course.Course(asked)
            made.backbone = model
            for step in steps:
                STEPS[step](made)

        return work

    return attempt


def damage(folder: Path, attempt: Callable[..., Callable[[], None]], report: Callable[[str], None]) -> int:
    """Flips a bit in one file of each kind in a finished run and asks for everything again; how many files."""
    whole, run = folder / "before" / "damage", run_folder(folder)
    shutil.rmtree(whole, ignore_errors=True)
    shutil.copytree(folder / "runs", whole)
    expected = state_of(run)
    best = expected["manifest.json"]["steps"]["4_retune"]["best"]["epoch"]
    for name in DAMAGED:
        name = name.format(best=f"{best:03d}")
        shutil.rmtree(folder / "runs")
        shutil.copytree(whole, folder / "runs")
        if name != "table_1.json":
            (run / "table_1.json").unlink()  # else nothing but the tables would be read
        (run / "table_2.json").unlink()
        content = bytearray((run / name).read_bytes())
        content[len(content) // 2] ^= 1
        if name == "manifest.json":  # which has no checksum of its own
            del content[len(content) // 2 :]
        (run / name).write_bytes(content)
        ended, *_ = in_a_process(attempt(*STEPS))
        assert ended == 0, f"a damaged {name} ended the run"
        found = state_of(run)
        assert found.pop(f"{name}.damaged") is not None
        if name == "manifest.json":  # with it the checksums of what is not made again are gone
            found[name]["files"] = expected[name]["files"]
        assert not (wrong := differences(found, expected)), f"a damaged {name} led to other {', '.join(wrong)}"
        report(f"{name}: damaged, and made again the same")
    return len(DAMAGED)


def together(folder: Path, attempt: Callable[..., Callable[[], None]], processes: int = 3) -> int:
    """That many processes do the whole run in one new folder at the same time; it must be as if one had."""
    expected = state_of(run_folder(folder))
    shutil.rmtree(folder / "runs")
    with ThreadPoolExecutor(processes) as pool:  # threads that only wait: each for a process that it forks
        ended = list(pool.map(lambda _: in_a_process(attempt(*STEPS))[0], range(processes)))
    assert ended == [0] * processes, f"{processes} processes on one folder ended with {ended}"
    assert not (wrong := differences(state_of(run_folder(folder)), expected)), f"together they left other {wrong}"
    return processes


def share(folder: Path, attempt: Callable[..., Callable[[], None]], processes: int = 2) -> None:
    """That many processes share the first search; its trials are in the storage and in the run folder."""
    shutil.rmtree(folder / "runs")
    shutil.copytree(folder / "before" / "2_tune", folder / "runs")
    storage = folder / "shared.log"
    with ThreadPoolExecutor(processes) as pool:
        work = attempt("2_tune", storage=str(storage))
        ended = list(pool.map(lambda _: in_a_process(work)[0], range(processes)))
    assert ended == [0] * processes, f"{processes} workers ended with {ended}"
    kept, shared = trials_of(run_folder(folder) / "2_tune" / "journal.log"), trials_of(storage)
    finished = [trial[1:] for trial in shared if trial[1] in ("COMPLETE", "PRUNED")]
    assert len(finished) == SMALL["n_trials"] and [trial[1:] for trial in kept] == finished
    workers = {trial[-1]["worker"] for trial in kept}
    assert len(workers) <= processes and not list(folder.glob(".worker*"))
    assert str(storage) not in (run_folder(folder) / "manifest.json").read_text()


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


def soak(folder: Path, kills: int, seed: int, report: Callable[[str], None] = print) -> dict[str, int]:
    """All of the above; the steps are killed in turn until there were ``kills``.

    Returns how many of each step, and what the rest counted. AssertionError on a difference.
    """
    attempt, runs_dir = attempts(folder), folder / "runs"
    before, after, length = {}, {}, {}
    for step in STEPS:
        before[step] = folder / "before" / step
        if runs_dir.exists():
            shutil.copytree(runs_dir, before[step])
        ended, events, seconds = in_a_process(attempt(step))
        assert ended == 0, f"{step} failed without being killed"
        after[step], length[step] = state_of(run_folder(folder)), (events, seconds)
        report(f"{step}: {seconds:.1f} s and {events} file events unbroken")

    chance, count = random.Random(seed), dict.fromkeys(STEPS, 0)
    while sum(count.values()) < kills:
        for step in STEPS:
            shutil.rmtree(runs_dir, ignore_errors=True)
            if before[step].exists():
                shutil.copytree(before[step], runs_dir)
            events, seconds = length[step]
            story = []
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
            wrong = differences(state_of(run_folder(folder)), after[step])
            assert not wrong, f"after {story} {step} left other {', '.join(wrong)}; see {runs_dir}"
            count[step] += len(story)
    count["together"] = together(folder, attempt)
    report(f"{count['together']} processes at the same time: the same")
    read_only(folder, attempt)
    report("where nothing can be written: read as ever")
    count["damaged"] = damage(folder, attempt, report)
    share(folder, attempt)
    report("2 workers on one search: no trial lost, none done twice")
    shutil.rmtree(runs_dir)
    shutil.copytree(folder / "before" / "damage", runs_dir)  # the whole run, to look at
    return count


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="kept afterwards; without it a temporary one is used")
    args = parser.parse_args(argv)
    start = time.monotonic()
    with contextlib.ExitStack() as stack:
        folder = args.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        count = soak(folder, args.kills, args.seed)
    damaged, processes = count.pop("damaged"), count.pop("together")
    seconds = round(time.monotonic() - start)
    print(json.dumps({"kills": sum(count.values()), "of": count, "together": processes, "damaged": damaged,
                      "seconds": seconds}))  # fmt: skip


if __name__ == "__main__":
    main()
