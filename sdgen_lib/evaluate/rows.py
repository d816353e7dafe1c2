"""A row of a table: classifiers of several seeds, trained on one thing and scored on real test images.

What they are trained on, with which network and augmentation, and on which named test sets they are scored are
arguments; CAS, table 1 and table 2 are calls of `row_step`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..classify import Attack, Mixture, Result, score
from ..config.settings import View
from ..data import Split
from ..machine.parallel import best_at_once, side_by_side
from ..machine.passes import Work
from ..machine.seeds import derived
from ..store import files
from ..store.run import Step
from ..work.workspace import Workspace, classifier_options, classifier_work

PREDICTED = "predicted.safetensors"
ROW_VERSION = 3  # raised whenever the same settings would train other classifiers, or a row says more of them
ROW_TOPICS = ("classifier", "table", "precision", "seed")


@dataclasses.dataclass(frozen=True)
class Training:
    """What the classifiers of a row are trained on, and what is said of it in the row."""

    images: Split | Mixture
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def row_step(
    ws: Workspace,
    name: str,
    training: Callable[[View], Training],
    num_images: int,
    *,
    needs: tuple[Step, ...] = (),
    topics: tuple[str, ...] = (),
    roots: tuple[str, ...] = (),
    inputs: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    tests: Mapping[str, Split] | None = None,
    attacks: Mapping[str, Attack] | None = None,
    before: Callable[[], Work] | None = None,
    title: str = "",
    label: str = "",
) -> Step:
    """The step of one row, ``name`` of a table ("table_2/x1").

    ``training(settings)``: called when the row is made; ``num_images``: how many it holds. ``needs``, ``topics``,
    ``roots`` and ``inputs``: what it depends on beside the classifier's own settings, the ratio and the weights of a
    mixture among them. ``options``: of `classify.train_classifier` (network, augmentation, steps), over the settings'.
    ``tests``: named test sets beside the data's own, which is "test". ``attacks``: of the data's own test images, by
    name. ``before()``: what is done before the classifiers, for the estimate. ``label``: what their progress bar says,
    if the row's ``name`` does not tell it from others.
    """
    for name_taken, whose in (("test", "the data's own test images"), ("__metadata__", "no tensor of a file")):
        if name_taken in (tests or {}):
            raise ValueError(f'"{name_taken}" is the name of {whose}: give the other test set another name.')
    options, tests, attacks = dict(options or {}), {"test": ws.data.test, **(tests or {})}, dict(attacks or {})

    def make(folder: Path, s: View) -> dict[str, Any]:
        found = training(s)
        scored = scores(ws, s, found.images, tests, {**options, "attacks": attacks}, label or name)
        predicted = {test: torch.stack([r.tests[test].predicted for r in scored]) for test in tests}
        files.save_tensors(folder / PREDICTED, predicted)
        n, classes = len(ws.data.test), ws.data.num_classes
        largest = int(ws.data.test.labels.bincount().max()) / n
        known = {"num_images": num_images, "num_test": n, "num_classes": classes, "largest_class": largest}
        return {**found.facts, **known, **accuracies(scored)}

    def work() -> Work:
        s = ws.settings
        pixels, classes = s.image_size or ws.data.image_size, ws.data.num_classes
        trained = classifier_work(s, num_images, pixels, classes, s.classifier_seeds)
        for step in trained:  # a step uphill costs what a training step does
            trained[step] += s.classifier_seeds * len(ws.data.test) * sum(attack.steps for attack in attacks.values())
        return {**(before() if before else {}), **trained}

    return Step(
        name,
        make,
        topics=(*ROW_TOPICS, *topics),
        needs=needs,
        roots=tuple(dict.fromkeys(("data", *roots))),
        inputs={
            **(inputs or {}),
            "num_images": num_images,
            "options": {name: value if _is_plain(value) else str(value) for name, value in options.items()},
            "tests": {test: split.fingerprint for test, split in tests.items() if test != "test"},
            "attacks": {attack: dataclasses.asdict(how) for attack, how in attacks.items()},
        },
        version=ROW_VERSION,
        work=work,
        title=title,
    )


def _is_plain(value: Any) -> bool:
    """Whether JSON can hold it as it is (a dtype, say, goes by its name)."""
    return value is None or isinstance(value, bool | int | float | str)


def scores(
    ws: Workspace, s: View, training: Split | Mixture, tests: Mapping[str, Split], options: Mapping[str, Any], name: str
) -> list[Result]:
    """What the run's classifier seeds reach with one training set, a core each side by side; options of `score`.

    Seed k of a run's tables is derived from (run seed, "table", k): runs share none, and the searches use none of them.
    """
    seeds = [derived(s.seed, "table", k) for k in range(s.classifier_seeds)]
    how = {**classifier_options(s), **options}

    def one(seed: int, look: Callable[..., None]) -> Result:
        return score(training, ws.data.val, dict(tests), ws.data.num_classes, seed=seed, on_epoch=look, **how)

    found = side_by_side([functools.partial(one, seed) for seed in seeds], best_at_once(len(seeds)))
    with contextlib.closing(found), tqdm(total=len(seeds), desc=f"{name}: classifiers", unit="classifier") as bar:
        results = []
        for result in found:
            results.append(result)
            bar.update()
    return results


def accuracies(found: list[Result]) -> dict[str, Any]:
    """A row's numbers as fractions, a list with one entry a classifier seed: what the tables are made of.

    Beside them a row has "largest_class", the accuracy of the answer "always the largest class", "num_test", the number
    of test images, and "num_classes".

    "test", "balanced_test", "per_class", "calibration" (the expected calibration error, None where it is not known) and
    "attacks" (accuracies by the attack's name) are of the data's own test images; "tests" has the other named sets.
    """
    rows = {
        test: {
            "accuracy": [r.tests[test].accuracy for r in found],
            "balanced": [r.tests[test].balanced_accuracy for r in found],
            "per_class": [[_known(recall) for recall in r.tests[test].per_class] for r in found],
            "calibration": [_known(r.tests[test].calibration_error) for r in found],
        }
        for test in found[0].tests
    }
    own = rows.pop("test")
    row = {
        "test": own["accuracy"],
        "balanced_test": own["balanced"],
        "per_class": own["per_class"],
        "calibration": own["calibration"],
        "val": [r.val_accuracy for r in found],
        "steps": [r.steps for r in found],
    }
    attacks = {name: [r.attacks[name] for r in found] for name in found[0].attacks}
    return row | ({"tests": rows} if rows else {}) | ({"attacks": attacks} if attacks else {})


def _known(value: float) -> float | None:
    """None for nan, which is no JSON."""
    return None if math.isnan(value) else value
