"""Where to compute, and in which number format."""

from __future__ import annotations

import collections
import contextlib
import copyreg
import ctypes
import functools
import gc
import logging
import platform
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from threadpoolctl import threadpool_limits

T = TypeVar("T")


def _memory_format(name: str) -> torch.memory_format:
    return getattr(torch, name.removeprefix("torch."))


# TorchInductor finds in its cache what has the same pickle, and as pickled a memory format is named after the module
# that first got hold of torch: Optuna, where that was imported first. What one process compiled, others compiled anew.
copyreg.pickle(torch.memory_format, lambda memory_format: (_memory_format, (str(memory_format),)))


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


def keep_freed_memory() -> None:
    """Lets this process keep up to 1 GiB that it has freed, where the C library is glibc; elsewhere nothing.

    glibc gives it back, and every batch would have the kernel clear the same pages anew: in chapter 03's process 8.7
    million page faults and 16 s of system time, against 0.4 million and 2 s.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, 2**30)  # M_TRIM_THRESHOLD: bytes free at the heap's end before it is made shorter
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD: larger blocks come and go one by one; glibc itself works up to this


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
    before, collects = logging.root.manager.disable, gc.isenabled()
    logging.disable(logging.WARNING)  # of a machine without a GPU, among others
    gc.disable()  # among the millions of new objects of a compiler there is next to no garbage to look for
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            # What the processor says of itself is believed: to compile a test of it takes longer than it may save.
            fast = torch.compile(module.forward, dynamic=False, options={"cpp.vec_isa_ok": True})
            fast(*example, **named)
        return fast
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        print(f"It stays uncompiled, which is slower: {reason}", file=sys.stderr, flush=True)
        return None
    finally:
        logging.disable(before)
        if collects:
            gc.enable()


def best_at_once(count: int) -> int:
    """How many of ``count`` works `side_by_side` should do at a time: one for each core; a card has enough with one.

    The last ones, too few for the cores, join those before them: no core is idle while they are done.
    """
    if default_device() != "cpu":
        return 1
    cores = torch.get_num_threads()
    return count if count <= cores else cores + count % cores


def side_by_side(works: Iterable[Callable[[Callable[..., None]], T]], at_once: int) -> Iterator[T]:
    """The results of ``works``, in their order; ``at_once`` of them run at a time, the cores dealt out among them.

    For work of many small steps, which several cores together hardly do faster than one: the training of a small
    network (`bench classifier`). ``works`` is asked for the next one when it is nearly its turn. Each is called with a
    function that it is to call now and then, with any arguments, and that raises once the results are no longer wanted.
    An error in one of them is raised here, and ends the others.
    """
    cores, unwanted = max(1, torch.get_num_threads() // at_once), threading.Event()

    def look(*_: Any) -> None:
        if unwanted.is_set():
            raise InterruptedError("no longer wanted")

    def run(work: Callable[[Callable[..., None]], T]) -> T:
        with threadpool_limits(cores, user_api="openmp"):  # of this thread alone
            return work(look)

    if at_once == 1:
        for work in works:
            yield work(look)
        return
    begun: collections.deque = collections.deque()
    with ThreadPoolExecutor(at_once) as pool:
        try:
            for work in works:
                begun.append(pool.submit(run, work))
                if len(begun) > 2 * at_once:  # enough in store for who ends before the first one does
                    yield begun.popleft().result()
            while begun:
                yield begun.popleft().result()
        finally:
            unwanted.set()
            pool.shutdown(wait=False, cancel_futures=True)
