"""How a row's classifiers do elsewhere: on corrupted test images, on another dataset's, under attack.

Such a row is one of `evaluate.worth` that is tested on more: it trains the same classifiers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..classify import ATTACKS, Attack
from ..config.messages import unknown_name
from ..data import Split, load
from ..data.shifts import CORRUPTIONS, SEVERITIES, corrupted, same_classes
from ..data.sources import IMAGE_SIZES, checkout
from ..work.workspace import Source, Workspace
from .worth import worth

TESTED = (1, 3, 5)  # severities
Row = Mapping[str, Any]  # facts as `rows.accuracies` gives them


def name_at(corruption: str, severity: int) -> str:
    """What the test set of a corruption at a severity is called in a row: "jpeg 3"."""
    return f"{corruption} {severity}"


def shifted_set(ws: Workspace, dataset: str) -> Split:
    """The test images of another dataset of the same classes, a name or path as of `data.load`, in the data's size."""
    size = ws.data.image_size if ws.data.image_size in IMAGE_SIZES else None
    return same_classes(ws.data, load(dataset, size, base_dir=checkout()))


def shifted_tests(
    ws: Workspace, shifted_to: Mapping[str, Split] | None = None, severities: Sequence[int] = TESTED
) -> dict[str, Split]:
    """The data's test images under every corruption of `data.shifts`, at each of the ``severities``, and other sets.

    ``shifted_to``: these, by names of their own, see `shifted_set`. The corruptions' random numbers depend
    on the run's seed. Raises ValueError for a severity that is not 1 to 5, or a name that a corruption or the data's
    own test images have.
    """
    tests = {
        name_at(name, severity): corrupted(ws.data.test, name, severity, ws.settings.seed)
        for name in CORRUPTIONS
        for severity in severities
    }
    reserved = {"test", *CORRUPTIONS, *(name_at(name, severity) for name in CORRUPTIONS for severity in SEVERITIES)}
    if taken := sorted(reserved & set(shifted_to or {})):
        raise ValueError(
            f"A test set is called {taken[0]!r}, as a corruption or the data's own test images are: give it another "
            f"name (of a folder, './{taken[0]}')."
        )
    return tests | dict(shifted_to or {})


def elsewhere_row(
    ws: Workspace,
    source: Source | None,
    kind: str,
    tests: Mapping[str, Split] | None = None,
    attacks: Mapping[str, Attack] | None = ATTACKS,
    **how: Any,
) -> dict[str, Any]:
    """A row of `worth.worth` that is also tested on `shifted_tests` and attacked, made if it is not there.

    ``source``, ``kind`` and ``how`` as `worth.worth_step` takes them. ``tests``: for several rows, made once; None:
    those of the corruptions alone.
    """
    return worth(ws, source, kind, tests=shifted_tests(ws) if tests is None else tests, attacks=attacks, **how)


def drop(row: Row, test: str) -> list[float]:
    """The accuracy on the own test images minus that on the set ``test``, for each classifier seed, as fractions.

    Raises ValueError if the row has no such set.
    """
    tests = row.get("tests", {})
    if test not in tests:
        raise unknown_name("test set", test, tests)
    return (np.array(row["test"]) - np.array(tests[test]["accuracy"])).tolist()


def by_severity(row: Row) -> dict[int, list[float]]:
    """For each severity tested, from the lowest, the mean accuracy over the corruptions, for each classifier seed."""
    tests, found = row.get("tests", {}), {}
    for severity in SEVERITIES:
        names = [name_at(name, severity) for name in CORRUPTIONS if name_at(name, severity) in tests]
        if names:
            found[severity] = _mean([tests[name]["accuracy"] for name in names])
    return found


def by_shift(row: Row) -> dict[str, list[float]]:
    """For each corruption the mean accuracy over the severities tested, and that on each other set; a list as above."""
    tests = dict(row.get("tests", {}))
    found = {}
    for name in CORRUPTIONS:
        at = [tests.pop(key) for severity in SEVERITIES if (key := name_at(name, severity)) in tests]
        if at:
            found[name] = _mean([test["accuracy"] for test in at])
    return found | {name: test["accuracy"] for name, test in tests.items()}


def _mean(accuracies: Sequence[Sequence[float]]) -> list[float]:
    """Lists of a number for each classifier -> their mean, a number for each classifier."""
    return np.mean(accuracies, axis=0).tolist()
