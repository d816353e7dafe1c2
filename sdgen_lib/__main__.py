"""The command line: ``python -m sdgen_lib COMMAND ...``, and ``--help`` after it or after any command."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from .config.messages import unknown_name

# name: (the module whose `main(argv)` it runs, what it does)
COMMANDS = {
    "report": ("show.report", "print the tables of every finished run"),
    "export": ("share.export", "take a generated set or a trained generator out of a run"),
    "judge": ("tools.judge", "say whether generated images are worth it beside real ones, whoever made them"),
    "bench": ("tools.bench", "measure speed and memory against named peers"),
    "launch": ("tools.launch", "make a run with several processes, on several GPUs or nodes"),
    "pretrain": ("tools.pretrain", "train the tiny Stable Diffusion from scratch"),
}


def main(argv: Sequence[str] | None = None) -> int | None:
    """Run the command that `argv` begins with, on the rest of it; returns what to exit with.

    A command's module is imported only when it is asked for. Raises SystemExit for ``--help`` and wrong arguments.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="python -m sdgen_lib",
        description="What the course's package does from the command line.",
        epilog="commands:\n" + "\n".join(f"  {name:10}{does}" for name, (_, does) in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", metavar="COMMAND ...", help="one of the commands below; its own --help says more")
    command = parser.parse_args(argv[:1]).command
    if command not in COMMANDS:
        parser.error(str(unknown_name("command", command, COMMANDS)))
    for stream in (sys.stdout, sys.stderr):  # a Windows console or pipe may not know every letter of a name
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    module, _ = COMMANDS[command]
    try:
        found = importlib.import_module(f".{module}", __package__).main(argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads, `head` say, has seen enough; Python's own last flush goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return found


if __name__ == "__main__":
    sys.exit(main())
