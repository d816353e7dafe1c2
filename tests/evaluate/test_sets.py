"""Which blocks a synthetic set is made of."""

import types

import pytest
import torch

from sdgen_lib.evaluate.sets import APART, blocks_of, records


def workspace(larger_sets):
    return types.SimpleNamespace(settings=types.SimpleNamespace(larger_sets=larger_sets, max_multiple=3))


def test_nested_sets_are_prefixes_and_random_ones_come_from_all_blocks():
    assert [blocks_of(workspace("nested"), k) for k in (1, 2, 5)] == [[1], [1, 2], [1, 2, 3, 4, 5]]
    assert [blocks_of(workspace("random"), k) for k in (1, 2, 3)] == [[APART], [1, 2, 3], [1, 2, 3]]


def test_a_random_set_is_never_smaller_than_was_asked_for():
    with pytest.raises(ValueError, match="x4 needs max_multiple=4; it is 3"):
        blocks_of(workspace("random"), 4)


@pytest.mark.parametrize("larger_sets", ["nested", "random"])
@pytest.mark.parametrize("multiple", [0, -1])
def test_a_set_is_at_least_as_large_as_the_real_one(larger_sets, multiple):
    with pytest.raises(ValueError, match="1 or more times the real one"):
        blocks_of(workspace(larger_sets), multiple)


def test_a_record_names_the_real_images_where_the_generator_is_told_of_some():
    labels = torch.tensor([0, 1, 1])
    plain = records(types.SimpleNamespace(conditioner=object()), labels, 0, 30)
    assert list(plain) == ["label", "index"] and plain["index"].tolist() == [30, 31, 32]
    told = types.SimpleNamespace(real_rows=lambda labels, indices, seed: torch.stack([indices + seed, labels], dim=1))
    found = records(types.SimpleNamespace(conditioner=told), labels, 7, 30)
    assert found["real_image"].tolist() == [37, 38, 39] and found["second_real_image"].tolist() == [0, 1, 1]
