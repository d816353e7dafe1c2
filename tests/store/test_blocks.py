"""A block is the same block whatever the number of ranks, and making more of them takes no more memory."""

import io
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from sdgen_lib.machine.ranks import Ranks
from sdgen_lib.store import blocks

LABELS = torch.arange(23) % 3


class Painter:
    """Pictures that tell their label, their index in the set and the batch they were drawn in."""

    def __init__(self):
        self.drawn = []

    def __call__(self, labels, first):
        self.drawn.append((first, len(labels)))
        images = torch.zeros(len(labels), 3, 8, 8, dtype=torch.uint8)
        images[:, 0], images[:, 2] = labels.view(-1, 1, 1), len(labels)
        images[:, 1] = torch.arange(first, first + len(labels)).view(-1, 1, 1)
        return images


def make(folder, painter, **options):
    folder.mkdir(exist_ok=True)
    blocks.make_block(folder, painter, LABELS, first_index=100, batch_size=4, **options)
    return folder / blocks.BLOCK


def test_a_block_is_drawn_batch_by_batch(tmp_path):
    painter = Painter()
    path = make(tmp_path / "a", painter)
    assert painter.drawn == [(100, 4), (104, 4), (108, 4), (112, 4), (116, 4), (120, 3)]
    images = blocks.load_images(path)
    assert images.dtype == torch.uint8 and images.shape == (23, 3, 8, 8)
    assert images[:, 0, 0, 0].tolist() == LABELS.tolist()
    assert images[:, 1, 0, 0].tolist() == list(range(100, 123))
    with np.load(path, allow_pickle=False) as file:
        np.savez(tmp_path / "numpys.npz", images=file["images"], labels=file["labels"])
        assert (tmp_path / "numpys.npz").read_bytes() == path.read_bytes()
        assert file["labels"].tolist() == LABELS.tolist()
    assert [p.name for p in path.parent.iterdir()] == [blocks.BLOCK]
    make(tmp_path / "a", painter)
    assert len(painter.drawn) == 6  # it is there


@pytest.mark.parametrize("ranks", [2, 3, 6, 9])
def test_ranks_share_a_block(tmp_path, ranks, monkeypatch):
    """One after the other, the first one at last, which is where it waits for the others."""
    monkeypatch.setattr(Ranks, "wait", lambda self: None)
    alone, painters = Painter(), [Painter() for _ in range(ranks)]
    expected = make(tmp_path / "alone", alone).read_bytes()
    for rank in reversed(range(ranks)):
        make(tmp_path / "shared", painters[rank], ranks=Ranks(rank, ranks))
    assert (tmp_path / "shared" / blocks.BLOCK).read_bytes() == expected
    drawn = [batch for painter in painters for batch in painter.drawn]
    assert sorted(drawn) == alone.drawn
    counts = [len(painter.drawn) for painter in painters]
    assert max(counts) - min(counts) <= 1


def stop_in_the_middle(folder):
    """A block whose fourth batch is interrupted."""

    def stopping(labels, first):
        if first == 112:
            raise KeyboardInterrupt
        return Painter()(labels, first)

    with pytest.raises(KeyboardInterrupt):
        make(folder, stopping)


def test_a_block_goes_on_where_it_was_stopped(tmp_path):
    stop_in_the_middle(tmp_path / "a")
    rest, alone = Painter(), Painter()
    assert make(tmp_path / "a", rest).read_bytes() == make(tmp_path / "alone", alone).read_bytes()
    assert rest.drawn == alone.drawn[3:]


@pytest.mark.parametrize("spoil", [lambda b: b[:-1] + b"x", lambda b: b[: len(b) // 2], lambda b: b"", None])
def test_a_damaged_batch_is_drawn_again(tmp_path, spoil):
    stop_in_the_middle(tmp_path / "a")
    shard = tmp_path / "a" / "part_00000004_4.npz"
    content = bytearray(shard.read_bytes())
    content[len(content) // 3] ^= 1  # a pixel: the archive's own sum tells
    shard.write_bytes(spoil(bytes(content)) if spoil else content)
    painter = Painter()
    make(tmp_path / "a", painter)
    assert [first for first, _ in painter.drawn] == [104, 112, 116, 120]


def test_batches_that_outlived_their_block_are_cleared(tmp_path):
    make(tmp_path / "a", Painter())
    for k in (0, 7):
        (tmp_path / "a" / f"part_{k:05d}.npz").write_bytes(b"left by a kill")
    painter = Painter()
    make(tmp_path / "a", painter)
    assert not painter.drawn and [p.name for p in (tmp_path / "a").iterdir()] == [blocks.BLOCK]


MEMORY = """
import json, os, resource, sys
from pathlib import Path
import torch
from sdgen_lib.store import blocks

peaks = []
for count in (3, 10):
    read, write = os.pipe()
    if os.fork() == 0:
        draw = lambda labels, first: torch.full((len(labels), 3, 128, 128), first % 251, dtype=torch.uint8)
        for block in range(count):
            folder = Path(sys.argv[1]) / f"{len(peaks)}_{block}"
            folder.mkdir()
            blocks.make_block(folder, draw, torch.zeros(2000, dtype=torch.int64), first_index=0, batch_size=500)
        os.write(write, str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss).encode())
        os._exit(0)
    os.wait()
    peaks.append(int(os.read(read, 100)))
print(json.dumps(peaks))
"""


@pytest.mark.slow
def test_memory_stays_flat_while_a_larger_set_is_made(tmp_path):
    """A block is 96 MiB here: seven more of them, were they held, would show."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", MEMORY, str(tmp_path)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path, timeout=600)
    assert result.returncode == 0, result.stderr[-2000:]
    three, ten = json.loads(result.stdout)
    assert ten < three + 96 * 2**10


# --- blocks from someone else ---


def archive_of(path, *, shape=(2, 8, 8, 3), content=b"\0" * 384, dtype="|u1", compression=zipfile.ZIP_STORED):
    """A block that says it holds ``shape``, and holds ``content``."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": dtype, "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("images.npy", header.getvalue() + content)
    return path


def test_a_block_by_hand_is_read(tmp_path):
    assert blocks.load_images(archive_of(tmp_path / "a.npz")).shape == (2, 3, 8, 8)


FOREIGN = {
    "promises more than it holds": dict(shape=(10**9, 8, 8, 3)),
    "promises a little more": dict(shape=(3, 8, 8, 3)),
    "holds more than it promises": dict(content=b"\0" * 400),
    "negative sizes": dict(shape=(-2, 8, -8, 3)),
    "objects": dict(dtype="|O"),
    "another type": dict(dtype="<f8", content=b"\0" * 8 * 384),
    "a bomb": dict(shape=(100_000, 8, 8, 3), content=bytes(100_000 * 192), compression=zipfile.ZIP_DEFLATED),
    "not pictures": dict(shape=(384,)),
}


@pytest.mark.parametrize("wrong", FOREIGN.values(), ids=FOREIGN)
def test_a_foreign_block_is_refused_before_it_is_unpacked(tmp_path, wrong, monkeypatch):
    path = archive_of(tmp_path / "a.npz", **wrong)
    monkeypatch.setattr(np.lib.format, "read_array", lambda *_, **__: pytest.fail("numpy made room for it"))
    with pytest.raises(ValueError, match="a.npz"):
        blocks.load_images(path)


def test_a_foreign_size_in_the_directory_is_refused(tmp_path):
    """The archive's list says 4 GB, and the header too; the file has some hundred bytes."""
    path = archive_of(tmp_path / "a.npz", shape=(2**32 // 192 - 1, 8, 8, 3))
    content = path.read_bytes()
    size = zipfile.ZipFile(path).getinfo("images.npy").file_size
    told = (2**32 // 192 - 1) * 192 + 128
    path.write_bytes(content.replace(size.to_bytes(4, "little"), told.to_bytes(4, "little")))
    with pytest.raises((ValueError, zipfile.BadZipFile)):
        blocks.load_images(path)


def test_a_batch_of_another_size_is_not_taken_for_other_rows(tmp_path, monkeypatch):
    """The last batch of four holds the three rows from 20 on; of the batches of three the sixth holds those from 15."""

    def killed(path, *args):
        if path.name == blocks.BLOCK:
            raise KeyboardInterrupt
        return save(path, *args)

    save = blocks._save
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(blocks, "_save", killed)
        make(tmp_path / "a", Painter())
    blocks.make_block(tmp_path / "a", Painter(), LABELS, first_index=100, batch_size=3)
    assert blocks.load_images(tmp_path / "a" / blocks.BLOCK)[:, 1, 0, 0].tolist() == list(range(100, 123))
    assert [path.name for path in (tmp_path / "a").iterdir()] == [blocks.BLOCK]


def test_a_damaged_block_without_a_record_is_drawn_again(tmp_path):
    painter = Painter()
    path = make(tmp_path / "a", painter)
    whole = path.read_bytes()
    path.write_bytes(whole[:300] + bytes([whole[300] ^ 1]) + whole[301:])
    make(tmp_path / "a", painter)
    assert path.read_bytes() == whole
