"""What errors say: the value that was wrong, the nearest right name; and how a notebook shows an error."""

from __future__ import annotations

import difflib
import traceback
import unicodedata
from collections.abc import Iterable
from pathlib import Path

JOINERS = "\u200c\u200d"  # nothing to see, and needed: in Persian words, in pictures of families
PACKAGE = Path(__file__).parent.parent


def shown(value: object, length: int = 120) -> str:
    """``value`` as an error names it: its repr on one line, cut after ``length`` characters."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print a whole number of thousands of digits
        text = f"a very large {type(value).__name__}"
    text = " ".join(text.split())
    return text if len(text) <= length else text[:length] + "..."


def is_seen(character: str) -> bool:
    """Whether a character may stand in a line of text: letters and signs, the spaces of every script, joiners.

    Not a line break, an escape code, or a mark that turns the writing around.
    """
    return character.isprintable() or character in JOINERS or unicodedata.category(character) == "Zs"


def printable(text: object) -> str:
    """``text`` on one line: what is not seen there becomes "\N{REPLACEMENT CHARACTER}"."""
    return "".join(c if is_seen(c) else "\N{REPLACEMENT CHARACTER}" for c in str(text))


def unknown_name(what: str, name: object, allowed: Iterable[str]) -> ValueError:
    """The error for a misspelt name: says what was wrong, the nearest right name, and all right ones.

    Example: ``raise unknown_name("recipe", "dmeo", RECIPES)``.
    """
    allowed = sorted(allowed)
    near = difflib.get_close_matches(shown(name).strip("'"), allowed, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return ValueError(f"Unknown {what} {shown(name)}.{hint} Allowed: {', '.join(allowed)}.")


def one_line_first() -> None:
    """Makes this notebook show the errors that this package raises with their message first, the frames below.

    Errors of other packages look as before, also where somebody else has set how some errors are shown. Outside of
    IPython it does nothing.
    """
    try:
        from IPython import get_ipython
    except ImportError:
        return
    shell = get_ipython()
    if shell is None or getattr(shell.CustomTB, "shows_sdgens", False):  # this cell has run before
        return
    kinds, others = shell.custom_exceptions, shell.CustomTB  # nobody's, or somebody else's

    def show(shell, kind: type[Exception], error: Exception, frames, tb_offset: int | None = None) -> list[str] | None:
        """Displays ``error`` in the notebook; IPython calls it."""
        if _is_ours(frames):
            details = [line.rstrip() for line in traceback.format_tb(frames)[1:]]  # the first frame is IPython's
            text = [f"{kind.__name__}: {error}", "", "Where it was noticed:", *details]
            error._render_traceback_ = lambda: text  # what IPython asks an error for
        elif isinstance(error, kinds):
            return others(kind, error, frames, tb_offset=tb_offset)
        return shell.showtraceback((kind, error, frames), tb_offset=tb_offset, running_compiled_code=True)

    shell.set_custom_exc((Exception, *kinds), show)
    shell.CustomTB.__func__.shows_sdgens = True


def _is_ours(frames) -> bool:
    """Whether a traceback ends in this package."""
    return Path(traceback.extract_tb(frames)[-1].filename).is_relative_to(PACKAGE)
