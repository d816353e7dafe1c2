"""Parts of a batch where memory is short, and memory that is kept where it is not."""

import platform
import subprocess
import sys

import pytest
import torch

from sdgen_lib.machine.memory import MicroBatch


class Sums:
    """Work whose result is known, the sum of all rows; on a card where ``most`` rows fit at once."""

    def __init__(self, rows, most):
        self.rows, self.most, self.total, self.sizes = rows, most, 0, []

    def begin(self):
        self.total, self.sizes = 0, []

    def work(self, part):
        if part.stop - part.start > self.most:
            raise torch.OutOfMemoryError("tried to allocate too much\nand more lines")
        self.sizes.append(part.stop - part.start)
        self.total += sum(self.rows[part])


def run(micro_batch, n, most):
    """The sizes of the parts that were done in the end; the sum over them must be that of all rows."""
    sums = Sums(list(range(1, n + 1)), most)
    micro_batch.run(n, sums.begin, sums.work)
    assert sums.total == n * (n + 1) // 2
    return sums.sizes


@pytest.mark.parametrize(
    ("size", "n", "most", "expected", "left"),
    [
        (4, 10, 99, [4, 4, 2], 4),
        (16, 10, 99, [10], 16),
        (8, 8, 3, [2, 2, 2, 2], 2),  # 8, 4, 2
        (128, 10, 9, [5, 5], 5),  # 10 were there, not 128
        (7, 7, 4, [4, 3], 4),
        (3, 5, 1, [1, 1, 1, 1, 1], 1),
        (3, 0, 1, [], 3),
    ],
)
def test_parts_cover_every_row_once_and_fit(size, n, most, expected, left, capsys):
    micro_batch = MicroBatch(size)
    assert run(micro_batch, n, most) == expected and micro_batch.size == left
    assert bool(capsys.readouterr().out) == (left < size)


def test_what_was_found_stays_for_the_next_batch(capsys):
    micro_batch = MicroBatch(8)
    run(micro_batch, 8, most=3)
    said = capsys.readouterr().out
    assert "with 4 images at once, not 8" in said and "with 2 images at once, not 4" in said
    assert run(micro_batch, 8, most=3) == [2, 2, 2, 2] and capsys.readouterr().out == ""


@pytest.mark.parametrize(("helps", "expected"), [(True, [8]), (False, [4, 4])])
def test_relief_is_tried_first_and_once(helps, expected):
    sums, asked = Sums(list(range(8)), most=4), []

    def relief():
        asked.append(True)
        sums.most = 8 if helps else 4
        return helps

    micro_batch = MicroBatch(8, relief)
    micro_batch.run(8, sums.begin, sums.work)
    assert sums.sizes == expected and sums.total == 28
    sums.most = 2
    micro_batch.run(8, sums.begin, sums.work)
    assert len(asked) == 1 and sums.sizes == [2, 2, 2, 2]


@pytest.mark.parametrize("message", ["too much", "too much\nand more lines"])
def test_not_even_one_image(message):
    def work(part):
        raise torch.OutOfMemoryError(message)

    with pytest.raises(MemoryError, match="Not even one image.*finetune_method='lora'.*Cause: too much$"):
        MicroBatch(4).run(4, lambda: None, work)


def test_another_error_is_no_reason_to_go_on():
    def work(part):
        raise RuntimeError("a bug")

    micro_batch = MicroBatch(4)
    with pytest.raises(RuntimeError, match="a bug"):
        micro_batch.run(4, lambda: None, work)
    assert micro_batch.size == 4


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_memory_that_was_freed_is_not_asked_for_again():
    work = """
import resource, torch
from sdgen_lib.machine.allocator import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(2**20) for _ in range(100)]  # 400 MiB
    del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
print(faults())
keep_freed_memory()
for _ in range(5):
    faults()  # the heap grows, and settles within a few rounds
print(faults())
"""
    told = subprocess.run([sys.executable, "-c", work], capture_output=True, text=True, check=True).stdout
    given_back, kept = map(int, told.split())
    assert kept < given_back / 50 and given_back > 1000  # 102,400 pages of 4 KiB, or 6400 of 64
