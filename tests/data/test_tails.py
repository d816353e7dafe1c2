"""Long tails: their counts by the formula, their groups, and what stays whole."""

import numpy as np
import pytest
import torch

from sdgen_lib import data
from sdgen_lib.data.tails import groups, long_tailed, per_group, tail_counts


def test_counts_fall_exponentially():
    """Cao et al. 2019: n_max times mu^i with mu = factor^(-1 / (C - 1)); CIFAR10-LT 100 has these counts."""
    expected = [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    found = tail_counts([5000] * 10, 100)
    assert all(abs(a - b) <= 1 for a, b in zip(found, expected, strict=True))  # theirs are cut, ours are rounded
    assert tail_counts([500] * 10, 100, largest=100)[:3] == [100, 60, 36]


def test_the_largest_class_stays_the_largest_and_none_grows():
    assert tail_counts([10, 40, 20], 4) == [10, 40, 20]
    assert tail_counts([3, 40, 50], 25) == [2, 10, 50]
    assert tail_counts([7, 7], 1e6) == [7, 1]
    assert tail_counts([9], 10) == [9]
    with pytest.raises(ValueError, match="factor must be 1 or more.*not 0.5"):
        tail_counts([5, 5], 0.5)


def test_a_tail_keeps_the_test_images_and_is_a_choice_of_the_seed():
    whole = data.load("digits", None, 0)
    first, again, other = (long_tailed(whole, 20, 60, seed) for seed in (0, 0, 1))
    assert first.class_counts.tolist() == tail_counts(whole.class_counts.tolist(), 20, 60)
    assert first.val is whole.val and first.test is whole.test
    assert first.fingerprint == again.fingerprint != other.fingerprint
    known = {image.numpy().tobytes() for image in whole.train.images}
    assert all(image.numpy().tobytes() in known for image in first.train.images)
    assert first.slug != whole.slug and len(first.train) < len(whole.train)


def test_groups_are_thirds_of_the_classes():
    assert groups([5, 50, 20, 1, 9, 3]) == {"many": [1, 2], "medium": [4, 0], "few": [5, 3]}
    assert groups([1, 2, 3, 4]) == {"many": [3], "medium": [2, 1], "few": [0]}
    assert groups([4, 9]) == {"many": [1], "medium": [], "few": [0]}


def test_accuracies_of_groups():
    found = per_group([[1.0, 0.5, 0.0], [None, 0.25, 1.0]], [3, 9, 1])
    assert found["many"] == [0.5, 0.25] and found["few"] == [0.0, 1.0]
    assert found["medium"][0] == 1.0 and np.isnan(found["medium"][1])
    empty = per_group([[0.1, 0.2]], [3, 2])["medium"]
    assert np.isnan(empty).all() and torch.tensor(empty).shape == (1,)
