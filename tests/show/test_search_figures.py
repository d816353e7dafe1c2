"""Figures of trainings and searches: each draws, and shows the numbers that it was given."""

import matplotlib.pyplot as plt
import numpy as np
import optuna
import pandas as pd
import pytest

from sdgen_lib.config import paper
from sdgen_lib.search.search import trials_frame
from sdgen_lib.show import search_figures

from .made import drawn


def test_loss_curve():
    history = pd.DataFrame(np.random.default_rng(0).random((5, 4)), columns=["train", "right", "wrong", "empty"])
    figure = drawn(search_figures.loss_curve(history, "Class-Encoder"))
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert len(lines) == 4
    np.testing.assert_allclose(lines["held out, right label"].get_ydata(), history.right)


@pytest.fixture
def study(study_of):
    random = np.random.default_rng(0)
    points = random.uniform((1, 0, 1), (100, 1, 10), (12, 3))
    return study_of([(int(i), u, int(e), 1 - (u - 0.5) ** 2, k % 3 == 2) for k, (i, u, e) in enumerate(points)])


def test_figures_of_a_search(study):
    figure = drawn(search_figures.trials(study, "step 2"))
    complete = [t for t in study.trials if t.state == optuna.trial.TrialState.COMPLETE]
    best = max(complete, key=lambda t: t.value)
    ring, other = (ax.collections[-1].get_offsets() for ax in figure.axes[:2])
    np.testing.assert_allclose(ring, [[best.params["IS"], best.params["UGS"]]])
    np.testing.assert_allclose(other, [[best.number + 1, best.value]])
    points = [len(c.get_offsets()) for c in drawn(search_figures.slices(study)).axes[0].collections]
    assert sorted(points) == [4, 8]  # pruned and complete
    drawn(search_figures.contour(study))
    drawn(search_figures.contour(study, "epoch", "UGS"))


def test_the_best_so_far_never_falls_and_leaves_pruned_trials_out(study_of):
    rows = [(5, 0.5, 1, 0.9, True), (6, 0.1, 1, 0.3, False), (7, 0.2, 1, 0.2, False), (8, 0.3, 1, 0.6, False)]
    figure = drawn(search_figures.trials(study_of(rows)))
    (line,) = figure.axes[1].lines
    np.testing.assert_allclose(line.get_ydata(), [np.nan, 0.3, 0.3, 0.6])


def test_colours_are_the_accuracies_of_complete_trials_in_percent(study):
    frame = trials_frame(study)
    for figure in (search_figures.trials(study), search_figures.trials_by_parameter(frame)):
        found = np.concatenate([c.get_array() for c in drawn(figure).axes[0].collections if c.get_array() is not None])
        assert sorted(found) == pytest.approx(sorted(100 * frame.value[~frame.pruned]))


def test_a_pruned_trial_stands_at_no_accuracy(study_of):
    """However high it was when it was stopped: below all complete ones, on one line, in each axis of accuracies."""
    rows = [(5, 0.5, 1, 0.9, True), (6, 0.1, 2, 0.3, False), (7, 0.2, 3, 0.5, False), (8, 0.3, 4, 0.1, True)]
    study = study_of(rows)
    frame = trials_frame(study)
    height = search_figures.heights(frame)
    assert height.tolist() == pytest.approx([0.27, 0.3, 0.5, 0.27])
    axes = [*search_figures.slices(study).axes, search_figures.trials(study).axes[1]]
    axes.append(search_figures.trials_by_parameter(frame).axes[1])
    for ax in axes:
        at = {c.get_label().split(":")[0]: c.get_offsets()[:, 1].tolist() for c in ax.collections}
        assert (at["complete"], at["pruned"]) == ([0.3, 0.5], pytest.approx([0.27, 0.27]))
    only_pruned = trials_frame(study_of(rows[:1]))
    assert search_figures.heights(only_pruned).tolist() == [0]
    plt.close("all")


def test_the_ring_is_around_the_trial_that_rescoring_chose(study):
    """And that is whose third value the contour is drawn at."""
    few = [t for t in study.trials if t.state == optuna.trial.TrialState.COMPLETE][:2]
    study.set_user_attr("rescored", [{"point": t.params, "seeds": [1], "values": [t.number / 100]} for t in few])
    figure = drawn(search_figures.trials(study))
    point = few[1].params
    np.testing.assert_allclose(figure.axes[0].collections[-1].get_offsets(), [[point["IS"], point["UGS"]]])
    assert f"epoch {point['epoch']}," in drawn(search_figures.contour(study)).axes[0].get_title()


# --- rescoring ---


def test_first_values_stand_beside_the_means_of_rescoring(study_of):
    study = study_of([(5, 0.5, 1, 0.9, False), (6, 0.1, 2, 0.8, False), (7, 0.2, 3, 0.7, False)])
    values = [[0.6, 0.7], [0.75, 0.79], [0.7, 0.7]]
    points = [{"point": t.params, "seeds": [1, 2], "values": v} for t, v in zip(study.trials, values)]
    study.set_user_attr("rescored", points)
    figure = drawn(search_figures.rescored(study))
    (ax,) = figure.axes
    first = next(c for c in ax.collections if c.get_label() == "first value, one classifier").get_offsets()
    np.testing.assert_allclose(first, [[0.8, 0], [0.7, 1], [0.9, 2]])  # the best mean first
    line, _, (bars,) = ax.containers[0]
    np.testing.assert_allclose(line.get_xdata().astype(float), [0.77, 0.7, 0.65])
    ends = [segment[:, 0] for segment in bars.get_segments()]
    np.testing.assert_allclose(
        ends, [[0.75, 0.79], [0.7, 0.7], [0.6, 0.7]]
    )  # two values: one error apart from the mean
    assert [label.get_text() for label in ax.get_yticklabels()][0] == "IS 6, UGS 0.10, epoch 2  (chosen)"
    assert ax.get_title() == "the first values lie 9.3 points above the means, on average"


def test_a_search_that_was_not_rescored_has_no_such_figure(study):
    with pytest.raises(ValueError, match="No trial of this search was rescored"):
        search_figures.rescored(study)


def test_the_chosen_trial_is_ringed_and_the_shown_one(study):
    frame = trials_frame(study)
    best = study.best_trial.number
    assert best != 3
    figure = drawn(search_figures.trials_by_parameter(frame, shown=3))
    for ax, names in zip(figure.axes, search_figures.PANELS):
        for ring, trial in zip(ax.collections[-2:], (best, 3)):
            (at,) = ring.get_offsets()
            np.testing.assert_allclose(at, frame.loc[trial, list(names)].astype(float))
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["complete", "pruned", "chosen", "shown below"]


def test_figures_of_the_shortest_search(study_of):
    study = study_of([(10, 0.5, 1, 0.8, False)])
    for figure in (search_figures.trials(study), search_figures.slices(study), search_figures.contour(study)):
        drawn(figure)


@pytest.mark.parametrize("rows", [[], [(10, 0.5, 1, 0.8, True)], [(10, 0.5, 1, 0.8, True), (9, 0.7, 2, 0.4, True)]])
def test_a_search_without_a_complete_trial_draws(study_of, rows):
    """The first trials to finish may all be pruned, and a shared search is shown before its first."""
    study = study_of(rows)
    figure = drawn(search_figures.trials(study, "so far"))
    assert sum(len(c.get_offsets()) for c in figure.axes[0].collections) == len(rows)  # and no ring
    drawn(search_figures.slices(study))
    drawn(search_figures.contour(study))
    if rows:
        drawn(search_figures.trials_by_parameter(trials_frame(study)))


def test_a_contour_of_trials_that_scored_alike_draws_the_points_alone(study_of):
    def figure(values):
        rows = [(1 + k, k * k % 5 / 5, 1, value, False) for k, value in enumerate(values)]
        return drawn(search_figures.contour(study_of(rows)))

    assert len(figure([0.1] * 6).axes) == 1
    assert len(figure([0.1, 0.3, 0.2, 0.5, 0.4, 0.6]).axes) == 2  # with the scale of its colours


def test_an_early_epoch_is_no_valley_of_the_contour(study_of):
    """Only the epoch matters here: at that of the best trial, the landscape over IS and UGS is flat."""
    random = np.random.default_rng(0)
    rows = []
    for k in range(40):
        epoch = 1 if k % 4 == 0 else 10
        rows.append(
            (int(random.integers(1, 50)), float(random.uniform(0, 1)), epoch, 0.4 if epoch == 1 else 0.9, False)
        )
    figure = drawn(search_figures.contour(study_of(rows)))
    (mesh,) = (c for c in figure.axes[0].collections if c.get_array() is not None)
    assert mesh.get_array().min() > 85 and "epoch 10" in figure.axes[0].get_title()


def test_pruned_trials_are_told_apart_and_make_no_valley(study_of):
    """They scored less because they were stopped: the forest learns from complete ones, or from all at one epoch."""
    random = np.random.default_rng(1)
    rows = []
    for k in range(40):
        rows.append((int(random.integers(1, 50)), float(random.uniform(0, 1)), 5, 0.5 if k % 2 else 0.9, bool(k % 2)))
    rows[0] = (*rows[0][:3], 0.95, False)  # else all complete ones were alike
    figure = drawn(search_figures.contour(study_of(rows)))
    mesh, complete, pruned = figure.axes[0].collections
    assert mesh.get_array().min() > 85 and (len(complete.get_offsets()), len(pruned.get_offsets())) == (20, 20)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["complete", "pruned"]
    assert figure.axes[0].get_title().endswith("from 20 complete trials")
    whole = drawn(search_figures.contour(study_of(rows), pruned=True)).axes[0]
    assert whole.get_title().endswith("from 40 trials, all at classifier epoch 3, on validation images")
    assert whole.collections[0].get_array().min() < 85  # which here is where they stood


def test_the_best_trial_is_a_complete_one_where_there_is_any(study_of):
    rows = [(5, 0.5, 1, 0.9, True), (6, 0.1, 1, 0.3, False), (7, 0.2, 1, 0.6, False)]
    assert search_figures.best_trial(trials_frame(study_of(rows))).IS == 7
    assert search_figures.best_trial(trials_frame(study_of(rows[:1]))).IS == 5


def test_importances_with_their_intervals():
    ours = pd.DataFrame([[0.2, 0.7, 0.1], [0.1, 0.3, 0.6]], columns=["IS", "UGS", "epoch"], index=["step 2", "step 4"])
    interval = pd.DataFrame({"low": [0.1, 0.3, 0.0], "high": [0.4, 0.9, 0.2]}, index=["IS", "UGS", "epoch"])
    figure = drawn(search_figures.importance_bars(ours, intervals={"step 2": interval}))
    (lines,) = figure.axes[0].collections
    ends = [segment[:, 0].tolist() for segment in lines.get_segments()]
    assert ends == [[0.1, 0.4], [0.3, 0.9], [0.0, 0.2]]
    bars = figure.axes[0].containers[0]
    for bar, segment in zip(bars, lines.get_segments()):
        assert bar.get_y() < segment[0, 1] < bar.get_y() + bar.get_height()


def test_importances_of_a_search_that_scored_alike_are_drawn():
    ours = pd.DataFrame([[np.nan] * 3], columns=["IS", "UGS", "epoch"], index=["step 2"])
    drawn(search_figures.importance_bars(ours))


def test_importance_bars():
    ours = pd.DataFrame([[0.2, 0.7, 0.1], [0.1, 0.3, 0.6]], columns=["IS", "UGS", "epoch"], index=["step 2", "step 4"])
    figure = drawn(search_figures.importance_bars(ours))
    lengths = {c.get_label(): [bar.get_width() for bar in c] for c in figure.axes[0].containers}
    assert lengths["ours, step 2"] == pytest.approx([0.2, 0.7, 0.1])
    published = [value for name, value in lengths.items() if "published" in name]
    assert len(published) == 2 and len(lengths) == 4
    step_4 = [paper.IMPORTANCES[p].xs(4, level="step").mean() for p in ("IS", "UGS", "epoch")]
    assert published[1] == pytest.approx(step_4)
