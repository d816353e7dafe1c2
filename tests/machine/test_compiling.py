"""A compiled module answers as before, is found again by every process, and may be missing."""

import logging
import os
import shutil
import subprocess
import sys
import types

import pytest
import torch

from sdgen_lib.machine.compiling import compiled
from sdgen_lib.machine.passes import Pass
from sdgen_lib.work import cost

needs_a_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="there is no C++ compiler here")


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 4))


@needs_a_compiler
def test_a_compiled_module_answers_as_before(layer, capsys):
    before = logging.root.manager.disable
    fast = compiled(layer, torch.zeros(5, 8))
    x = torch.randn(5, 8)
    torch.testing.assert_close(fast(x), layer(x))
    assert fast is not None and "Compiling the Sequential, once" in capsys.readouterr().err
    assert logging.root.manager.disable == before


@needs_a_compiler
def test_what_one_process_compiled_every_other_finds(tmp_path):
    work = """
import torch
from sdgen_lib.machine.compiling import compiled
from sdgen_lib.machine.passes import Pass
from sdgen_lib.work import cost
compiled(torch.nn.Linear(8, 4), torch.zeros(5, 8))
"""
    for first in ("torch", "optuna"):  # Optuna's modules name torch before torch is imported
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
        subprocess.run([sys.executable, "-c", f"import {first}\n{work}"], env=environment, check=True)
    assert len(list(tmp_path.glob("fxgraph/*/*"))) == 1 and len(list(tmp_path.glob("aotautograd/*"))) <= 1


def test_without_a_compiler_nothing_is_compiled_and_a_line_says_so(layer, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, str(tmp_path / "no-such-compiler")))
    assert compiled(layer, torch.zeros(6, 8)) is None
    said = capsys.readouterr().err
    assert "stays uncompiled" in said and "no-such-compiler" in said and len(said.splitlines()) == 2


@pytest.mark.parametrize(("gains", "share"), [(True, 0.65), (False, 1.0)])
def test_an_estimate_takes_off_what_compiling_was_measured_to_save(monkeypatch, gains, share):
    """A small UNet on a CPU is where it was; nothing is promised of another model or device."""
    monkeypatch.setattr(cost, "_measured", {})
    monkeypatch.setitem(cost.MEASURES, "unet", lambda backbone, kind: 2.0)
    backbone = types.SimpleNamespace(name="x", device="cpu", dtype=torch.float32, gains_by_compiling=gains)
    assert cost.seconds(backbone, {Pass("compiled unet", 8): 10}) == pytest.approx(20.0 * share)
