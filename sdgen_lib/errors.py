"""How an error looks in a notebook: its one line first (what was wrong, what is allowed, what to do), details below."""

from __future__ import annotations

import traceback
from pathlib import Path

PACKAGE = Path(__file__).parent


def one_line_first() -> None:
    """From now on in this notebook, errors that this package raises begin with their message. Elsewhere: nothing."""
    try:
        from IPython import get_ipython
    except ImportError:
        return
    if shell := get_ipython():
        shell.set_custom_exc((Exception,), _show)


def _show(shell, kind: type[Exception], error: Exception, frames, tb_offset: int | None = None) -> None:
    """IPython's display of an error, with another text for ours; called by IPython."""
    if Path(traceback.extract_tb(frames)[-1].filename).is_relative_to(PACKAGE):
        details = [line.rstrip() for line in traceback.format_tb(frames)[1:]]  # the first frame is IPython's
        text = [f"{kind.__name__}: {error}", "", "Where it was noticed:", *details]
        error._render_traceback_ = lambda: text  # what IPython asks an error for
    shell.showtraceback((kind, error, frames), tb_offset=tb_offset)
