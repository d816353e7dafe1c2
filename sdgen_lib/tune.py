"""The Optuna search of steps 2 and 4 over IS, UGS and epoch: its space, pruner, storage and importances."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import time
from collections.abc import Callable

import optuna
import pandas as pd
import torch
from optuna.exceptions import UpdateFinishedTrialError
from optuna.importance import FanovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial, TrialState
from tqdm.auto import tqdm

from . import classifier
from .data import ImageData
from .storage import FINISHED, keep, open_study, resume_study, share_study
from .workers import Workers, retried_before

__all__ = ["FINISHED", "PARAMETERS", "Space", "Workers", "importances", "keep", "open_study", "plan", "resume_study"]
__all__ += ["search", "share_study", "trials_frame", "value_of"]
PARAMETERS = ("IS", "UGS", "epoch")
POLL_SECONDS = 2.0  # between looks at what other workers do


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

    Hyperband runs a separate TPE in each bracket, each with its own random start: with Optuna's defaults, 50 trials
    over 100 epochs are 5 brackets of 10 trials, all of them start-up trials, random search throughout. So: one
    bracket for every 20 trials (at most what the epochs allow), a third of a bracket's trials at random at first
    (10 at most). A trial survives a rung if it is among the best third of those that came so far. A single bracket is
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


class _Surplus(Exception):
    """A trial that another worker was a moment faster to begin."""


def search(
    study: optuna.Study, space: Space, images_of: Callable[[int, float, int], torch.Tensor], labels: torch.Tensor,
    data: ImageData, *, n_trials: int, select_on: str, seed: int, classifier_options: dict, pruning: bool = True,
    on_trial: Callable[[optuna.Study], None] | None = None, workers: Workers | None = None,
) -> optuna.Study:  # fmt: skip
    """Runs the trials that ``study`` still lacks of ``n_trials``; each one generates, trains a ResNet20 and tests it.

    ``images_of(IS, UGS, epoch)`` -> uint8 (N, 3, H, W), one for each of ``labels``. The objective is the best accuracy
    on real validation images (``select_on`` "val"), or on the test images as published ("test"); the test accuracy is
    recorded beside it either way. The accuracy of every classifier epoch is reported, and with ``pruning`` the trials
    that fall behind are ended. ``on_trial(study)`` is called after each.

    Alone on the study (see `resume_study`) it goes on after a kill to the same trials. With ``workers`` any number of
    processes call this on one study at the same time, and each returns when all the trials are finished.
    """
    pruner, sampler = plan(n_trials, classifier_options["epochs"], seed)
    pruner.prune(study, optuna.trial.create_trial(value=0.0))  # from now on it knows its brackets
    if not pruning:
        pruner = optuna.pruners.NopPruner()

    def objective(trial: optuna.Trial) -> float:
        start = time.perf_counter()
        study.sampler = sampler(trial.number)
        if workers:
            earlier = study.get_trials(deepcopy=False)[: trial.number]  # also those that wait to be done again
            lost = trial.user_attrs.get("retry_of")  # may not have been failed yet
            others = sum(t.state != TrialState.FAIL and t.number != lost for t in earlier)
            if others >= n_trials or retried_before(trial, earlier):
                raise _Surplus
        steps = trial.suggest_int("IS", *space.IS)
        guidance = trial.suggest_float("UGS", *space.UGS)
        epoch = trial.suggest_int("epoch", *space.epoch)
        images = images_of(steps, guidance, epoch)
        trial.set_user_attr("generation_seconds", time.perf_counter() - start)
        best, weights = {"value": -1.0, "val_accuracy": 0.0}, {}

        def on_epoch(number: int, model: classifier.ResNet20, val_accuracy: float) -> None:
            value = val_accuracy if select_on == "val" else classifier.accuracy(model, data.test)
            if value > best["value"]:
                best.update(value=value, val_accuracy=val_accuracy)
                weights.update(copy.deepcopy(model.state_dict()))
            trial.report(best["value"], number)
            if number < classifier_options["epochs"] and trial.should_prune():  # on the last epoch all is paid
                finish(number, model)
                raise optuna.TrialPruned()

        def finish(epochs: int, model: classifier.ResNet20) -> None:
            model.load_state_dict(weights)
            test_accuracy = best["value"] if select_on == "test" else classifier.accuracy(model, data.test)
            took = time.perf_counter() - start
            facts = {**best, "test_accuracy": test_accuracy, "classifier_epochs": epochs, "seconds": took}
            for key, value in facts.items():
                trial.set_user_attr(key, value)

        model, history = classifier.train_classifier(
            images, labels, data.val, data.num_classes, seed=seed, on_epoch=on_epoch, **classifier_options
        )
        finish(len(history), model)
        return best["value"]

    def signed(trial: optuna.Trial) -> float:
        nonlocal failed
        try:
            with workers.signed(trial) if workers else contextlib.nullcontext():
                return objective(trial)
        except (optuna.TrialPruned, UpdateFinishedTrialError, _Surplus):
            raise
        except BaseException:
            failed = True
            raise

    if workers is None:  # whoever left these half done is gone
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            study.tell(trial.number, state=TrialState.FAIL)
    study.pruner, failed = pruner, False
    with tqdm(total=n_trials, desc=study.study_name, unit="trial") as bar:
        while True:
            if workers:
                workers.revive(study)
            trials = study.get_trials(deepcopy=False)
            done = sum(t.state in FINISHED for t in trials)
            bar.update(done - bar.n)
            if done >= n_trials:
                return study
            waiting = any(t.state == TrialState.WAITING for t in trials)  # to be done again
            if done + sum(t.state == TrialState.RUNNING for t in trials) >= n_trials and not waiting:
                time.sleep(POLL_SECONDS)  # the last ones are others' work; should one of them die, it is ours
                continue
            failed = False
            try:
                study.optimize(signed, n_trials=1, catch=(_Surplus,))
            except (ValueError, UpdateFinishedTrialError):
                if failed or workers is None:
                    raise
                continue  # it had not been heard of for so long that another worker has taken its trial over
            if any(t.state == TrialState.COMPLETE for t in study.get_trials(deepcopy=False)):
                best = {name: round(value, 2) for name, value in study.best_params.items()}
                bar.set_postfix({"best": f"{study.best_value:.1%}", **best})
            if on_trial:
                on_trial(study)


def value_of(trial: FrozenTrial) -> float:
    """A finished trial's accuracy; for a pruned one the best until it was stopped."""
    return trial.value if trial.state == TrialState.COMPLETE else trial.user_attrs["value"]


def trials_frame(study: optuna.Study) -> pd.DataFrame:
    """One row per finished trial, index ``trial``: parameters, accuracies (0..1), whether pruned, epochs, seconds."""
    rows = [
        {"trial": t.number, **t.params, "value": value_of(t), "val_accuracy": t.user_attrs["val_accuracy"],
         "test_accuracy": t.user_attrs["test_accuracy"], "pruned": t.state == TrialState.PRUNED,
         "classifier_epochs": t.user_attrs["classifier_epochs"], "seconds": t.user_attrs["seconds"]}
        for t in study.get_trials(deepcopy=False, states=FINISHED)
    ]  # fmt: skip
    columns = ["trial", *PARAMETERS, "value", "val_accuracy", "test_accuracy", "pruned", "classifier_epochs", "seconds"]
    return pd.DataFrame(rows, columns=columns).set_index("trial")


def importances(study: optuna.Study, seed: int = 0) -> pd.Series:
    """fANOVA importances of IS, UGS and epoch, summing to 1 (Hutter et al. 2014; paper, figure 1).

    Pruned trials count with the accuracy they had: leaving them out would hide just the poor regions. A parameter
    whose range is a single value has importance 0; all are NaN if all trials scored alike.
    Raises ValueError with fewer than four trials.
    """
    trials = study.get_trials(deepcopy=False, states=FINISHED)
    if len(trials) < 4:
        raise ValueError(f"fANOVA needs at least 4 finished trials, and this search has {len(trials)}: raise n_trials.")
    whole = optuna.create_study(direction="maximize")
    for t in trials:
        whole.add_trial(optuna.trial.create_trial(params=t.params, distributions=t.distributions, value=value_of(t)))
    searched = [p for p in PARAMETERS if not trials[0].distributions[p].single()]
    try:
        found = get_param_importances(whole, evaluator=FanovaImportanceEvaluator(seed=seed), params=searched)
    except RuntimeError:  # every trial reached the same accuracy: there is no variance to share out
        found = dict.fromkeys(PARAMETERS, float("nan"))
    return pd.Series({p: float(found.get(p, 0.0)) for p in PARAMETERS}, name=study.study_name)
