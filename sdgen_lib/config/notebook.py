"""The settings that a notebook's cells ask for."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

from .messages import one_line_first, unknown_name
from .settings import FIELDS, SHARED, Settings, resolve

NAMES = tuple(name for name in FIELDS if name != "given")  # what a cell may set


def _assigned(cell: str) -> list[str]:
    """The names that the top level of a cell assigns to one by one; none for a cell that is no plain Python."""
    try:
        statements = ast.parse(cell).body
    except (SyntaxError, ValueError):  # a cell with an IPython magic; a NUL character
        return []
    targets: list[ast.expr] = []
    for statement in statements:
        if isinstance(statement, ast.Assign):
            targets += statement.targets
        elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
            targets.append(statement.target)
    return [target.id for target in targets if isinstance(target, ast.Name)]


def from_notebook(namespace: Mapping[str, Any]) -> Settings:
    """Settings from a notebook's parameters cell and from what papermill injected after it.

    ``namespace`` is the notebook's ``globals()``. IPython keeps the cells that have run in its ``In``. The parameters
    cell is the last one that assigns all of `SHARED`; papermill's cell begins with "# Parameters". Every name that they
    assign must be a setting: papermill itself only warns about a misspelt ``-p`` name and then runs the default. Here
    it is a ValueError with the nearest right name. Without such cells, the settings are the globals of these names.
    From now on this notebook shows the package's errors with their message first.
    """
    one_line_first()
    assigned: list[str] = []
    for cell in namespace.get("In", []):
        names = _assigned(cell)
        if set(SHARED) <= set(names):
            assigned = names
        elif assigned and cell.startswith("# Parameters"):
            assigned += names
    for name in assigned:
        if name not in NAMES:
            raise unknown_name("parameter", name, NAMES)
    return resolve(**{name: namespace[name] for name in assigned or NAMES if name in namespace})
