"""Fitting work into an accelerator's memory: how many images go through at once, found by trying."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable

import torch
from tqdm.auto import tqdm


@dataclasses.dataclass
class MicroBatch:
    """Runs work on parts of a batch; the parts get smaller when the accelerator's memory runs out, and stay so.

    ``size``: images at once, 1 or more. Keep the object for the next batch, or its ``size``: what was found is in it.
    ``relief``: what makes room at another price (gradient checkpointing). It is called once, the first time that memory
    runs out, and returns whether it changed anything.
    """

    size: int
    relief: Callable[[], bool] | None = None

    def run(self, n: int, begin: Callable[[], None], work: Callable[[slice], None]) -> None:
        """Calls ``begin()``, then ``work(rows)`` for slices that together cover range(n).

        When memory runs out it makes room and starts again, with ``begin()``: that has to undo what was half done.
        Raises MemoryError if not even one image fits.
        """
        while True:
            try:
                begin()
                for start in range(0, n, self.size):
                    work(slice(start, min(start + self.size, n)))
                return
            except torch.OutOfMemoryError as error:
                cause = str(error).partition("\n")[0]
            # Outside of the handler: its traceback holds on to what fills the memory.
            self._make_room(n, cause)

    def _make_room(self, n: int, cause: str) -> None:
        """Calls ``relief`` or halves ``size``; raises MemoryError where neither is left."""
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        relief, self.relief = self.relief, None
        if relief and relief():
            tqdm.write("The accelerator's memory is full: going on with gradient checkpointing.")
        elif (at_once := min(self.size, n)) > 1:
            self.size = (at_once + 1) // 2
            tqdm.write(f"The accelerator's memory is full: going on with {self.size} images at once, not {at_once}.")
        else:
            raise MemoryError(
                "Not even one image fits into the accelerator's memory. Close what else uses it, or choose a smaller "
                f"backbone, finetune_method='lora' or optimizer='adamw-8bit'. Cause: {cause}"
            )
