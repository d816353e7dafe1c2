"""Names of devices; number formats by name and by processor."""

import pytest
import torch

from sdgen_lib.machine import devices

# --- which device ---


@pytest.fixture
def has(monkeypatch):
    """``has(cuda=cards, mps=True)``: from now on this computer seems to have these."""

    def pretend(cuda=0, mps=False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return pretend


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"), [(0, False, "cpu"), (0, True, "mps"), (1, False, "cuda"), (1, True, "cuda")]
)
def test_the_default_device_is_the_fastest(has, cuda, mps, expected):
    has(cuda=cuda, mps=mps)
    assert devices.default_device() == devices.as_device() == devices.as_device(None) == expected


@pytest.mark.parametrize("device", ["cpu", "cpu:0", torch.device("cpu"), torch.device("cpu", 0)])
def test_the_processor_has_one_name(device):
    assert devices.as_device(device) == "cpu" and type(devices.as_device(device)) is str
    assert devices.compute_dtype("fp32", device) == torch.float32
    assert devices.compute_dtype("auto", device) == devices.compute_dtype("auto", "cpu")
    with devices.autocast(device, torch.bfloat16):
        assert torch.nn.Linear(4, 4)(torch.ones(1, 4)).dtype == torch.bfloat16


def test_cards_keep_their_number(has):
    has(cuda=2, mps=True)
    assert [devices.as_device(device) for device in ("cuda", "cuda:0", "cuda:1")] == ["cuda", "cuda:0", "cuda:1"]
    assert devices.as_device(torch.device("cuda", 1)) == "cuda:1"
    assert devices.as_device("mps") == devices.as_device("mps:0") == "mps"
    for device in ("cuda:2", "cuda:200"):  # torch reads the second as a negative number
        with pytest.raises(ValueError, match=r"no device 'cuda:.*has 2 of its kind. Use 'cuda'\.$"):
            devices.as_device(device)


@pytest.mark.parametrize("device", ["cuda", "cuda:1", torch.device("cuda"), "mps"])
def test_a_device_that_is_not_here_is_refused(has, device):
    has()
    with pytest.raises(ValueError, match=rf"^There is no device '{device}'.* Use 'cpu'\.$") as error:
        devices.as_device(device)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("device", ["", "gpu", "cup", "cpu:x", "cuda:-1", "meta", "xpu", 3.5, True, ["cpu"], "x" * 500])
def test_what_is_no_device_is_refused(device):
    calls = [devices.as_device, lambda d: devices.compute_dtype("auto", d), lambda d: devices.autocast(d, torch.half)]
    for call in calls:
        with pytest.raises(ValueError, match='^A device is "cpu", "cuda", "mps" or .*, not ') as error:
            call(device)
        assert "\n" not in str(error.value) and len(str(error.value)) < 300


# --- which number format ---


def test_named_precision():
    assert devices.compute_dtype("fp32", "cpu") == torch.float32
    assert devices.compute_dtype("bf16", "cpu") == torch.bfloat16
    assert devices.compute_dtype("fp16", "cuda") == torch.float16
    with pytest.raises(ValueError, match="Unknown precision 'fp61'. Did you mean 'fp16'.*auto"):
        devices.compute_dtype("fp61", "cpu")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [("flags: sse avx512_bf16 x", torch.bfloat16), ("flags: amx_bf16", torch.bfloat16), ("flags: avx2", torch.float32)],
)
def test_automatic_precision_of_a_processor(monkeypatch, flags, expected):
    devices._cpu_computes_bf16.cache_clear()
    monkeypatch.setattr(devices.Path, "read_text", lambda path, **_: flags)
    assert devices.compute_dtype("auto", "cpu") == devices.classifier_dtype("auto", "cpu") == expected
    devices._cpu_computes_bf16.cache_clear()


@pytest.mark.parametrize(("major", "expected"), [(7, torch.float16), (8, torch.bfloat16), (9, torch.bfloat16)])
def test_automatic_precision_of_a_card(monkeypatch, major, expected):
    """Of the card that is asked about, where there are several."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda card: (major if card.index == 1 else 3, 0))
    assert devices.compute_dtype("auto", "cuda:1") == expected
    assert devices.classifier_dtype("auto", "cuda:1") == (torch.bfloat16 if major >= 8 else torch.float32)
    assert devices.compute_dtype("auto", "cuda") == torch.float16


def test_automatic_precision_of_apples_graphics():
    assert devices.compute_dtype("auto", "mps") == torch.float32


def test_autocast_keeps_weights_and_fp32():
    layer, x = torch.nn.Linear(4, 4), torch.ones(1, 4)
    with devices.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16 and layer.weight.dtype == torch.float32
    with devices.autocast("cpu", torch.float32):
        assert layer(x).dtype == torch.float32
