"""The search: its plan, that it finds what is there, prunes, goes on after a stop; and the importances."""

import math
import types

import numpy as np
import optuna
import pytest
import torch
from optuna.trial import TrialState

from sdgen_lib.machine.seeds import derived
from sdgen_lib.search.search import (
    Space,
    bootstrapped_importances,
    chosen,
    compared,
    importances,
    plan,
    rescore,
    rescored_frame,
    rescored_values,
    search,
    trials_frame,
)
from sdgen_lib.search.study import FINISHED, keep, open_study, resume_study
from tests.search import search_worker
from tests.search.search_worker import SPACE

# --- the plan ---


def rungs_of(pruner, n_epochs, trials=1, most=None):
    """For each of ``trials`` trials, the (first ``most``) epochs at which the pruner compares it to the others."""
    found, equals = [], optuna.create_study(direction="maximize", pruner=pruner, study_name="step 2")
    for _ in range(trials):
        reached, trial = [], equals.ask()
        for epoch in range(1, n_epochs + 1):
            trial.report(0.5, epoch)
            assert not trial.should_prune()  # none is worse than another
            if len(equals.get_trials(deepcopy=False)[trial.number].system_attrs) > len(reached):
                reached.append(epoch)
            if len(reached) == most:
                break
        found.append(reached)
    return found


def brackets_of(pruner, n_epochs):
    """Trials of one bracket have their first rung at the same epoch."""
    return len({rung for (rung,) in rungs_of(pruner, n_epochs, trials=30, most=1)})


def startup_of(sampler):
    """The first trial whose UGS is not simply the random sampler's."""
    seen = optuna.create_study(direction="maximize")
    for number in range(50):
        seen.sampler = sampler(number)
        found = seen.ask().suggest_float("UGS", 0, 7.5)
        random = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=number))
        if found != random.ask().suggest_float("UGS", 0, 7.5):
            return number
        seen.tell(number, found)


@pytest.mark.parametrize(
    ("n_trials", "n_epochs", "brackets", "startup"),
    [
        (16, 30, 1, 5),
        (50, 100, 2, 8),
        (2, 1, 1, 2),
        (20, 40, 1, 6),
        (4, 3, 1, 2),
        (60, 27, 3, 6),
        (100, 9, 2, 10),
        (40, 81, 2, 6),
        (10, 2, 1, 3),
    ],
)
def test_plan(n_trials, n_epochs, brackets, startup):
    """One bracket for every 20 trials at most, and a third of a bracket's trials, ten at most, at random first."""
    planned = plan(n_trials, n_epochs, seed=0)
    assert brackets_of(planned.pruner, n_epochs) == brackets == planned.brackets
    assert startup_of(planned.sampler) == startup == planned.random_first
    earliest = min(rung for (rung,) in rungs_of(planned.pruner, n_epochs, trials=30, most=1))
    assert earliest == planned.first_rung


def test_what_is_said_of_optunas_defaults():
    """Of 50 trials over 100 epochs TPE proposes some 20: those after the first ten of their bracket."""
    pruner = optuna.pruners.HyperbandPruner(min_resource=1, max_resource=100, reduction_factor=3)
    pruner.prune(optuna.create_study(), optuna.trial.create_trial(value=0.0))
    shares = np.array(pruner._trial_allocation_budgets)
    assert shares.tolist() == [81, 34, 15, 8, 5]
    dealt = np.random.default_rng(0).multinomial(50, shares / shares.sum(), 2000)
    assert np.maximum(dealt - 10, 0).sum(1).mean() == pytest.approx(20.5, abs=1)
    assert (dealt[:, 1:] <= 16).mean() > 0.9  # four of the five hardly leave their random start


@pytest.mark.parametrize(
    ("n_epochs", "rungs"), [(1, [1]), (2, [1]), (4, [2]), (6, [2, 6]), (24, [8, 24]), (25, [9]), (100, [34])]
)
def test_the_rungs_of_a_single_bracket(n_epochs, rungs):
    """After a third of the epochs, and none just before the end, where next to nothing is left to save."""
    planned = plan(n_trials=16, n_epochs=n_epochs, seed=0)
    assert rungs_of(planned.pruner, n_epochs) == [rungs] and planned.first_rung == rungs[0]


def test_the_sampler_of_a_trial_depends_on_seed_and_number():
    def first(seed, number):
        of_one_trial = optuna.create_study(sampler=plan(16, 30, seed).sampler(number))
        return of_one_trial.ask().suggest_float("UGS", 0, 7.5)

    assert first(0, 3) == first(0, 3)
    assert len({first(seed, number) for seed in (0, 1) for number in range(5)}) == 10


def test_space_after():
    """Step 4 of the paper: IS up to the best, UGS up to twice the best, the epochs of the fine-tuning."""
    best = {"IS": 12, "UGS": 2.5, "epoch": 3}
    assert SPACE.after(best, epochs=10) == Space((5, 12), (0.0, 5.0), (1, 10))
    assert SPACE.after({**best, "IS": 5, "UGS": 0.0}, 2) == Space((5, 5), (0.0, 1.0), (1, 2))


# --- the search, with a classifier whose accuracy is a formula ---


@pytest.fixture
def formula(monkeypatch):
    """Accuracy after classifier epoch e: highest at UGS 2, growing with e; on the test set half of it."""
    state = {"classifier epochs": 0}

    def train_classifier(*images, on_epoch, **options):
        def counted(*facts):
            state["classifier epochs"] += 1
            on_epoch(*facts)

        return search_worker.train_classifier(*images, on_epoch=counted, **options)

    monkeypatch.setattr("sdgen_lib.search.search.train_classifier", train_classifier)
    monkeypatch.setattr("sdgen_lib.search.search.accuracy", search_worker.accuracy)
    return search_worker.images_of, state


@pytest.fixture(scope="module")
def digits():
    return search_worker.digits()


def run(trials, images_of, digits, n_trials=40, epochs=9, **changes):
    options = {"select_on": "val", "seed": 0, "classifier_seed": 0, "classifier_options": {"epochs": epochs}, **changes}
    return search(trials, SPACE, images_of, digits.train.labels, digits, n_trials=n_trials, **options)


def opened(path):
    return open_study(path, "step 2")


def resumed(path):
    """The study in a file, as the process opens it that goes on with the search."""
    return resume_study(path, "step 2")


def records(study):
    """What every finished trial was and gave, without clocks."""
    clocks = ("seconds", "generation_seconds")
    return [
        (t.params, t.state, t.intermediate_values, {k: v for k, v in t.user_attrs.items() if k not in clocks})
        for t in study.get_trials(deepcopy=False, states=FINISHED)
    ]


def test_the_search_finds_the_best_guidance_prunes_and_takes_notes(tmp_path, formula, digits):
    images_of, state = formula
    study = opened(tmp_path / "journal.log")
    shown = []
    run(study, images_of, digits, on_trial=lambda study: shown.append(len(study.trials)))
    assert shown == list(range(1, 41))
    assert abs(study.best_params["UGS"] - 2) < 0.3 and study.best_value > 0.95
    frame = trials_frame(study)
    assert list(frame.index) == list(range(40))
    assert frame.IS.between(5, 20).all() and frame.UGS.between(0, 7.5).all() and frame.epoch.between(1, 4).all()
    assert 5 <= frame.pruned.sum() <= 35
    assert frame.classifier_epochs[~frame.pruned].eq(9).all() and frame.classifier_epochs[frame.pruned].lt(9).all()
    assert frame.classifier_epochs.sum() == state["classifier epochs"]
    expected = np.exp(-((frame.UGS - 2) ** 2) / 4) * frame.classifier_epochs / 9
    np.testing.assert_allclose(frame.value, expected)
    np.testing.assert_allclose(frame.val_accuracy, expected)
    np.testing.assert_allclose(frame.test_accuracy, expected / 2)
    later = frame.iloc[20:]  # the sampler has learnt where to look: at random, 0.27 would lie so near
    assert ((later.UGS - 2).abs() < 1).mean() > 0.5
    for trial in study.trials:
        assert {"generation_seconds", "seconds", "classifier_epochs"} <= set(trial.user_attrs)


def test_without_pruning_every_trial_runs_to_its_end(tmp_path, formula, digits):
    study = opened(tmp_path / "journal.log")
    run(study, formula[0], digits, n_trials=12, pruning=False)
    frame = trials_frame(study)
    assert not frame.pruned.any() and frame.classifier_epochs.eq(9).all()


@pytest.mark.parametrize(("n_trials", "n_epochs"), [(12, 9), (12, 3), (8, 2), (42, 9)])
def test_no_trial_is_pruned_at_the_last_epoch(tmp_path, formula, digits, n_trials, n_epochs):
    """One that has trained to the end costs what a complete one costs: pruning it there would only hide it."""
    study = opened(tmp_path / "journal.log")
    frame = trials_frame(run(study, formula[0], digits, n_trials=n_trials, epochs=n_epochs))
    assert frame.pruned.any() and not frame.pruned.all()
    assert (frame.pruned == (frame.classifier_epochs < n_epochs)).all()


def test_selecting_on_the_test_set(tmp_path, formula, digits):
    study = opened(tmp_path / "journal.log")
    run(study, formula[0], digits, n_trials=5, select_on="test")
    frame = trials_frame(study)
    np.testing.assert_allclose(frame.value, frame.test_accuracy)
    np.testing.assert_allclose(frame.val_accuracy, 2 * frame.test_accuracy)


@pytest.mark.parametrize("select_on", ["val", "test"])
def test_the_test_set_is_looked_at_once_a_trial(tmp_path, digits, monkeypatch, select_on):
    """The value is that of the best validation epoch's classifier, though a later one is better on the test set."""
    looks = []

    def train_classifier(*images, on_epoch, **options):
        model, history = search_worker.Right(), [0.3, 0.6, 0.6, 0.2]
        for epoch, (val, test) in enumerate(zip(history, [0.1, 0.5, 0.8, 0.9]), 1):
            model.accuracy.fill_(test)
            on_epoch(epoch, model, val)
        return model, history

    def accuracy(model, split):
        looks.append(split is digits.test)
        return float(model.accuracy)

    monkeypatch.setattr("sdgen_lib.search.search.train_classifier", train_classifier)
    monkeypatch.setattr("sdgen_lib.search.search.accuracy", accuracy)
    study = run(
        opened(tmp_path / "journal.log"), search_worker.images_of, digits, n_trials=3, epochs=4, select_on=select_on
    )
    frame = trials_frame(study)
    assert looks == [True] * 3
    assert frame.test_accuracy.eq(0.5).all() and frame.val_accuracy.eq(0.6).all()
    assert frame.value.eq(0.5 if select_on == "test" else 0.6).all()
    assert list(study.trials[0].intermediate_values.values()) == [0.3, 0.6, 0.6, 0.6]  # the pruner sees no test image


def test_all_validation_images_measure_a_trial_whose_epochs_were_compared_by_a_part(tmp_path, digits, monkeypatch):
    """The epochs' accuracies, 0.3 and 0.6, are the part's; the pruner knows no others."""
    looks = []

    def train_classifier(*images, on_epoch, **options):
        for epoch, value in enumerate((0.3, 0.6, 0.2), 1):
            on_epoch(epoch, model, value)
        return model, [0.3, 0.6, 0.2]

    def accuracy(model, split):
        looks.append({id(digits.val): "val", id(digits.test): "test"}[id(split)])
        return 0.5 if split is digits.val else 0.4

    model = search_worker.Right()
    monkeypatch.setattr("sdgen_lib.search.search.train_classifier", train_classifier)
    monkeypatch.setattr("sdgen_lib.search.search.accuracy", accuracy)
    for count, value, looked in ((5, 0.5, ["val", "test"]), (len(digits.val), 0.6, ["test"])):
        looks.clear()
        options = {"epochs": 3, "val_images": count}
        study = opened(tmp_path / f"{count}.log")
        run(study, search_worker.images_of, digits, n_trials=1, classifier_options=options)
        frame = trials_frame(study)
        assert frame.value.tolist() == frame.val_accuracy.tolist() == [value] and looks == looked
        assert list(study.trials[0].intermediate_values.values()) == [0.3, 0.6, 0.6]


def test_what_is_pruned_does_not_depend_on_the_test_images(tmp_path, formula, digits):
    """A pruned trial's value is of the kind of the others', and only the validation accuracy decides on pruning."""
    study = opened(tmp_path / "journal.log")
    frame = trials_frame(run(study, formula[0], digits, n_trials=12, select_on="test"))
    assert frame.pruned.any()
    expected = np.exp(-((frame.UGS - 2) ** 2) / 4) * frame.classifier_epochs / 9
    np.testing.assert_allclose(frame.value, expected / 2)
    for trial in study.trials:
        np.testing.assert_allclose(max(trial.intermediate_values.values()), trial.user_attrs["val_accuracy"])


def test_two_searches_of_one_seed_are_the_same(tmp_path, formula, digits):
    found = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        study = opened(tmp_path / f"{name}.log")
        found.append(records(run(study, formula[0], digits, n_trials=12, seed=seed)))
    assert found[0] == found[1] != found[2]


class Killed(BaseException):
    """What a killed process looks like from inside: nothing catches it."""


@pytest.mark.parametrize(
    ("n_trials", "stop", "where"),
    [
        (16, KeyboardInterrupt, "generating"),
        (16, Killed, "classifier"),
        (42, Killed, "classifier"),
        (42, KeyboardInterrupt, "classifier"),
        (42, Killed, "generating"),
    ],
)
def test_a_stopped_search_goes_on_as_an_unbroken_one(tmp_path, formula, digits, monkeypatch, n_trials, stop, where):
    """Killed, or interrupted by the user, twice; each time a new process goes on."""
    images_of, _ = formula
    whole = run(opened(tmp_path / "whole.log"), images_of, digits, n_trials, epochs=27)
    expected = records(whole)
    assert brackets_of(whole.pruner, n_epochs=27) == (2 if n_trials > 39 else 1)
    begun, stops = [], [9, 12]  # stops in these trials or later

    def stop_now(place):
        if place == where and stops and len(begun) >= stops[0]:
            stops.pop(0)
            raise stop

    def images_or_stop(*point):
        begun.append(point)
        stop_now("generating")
        return images_of(*point)

    def train_or_stop(images, *args, on_epoch, **options):
        def on_epoch_or_stop(number, model, value):
            on_epoch(number, model, value)
            if number == 13:  # it has passed a rung
                stop_now("classifier")

        return search_worker.train_classifier(images, *args, on_epoch=on_epoch_or_stop, **options)

    monkeypatch.setattr("sdgen_lib.search.search.train_classifier", train_or_stop)
    for _ in range(3):
        try:
            run(resumed(tmp_path / "stopped.log"), images_or_stop, digits, n_trials, epochs=27)
        except stop:
            continue
    found = records(opened(tmp_path / "stopped.log"))
    assert [r[0] for r in found] == [r[0] for r in expected]  # the same points, none lost, none twice
    assert found == expected
    assert not stops and len(begun) == n_trials + 2  # only what was stopped ran again


def test_a_trial_that_a_killed_process_left_running_is_failed(tmp_path, formula, digits):
    study = opened(tmp_path / "journal.log")
    stale = study.ask()
    stale.suggest_float("UGS", 0, 7.5)
    run(resumed(tmp_path / "journal.log"), formula[0], digits, n_trials=3)
    states = [t.state for t in opened(tmp_path / "journal.log").trials]
    assert TrialState.RUNNING not in states
    assert sum(state in FINISHED for state in states) == 3


def test_a_finished_search_does_nothing_more_and_a_longer_one_goes_on(tmp_path, formula, digits):
    images_of, state = formula
    study = run(opened(tmp_path / "journal.log"), images_of, digits, n_trials=4)
    before, work = records(study), state["classifier epochs"]
    run(opened(tmp_path / "journal.log"), images_of, digits, n_trials=4)
    assert state["classifier epochs"] == work
    longer = records(run(opened(tmp_path / "journal.log"), images_of, digits, n_trials=6))
    assert longer[:4] == before and len(longer) == 6


def test_two_studies_do_not_mix(tmp_path, formula, digits):
    run(opened(tmp_path / "journal.log"), formula[0], digits, n_trials=3)
    assert len(open_study(tmp_path / "journal.log", "step 4").trials) == 0


def test_a_search_with_real_classifiers(tmp_path, digits):
    """No diffusion: real digits drown in noise the farther UGS is from 2."""
    generator = torch.Generator().manual_seed(0)

    def images_of(steps, guidance, epoch):
        share = math.exp(-abs(guidance - 2))
        noise = torch.randint(0, 256, digits.train.images.shape, generator=generator, dtype=torch.uint8)
        return (share * digits.train.images + (1 - share) * noise).to(torch.uint8)

    study = opened(tmp_path / "journal.log")
    options = dict(width=8, epochs=8, batch_size=16, learning_rate=3e-3, plateau_patience=9, stop_patience=9)
    run(study, images_of, digits, n_trials=12, classifier_options=options)
    frame = trials_frame(study)
    assert abs(study.best_params["UGS"] - 2) < 1.3
    assert study.best_value > 0.6 and frame.value.min() < 0.4
    assert frame.pruned.any() and not frame.pruned.all()
    assert frame.test_accuracy.corr(frame.val_accuracy) > 0.9 and (frame.test_accuracy != frame.val_accuracy).any()


# --- known points ---

KNOWN = {"IS": 7, "UGS": 4.25, "epoch": 3}


def test_a_known_point_is_tried_first_and_once(tmp_path, formula, digits):
    run(resumed(tmp_path / "journal.log"), formula[0], digits, n_trials=2, known=[KNOWN])
    assert resumed(tmp_path / "journal.log").trials[0].params == KNOWN
    run(resumed(tmp_path / "journal.log"), formula[0], digits, n_trials=4, known=[KNOWN])
    trials = resumed(tmp_path / "journal.log").trials
    assert len(trials) == 4 and [t.params == KNOWN for t in trials] == [True, False, False, False]


def test_the_pruner_ends_no_known_point_and_compares_the_others_with_it(tmp_path, formula, digits):
    """Successive halving would end the second point, which is worse at the first rung, and did so without it."""
    poor = [{"IS": 9, "UGS": guidance, "epoch": 1} for guidance in (2.0, 5.0, 5.5, 6.0)]
    study = run(opened(tmp_path / "known.log"), formula[0], digits, n_trials=6, known=poor)
    assert [t.params for t in study.trials[:4]] == poor
    assert [t.state for t in study.trials[:4]] == 4 * [TrialState.COMPLETE]
    assert all("completed_rung_0" in t.system_attrs for t in study.trials)
    queued = opened(tmp_path / "queued.log")
    for point in poor:
        queued.enqueue_trial(point)
    assert TrialState.PRUNED in {t.state for t in run(queued, formula[0], digits, n_trials=4).trials}


def test_known_points_are_in_the_random_start(tmp_path, formula, digits):
    """Of five random trials three are known ones: two follow at random, then TPE proposes."""
    known = [{"IS": 9, "UGS": guidance, "epoch": 2} for guidance in (2.0, 2.1, 6.0)]
    study = run(opened(tmp_path / "journal.log"), formula[0], digits, n_trials=15, known=known)
    assert plan(15, 9, 0).random_first == 5
    at_random = []
    for trial in study.trials[3:6]:
        random = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=trial.number)).ask()
        expected = random.suggest_int("IS", 5, 20), random.suggest_float("UGS", 0, 7.5)
        at_random.append((trial.params["IS"], trial.params["UGS"]) == expected)
    assert at_random == [True, True, False]


def test_a_known_point_whose_trial_failed_is_tried_again(tmp_path, formula, digits):
    """Also where the failed trial stays in the study, as in a shared one."""

    def fails(*point):
        raise RuntimeError("out of memory")

    study = opened(tmp_path / "journal.log")
    with pytest.raises(RuntimeError):
        run(study, fails, digits, n_trials=2, known=[KNOWN])
    run(study, formula[0], digits, n_trials=2, known=[KNOWN])
    assert [(t.state.name, t.params == KNOWN) for t in study.trials[:2]] == [("FAIL", True), ("COMPLETE", True)]


@pytest.mark.parametrize("stop_in", [1, 2, 3])
@pytest.mark.parametrize("stop", [KeyboardInterrupt, Killed])
def test_known_points_keep_their_places_after_a_kill(tmp_path, formula, digits, stop_in, stop):
    known = [KNOWN | {"UGS": guidance} for guidance in (4.0, 1.0, 2.0)]
    begun = []

    def stopped(*point):
        begun.append(point)
        if len(begun) == stop_in:
            raise stop
        return formula[0](*point)

    whole = run(resumed(tmp_path / "whole.log"), formula[0], digits, n_trials=6, known=known)
    with pytest.raises(stop):
        run(resumed(tmp_path / "killed.log"), stopped, digits, n_trials=6, known=known)
    again = run(resumed(tmp_path / "killed.log"), formula[0], digits, n_trials=6, known=known)
    assert records(again) == records(whole) and len(again.trials) == 6


def test_numbers_of_any_type_are_one_point(tmp_path, formula, digits):
    for point in (KNOWN | {"UGS": 4}, KNOWN | {"IS": 7.0, "UGS": np.float32(4.0), "epoch": np.int64(3)}):
        run(resumed(tmp_path / "journal.log"), formula[0], digits, n_trials=1, known=[point, point])
    run(resumed(tmp_path / "journal.log"), formula[0], digits, n_trials=4, known=[point])
    points = [t.params for t in resumed(tmp_path / "journal.log").trials]
    assert len(points) == 4 and points.count({"IS": 7, "UGS": 4.0, "epoch": 3}) == 1


def test_a_finished_search_queues_nothing(tmp_path, formula, digits):
    run(opened(tmp_path / "journal.log"), formula[0], digits, n_trials=3)
    before = (tmp_path / "journal.log").read_bytes()
    run(opened(tmp_path / "journal.log"), formula[0], digits, n_trials=3, known=[KNOWN])
    assert (tmp_path / "journal.log").read_bytes() == before


def test_a_known_point_that_a_kill_left_undone_is_tried_first_again(tmp_path, formula, digits):
    def killed(steps, guidance, epoch):
        raise KeyboardInterrupt

    whole = run(resumed(tmp_path / "whole.log"), formula[0], digits, n_trials=5, known=[KNOWN])
    with pytest.raises(KeyboardInterrupt):
        run(resumed(tmp_path / "killed.log"), killed, digits, n_trials=5, known=[KNOWN])
    again = run(resumed(tmp_path / "killed.log"), formula[0], digits, n_trials=5, known=[KNOWN])
    assert records(again) == records(whole) and records(again)[0][0] == KNOWN


@pytest.mark.parametrize(
    ("wrong", "allowed"),
    [
        ({"IS": 4}, "IS goes from 5 to 20, in whole numbers"),
        ({"IS": 7.5}, "IS goes from 5 to 20, in whole numbers"),
        ({"UGS": 7.6}, "UGS goes from 0.0 to 7.5"),
        ({"UGS": math.nan}, "UGS goes from 0.0 to 7.5"),
        ({"epoch": 0}, "epoch goes from 1 to 4"),
        ({"epoch": None}, "epoch goes from 1 to 4"),
    ],
)
def test_a_known_point_outside_the_space_is_refused(tmp_path, formula, digits, wrong, allowed):
    """Before anything is queued, the points that are right included."""
    study, point = opened(tmp_path / "journal.log"), KNOWN | wrong
    with pytest.raises(ValueError) as caught:
        run(study, formula[0], digits, known=[KNOWN, point])
    assert str(point) in str(caught.value) and allowed in str(caught.value) and not study.trials


def test_the_nearest_point_of_a_space():
    assert SPACE.nearest({"IS": 50, "UGS": -1.0, "epoch": 2}) == {"IS": 20, "UGS": 0.0, "epoch": 2}
    assert SPACE.nearest(KNOWN) == KNOWN


def test_a_space_after_another_keeps_the_smallest_guidance():
    space = Space((5, 20), (1.0, 3.0), (1, 4))
    assert space.after({"IS": 12, "UGS": 2.5, "epoch": 3}, 10).UGS == (1.0, 5.0)
    assert space.after({"IS": 12, "UGS": 1.0, "epoch": 3}, 10).UGS == (1.0, 2.0)


# --- choosing one of the best few ---


def hand_made(path, rows, known=()):
    """A study of complete trials (UGS, value) and pruned ones (UGS, None); those numbered in ``known`` were given."""
    study = opened(path)
    distributions = dict(DISTRIBUTIONS, UGS=optuna.distributions.FloatDistribution(0.0, 9.0))
    for number, (guidance, value) in enumerate(rows):
        study.add_trial(
            optuna.trial.create_trial(
                state=TrialState.PRUNED if value is None else TrialState.COMPLETE,
                value=value,
                params={"IS": 5, "UGS": guidance, "epoch": 1},
                distributions=distributions,
                user_attrs={"value": value or 0.99, "val_accuracy": value or 0.99, "test_accuracy": 0.0}
                | {"classifier_epochs": 3, "seconds": 1.0, "known": number in known},
            )
        )
    return study


@pytest.fixture
def scored(monkeypatch):
    """Stands for the scoring: a classifier's accuracy is UGS / 10 and a hundredth of its seed; on the test set half."""
    calls = []

    def score(training, val, tests, num_classes, *, seed, on_epoch, **options):
        calls.append((training.images[0, 0, 0, 0].item(), seed))
        value = calls[-1][0] / 10 + seed / 100
        return types.SimpleNamespace(
            val_accuracy=value, tests={name: types.SimpleNamespace(accuracy=value / 2) for name in tests}
        )

    monkeypatch.setattr("sdgen_lib.search.search.score", score)
    return calls


def images_like(steps, guidance, epoch):
    return torch.full((len(search_worker.digits().train), 3, 8, 8), int(guidance), dtype=torch.uint8)


def rescored_study(study, digits, images_of=images_like, **changes):
    options = dict(count=3, select_on="val", classifier_seeds=[1, 2], classifier_options={"epochs": 2}) | changes
    rescore(study, images_of, digits.train.labels, digits, **options)
    return study


ROWS = [(3.0, 0.9), (8.0, None), (4.0, 0.8), (5.0, 0.7), (3.0, 0.85), (7.0, 0.1)]


def test_the_best_few_are_scored_again_and_the_best_mean_is_chosen(tmp_path, digits, scored):
    study = hand_made(tmp_path / "journal.log", ROWS)
    assert chosen(study).number == 0 and len(rescored_frame(study)) == 0
    rescored_study(study, digits)
    # neither the pruned trial, nor a point twice, nor the fourth best
    assert sorted(scored) == [(3, 1), (3, 2), (4, 1), (4, 2), (5, 1), (5, 2)]
    for found in (study, resumed(tmp_path / "journal.log")):
        assert chosen(found).number == 3 and chosen(found).params["UGS"] == 5.0
        frame = rescored_frame(found)
        assert frame.index.tolist() == [3, 2, 0] and frame.chosen.tolist() == [True, False, False]
        np.testing.assert_allclose(frame["mean"], [0.515, 0.415, 0.315])
        np.testing.assert_allclose(frame["standard error"], np.std([0.01, 0.02], ddof=1) / np.sqrt(2))
        assert frame["first value"].tolist() == [0.7, 0.8, 0.9] and frame.classifiers.eq(2).all()
        assert trials_frame(found).index[trials_frame(found).chosen].tolist() == [3]


def test_a_known_point_is_scored_again_however_it_did(tmp_path, digits, scored):
    study = hand_made(tmp_path / "journal.log", ROWS, known=[5])
    rescored_study(study, digits, count=1)
    assert sorted({ugs for ugs, _ in scored}) == [3, 7] and chosen(study).number == 5
    rescored_study(study, digits, count=6)  # it is among the best six: not twice
    assert rescored_frame(study).index.tolist() == [5, 3, 2, 0]


@pytest.mark.parametrize(("known", "number"), [((), 0), ((2,), 2), ((1, 2), 1)])
def test_of_equal_means_the_known_point_stays(tmp_path, digits, scored, known, number):
    """The first value, which luck made high, breaks no tie; of several known points the better first value does."""
    study = hand_made(tmp_path / "journal.log", [(3.0, 0.9), (3.5, 0.8), (3.2, 0.7), (2.0, 0.95)], known=known)
    rescored_study(study, digits, count=4)
    frame = rescored_frame(study)
    assert frame["mean"].round(6).tolist() == [0.315, 0.315, 0.315, 0.215]
    assert chosen(study).number == number and frame.index[frame.chosen].tolist() == [number]


def test_a_killed_rescoring_goes_on(tmp_path, digits, scored):
    drawn = []

    def dies(steps, guidance, epoch):
        drawn.append(guidance)
        if len(drawn) == 2:
            raise KeyboardInterrupt
        return images_like(steps, guidance, epoch)

    hand_made(tmp_path / "journal.log", ROWS)
    with pytest.raises(KeyboardInterrupt):
        rescored_study(resumed(tmp_path / "journal.log"), digits, dies)
    study = rescored_study(resumed(tmp_path / "journal.log"), digits, dies)
    assert drawn == [3.0, 4.0, 4.0, 5.0] and len(scored) == 6
    assert chosen(study).number == 3


def test_a_rescoring_with_other_seeds_is_done_again(tmp_path, digits, scored):
    study = rescored_study(hand_made(tmp_path / "journal.log", ROWS), digits, count=1)
    rescored_study(study, digits, count=1)
    assert len(scored) == 2
    rescored_study(study, digits, count=1, classifier_seeds=[1, 3])
    assert len(scored) == 4 and rescored_values(study) == {0: pytest.approx([0.31, 0.33])}


def test_what_was_rescored_stays_with_its_point(tmp_path, digits, scored):
    """A failed trial leaves the file when the search goes on, or is copied, and the later ones get other numbers."""
    study = opened(tmp_path / "journal.log")
    study.add_trial(optuna.trial.create_trial(state=TrialState.FAIL))
    rescored_study(hand_made(tmp_path / "journal.log", ROWS), digits)
    assert chosen(study).number == 4 and (before := rescored_frame(study)).index.tolist() == [4, 3, 1]
    for again in (keep(study, tmp_path / "copy.log", 6), resumed(tmp_path / "journal.log")):
        assert rescored_frame(again).index.tolist() == [3, 2, 0]
        assert rescored_frame(again).reset_index(drop=True).equals(before.reset_index(drop=True))
        assert chosen(again).params == chosen(study).params == {"IS": 5, "UGS": 5.0, "epoch": 1}


def test_the_trials_say_what_rescoring_found(tmp_path, digits, scored):
    frame = trials_frame(rescored_study(hand_made(tmp_path / "journal.log", ROWS), digits))
    np.testing.assert_allclose(frame.rescored, [0.315, np.nan, 0.415, 0.515, np.nan, np.nan])
    np.testing.assert_allclose(frame.rescored_sd.dropna(), 3 * [np.sqrt(0.5) / 100])
    assert frame.chosen.tolist() == [False, False, False, True, False, False]


@pytest.mark.parametrize("nothing", [{"count": 0}, {"classifier_seeds": []}])
def test_rescoring_nothing_is_refused(tmp_path, digits, scored, nothing):
    with pytest.raises(ValueError, match="give one or more of each"):
        rescored_study(hand_made(tmp_path / "journal.log", ROWS), digits, **nothing)


def test_where_all_trials_were_pruned_there_is_nothing_to_choose(tmp_path, digits, scored):
    study = rescored_study(hand_made(tmp_path / "journal.log", [(3.0, None), (8.0, None)]), digits)
    assert not scored and not rescored_values(study)
    with pytest.raises(ValueError, match="No trial of step 2 is complete: raise n_trials, or search without pruning"):
        chosen(study)


def test_rescoring_on_the_test_set_is_the_released_codes_choice(tmp_path, digits, scored):
    study = rescored_study(hand_made(tmp_path / "journal.log", ROWS), digits, select_on="test")
    np.testing.assert_allclose(rescored_frame(study)["mean"], [0.2575, 0.2075, 0.1575])


def test_one_classifier_has_no_standard_error(tmp_path, digits, scored):
    study = rescored_study(hand_made(tmp_path / "journal.log", ROWS), digits, classifier_seeds=[7], count=1)
    assert rescored_frame(study)["standard error"].isna().all() and chosen(study).number == 0


def test_real_classifiers_score_the_best_few(tmp_path, digits):
    """Real digits against noise: what the first values got wrong, the rescoring mends."""
    random = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, digits.train.images.shape, generator=random, dtype=torch.uint8)
    study = hand_made(tmp_path / "journal.log", [(1.0, 0.9), (2.0, 0.8)])
    options = dict(width=8, epochs=8, batch_size=16, learning_rate=3e-3, plateau_patience=9, stop_patience=9)
    rescored_study(
        study,
        digits,
        lambda steps, guidance, epoch: noise if guidance == 1.0 else digits.train.images,
        classifier_options=options,
    )
    frame = rescored_frame(study)
    assert chosen(study).params["UGS"] == 2.0 and frame["mean"][1] > 0.5 > frame["mean"][0]


# --- trials and importances ---

DISTRIBUTIONS = {
    "IS": optuna.distributions.IntDistribution(1, 101),
    "UGS": optuna.distributions.FloatDistribution(0.0, 1.0),
    "epoch": optuna.distributions.IntDistribution(1, 10),
}


@pytest.fixture
def study_of():
    """``study_of(rows)`` -> a study of trials made by hand, from rows (IS, UGS, epoch, value, pruned)."""

    def make(rows, distributions=DISTRIBUTIONS):
        study = optuna.create_study(direction="maximize", study_name="by hand")
        for steps, guidance, epoch, value, pruned in rows:
            facts = {"value": value, "val_accuracy": value, "test_accuracy": value / 2}
            trial = optuna.trial.create_trial(
                state=TrialState.PRUNED if pruned else TrialState.COMPLETE,
                value=None if pruned else value,
                params={"IS": steps, "UGS": guidance, "epoch": epoch},
                distributions=distributions,
                user_attrs={**facts, "classifier_epochs": 3 if pruned else 9, "seconds": 1.5},
                intermediate_values=dict.fromkeys(range(1, 4 if pruned else 10), value),
            )
            study.add_trial(trial)
        return study

    return make


def test_trials_frame_of_a_search_that_has_not_begun(study_of):
    frame = trials_frame(study_of([]))
    assert len(frame) == 0 and {"IS", "UGS", "epoch", "value", "pruned"} <= set(frame)


def test_trials_frame(study_of):
    frame = trials_frame(study_of([(10, 0.5, 1, 0.8, False), (20, 0.25, 2, 0.3, True)]))
    assert frame.index.name == "trial" and frame.index.tolist() == [0, 1]
    accuracies = {"value": 0.3, "val_accuracy": 0.3, "test_accuracy": 0.15}
    rest = {"pruned": True, "classifier_epochs": 3, "seconds": 1.5, "chosen": False}
    found = frame.loc[1].to_dict()
    assert np.isnan(found.pop("rescored")) and np.isnan(found.pop("rescored_sd"))
    assert found == {"IS": 20, "UGS": 0.25, "epoch": 2, **accuracies, **rest}
    assert frame.chosen.tolist() == [True, False]
    assert not trials_frame(study_of([(20, 0.25, 2, 0.3, True)])).chosen.any()


def random_rows(value, count=300, prune=0):
    random = np.random.default_rng(0)
    for k in range(count):
        steps, guidance, epoch = int(random.integers(1, 102)), random.random(), int(random.integers(1, 11))
        yield steps, guidance, epoch, value((steps - 1) / 100, guidance, (epoch - 1) / 9), k < prune


@pytest.mark.parametrize("prune", [0, 150])
def test_importances_of_a_sum(study_of, prune):
    """Of a + 3 b the variances are 1 : 9, whichever trials count."""
    found = importances(study_of(random_rows(lambda a, b, c: a + 3 * b, prune=prune)), pruned=bool(prune))
    assert list(found.index) == ["IS", "UGS", "epoch"] and found.name == "by hand"
    assert found.sum() == pytest.approx(1)
    assert found.to_dict() == pytest.approx({"IS": 0.1, "UGS": 0.9, "epoch": 0.0}, abs=0.05)


def half_pruned():
    """UGS decides the first two epochs alone, IS what comes after; no pruned trial got there."""
    study = optuna.create_study(direction="maximize")
    for k, (steps, guidance, epoch, _, _) in enumerate(random_rows(lambda a, b, c: 0, count=80)):
        early, late, pruned = guidance, (steps - 1) / 100, k % 2 == 0
        trial = optuna.trial.create_trial(
            state=TrialState.PRUNED if pruned else TrialState.COMPLETE,
            value=None if pruned else late,
            params={"IS": steps, "UGS": guidance, "epoch": epoch},
            distributions=DISTRIBUTIONS,
            user_attrs={"value": early if pruned else late},
            intermediate_values={1: early / 2, 2: early} | ({} if pruned else {3: late}),
        )
        study.add_trial(trial)
    return study


def test_only_what_had_as_much_training_is_compared():
    study = half_pruned()
    complete, whole = compared(study, pruned=False), compared(study, pruned=True)
    assert complete.values == [t.value for t in study.trials if t.state == TrialState.COMPLETE]
    assert whole.values == [t.intermediate_values[2] for t in study.trials] and len(whole.trials) == 80
    assert complete.said == "40 complete trials"
    assert whole.said == "80 trials, all at classifier epoch 2, on validation images"
    assert compared(study) == complete


def test_importances_are_those_of_the_complete_trials_as_in_optuna():
    study = half_pruned()
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    assert importances(study).to_dict() == optuna.importance.get_param_importances(study, evaluator=evaluator)
    assert importances(study)["IS"] > 0.9 and importances(study, pruned=True)["UGS"] > 0.9
    alone, whole = (bootstrapped_importances(study, pruned=pruned, repeats=3) for pruned in (None, True))
    assert alone.importance["IS"] > 0.9 and alone.trials.eq(40).all() and alone.low["IS"] > 0.5
    assert whole.importance["UGS"] > 0.9 and whole.trials.eq(80).all() and whole.low["UGS"] > 0.5


def test_pruned_trials_count_where_too_few_are_complete(study_of):
    rows = list(random_rows(lambda a, b, c: a + b, count=8, prune=5))
    assert compared(study_of(rows)).said == "8 trials, all at classifier epoch 3, on validation images"
    assert importances(study_of(rows)).equals(importances(study_of(rows), pruned=True))
    with pytest.raises(ValueError, match="this search has 3 complete trials: raise n_trials or n_trials_retune"):
        importances(study_of(rows), pruned=False)


def test_trials_without_single_epochs_cannot_be_compared_there():
    study = half_pruned()
    study.add_trial(optuna.trial.create_trial(value=0.5))
    with pytest.raises(ValueError, match=r"Trials \[80\] have no accuracies of single epochs"):
        compared(study, pruned=True)
    assert len(compared(study).trials) == 41


def test_importances_repeat_themselves(study_of):
    study = study_of(random_rows(lambda a, b, c: a + b + c, count=40))
    assert importances(study).equals(importances(study))


def test_a_parameter_with_one_value_has_no_importance(study_of):
    distributions = {**DISTRIBUTIONS, "IS": optuna.distributions.IntDistribution(5, 5)}
    rows = [(5, u, e, u, False) for u, e in np.random.default_rng(0).uniform((0, 1), (1, 10), (40, 2)).tolist()]
    found = importances(study_of([(i, u, int(e), v, p) for i, u, e, v, p in rows], distributions))
    assert found["IS"] == 0 and found["UGS"] > 0.8 and found.sum() == pytest.approx(1)


def test_without_variance_there_is_nothing_to_share_out(study_of):
    assert importances(study_of(random_rows(lambda a, b, c: 0.5, count=10))).isna().all()


def test_importances_need_four_trials(study_of):
    rows = list(random_rows(lambda a, b, c: a + b, count=4))
    with pytest.raises(ValueError, match="at least 4 trials, and this search has 3"):
        importances(study_of(rows[:3]))
    assert importances(study_of(rows)).sum() == pytest.approx(1)


# --- how far importances can be trusted ---


def test_bootstrapped_importances_hold_the_plain_ones(study_of):
    study = study_of(random_rows(lambda a, b, c: a + 3 * b, count=60))
    found = bootstrapped_importances(study, repeats=10)
    assert list(found.index) == ["IS", "UGS", "epoch"]
    assert list(found.columns) == ["importance", "low", "high", "trials"]
    assert found.importance.to_dict() == importances(study).to_dict() and found.trials.eq(60).all()
    assert (found.low < found.high).all() and found.low.min() >= 0 and found.high.max() <= 1
    assert found.low["UGS"] > 0.5 > found.high["IS"] > 0.02 and found.high["epoch"] < 0.2
    assert found.equals(bootstrapped_importances(study, repeats=10))


def test_the_interval_is_that_of_a_bootstrap_written_out(study_of):
    """With replacement, as many as there are; quantiles of the importances by Optuna's own evaluator."""
    study, seed = study_of(random_rows(lambda a, b, c: a + b * c, count=12)), 5
    random, drawn = np.random.default_rng(derived(seed, "bootstrap of importances")), []
    for rows in random.integers(12, size=(8, 12)):
        resampled = study_of([])
        for row in rows:
            resampled.add_trial(study.trials[row])
        drawn.append(importances(resampled, seed).to_numpy())
    found = bootstrapped_importances(study, seed, repeats=8, level=0.8)
    np.testing.assert_allclose(found.low, np.quantile(drawn, 0.1, axis=0))
    np.testing.assert_allclose(found.high, np.quantile(drawn, 0.9, axis=0))


def test_fewer_trials_say_less(study_of):
    widths = []
    for count in (12, 200):
        found = bootstrapped_importances(study_of(random_rows(lambda a, b, c: a + b, count=count)), repeats=10)
        widths.append((found.high - found.low).mean())
    assert widths[0] > 2 * widths[1]


def test_pruned_trials_may_be_left_out_of_the_bootstrap(study_of):
    rows = list(random_rows(lambda a, b, c: a, count=40)) + list(random_rows(lambda a, b, c: b, count=40, prune=40))
    alone = bootstrapped_importances(study_of(rows), pruned=False, repeats=4)
    assert alone.trials.eq(40).all() and alone.importance["IS"] > 0.9
    assert alone.importance.to_dict() == importances(study_of(rows[:40])).to_dict()
    assert bootstrapped_importances(study_of(rows), pruned=True, repeats=4).trials.eq(80).all()
    with pytest.raises(ValueError, match="at least 4 trials, and this search has 0 complete trials"):
        bootstrapped_importances(study_of(rows[40:]), pruned=False)


@pytest.mark.parametrize("wrong", [{"level": 0}, {"level": 1.0}, {"repeats": 1}])
def test_a_bootstrap_of_nothing_is_refused(study_of, wrong):
    with pytest.raises(ValueError, match="give a level between 0 and 1, and 2 or more repeats"):
        bootstrapped_importances(study_of(random_rows(lambda a, b, c: a, count=8)), **wrong)


def test_a_bootstrap_without_variance_is_nan(study_of):
    found = bootstrapped_importances(study_of(random_rows(lambda a, b, c: 0.5, count=10)), repeats=3)
    assert found[["importance", "low", "high"]].isna().all(axis=None)
