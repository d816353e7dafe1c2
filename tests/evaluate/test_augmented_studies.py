"""Long tails, few shots and the studies of augmented conditioning, on the smallest run."""

import math

import pytest
import torch

from sdgen_lib.classify.training import cross_entropy
from sdgen_lib.course import Course
from sdgen_lib.data import Split
from sdgen_lib.data.tails import long_tailed
from sdgen_lib.evaluate import augmented_studies as studies
from sdgen_lib.evaluate.augmented_studies import AS_PUBLISHED, TAIL, Row
from sdgen_lib.methods.augmented import AugmentedMethod
from sdgen_lib.store import files


def split_of(*labels):
    labels = torch.tensor(labels)
    images = torch.arange(len(labels), dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 8, 8).contiguous()
    return Split(images, labels)


def test_oversampling_balances_and_uses_every_image():
    real = split_of(0, 0, 0, 0, 0, 1, 1, 2)
    found = studies.oversampled(real, 3)
    assert torch.bincount(found.labels).tolist() == [5, 5, 5]
    times = torch.bincount(found.images[:, 0, 0, 0].long(), minlength=8)
    assert times.tolist() == [1, 1, 1, 1, 1, 3, 2, 5]


def test_what_a_tail_lacks():
    real = split_of(0, 0, 0, 2, 2, 1)
    assert studies.missing_labels(real, 3).tolist() == [1, 1, 2]


def test_priors():
    real, made = torch.tensor([0, 0, 0, 1]), torch.tensor([1, 1])
    assert studies.prior_of("none", real, made, 2) is None
    assert studies.prior_of("real", real, made, 2) == pytest.approx([0.75, 0.25])
    assert studies.prior_of("batch", real, made, 2) == pytest.approx([0.375, 0.625])
    assert studies.prior_of("batch", real, made[:0], 2) == pytest.approx([0.75, 0.25])
    with pytest.raises(ValueError, match="Unknown prior 'reel'.*real"):
        studies.prior_of("reel", real, made, 2)


def test_balanced_softmax_is_a_softmax_weighted_by_the_classes_shares():
    """Ren et al. 2020, equation 3: p_y e^z_y / sum_k p_k e^z_k."""
    logits, labels, prior = torch.tensor([[1.0, 2.0, 0.5]]), torch.tensor([2]), torch.tensor([0.7, 0.2, 0.1])
    weighted = [p * math.exp(z) for p, z in zip([0.7, 0.2, 0.1], [1.0, 2.0, 0.5])]
    expected = -math.log(weighted[2] / sum(weighted))
    assert float(cross_entropy(logits, labels, None, 0.0, prior.log())) == pytest.approx(expected, rel=1e-6)
    even = torch.full((3,), 1 / 3).log()
    assert float(cross_entropy(logits, labels, None, 0.1, even)) == pytest.approx(
        float(cross_entropy(logits, labels, None, 0.1)), rel=1e-6
    )


@pytest.fixture(scope="module")
def method(tmp_path_factory, micro):
    given = dict(augmented_images=40, augmented_steps=2, augmented_text="prompt", classifier_seeds=2)
    given |= dict(augmented_tail_largest=8, augmented_tail_factor=8.0)
    return Course(micro(tmp_path_factory.mktemp("augmented"), **given)).augmented


def test_a_tails_rows_have_equal_steps_and_balanced_sets(method):
    tail = AugmentedMethod(studies.tailed(Course(method.ws.settings).augmented.ws))
    counts = tail.ws.data.class_counts
    assert counts.max() <= 8 and counts.min() == 1
    rows = studies.tail_rows(tail, {name: TAIL[name] for name in ("real", "oversampled", "filled: text")})
    assert {row["steps"][0] for row in rows.values()} == {rows["real"]["steps"][0]}
    assert rows["filled: text"]["num_images"] == 10 * int(counts.max()) == rows["oversampled"]["num_images"]
    assert rows["filled: text"]["point"]["conditioning"] == "text"
    again = studies.tail_rows(tail, {"filled: text": TAIL["filled: text"]})
    assert again["filled: text"] == rows["filled: text"]


def test_of_balanced_images_nothing_is_lacking(method):
    even = AugmentedMethod(method.ws.holding(long_tailed(method.ws.data, 1.0, 2, 0)))
    assert even.ws.data.class_counts.tolist() == [2] * 10
    row = Row(filled="random image", half=True, prior="batch")
    found = studies.tail_rows(even, {"filled": row})["filled"]
    assert found["num_images"] == 20 and "point" not in found


def test_each_row_of_a_tail_is_another_result(method):
    tail = AugmentedMethod(studies.tailed(method.ws))
    rows = {**TAIL, **AS_PUBLISHED}
    found = {name: tail.ws.run.fingerprint(studies.tail_step(tail, row)) for name, row in rows.items()}
    found["drawn anew"] = tail.ws.run.fingerprint(studies.tail_step(tail, TAIL["filled: text"], drawn=1))
    assert len(set(found.values())) == len(rows) + 1


def test_a_filling_is_drawn_once_and_says_whose_likeness_its_images_may_be(method):
    tail = AugmentedMethod(studies.tailed(method.ws))
    real, run = tail.ws.data.train, tail.ws.run
    filled = {name: row for name, row in (TAIL | AS_PUBLISHED).items() if row.filled == "random image"}
    assert len(filled) > 2
    steps = [studies.tail_step(tail, row).needs for row in filled.values()]
    assert {run.folder(step) for (step,) in steps} == {run.folder(studies.filling_step(tail, "random image"))}
    found = files.load_tensors(run.file(steps[0][0], studies.FILLING))
    assert found["label"].tolist() == studies.missing_labels(real, tail.ws.data.num_classes).tolist()
    assert len(found["images"]) == len(found["label"]) and found["images"].dtype == torch.uint8
    assert real.labels[found["real_image"]].tolist() == found["label"].tolist()
    source = tail.source("random image").build()
    again = source(found["label"], seed=tail.ws.settings.seed, set_name="long tail 0")
    assert torch.equal(again, found["images"])


def test_a_half_real_row_is_trained_with_its_prior(method):
    tail = AugmentedMethod(studies.tailed(method.ws))
    row = Row(filled="random image", half=True, prior="batch")
    found = studies.tail_rows(tail, {"published": row})["published"]
    assert len(found["test"]) == 2 and all(0 <= value <= 1 for value in found["test"])


def test_a_study_has_a_row_for_each_value_and_kind(method):
    names = studies.studies(method)
    assert set(names) == {"conditionings", "guidance", "dropout", "strength", "shots"}
    found = studies.study(method, "shots", 1)
    assert set(found) == {(value, kind) for value in ("1", "2", "4") for kind in ("real", "generated", "both")}
    assert found["1", "real"]["num_images"] == 10 and found["4", "both"]["num_images"] == 80
    strength = studies.study(method, "strength", 1)
    assert {row["point"]["strength"] for row in strength.values()} == {0.25, 0.5, 0.75, 1.0}
    with pytest.raises(ValueError, match="Unknown study 'shot'.*shots"):
        studies.study(method, "shot", 1)
