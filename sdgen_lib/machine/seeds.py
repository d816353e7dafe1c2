"""Random numbers that depend on what they are for, and not on the order or the batch they are drawn in."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from ..config.messages import shown

WORD = 2**32  # a seed is one word of 32 bits: torch's CPU generator uses no more of it


def _whole(name: str, value: int, bound: int = WORD) -> int:
    """``value`` as a plain whole number; raises ValueError unless it is one below ``bound``."""
    number = operator.index(value)
    if not 0 <= number < bound:
        raise ValueError(f"{name} must be a whole number from 0 to {bound - 1}, not {shown(number)}.")
    return number


def derived(seed: int, purpose: str, *numbers: int) -> int:
    """A seed of 32 bits for one ``purpose`` of a run, and for the ``numbers`` that tell its parts from each other.

    Runs of neighbouring ``seed`` values share none of them: ``derived(0, "table", 1)`` and ``derived(1, "table", 0)``
    are as unrelated as any two. ``seed`` and ``numbers`` are whole numbers of 32 bits; raises ValueError for others.
    Source: numpy's `SeedSequence`, with the purpose's SHA-256 in its entropy and the numbers as its spawn key.
    """
    words = np.frombuffer(hashlib.sha256(purpose.encode()).digest(), "<u4").tolist()
    key = [_whole("a number", number) for number in numbers]
    sequence = np.random.SeedSequence([_whole("seed", seed), *words], spawn_key=key)
    return int(sequence.generate_state(1, np.uint32)[0])


def image_noise(seed: int, set_name: str, indices: Iterable[int], shape: Sequence[int]) -> torch.Tensor:
    """The noise that images ``indices`` of a set start from: standard normal, float32, (n, \\*shape), on the CPU.

    Image i's noise depends on ``seed``, ``set_name`` and i alone: it is the same in every batch and every shard. No two
    images of a set share a stream, and none of two sets do: Philox is a counter-based generator (Salmon et al. 2011)
    whose key is made of the seed and the set's name, and whose counter begins at i * 2**192.
    ``indices`` are whole numbers from 0 to 2**64 - 1; raises ValueError for others.
    """
    text = f"{_whole('seed', seed)}:{set_name}"
    key = np.frombuffer(hashlib.sha256(text.encode()).digest()[:16], "<u8")
    indices = [_whole("an image's index", index, WORD**2) for index in indices]
    noise = np.empty((len(indices), *shape), np.float32)
    for row, index in enumerate(indices):
        counter = np.array([0, 0, 0, index], np.uint64)  # the last word is the most significant one
        stream = np.random.Generator(np.random.Philox(key=key, counter=counter))
        stream.standard_normal(dtype=np.float32, out=noise[row : row + 1])
    return torch.from_numpy(noise)
