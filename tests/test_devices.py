"""Number formats by name and by processor."""

import shutil

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


def test_without_a_compiler_nothing_is_compiled_and_a_line_says_so(layer, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, str(tmp_path / "no-such-compiler")))
    assert devices.compiled(layer, torch.zeros(6, 8)) is None
    said = capsys.readouterr().err
    assert "stays uncompiled" in said and "no-such-compiler" in said and len(said.splitlines()) == 2
