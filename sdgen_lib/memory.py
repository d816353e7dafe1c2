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

    ``size``: images at once. ``relief``: called first when memory runs out, once, for what makes room at another price
    (gradient checkpointing); returns whether it changed anything.
    """

    size: int
    relief: Callable[[], bool] | None = None

    def run(self, n: int, begin: Callable[[], None], work: Callable[[slice], None]) -> None:
        """Calls ``begin()``, then ``work(rows)`` for slices that cover range(n); from ``begin`` again after a retreat.

        Raises MemoryError if not even one image fits.
        """
        while True:
            try:
                begin()
                for start in range(0, n, self.size):
                    work(slice(start, min(start + self.size, n)))
                return
            except torch.OutOfMemoryError as error:
                cause = str(error).splitlines()[0]
            # Outside of the handler, whose traceback keeps what filled the memory.
            self._retreat(n, cause)

    def _retreat(self, n: int, cause: str) -> None:
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
