"""Pictures of mixtures and filters, on rows and images whose right picture is known."""

import numpy as np
import pandas as pd
import pytest
import torch

from sdgen_lib.data import Split
from sdgen_lib.show import mixing_figures

ROWS = {
    ("20", "real"): {"test": [0.50, 0.52]},
    ("20", "both"): {"test": [0.58, 0.64]},
    ("80", "real"): {"test": [0.80, 0.81]},
    ("80", "both"): {"test": [0.76, 0.79]},
}


def test_gains_are_paired_differences_and_their_crossing_lies_between():
    table = mixing_figures.gains(ROWS)
    pd.testing.assert_series_equal(table["gain"], pd.Series([10.0, -3.0], index=[20, 80], name="gain"))
    assert table["low"][20] == pytest.approx(10 - 12.706 * 2, abs=0.01)  # Student's with one degree of freedom
    at = mixing_figures.crossings(ROWS)
    assert at["gain"] == pytest.approx(20 * 4 ** (10 / 13)) and at["low"] == 20 and at["high"] == float("inf")
    line = mixing_figures.gain_figure(ROWS).axes[0].lines[0]
    assert line.get_xdata().tolist() == [20, 80] and np.allclose(line.get_ydata(), [10, -3])


def test_extremes_are_a_classs_lowest_and_highest():
    images = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).expand(-1, 3, 2, 2).contiguous()
    split = Split(images, torch.tensor([0, 1, 0, 1, 0, 2]))
    figure = mixing_figures.extremes(split, torch.tensor([0.9, 0.1, 0.5, 0.8, 0.2, 0.3]), ["a", "b", "c"], "x", count=1)
    shown = [[int(ax.images[0].get_array()[0, 0, 0]) for ax in row if ax.images] for row in _rows(figure, 3)]
    assert shown == [[4, 0], [1, 3], [5, 5]] or shown[:2] == [[4, 0], [1, 3]]
    many = Split(images[:1].repeat(20, 1, 1, 1), torch.arange(20))
    assert len(mixing_figures.extremes(many, torch.zeros(20), [str(k) for k in range(20)], "x").axes) <= 24


def _rows(figure, count):
    axes = np.array(figure.axes).reshape(count, -1)
    return [[ax for ax in row if hasattr(ax, "images")] for row in axes]


def test_each_filter_is_a_point_and_a_name():
    rows = {"no filter": {"test": [0.5, 0.6]}, "confidence:0.5": {"test": [0.7]}}
    ax = mixing_figures.filter_figure(rows, {"no filter": 0.3, "confidence:0.5": 0.2}).axes[0]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == list(rows)
    assert [container[0].get_xydata().tolist() for container in ax.containers] == [[[0.3, 0.55]], [[0.2, 0.7]]]
