"""Scores against scikit-learn's, calibration against torchmetrics'."""

import math
import re
import warnings

import pytest
import torch
from sklearn.metrics import accuracy_score, balanced_accuracy_score, confusion_matrix
from torchmetrics.functional.classification import multiclass_calibration_error

from sdgen_lib import classify, data


@pytest.mark.parametrize("absent", [(), (3,), (0, 5)])
def test_a_score_is_scikit_learns(absent):
    torch_numbers = torch.Generator().manual_seed(len(absent))
    labels = torch.multinomial(torch.tensor([1.0, 2, 3, 4, 5, 20]), 400, replacement=True, generator=torch_numbers)
    labels = labels[~torch.isin(labels, torch.tensor(absent, dtype=torch.int64))]
    predicted = torch.where(
        torch.rand(len(labels), generator=torch_numbers) < 0.6,
        labels,
        torch.randint(6, (len(labels),), generator=torch_numbers),
    )
    score = classify.Score.of(predicted, labels, 6)
    assert score.accuracy == pytest.approx(accuracy_score(labels, predicted))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of predicted classes that no image has
        assert score.balanced_accuracy == pytest.approx(balanced_accuracy_score(labels, predicted))
    confusion = confusion_matrix(labels, predicted, labels=range(6))
    for label, recall in enumerate(score.per_class):
        if label in absent:
            assert math.isnan(recall)
        else:
            assert recall == pytest.approx(confusion[label, label] / confusion[label].sum())
    assert len(score.per_class) == 6 and torch.equal(score.predicted, predicted)


def test_scores_compare_by_their_numbers():
    labels = torch.tensor([0, 0, 2, 2])
    first, second = (classify.Score.of(torch.tensor(p), labels, 3) for p in ([0, 1, 2, 2], [1, 0, 2, 2]))
    assert first == second  # class 1 is absent from both: nan
    assert first.per_class[0] == 0.5 and first.per_class[2] == 1.0
    assert first != classify.Score.of(torch.tensor([0, 0, 2, 2]), labels, 3)


def test_always_the_largest_class_is_balanced_chance():
    labels = torch.tensor([0] * 90 + [1] * 10)
    score = classify.Score.of(torch.zeros_like(labels), labels, 2)
    assert score.accuracy == pytest.approx(0.9) and score.balanced_accuracy == 0.5


@pytest.fixture(scope="module")
def small():
    return data.load("digits:100", image_size=8)


def test_score_reports_the_best_epoch_on_each_test_set(small):
    options = dict(width=4, epochs=12, batch_size=32, learning_rate=0.1)
    inverted = data.Split(255 - small.test.images, small.test.labels)
    tests = {"test": small.test, "inverted": inverted, "validation": small.val}
    result = classify.score(small.train, small.val, tests, 10, **options)
    model, history = classify.train_classifier(small.train, small.val, 10, **options)
    assert (result.val_accuracy, result.best_epoch) == (max(history), history.index(max(history)) + 1)
    assert (result.epochs, result.steps) == (12, 12 * 4)  # 100 images, 32 a batch
    assert list(result.tests) == list(tests)
    for name, split in tests.items():
        assert result.tests[name].accuracy == classify.accuracy(model, split)
        assert torch.equal(result.tests[name].predicted, classify.predict(model, split.images))
    assert result.tests["validation"].accuracy == result.val_accuracy


def test_steps_are_those_of_the_training(small):
    taken = []
    result = classify.score(
        small.train, small.val, {}, 10, width=4, batch_size=32, steps=7, on_step=taken.append, epochs=99
    )
    assert (result.steps, result.epochs, result.tests) == (7, 2, {}) and taken == list(range(1, 8))
    never = data.Split(small.val.images, torch.full_like(small.val.labels, 10))
    stopped = classify.score(small.train, never, {}, 11, width=4, batch_size=50, epochs=30, stop_patience=3)
    assert (stopped.epochs, stopped.steps, stopped.best_epoch) == (4, 8, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_learns_the_digits(dtype):
    digits = data.load("digits")
    result = classify.score(digits.train, digits.val, {"test": digits.test}, 10, epochs=15, batch_size=64, dtype=dtype)
    assert result.tests["test"].accuracy > 0.95 and result.val_accuracy > 0.95
    assert result.tests["test"].balanced_accuracy > 0.95
    assert 1 <= result.best_epoch <= result.epochs == 15


# --- calibration ---


@pytest.mark.parametrize("classes", [2, 5, 30])
def test_the_calibration_error_is_torchmetrics(classes):
    numbers = torch.Generator().manual_seed(classes)
    probabilities = (3 * torch.randn(500, classes, generator=numbers)).softmax(1)
    labels = torch.multinomial(probabilities.sqrt(), 1, generator=numbers)[:, 0]
    expected = multiclass_calibration_error(probabilities, labels, classes, n_bins=15, norm="l1")
    confidence, predicted = probabilities.max(1)
    found = classify.Score.of(predicted, labels, classes, confidence)
    assert found.calibration_error == pytest.approx(float(expected), abs=1e-6) and found.calibration_error > 0.02
    same = classify.Score.of(predicted, labels, classes)
    assert math.isnan(same.calibration_error) and same == found


def test_the_calibration_error_by_hand():
    """Two bins: 0.9, 0.9 and 0.9, two of three right; 0.6 and 0.6, none right. (3 * |2/3 - 0.9| + 2 * 0.6) / 5."""
    labels, predicted = torch.tensor([0, 1, 0, 1, 1]), torch.tensor([0, 1, 1, 0, 0])
    found = classify.Score.of(predicted, labels, 2, torch.tensor([0.9, 0.9, 0.9, 0.6, 0.6]))
    assert found.calibration_error == pytest.approx((0.7 + 1.2) / 5, abs=1e-6)
    # 9/15 ends its bin, 0.6001 begins the next: one right and one wrong, each with a bin of its own
    apart = classify.Score.of(
        torch.tensor([0, 0]), torch.tensor([0, 1]), 2, torch.tensor([0.6, 0.6001], dtype=torch.float64)
    )
    assert apart.calibration_error == pytest.approx((0.4 + 0.6001) / 2)
    sure = torch.ones(5)
    assert classify.Score.of(labels, labels, 2, sure).calibration_error == 0
    assert classify.Score.of(1 - labels, labels, 2, sure).calibration_error == 1


def test_a_confidence_that_is_none_is_refused_and_one_that_is_not_known_is_nan():
    labels = torch.tensor([0, 1])
    with pytest.raises(ValueError, match="There are 3 confidences for 2 predictions; give one for each"):
        classify.Score.of(labels, labels, 2, torch.ones(3))
    with pytest.raises(ValueError, match=r"A confidence is 1\.5; each must be a probability, 0\.\.1"):
        classify.Score.of(labels, labels, 2, torch.tensor([1.0, 1.5]))
    assert math.isnan(classify.Score.of(labels, labels, 2, torch.tensor([0.5, math.nan])).calibration_error)


def test_score_says_how_well_calibrated_the_classifier_is_and_how_it_stands_attacks(small):
    options = dict(width=4, epochs=6, batch_size=32, learning_rate=0.1)
    attacks = {"none": classify.Attack(0, 1), "strong": classify.Attack(64, 16, 8)}
    result = classify.score(small.train, small.val, {"test": small.test}, 10, attacks=attacks, **options)
    model, _ = classify.train_classifier(small.train, small.val, 10, **options)
    probabilities = classify.probabilities_of(model, small.test.images, batch_size=7)
    assert probabilities.shape == (len(small.test), 10) and probabilities.dtype == torch.float32
    torch.testing.assert_close(probabilities.sum(1), torch.ones(len(small.test)))
    assert torch.equal(probabilities.argmax(1), classify.predict(model, small.test.images))
    expected = multiclass_calibration_error(probabilities, small.test.labels, 10, n_bins=15, norm="l1")
    test = result.tests["test"]
    assert test.calibration_error == pytest.approx(float(expected), abs=1e-5)
    attacked = attacks["strong"](model, small.test.images, small.test.labels)
    strong = float((classify.predict(model, attacked) == small.test.labels).float().mean())
    assert result.attacks == {"none": test.accuracy, "strong": strong} and strong < test.accuracy
    plain = classify.score(small.train, small.val, {"test": small.test}, 10, **options)
    assert plain.attacks == {} and plain.tests == result.tests


# --- what cannot be scored ---


def test_attacks_need_the_images_they_are_of(monkeypatch):
    monkeypatch.setattr("sdgen_lib.classify.scores.train_classifier", None)
    with pytest.raises(ValueError, match=r"attacks are of the test set 'test', and there is none; .* \['far'\]"):
        classify.score(split_of(), split_of(), {"far": split_of()}, 2, attacks=classify.ATTACKS)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("wrong", [-1, 3, 7])
def test_a_class_that_is_not_there_is_named(which, wrong):
    """It would be cut off: counted as a wrong image, and in no class."""
    pair = [torch.tensor([0, 1, 2, 2]), torch.tensor([0, 1, 2, 2])]
    pair[which][1] = wrong
    name = ("predictions", "labels")[which]
    with pytest.raises(ValueError, match=rf"^The {name} hold {wrong}; with 3 classes they must be 0 \.\. 2\.$"):
        classify.Score.of(*pair, 3)
    pair[which][2] = 9
    with pytest.raises(ValueError, match="hold .*9; with 3 classes"):
        classify.Score.of(*pair, 3)


@pytest.mark.parametrize(
    ("predicted", "labels", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), "3 predictions for 1 labels"),
        (torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), "predictions are none.* one or more"),
        (torch.zeros(3), torch.zeros(3, dtype=torch.int64), r"torch.float32 \(3,\); they must be whole numbers \(N,\)"),
        (torch.zeros(2, 2).long(), torch.zeros(2).long(), r"torch.int64 \(2, 2\); they must be whole numbers \(N,\)"),
        (torch.zeros(2).long(), torch.zeros(2).bool(), r"labels are torch.bool \(2,\); they must be whole numbers"),
    ],
)
def test_what_is_no_list_of_classes_is_refused(predicted, labels, message):
    with pytest.raises(ValueError, match=message):
        classify.Score.of(predicted, labels, 3)


def split_of(images=None, labels=None):
    images = torch.zeros(4, 3, 8, 8, dtype=torch.uint8) if images is None else images
    return data.Split(images, torch.tensor([0, 1, 0, 1]) if labels is None else labels)


NO_SPLITS = {
    "empty": (split_of(torch.zeros(0, 3, 8, 8).byte(), torch.zeros(0).long()), "are none: there is no image"),
    "label too large": (split_of(labels=torch.tensor([0, 1, 2, 1])), r"hold 2; with 2 classes they must be 0 \.\. 1"),
    "label below 0": (split_of(labels=torch.tensor([0, -1, 1, 1])), r"hold -1; with 2 classes they must be 0 \.\. 1"),
    "float images": (
        split_of(torch.zeros(4, 3, 8, 8)),
        r"torch.float32 \(4, 3, 8, 8\); they must be uint8 \(N, 3, H, W\)",
    ),
    "grey": (split_of(torch.zeros(4, 1, 8, 8).byte()), r"torch.uint8 \(4, 1, 8, 8\); they must be uint8"),
    "channels last": (split_of(torch.zeros(4, 8, 8, 3).byte()), r"torch.uint8 \(4, 8, 8, 3\); they must be uint8"),
    "one image": (split_of(torch.zeros(3, 8, 8).byte()), r"torch.uint8 \(3, 8, 8\); they must be uint8"),
    "fewer labels": (split_of(labels=torch.tensor([0, 1])), "has 4 images and 2 labels; give one for each"),
}


USED = [(which, why) for which in ("training", "val", "tests['far']") for why in NO_SPLITS]
USED.remove(("training", "empty"))  # the mixture's own error


@pytest.mark.parametrize(("which", "why"), USED)
def test_a_set_that_cannot_be_used_is_named_before_anything_is_trained(which, why, monkeypatch):
    monkeypatch.setattr("sdgen_lib.classify.scores.train_classifier", None)
    wrong, message = NO_SPLITS[why]
    sets = {"training": split_of(), "val": split_of(), "tests['far']": split_of(), which: wrong}
    tests = {"near": split_of(), "far": sets["tests['far']"]}
    with pytest.raises(ValueError, match=f"{re.escape(which)}.*{message}"):
        classify.score(sets["training"], sets["val"], tests, 2)


def test_each_part_of_a_mixture_is_looked_at_and_may_be_empty():
    empty, wrong = NO_SPLITS["empty"][0], NO_SPLITS["label too large"][0]
    with pytest.raises(ValueError, match="The labels of part 2 of training hold 2; with 2 classes"):
        classify.score(classify.Mixture((split_of(), wrong)), split_of(), {}, 2)
    result = classify.score(classify.Mixture((split_of(), empty)), split_of(), {}, 2, width=4, epochs=1)
    assert result.epochs == 1


def test_labels_that_are_probabilities_may_be_trained_on_and_not_measured_with():
    soft = split_of(labels=torch.tensor([[0.5, 0.5]] * 4))
    result = classify.score(soft, split_of(), {"test": split_of()}, 2, width=4, epochs=1)
    assert 0 <= result.tests["test"].accuracy <= 1
    with pytest.raises(ValueError, match=r"labels of val are torch.float32 \(4, 2\); they must be whole numbers"):
        classify.score(split_of(), soft, {}, 2)
