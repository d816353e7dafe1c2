"""The classifiers of a table's row."""

import types

import pytest
import torch

from sdgen_lib.classify import Result, Score
from sdgen_lib.data import Split
from sdgen_lib.evaluate import rows
from sdgen_lib.store import blocks


def test_classifiers_side_by_side_share_one_set(tmp_path, monkeypatch):
    """A large set is in memory once, however many classifiers train on it: none makes a copy of its images."""
    labels = torch.arange(40) % 2
    paths = []
    for k in range(2):
        (tmp_path / str(k)).mkdir()
        blocks.make_block(
            tmp_path / str(k),
            lambda labels, first: torch.full((len(labels), 3, 8, 8), first % 256, dtype=torch.uint8),
            labels,
            first_index=k * 40,
            batch_size=16,
        )
        paths.append(tmp_path / str(k) / blocks.BLOCK)
    whole = torch.cat([blocks.load_images(path) for path in paths])
    assert whole.is_contiguous(memory_format=torch.channels_last)
    seen, made = [], rows.score

    def watched(training, *args, **options):
        seen.append(training.images.to("cpu").contiguous(memory_format=torch.channels_last).data_ptr())
        return made(training, *args, **options)

    monkeypatch.setattr(rows, "score", watched)
    monkeypatch.setattr(rows, "classifier_options", lambda s: dict(width=4, epochs=1, batch_size=40))
    split = Split(whole, labels.repeat(2))
    ws = types.SimpleNamespace(data=types.SimpleNamespace(val=split, num_classes=2))
    found = rows.scores(ws, types.SimpleNamespace(seed=0, classifier_seeds=3), split, {"test": split}, {}, "x2")
    assert len(found) == 3 and set(seen) == {whole.data_ptr()}


def test_a_rows_version_is_in_its_fingerprint(small, tmp_path, monkeypatch):
    """The same settings train other classifiers since the learning rate falls as Keras' does."""
    course = small(tmp_path)
    step = rows.row_step(course.workspace, "table_2/real", None, 6)
    before = course.run.fingerprint(step)
    assert step.version == rows.ROW_VERSION >= 2
    monkeypatch.setattr(rows, "ROW_VERSION", rows.ROW_VERSION + 1)
    assert course.run.fingerprint(rows.row_step(course.workspace, "table_2/real", None, 6)) != before


def test_a_row_says_what_its_accuracy_is_judged_by(small, tmp_path, monkeypatch):
    """Five test images, three of them of class 1; whatever the classifiers answer."""
    course = small(tmp_path)
    data = course.workspace.data
    five = Split(data.test.images[[0, 1, 2, 3, 3]], data.test.labels[[0, 1, 2, 3, 3]])
    assert five.labels.tolist() == [0, 1, 0, 1, 1]
    object.__setattr__(data, "test", five)

    def scored(ws, s, training, tests, options, name):
        assert list(tests) == ["test"]
        return [Result(0.5, 1, 1, 1, {"test": Score.of(torch.tensor(p), five.labels, 2)}) for p in ([0] * 5, [1] * 5)]

    monkeypatch.setattr(rows, "scores", scored)
    step = rows.row_step(course.workspace, "table_2/real", lambda s: rows.Training(data.train), len(data.train))
    facts = course.run.result(step).facts
    known = {name: facts[name] for name in ("num_test", "num_classes", "largest_class", "num_images")}
    assert known == {"num_test": 5, "num_classes": 2, "largest_class": 0.6, "num_images": 6}
    assert facts["test"] == pytest.approx([0.4, 0.6])
    assert facts["balanced_test"] == [0.5, 0.5]
