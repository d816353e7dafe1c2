"""`accelerate launch`: several processes train and draw what one does; the command's arguments."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sdgen_lib.config.settings import resolve
from sdgen_lib.course import Course
from sdgen_lib.machine.ranks import Ranks
from sdgen_lib.store import files
from sdgen_lib.store.blocks import BLOCK
from sdgen_lib.store.run import RECORD, Run, Step
from sdgen_lib.tools import launch
from tests import small, soak

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
TWO = (  # `accelerate launch` with two processes on one CPU
    *("accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m"),
)


# --- arguments ---


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("1e-4", 1e-4),
        ("True", True),
        ("None", None),
        ("none", "none"),
        ("pathmnist", "pathmnist"),
        ("digits:200", "digits:200"),
        ("./a folder/set.npz", "./a folder/set.npz"),
        ("sqlite:///search.db", "sqlite:///search.db"),
    ],
)
def test_a_parameter_is_a_number_or_text(text, value):
    found = launch.parsed(text)
    assert found == value and type(found) is type(value)


def test_the_settings_are_those_of_the_parameters():
    given = {"recipe": "paper", "backbone": "tiny", "n_trials": "7", "weight_decay": "1e-3", "image_size": "none"}
    settings, blocks = launch.options_of([word for name, value in given.items() for word in ("-p", name, value)])
    assert (settings.recipe, settings.n_trials, settings.weight_decay) == ("paper", 7, 1e-3)
    assert settings.image_size is None and settings.given == ("image_size", "n_trials", "weight_decay")
    assert blocks == settings.max_multiple == 10
    assert launch.options_of(["--blocks", "3"])[1] == 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-p", "n_trails", "3"], "Did you mean 'n_trials'"),
        (["-p", "n_trials", "many"], "n_trials must be a whole number"),
        (["--blocks", "0"], "--blocks must be 1 or more, not 0"),
        (["-p", "n_trials"], "expected 2 arguments"),
    ],
)
def test_wrong_arguments_stop_before_anything_is_loaded(arguments, said, capsys, monkeypatch):
    monkeypatch.setattr(launch, "launched", lambda: pytest.fail("the processes were joined"))
    with pytest.raises(SystemExit) as stopped:
        launch.main(arguments)
    assert stopped.value.code == 2 and said in capsys.readouterr().err


# --- processes ---


def python(*words, cwd):
    """What ``python -m words`` prints."""
    command = [sys.executable, "-m", *map(str, words)]
    result = subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def tensors_of(run, step):
    """The checkpoints of a training step, by their names."""
    folder = soak.place(run, f"{step}/")
    return {path.name: files.load_tensors(path) for path in sorted(folder.glob("epoch_*.safetensors"))}


def blocks_of(run):
    return {path.parts[-3]: path.read_bytes() for path in (run / "5_datasets").glob(f"*/*/{BLOCK}")}


def words(folder, **changes):
    """The arguments of a very small run on the dataset in ``folder``.

    Step 3 has one epoch: the rank that searched in step 4 then has its UNet in place already, and the others do not.
    """
    given = {**soak.SMALL, "finetune_epochs": 1, "dataset": folder / "small.npz", **changes}
    return [str(word) for name, value in given.items() for word in ("-p", name, value)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("launch")
    small.write_dataset(found / "small.npz")
    return found


@pytest.fixture(scope="module")
def both(folder):
    """A run by two processes: what they said, its folder."""
    arguments = words(folder, runs_dir=folder / "runs")
    said = python(*TWO, "sdgen_lib.launch", *arguments, "--blocks", 2, cwd=folder)
    return said, soak.run_folder(folder)


@pytest.fixture
def copy(both, tmp_path):
    """A copy of that run, in ``tmp_path / "runs"``."""
    shutil.copytree(both[1].parents[1], tmp_path / "runs")
    return soak.run_folder(tmp_path)


@pytest.mark.slow
def test_two_processes_make_a_whole_run(both):
    said, run = both
    assert said.count("holds the blocks, made by 2 processes") == 1  # one of them says so
    assert set(blocks_of(run)) == {"block_01", "block_02"}
    made = [path.parent.parent.relative_to(run).as_posix() for path in run.rglob(RECORD)]
    steps = ["latents", "1_transfer", "2_tune", "3_finetune", "4_retune"]
    assert sorted(made) == sorted([*steps, "5_datasets/block_01", "5_datasets/block_02"])  # each once, and no table
    assert not [path for path in run.rglob("*") if path.name.startswith("part_") or path.suffix == ".damaged"]


@pytest.mark.slow
def test_two_processes_draw_what_one_does(both, copy, folder, tmp_path):
    """Byte for byte, from the same weights."""
    run = both[1]
    shutil.rmtree(copy / "5_datasets")
    said = python("sdgen_lib.launch", *words(folder, runs_dir=tmp_path / "runs"), "--blocks", 2, cwd=folder)
    assert "made by 1 processes" in said and blocks_of(copy) == blocks_of(run)
    for step in ("1_transfer", "3_finetune"):  # nothing was trained again
        assert soak.differences(soak.state_of(copy / step), soak.state_of(run / step)) == []


@pytest.mark.slow
def test_two_processes_train_what_one_does(both, copy, folder, tmp_path):
    """Up to rounding: the sums are in another order."""
    settings, _ = launch.options_of(words(folder, runs_dir=tmp_path / "runs"))
    for step in ("3_finetune", "1_transfer"):  # step 3 from the same transfer and search
        shutil.rmtree(copy / step)
        Course(settings).run.result({s.name: s for s in Course(settings).method.steps()}[step])
        ours, theirs = tensors_of(copy, step), tensors_of(both[1], step)
        assert ours.keys() == theirs.keys() != set()
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-3)


def test_a_rank_does_not_do_alone_what_all_do_together(tmp_path):
    """It would wait for the others for ever."""
    run = Run(resolve("demo", "tiny"), tmp_path, {}, ranks=Ranks(0, 2))
    with run.alone():
        assert run.result(Step("one", lambda folder, settings: {"done": True})).facts == {"done": True}
        with pytest.raises(RuntimeError, match="both has to be made again, by all processes together"):
            run.result(Step("both", lambda folder, settings: {}, together=True))
