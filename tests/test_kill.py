"""Every step survives SIGKILL at any moment: `tests.soak` for about a minute, in a process of its own."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import soak

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def soaked(tmp_path_factory):
    """(what the soak printed at last, its folder); one thread, for a fork inherits no others."""
    folder = tmp_path_factory.mktemp("soak")
    command = [sys.executable, "-m", "tests.soak", "--kills", "30", "--folder", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return json.loads(result.stdout.splitlines()[-1]), folder


@pytest.mark.slow
def test_every_step_goes_on_to_the_same_result_after_kills(soaked):
    report, _ = soaked
    assert report["kills"] >= 30
    assert set(report["of"]) == set(soak.STEPS) and min(report["of"].values()) >= 1
    assert report["damaged"] == len(soak.DAMAGED) and report["together"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["1_transfer/epoch_002.safetensors", "5_datasets/block_01.npz", "table_2.json",
                                  "2_tune/journal.log", "manifest.json"])  # fmt: skip
def test_the_soak_would_notice(soaked, tmp_path, name):
    """A difference in any file of the run that it made, were there one."""
    (run,) = (soaked[1] / "runs").glob("*/*/")
    copy = shutil.copytree(run, tmp_path / "copy")
    whole = soak.state_of(run)
    assert soak.differences(soak.state_of(copy), whole) == []
    path = copy / name
    content = path.read_bytes()
    if path.suffix in (".json", ".log"):  # another digit in the last number that is no clock's
        old = {"table_2.json": b'"num_images": 6', "journal.log": b'"trial_id":3', "manifest.json": b'"n_trials": 6'}
        assert old[path.name] in content
        content = content.replace(old[path.name], old[path.name][:-1] + b"5")
    else:
        content = content[:-1] + bytes([content[-1] ^ 1])
    path.write_bytes(content)
    try:
        assert soak.differences(soak.state_of(copy), whole) == [name]
    except (ValueError, KeyError):  # the trials no longer make sense: noticed too
        assert name.endswith("journal.log")
