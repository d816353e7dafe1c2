"""A run on several GPUs or nodes that share a disk: both trainings and the synthetic sets, by all processes together.

    accelerate launch --num_processes 8 -m sdgen_lib launch -p dataset pathmnist -p recipe paper --blocks 10

The searches between them are done by one of the processes, or by all where ``-p storage`` names what they can share.
Notebooks find everything made.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Sequence
from typing import Any

from ..config.settings import Settings, resolve
from ..course import Course
from ..evaluate.sets import APART, block_step
from ..machine.ranks import launched


def main(argv: Sequence[str] | None = None) -> None:
    """The command ``launch``: steps 1 to 5 of a run, without the tables' classifiers."""
    settings, num_blocks = options_of(argv)
    ranks = launched()
    make(course := Course(settings, ranks), num_blocks)
    if ranks.first:
        print(f"{course.run.path / '5_datasets'} holds the blocks, made by {ranks.count} processes.")


def options_of(argv: Sequence[str] | None) -> tuple[Settings, int]:
    """The run's settings, and how many blocks to make. Raises SystemExit for wrong arguments."""
    prog, description = "accelerate launch --num_processes N -m sdgen_lib launch", __doc__.splitlines()[0]
    parser = argparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument(
        "-p",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        dest="parameters",
        help="a parameter, as a notebook takes it",
    )
    parser.add_argument("--blocks", type=int, help="blocks to make; the recipe's max_multiple without it")
    options = parser.parse_args(argv)
    try:
        settings = resolve(**{name: parsed(value) for name, value in options.parameters})
        if options.blocks is not None and options.blocks < 1:
            raise ValueError(f"--blocks must be 1 or more, not {options.blocks}.")
    except ValueError as error:
        parser.error(str(error))
    return settings, options.blocks or settings.max_multiple


def parsed(value: str) -> Any:
    """A parameter's value: numbers, True, False and None are what they say, everything else is text."""
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value


def make(course: Course, num_blocks: int) -> None:
    """Makes what is missing of steps 1 to 5; every rank calls it, and they wait for each other where they have to."""
    method, run = course.method, course.run
    method.transfer()
    method.tune()  # one rank searches, the others wait and find it done; with a storage all do
    method.finetune()
    method.point("after 4")  # step 4
    source, nested = method.source("after 4"), course.settings.larger_sets == "nested"
    for block in range(1 if nested else APART, num_blocks + 1):
        run.result(block_step(course.workspace, source, block))


if __name__ == "__main__":
    main()
