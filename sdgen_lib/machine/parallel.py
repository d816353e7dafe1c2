"""Several small works at the same time, in threads that share the processor's cores."""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from threadpoolctl import threadpool_limits

from .devices import default_device

T = TypeVar("T")


def best_at_once(count: int) -> int:
    """How many of ``count`` works `side_by_side` should do at a time: one for each core; on a card, one.

    Works that are left over, too few for all cores, join the others: 5 works on 2 cores are done 3 at a time, so that
    no core is idle while the last ones are done.
    """
    if default_device() != "cpu":
        return 1  # which fills the card
    cores = torch.get_num_threads()
    left_over = count % cores
    return min(count, cores + left_over)


def side_by_side(works: Iterable[Callable[[Callable[..., None]], T]], at_once: int) -> Iterator[T]:
    """The results of ``works``, in their order; ``at_once`` of them run at a time, the cores dealt out among them.

    For work of many small steps, which several cores together hardly do faster than one: the training of a small
    network (`bench classifier`). ``works`` is asked for the next one when it is nearly its turn.
    Each work is called with a function ``look``. It has to call ``look`` now and then, with any arguments:
    ``look`` raises `concurrent.futures.CancelledError` once the results are no longer wanted.
    An error in one work is raised here, and ends the others.
    """
    cores, unwanted = max(1, torch.get_num_threads() // at_once), threading.Event()

    def look(*_: Any) -> None:
        if unwanted.is_set():
            raise CancelledError("The result is no longer wanted.")

    def run(work: Callable[[Callable[..., None]], T]) -> T:
        torch.get_num_threads()  # torch sets a thread's cores when it first asks: later it would undo the limit
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
                if len(begun) > 2 * at_once:  # so many in store that no thread waits for the first one's end
                    yield begun.popleft().result()
            while begun:
                yield begun.popleft().result()
        finally:
            unwanted.set()
            pool.shutdown(wait=False, cancel_futures=True)
