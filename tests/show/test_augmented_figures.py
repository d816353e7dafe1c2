"""Pictures of augmented conditioning on the smallest run: how many pictures there are, and of what."""

import numpy as np
import pytest
import torch

from sdgen_lib.config.settings import AUGMENTED
from sdgen_lib.course import Course
from sdgen_lib.show import augmented_figures, tables


@pytest.fixture(scope="module")
def method(tmp_path_factory, micro):
    given = dict(augmented_images=20, augmented_steps=2, augmented_text="prompt")
    return Course(micro(tmp_path_factory.mktemp("augmented"), **given)).augmented


def pictures(figure):
    return [ax.images[0].get_array() for ax in figure.axes if ax.images]


def test_the_wall_has_a_row_for_each_conditioning(method):
    figure = augmented_figures.wall(method, [0, 1], count=3)
    found = pictures(figure)
    assert len(found) == 3 * (2 + len(AUGMENTED))
    real = method.ws.data.train.images[0].permute(1, 2, 0).numpy()
    assert np.array_equal(found[0], real) and (np.asarray(found[2]) == 255).all()


def test_all_dropped_is_no_image(method):
    """Of p = 1 nothing is left of the embedding: two images of a class give the same drawings."""
    labels = method.ws.data.train.labels
    first, second = (labels == 0).nonzero()[:2, 0].tolist()
    one, other = (
        augmented_figures.drawn(
            method,
            method.conditioner("random image + dropout", dropout=1.0, real=method.ws.data.train.take([row])),
            0,
            2,
        )
        for row in (first, second)
    )
    assert torch.equal(one, other)


def test_an_image_is_its_own_nearest_neighbour(method):
    found = pictures(augmented_figures.neighbours(method, method.ws.data.train, [3, 4], count=2))
    assert len(found) == 2 * 3 and np.array_equal(found[0], found[1]) and np.array_equal(found[3], found[4])


def test_a_map_has_a_dot_for_each_image(method):
    ax = augmented_figures.embedding_map(method, method.ws.data.train).axes[0]
    assert sum(len(dots.get_offsets()) for dots in ax.collections) == 20


def test_bars_of_a_tail(method):
    ax = augmented_figures.tail_bars(["a", "b", "c"], [2, 9, 5]).axes[0]
    assert [bar.get_height() for bar in ax.patches] == [9, 5, 2]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["b", "c", "a"]


def test_the_slider_picks_a_row(method):
    slider = augmented_figures.DropoutSlider(method, 0, count=2)
    assert len(slider.way) == 11
    slider.p.value = 1.0
    assert "100%" in slider.words.value or "100%" in str(slider.words)


def test_the_table_of_a_tail():
    row = {"test": [0.5], "num_images": 12, "steps": [7], "balanced_test": [0.5, 0.7]}
    row |= {"per_class": [[1.0, 0.5, 0.0], [1.0, 0.5, 0.6]]}
    table = tables.tail_table({"real": row, "filled": row | {"balanced_test": [0.6, 0.8]}}, [9, 3, 1])
    assert table.loc["real", "many %"] == "100.0" and table.loc["real", "few %"] == "30.0"
    assert table.loc["filled", "minus real"].startswith("+10.0") and table.loc["real", "minus real"] == ""
