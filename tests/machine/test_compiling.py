"""A compiled module answers as before, is found again by every process, and may be missing."""

import logging
import os
import shutil
import subprocess
import sys

import pytest
import torch

from sdgen_lib.machine.compiling import compiled

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
