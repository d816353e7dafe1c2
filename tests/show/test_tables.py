"""Tables and their figures against numbers worked out by hand; the costs against counts worked out by hand."""

import re
import types
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import strange_names
from scipy import stats

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
    assert table.loc["CAS %"].tolist() == ["55.0 ± 7.1", "70.0 ± 0.0"]
    assert table.loc["IS"].tolist() == [50, 12] and table.loc["UGS"].tolist() == [7.5, 1.23]
    assert table.loc["epochs"].tolist() == ["24/-", "20/7"]
    assert table.loc["images"].tolist() == [500, 500] and table.loc["generation s"].tolist() == [12.3, 12.3]


def test_table_2():
    table = tables.table_2(course_with(table_2=TABLE_2))
    # 71, 73, 78: mean 74, deviations -3, -1, 4, squares 9 + 1 + 16 = 26, / 2 = 13, root 3.6. One classifier: no spread.
    assert table.loc["accuracy %"].to_dict() == {"real": "90.0", "x1": "74.0 ± 3.6", "x2": "80.0 ± 0.0"}
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


def test_what_has_to_be_known_to_judge_an_accuracy_stands_below_it():
    """Nine in ten of class 0, all taken for it: 90 % of the images, half of the classes."""
    rows = {
        "after 1": cas_row(POINT, [0.9, 0.9], balanced_test=[0.5, 0.52], largest_class=0.9),
        "after 2": cas_row(POINT, [0.7, 0.7], largest_class=0.9),
    }
    table = tables.cas_table(rows, "digits")
    known = ["standard error by the test images", "balanced CAS %", "always the largest class %"]
    assert list(table.index[:4]) == ["CAS %", *known]
    assert table.loc["balanced CAS %"].tolist() == ["51.0 ± 1.4", "70.0 ± 0.0"]
    assert table.loc["always the largest class %"].tolist() == ["90.0", "90.0"]
    # 362 of 404: root of 0.896 * 0.104 / 404; 282 of 404: root of 0.698 * 0.302 / 404
    assert table.loc["standard error by the test images"].tolist() == ["1.5", "2.3"]
    table = tables.scaling_table({"real": scaling_row([0.9], 10)}, "digits")
    assert {name.replace("CAS", "accuracy") for name in known} <= set(table.index)
    older = {"real": {"test": [0.9], "num_images": 10}}  # a row that says less
    assert list(tables.scaling_table(older, "digits").index) == ["accuracy %", "training images"]


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
    mean, low, high, verdict = tables.compared([0.9], [0.8])
    assert mean == pytest.approx(10) and np.isnan([low, high]).all() and verdict == "a single pair cannot tell"


def test_a_row_below_an_answer_that_looks_at_nothing_is_told_in_words():
    rows = {
        "real": scaling_row([0.54, 0.55], 1080) | {"largest_class": 0.435, "balanced_test": [0.4, 0.41]},
        "x1": scaling_row([0.33, 0.35], 1080) | {"largest_class": 0.435, "balanced_test": [0.25, 0.25]},
        "x2": scaling_row([0.44, 0.44], 1080) | {"largest_class": 0.435, "balanced_test": [0.1, 0.1]},
    }
    first, second = tables.taught_too_little(rows)
    assert first.startswith("x1: 34.0% is below the 43.5% of always answering the largest class")
    assert second == "x2: the balanced accuracy, 10.0%, is no better than chance, 10.0%."
    assert tables.taught_too_little({"real": {"test": [0.1]}}) == []  # a row that says nothing of the classes


def test_without_rows_the_tables_are_empty_and_the_figures_say_so():
    course = course_with()
    assert len(tables.table_1(course)) == 0 and len(tables.table_2(course)) == 0
    with pytest.raises(ValueError, match=r"Table 1 has no rows yet: course.cas\(row\)"):
        tables.steps_figure(course)
    with pytest.raises(ValueError, match=r"Table 2 has no rows yet: course.scaling\(\)"):
        tables.scaling_figure(course)


def test_figures_of_the_tables():
    course = course_with(TABLE_1, TABLE_2)
    figure = drawn(tables.steps_figure(course))
    (ax,) = figure.axes
    points, _, _ = ax.containers[0].lines
    np.testing.assert_allclose(np.asarray(points.get_ydata(), float), [0.55, 0.7])
    levels = {line.get_label(): line.get_ydata()[0] for line in ax.lines}
    assert levels["chance"] == 0.1 and levels["always the largest class"] == 0.3
    dots = [tuple(map(tuple, c.get_offsets())) for c in ax.collections[:2]]
    assert dots == [((0, 0.5), (0, 0.6)), ((1, 0.7), (1, 0.7))]
    assert ax.get_ylim()[1] < 0.9  # no half of the picture is empty
    figure = drawn(tables.scaling_figure(course))
    line, caps, _ = figure.axes[0].containers[0].lines
    np.testing.assert_allclose(np.asarray(line.get_ydata(), float), [0.74, 0.8])
    assert line.get_linestyle() == "None"  # x1 and x2 are no points of a curve
    ends = np.array([cap.get_ydata() for cap in caps], float)
    spread = np.sqrt(13) / 100  # see `test_table_2`
    np.testing.assert_allclose(ends, [[0.74 - spread, 0.8], [0.74 + spread, 0.8]])
    drawn(tables.scaling_figure(course_with(table_2={"x1": TABLE_2["x1"]})))  # the real row is not there yet


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
    # 18 trials and 3 rescored ones of 400 images, IS 8..16, and 50 of 4000, IS 5..50; guidance doubles a pass.
    assert images_by_kind(demo[1])["unet", 200, 0] == 2 * 12 * (18 + 3) * 400
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
