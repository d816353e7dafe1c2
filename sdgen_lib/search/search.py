"""The Optuna search over inference steps (IS), guidance scale (UGS) and epoch: space, pruner, trials, importances."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import optuna
import pandas as pd
import torch
from optuna.exceptions import UpdateFinishedTrialError
from optuna.importance import FanovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial, TrialState
from torch import nn
from tqdm.auto import tqdm

from ..classify import Result, accuracy, looked_at, score, train_classifier
from ..data import ImageData, Split
from ..machine.parallel import best_at_once, side_by_side
from ..machine.seeds import derived
from .study import FINISHED, QUEUED

PARAMETERS = ("IS", "UGS", "epoch")
FEWEST = 4  # trials that fANOVA needs
KNOWN = "known"  # a trial's attribute: its point was given, not sampled
ROUNDING = 1e-6  # accuracies are float32
RESCORED = "rescored"  # a study's attribute: for each rescored point {"point", "seeds", "values"}


@dataclasses.dataclass(frozen=True)
class Space:
    """Inclusive ranges of the search: IS and epoch whole numbers, UGS a real one."""

    IS: tuple[int, int]
    UGS: tuple[float, float]
    epoch: tuple[int, int]

    def after(self, best: dict[str, float], epochs: int) -> Space:
        """Step 4's space (paper, section 3): IS up to the best of step 2, UGS up to twice its best.

        UGS keeps a range of at least 1, so that a best of 0 does not end the search before it begins.
        """
        lowest = self.UGS[0]
        return Space((self.IS[0], int(best["IS"])), (lowest, max(lowest + 1, 2 * best["UGS"])), (1, epochs))

    def nearest(self, point: Mapping[str, float]) -> dict[str, float]:
        """The point of the space that is nearest to ``point``, each parameter on its own."""
        ranges = dataclasses.asdict(self)
        return {name: min(max(point[name], low), high) for name, (low, high) in ranges.items()}

    def checked(self, point: Mapping[str, float]) -> dict[str, float]:
        """``point`` with the types that the search gives its own. Raises ValueError for one outside of the space."""
        ranges = dataclasses.asdict(self)
        for name, (low, high) in ranges.items():
            value = point.get(name)
            if value is None or not low <= value <= high or (name != "UGS" and value != int(value)):
                whole = "" if name == "UGS" else ", in whole numbers"
                raise ValueError(
                    f"The known point {dict(point)} is not in the search: {name} goes from {low} to {high}{whole}. "
                    "Give another one, leave it out, or take what `Space.nearest` makes of it."
                )
        return {name: float(point[name]) if name == "UGS" else int(point[name]) for name in ranges}


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a search prunes and samples."""

    pruner: optuna.pruners.BasePruner
    sampler: Callable[[int], optuna.samplers.BaseSampler]  # of trial number k: a killed search goes on as it would have
    brackets: int  # of Hyperband; one is successive halving
    first_rung: int  # the classifier epoch at which trials are first compared (in Hyperband: the earliest bracket's)
    random_first: int  # so many trials of each bracket come before TPE proposes one, known points among them


def plan(n_trials: int, n_epochs: int, seed: int) -> Plan:
    """A Hyperband pruner and TPE samplers whose sizes fit ``n_trials`` trials of ``n_epochs`` classifier epochs.

    Hyperband runs a separate TPE in each bracket, each with its own random start. Optuna's defaults deal 50 trials over
    100 epochs out to 5 brackets, in proportions 81:34:15:8:5, each with 10 trials at random first. TPE then proposes
    some 20 of the 50; more than half are random, and four of the five brackets hardly leave their random start. So: one
    bracket for every 20 trials (at most what the epochs allow), a third of a bracket's trials at random at first (10 at
    most). A trial survives a rung if it is among the best third of those that came so far. A single bracket is
    successive halving, whose first rung is then free to choose: after a third of the epochs. One after a fifth did less
    work and ended the trial that would have won too often (see README, "Pruning is not free").
    """
    factor = 3
    brackets = max(1, min(n_trials // 20, int(math.log(n_epochs, factor)) if n_epochs > 1 else 1))
    if brackets > 1:
        first_rung = n_epochs // factor**brackets + 1
        pruner = optuna.pruners.HyperbandPruner(first_rung, n_epochs, factor)
    else:
        first_rung = math.ceil(n_epochs / factor)
        pruner = optuna.pruners.SuccessiveHalvingPruner(first_rung, factor)
    random_first = max(2, min(10, n_trials // brackets // 3))

    def sampler(number: int) -> optuna.samplers.BaseSampler:
        return optuna.samplers.TPESampler(n_startup_trials=random_first, seed=(seed * 100_003 + number) % 2**32)

    return Plan(pruner, sampler, brackets, first_rung, random_first)


# --- the trials ---


def search(
    study: optuna.Study,
    space: Space,
    images_of: Callable[[int, float, int], torch.Tensor],
    labels: torch.Tensor,
    data: ImageData,
    *,
    n_trials: int,
    select_on: str,
    seed: int,
    classifier_seed: int,
    classifier_options: dict[str, Any],
    pruning: bool = True,
    known: Sequence[Mapping[str, float]] = (),
    on_trial: Callable[[optuna.Study], None] | None = None,
    shared: bool = False,
) -> optuna.Study:
    """Runs the trials that ``study`` still lacks of ``n_trials``; each one generates, trains a classifier and tests it.

    ``images_of(IS, UGS, epoch)`` -> uint8 (N, 3, H, W), one for each of ``labels``, int64 (N,). A trial's classifier is
    the one of its best epoch on real validation images. The objective is its accuracy there (``select_on`` "val"), or
    on the test images, on which the paper's released code tests each trial's classifier once ("test"). Both are
    recorded either way. The best validation accuracy so far is reported after every classifier epoch, and with
    ``pruning`` the trials that fall behind are ended. ``seed`` is the samplers'; each trial's classifier gets
    ``classifier_seed`` and ``classifier_options`` (see `train_classifier`; "epochs" is required). ``on_trial(study)``
    is called after each trial.

    ``known``: points {"IS", "UGS", "epoch"} that are tried before all others, once each, and to their end: the pruner
    compares the others with them, and ends none of them. They are among the ``n_trials`` and in TPE's random start.
    Several processes that begin a search at the same moment may each try them.
    Raises ValueError for one that is not in ``space``.

    Alone on the study (see `resume_study`) it goes on after a kill to the same trials. With ``shared`` any number of
    processes may call this on one study (see `share_study`). Each does trials until ``n_trials`` are finished, and does
    not wait for the others' running ones: together they may finish a few more, which `keep` leaves out.
    """
    known = [space.checked(point) for point in known]
    planned = plan(n_trials, classifier_options["epochs"], seed)
    # Hyperband makes its brackets when it is first asked; TPE, which looks at one bracket, needs them before that.
    planned.pruner.prune(study, optuna.trial.create_trial(value=0.0))
    study.pruner = planned.pruner if pruning else optuna.pruners.NopPruner()
    if not shared:  # whoever left these half done is gone
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            study.tell(trial.number, state=TrialState.FAIL)
    if len(study.get_trials(deepcopy=False, states=FINISHED)) < n_trials:
        _queue(study, known)
    objective = _Objective(
        planned.sampler, space, images_of, labels, data, select_on, classifier_seed, classifier_options
    )
    with tqdm(total=n_trials, desc=study.study_name, unit="trial") as bar:
        while (finished := len(study.get_trials(deepcopy=False, states=FINISHED))) < n_trials:
            bar.update(finished - bar.n)
            if _one_trial(study, objective, shared):
                _show_best(study, bar)
                if on_trial:
                    on_trial(study)
        bar.update(n_trials - bar.n)
    return study


def _queue(study: optuna.Study, known: Sequence[dict[str, float]]) -> None:
    """Queues each point of which there is no trial, or only failed ones (Optuna's `skip_if_exists` skips those too)."""
    for point in known:
        trials = study.get_trials(deepcopy=False)
        if all(t.state == TrialState.FAIL or t.system_attrs.get(QUEUED, t.params) != point for t in trials):
            study.enqueue_trial(point, user_attrs={KNOWN: True})


def _one_trial(study: optuna.Study, objective: _Objective, shared: bool) -> bool:
    """Runs one trial; returns whether it stayed this worker's to its end.

    A worker that was not heard of for too long is taken for dead, and its trial is another's. On SQLite, which cannot
    lock a row, two workers may also begin the same queued trial. What the later one says of it is refused by Optuna,
    in a ValueError or UpdateFinishedTrialError that is no fault of the objective.
    """
    try:
        study.optimize(objective, n_trials=1)
    except (ValueError, UpdateFinishedTrialError):
        if objective.failed or not shared:
            raise
        return False
    return True


def _show_best(study: optuna.Study, bar: tqdm) -> None:
    if study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):  # the first ones may all be pruned
        best = {name: round(value, 2) for name, value in study.best_params.items()}
        bar.set_postfix({"best": f"{study.best_value:.1%}", **best})


@dataclasses.dataclass
class _Objective:
    """What Optuna calls with each trial; the arguments are those of `search`."""

    sampler: Callable[[int], optuna.samplers.BaseSampler]
    space: Space
    images_of: Callable[[int, float, int], torch.Tensor]
    labels: torch.Tensor
    data: ImageData
    select_on: str
    classifier_seed: int
    classifier_options: dict[str, Any]
    failed: bool = False  # the last trial, by an error of its own

    def __call__(self, trial: optuna.Trial) -> float:
        self.failed = False
        try:
            return self._best_accuracy(trial)
        except (optuna.TrialPruned, UpdateFinishedTrialError):
            raise
        except BaseException:
            self.failed = True
            raise

    def _best_accuracy(self, trial: optuna.Trial) -> float:
        reached = _Reached(trial, self.data, self.select_on, self.classifier_options)
        trial.study.sampler = self.sampler(trial.number)
        steps = trial.suggest_int("IS", *self.space.IS)
        guidance = trial.suggest_float("UGS", *self.space.UGS)
        epoch = trial.suggest_int("epoch", *self.space.epoch)
        training = Split(self.images_of(steps, guidance, epoch), self.labels)
        trial.set_user_attr("generation_seconds", time.perf_counter() - reached.start)
        model, history = train_classifier(
            training,
            self.data.val,
            self.data.num_classes,
            seed=self.classifier_seed,
            on_epoch=reached,
            **self.classifier_options,
        )
        return reached.record(len(history), model)


class _Reached:
    """The best that one trial's classifier has reached so far; called after each of its epochs.

    Each call reports the best validation accuracy to the pruner, and raises TrialPruned if that ends the trial. Where
    epochs are compared by a part of the validation images ("val_images" of the options), it is that of the part.
    """

    def __init__(self, trial: optuna.Trial, data: ImageData, select_on: str, options: Mapping[str, Any]):
        self.trial, self.data, self.select_on, self.epochs = trial, data, select_on, options["epochs"]
        self.all_looked_at = looked_at(data.val, options.get("val_images")) is data.val
        self.start = time.perf_counter()
        self.val_accuracy, self.weights = -1.0, {}

    def __call__(self, epoch: int, model: nn.Module, val_accuracy: float) -> None:
        if val_accuracy > self.val_accuracy:
            self.val_accuracy, self.weights = val_accuracy, copy.deepcopy(model.state_dict())
        self.trial.report(self.val_accuracy, epoch)
        behind = epoch < self.epochs and self.trial.should_prune()  # on the last epoch all is paid
        if behind and not self.trial.user_attrs.get(KNOWN):
            self.record(epoch, model)
            raise optuna.TrialPruned

    def record(self, epochs: int, model: nn.Module) -> float:
        """Writes into the trial what it reached, puts the best weights into ``model``, and returns the objective."""
        model.load_state_dict(self.weights)
        val_accuracy = self.val_accuracy if self.all_looked_at else accuracy(model, self.data.val)
        test_accuracy = accuracy(model, self.data.test)
        value = val_accuracy if self.select_on == "val" else test_accuracy
        facts = {
            "value": value,
            "val_accuracy": val_accuracy,
            "test_accuracy": test_accuracy,
            "classifier_epochs": epochs,
            "seconds": time.perf_counter() - self.start,
        }
        for key, fact in facts.items():
            self.trial.set_user_attr(key, fact)
        return value


# --- choosing one ---


def rescore(
    study: optuna.Study,
    images_of: Callable[[int, float, int], torch.Tensor],
    labels: torch.Tensor,
    data: ImageData,
    *,
    count: int,
    select_on: str,
    classifier_seeds: Sequence[int],
    classifier_options: dict[str, Any],
) -> None:
    """Draws the ``count`` best complete trials anew and scores each with several classifiers: what `chosen` goes by.

    So are the known points of `search`, however they did: one of them stands in a table already, and only what is
    better on equal terms should take its place.
    The best of many trials owes some of its value to luck: of its noise, and of its one classifier. So ``images_of``
    should draw from other noise than the trials', and ``classifier_seeds`` be none of theirs; the rest as in `search`.
    Of trials of the same point the best one stands for all. Those of one trial are trained side by side on the cores.
    What they reached stays in the study trial by trial, so that a killed rescoring goes on.
    Raises ValueError where there is nothing to score or no classifier to score it.
    """
    seeds = [int(seed) for seed in classifier_seeds]
    if count < 1 or not seeds:
        raise ValueError(f"count is {count}, and there are {len(seeds)} classifier_seeds: give one or more of each.")
    few = [t for rank, t in enumerate(_best_few(study)) if rank < count or t.user_attrs.get(KNOWN)]
    tests = {"test": data.test} if select_on == "test" else {}
    with tqdm(total=len(few) * len(seeds), desc=f"{study.study_name}: rescoring", unit="classifier") as bar:
        for trial in few:
            kept = study.user_attrs.get(RESCORED, [])
            if any(r["point"] == trial.params and r["seeds"] == seeds for r in kept):
                bar.update(len(seeds))
                continue
            training = Split(images_of(*(trial.params[name] for name in PARAMETERS)), labels)

            def one(seed: int, look: Callable[..., None], training: Split = training) -> Result:
                options = {**classifier_options, "seed": seed, "on_epoch": look}
                return score(training, data.val, tests, data.num_classes, **options)

            values = []
            found = side_by_side([functools.partial(one, seed) for seed in seeds], best_at_once(len(seeds)))
            with contextlib.closing(found):
                for result in found:
                    values.append(result.tests["test"].accuracy if tests else result.val_accuracy)
                    bar.update()
            others = [r for r in kept if r["point"] != trial.params]
            study.set_user_attr(RESCORED, [*others, {"point": trial.params, "seeds": seeds, "values": values}])


def _best_few(study: optuna.Study) -> list[FrozenTrial]:
    """The complete trials of different points, the best one first; of equal ones the earlier."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    points: dict[tuple, FrozenTrial] = {}
    for trial in sorted(complete, key=lambda trial: -trial.value):
        points.setdefault(tuple(trial.params[name] for name in PARAMETERS), trial)
    return list(points.values())


def rescored_values(study: optuna.Study) -> dict[int, list[float]]:
    """What the classifiers of each rescored trial reached, by its number; the trial with the best first value first.

    Kept in the study by the point, since a copy of the study may number its trials otherwise.
    """
    kept = study.user_attrs.get(RESCORED, [])
    return {t.number: r["values"] for t in _best_few(study) for r in kept if r["point"] == t.params}


def chosen(study: optuna.Study) -> FrozenTrial:
    """The trial that a search ends with: of those that were rescored the one with the best mean, else the best one.

    Where means are equal, as few validation images make them, the known point stays: no other is better. Never a pruned
    one. Raises ValueError where no trial is complete.
    """
    if not (complete := _best_few(study)):
        raise ValueError(f"No trial of {study.study_name} is complete: raise n_trials, or search without pruning.")
    if not (values := rescored_values(study)):
        return complete[0]
    rescored = [trial for trial in complete if trial.number in values]
    best = max(np.mean(values[trial.number]) for trial in rescored)
    equal = [trial for trial in rescored if np.mean(values[trial.number]) >= best - ROUNDING]
    return next((trial for trial in equal if trial.user_attrs.get(KNOWN)), equal[0])


def rescored_frame(study: optuna.Study) -> pd.DataFrame:
    """A row for each rescored trial, the best one first, index ``trial``; empty where none was rescored.

    The point; "first value", the objective that the trial was picked for; "mean" and "standard error" of its several
    classifiers, all trained on one set of images; "classifiers", how many; "chosen". Accuracies as fractions.
    """
    trials, values = study.get_trials(deepcopy=False), rescored_values(study)
    rows = [
        {
            "trial": number,
            **trials[number].params,
            "first value": trials[number].value,
            "mean": np.mean(reached),
            "standard error": _spread(reached) / math.sqrt(len(reached)),
            "classifiers": len(reached),
            "chosen": number == chosen(study).number,
        }
        for number, reached in values.items()
    ]
    columns = ["trial", *PARAMETERS, "first value", "mean", "standard error", "classifiers", "chosen"]
    return pd.DataFrame(rows, columns=columns).set_index("trial").sort_values("mean", ascending=False, kind="stable")


def _spread(values: Sequence[float]) -> float:
    """The standard deviation of a sample; NaN of a single value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


# --- what they found ---


def value_of(trial: FrozenTrial) -> float:
    """A finished trial's objective; for a pruned one that of its best epoch until it was stopped."""
    return trial.value if trial.state == TrialState.COMPLETE else trial.user_attrs["value"]


def trials_frame(study: optuna.Study) -> pd.DataFrame:
    """One row per finished trial, index ``trial``: parameters, accuracies (0..1), whether pruned, epochs, seconds.

    A pruned trial's accuracies are those of a classifier trained for fewer epochs: not to be compared with the others'.
    "chosen": whether it is the trial that the search ends with (`chosen`). "rescored" and "rescored_sd": mean and
    standard deviation of what `rescore` found; NaN where it did nothing.
    """
    noted, values = ("val_accuracy", "test_accuracy", "classifier_epochs", "seconds"), rescored_values(study)
    rows = [
        {
            "trial": t.number,
            **t.params,
            "value": value_of(t),
            "pruned": t.state == TrialState.PRUNED,
            **{name: t.user_attrs[name] for name in noted},
            "rescored": float(np.mean(values[t.number])) if t.number in values else math.nan,
            "rescored_sd": _spread(values.get(t.number, ())),
        }
        for t in study.get_trials(deepcopy=False, states=FINISHED)
    ]
    accuracies = ["value", "val_accuracy", "test_accuracy"]
    rest = ["pruned", "classifier_epochs", "seconds", "rescored", "rescored_sd"]
    frame = pd.DataFrame(rows, columns=["trial", *PARAMETERS, *accuracies, *rest]).set_index("trial")
    any_complete = not frame.pruned.astype(bool).all()
    return frame.assign(chosen=frame.index == chosen(study).number if any_complete else False)


@dataclasses.dataclass(frozen=True)
class Compared:
    """Trials of a search and what they reached, all after as much training."""

    trials: list[FrozenTrial]
    values: list[float]
    said: str  # how many, and at which end: "11 complete trials"


def compared(study: optuna.Study, pruned: bool | None = None) -> Compared:
    """The trials of a search that can be compared with each other, which complete and pruned ones cannot as they are.

    A pruned trial's accuracy is that of a classifier trained for fewer epochs. So ``pruned`` False takes the complete
    trials and their values, as Optuna's importances do. Where pruning is at work these are mostly the better ones.
    True takes all finished trials, with the best validation accuracy up to the last classifier epoch that every one of
    them reached: the poor regions are there, but a training's beginning decides. Without a pruned trial both are the
    same. None takes the complete ones if they are ``FEWEST`` or more.
    Raises ValueError where a trial has noted no accuracies of its epochs, which only True asks for.
    """
    finished = study.get_trials(deepcopy=False, states=FINISHED)
    complete = [t for t in finished if t.state == TrialState.COMPLETE]
    if pruned is None:
        pruned = len(complete) < FEWEST
    if not pruned or len(complete) == len(finished):
        return Compared(complete, [t.value for t in complete], f"{len(complete)} complete trials")
    if silent := [t.number for t in finished if not t.intermediate_values]:
        raise ValueError(f"Trials {silent} have no accuracies of single epochs: compare the complete ones alone.")
    epoch = min(t.last_step for t in finished)
    said = f"{len(finished)} trials, all at classifier epoch {epoch}, on validation images"
    return Compared(finished, [t.intermediate_values[epoch] for t in finished], said)


def importances(study: optuna.Study, seed: int = 0, *, pruned: bool | None = None) -> pd.Series:
    """fANOVA importances of IS, UGS and epoch, summing to 1 (Hutter et al. 2014; paper, figure 1).

    ``pruned``: which trials count; see `compared`, whose ``said`` tells which. A parameter whose range is a single
    value has importance 0; all are NaN if all trials scored alike. Raises ValueError with fewer than four trials.
    """
    found = _enough(compared(study, pruned))
    return pd.Series(_importances(found.trials, found.values, seed), name=study.study_name)


def bootstrapped_importances(
    study: optuna.Study, seed: int = 0, *, pruned: bool | None = None, repeats: int = 20, level: float = 0.9
) -> pd.DataFrame:
    """How far the importances can be trusted: as `importances`, with an interval from resampling the trials.

    ``repeats`` times as many trials as there are are drawn from them with replacement (Efron 1979). A row for each of
    IS, UGS and epoch: "importance" of the trials themselves; "low" and "high", between which the middle ``level``
    (0..1) of the resampled importances lie. "trials" is how many there are.
    Raises ValueError with fewer than four trials, a level that is no share, or fewer than two repeats.
    """
    if not 0 < level < 1 or repeats < 2:
        raise ValueError(
            f"level is {level} and repeats {repeats}: give a level between 0 and 1, and 2 or more repeats."
        )
    found = _enough(compared(study, pruned))
    trials, values = found.trials, found.values
    random = np.random.default_rng(derived(seed, "bootstrap of importances"))
    drawn = []
    for rows in tqdm(random.integers(len(trials), size=(repeats, len(trials))), desc="resampling", unit="forest"):
        drawn.append(_importances([trials[row] for row in rows], [values[row] for row in rows], seed))
    resampled = pd.DataFrame(drawn)
    table = {
        "importance": pd.Series(_importances(trials, values, seed)),
        "low": resampled.quantile((1 - level) / 2),  # without the NaN of resamples that scored alike
        "high": resampled.quantile((1 + level) / 2),
    }
    return pd.DataFrame(table).assign(trials=len(trials))


def _enough(found: Compared) -> Compared:
    if len(found.trials) < FEWEST:
        raise ValueError(
            f"fANOVA needs at least {FEWEST} trials, and this search has {found.said}: raise n_trials or "
            "n_trials_retune, or let pruned trials count (pruned=True), if there are some."
        )
    return found


def _importances(trials: list[FrozenTrial], values: list[float], seed: int) -> dict[str, float]:
    whole = optuna.create_study(direction="maximize")
    whole.add_trials(
        optuna.trial.create_trial(params=t.params, distributions=t.distributions, value=value)
        for t, value in zip(trials, values)
    )
    searched = [p for p in PARAMETERS if not trials[0].distributions[p].single()]
    try:
        found = get_param_importances(whole, evaluator=FanovaImportanceEvaluator(seed=seed), params=searched)
    except RuntimeError:  # every trial reached the same accuracy: there is no variance to share out
        found = dict.fromkeys(PARAMETERS, float("nan"))
    return {p: float(found.get(p, 0.0)) for p in PARAMETERS}
