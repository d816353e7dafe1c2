"""A folder's pictures are decoded once, and never taken from what is not whole or of other content."""

import os
import shutil

import numpy as np
import pytest

from sdgen_lib import data
from sdgen_lib.data import folders, pictures

from .drawn import pictures_of, shade, write


@pytest.fixture
def decoded(monkeypatch):
    """A list that grows by one with each decoded picture."""
    done, decode = [], pictures.decode
    monkeypatch.setattr(pictures, "decode", lambda *args: done.append(0) or decode(*args))
    return done


@pytest.fixture
def pets(tmp_path):
    return pictures_of(tmp_path / "pets", "cat", "dog")


def test_pictures_are_decoded_once(tmp_path, pets, decoded):
    runs = tmp_path / "runs" / "decoded"
    first = data.load(pets, keep_in=runs)
    assert len(decoded) == 8
    for place in (pets, shutil.copytree(pets, tmp_path / "elsewhere" / "pets")):
        again = data.load(place, keep_in=runs)
        assert (again.fingerprint, again.slug) == (first.fingerprint, first.slug) and len(decoded) == 8
    assert data.load(pets).fingerprint == first.fingerprint and len(decoded) == 16  # nothing kept without a folder
    (path,) = runs.iterdir()
    with np.load(path, allow_pickle=False) as file:
        assert file["images"].shape == (8, 32, 32, 3)


def test_other_content_is_decoded(tmp_path, pets, decoded):
    """Also where size and times are those of before."""
    runs, file = tmp_path / "decoded", pets / "cat/1.png"
    found = {data.load(pets, keep_in=runs).fingerprint}
    times = file.stat()
    content = next(new for value in range(11, 256) if len(new := shade(value)) == times.st_size)
    file.write_bytes(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    found.add(data.load(pets, keep_in=runs).fingerprint)
    file.rename(pets / "dog/9.png")
    found.add(data.load(pets, keep_in=runs).fingerprint)
    found.add(data.load(pets, image_size=16, keep_in=runs).fingerprint)
    assert len(found) == 4 and len(decoded) == 32 and len(list(runs.iterdir())) == 4


def damaged(content: bytes) -> dict[str, bytes]:
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 255
    return {"cut off": content[:-50], "changed": bytes(flipped), "empty": b"", "other": b"hello"}


@pytest.mark.parametrize("how", ["cut off", "changed", "empty", "other", "other shape", "other type", "objects"])
def test_what_is_damaged_is_made_again(tmp_path, pets, decoded, how):
    runs = tmp_path / "decoded"
    right = data.load(pets, keep_in=runs).fingerprint
    (path,) = runs.iterdir()
    whole = path.read_bytes()
    arrays = {
        "other shape": np.zeros((7, 32, 32, 3), np.uint8),
        "other type": np.zeros((8, 32, 32, 3), np.int8),
        "objects": np.array([{}] * 8),
    }
    if how in arrays:
        np.savez(path, images=arrays[how])
    else:
        path.write_bytes(damaged(whole)[how])
    assert data.load(pets, keep_in=runs).fingerprint == right and len(decoded) == 16
    assert data.load(pets, keep_in=runs).fingerprint == right and len(decoded) == 16
    assert [p.name for p in runs.iterdir()] == [path.name]


def test_where_nothing_can_be_written_they_are_decoded_again(tmp_path, pets, decoded):
    (tmp_path / "a file").write_text("")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for place in ("a file/decoded", "link"):
        data.load(pets, keep_in=tmp_path / place)
    assert len(decoded) == 16 and not list((tmp_path / "elsewhere").iterdir())


def test_refused_pictures_are_not_kept(tmp_path, pets):
    write(pets, "cat/x.txt", content=b"x")
    with pytest.raises(ValueError, match="x.txt"):
        data.load(pets, keep_in=tmp_path / "decoded")
    assert not (tmp_path / "decoded").exists()


def test_what_changes_while_it_is_read_is_not_kept(tmp_path, pets, monkeypatch):
    decode = pictures.decode

    def meddling(content, size):
        (pets / "dog/3.png").write_bytes(shade(255))
        return decode(content, size)

    monkeypatch.setattr(pictures, "decode", meddling)
    found = data.load(pets, keep_in=tmp_path / "decoded")
    monkeypatch.undo()
    assert not (tmp_path / "decoded").exists() and found.fingerprint == data.load(pets).fingerprint


def test_slow_reading_has_a_bar(pets, monkeypatch, capsys):
    data.load(pets)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(folders, "BAR_AFTER", 0)
    data.load(pets)
    assert "Decoding pets" in capsys.readouterr().err


def test_a_course_keeps_them_beside_its_runs(tmp_path, pets, micro, decoded):
    from sdgen_lib.course import Course

    for seed in (0, 1):
        Course(micro(tmp_path / "runs", dataset=str(pets), seed=seed))
    assert len(decoded) == 8 and len(list((tmp_path / "runs" / "decoded").iterdir())) == 1
