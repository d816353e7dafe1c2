"""Works side by side: in order, on their share of the cores, ended when no longer wanted."""

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import CancelledError

import pytest
import torch

from sdgen_lib.machine import parallel


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
    assert list(parallel.side_by_side(works, 3)) == [(k, max(1, cores // 3)) for k in range(9)]
    assert most == 3 and torch.get_num_threads() == cores


SHARE = """
import torch
from threadpoolctl import threadpool_info
from sdgen_lib.machine.parallel import side_by_side

torch.set_num_threads({told})

def work(look):
    x = torch.randn(300, 300)
    for _ in range(20):
        x = torch.softmax(x @ x, 0)
    openmp = [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "openmp"]
    return max(torch.get_num_threads(), *openmp)

print(list(side_by_side([work] * 7, 3)), torch.get_num_threads())
"""


@pytest.mark.parametrize(("told", "share"), [(1, 1), (2, 1), (6, 2), (10, 3)])
def test_the_share_holds_whatever_torch_was_told_before(told, share):
    """In a process without OMP_NUM_THREADS, which would hide it. A new thread took all that torch had been told."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, "-c", SHARE.format(told=told)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{[share] * 7} {told}"


@pytest.mark.parametrize(
    ("cores", "count", "at_once"),
    [(2, 0, 0), (2, 1, 1), (2, 2, 2), (2, 3, 3), (2, 12, 2), (2, 5, 3), (16, 3, 3), (16, 20, 20), (16, 35, 19)],
)
def test_no_core_is_idle_while_the_last_works_are_done(monkeypatch, cores, count, at_once):
    monkeypatch.setattr(parallel, "default_device", lambda: "cpu")
    monkeypatch.setattr(torch, "get_num_threads", lambda: cores)
    assert parallel.best_at_once(count) == at_once
    for card in ("cuda", "mps"):
        monkeypatch.setattr(parallel, "default_device", lambda card=card: card)
        assert parallel.best_at_once(count) == 1


def test_no_more_works_are_asked_for_than_will_soon_be_done():
    asked, done = 0, 0

    def works():
        nonlocal asked
        for _ in range(40):
            asked += 1
            assert asked <= done + 6
            yield lambda look: None

    for _ in parallel.side_by_side(works(), 2):
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
        except CancelledError:
            ended.append(True)
            raise

    with pytest.raises(ZeroDivisionError):
        list(parallel.side_by_side([fails, goes_on, goes_on, goes_on, goes_on], at_once))
    assert 2 <= len(ended) <= 3 if at_once == 3 else not ended  # those that had begun
    found = parallel.side_by_side([lambda look: 0, *[goes_on] * (at_once - 1)], at_once)
    assert next(found) == 0
    found.close()  # nobody wants the rest
