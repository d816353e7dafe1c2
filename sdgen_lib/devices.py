"""Where to compute, and in which number format."""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@functools.cache
def _cpu_computes_bf16() -> bool:
    """Whether this processor has bfloat16 matrix instructions (AVX512-BF16 or AMX); elsewhere bf16 is slower."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def compute_dtype(precision: str, device: str) -> torch.dtype:
    """The dtype of matrix products for ``precision`` "auto", "fp32", "bf16" or "fp16"."""
    if precision == "auto":
        if device == "cpu":
            precision = "bf16" if _cpu_computes_bf16() else "fp32"
        else:  # Turing cards (T4) have no bf16
            precision = "bf16" if torch.cuda.get_device_capability()[0] >= 8 else "fp16"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def classifier_dtype(precision: str, device: str) -> torch.dtype:
    """As `compute_dtype`, but never float16, in which a classifier's loss would have to be scaled."""
    dtype = compute_dtype(precision, device)
    return torch.float32 if dtype == torch.float16 else dtype


def autocast(device: str | torch.device, dtype: torch.dtype):
    """Context manager: matrix products in ``dtype``, weights stay float32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(torch.device(device).type, dtype=dtype)


def compiled(module: torch.nn.Module, *example: Any, **named: Any) -> Callable | None:
    """``module``'s forward pass compiled by TorchInductor for arguments of the shapes of these, without gradients.

    None, and a line that says why, where it cannot be compiled: for lack of a C++ compiler, most often. What was
    compiled stays in TorchInductor's cache folder, from which the next process takes it within seconds.
    """
    print(f"Compiling the {type(module).__name__}, once: up to a minute ...", file=sys.stderr, flush=True)
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # of a machine without a GPU, among others
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            fast = torch.compile(module.forward, dynamic=False)
            fast(*example, **named)
        return fast
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        print(f"It stays uncompiled, which is slower: {reason}", file=sys.stderr, flush=True)
        return None
    finally:
        logging.disable(before)
