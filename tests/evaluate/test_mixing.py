"""Mixtures of real and generated images: the studies' rows, soft labels, and where a gain is gone."""

import math

import pytest
import torch

from sdgen_lib.classify.networks import probabilities_of
from sdgen_lib.config.settings import FIELDS
from sdgen_lib.evaluate import mixing, quality, rows, worth
from sdgen_lib.methods.named import GENERATORS, generator_of


@pytest.mark.parametrize(
    ("gains", "at"),
    [
        ([4.0, 2.0, -2.0], math.sqrt(50 * 200)),  # half way between, over the logarithm
        ([3.0, -1.0, 5.0], 20 * 2.5**0.75),
        ([-1.0, 2.0, 3.0], 20),
        ([1.0, 2.0, 3.0], math.inf),
        ([1.0, 0.0, 3.0], 50),
    ],
)
def test_where_the_gain_is_gone(gains, at):
    assert mixing.crossing([20, 50, 200], gains) == pytest.approx(at)


def test_what_is_not_known_has_no_crossing():
    assert math.isnan(mixing.crossing([20, 50], [1.0, math.nan]))
    assert mixing.crossing([20, 50], [-1.0, math.nan]) == 20
    for counts, gains in (([20, 20], [1, 2]), ([50, 20], [1, 2]), ([20], [1, 2])):
        with pytest.raises(ValueError, match="must rise"):
            mixing.crossing(counts, gains)


def test_the_settings_name_the_studies_and_the_generators(small, tmp_path):
    assert tuple(mixing.studies(small(tmp_path).workspace)) == FIELDS["mixing_study"].metadata["choices"]
    assert FIELDS["worth_generator"].metadata["choices"] == GENERATORS


def test_every_generator_draws_through_the_same_door(small, tmp_path):
    course = small(tmp_path, augmented_text="prompt")
    for name in ("after 1", "inversion", "augmented"):
        ws, source = generator_of(course.workspace, name)
        found = worth.worth(ws, source, "generated")
        assert found["num_images"] == len(course.data.train) and len(found["test"]) == 2
    with pytest.raises(ValueError, match="Unknown generator 'gan'.*augmented"):
        generator_of(course.workspace, "gan")


def test_a_studys_rows_have_equal_steps_but_where_epochs_are_equal(small, tmp_path):
    ws = small(tmp_path, classifier_batch_size=8).workspace  # 7:1 needs eight
    for name in ("ratio", "labels", "amount"):
        found = mixing.study(ws, "after 1", name, 2)
        assert len({row["steps"][0] for row in found.values()}) == 1
    amounts = {value: row["num_images"] for (value, kind), row in found.items() if kind == "generated"}  # of "amount"
    n = len(ws.data.train)
    assert 0 <= amounts.pop("x0.5") - n / 2 <= ws.data.num_classes / 2  # half of each class, rounded up
    assert "x2" in amounts and amounts == {value: int(value[1:]) * n for value in amounts}
    found = mixing.study(ws, "after 1", "training", 2)
    steps = {key: row["steps"][0] for key, row in found.items()}
    n, epochs, batch = len(ws.data.train), ws.settings.classifier_epochs, ws.settings.classifier_batch_size
    assert len({steps["steps", kind] for kind in ("real", "both", "generated")}) == 1
    for kind, images in (("real", n), ("generated", 2 * n), ("both", 3 * n)):
        assert steps["epochs", kind] <= epochs * math.ceil(images / batch)
    assert steps["epochs", "both"] > steps["epochs", "real"]


def test_soft_labels_are_the_teachers(small, tmp_path, monkeypatch):
    course = small(tmp_path)
    ws, source, seen = course.workspace, course.source("after 1"), []
    score = rows.score

    def spied(training, *args, **options):
        seen.append(training)
        return score(training, *args, **options)

    monkeypatch.setattr(rows, "score", spied)
    worth.worth(ws, source, "both", soft=True)
    real, made = seen[0].parts
    torch.testing.assert_close(made.labels, probabilities_of(quality.judge_of(ws), made.images))
    assert made.labels.shape == (len(made.images), ws.data.num_classes) and not real.labels.is_floating_point()


def test_a_learning_curve_gives_fewer_images_a_generator_of_their_own(micro, tmp_path):
    from sdgen_lib.course import Course

    few = dict(classifier_epochs=1, transfer_epochs=1, worth_steps=2, classifier_batch_size=8)
    ws = Course(micro(tmp_path, **few)).workspace
    found = mixing.learning_curve(ws, "after 1", [20, 40], multiple=1)
    assert list(found) == [("20", "real"), ("20", "both"), ("40", "real"), ("40", "both")]
    assert [row["num_images"] for row in found.values()] == [20, 40, 40, 80]
    assert len({row["steps"][0] for row in found.values()}) == 1
