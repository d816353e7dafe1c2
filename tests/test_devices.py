"""Number formats by name and by processor; works side by side."""

import os
import platform
import shutil
import subprocess
import sys
import threading
import time

import pytest
import torch

from sdgen_lib import devices


def test_named_precision():
    assert devices.compute_dtype("fp32", "cpu") == torch.float32
    assert devices.compute_dtype("bf16", "cpu") == torch.bfloat16
    assert devices.compute_dtype("fp16", "cuda") == torch.float16


@pytest.mark.parametrize(
    ("flags", "expected"),
    [("flags: sse avx512_bf16 x", torch.bfloat16), ("flags: amx_bf16", torch.bfloat16), ("flags: avx2", torch.float32)],
)
def test_automatic_precision_of_a_processor(monkeypatch, flags, expected):
    devices._cpu_computes_bf16.cache_clear()
    monkeypatch.setattr(devices.Path, "read_text", lambda path: flags)
    assert devices.compute_dtype("auto", "cpu") == expected
    devices._cpu_computes_bf16.cache_clear()


@pytest.mark.parametrize(("major", "expected"), [(7, torch.float16), (8, torch.bfloat16), (9, torch.bfloat16)])
def test_automatic_precision_of_a_card(monkeypatch, major, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (major, 0))
    assert devices.compute_dtype("auto", "cuda") == expected
    assert devices.classifier_dtype("auto", "cuda") == (torch.bfloat16 if major >= 8 else torch.float32)


def test_autocast_keeps_weights_and_fp32():
    layer, x = torch.nn.Linear(4, 4), torch.ones(1, 4)
    with devices.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16 and layer.weight.dtype == torch.float32
    with devices.autocast("cpu", torch.float32):
        assert layer(x).dtype == torch.float32


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 4))


@pytest.mark.skipif(not shutil.which("g++"), reason="there is no C++ compiler here")
def test_a_compiled_module_answers_as_before(layer, capsys):
    fast = devices.compiled(layer, torch.zeros(5, 8))
    x = torch.randn(5, 8)
    torch.testing.assert_close(fast(x), layer(x))
    assert fast is not None and "Compiling the Sequential, once" in capsys.readouterr().err


@pytest.mark.skipif(not shutil.which("g++"), reason="there is no C++ compiler here")
def test_what_one_process_compiled_every_other_finds(tmp_path):
    work = "import torch; from sdgen_lib import devices; devices.compiled(torch.nn.Linear(8, 4), torch.zeros(5, 8))"
    for first in ("torch", "optuna"):  # Optuna's modules name torch before torch is imported
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
        subprocess.run([sys.executable, "-c", f"import {first}; {work}"], env=environment, check=True)
    assert len(list(tmp_path.glob("fxgraph/*/*"))) == 1 and len(list(tmp_path.glob("aotautograd/*"))) <= 1


def test_without_a_compiler_nothing_is_compiled_and_a_line_says_so(layer, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, str(tmp_path / "no-such-compiler")))
    assert devices.compiled(layer, torch.zeros(6, 8)) is None
    said = capsys.readouterr().err
    assert "stays uncompiled" in said and "no-such-compiler" in said and len(said.splitlines()) == 2


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_memory_that_was_freed_is_not_asked_for_again():
    work = """
import resource, torch
from sdgen_lib import devices

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(2**20) for _ in range(100)]  # 400 MiB
    del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
print(faults())
devices.keep_freed_memory()
faults()
print(faults())
"""
    told = subprocess.run([sys.executable, "-c", work], capture_output=True, text=True, check=True).stdout
    given_back, kept = map(int, told.split())
    assert kept < given_back / 50 and given_back > 1000  # 102,400 pages of 4 KiB, or 6400 of 64


# --- side by side ---


def test_works_side_by_side_come_in_order_and_share_the_cores():
    """The earlier ones take longer; three at a time, however many there are."""
    now, most, guard, cores = 0, 0, threading.Lock(), torch.get_num_threads()

    def work(k, look):
        nonlocal now, most
        with guard:
            now += 1
            most = max(most, now)
        time.sleep(0.1 - k / 100)
        with guard:
            now -= 1
        return k, torch.get_num_threads()

    works = ((lambda look, k=k: work(k, look)) for k in range(9))
    assert list(devices.side_by_side(works, 3)) == [(k, max(1, cores // 3)) for k in range(9)]
    assert most == 3 and torch.get_num_threads() == cores


@pytest.mark.parametrize(
    ("cores", "count", "at_once"), [(2, 1, 1), (2, 2, 2), (2, 3, 3), (2, 12, 2), (2, 5, 3), (16, 3, 3), (16, 20, 20)]
)
def test_no_core_is_idle_while_the_last_works_are_done(monkeypatch, cores, count, at_once):
    monkeypatch.setattr(devices, "default_device", lambda: "cpu")
    monkeypatch.setattr(torch, "get_num_threads", lambda: cores)
    assert devices.best_at_once(count) == at_once
    monkeypatch.setattr(devices, "default_device", lambda: "cuda")
    assert devices.best_at_once(count) == 1


def test_no_more_works_are_asked_for_than_will_soon_be_done():
    asked, done = 0, 0

    def works():
        nonlocal asked
        for _ in range(40):
            asked += 1
            assert asked <= done + 6
            yield lambda look: None

    for _ in devices.side_by_side(works(), 2):
        done += 1
    assert done == 40


@pytest.mark.parametrize("at_once", [1, 3])
def test_an_error_of_one_ends_the_others(at_once):
    ended = []

    def fails(look):
        time.sleep(0.1)
        raise ZeroDivisionError

    def goes_on(look):
        try:
            while True:
                look("an epoch", 3)
                time.sleep(0.01)
        except InterruptedError:
            ended.append(True)
            raise

    with pytest.raises(ZeroDivisionError):
        list(devices.side_by_side([fails, goes_on, goes_on, goes_on, goes_on], at_once))
    assert 2 <= len(ended) <= 3 if at_once == 3 else not ended  # those that had begun
    found = devices.side_by_side([lambda look: 0, *[goes_on] * (at_once - 1)], at_once)
    assert next(found) == 0
    found.close()  # nobody wants the rest
