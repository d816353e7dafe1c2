"""Filters: what they keep, and that a set after one is a result of its own."""

import dataclasses

import pytest
import torch

from sdgen_lib.evaluate import quality, worth
from sdgen_lib.evaluate.filters import Filter, filtered
from sdgen_lib.evaluate.sets import synthetic

LABELS = torch.tensor([0, 0, 0, 0, 1, 1, 2])
SCORES = {"confidence": torch.tensor([0.9, 0.1, 0.5, 0.2, 0.8, 0.7, 0.3])}


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("confidence:0.5", [0, 2, 4, 6]),
        ("confidence:0.5:worst", [1, 3, 5, 6]),
        ("confidence:0.01", [0, 4, 6]),  # at least one of each class
        ("confidence:1", [0, 1, 2, 3, 4, 5, 6]),
    ],
)
def test_the_best_share_of_each_class_is_kept_in_order(text, kept):
    assert Filter.parse(text).rows(SCORES, LABELS).tolist() == kept


def test_equal_scores_are_kept_in_the_sets_order_and_nan_is_the_last():
    same = {"density": torch.tensor([0.0, 0, 0, 0, float("nan"), 1.0, 0])}
    assert Filter("density", 0.5).rows(same, LABELS).tolist() == [0, 1, 5, 6]


def test_so_many_of_each_class_are_kept_where_more_were_drawn():
    found = Filter("confidence", 0.5, redraw=True).rows(SCORES, LABELS, most=torch.tensor([3, 1, 1]))
    assert found.tolist() == [0, 2, 3, 4, 6]


def test_what_is_kept_of_what_is_looked_at_is_the_share():
    """Whole blocks are drawn, of which a filter may need a part: the rest is not looked at."""
    kept, labels = Filter("confidence", 0.8, redraw=True), torch.zeros(20, dtype=torch.int64)
    assert kept.drawn(1) == 2 and Filter("random", 0.7, redraw=True).drawn(21) == 30
    falling = {"confidence": torch.arange(20.0).flip(0)}
    assert kept.rows(falling, labels, most=torch.tensor([8])).tolist() == list(range(8))
    rising = {"confidence": torch.arange(20.0)}
    assert kept.rows(rising, labels, most=torch.tensor([8])).tolist() == list(range(2, 10))


def test_the_control_looks_at_nothing_and_can_be_repeated():
    control, labels = Filter("random", 0.5), torch.zeros(200, dtype=torch.int64)
    first = control.rows({}, labels, seed=1)
    assert len(first) == 100 and torch.equal(first, control.rows({}, labels, seed=1))
    assert not torch.equal(first, control.rows({}, labels, seed=2))
    assert 60 < float(first.float().mean()) < 140


@pytest.mark.parametrize(
    "text",
    ["confidence:0.5", "nearness:0.25:redraw", "random:1:redraw:worst", "density:0.1:worst", "density:0.12345678"],
)
def test_a_filter_is_its_text(text):
    assert str(Filter.parse(text)) == text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("confidence", "'confidence' is no filter.*as in confidence:0.5"),
        ("confidence:half", "is no filter"),
        ("confidence:0.5:redrew", "is no filter.*redraw or worst"),
        ("confidance:0.5", "Unknown score 'confidance'.*confidence"),
        ("confidence:0", "from 0.001 to 1.*not 0"),
        ("confidence:nan", "from 0.001 to 1.*not nan"),
        ("confidence:1.5", "not 1.5"),
        ("", "is no filter"),
    ],
)
def test_a_wrong_filter_says_what_is_allowed(text, words):
    with pytest.raises(ValueError, match=words):
        Filter.parse(text)


def test_a_filtered_set_is_the_best_of_what_was_drawn(small, tmp_path):
    course = small(tmp_path)
    ws, source = course.workspace, course.source("after 1")
    dropped = filtered(ws, source, 2, Filter("nearness", 0.5))
    pool, scores = synthetic(ws, source, 2), quality.scores_of(ws, source, [1, 2])["nearness"]
    for label in (0, 1):
        own = pool.labels == label
        best = scores[own].topk(int(own.sum()) // 2).indices.sort().values
        assert torch.equal(dropped.images[dropped.labels == label], pool.images[own][best])
    redrawn = filtered(ws, source, 1, Filter("nearness", 0.5, redraw=True))
    assert torch.equal(redrawn.images, dropped.images) and len(redrawn) == len(ws.data.train)


def test_a_filtered_row_is_another_result_and_says_its_images(small, tmp_path):
    course = small(tmp_path)
    ws, source = course.workspace, course.source("after 1")
    plain = worth.worth_step(ws, source, "both")
    kept = [Filter("confidence", 0.5), Filter("confidence", 0.5, redraw=True), Filter("density", 0.5)]
    steps = [worth.worth_step(ws, source, "both", kept=each) for each in kept]
    assert len({ws.run.fingerprint(step) for step in (plain, *steps)}) == 4
    rows = [dict(ws.run.result(step).facts) for step in steps]
    n = len(ws.data.train)
    half = 2 * round(0.5 * (n // 2))  # of each of two classes
    assert [row["num_images"] for row in rows] == [n + half, 2 * n, n + half]
    assert len({row["steps"][0] for row in rows}) == 1
    assert dataclasses.asdict(kept[1]) == steps[1].inputs["kept"] and "kept" not in plain.inputs
    real = [worth.worth_step(ws, None, "real", kept=each) for each in (None, kept[0])]
    assert ws.run.fingerprint(real[0]) == ws.run.fingerprint(real[1])  # there is nothing to filter


def test_random_parts_cannot_be_filtered(small, tmp_path):
    course = small(tmp_path, larger_sets="random")
    with pytest.raises(ValueError, match="larger_sets='nested'"):
        filtered(course.workspace, course.source("after 1"), 1, Filter("nearness", 0.5))
