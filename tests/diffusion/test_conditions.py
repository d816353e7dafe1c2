"""What images are told: parts, repetitions and sequences of it, each image keeping its own."""

import pytest
import torch

from sdgen_lib.diffusion.conditions import Condition, ContextTable


def condition_of(count, embedding=True, first=0.0):
    """Image i is told the number first + i, everywhere."""
    numbers = first + torch.arange(float(count))
    return Condition(numbers.view(-1, 1, 1).expand(-1, 2, 3), numbers.view(-1, 1).expand(-1, 5) if embedding else None)


def told(condition):
    """The numbers of the images; the context and the embedding have to agree."""
    numbers = condition.context.flatten(1)
    assert (numbers == numbers[:, :1]).all() and len(condition) == len(numbers)
    if condition.embedding is not None:
        assert torch.equal(condition.embedding, numbers[:, :1].expand(-1, 5))
    return numbers[:, 0].tolist()


@pytest.mark.parametrize("embedding", [True, False])
def test_rows(embedding):
    whole = condition_of(5, embedding)
    assert told(whole[1:3]) == [1, 2] and told(whole[torch.tensor([4, 0, 4])]) == [4, 0, 4]
    assert told(whole[whole.context[:, 0, 0] > 2]) == [3, 4]
    assert (whole[1:3].embedding is None) == (not embedding)


@pytest.mark.parametrize("embedding", [True, False])
def test_one_for_many_and_one_after_the_other(embedding):
    one = condition_of(1, embedding, first=7.0)
    assert told(one.expand(3)) == [7, 7, 7]
    assert told(one.expand(2).followed_by(condition_of(3, embedding))) == [7, 7, 0, 1, 2]
    assert (one.expand(3).embedding is None) == (not embedding)


def test_an_embedding_is_never_left_out():
    with pytest.raises(ValueError, match="One condition has an embedding and the other has none"):
        condition_of(2).followed_by(condition_of(2, embedding=False))
    with pytest.raises(ValueError, match="One condition has an embedding"):
        condition_of(2, embedding=False).followed_by(condition_of(2))


def test_a_table_tells_each_label_its_context():
    contexts, empty = torch.randn(3, 2, 4), torch.randn(2, 4)
    table = ContextTable(contexts, empty)
    found = table(torch.tensor([2, 0, 2]), torch.tensor([5, 6, 7]), 1)
    assert torch.equal(found.context, torch.stack([contexts[2], contexts[0], contexts[2]])) and found.embedding is None
    assert torch.equal(table(torch.tensor([1])).context[0], contexts[1])
    assert torch.equal(table.unconditional().context, empty[None]) and len(table.unconditional()) == 1
