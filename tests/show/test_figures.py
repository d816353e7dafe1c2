"""Pages of images and confusion matrices: what stands where."""

import numpy as np
import pytest
import torch

from sdgen_lib.data import Split
from sdgen_lib.show import figures

from .made import drawn


def split(classes, per_class):
    labels = torch.arange(classes).repeat(per_class)
    images = (labels.view(-1, 1, 1, 1) * 20).expand(-1, 3, 8, 8).to(torch.uint8)
    return Split(images, labels)


@pytest.mark.parametrize("classes", [2, 10, 12])
def test_pages_of_images(classes):
    names, part = [f"class {c}" for c in range(classes)], split(classes, 5)
    figure = drawn(figures.by_class(part.images, part.labels, names, per_class=4, title="a title"))
    rows = min(classes, 10)
    assert len(figure.axes) == 4 * rows
    for c in range(rows):
        axes = figure.axes[4 * c : 4 * c + 4]
        assert axes[0].get_ylabel() == names[c]
        assert all((ax.images[0].get_array() == 20 * c).all() for ax in axes)
    both = drawn(figures.real_beside_synthetic(part, split(classes, 3), names, per_class=6))
    assert len(both.axes) == rows * (6 + 1 + 3)
    assert (both.axes[5].images[0].get_array() == 255).all()  # class 0 has five real images; then comes the gap


def test_one_row_and_one_picture():
    images = torch.zeros(3, 3, 8, 8, dtype=torch.uint8)
    assert len(drawn(figures.image_grid([images], ["noise"], ["a", "b", "c"])).axes) == 3
    assert len(drawn(figures.image_grid([images[:1]], ["noise"])).axes) == 1


def test_confusions():
    matrix = np.array([[3, 1], [0, 2]])
    (ax,) = drawn(figures.confusions({"a title": matrix}, ["cat", "dog"])).axes
    found = {text.get_position(): text.get_text() for text in ax.texts}
    assert found == {(0, 0): "3", (1, 0): "1", (1, 1): "2"}  # (predicted, true); no 0 is written
    np.testing.assert_allclose(ax.images[0].get_array(), [[0.75, 0.25], [0, 1]])
    assert (ax.get_title(), ax.get_xlabel(), ax.get_ylabel()) == ("a title", "predicted class", "true class")


@pytest.mark.parametrize("name", ["$5 to $10", r"$\frac$", "a_b^{c}"])
def test_a_class_name_is_no_formula(name):
    """matplotlib reads what stands between two dollars as TeX, and stops at what is none."""
    images, names = torch.zeros(2, 3, 8, 8, dtype=torch.uint8), [name, "other"]
    grid = drawn(figures.image_grid([images, images], names, names, title=name))
    assert grid.axes[0].get_title() == grid.axes[0].get_ylabel() == grid.get_suptitle() == name
    drawn(figures.confusions({name: np.eye(2, dtype=int)}, names))
    drawn(figures.by_class(images, torch.tensor([0, 1]), names))
