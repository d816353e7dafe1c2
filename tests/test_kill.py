"""Every step survives SIGKILL at any moment: `tests.soak` for about two minutes, in a process of its own."""

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


# A file of a run, what is found in it, and what is put there: another digit of a number that is no clock's.
CHANGES = {
    "1_transfer/epoch_002.safetensors": None,  # None: the last bit of the file
    "5_datasets/block_01/images.npz": None,
    "table_2/x1/predicted.safetensors": None,
    f"table_2/x1/{soak.RECORD}": (b'"num_images": 6', b'"num_images": 5'),
    f"2_tune/{soak.RECORD}": (b'"n_trials": 6', b'"n_trials": 5'),
    f"2_tune/{soak.JOURNAL}": (b'"classifier_epochs":4', b'"classifier_epochs":3'),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANGES)
def test_the_soak_would_notice(soaked, tmp_path, name):
    """A difference in any file of the run that it made, were there one."""
    (run,) = (soaked[1] / "runs").glob("*/*/")
    copy = shutil.copytree(run, tmp_path / "copy")
    whole = soak.state_of(run)
    assert soak.differences(soak.state_of(copy), whole) == []
    path = soak.place(copy, name)
    content = path.read_bytes()
    if CHANGES[name]:
        assert CHANGES[name][0] in content
        path.write_bytes(content.replace(*CHANGES[name]))
    else:
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert soak.differences(soak.state_of(copy), whole) == [path.relative_to(copy).as_posix()]
