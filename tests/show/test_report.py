"""Tables against numbers worked out by hand; every figure draws."""

import io
import json
import warnings

import matplotlib.pyplot as plt
import numpy as np
import optuna
import pandas as pd
import pytest
import torch

from sdgen_lib import figures, paper, report
from sdgen_lib.data import Split

POINT = {"IS": 50, "UGS": 7.5, "transfer_epoch": 24, "finetune_epoch": None}
TUNED = {"IS": 12, "UGS": 1.23456, "transfer_epoch": 20, "finetune_epoch": 7}


def row(point, test, **changes):
    facts = {"point": point, "test": test, "val": test, "seconds": 12.34, "num_images": 500, "select_on": "val"}
    return {**facts, **changes}


@pytest.fixture
def folder(tmp_path):
    """``folder(dataset, **changes of a row)`` -> a run folder with both tables."""

    def make(dataset="cifar10", **changes):
        path = tmp_path / dataset / "tiny-demo-seed0"
        path.mkdir(parents=True)
        (path / "manifest.json").write_text(json.dumps({"settings": {"dataset": dataset}, "steps": {}}))
        (path / "table_1.json").write_text(json.dumps({
            "after 1": row(POINT, [0.5, 0.6], **changes), "after 4": row(TUNED, [0.7, 0.7], **changes),
        }))  # fmt: skip
        (path / "table_2.json").write_text(json.dumps({
            "real": {"point": None, "test": [0.9], "val": [0.9], "num_images": 1000},
            "x1": {"point": TUNED, "test": [0.71, 0.73, 0.78], "val": [0], "num_images": 1000},
            "x2": {"point": TUNED, "test": [0.8, 0.8], "val": [0], "num_images": 2000},
        }))  # fmt: skip
        return path

    return make


def test_table_1(folder):
    table = report.table_1(folder(), "cifar10")
    assert list(table.columns) == ["after 1", "after 4"]
    # Mean of 50 and 60; their standard deviation with n - 1 is sqrt(2 * 25) = 7.07.
    assert table.loc["CAS %"].tolist() == ["55.0 ± 7.1", "70.0 ± 0.0"]
    assert table.loc["IS"].tolist() == [50, 12] and table.loc["UGS"].tolist() == [7.5, 1.23]
    assert table.loc["epochs"].tolist() == ["24/-", "20/7"]
    assert table.loc["images"].tolist() == [500, 500] and table.loc["generation s"].tolist() == [12.3, 12.3]


def test_table_2(folder):
    table = report.table_2(folder(), "cifar10")
    # 71, 73, 78: mean 74, deviations -3, -1, 4, squares 9 + 1 + 16 = 26, / 2 = 13, root 3.6. One classifier: no spread.
    assert table.loc["accuracy %"].to_dict() == {"real": "90.0", "x1": "74.0 ± 3.6", "x2": "80.0 ± 0.0"}
    assert table.loc["training images"].to_dict() == {"real": 1000, "x1": 1000, "x2": 2000}


def test_published_numbers_stand_in_a_row_marked_as_published(folder):
    path = folder()
    for table, expected in (
        (report.table_1(path, "cifar10:500"), {"after 1": 39.52, "after 4": 59.30}),
        (report.table_2(path, "cifar10:500"), {"real": 83.26, "x1": 79.09, "x2": 81.49}),
    ):
        marked = [name for name in table.index if "published" in name]
        assert len(marked) == 1 and marked[0].startswith("published") and "CIFAR10" in marked[0]
        assert table.loc[marked[0]].to_dict() == expected
        others = table.drop(index=marked).to_string()
        assert not any(f"{value:.2f}" in others for value in expected.values())


def test_without_a_published_row_there_is_none(folder):
    path = folder("digits")
    for table in (report.table_1(path, "digits"), report.table_2(path, "digits")):
        assert len(table) >= 2 and not any("published" in name for name in table.index)


def test_selection_on_the_test_set_is_marked(folder, tmp_path):
    assert "TEST" not in report.table_1(folder(), "cifar10").to_string()
    marked = report.table_1(folder("pathmnist", select_on="test"), "pathmnist")
    assert any(name.startswith("CAS %") and "TEST" in name for name in marked.index)
    for name in marked.index:
        assert not (name.startswith("published") and "TEST" in name)


def test_an_unfinished_run_has_empty_tables(tmp_path):
    assert len(report.table_1(tmp_path, "cifar10")) == 0 and len(report.table_2(tmp_path, "cifar10")) == 0


def test_main_prints_every_run(folder, tmp_path, capsys):
    folder()
    folder("digits")
    report.main([str(tmp_path)])
    shown = capsys.readouterr().out
    assert shown.count("Table 1, ") == 2 and shown.count("Table 2, ") == 2
    for text in ("cifar10/tiny-demo-seed0", "digits/tiny-demo-seed0", "55.0 ± 7.1", "74.0 ± 3.6"):
        assert text in shown
    assert shown.count("published accuracy") == 1


def test_main_without_runs(tmp_path):
    with pytest.raises(SystemExit, match="No run in .*run the notebooks first"):
        report.main([str(tmp_path / "nothing")])


# --- figures ---


@pytest.fixture(autouse=True)
def no_window():
    plt.switch_backend("agg")
    yield
    assert plt.get_fignums() == []  # a figure left open would be shown twice in a notebook


def drawn(figure):
    """Draws it for real; a warning (a glyph that no font has, a layout that does not fit) fails."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.savefig(io.BytesIO())
    return figure


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


def test_loss_curve():
    history = pd.DataFrame(np.random.default_rng(0).random((5, 4)), columns=["train", "right", "wrong", "empty"])
    figure = drawn(report.loss_curve(history, "Class-Encoder"))
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert len(lines) == 4
    np.testing.assert_allclose(lines["held out, right label"].get_ydata(), history.right)


@pytest.fixture
def study(study_of):
    random = np.random.default_rng(0)
    rows = [(int(i), u, int(e), 1 - (u - 0.5) ** 2, k % 3 == 2)
            for k, (i, u, e) in enumerate(random.uniform((1, 0, 1), (100, 1, 10), (12, 3)))]  # fmt: skip
    return study_of(rows)


def test_figures_of_a_search(study):
    figure = drawn(report.trials(study, "step 2"))
    best = max((t for t in study.trials if t.state == optuna.trial.TrialState.COMPLETE), key=lambda t: t.value)
    ring = figure.axes[0].collections[-1].get_offsets()
    np.testing.assert_allclose(ring, [[best.params["IS"], best.params["UGS"]]])
    points = [len(c.get_offsets()) for c in drawn(report.slices(study)).axes[0].collections]
    assert sorted(points) == [4, 8]  # pruned and complete
    drawn(report.contour(study))
    drawn(report.contour(study, "epoch", "UGS"))


def test_figures_of_the_shortest_search(study_of):
    study = study_of([(10, 0.5, 1, 0.8, False)])
    for figure in (report.trials(study), report.slices(study), report.contour(study)):
        drawn(figure)


def test_importance_bars():
    ours = pd.DataFrame([[0.2, 0.7, 0.1], [0.1, 0.3, 0.6]], columns=["IS", "UGS", "epoch"], index=["step 2", "step 4"])
    figure = drawn(report.importance_bars(ours))
    lengths = {c.get_label(): [bar.get_width() for bar in c] for c in figure.axes[0].containers}
    assert lengths["ours, step 2"] == pytest.approx([0.2, 0.7, 0.1])
    published = [value for name, value in lengths.items() if "published" in name]
    assert len(published) == 2 and len(lengths) == 4
    step_4 = [paper.IMPORTANCES[p].xs(4, level="step").mean() for p in ("IS", "UGS", "epoch")]
    assert published[1] == pytest.approx(step_4)


def test_figures_of_the_tables(folder):
    path = folder()
    figure = drawn(report.steps_figure(path, chance=0.1))
    np.testing.assert_allclose(figure.axes[0].lines[0].get_ydata(), [0.55, 0.7])
    figure = drawn(report.scaling_figure(path))
    line = figure.axes[0].containers[0].lines[0]
    np.testing.assert_allclose(line.get_ydata(), [0.74, 0.8])


def test_a_contour_of_trials_that_scored_alike_draws_the_points_alone():
    def figure(values):
        study = optuna.create_study(direction="maximize")
        for k, value in enumerate(values):
            ranges = {"IS": optuna.distributions.IntDistribution(1, 9),
                      "UGS": optuna.distributions.FloatDistribution(0, 9),
                      "epoch": optuna.distributions.IntDistribution(1, 9)}  # fmt: skip
            attributes = {"val_accuracy": value, "test_accuracy": value, "classifier_epochs": 1, "seconds": 1.0}
            point = {"IS": 1 + k, "UGS": float(k * k % 5), "epoch": 1}
            study.add_trial(optuna.trial.create_trial(params=point, distributions=ranges, value=value,
                                                      user_attrs=attributes))  # fmt: skip
        return report.contour(study)

    assert len(figure([0.1] * 6).axes) == 1
    assert len(figure([0.1, 0.3, 0.2, 0.5, 0.4, 0.6]).axes) == 2  # with the scale of its colours
