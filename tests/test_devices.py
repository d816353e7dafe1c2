"""Number formats by name and by processor."""

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
