"""Rows tested elsewhere: the same classifiers, on more."""

import numpy as np
import pytest
import torch

from sdgen_lib.classify import ATTACKS, Attack
from sdgen_lib.data import Split
from sdgen_lib.data.shifts import CORRUPTIONS, corrupted
from sdgen_lib.evaluate import elsewhere, rows, worth
from sdgen_lib.methods.inversion import InversionMethod


@pytest.fixture(scope="module")
def ws(small, tmp_path_factory):
    return small(tmp_path_factory.mktemp("elsewhere"), classifier_seeds=2).workspace


@pytest.fixture(scope="module")
def tests(ws):
    inverted = Split(255 - ws.data.test.images, ws.data.test.labels)
    return elsewhere.shifted_tests(ws, {"inverted": inverted}, severities=(1, 5))


@pytest.fixture(scope="module")
def row(ws, tests):
    return elsewhere.elsewhere_row(ws, None, "real", tests)


def test_every_corruption_at_each_severity_and_the_sets_that_are_given(ws, tests):
    assert list(tests) == [*(f"{name} {severity}" for name in CORRUPTIONS for severity in (1, 5)), "inverted"]
    expected = corrupted(ws.data.test, "shot_noise", 5, ws.settings.seed)
    assert torch.equal(tests["shot_noise 5"].images, expected.images)
    assert torch.equal(tests["inverted"].images, 255 - ws.data.test.images)
    assert len(elsewhere.shifted_tests(ws)) == 3 * len(CORRUPTIONS)
    assert elsewhere.shifted_tests(ws, severities=()) == {}


@pytest.mark.parametrize("name", ["test", "jpeg 2", "contrast"])
def test_a_set_has_a_name_of_its_own(ws, name):
    with pytest.raises(ValueError, match=f"A test set is called '{name}', as a corruption or"):
        elsewhere.shifted_tests(ws, {name: ws.data.test}, severities=(1,))


def test_a_row_elsewhere_is_of_the_same_classifiers(ws, tests, row):
    plain = worth.worth(ws, None, "real")
    for name in ("test", "balanced_test", "per_class", "val", "steps", "calibration"):
        assert row[name] == plain[name]
    assert "tests" not in plain and "attacks" not in plain
    assert list(row["tests"]) == list(tests) and list(row["attacks"]) == list(ATTACKS)
    for found in row["tests"].values():
        assert set(found) == {"accuracy", "balanced", "per_class", "calibration"}
        assert all(len(values) == 2 for values in found.values())
    for values in (row["calibration"], *row["attacks"].values()):
        assert len(values) == 2 and all(0 <= value <= 1 for value in values)


def test_another_attack_or_another_set_is_another_row(ws, tests):
    def fingerprint(**how):
        return ws.run.fingerprint(worth.worth_step(ws, None, "real", **how))

    fewer = {name: split for name, split in tests.items() if name != "inverted"}
    found = [fingerprint(), fingerprint(attacks=ATTACKS), fingerprint(tests=tests), fingerprint(tests=fewer)]
    found += [fingerprint(attacks={"a": Attack(2, 1)}), fingerprint(attacks={"a": Attack(2, 1, seed=1)})]
    found += [fingerprint(attacks={"b": Attack(2, 1)})]
    assert len(set(found)) == len(found)
    assert found[0] == fingerprint(attacks={}, tests={}) and found[1] == fingerprint(attacks=dict(ATTACKS))


def test_the_estimate_knows_the_steps_uphill(ws):
    plain, attacked = (
        worth.worth_step(ws, None, "real", attacks=how).work()
        for how in ({}, {"a": Attack(2, 1, 10), "b": Attack(2, 2)})
    )
    (before,), (after,) = plain.values(), attacked.values()
    assert list(plain) == list(attacked) and after - before == 2 * len(ws.data.test) * 11


def test_generated_images_have_such_rows_too(ws, tests):
    few = {name: tests[name] for name in ("jpeg 5", "inverted")}
    found = elsewhere.elsewhere_row(ws, InversionMethod(ws).source(), "both", few, {"FGSM": Attack(8, 8)}, ratio=(1, 1))
    assert list(found["tests"]) == list(few) and list(found["attacks"]) == ["FGSM"] and found["num_images"] == 12


def test_the_corruptions_alone_where_nothing_is_given(ws):
    found = elsewhere.elsewhere_row(ws, None, "real", attacks=None)
    assert len(found["tests"]) == 3 * len(CORRUPTIONS) and "attacks" not in found


MADE = {
    "test": [0.9, 0.8],
    "tests": {
        "jpeg 1": {"accuracy": [0.8, 0.8]},
        "jpeg 5": {"accuracy": [0.4, 0.6]},
        "contrast 5": {"accuracy": [0.2, 0.0]},
        "usps": {"accuracy": [0.5, 0.1]},
    },
}


def test_what_is_lost_is_paired_by_classifiers():
    np.testing.assert_allclose(elsewhere.drop(MADE, "usps"), [0.4, 0.7])
    with pytest.raises(ValueError, match="Unknown test set 'ups'. Did you mean 'usps'"):
        elsewhere.drop(MADE, "ups")
    with pytest.raises(ValueError, match="Unknown test set 'usps'"):
        elsewhere.drop({"test": [0.9]}, "usps")


def test_means_over_corruptions_and_over_severities():
    found = elsewhere.by_severity(MADE)
    assert list(found) == [1, 5]
    np.testing.assert_allclose(found[1], [0.8, 0.8])
    np.testing.assert_allclose(found[5], [0.3, 0.3])
    found = elsewhere.by_shift(MADE)
    assert list(found) == ["contrast", "jpeg", "usps"]  # the corruptions' own order
    np.testing.assert_allclose([*found.values()], [[0.2, 0.0], [0.6, 0.7], [0.5, 0.1]])
    assert elsewhere.by_severity({"test": [0.9]}) == elsewhere.by_shift({"test": [0.9]}) == {}


def test_what_is_not_known_of_a_row_is_none():
    """nan is no JSON, and a row's facts are."""
    from sdgen_lib.classify import Result, Score

    score = Score.of(torch.tensor([0, 0]), torch.tensor([0, 0]), 2)
    row = rows.accuracies([Result(0.5, 1, 1, 1, {"test": score, "far": score})])
    assert row["calibration"] == row["tests"]["far"]["calibration"] == [None]
    assert row["per_class"] == [[1.0, None]] and "attacks" not in row
