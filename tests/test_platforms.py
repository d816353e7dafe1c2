"""Windows, macOS and musl as far as they can be imitated here: what they lack, refuse and name otherwise."""

import ctypes
import errno
import multiprocessing
import ntpath
import os
import pathlib
import platform
import subprocess
import sys
import time
from pathlib import Path, PureWindowsPath

import filelock
import optuna
import pytest
import torch

from sdgen_lib import course as courses
from sdgen_lib.config.settings import resolve
from sdgen_lib.machine import allocator, devices
from sdgen_lib.search.study import keep, open_study, resume_study
from sdgen_lib.store import files
from sdgen_lib.store.run import Run, Step, run_path

ROOT = Path(__file__).parents[1]
needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="looks open files up in /proc")


# --- files as Windows has them ---


def held(path) -> bool:
    """Whether this process has ``path`` open or mapped."""
    path = os.path.realpath(path)
    descriptors = (f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd"))
    if any(os.path.exists(d) and os.path.realpath(d) == path for d in descriptors):
        return True
    return any(line.rstrip().endswith(path) for line in open("/proc/self/maps"))


@pytest.fixture
def windows_files(monkeypatch):
    """Files that are open or mapped can be neither replaced nor deleted, no folder be replaced or opened.

    Only what may be written can be synced, and text files end their lines with two characters.
    """
    fsync, replace, unlink, opened = os.fsync, os.replace, os.unlink, os.open

    def strict_fsync(descriptor):
        flags = int(open(f"/proc/self/fdinfo/{descriptor}").read().split("flags:")[1].split()[0], 8)
        if flags & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        fsync(descriptor)

    def strict_replace(source, target):
        if os.path.isdir(target) or any(os.path.exists(path) and held(path) for path in (source, target)):
            raise PermissionError(errno.EACCES, "The process cannot access the file", str(source), None, str(target))
        replace(source, target)

    def strict_unlink(path, **options):
        probe = os.path.basename(path).startswith(".filelock-probe")  # of filelock's part for Linux and macOS
        if os.path.exists(path) and held(path) and not probe:
            raise PermissionError(errno.EACCES, "The process cannot access the file", str(path))
        unlink(path, **options)

    def strict_open(path, *options, **named):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opened(path, *options, **named)

    def write_text(self, data, encoding=None, errors=None, newline=None):
        with open(self, "w", encoding=encoding or "cp1252", errors=errors, newline=newline or "\r\n") as file:
            return file.write(data)

    monkeypatch.setattr(os, "fsync", strict_fsync)
    monkeypatch.setattr(os, "replace", strict_replace)
    monkeypatch.setattr(os, "unlink", strict_unlink)
    monkeypatch.setattr(os, "open", strict_open)
    monkeypatch.setattr(pathlib.Path, "write_text", write_text)
    monkeypatch.setattr(files, "WINDOWS", True)


@needs_proc
def test_files_and_folders_are_written_and_replaced(tmp_path, windows_files):
    for value in ({"a": 1}, {"a": "é"}):
        files.save_json(tmp_path / "a.json", value)
        assert files.load_json(tmp_path / "a.json") == value
    assert b"\r" not in (tmp_path / "a.json").read_bytes()  # its sum is the same everywhere
    (tmp_path / "empty").mkdir()
    with files.whole_folder(tmp_path / "empty") as folder:
        (folder / "b").write_bytes(b"b")
    assert [path.name for path in (tmp_path / "empty").iterdir()] == ["b"]


@needs_proc
def test_tensors_that_were_read_do_not_hold_their_file(tmp_path, windows_files):
    """A killed training goes on from a state that each of its epochs then replaces."""
    path = tmp_path / ".state.safetensors"
    files.save_tensors(path, {"x": torch.ones(100_000)})
    state = files.load_tensors(path)
    files.save_tensors(path, {"x": 2 * state["x"]})
    assert files.load_tensors(path)["x"].eq(2).all() and state["x"].eq(1).all()


@needs_proc
def test_a_run_and_its_searches_live_with_that(tmp_path, windows_files):
    run = Run(resolve(recipe="demo", backbone="tiny"), tmp_path / "run", {})
    step = Step("a", lambda folder, settings: files.save_json(folder / "b.json", 1) or {})
    assert files.load_json(run.file(step, "b.json")) == 1
    run.file(step, "b.json").write_bytes(b"damaged")
    run._seen_whole.clear()
    assert files.load_json(run.file(step, "b.json")) == 1
    study = resume_study(tmp_path / "journal.log", "step 2")
    study.add_trial(optuna.trial.create_trial(value=1.0))
    study.ask()  # half done: the journal is written anew
    assert len(resume_study(tmp_path / "journal.log", "step 2").trials) == 1
    shared = open_study(f"sqlite:///{tmp_path}/search.db", "step 2")
    shared.add_trials(optuna.trial.create_trial(value=float(k)) for k in range(3))
    assert [t.value for t in keep(shared, tmp_path / "kept.log", 2).trials] == [0.0, 1.0]


@needs_proc
def test_a_lock_that_is_held_is_never_deleted(tmp_path, windows_files):
    with files.lock(tmp_path / ".a.lock"):
        files.remove_leftovers(tmp_path)
        assert (tmp_path / ".a.lock").exists()
    with files.lock(tmp_path / ".a.lock"):
        pass


@pytest.mark.parametrize("refusals", [1, 3])
def test_a_file_that_someone_reads_is_replaced_as_soon_as_they_have(tmp_path, monkeypatch, refusals):
    replace, refused = os.replace, []

    def busy(source, target):
        if len(refused) < refusals:
            refused.append(target)
            raise PermissionError(errno.EACCES, "The process cannot access the file")
        replace(source, target)

    files.save_json(tmp_path / "a.json", 1)
    monkeypatch.setattr(files, "WINDOWS", True)
    monkeypatch.setattr(os, "replace", busy)
    files.save_json(tmp_path / "a.json", 2)
    assert files.load_json(tmp_path / "a.json") == 2 and len(refused) == refusals


def test_a_file_that_is_read_for_ever_is_an_error_that_says_so(tmp_path, monkeypatch):
    def busy(source, target):
        raise PermissionError(errno.EACCES, "The process cannot access the file")

    monkeypatch.setattr(files, "WINDOWS", True)
    monkeypatch.setattr(os, "replace", busy)
    start = time.perf_counter()
    with pytest.raises(OSError, match="a.json could not be written .*cannot access the file"):
        files.save_json(tmp_path / "a.json", 2)
    assert time.perf_counter() - start < 5 and not list(tmp_path.iterdir())


def test_a_file_that_is_just_being_replaced_can_be_read(tmp_path, monkeypatch):
    files.save_json(tmp_path / "a.json", 1)
    read, refused = Path.read_bytes, []

    def busy(self):
        if not refused:
            refused.append(self)
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return read(self)

    monkeypatch.setattr(files, "WINDOWS", True)
    monkeypatch.setattr(Path, "read_bytes", busy)
    assert files.load_json(tmp_path / "a.json") == 1 and refused


def test_elsewhere_a_missing_permission_is_asked_for_once():
    asked = []

    def refused():
        asked.append(1)
        raise PermissionError

    with pytest.raises(PermissionError):
        files.patiently(refused)
    assert len(asked) == 1


def test_a_path_that_is_too_long_for_windows_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "WINDOWS", True)
    path = tmp_path / ("d" * 200) / ("f" * 80)

    def write(path):
        with files.whole_file(path):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))

    with pytest.raises(OSError, match=rf"its path has {len(str(path))} characters, and Windows takes 259.*runs_dir"):
        write(path)
    with pytest.raises(OSError, match=r"\(No such file or directory\): make room"):
        write(tmp_path / "short")


# --- names and paths ---

NAMES = [
    "con",
    "NUL",
    "aux.npz",
    "Com1",
    "lpt9.old.npz",
    "prn ",
    "my set.",
    "a  ",
    "a:b",
    "a/b\\c",
    "what?*",
    "<x>|",
    "a\tb",
]
NAMES += ['say "a"', "conin", "console", "COM0", "com²", "a.b", "数字", "", "...", " .", "con .txt"]


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_made_one_that_windows_allows(name):
    found = files.portable(name)
    assert found and not PureWindowsPath(found).is_reserved()
    assert PureWindowsPath(found).name == found  # one part, no drive
    assert not set(found) & set('<>:"/\\|?*') and found.isprintable() and not found.endswith((".", " "))
    assert files.portable(found) == found


@pytest.mark.parametrize(
    "name", ["digits", "pathmnist_64", "digits-20", "my set-1a2b3c", "tiny-demo-seed0", "数字", "a.b"]
)
def test_a_name_that_is_allowed_stays(name):
    assert files.portable(name) == name


@pytest.mark.parametrize("slug", ["con", "aux.old", "a:b", "set. "])
@pytest.mark.parametrize("backbone", ["tiny", r"C:\models\sd2", "org/nul", "./con.v1", r"..\a"])
def test_a_runs_folder_has_a_name_that_windows_allows(tmp_path, slug, backbone):
    settings = resolve(recipe="demo", backbone=backbone, runs_dir=str(tmp_path))
    parts = run_path(settings, slug).relative_to(tmp_path).parts
    assert len(parts) == 2
    assert all(part == files.portable(part) and not PureWindowsPath(part).is_reserved() for part in parts)


def test_two_backbones_of_one_name_in_windows_folders_do_not_share_a_run(tmp_path):
    found = {
        run_path(resolve(recipe="demo", backbone=name, runs_dir=str(tmp_path)), "digits")
        for name in (r"C:\here\model", r"C:\there\model", r"D:\here\model")
    }
    assert len(found) == 3 and all(path.name.startswith("model-") for path in found)


def test_runs_on_another_drive_are_shown_in_full(monkeypatch):
    """As `ntpath` does it; the first cell of every chapter prints the path."""
    with pytest.raises(ValueError, match="drive|mount"):
        ntpath.relpath(r"D:\runs", r"C:\notebooks")

    def relpath(path):
        return ntpath.relpath(path, r"C:\notebooks")

    monkeypatch.setattr(os.path, "relpath", relpath)
    assert courses._shortest(PureWindowsPath(r"D:\runs\digits")) == r"D:\runs\digits"
    assert courses._shortest(PureWindowsPath(r"C:\notebooks\runs")) == "runs"


# --- what a system lacks ---


@pytest.mark.parametrize("lacks", ["library", "function", "program"])
def test_memory_is_left_alone_where_there_is_no_glibc(monkeypatch, lacks):
    """Windows cannot open "no library", musl's has no mallopt, and a program of its store cannot be read."""

    def cdll(name):
        if lacks == "library":
            raise TypeError("argument of type 'NoneType' is not iterable")
        return object()

    def libc_ver():
        if lacks == "program":
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        return "glibc", "2.99"

    monkeypatch.setattr(ctypes, "CDLL", cdll)
    monkeypatch.setattr(platform, "libc_ver", libc_ver)
    allocator.keep_freed_memory()


def test_the_processor_is_not_asked_where_nothing_tells_of_it(monkeypatch):
    def read_text(self, *options, **named):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))

    monkeypatch.setattr(Path, "read_text", read_text)
    devices._cpu_computes_bf16.cache_clear()
    try:
        assert devices.compute_dtype("auto", "cpu") == torch.float32
    finally:
        devices._cpu_computes_bf16.cache_clear()


IMITATION = '''
"""A system without glibc, /proc, fcntl, resource, fork and the functions of os that only some have."""
import io, os, pathlib, platform, signal, sys, warnings

# These take this system for the Linux that it is.
import accelerate, numpy, optuna, pandas, peft, psutil, sklearn.datasets, torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None
for name in ("sched_getaffinity", "uname", "fork", "getuid", "geteuid", "setsid", "getpgid", "killpg"):
    if hasattr(os, name):
        delattr(os, name)
for name in ("SIGKILL", "SIGHUP", "SIGUSR1", "SIGALRM"):
    delattr(signal, name)
platform.libc_ver = lambda *_: ("", "")
real_open = pathlib.Path.open
def path_open(self, *options, **named):
    if str(self).startswith("/proc"):
        raise FileNotFoundError(2, "No such file or directory", str(self))
    return real_open(self, *options, **named)
pathlib.Path.open = path_open
warnings.filterwarnings("error", category=EncodingWarning, module="sdgen_lib")

import small
from sdgen_lib.config.settings import resolve
from sdgen_lib.course import Course

data, runs_dir = sys.argv[1:]
small.write_dataset(pathlib.Path(data))
course = Course(resolve(dataset=data, runs_dir=runs_dir, **{**small.SMALL, "classifier_epochs": 1}))
print(course)
print(course.cas("after 2")["test"], course.synthetic(1).images.shape)
'''


@pytest.mark.slow
def test_a_run_where_much_is_missing(tmp_path):
    """From the data to a row of table 1 and a synthetic set; what it leaves has names that every system allows."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    environment["PYTHONIOENCODING"] = "cp1252"  # the bars, the lines before each step
    command = [sys.executable, "-X", "warn_default_encoding", "-c", IMITATION]
    done = subprocess.run(
        [*command, str(tmp_path / "Con.npz"), str(tmp_path / "runs")],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        encoding="cp1252",
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "torch.Size([6, 3, 8, 8])" in done.stdout
    made = list((tmp_path / "runs").rglob("*"))
    assert any(path.name == "record.json" for path in made)
    for path in made:
        assert path.name == files.portable(path.name) and not PureWindowsPath(path.name).is_reserved()
        assert len(str(path.relative_to(tmp_path))) < 160  # of the 259 that Windows takes, without long paths
    assert len({str(path).casefold() for path in made}) == len(made)


# --- processes that are started anew ---


def ask(folder, log):
    """Asks for a result that takes a while, in a process that was not forked."""

    def make(folder, settings):
        with open(log, "a", encoding="utf-8") as file:
            file.write("made\n")
        time.sleep(0.5)
        return {"pid": os.getpid()}

    run = Run(resolve(recipe="demo", backbone="tiny"), Path(folder), {})
    return run.result(Step("a", make)).facts["pid"]


@pytest.mark.slow
def test_spawned_processes_make_a_result_once(tmp_path):
    """As on Windows and macOS, where a new process imports everything itself."""
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        pids = pool.starmap(ask, [(str(tmp_path / "run"), str(tmp_path / "log"))] * 2, chunksize=1)
    assert pids[0] == pids[1] and (tmp_path / "log").read_text(encoding="utf-8") == "made\n"


def test_locks_are_the_systems_own():
    """A lock that is only a file would outlive a killed process."""
    assert filelock.FileLock is not filelock.SoftFileLock
