"""Pictures and the table of shifted test sets, against what they are drawn from."""

import numpy as np
import pytest
import torch

from sdgen_lib.data import Split
from sdgen_lib.data.shifts import CORRUPTIONS, corrupted
from sdgen_lib.show import shift_figures, tables

from .made import drawn

REAL = {
    "test": [0.9, 0.8],
    "calibration": [0.05, 0.07],
    "tests": {
        "jpeg 1": {"accuracy": [0.8, 0.8]},
        "jpeg 5": {"accuracy": [0.4, 0.6]},
        "contrast 5": {"accuracy": [0.2, 0.0]},
        "usps": {"accuracy": [0.5, 0.1]},
    },
    "attacks": {"FGSM 2/255": [0.3, 0.3]},
}
OLDER = {"test": [0.7], "tests": {"jpeg 1": {"accuracy": [0.5]}}}


def some():
    numbers = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (4, 3, 16, 16), generator=numbers, dtype=torch.uint8)
    return Split(images, torch.arange(4))


def test_each_row_is_a_corruption_of_one_image():
    split, names = some(), ["gaussian_noise", "contrast"]
    figure = drawn(shift_figures.examples(split, names, 3, row=2, seed=5))
    shown = [ax.images[0].get_array() for ax in figure.axes]
    assert len(shown) == 8
    for row, name in enumerate(names):
        assert np.array_equal(shown[4 * row], split.images[2].permute(1, 2, 0))
        for severity in (1, 2, 3):
            expected = corrupted(split, name, severity, 5).images[2].permute(1, 2, 0)
            assert np.array_equal(shown[4 * row + severity], expected)
    assert [ax.get_title() for ax in figure.axes[:4]] == ["clean", "1", "2", "3"]
    assert [figure.axes[k].get_ylabel() for k in (0, 4)] == ["gaussian noise", "contrast"]
    assert len(shift_figures.examples(split).axes) == 6 * len(CORRUPTIONS)


def test_what_cannot_be_shown_is_named():
    with pytest.raises(ValueError, match="Unknown corruption 'jpg'"):
        shift_figures.examples(some(), ["jpg"])
    with pytest.raises(ValueError, match="severity is 7"):
        shift_figures.examples(some(), severity=7)
    with pytest.raises(ValueError, match="The row 'far' has no corrupted test set: make it with elsewhere_row"):
        shift_figures.by_severity({"far": {"test": [0.9], "tests": {"usps": {"accuracy": [0.9]}}}})


def test_accuracy_against_severity():
    figure = drawn(shift_figures.by_severity({"real": REAL, "$x^$\n": OLDER}))
    (ax,) = figure.axes
    first, second = ax.lines
    np.testing.assert_allclose(first.get_xydata(), [[0, 0.85], [1, 0.8], [5, 0.3]])
    np.testing.assert_allclose(second.get_xydata(), [[0, 0.7], [1, 0.5]])
    (band,) = ax.collections  # a single classifier has none
    ends = band.get_paths()[0].get_extents()
    reach = np.std([0.9, 0.8], ddof=1)
    np.testing.assert_allclose([ends.y0, ends.y1], [0.3, 0.85 + reach])  # at severity 5 both have 30 %
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["real", "$x^$\N{REPLACEMENT CHARACTER}"]
    assert "st. dev. of 1 or 2 classifiers" in ax.get_title()
    assert "band" not in shift_figures.by_severity({"one": OLDER}).axes[0].get_title()


def test_the_table_has_a_line_for_each_row():
    table = tables.elsewhere_table({"real": REAL, "older": OLDER})
    assert list(table.index) == ["real", "older"]
    # jpeg 60 and 70; contrast 20 and 0; of both 40 and 35, so 50 and 45 less
    assert table.loc["real"].to_dict() == {
        "accuracy %, mean ± st. dev. of its classifiers": "85.0 ± 7.1",
        "contrast %": "10.0 ± 14.1",
        "jpeg %": "65.0 ± 7.1",
        "usps %": "30.0 ± 28.3",
        "drop, corruptions": "47.5 ± 3.5",
        "drop, usps": "55.0 ± 21.2",
        "calibration error %": "6.0 ± 1.4",
        "FGSM 2/255 %": "30.0 ± 0.0",
    }
    assert table.loc["older"].tolist() == ["70.0", "", "50.0", "", "20.0", "", "", ""]
    assert len(tables.elsewhere_table({})) == 0
    unknown = tables.elsewhere_table({"x": OLDER | {"calibration": [None]}})
    assert unknown.loc["x", "calibration error %"] == ""
