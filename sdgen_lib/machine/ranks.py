"""The processes that `accelerate launch` has started to do one piece of work together, on one machine or several."""

from __future__ import annotations

import atexit
import dataclasses
import datetime
from collections.abc import Iterable

import accelerate
import torch
import torch.distributed

from .devices import default_device


@dataclasses.dataclass(frozen=True)
class Ranks:
    """Process ``rank`` of ``count``. All of them call the same things in the same order; the first writes the files."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Returns once all of them have called it."""
        if self.count > 1:
            accelerate.PartialState().wait_for_everyone()

    def add_up(self, tensors: Iterable[torch.Tensor]) -> None:
        """Each tensor becomes, in place, the sum of those that the several processes hold."""
        if self.count > 1:
            for tensor in tensors:
                torch.distributed.all_reduce(tensor)

    def first_says(self, answer: bool) -> bool:
        """The first process's ``answer``, in all of them. Returns once all of them have called it."""
        if self.count == 1:
            return answer
        said = torch.tensor(float(answer and self.first), device=accelerate.PartialState().device)
        self.add_up([said])
        return bool(said)


ALONE = Ranks()


def launched() -> Ranks:
    """The processes of this launch, which from now on share their work; `ALONE` if this one was started by hand."""
    # Every process waits for the slowest: as long as it takes.
    state = accelerate.PartialState(cpu=default_device() == "cpu", timeout=datetime.timedelta(days=30))
    if state.num_processes > 1:
        # A process that ends without leaving the group may be aborted by the group's own threads, its work done.
        atexit.unregister(state.destroy_process_group)  # a second call's
        atexit.register(state.destroy_process_group)
    return Ranks(state.process_index, state.num_processes)
