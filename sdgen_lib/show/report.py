"""The command ``python -m sdgen_lib report``: the tables of every run, from the records on the disk alone."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..config.settings import unlike_recipe
from ..store.run import Result, default_runs_dir, is_of_older_version, results, settings_used, upstream
from .names import printable
from .tables import cas_table, scaling_table, taught_too_little

TABLES = {1: cas_table, 2: scaling_table}
FACTS = {1: ("test", "num_images", "point", "seconds"), 2: ("test", "num_images")}  # what the tables read of a row
# What is raised at a record that is whole, and not of our making: values of other kinds, or none.
UNREADABLE = (KeyError, IndexError, TypeError, AttributeError, ValueError, ArithmeticError, RecursionError, OSError)


@dataclasses.dataclass(frozen=True)
class Row:
    """A finished row of a table in a run folder.

    ``settings``: those that it depends on, as they were. ``origin``: what it was made from, by name: the fingerprints
    of its steps, of the data and of the model.
    """

    name: str
    result: Result
    settings: dict[str, Any]
    origin: dict[str, str]

    def agrees(self, other: Row) -> bool:
        """Whether everything that both depend on is the same, so that they may stand in one table."""
        pairs = ((self.settings, other.settings), (self.origin, other.origin))
        return all(one[key] == two[key] for one, two in pairs for key in one.keys() & two.keys())


def rows_in(run_folder: Path, table: int) -> list[Row]:
    """The finished rows of table 1 or 2 in a run folder, oldest first, whatever they were made with."""
    found = [r for r in results(run_folder, f"table_{table}/*") if all(name in r.facts for name in FACTS[table])]
    return [_row(run_folder, result) for result in found]


def _row(run_folder: Path, result: Result) -> Row:
    origin: dict[str, str] = {}
    for part in upstream(run_folder, result).values():
        origin |= part.record["needs"] | part.record["roots"] | {part.name: part.fingerprint}
    name = result.name.partition("/")[2].replace("_", " ")
    return Row(name, result, settings_used(run_folder, result), origin)


def together(rows: Sequence[Row]) -> list[list[Row]]:
    """The largest sets of rows of which no two disagree: each is a table. A row may stand in several of them."""
    groups: list[list[Row]] = []
    for row in rows:
        with_row = [[*(other for other in group if row.agrees(other)), row] for group in groups] or [[row]]
        groups = _largest([*groups, *with_row])
    return groups


def _largest(groups: list[list[Row]]) -> list[list[Row]]:
    """Without those that lie in another one."""
    sets = [frozenset(map(id, group)) for group in groups]
    return [
        group
        for i, group in enumerate(groups)
        if not any(sets[i] < other or (sets[i] == other and j < i) for j, other in enumerate(sets))
    ]


def changed(rows: Sequence[Row]) -> str:
    """The settings in which a table's rows differ from their recipe, as "transfer_epochs=1, n_trials=30"."""
    used = {name: value for row in rows for name, value in row.settings.items()}
    unlike = unlike_recipe(used, str(rows[0].result.record["run"].get("recipe")))
    return ", ".join(f"{name}={value!r}" for name, value in unlike.items())


def tables_of(run_folder: Path, title: str) -> str:
    """The tables of a run, as text; empty where it has none."""
    texts: dict[str, str] = {}  # by heading
    for number, table in TABLES.items():
        for rows in together(rows_in(run_folder, number)):
            heading = ", ".join(filter(None, (f"Table {number}, {title}", changed(rows))))
            if heading in texts:  # the data or the model's files were others
                heading += f" (finished {rows[-1].result.record['finished']})"
            facts = {row.name: row.result.facts for row in sorted(rows, key=_place)}
            shown = table(facts, rows[0].result.record["run"].get("dataset", "")).to_string()
            texts[heading] = "\n".join([shown, *taught_too_little(facts)])
    lines = "\n".join(f"\n{heading}\n{text}" for heading, text in texts.items()).split("\n")
    return "\n".join(map(printable, lines))  # a terminal obeys what it is shown


def _place(row: Row) -> tuple[int, str]:
    """x2 before x10, and names without a number first, in the order of the alphabet."""
    number = re.search(r"\d+$", row.name)
    return int(number[0]) if number else 0, row.name


def main(argv: Sequence[str] | None = None) -> None:
    """Prints tables 1 and 2 of every run in a folder; rows made with different settings stand in tables of their own.

    Raises SystemExit where there is no run.
    """
    parser = argparse.ArgumentParser(
        prog="python -m sdgen_lib report",
        description="Print the tables of every finished run. Rows that were made with different settings stand in "
        "tables of their own, whose headings name what differs from the recipe.",
    )
    parser.add_argument("runs", nargs="?", type=Path, metavar="RUNS", help="the runs' folder (default: runs/)")
    base = parser.parse_args(argv).runs or default_runs_dir()
    found = sorted(path for path in base.glob("*/*-seed*") if path.is_dir())
    if not found and base.match("*/*-seed*"):
        raise SystemExit(
            f"{base.absolute()} is a run itself: give the folder of the runs, {base.absolute().parents[1]}."
        )
    if not found:
        raise SystemExit(f"No run in {base.absolute()}: run the notebooks first (make course).")
    passed: dict[str, list[str]] = {
        "made by an older version": [],
        "unfinished": [],
        "with a record that this version cannot read": [],
    }
    for path in found:
        title = path.relative_to(base).as_posix()
        try:
            text = tables_of(path, title)
        except UNREADABLE:  # the others are shown nevertheless
            passed["with a record that this version cannot read"].append(printable(title))
            continue
        if text:
            print(text)
        else:
            passed["made by an older version" if is_of_older_version(path) else "unfinished"].append(printable(title))
    for why, names in passed.items():
        if names:
            print(f"\nPassed over, {why}: {', '.join(names)}")
