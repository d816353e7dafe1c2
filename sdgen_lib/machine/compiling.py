"""Compiling a network's forward pass, and finding again what an earlier process has compiled."""

from __future__ import annotations

import contextlib
import copyreg
import gc
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch


def _memory_format(name: str) -> torch.memory_format:
    """`torch.channels_last` for its own name, "torch.channels_last"."""
    return getattr(torch, name.removeprefix("torch."))


def _same_key_in_every_process() -> None:
    """Makes TorchInductor find what any other process has compiled.

    It looks in its cache for what has the same pickle; there a memory format is named after the module that first
    got hold of torch: Optuna, where that was imported first. From now on it is pickled by its own name.
    """
    copyreg.pickle(torch.memory_format, lambda memory_format: (_memory_format, (str(memory_format),)))


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without warnings, log lines below an error, and searches for garbage."""
    disabled, collects = logging.root.manager.disable, gc.isenabled()
    logging.disable(logging.WARNING)  # the compiler logs that there is no GPU, among others
    gc.disable()  # a compiler makes millions of objects and next to no garbage
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        if collects:
            gc.enable()


def compiled(module: torch.nn.Module, *example: Any, **named: Any) -> Callable | None:
    """``module``'s forward pass compiled by TorchInductor for arguments of the shapes of these, without gradients.

    None, and a line that says why, where it cannot be compiled: for lack of a C++ compiler, most often. What was
    compiled stays in TorchInductor's cache folder, from which the next process takes it within seconds.
    """
    print(f"Compiling the {type(module).__name__}, once: up to a minute ...", file=sys.stderr, flush=True)
    _same_key_in_every_process()
    try:
        with _quietly(), torch.no_grad():
            # TorchInductor believes what the processor says of itself: a test of it takes longer than it may save.
            fast = torch.compile(module.forward, dynamic=False, options={"cpp.vec_isa_ok": True})
            fast(*example, **named)
        return fast
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        print(f"It stays uncompiled, which is slower: {reason}", file=sys.stderr, flush=True)
        return None
