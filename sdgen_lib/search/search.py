"""The Optuna search over inference steps (IS), guidance scale (UGS) and epoch: space, pruner, trials, importances."""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Callable
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

from ..classify import accuracy, train_classifier
from ..data import ImageData, Split
from ..machine.seeds import derived
from .study import FINISHED

PARAMETERS = ("IS", "UGS", "epoch")


@dataclasses.dataclass(frozen=True)
class Space:
    """Inclusive ranges of the search: IS and epoch whole numbers, UGS a real one."""

    IS: tuple[int, int]
    UGS: tuple[float, float]
    epoch: tuple[int, int]

    def after(self, best: dict[str, float], epochs: int) -> Space:
        """Step 4's space (paper, section 3): IS up to the best of step 2, UGS up to twice its best.

        UGS keeps a range of at least 0..1, so that a best of 0 does not end the search before it begins.
        """
        return Space((self.IS[0], int(best["IS"])), (0.0, max(1.0, 2 * best["UGS"])), (1, epochs))


def plan(
    n_trials: int, n_epochs: int, seed: int
) -> tuple[optuna.pruners.BasePruner, Callable[[int], optuna.samplers.BaseSampler]]:
    """A Hyperband pruner and TPE samplers whose sizes fit ``n_trials`` trials of ``n_epochs`` classifier epochs.

    Hyperband runs a separate TPE in each bracket, each with its own random start. Optuna's defaults deal 50 trials over
    100 epochs out to 5 brackets, in proportions 81:34:15:8:5, each with 10 trials at random first. TPE then proposes
    some 20 of the 50; more than half are random, and four of the five brackets hardly leave their random start. So: one
    bracket for every 20 trials (at most what the epochs allow), a third of a bracket's trials at random at first (10 at
    most). A trial survives a rung if it is among the best third of those that came so far. A single bracket is
    successive halving, whose first rung is then free to choose: after a third of the epochs. One after a fifth did less
    work and ended the trial that would have won too often (see README, "Pruning is not free").

    The second result makes the sampler of trial number k, so that a search that was killed goes on as it would have.
    """
    factor = 3
    brackets = max(1, min(n_trials // 20, int(math.log(n_epochs, factor)) if n_epochs > 1 else 1))
    if brackets > 1:
        pruner = optuna.pruners.HyperbandPruner(n_epochs // factor**brackets + 1, n_epochs, factor)
    else:
        pruner = optuna.pruners.SuccessiveHalvingPruner(math.ceil(n_epochs / factor), factor)
    startup = max(2, min(10, n_trials // brackets // 3))

    def sampler(number: int) -> optuna.samplers.BaseSampler:
        return optuna.samplers.TPESampler(n_startup_trials=startup, seed=(seed * 100_003 + number) % 2**32)

    return pruner, sampler


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

    Alone on the study (see `resume_study`) it goes on after a kill to the same trials. With ``shared`` any number of
    processes may call this on one study (see `share_study`). Each does trials until ``n_trials`` are finished, and does
    not wait for the others' running ones: together they may finish a few more, which `keep` leaves out.
    """
    pruner, sampler = plan(n_trials, classifier_options["epochs"], seed)
    # Hyperband makes its brackets when it is first asked; TPE, which looks at one bracket, needs them before that.
    pruner.prune(study, optuna.trial.create_trial(value=0.0))
    study.pruner = pruner if pruning else optuna.pruners.NopPruner()
    if not shared:  # whoever left these half done is gone
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            study.tell(trial.number, state=TrialState.FAIL)
    objective = _Objective(sampler, space, images_of, labels, data, select_on, classifier_seed, classifier_options)
    with tqdm(total=n_trials, desc=study.study_name, unit="trial") as bar:
        while (finished := len(study.get_trials(deepcopy=False, states=FINISHED))) < n_trials:
            bar.update(finished - bar.n)
            if _one_trial(study, objective, shared):
                _show_best(study, bar)
                if on_trial:
                    on_trial(study)
        bar.update(n_trials - bar.n)
    return study


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
        reached = _Reached(trial, self.data.test, self.select_on, self.classifier_options["epochs"])
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

    Each call reports the best validation accuracy to the pruner, and raises TrialPruned if that ends the trial.
    """

    def __init__(self, trial: optuna.Trial, test: Split, select_on: str, epochs: int):
        self.trial, self.test, self.select_on, self.epochs = trial, test, select_on, epochs
        self.start = time.perf_counter()
        self.val_accuracy, self.weights = -1.0, {}

    def __call__(self, epoch: int, model: nn.Module, val_accuracy: float) -> None:
        if val_accuracy > self.val_accuracy:
            self.val_accuracy, self.weights = val_accuracy, copy.deepcopy(model.state_dict())
        self.trial.report(self.val_accuracy, epoch)
        if epoch < self.epochs and self.trial.should_prune():  # on the last epoch all is paid
            self.record(epoch, model)
            raise optuna.TrialPruned

    def record(self, epochs: int, model: nn.Module) -> float:
        """Writes into the trial what it reached, puts the best weights into ``model``, and returns the objective."""
        model.load_state_dict(self.weights)
        test_accuracy = accuracy(model, self.test)
        value = self.val_accuracy if self.select_on == "val" else test_accuracy
        facts = {
            "value": value,
            "val_accuracy": self.val_accuracy,
            "test_accuracy": test_accuracy,
            "classifier_epochs": epochs,
            "seconds": time.perf_counter() - self.start,
        }
        for key, fact in facts.items():
            self.trial.set_user_attr(key, fact)
        return value


# --- what they found ---


def value_of(trial: FrozenTrial) -> float:
    """A finished trial's objective; for a pruned one that of its best epoch until it was stopped."""
    return trial.value if trial.state == TrialState.COMPLETE else trial.user_attrs["value"]


def trials_frame(study: optuna.Study) -> pd.DataFrame:
    """One row per finished trial, index ``trial``: parameters, accuracies (0..1), whether pruned, epochs, seconds."""
    noted = ("val_accuracy", "test_accuracy", "classifier_epochs", "seconds")
    rows = [
        {
            "trial": t.number,
            **t.params,
            "value": value_of(t),
            "pruned": t.state == TrialState.PRUNED,
            **{name: t.user_attrs[name] for name in noted},
        }
        for t in study.get_trials(deepcopy=False, states=FINISHED)
    ]
    columns = ["trial", *PARAMETERS, "value", "val_accuracy", "test_accuracy", "pruned", "classifier_epochs", "seconds"]
    return pd.DataFrame(rows, columns=columns).set_index("trial")


def importances(study: optuna.Study, seed: int = 0) -> pd.Series:
    """fANOVA importances of IS, UGS and epoch, summing to 1 (Hutter et al. 2014; paper, figure 1).

    Pruned trials count with the accuracy they had: leaving them out would hide just the poor regions. A parameter
    whose range is a single value has importance 0; all are NaN if all trials scored alike.
    Raises ValueError with fewer than four trials.
    """
    trials = study.get_trials(deepcopy=False, states=FINISHED)
    return pd.Series(_importances(_enough(trials), seed), name=study.study_name)


def bootstrapped_importances(
    study: optuna.Study, seed: int = 0, *, pruned: bool = True, repeats: int = 20, level: float = 0.9
) -> pd.DataFrame:
    """How far the importances can be trusted: as `importances`, with an interval from resampling the trials.

    ``repeats`` times as many trials as there are are drawn from them with replacement (Efron 1979). A row for each of
    IS, UGS and epoch: "importance" of the trials themselves; "low" and "high", between which the middle ``level``
    (0..1) of the resampled importances lie. "trials" is how many there are. ``pruned``: whether pruned trials count,
    with the accuracy they had when they were stopped; False takes the completed ones alone.
    Raises ValueError with fewer than four trials, a level that is no share, or fewer than two repeats.
    """
    if not 0 < level < 1 or repeats < 2:
        raise ValueError(
            f"level is {level} and repeats {repeats}: give a level between 0 and 1, and 2 or more repeats."
        )
    states = FINISHED if pruned else (TrialState.COMPLETE,)
    trials = _enough(study.get_trials(deepcopy=False, states=states))
    random = np.random.default_rng(derived(seed, "bootstrap of importances"))
    drawn = []
    for rows in tqdm(random.integers(len(trials), size=(repeats, len(trials))), desc="resampling", unit="forest"):
        drawn.append(_importances([trials[row] for row in rows], seed))
    resampled = pd.DataFrame(drawn)
    found = {
        "importance": pd.Series(_importances(trials, seed)),
        "low": resampled.quantile((1 - level) / 2),  # without the NaN of resamples that scored alike
        "high": resampled.quantile((1 + level) / 2),
    }
    return pd.DataFrame(found).assign(trials=len(trials))


def _enough(trials: list[FrozenTrial]) -> list[FrozenTrial]:
    if len(trials) < 4:
        raise ValueError(f"fANOVA needs at least 4 finished trials, and this search has {len(trials)}: raise n_trials.")
    return trials


def _importances(trials: list[FrozenTrial], seed: int) -> dict[str, float]:
    whole = optuna.create_study(direction="maximize")
    whole.add_trials(
        optuna.trial.create_trial(params=t.params, distributions=t.distributions, value=value_of(t)) for t in trials
    )
    searched = [p for p in PARAMETERS if not trials[0].distributions[p].single()]
    try:
        found = get_param_importances(whole, evaluator=FanovaImportanceEvaluator(seed=seed), params=searched)
    except RuntimeError:  # every trial reached the same accuracy: there is no variance to share out
        found = dict.fromkeys(PARAMETERS, float("nan"))
    return {p: float(found.get(p, 0.0)) for p in PARAMETERS}
