"""Where to compute, and in which number format."""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path

import torch

from ..config.messages import shown, unknown_name

KINDS = ("cpu", "cuda", "mps")  # processor, NVIDIA or AMD card, Apple's graphics
FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def default_device() -> str:
    """The fastest device of this computer: "cuda", "mps" or "cpu"."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _parsed(device: str | torch.device) -> torch.device:
    """``device`` as torch names it; raises ValueError for one of another kind than `KINDS`."""
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        found = None
    if found is None or found.type not in KINDS:
        raise ValueError(f'A device is "cpu", "cuda", "mps" or a numbered one as "cuda:1", not {shown(device)}.')
    return found


def as_device(device: str | torch.device | None = None) -> str:
    """The one name of a device: "cpu", "cuda", "cuda:1", "mps"; for None `default_device`'s.

    "cpu:0" and ``torch.device("cpu")`` are "cpu" too, so that a caller may compare texts.
    Raises ValueError for a name that is none, and for a device that this computer does not have.
    """
    if device is None:
        return default_device()
    found, name = _parsed(device), shown(str(device))
    if found.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not 0 <= (found.index or 0) < count:  # torch reads "cuda:200" as a negative number
            has = f"has {count} of its kind" if count else "has none of its kind that torch can use"
            raise ValueError(f"There is no device {name}: this computer {has}. Use {default_device()!r}.")
        return str(found)
    if found.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"There is no device {name} that torch can use. Use {default_device()!r}.")
    return found.type


@functools.cache
def _cpu_computes_bf16() -> bool:
    """Whether this processor has bfloat16 matrix instructions (AVX512-BF16 or AMX); elsewhere bf16 is slower."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def compute_dtype(precision: str, device: str | torch.device) -> torch.dtype:
    """The dtype of matrix products for ``precision`` "auto", "fp32", "bf16" or "fp16".

    "auto": what the device multiplies fast. On mps that is float32, as nobody has measured there. Raises ValueError for
    another precision or device.
    """
    found = _parsed(device)
    if precision != "auto":
        if precision not in FORMATS:
            raise unknown_name("precision", precision, ["auto", *FORMATS])
        return FORMATS[precision]
    if found.type == "cuda":  # Turing cards (T4) have no bf16
        return torch.bfloat16 if torch.cuda.get_device_capability(found)[0] >= 8 else torch.float16
    return torch.bfloat16 if found.type == "cpu" and _cpu_computes_bf16() else torch.float32


def classifier_dtype(precision: str, device: str | torch.device) -> torch.dtype:
    """As `compute_dtype`, but never float16, in which a classifier's loss would have to be scaled."""
    dtype = compute_dtype(precision, device)
    return torch.float32 if dtype == torch.float16 else dtype


def autocast(device: str | torch.device, dtype: torch.dtype):
    """Context manager: matrix products in ``dtype``, weights stay float32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(_parsed(device).type, dtype=dtype)
