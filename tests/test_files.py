"""Damage is noticed, moved aside and repaired; locks end with their process; a full disk says so."""

import errno
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch

from sdgen_lib import files, runs
from sdgen_lib.settings import resolve


@pytest.fixture
def run(tmp_path):
    made = runs.Run(resolve(recipe="demo", backbone="tiny", runs_dir=str(tmp_path)), "digits")
    made.folder("1_transfer")
    return made


def flip(path, at=-3):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_the_manifest_holds_the_checksum_that_sha256sum_computes(run):
    path = run.folder("1_transfer") / "epoch_001.safetensors"
    files.save_tensors(path, {"x": torch.ones(3)})
    told = subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True).stdout.split()[0]
    assert run.manifest["files"] == {"1_transfer/epoch_001.safetensors": [told]}


def test_weights_may_be_read_by_whom_other_files_may_be_read(run):
    files.save_json(run.path / "a.json", 1)
    files.save_tensors(run.path / "a.safetensors", {"x": torch.ones(3)})
    assert (run.path / "a.safetensors").stat().st_mode == (run.path / "a.json").stat().st_mode


def test_a_flipped_bit_is_noticed_and_the_file_moved_aside(run, capsys):
    path = run.folder("1_transfer") / "epoch_001.safetensors"
    files.save_tensors(path, {"x": torch.ones(3)})
    assert files.load_tensors(path)["x"].tolist() == [1, 1, 1]
    flip(path)  # still a .safetensors file that loads
    with pytest.raises(files.DamagedFile, match="epoch_001.safetensors was damaged"):
        files.load_tensors(path)
    assert [p.name for p in path.parent.iterdir()] == ["epoch_001.safetensors.damaged"]
    assert "epoch_001.safetensors is damaged; it was moved aside" in capsys.readouterr().out


def test_a_damaged_table_reads_as_none_there(run):
    path = run.path / "table_1.json"
    files.save_json(path, {"after 1": 0.123})
    path.write_text(path.read_text().replace("0.123", "0.923"))
    assert files.load_json(path, {}) == {}
    assert json.loads((run.path / "table_1.json.damaged").read_text()) == {"after 1": 0.923}


def test_without_a_manifest_what_cannot_be_read_is_damaged(tmp_path):
    (tmp_path / "a.json").write_text('{"x": ')
    assert files.load_json(tmp_path / "a.json", 7) == 7
    (tmp_path / "a.safetensors").write_bytes(b"hello")
    with pytest.raises(files.DamagedFile):
        files.load_tensors(tmp_path / "a.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json.damaged", "a.safetensors.damaged"]
    with pytest.raises(FileNotFoundError, match="b.safetensors"):
        files.load_tensors(tmp_path / "b.safetensors")


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b'{"steps": []}', b'{"steps": {"1_transfer": 3}}', b'{"files": {"a": "b"}}',
                b"\xff\xfe\x00", b"[" * 100_000]
)  # fmt: skip
def test_a_damaged_manifest_is_moved_aside(run, content):
    (run.path / "manifest.json").write_bytes(content)
    assert run.manifest == {"steps": {}, "files": {}} and not run.is_done("1_transfer")
    assert (run.path / "manifest.json.damaged").read_bytes() == content


def test_a_kill_between_checksum_and_rename_leaves_the_old_file_whole(run, monkeypatch):
    path = run.path / "table_1.json"
    files.save_json(path, {"a": 1})
    replace = os.replace

    def killed(source, target):
        if target == path:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            files.save_json(path, {"a": 2})
    assert files.load_json(path) == {"a": 1}
    files.save_json(path, {"a": 2})
    assert files.load_json(path) == {"a": 2}


def test_a_step_with_a_file_missing_or_damaged_is_not_done(run):
    path = run.folder("1_transfer") / "epoch_001.safetensors"
    for lose in (path.unlink, lambda: (flip(path), files.is_whole(path))):
        files.save_tensors(path, {"x": torch.ones(3)})
        run.record("1_transfer", 1)
        assert run.is_done("1_transfer")
        lose()
        assert not run.is_done("1_transfer")


def test_a_discarded_file_is_not_missed(run):
    path = run.folder("1_transfer") / "state.safetensors"
    files.save_tensors(path, {"x": torch.ones(3)})
    files.save_json(path.with_name("history.json"), [1])
    run.record("1_transfer", 1)
    files.discard(path)
    assert run.is_done("1_transfer") and "1_transfer/state.safetensors" not in run.manifest["files"]


# --- disks ---


@pytest.fixture
def small_files():
    """No file of more than 20 000 bytes can be written: what a full disk or a quota does, without one."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_disk_that_takes_no_more_says_so_and_keeps_what_is_there(run, small_files):
    path = run.folder("1_transfer") / "epoch_001.safetensors"
    files.save_tensors(path, {"x": torch.ones(3)})
    before = path.read_bytes()
    with pytest.raises(OSError, match="epoch_001.safetensors could not be written .*make room") as error:
        files.save_tensors(path, {"x": torch.ones(30_000)})
    assert "\n" not in str(error.value)
    with pytest.raises(OSError, match="history.json could not be written .*make room"):
        files.save_json(path.with_name("history.json"), list(range(30_000)))
    assert path.read_bytes() == before and files.is_whole(path)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_the_systems_own_reason_is_kept(tmp_path, number):
    with pytest.raises(OSError, match="a.json could not be written") as error, files.whole_file(tmp_path / "a.json"):
        raise OSError(number, os.strerror(number))
    assert error.value.errno == number and os.strerror(number) in str(error.value)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    for where in (tmp_path / "file", "/proc/sdgen", "/dev/null/x"):
        with pytest.raises(OSError, match="cannot be made .*give another runs_dir"):
            runs.Run(resolve(recipe="demo", backbone="tiny", runs_dir=str(where)), "digits")


# --- locks ---

HOLD = """
import sys, time
from pathlib import Path
import filelock
with filelock.FileLock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def holder(path, seconds):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path), str(seconds)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    return process


def test_a_second_process_says_that_it_waits_and_then_goes_on(run, capsys):
    process = holder(run.path.with_name(f".{run.path.name}.1_transfer.lock"), 1)
    with run.lock("1_transfer"):
        assert process.wait(5) == 0
    assert f"Waiting: another process is working on 1_transfer in {run.path} ..." in capsys.readouterr().out


def test_the_lock_of_a_killed_process_is_free(run, capsys):
    process = holder(run.path.with_name(f".{run.path.name}.1_transfer.lock"), 1000)
    process.send_signal(signal.SIGKILL)
    process.wait()
    start = time.monotonic()
    with run.lock("1_transfer"):
        assert time.monotonic() - start < 5
    assert "Waiting" not in capsys.readouterr().out


def test_who_holds_a_lock_clears_what_killed_writers_left_there_and_nothing_else(run):
    step, other = run.folder("1_transfer"), run.folder("2_tune")
    kept = [step / "epoch_001.safetensors", step / ".hidden", other / ".journal.log.77", run.path / ".table_1.json.77"]
    left = [step / ".epoch_002.safetensors.4711", step / ".tmpA1b2C3"]  # the second is safetensors' own
    for path in kept + left:
        path.write_text("x")
    with run.lock("1_transfer"):
        assert all(p.exists() for p in kept) and not any(p.exists() for p in left)


def test_many_writers_lose_no_entry_of_the_manifest(run):
    children = []
    for k in range(4):
        if (child := os.fork()) == 0:
            for n in range(10):
                files.save_json(run.path / f"{k}_{n}.json", [k, n])
            os._exit(0)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    noted = run.manifest["files"]
    assert len(noted) == 40
    for name, sums in noted.items():
        assert sums == [hashlib.sha256((run.path / name).read_bytes()).hexdigest()]


# --- links ---


def test_a_link_that_leads_out_of_the_run_folder_is_refused(run, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    settings = run.settings
    link = run.path / "2_tune"
    link.symlink_to(outside)
    with pytest.raises(ValueError, match="2_tune is a link that leads out of"):
        runs.Run(settings, "digits")
    link.unlink()
    link.symlink_to(run.path / "1_transfer")  # one inside is no harm
    runs.Run(settings, "digits")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "digits").symlink_to(outside)
    with pytest.raises(ValueError, match="leads out of"):
        runs.Run(resolve(recipe="demo", backbone="tiny", runs_dir=str(tmp_path / "runs")), "digits")
    assert list(outside.iterdir()) == []
