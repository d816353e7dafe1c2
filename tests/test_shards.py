"""A set is the same set whatever the number of ranks, and making a larger one takes no more memory."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sdgen_lib import files, runs, shards
from sdgen_lib.course import Course
from sdgen_lib.ranks import Ranks
from sdgen_lib.settings import resolve
from tests import soak

ROOT = Path(__file__).parents[1]
LABELS, POINT = torch.arange(23) % 3, {"IS": 3, "UGS": 1.5}


@pytest.fixture
def folder(tmp_path):
    run = runs.Run(resolve(recipe="demo", backbone="tiny", runs_dir=str(tmp_path)), "digits")
    return run.folder("5_datasets")


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


def make(path, painter, point=POINT, **options):
    shards.make_block(path, painter, LABELS, point, first_index=100, batch_size=4, **options)


def test_a_block_is_drawn_batch_by_batch(folder):
    painter = Painter()
    make(folder / "block_02.npz", painter)
    assert painter.drawn == [(100, 4), (104, 4), (108, 4), (112, 4), (116, 4), (120, 3)]
    images = shards.load_images(folder / "block_02.npz")
    assert images.dtype == torch.uint8 and images.shape == (23, 3, 8, 8)
    assert images[:, 0, 0, 0].tolist() == LABELS.tolist()
    assert images[:, 1, 0, 0].tolist() == list(range(100, 123))
    with np.load(folder / "block_02.npz", allow_pickle=False) as file:
        np.savez(folder.parent / "numpys.npz", images=file["images"], labels=file["labels"])
        assert (folder.parent / "numpys.npz").read_bytes() == (folder / "block_02.npz").read_bytes()
        assert file["labels"].tolist() == LABELS.tolist()
    assert sorted(p.name for p in folder.iterdir()) == ["block_02.json", "block_02.npz"]
    make(folder / "block_02.npz", painter)
    assert len(painter.drawn) == 6  # it is there


@pytest.mark.parametrize("ranks", [2, 3, 6, 9])
def test_ranks_share_a_block(folder, ranks):
    """One after the other, the first one at last, which is where it waits for the others."""
    alone, painters = Painter(), [Painter() for _ in range(ranks)]
    make(folder / "alone.npz", alone)
    runs.save_json(folder / "shared.json", POINT)
    for rank in reversed(range(ranks)):
        make(folder / "shared.npz", painters[rank], ranks=Ranks(rank, ranks))
    assert (folder / "shared.npz").read_bytes() == (folder / "alone.npz").read_bytes()
    drawn = [batch for painter in painters for batch in painter.drawn]
    assert sorted(drawn) == alone.drawn
    counts = [len(painter.drawn) for painter in painters]
    assert max(counts) - min(counts) <= 1


def stop_in_the_middle(path, **options):
    """A block whose fourth batch is interrupted."""

    def stopping(labels, first):
        if first == 112:
            raise KeyboardInterrupt
        return Painter()(labels, first)

    with pytest.raises(KeyboardInterrupt):
        make(path, stopping, **options)


def test_a_block_goes_on_where_it_was_stopped(folder):
    stop_in_the_middle(folder / "block_01.npz")
    rest, alone = Painter(), Painter()
    make(folder / "block_01.npz", rest)
    make(folder / "alone.npz", alone)
    assert rest.drawn == alone.drawn[3:]
    assert (folder / "block_01.npz").read_bytes() == (folder / "alone.npz").read_bytes()


def test_a_damaged_shard_is_drawn_again_and_nothing_of_another_point_is_kept(folder):
    stop_in_the_middle(folder / "block_01.npz")
    shard = folder / "block_01_00001.npz"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    painter = Painter()
    make(folder / "block_01.npz", painter)
    assert [first for first, _ in painter.drawn] == [104, 112, 116, 120]
    moved = Painter()
    stop_in_the_middle(folder / "block_01.npz", point={"IS": 4})
    make(folder / "block_01.npz", moved, point={"IS": 5})
    assert len(moved.drawn) == 6 and runs.load_json(folder / "block_01.json") == {"IS": 5}


def test_shards_that_outlived_their_block_are_cleared(folder):
    make(folder / "block_01.npz", Painter())
    for k in (0, 7):
        (folder / f"block_01_{k:05d}.npz").write_bytes(b"left by a kill")
    painter = Painter()
    make(folder / "block_01.npz", painter)
    assert not painter.drawn and sorted(p.name for p in folder.iterdir()) == ["block_01.json", "block_01.npz"]


# --- processes ---

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def command(*words, cwd):
    result = subprocess.run([sys.executable, "-m", *map(str, words)], cwd=cwd, env=ENVIRONMENT, capture_output=True,
                            text=True, timeout=900)  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.mark.slow
def test_two_processes_train_and_draw_what_one_does(tmp_path):
    """Under `accelerate launch`: the trainings up to rounding, the set byte for byte."""
    soak.write_dataset(tmp_path / "small.npz")
    given = {**soak.SMALL, "dataset": str(tmp_path / "small.npz")}

    def launch(*how, runs_dir="runs"):
        words = {**given, "runs_dir": str(tmp_path / runs_dir)}.items()
        parameters = [word for name, value in words for word in ("-p", name, value)]
        return command(*how, "sdgen_lib.launch", *parameters, "--blocks", 2, cwd=tmp_path)

    said = launch("accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes", 2,
                  "--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", 0,
                  "-m")  # fmt: skip
    assert said.count("holds the blocks, made by 2 processes") == 1  # one of them says so
    (run,) = (tmp_path / "runs").glob("*/*/")
    both = {path.name: path.read_bytes() for path in (run / "5_datasets").iterdir()}
    assert set(both) == {f"block_0{k}.{kind}" for k in (1, 2) for kind in ("npz", "json")}
    trained = {path: path.read_bytes() for path in run.glob("?_*/epoch_*.safetensors")}
    shutil.rmtree(run / "5_datasets")
    assert "made by 1 processes" in launch()
    assert {path.name: path.read_bytes() for path in (run / "5_datasets").iterdir()} == both
    assert all(path.read_bytes() == content for path, content in trained.items())

    alone = Course(resolve(**{**given, "runs_dir": str(tmp_path / "alone")}))
    alone.transfer()
    shutil.copytree(run, tmp_path / "runs again" / run.relative_to(tmp_path / "runs"))
    again = Course(resolve(**{**given, "runs_dir": str(tmp_path / "runs again")}))  # from the same transfer and search
    shutil.rmtree(again.run.path / "3_finetune")
    with files.changed_manifest(again.run.path / files.MANIFEST) as manifest:
        del manifest["steps"]["3_finetune"]
    again.finetune()
    for step, one in (("1_transfer", alone), ("3_finetune", again)):
        for path in (one.run.path / step).glob("epoch_*.safetensors"):
            ours, theirs = runs.load_tensors(path), runs.load_tensors(run / step / path.name)
            for name in ours:
                torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-3)
    assert {path.parent.name for path in trained} == {"1_transfer", "3_finetune"}


MEMORY = """
import json, os, resource, sys
from pathlib import Path
import torch
from sdgen_lib import files, runs, shards
from sdgen_lib.settings import resolve

peaks = []
for blocks in (3, 10):
    read, write = os.pipe()
    if os.fork() == 0:
        run = runs.Run(resolve(recipe="demo", backbone="tiny", runs_dir=f"{sys.argv[1]}/{len(peaks)}"), "digits")
        draw = lambda labels, first: torch.full((len(labels), 3, 128, 128), first % 251, dtype=torch.uint8)
        for block in range(blocks):
            path = run.folder("5_datasets") / f"block_{block:02d}.npz"
            shards.make_block(path, draw, torch.zeros(2000, dtype=torch.int64), {}, first_index=0, batch_size=500)
        os.write(write, str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss).encode())
        os._exit(0)
    os.wait()
    peaks.append(int(os.read(read, 100)))
print(json.dumps(peaks))
"""


@pytest.mark.slow
def test_memory_stays_flat_while_a_larger_set_is_made(tmp_path):
    """A block is 96 MiB here: seven more of them, were they held, would show."""
    result = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path)], env=ENVIRONMENT, capture_output=True,
                            text=True, cwd=tmp_path, timeout=600)  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    three, ten = json.loads(result.stdout)
    assert ten < three + 96 * 2**10
