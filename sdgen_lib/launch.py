"""A run on several GPUs or nodes that share a disk: both trainings and the synthetic sets, by all processes together.

    accelerate launch --num_processes 8 -m sdgen_lib.launch -p dataset pathmnist -p recipe paper --blocks 10

The searches between them are done by one of the processes, or by all where ``-p storage`` names what they can share.
Notebooks find everything made.
"""

from __future__ import annotations

import argparse
import ast
import contextlib

import accelerate

from . import ranks as processes
from . import settings
from .course import Course


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="accelerate launch --num_processes N -m sdgen_lib.launch",
                                     description=__doc__.splitlines()[0])  # fmt: skip
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), dest="parameters",
                        help="a parameter, as a notebook takes it")  # fmt: skip
    parser.add_argument("--blocks", type=int, help="blocks to make; the recipe's max_multiple without it")
    args = parser.parse_args(argv)
    given = {}
    for name, value in args.parameters:
        try:
            given[name] = ast.literal_eval(value)  # numbers and None; everything else is text
        except (ValueError, SyntaxError):
            given[name] = value
    try:
        asked = settings.resolve(**given)
        if args.blocks is not None and args.blocks < 1:
            raise ValueError(f"--blocks must be 1 or more, not {args.blocks}.")
    except ValueError as error:
        parser.error(str(error))
    ranks = processes.launched()
    course = Course(asked)
    course.transfer(ranks)
    course.search()  # here and in `point` one process searches, the others wait and find it done
    ranks.wait()
    course.finetune(ranks)
    course.point("after 4")
    with course.run.lock("5_datasets") if ranks.first else contextlib.nullcontext():
        for block in range(asked.larger_sets == "nested", (args.blocks or asked.max_multiple) + 1):
            course.make_block(block, ranks)
    if ranks.first:
        print(f"{course.run.path / '5_datasets'} holds the blocks, made by {ranks.count} processes.")
    accelerate.PartialState().destroy_process_group()


if __name__ == "__main__":
    main()
