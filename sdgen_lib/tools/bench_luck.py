"""How much of a search's choice is luck: the benchmark ``luck``."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from optuna.trial import FrozenTrial

from ..config import settings
from ..course import Course, Point
from ..diffusion.generate import balanced_labels
from ..machine.seeds import derived
from ..search import search as searches
from ..search.study import resume_study
from ..work.workspace import classifier_options
from .bench_runs import runs_dir

LONGER = 3  # times the recipe's trials
LONG_RESCORED, LONG_CLASSIFIERS = 5, 4  # of the long search: its best few drawn anew, and by how many classifiers
JUDGED, JUDGES = 2, 2  # sets drawn of each point to judge it, and classifiers on each


@dataclasses.dataclass(frozen=True)
class _Judged:
    """What each point reached on validation images, by its parameters: float (sets drawn, classifiers), fractions."""

    values: dict[tuple, np.ndarray]

    def mean(self, trial: FrozenTrial) -> float:
        return float(self.values[_point(trial)].mean())

    def error(self, trial: FrozenTrial, other: FrozenTrial) -> float:
        """The standard error of the difference of two points' means; 0 of a point and itself.

        All points share the noise of the sets and the seeds of the classifiers, so differences are looked at, set by
        set: two classifiers on one set are no two sets. Of two sets alone a variance says little. So it is the mean
        variance of all pairs of points.
        """
        if _point(trial) == _point(other):
            return 0.0
        of_sets = np.stack([values.mean(1) for values in self.values.values()])  # (points, sets)
        pairs = [one - two for i, one in enumerate(of_sets) for two in of_sets[:i]]
        return math.sqrt(np.mean([np.var(pair, ddof=1) for pair in pairs]) / of_sets.shape[1])


def luck(o: argparse.Namespace) -> list[dict[str, Any]]:
    """How often the first search ends within one standard error of where a search of three times its trials ends.

    On one step 1, that of seed 0, `demo`'s search is made ``--repeats`` times, each time with other random trials,
    noise and classifiers, and a long one once. Each ends with a point of its best few, drawn anew. These points, and
    the first best trials that the searches would have ended with otherwise, are then judged alike: drawn twice more
    from noise that no search had, and scored on validation images by classifiers that none had. So no point's own luck
    counts for it, not the long search's either. "Within" is: no more below the long search's end than one standard
    error of the difference. Of two equally good points that is so in five of six cases, not always (one sided,
    Gaussian). A row for each search and one for all; accuracies as fractions.
    The searches are kept in ``runs/bench``, and a killed one goes on.
    """
    course = Course(settings.resolve("demo", o.backbone, dataset=o.dataset, seed=0, runs_dir=str(runs_dir())))
    course.transfer()
    long = searched(course, 0, LONGER * course.settings.n_trials, LONG_RESCORED, LONG_CLASSIFIERS)
    s = course.settings
    short = [
        searched(course, k, s.n_trials, s.rescored, s.rescoring_classifiers) for k in range(1, max(1, o.repeats) + 1)
    ]
    ends = {study.study_name: (searches.chosen(study), study.best_trial) for study in (long, *short)}
    judged = judge(course, [trial for pair in ends.values() for trial in pair])
    rows = [row(name, *pair, judged, ends[long.study_name][0]) for name, pair in ends.items()]
    return [*rows, over_searches(rows[1:])]


def searched(course: Course, number: int, n_trials: int, rescored: int, classifiers: int) -> optuna.Study:
    """Search ``number`` on the course's step 1, as step 2 does it, from noise and with classifiers of its own."""
    s, name = course.settings, f"search {number}, {n_trials} trials"
    options = classifier_options(s, in_search=True)
    study = resume_study(_folder(course) / f"{name}.log", name)
    labels = balanced_labels(s.num_images, course.data.num_classes)
    searches.search(
        study,
        course.method.first_space(),
        _drawn(course, labels, f"luck, {name}"),
        labels,
        course.data,
        n_trials=n_trials,
        select_on="val",
        seed=number,
        classifier_seed=derived(s.seed, "luck", number),
        classifier_options=options,
        pruning=s.pruning,
    )
    _rescore(course, study, rescored, f"luck, rescoring of {name}", _seeds("luck, rescoring", number, classifiers))
    return study


def judge(course: Course, trials: list[FrozenTrial]) -> _Judged:
    """By the point of the trials, what it reaches: drawn `JUDGED` times more, scored by `JUDGES` classifiers each."""
    values: dict[tuple, list[list[float]]] = {}
    for k in range(JUDGED):
        name = f"judging {k}"
        study = resume_study(_folder(course) / f"{name}.log", name)
        there = {_point(t) for t in study.get_trials(deepcopy=False)}
        for trial in {_point(t): t for t in trials if _point(t) not in there}.values():
            study.add_trial(
                optuna.trial.create_trial(params=trial.params, distributions=trial.distributions, value=trial.value)
            )
        _rescore(course, study, len(study.trials), f"luck, {name}", _seeds("luck, judging", k, JUDGES))
        found = searches.rescored_values(study)
        for trial in study.get_trials(deepcopy=False):
            values.setdefault(_point(trial), []).append(found[trial.number])
    return _Judged({point: np.array(values[point]) for point in map(_point, trials)})


def row(name: str, chosen: FrozenTrial, first_best: FrozenTrial, judged: _Judged, best: FrozenTrial) -> dict[str, Any]:
    """One search: where it ended, what that is worth, and whether it is near ``best``, the long search's end."""

    def near(trial: FrozenTrial) -> bool:
        return judged.mean(trial) >= judged.mean(best) - judged.error(trial, best)

    return {
        "what": name,
        **chosen.params,
        "judged": judged.mean(chosen),
        "standard error to the long search's": judged.error(chosen, best),
        "within one of it": near(chosen),
        "first best trial's value": first_best.value,
        "first best, judged": judged.mean(first_best),
        "first best within one": near(first_best),
    }


def over_searches(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The last row of `luck`: how many of the short searches ended near the long one's end, and the means."""
    choices = ("within one of it", "first best within one")
    means = ("judged", "first best trial's value", "first best, judged")
    return {
        "what": f"{len(rows)} searches",
        **{key: f"{sum(r[key] for r in rows)} of {len(rows)}" for key in choices},
        **{key: float(np.mean([r[key] for r in rows])) for key in means},
    }


def _rescore(course: Course, study: optuna.Study, count: int, set_name: str, seeds: list[int]) -> None:
    s = course.settings
    labels = balanced_labels(s.rescoring_images or s.num_images, course.data.num_classes)
    searches.rescore(
        study,
        _drawn(course, labels, set_name),
        labels,
        course.data,
        count=count,
        select_on="val",
        classifier_seeds=seeds,
        classifier_options=classifier_options(s, in_search=True),
    )


def _drawn(course: Course, labels: torch.Tensor, set_name: str) -> Callable[[int, float, int], torch.Tensor]:
    def images_of(steps: int, guidance: float, epoch: int) -> torch.Tensor:
        return course.draw(Point(steps, guidance, epoch), labels, set_name)

    return images_of


def _seeds(purpose: str, number: int, count: int) -> list[int]:
    return [derived(0, purpose, number, k) for k in range(count)]


def _point(trial: FrozenTrial) -> tuple:
    return tuple(trial.params[name] for name in searches.PARAMETERS)


def _folder(course: Course) -> Path:
    """Where the searches of this course are kept; what step 2 hangs on is in its name."""
    folder = runs_dir() / "luck" / f"{course.data.slug}-{course.run.fingerprint(course.method.tune_step())[:8]}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
