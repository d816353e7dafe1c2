"""Estimates against the work that a micro run really did."""

import re

import pytest

from sdgen_lib import cost, train
from sdgen_lib.course import Course
from sdgen_lib.settings import resolve
from sdgen_lib.tune import Space


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0.4, "0 s"), (12, "12 s"), (99, "99 s"), (100, "2 min"), (200, "3 min"), (5399, "90 min"), (5400, "1.5 h"),
     (9000, "2.5 h"), (172799, "48.0 h"), (172800, "2.0 days"), (400000, "4.6 days")],
)  # fmt: skip
def test_readable(seconds, expected):
    assert cost.readable(seconds) == expected


def told(monkeypatch, course, step, space=None, **unit):
    """The number in the line before a step, when each kind of work costs what ``unit`` says."""
    units = {**dict.fromkeys(cost.KINDS, 0.0), **unit}
    with monkeypatch.context() as patch:
        patch.setattr(cost, "measure", lambda *asked: units)
        patch.setattr(cost, "readable", repr)
        return float(re.fullmatch(r"about (\S+) on this machine", cost.text(course, step, space))[1])


@pytest.mark.parametrize("step", ["1_transfer", "3_finetune"])
def test_trained_passes(finished, monkeypatch, step):
    assert told(monkeypatch, finished.course, step, **{step[2:]: 1.0}) == finished.work[step]["trained"] == 200


@pytest.mark.parametrize("step", ["1_transfer", "3_finetune"])
def test_held_out_passes(finished, monkeypatch, step):
    """On a small training set the held-out losses of each epoch cost more than the training itself."""
    held_out = finished.work[step]["pass"]
    assert held_out == 2 * 202 * 3 * train.FIXED_NOISES  # epochs, validation images, three labels
    assert told(monkeypatch, finished.course, step, **{"pass": 1.0}) == pytest.approx(held_out, rel=0.05)


@pytest.mark.parametrize("step", cost.STEPS)
@pytest.mark.parametrize("half", ["encode", "decode"])
def test_passes_of_the_vae(finished, monkeypatch, step, half):
    """Exactly: the real images are encoded once, in step 1; each generated image is decoded once."""
    found = finished.work[step][half]
    assert told(monkeypatch, finished.course, step, **{half: 1.0}) == found
    expected = {("1_transfer", "encode"): 100 + 202, ("2_tune", "decode"): 4 * 40, ("4_retune", "decode"): 4 * 40,
                ("5_datasets", "decode"): 2 * 100}  # fmt: skip
    assert found == expected.get((step, half), 0)


@pytest.mark.parametrize("step", ["2_tune", "4_retune"])
def test_passes_of_a_search(finished, monkeypatch, step):
    """IS is 5 or 6 in this run: its mean is near whatever was drawn. Guidance doubles a pass."""
    space = Space((5, finished.rows["after 2"]["point"]["IS"]), (0.0, 1.0), (1, 2)) if step == "4_retune" else None
    expected = told(monkeypatch, finished.course, step, space, **{"pass": 1.0})
    assert expected == pytest.approx(finished.work[step]["pass"], rel=0.1)
    assert finished.work[step]["trained"] == 0


@pytest.mark.parametrize("step", ["2_tune", "4_retune"])
def test_classifier_steps_of_a_search(finished, monkeypatch, step):
    """At most every trial's every epoch; pruning spares some."""
    most = 4 * 40 * 3
    assert finished.work[step]["classifier"] <= most
    assert most / 3 <= told(monkeypatch, finished.course, step, classifier=1.0) <= most


def test_the_synthetic_sets(finished, monkeypatch):
    found = finished.work["5_datasets"]
    assert told(monkeypatch, finished.course, "5_datasets", **{"pass": 1.0}) == pytest.approx(found["pass"], rel=0.1)
    # Two classifiers, three epochs, on the real 100 images and on 100 and 200 synthetic ones.
    assert found["classifier"] == 2 * 3 * (100 + 100 + 200)
    assert told(monkeypatch, finished.course, "5_datasets", table=1.0) == found["classifier"]


def test_classifiers_of_large_sets_cost_no_more_than_the_limit():
    s = resolve(recipe="demo", backbone="tiny", classifier_epoch_limit=1200, classifier_epoch_images=400)
    found = [cost.count(s, "5_datasets", n, 100)["table"] for n in (300, 1000, 50_000)]
    seen = [(400 + 400 + 600 + 900), (1000 + 1000 + 1200 + 1200), 4 * 1200]  # real, x1, x2, x3
    assert found == [3 * 24 * n for n in seen]


def test_a_larger_recipe_costs_more(finished, monkeypatch):
    unit = {"pass": 1e-3, "transfer": 2e-3, "finetune": 3e-3, "encode": 0.0, "decode": 0.0, "classifier": 1e-4,
            "table": 1e-4}  # fmt: skip
    monkeypatch.setattr(cost, "measure", lambda *asked: unit)
    monkeypatch.setattr(cost, "readable", lambda seconds: seconds)
    table = cost.table(finished.course)
    assert list(table) == ["1_transfer", "2_tune", "3_finetune", "4_retune", "5_datasets"]
    for step, row in table.items():
        assert 0 < row["this recipe"] < row["-p recipe paper"], step
    # The paper's first search: 50 trials of 4000 images, 27.5 steps on average, two passes each.
    sampling = 50 * 4000 * 27.5 * 2 * 1e-3
    assert sampling < table["2_tune"]["-p recipe paper"] < 1.2 * sampling + 50 * 4000 * 100 * 1e-4


def test_measure_leaves_the_backbone_frozen(micro, tmp_path):
    course = Course(micro(tmp_path))
    unit = cost.measure(course)
    assert set(unit) == set(cost.KINDS) and all(value > 0 for value in unit.values())
    assert not any(p.requires_grad or p.grad is not None for p in course.backbone.unet.parameters())
    assert cost.measure(course) is unit  # measured once


def test_a_step_measures_only_what_it_uses(micro, tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "_measured", {})
    course = Course(micro(tmp_path))
    cost.text(course, "1_transfer")
    (unit,) = cost._measured.values()
    assert set(unit) == {"pass", "transfer", "encode"}
    transfer = unit["transfer"]
    cost.text(course, "2_tune")
    assert set(unit) == {"pass", "transfer", "encode", "decode", "classifier"} and unit["transfer"] == transfer
