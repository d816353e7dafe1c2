"""Tables and their figures against numbers worked out by hand; the costs against counts worked out by hand."""

import re
import types
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import strange_names
import torch
from matplotlib.collections import PathCollection
from matplotlib.patches import Rectangle
from scipy import stats

from sdgen_lib.classify import Score
from sdgen_lib.config import settings
from sdgen_lib.course import Course
from sdgen_lib.show import tables

from .made import POINT, TABLE_1, TABLE_2, cas_row, drawn, scaling_row


def course_with(table_1=None, table_2=None, dataset="cifar10"):
    """Stands for a course whose run has these rows."""
    return types.SimpleNamespace(
        rows_made={1: table_1 or {}, 2: table_2 or {}}.get,
        settings=settings.resolve(dataset=dataset),
        data=types.SimpleNamespace(num_classes=10),
    )


def test_percent():
    assert tables.percent([0.941]) == "94.1"
    assert tables.percent([0.5, 0.6]) == "55.0 ± 7.1"  # with n - 1: sqrt(2 * 25)


def test_table_1():
    table = tables.table_1(course_with(TABLE_1))
    assert list(table.columns) == ["after 1", "after 4"]
    assert table.loc["CAS %, mean ± st. dev. of its classifiers"].tolist() == ["55.0 ± 7.1", "70.0 ± 0.0"]
    assert table.loc["IS"].tolist() == [50, 12] and table.loc["UGS"].tolist() == [7.5, 1.23]
    assert table.loc["epochs"].tolist() == ["24/-", "20/7"]
    assert table.loc["images"].tolist() == [500, 500] and table.loc["generation s"].tolist() == [12.3, 12.3]


def test_table_2():
    table = tables.table_2(course_with(table_2=TABLE_2))
    # 71, 73, 78: mean 74, deviations -3, -1, 4, squares 9 + 1 + 16 = 26, / 2 = 13, root 3.6. One classifier: no spread.
    found = table.loc["accuracy %, mean ± st. dev. of its classifiers"].to_dict()
    assert found == {"real": "90.0", "x1": "74.0 ± 3.6", "x2": "80.0 ± 0.0"}
    assert table.loc["training images"].to_dict() == {"real": 1000, "x1": 1000, "x2": 2000}


def test_published_numbers_stand_in_a_row_marked_as_published():
    for table, expected in (
        (tables.cas_table(TABLE_1, "cifar10:500"), {"after 1": 39.52, "after 4": 59.30}),
        (tables.scaling_table(TABLE_2, "cifar10:500"), {"real": 83.26, "x1": 79.09, "x2": 81.49}),
    ):
        marked = [name for name in table.index if "published" in name]
        assert len(marked) == 1 and marked[0].startswith("published") and "CIFAR10" in marked[0]
        assert table.loc[marked[0]].to_dict() == expected
        others = table.drop(index=marked).to_string()
        assert not any(f"{value:.2f}" in others for value in expected.values())


def test_without_a_published_row_there_is_none():
    for table in (tables.cas_table(TABLE_1, "digits"), tables.scaling_table(TABLE_2, "digits")):
        assert len(table) >= 2 and not any("published" in name for name in table.index)


def test_selection_on_the_test_set_is_marked():
    assert "TEST" not in tables.cas_table(TABLE_1, "cifar10").to_string()
    on_test = {name: row | {"select_on": "test"} for name, row in TABLE_1.items()}
    marked = tables.cas_table(on_test, "pathmnist")
    assert any(name.startswith("CAS %") and "TEST" in name for name in marked.index)
    assert not any(name.startswith("published") and "TEST" in name for name in marked.index)
    sets = {name: row | ({} if name == "real" else {"select_on": "test"}) for name, row in TABLE_2.items()}
    assert "TEST" in tables.scaling_table(sets, "digits").index[0]
    assert "TEST" not in tables.scaling_table(TABLE_2, "digits").to_string()


def test_what_has_to_be_known_to_judge_an_accuracy_stands_below_it():
    """Nine in ten of class 0, all taken for it: 90 % of the images, half of the classes."""
    rows = {
        "after 1": cas_row(POINT, [0.9, 0.9], balanced_test=[0.5, 0.52], largest_class=0.9),
        "after 2": cas_row(POINT, [0.7, 0.7], largest_class=0.9),
    }
    table = tables.cas_table(rows, "digits")
    over, error = "mean ± st. dev. of its classifiers", "standard error by the test images, points"
    known = [f"CAS %, {over}", error, f"balanced CAS %, {over}", "always the largest class %"]
    assert list(table.index[:4]) == known
    assert table.loc[f"balanced CAS %, {over}"].tolist() == ["51.0 ± 1.4", "70.0 ± 0.0"]
    assert table.loc["always the largest class %"].tolist() == ["90.0", "90.0"]
    # 362 of 404: root of 0.896 * 0.104 / 404; 282 of 404: root of 0.698 * 0.302 / 404
    assert table.loc[error].tolist() == ["1.5", "2.3"]
    older = {
        "test": [0.9],
        "num_images": 10,
    }  # a row that says less: its cells are empty, and the others' stay in place
    for rows in ({"real": older}, {"real": older, "x1": scaling_row([0.9], 10)}):
        table = tables.scaling_table(rows, "digits")
        assert list(table.index) == [*(name.replace("CAS", "accuracy") for name in known), "training images"]
        assert table["real"].tolist() == ["90.0", "", "", "", 10]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 1.0])
def test_the_standard_error_covers_the_truth_as_often_as_it_should(share):
    """The interval of 1.96 of them around Agresti and Coull's share is 95 %; simulated, with a true share near it."""
    truth, count = min(max(share, 0.02), 0.98), 400
    right = np.random.default_rng(0).binomial(count, truth, 4000)
    errors = np.array([tables.standard_error(k / count, count) for k in right])
    inside = np.abs((right + 2) / (count + 4) - truth) < 1.96 * errors
    assert 0.93 < inside.mean() < 0.985


def test_compared_is_students_paired_test():
    """As scipy's own `ttest_rel`, by another way."""
    values, others = [0.91, 0.93, 0.92, 0.95], [0.89, 0.90, 0.90, 0.92]
    mean, low, high, verdict = tables.compared(values, others)
    interval = stats.ttest_rel(values, others).confidence_interval(0.95)
    np.testing.assert_allclose([low, high], [100 * interval.low, 100 * interval.high])
    assert mean == pytest.approx(2.5) and verdict == "better"
    assert tables.compared(others, values)[3] == "worse"
    assert tables.compared([0.9, 0.8], [0.8, 0.9])[3] == "no difference is shown"
    assert tables.compared([0.9, 0.9], [0.9, 0.9]) == (0, 0, 0, "no difference is shown")
    mean, low, high, verdict = tables.compared([0.9, 0.8], [0.89, 0.79])  # one image of 100 more, both times
    assert (
        mean == pytest.approx(1) and np.isnan([low, high]).all() and verdict == "equal in every pair, which cannot tell"
    )
    mean, low, high, verdict = tables.compared([0.9], [0.8])
    assert mean == pytest.approx(10) and np.isnan([low, high]).all() and verdict == "a single pair cannot tell"


@pytest.mark.parametrize(("values", "others"), [([0.9, 0.8, 0.7], [0.8]), ([0.9], [0.8, 0.7]), ([], [])])
def test_rows_without_pairs_are_not_compared(values, others):
    """One value would be broadcast against all, and the interval be one of unpaired numbers."""
    with pytest.raises(
        ValueError, match=f"have {len(values)} and {len(others)} classifiers.*the same classifier_seeds"
    ):
        tables.compared(values, others)


def test_the_set_is_chosen_by_validation_images():
    rows = {
        "real": scaling_row([0.9], 10) | {"val": [0.99]},
        "x1": scaling_row([0.6], 10) | {"val": [0.7, 0.8]},
        "x2": scaling_row([0.8], 10) | {"val": [0.9, 0.4]},
    }
    assert tables.chosen_set(rows) == "x1"
    assert tables.chosen_set({"real": rows["real"], "x1": {"test": [0.6]}}) is None  # an older row
    equal = {"x1": [0.75, 0.65, 0.7], "x2": [0.7, 0.7, 0.7], "x3": [0.65, 0.7, 0.75]}  # 0.7, but for rounding
    assert tables.chosen_set({name: {"val": val} for name, val in equal.items()}) == "x1"


def test_a_row_below_an_answer_that_looks_at_nothing_is_told_in_words():
    rows = {
        "real": scaling_row([0.54, 0.55], 1080) | {"largest_class": 0.435, "balanced_test": [0.4, 0.41]},
        "x1": scaling_row([0.33, 0.35], 1080) | {"largest_class": 0.435, "balanced_test": [0.25, 0.25]},
        "x2": scaling_row([0.44, 0.44], 1080) | {"largest_class": 0.435, "balanced_test": [0.1, 0.1]},
        "x3": scaling_row([0.44, 0.44], 1080) | {"largest_class": 0.435, "balanced_test": [0.1, 0.16]},
        "x4": scaling_row([0.44], 1080) | {"largest_class": 0.435, "balanced_test": [0.11]},
    }
    first, second, third = tables.taught_too_little(rows)
    assert first.startswith("x1: 34.0% is below the 43.5% of always answering the largest class")
    assert second == "x2: the balanced accuracy, 10.0 ± 0.0 %, is not above chance, 10.0%."
    # 10 and 16: mean 13, deviation root of 9 + 9 = 4.2
    assert third == "x3: the balanced accuracy, 13.0 ± 4.2 %, is not above chance, 10.0%, by more than its spread."
    skewed = {"x1": scaling_row([0.425], 60) | {"largest_class": 0.95, "balanced_test": [0.697], "num_classes": 2}}
    assert tables.taught_too_little(skewed) == [
        "x1: 42.5% is below the 95.0% of always answering the largest class. The balanced accuracy, 69.7 %, is above "
        "chance, 50.0%: what was learnt of the small classes costs more images of the largest one."
    ]
    older = {"real": {"test": [0.1], "balanced_test": [0.0], "largest_class": 0.1}}  # nothing of the number of classes
    assert tables.taught_too_little(older) == tables.taught_too_little({"real": {"test": [0.1]}}) == []
    labels = torch.tensor([0] * 70 + [1] * 10 + [2] * 20)
    same = Score.of(torch.zeros_like(labels), labels, 3)  # that very answer: as a float32, 0.7 is less than 0.7
    assert same.accuracy < 0.7
    answers = {"largest_class": 0.7, "balanced_test": [same.balanced_accuracy] * 3, "num_classes": 3}
    (only,) = tables.taught_too_little({"x1": scaling_row([same.accuracy] * 3, 10) | answers})
    assert only == "x1: the balanced accuracy, 33.3 ± 0.0 %, is not above chance, 33.3%."
    (real,) = tables.taught_too_little({"real": scaling_row([0.25], 10)})  # real images may be too few as well
    assert real.startswith("real: 25.0% is below the 30.0%")


def test_without_rows_the_tables_are_empty_and_the_figures_say_so():
    course = course_with()
    assert len(tables.table_1(course)) == 0 and len(tables.table_2(course)) == 0
    with pytest.raises(ValueError, match=r"Table 1 has no rows yet: course.cas\(row\)"):
        tables.steps_figure(course)
    with pytest.raises(ValueError, match=r"Table 2 has no rows yet: course.scaling\(\)"):
        tables.scaling_figure(course)


def levels_of(figure):
    """The accuracies of the lines, by what the legend calls them."""
    return {line.get_label(): line.get_ydata()[0] for line in figure.axes[0].lines}


def dots_of(figure):
    """Where the dots of single classifiers are, row by row."""
    scatters = [c for c in figure.axes[0].collections if isinstance(c, PathCollection)]
    return [[tuple(map(float, dot)) for dot in dots.get_offsets()] for dots in scatters]


def legend_of(figure):
    """What the legend says; it lies inside the figure and below the axes, their ticks and labels."""
    drawn(figure)
    (legend,) = figure.legends
    box, axes = legend.get_window_extent(), figure.axes[0].get_tightbbox()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.width and 0 <= box.y0 < box.y1 <= axes.y0
    return [text.get_text() for text in legend.get_texts()]


def test_the_figure_of_table_1():
    figure = tables.steps_figure(course_with(TABLE_1))
    (ax,) = figure.axes
    points, _, _ = ax.containers[0].lines
    np.testing.assert_allclose(np.asarray(points.get_ydata(), float), [0.55, 0.7])
    assert points.get_linestyle() == "None"
    assert dots_of(figure) == [[(0, 0.5), (0, 0.6)], [(1, 0.7), (1, 0.7)]]
    assert levels_of(figure)["chance: 10.0 %"] == 0.1 and levels_of(figure)["always the largest class: 30.0 %"] == 0.3
    assert set(legend_of(figure)) == {
        "generated images: each classifier",
        "generated images: mean ± st. dev. of 2 classifiers",
        "chance: 10.0 %",
        "always the largest class: 30.0 %",
    }
    low, high = ax.get_ylim()
    assert 0.03 < low < 0.1 and 0.7 < high < 0.76  # what is drawn and a margin, not 0 .. 100 %
    assert [label.get_text() for label in ax.get_xticklabels()] == ["after 1", "after 4"]


def test_the_figure_of_table_2():
    figure = tables.scaling_figure(course_with(table_2=TABLE_2))
    (ax,) = figure.axes
    line, caps, _ = ax.containers[0].lines
    np.testing.assert_allclose(np.asarray(line.get_ydata(), float), [0.74, 0.8])
    assert line.get_linestyle() == "None"  # x1 and x2 are no points of a curve
    ends = np.array([cap.get_ydata() for cap in caps], float)
    spread = np.sqrt(13) / 100  # see `test_table_2`
    np.testing.assert_allclose(ends, [[0.74 - spread, 0.8], [0.74 + spread, 0.8]])
    assert dots_of(figure) == [[(0, 0.71), (0, 0.73), (0, 0.78)], [(1, 0.8), (1, 0.8)]]
    said = legend_of(figure)
    assert {"real images: one classifier", "generated images: mean ± st. dev. of 2 or 3 classifiers"} < set(said)
    drawn(tables.scaling_figure(course_with(table_2={"x1": TABLE_2["x1"]})))  # the real row is not there yet
    drawn(tables.scaling_figure(course_with(table_2={"real": TABLE_2["real"]})))  # nor the others


def test_real_images_are_a_band_of_their_mean_and_deviation():
    figure = tables.scaling_figure(course_with(table_2={"real": scaling_row([0.8, 0.9], 9), "x1": TABLE_2["x1"]}))
    assert "real images: mean ± st. dev. of 2 classifiers" in legend_of(figure)
    (band,) = [patch for patch in figure.axes[0].patches if isinstance(patch, Rectangle)]
    reach = np.std([0.8, 0.9], ddof=1)
    np.testing.assert_allclose([band.get_y(), band.get_y() + band.get_height()], [0.85 - reach, 0.85 + reach])


def test_small_differences_are_seen_and_what_lies_far_below_them_is_named():
    """Of 96 and 98 % on an axis that goes down to the 10 % of the largest class nothing would be left."""
    rows = {"x1": scaling_row([0.96, 0.962], 9), "x2": scaling_row([0.978, 0.98], 9)}
    figure = tables.scaling_figure(course_with(table_2={k: row | {"largest_class": 0.1} for k, row in rows.items()}))
    low, high = figure.axes[0].get_ylim()
    assert 0.93 < low < 0.96 and 0.98 < high < 1
    assert "always the largest class: 10.0 % (below the axis)" in legend_of(figure)


def test_a_level_above_every_row_is_always_seen():
    """The very case that has to be seen: images that taught less than that answer."""
    rows = {"x1": scaling_row([0.1, 0.102], 9) | {"largest_class": 0.9}}
    figure = tables.scaling_figure(course_with(table_2=rows))
    low, high = figure.axes[0].get_ylim()
    assert low < 0.1 and 0.9 < high and "always the largest class: 90.0 %" in legend_of(figure)


@pytest.mark.parametrize("test", [[1.0, 1.0, 1.0], [0.0, 0.0], [1.0]])
def test_rows_without_a_difference_have_an_axis(test):
    figure = tables.steps_figure(course_with({"after 1": cas_row(POINT, test, largest_class=0.1)}))
    low, high = figure.axes[0].get_ylim()
    assert -0.03 < low < test[0] < high < 1.03 and high - low > 0.03
    assert any("st. dev." in text for text in legend_of(figure)) == (len(test) > 1)  # one classifier has no spread


# --- what it will cost ---

SMALL = {"dataset": "digits:100", "backbone": "tiny", "recipe": "demo", "precision": "fp32"}


@pytest.fixture
def counted(monkeypatch):
    """The works that `cost_table` asks the seconds of, in its order; each takes as many seconds as it has images."""
    works = []

    def seconds(backbone, work):
        works.append(work)
        return sum(work.values())

    monkeypatch.setattr(tables.cost, "seconds", seconds)
    return works


def images_by_kind(work):
    found = Counter()
    for kind, images in work.items():
        found[kind.kind, kind.batch, kind.pixels] += images
    return dict(found)


def test_the_papers_column_is_counted_at_the_papers_size_and_batch(counted, tmp_path):
    course = Course(settings.resolve(**SMALL, runs_dir=str(tmp_path), compile_unet="no"))
    n, held_out = len(course.data.train), len(course.data.val)
    assert (n, held_out, course.data.image_size) == (100, 202, 16)
    before = sorted(tmp_path.rglob("*"))
    table = tables.cost_table(course)
    assert sorted(tmp_path.rglob("*")) == before  # no folder of a paper's run
    assert list(table.columns) == ["this recipe", "-p recipe paper"]
    assert list(table.index) == ["1_transfer", "2_tune", "3_finetune", "4_retune", "5_datasets"]
    demo, paper = counted[:5], counted[5:]
    # 8 epochs of 1600 images at batch 32, against 50 of the training set at 64; after each, held-out losses:
    # three, of two noises.
    assert images_by_kind(demo[0])["context gradient", 32, 0] == 8 * 1600
    assert images_by_kind(paper[0])["context gradient", 64, 0] == 50 * n
    assert images_by_kind(paper[0])["unet", 202, 0] == 50 * 3 * 2 * held_out
    assert images_by_kind(demo[2])["weight gradient", 64, 0] == 6 * 10_000
    assert images_by_kind(paper[2])["weight gradient", 16, 0] == 10 * n
    # 14 trials of 400 images and 3 rescored ones of 800, IS 8..12, and 50 of 4000, IS 5..50; guidance doubles a pass.
    assert images_by_kind(demo[1])["unet", 200, 0] == 2 * 10 * (14 * 400 + 3 * 800)
    assert images_by_kind(paper[3])["decode", 128, 0] == 50 * 4000
    # What trains a classifier: 100 epochs at 32 pixels, batch 256, of 100 real images and of 100, 200, .. 1000.
    sizes = n + sum(k * n for k in range(1, 11))
    trained = {kind: images for kind, images in paper[4].items() if kind.kind.startswith("classifier")}
    assert {(kind.batch, kind.pixels) for kind in trained} == {(256, 32)} and sum(trained.values()) == 100 * sizes
    trained = {kind: images for kind, images in demo[4].items() if kind.kind.startswith("classifier")}
    assert {(kind.batch, kind.pixels) for kind in trained} == {(32, 16)}  # three side by side, at least 400 an epoch
    assert sum(trained.values()) == 3 * 24 * 4 * 400
    assert images_by_kind(paper[4])["decode", 128, 0] == 10 * n


def test_what_is_there_is_counted_too(counted, finished):
    """The chapter's table says what the course costs, not what is left of it."""
    again = Course(finished.course.settings)
    first = tables.cost_table(again)["this recipe"]
    assert images_by_kind(counted[0])["encode", 16, 16] == 302  # though the latents are there
    assert images_by_kind(counted[4])["decode", 200, 0] == 200
    assert all(re.fullmatch(r"[\d.]+ (s|min|h|days)", text) for text in first)


def test_costs_are_measured(micro, tmp_path):
    table = tables.cost_table(Course(micro(tmp_path)))
    assert all(re.fullmatch(r"[\d.]+ (s|min|h|days)", text) for text in table.to_numpy().flat)


def test_a_row_of_a_method_without_epochs():
    row = cas_row({"num_inference_steps": 2, "guidance_scale": 1.5}, [0.5])
    assert tables.cas_table({"toy": row}, "digits")["toy"].loc[["IS", "UGS", "epochs"]].tolist() == [2, 1.5, ""]


@pytest.mark.parametrize("styled", [False, True])
def test_a_notebooks_table_shows_names_as_text(styled):
    """As index, as columns and in cells; MathJax is told to leave it alone."""
    names = list(strange_names.ALL)
    table = pd.DataFrame([names] * len(names), index=names, columns=names)
    with pd.option_context("display.max_columns", None, "display.max_colwidth", None):
        style = table.style.format_index(escape="html").format_index(escape="html", axis=1)
        text = style.to_html() if styled else table._repr_html_()
    page = strange_names.Page(text)
    assert set(page.tags) <= {"div", "style", "table", "thead", "tbody", "tr", "th", "td", "p"}
    assert "mathjax_ignore" in text and "tex2jax_ignore" in text
    counts = Counter(cell.strip() for cell in page.cells)
    assert all(counts[name.strip()] >= len(names) + 2 for name in strange_names.SEEN)
