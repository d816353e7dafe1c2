"""One process alone, and two that add up what each of them holds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sdgen_lib
from sdgen_lib.machine import ranks

WORK = """
from pathlib import Path

import torch
from sdgen_lib.machine import ranks

here = ranks.launched()
total = torch.tensor([here.rank + 1.0, 10.0])
here.add_up([total])
here.wait()
said = [here.first_says(here.rank == 0), here.first_says(here.rank == 1)]
Path(f"{here.rank}.txt").write_text(f"{here.rank} of {here.count}, first {here.first}: {total.tolist()}, {said}")
"""


def test_alone():
    assert (ranks.ALONE.rank, ranks.ALONE.count, ranks.ALONE.first) == (0, 1, True)
    ranks.ALONE.wait()  # for nobody
    total = torch.tensor([1.0])
    ranks.ALONE.add_up([total])
    assert total == 1
    assert ranks.ALONE.first_says(True) and not ranks.ALONE.first_says(False)
    assert not ranks.Ranks(1, 2).first


@pytest.mark.slow
def test_two_processes_add_up(tmp_path):
    script = tmp_path / "work.py"
    script.write_text(WORK)
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu"]  # on the CPU too
    launch += ["--num_processes", "2", "--num_machines", "1", "--main_process_port", "0"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    environment = {**os.environ, "PYTHONPATH": str(Path(sdgen_lib.__file__).parent.parent)}
    done = subprocess.run(
        [*launch, str(script)], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    said = [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)]
    assert said == [f"{k} of 2, first {k == 0}: [3.0, 20.0], [True, False]" for k in (0, 1)]


def test_a_process_that_was_started_by_hand_is_alone():
    code = "from sdgen_lib.machine import ranks; print(ranks.launched() == ranks.ALONE)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"
