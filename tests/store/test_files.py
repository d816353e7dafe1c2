"""Files appear whole or not at all; locks end with their process."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sdgen_lib.store import files


def test_whole_file_appears_at_the_end(tmp_path):
    path = tmp_path / "new" / "file.txt"
    with files.whole_file(path) as temporary:
        assert temporary.parent == path.parent  # the same disk: the last move is atomic
        temporary.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new" and [p.name for p in path.parent.iterdir()] == ["file.txt"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_whole_file_keeps_the_old_content_when_the_writer_fails(tmp_path, error):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(error), files.whole_file(path) as temporary:
        temporary.write_text("half of the n")
        raise error
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["file.txt"]


def test_a_file_is_synced_through_a_handle_that_may_write(tmp_path, monkeypatch):
    """As Windows asks for: there, syncing a file that was opened to be read is an error."""
    sync = os.fsync

    def strict(descriptor):
        if not os.path.isdir(f"/proc/self/fd/{descriptor}"):
            flags = int(open(f"/proc/self/fdinfo/{descriptor}").read().split("flags:")[1].split()[0], 8)
            if flags & os.O_ACCMODE == os.O_RDONLY:
                raise OSError(errno.EBADF, "Bad file descriptor")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", strict)
    files.save_json(tmp_path / "a.json", 1)
    assert files.load_json(tmp_path / "a.json") == 1


def test_a_failing_save_leaves_the_old_file(tmp_path):
    files.save_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(TypeError):
        files.save_json(tmp_path / "a.json", {"x": object()})
    files.save_tensors(tmp_path / "a.safetensors", {"x": torch.ones(2)})
    shared = torch.ones(2)
    with pytest.raises(RuntimeError):
        files.save_tensors(tmp_path / "a.safetensors", {"x": shared, "y": shared})  # safetensors refuses shared memory
    assert files.load_json(tmp_path / "a.json") == {"x": 1}
    assert load_file(tmp_path / "a.safetensors")["x"].tolist() == [1, 1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "a.safetensors"]


def test_round_trips(tmp_path):
    tensors = {
        "half": torch.randn(3, 4).half(),
        "number": torch.tensor(7),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "strided": torch.arange(6.0).view(2, 3).T,
        "learnt": torch.nn.Parameter(torch.randn(2)),
    }
    files.save_tensors(tmp_path / "a.safetensors", tensors, {"note": "x"})
    found = files.load_tensors(tmp_path / "a.safetensors")
    assert set(found) == set(tensors)
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value.detach())
    value = {"list": [1, 2.5, None, True], "text": "é", "seven": 1 / 7}
    files.save_json(tmp_path / "a.json", value)
    assert files.load_json(tmp_path / "a.json") == value == json.loads((tmp_path / "a.json").read_text())


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 10**5])
def test_json_that_cannot_be_read_is_left_as_it_is(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    assert files.load_json(tmp_path / "a.json", "nothing") == "nothing"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"] and (tmp_path / "a.json").read_bytes() == content


def test_damaged_tensors_are_moved_aside(tmp_path, capsys):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"no tensors")
    with pytest.raises(files.DamagedFile, match="run this again to remake it"):
        files.load_tensors(path)
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors.damaged"]
    assert "a.safetensors is damaged" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError):
        files.load_tensors(path)


def test_weights_may_be_read_by_whom_other_files_may_be_read(tmp_path):
    files.save_json(tmp_path / "a.json", 1)
    files.save_tensors(tmp_path / "a.safetensors", {"x": torch.ones(2)})
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "a.json").stat().st_mode


def test_a_whole_folder_replaces_nothing(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    for name in ("new", "empty"):
        with files.whole_folder(tmp_path / name) as folder:
            (folder / "a").write_text("a")
        assert (tmp_path / name / "a").read_text() == "a"
    with pytest.raises(FileExistsError, match="is already there"), files.whole_folder(tmp_path / "full"):
        pass
    with pytest.raises(RuntimeError), files.whole_folder(tmp_path / "failed"):
        raise RuntimeError
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "full", "new"]


# --- disks ---


@pytest.fixture
def small_files():
    """No file of more than 20 000 bytes can be written: what a full disk or a quota does, without one."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_disk_that_takes_no_more_says_so_and_keeps_what_is_there(tmp_path, small_files):
    path = tmp_path / "epoch_001.safetensors"
    files.save_tensors(path, {"x": torch.ones(3)})
    before = path.read_bytes()
    with pytest.raises(OSError, match="epoch_001.safetensors could not be written .*make room") as error:
        files.save_tensors(path, {"x": torch.ones(30_000)})
    assert "\n" not in str(error.value)
    with pytest.raises(OSError, match="history.json could not be written .*make room"):
        files.save_json(path.with_name("history.json"), list(range(30_000)))
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_the_systems_own_reason_is_kept(tmp_path, number):
    with pytest.raises(OSError, match="a.json could not be written") as error, files.whole_file(tmp_path / "a.json"):
        raise OSError(number, os.strerror(number))
    assert error.value.errno == number and os.strerror(number) in str(error.value)


# --- reading while writing ---


def refusing(number):
    yield np.zeros((1, 2), np.uint8)
    raise OSError(number, os.strerror(number))


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.ENOENT])
def test_an_error_of_the_pieces_is_not_said_to_be_one_of_writing(tmp_path, number):
    path = tmp_path / "images.npz"
    with (
        pytest.raises(OSError, match=os.strerror(number)) as error,
        files.whole_file(path) as temporary,
        zipfile.ZipFile(temporary, "w") as archive,
    ):
        files.write_npy(archive, "images", np.uint8, (2, 2), refusing(number))
    assert "could not be written" not in str(error.value) and not list(tmp_path.iterdir())


def test_an_error_of_another_file_names_that_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="part_00001") as error, files.whole_file(tmp_path / "out" / "a.json"):
        (tmp_path / "out" / "part_00001.npz").read_bytes()
    assert "could not be written" not in str(error.value)


def test_a_full_disk_while_pieces_are_written_is_one_of_writing(tmp_path, small_files):
    pieces = (np.zeros((1, 10_000), np.uint8) for _ in range(5))
    with (
        pytest.raises(OSError, match="images.npz could not be written .*make room"),
        files.whole_file(tmp_path / "images.npz") as temporary,
        zipfile.ZipFile(temporary, "w") as archive,
    ):
        files.write_npy(archive, "images", np.uint8, (5, 10_000), pieces)


def test_json_that_is_far_too_large_is_not_read(tmp_path):
    path = tmp_path / "record.json"
    path.write_bytes(b'{"a": 1}')
    with open(path, "rb+") as file:
        file.truncate(files.LARGEST_JSON)
        assert files.load_json(path, "nothing") == "nothing"  # zeros are no JSON
        file.seek(0)
        file.write(b'{"a": 1' + b" " * (files.LARGEST_JSON - 8) + b"}")
        file.flush()
        assert files.load_json(path) == {"a": 1}
        file.write(b" ")
    assert files.load_json(path, "nothing") == "nothing"


# --- locks ---

HOLD = """
import sys, time
import filelock
with filelock.FileLock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def holder(path, seconds):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path), str(seconds)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    return process


def test_a_second_process_says_that_it_waits_and_then_goes_on(tmp_path, capsys):
    process = holder(tmp_path / "a.lock", 1)
    with files.lock(tmp_path / "a.lock", "1_transfer"):
        assert process.wait(5) == 0
    assert "Waiting: another process is working on 1_transfer ..." in capsys.readouterr().out


def test_the_lock_of_a_killed_process_is_free(tmp_path, capsys):
    process = holder(tmp_path / "a.lock", 1000)
    process.send_signal(signal.SIGKILL)
    process.wait()
    start = time.monotonic()
    with files.lock(tmp_path / "a.lock", "1_transfer"):
        assert time.monotonic() - start < 5
    assert "Waiting" not in capsys.readouterr().out


def test_only_what_killed_writers_left_is_cleared(tmp_path):
    kept = [tmp_path / name for name in ("epoch_001.safetensors", ".hidden", ".gitignore", "a.77")]
    left = [tmp_path / ".epoch_002.safetensors.4711", tmp_path / ".tmpA1b2C3"]  # the second is safetensors' own
    for path in kept + left:
        path.write_text("x")
    files.remove_leftovers(tmp_path)
    assert all(p.exists() for p in kept) and not any(p.exists() for p in left)
