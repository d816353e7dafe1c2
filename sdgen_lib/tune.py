"""The Optuna search of steps 2 and 4 over IS, UGS and epoch: its space, pruner, storage and importances."""

from __future__ import annotations

import dataclasses
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import optuna
import pandas as pd
import torch
from optuna.importance import FanovaImportanceEvaluator, get_param_importances
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from tqdm.auto import tqdm

from . import classifier
from .data import ImageData

PARAMETERS = ("IS", "UGS", "epoch")
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)


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
    (10 at most). A trial survives its first rung if it is among the best third there.

    The second result makes the sampler of trial number k, so that a search that was killed goes on as it would have.
    """
    factor = 3
    brackets = max(1, min(n_trials // 20, int(math.log(n_epochs, factor)) if n_epochs > 1 else 1))
    first_rung = n_epochs // factor**brackets + 1  # so that no rung falls on the last epoch, when all is paid
    pruner = optuna.pruners.HyperbandPruner(first_rung, n_epochs, factor)
    startup = max(2, min(10, n_trials // brackets // 3))

    def sampler(number: int) -> optuna.samplers.BaseSampler:
        return optuna.samplers.TPESampler(n_startup_trials=startup, seed=(seed * 100_003 + number) % 2**32)

    return pruner, sampler


def open_study(path: Path, name: str) -> optuna.Study:
    """The study ``name`` in the journal file ``path``, made if missing: any process may read it while it runs."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # the progress bar says it better
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        storage = JournalStorage(JournalFileBackend(str(path)))
    return optuna.create_study(storage=storage, study_name=name, direction="maximize", load_if_exists=True)


def search(
    study: optuna.Study, space: Space, images_of: Callable[[int, float, int], torch.Tensor], labels: torch.Tensor,
    data: ImageData, *, n_trials: int, select_on: str, seed: int, classifier_options: dict, pruning: bool = True,
    on_trial: Callable[[optuna.Study], None] | None = None,
) -> optuna.Study:  # fmt: skip
    """Runs the trials that ``study`` still lacks of ``n_trials``; each one generates, trains a ResNet20 and tests it.

    ``images_of(IS, UGS, epoch)`` -> uint8 (N, 3, H, W), one for each of ``labels``. The objective is the best accuracy
    on real validation images (``select_on`` "val"), or on the test images as published ("test"); the test accuracy is
    recorded beside it either way. The accuracy of every classifier epoch is reported, and with ``pruning`` the trials
    that fall behind are ended. ``on_trial(study)`` is called after each.
    """
    pruner, sampler = plan(n_trials, classifier_options["epochs"], seed)
    if not pruning:
        pruner = optuna.pruners.NopPruner()

    def objective(trial: optuna.Trial) -> float:
        start = time.perf_counter()
        steps = trial.suggest_int("IS", *space.IS)
        guidance = trial.suggest_float("UGS", *space.UGS)
        epoch = trial.suggest_int("epoch", *space.epoch)
        images = images_of(steps, guidance, epoch)
        trial.set_user_attr("generation_seconds", time.perf_counter() - start)
        best = {"value": -1.0, "val_accuracy": 0.0, "test_accuracy": 0.0}

        def on_epoch(number: int, model: classifier.ResNet20, val_accuracy: float) -> None:
            value = val_accuracy if select_on == "val" else classifier.accuracy(model, data.test)
            if value > best["value"]:
                test_accuracy = value if select_on == "test" else classifier.accuracy(model, data.test)
                best.update(value=value, val_accuracy=val_accuracy, test_accuracy=test_accuracy)
            trial.report(best["value"], number)
            if trial.should_prune():
                finish(number)
                raise optuna.TrialPruned()

        def finish(epochs: int) -> None:
            for key, value in {**best, "classifier_epochs": epochs, "seconds": time.perf_counter() - start}.items():
                trial.set_user_attr(key, value)

        _, history = classifier.train_classifier(
            images, labels, data.val, data.num_classes, seed=seed, on_epoch=on_epoch, **classifier_options
        )
        finish(len(history))
        return best["value"]

    # What a killed process left half done is no result: note it as failed, and run its share again.
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)
    done = len(study.get_trials(deepcopy=False, states=FINISHED))
    with tqdm(total=max(n_trials, done), initial=done, desc=study.study_name, unit="trial") as bar:
        while done < n_trials:
            study.pruner, study.sampler = pruner, sampler(done)
            study.optimize(objective, n_trials=1)
            done = len(study.get_trials(deepcopy=False, states=FINISHED))
            bar.update()
            best = {name: round(value, 2) for name, value in study.best_params.items()}
            bar.set_postfix({"best": f"{study.best_value:.1%}", **best})
            if on_trial:
                on_trial(study)
    return study


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
    return pd.DataFrame(rows).set_index("trial")


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
