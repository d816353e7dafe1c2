"""The classifiers of a table's row."""

import types

import torch

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
