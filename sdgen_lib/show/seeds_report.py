"""What runs of several seeds say together: ``python -m sdgen_lib report --seeds``.

A run's own intervals cover the random starts of its classifiers. Another ``seed`` is another choice of few images,
another training of the generator, other drawn images and other classifiers: what differs over seeds covers all of it.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..config.settings import FIELDS, unlike_recipe
from ..evaluate.augmented_studies import Row as TailRow
from ..store.run import Result, results, settings_used, upstream
from .names import printable
from .tables import LARGEST, compared, percent

#: The tables, by the folder of their rows: a heading, and the end of the name of the row that others are compared with.
TABLES = {
    "table_1": ("CAS after each step", "after_1"),
    "table_2": ("sets of the real one's size and more", "real"),
    "worth": ("beside real images", "real"),
    "long_tail": ("a long tail", "long_tail"),
    "judged": ("other people's images", "real"),
}
DRAWN = ("5_datasets/", "long_tail/filling")  # the steps whose inputs say what drew a row's images
SAID_ELSEWHERE = re.compile(r".*\.(seed|num_images|epoch_images|epoch_limit)")  # of a row's choices, not in its name
OVER_SEEDS = "mean ± st. dev. over seeds"


@dataclasses.dataclass(frozen=True)
class Seeded:
    """One row of a table in the runs of several seeds: ``choices`` tell it from the others, ``facts`` by seed."""

    name: str
    recipe: str
    choices: Mapping[str, Any]
    facts: Mapping[int, Mapping[str, Any]]

    def means(self, key: str) -> dict[int, float]:
        """The mean over a seed's classifiers of a fact, by seed."""
        return {seed: float(np.mean(facts[key])) for seed, facts in self.facts.items()}


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """{"options": {"steps": 3}} -> {"options.steps": 3}; what is no mapping stays as it is."""
    if not isinstance(value, Mapping):
        return {name: value}
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found |= _flat(inner, f"{name}.{key}" if name else str(key))
    return found


PLAIN_TAIL = _flat(dataclasses.asdict(TailRow()), "row")  # what the long tail's row of real images chose


def _choices(run_folder: Path, result: Result) -> dict[str, Any]:
    """All that was chosen for a row: settings, its own inputs, those of what drew its images, and the steps' versions.

    An input that has a setting's name is another thing: ``num_images`` of a row are all of its set, as a setting those
    of a trial.
    """
    drawn: dict[str, Any] = {}
    for part in upstream(run_folder, result).values():
        drawn[f"version.{part.name}"] = part.record.get("version")
        if part.name.startswith(DRAWN):
            inputs = {name: value for name, value in part.record["inputs"].items() if name != "block"}
            drawn |= _flat(inputs, "drawn")
    of_data = {name: value for name, value in result.record.get("data", {}).items() if name != "dataset"}
    inputs = {f"input.{key}" if key in FIELDS else key: value for key, value in _flat(result.record["inputs"]).items()}
    chosen = _flat(settings_used(run_folder, result)) | of_data | inputs | drawn
    return {name: value for name, value in sorted(chosen.items()) if name != "seed"}


def rows_over_seeds(folders: Sequence[Path], table: str) -> list[Seeded]:
    """The rows of one of `TABLES` in the folders of runs that differ by their seed; of equal ones the newest counts."""
    names: dict[str, tuple[str, str, dict[str, Any]]] = {}
    facts: dict[str, dict[int, Mapping[str, Any]]] = {}
    for folder in folders:
        found = [*results(folder, table), *results(folder, f"{table}/*")]
        for result in found:
            if "test" not in result.facts:  # what a row was made from
                continue
            choices, run = _choices(folder, result), result.record["run"]
            key = json.dumps([result.name, choices], sort_keys=True)
            names[key] = result.name, str(run.get("recipe")), choices
            facts.setdefault(key, {})[int(run["seed"])] = result.facts
    return [Seeded(*names[key], facts[key]) for key in names]


def named(rows: Sequence[Seeded]) -> dict[str, Seeded]:
    """The rows by a name that says what tells each from the others of its kind, as "both, augmentation='..'"."""
    found = {}
    for row in rows:
        kin = [other.choices for other in rows if other.name == row.name]
        differs = [
            key
            for key in dict.fromkeys(key for choices in kin for key in choices)
            if not SAID_ELSEWHERE.fullmatch(key) and any(c.get(key) != row.choices.get(key) for c in kin)
        ]
        chosen = {key: row.choices[key] for key in differs if row.choices.get(key) is not None}
        chosen = {key: value for key, value in chosen.items() if key not in PLAIN_TAIL or PLAIN_TAIL[key] != value}
        title = row.name.rpartition("/")[2].replace("_", " ")
        shown = ", ".join([title, *(f"{key.rpartition('.')[2]}={value!r}" for key, value in chosen.items())])
        again = 2
        name = shown
        while name in found:
            name, again = f"{shown} ({again})", again + 1
        found[name] = row
    return found


def reference(row: Seeded, rows: Sequence[Seeded], end: str) -> Seeded | None:
    """The row that ``row`` is compared with: of those whose name ends so, the one that agrees in most choices.

    It took as many steps. None where there is none, or it is the row itself.
    """

    def fits(other: Seeded) -> bool:
        if other.name.rpartition("/")[2] != end or other.facts.keys().isdisjoint(row.facts):
            return False
        if end == "long_tail" and any(other.choices.get(key) != value for key, value in PLAIN_TAIL.items()):
            return False
        return other.choices.get("options.steps") == row.choices.get("options.steps")

    def agreement(other: Seeded) -> int:
        return sum(other.choices.get(key) == value for key, value in row.choices.items())

    candidates = [other for other in rows if fits(other)]
    if not candidates or any(other is row for other in candidates):
        return None
    return max(candidates, key=agreement)


def table_of(rows: Sequence[Seeded], end: str) -> pd.DataFrame:
    """A line for each row that two seeds or more have: accuracies in percent over seeds, and the paired difference.

    "minus ..": of the means of equal seeds, with Student's 95 % interval over seeds.
    """
    several = [row for row in rows if len(row.facts) > 1]
    shown = {}
    names = named(several)
    of = {id(row): name for name, row in names.items()}
    for name, row in names.items():
        test = row.means("test")
        facts = next(iter(row.facts.values()))
        line = {"seeds": len(test), f"accuracy %, {OVER_SEEDS}": percent(list(test.values()))}
        if all("balanced_test" in f for f in row.facts.values()):
            line["balanced %"] = percent(list(row.means("balanced_test").values()))
        line[f"{LARGEST} %"] = percent([facts["largest_class"]]) if "largest_class" in facts else ""
        line["images"] = facts["num_images"]
        line["difference"] = ""
        if other := reference(row, several, end):
            both = sorted(test.keys() & other.facts.keys())
            theirs = other.means("test")
            mean, low, high, verdict = compared([test[s] for s in both], [theirs[s] for s in both])
            within = "" if np.isnan(low) else f" [{low:+.1f}, {high:+.1f}]"
            line["difference"] = f"{mean:+.1f}{within} to {of[id(other)]!r}: {verdict}"
        shown[name] = line
    return pd.DataFrame.from_dict(shown, orient="index")


def families(base: Path) -> dict[str, list[Path]]:
    """The folders of runs that differ by their seed alone, by what their paths have in common."""
    found: dict[str, list[Path]] = {}
    for path in sorted(path for path in base.glob("*/*-seed*") if path.is_dir()):
        found.setdefault(path.relative_to(base).as_posix().rpartition("-seed")[0], []).append(path)
    return found


def text_of(base: Path) -> str:
    """All tables over seeds of a folder of runs, as text; empty where no row has two seeds."""
    blocks = []
    for family, folders in families(base).items():
        for table, (title, end) in TABLES.items():
            rows = rows_over_seeds(folders, table)
            shown = table_of(rows, end)
            if shown.empty:
                continue
            used = {name: value for row in rows for name, value in row.choices.items() if "." not in name}
            same = {n: v for n, v in used.items() if all(r.choices.get(n, v) == v for r in rows)}
            changed = ", ".join(f"{n}={v!r}" for n, v in unlike_recipe(same, rows[0].recipe).items())
            heading = ", ".join(filter(None, (f"Over seeds, {family}: {title}", changed)))
            alone = sum(len(row.facts) == 1 for row in rows)
            lines = [heading, *shown.to_string().split("\n")]
            if alone:
                lines.append(f"({alone} rows of one seed alone are not here.)")
            blocks.append("\n".join(map(printable, lines)))
    return "\n\n".join(blocks)
