"""Long tails, few shots and the studies of augmented conditioning, on the smallest run."""

import math

import pytest
import torch
from sklearn.linear_model import LogisticRegression

from sdgen_lib.classify.training import cross_entropy
from sdgen_lib.course import Course
from sdgen_lib.data import Split, load
from sdgen_lib.data.tails import long_tailed
from sdgen_lib.evaluate import augmented_studies as studies
from sdgen_lib.evaluate.augmented_studies import AS_PUBLISHED, OTHERS, TAIL, Row
from sdgen_lib.evaluate.sets import synthetic
from sdgen_lib.methods.augmented import AugmentedMethod
from sdgen_lib.methods.inversion import InversionMethod
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
    found = {}
    for name, row in rows.items():
        ws, source = studies.filled_by(tail, row.filled, None)
        found[name] = ws.run.fingerprint(studies.tail_step(ws, row, source))
    text = tail.source("text")
    found["drawn anew"] = tail.ws.run.fingerprint(studies.tail_step(tail.ws, TAIL["filled: text"], text, drawn=1))
    assert len(set(found.values())) == len(rows) + 1


def test_a_filling_is_drawn_once_and_says_whose_likeness_its_images_may_be(method):
    tail = AugmentedMethod(studies.tailed(method.ws))
    real, run = tail.ws.data.train, tail.ws.run
    filled = {name: row for name, row in (TAIL | AS_PUBLISHED).items() if row.filled == "random image"}
    assert len(filled) > 2
    random_image = tail.source("random image")
    steps = [studies.tail_step(tail.ws, row, random_image).needs for row in filled.values()]
    assert {run.folder(step) for (step,) in steps} == {run.folder(studies.filling_step(tail.ws, random_image))}
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


def test_a_tail_is_filled_by_the_other_methods_which_learn_from_the_tail(method, tmp_path, micro):
    given = dict(inversion_visits=2, inversion_checkpoints=1, inversion_steps=2, classifier_seeds=2, seed=3)
    given |= dict(augmented_tail_largest=6, augmented_tail_factor=6.0, worth_steps=2, worth_guidance=1.0)
    whole = Course(micro(tmp_path, **given)).workspace
    beside = studies.tailed(whole)
    tail = AugmentedMethod(studies.tailed(whole.on("tiny-unclip")))
    rows = {name: OTHERS[name] for name in ("filled: Class-Encoder", "filled: Diffusion Inversion")}
    with pytest.raises(ValueError, match="'after 1' is another method's generator"):
        studies.tail_rows(tail, rows)
    found = studies.tail_rows(tail, rows | {"real": TAIL["real"]}, beside=beside)
    assert {row["num_images"] for name, row in found.items() if name != "real"} == {60}
    assert found["filled: Class-Encoder"]["point"]["num_inference_steps"] == 2
    learnt = beside.run.result(InversionMethod(beside).vectors_step(1))
    assert found["filled: Diffusion Inversion"]["point"]["visits"] == 2 and learnt.facts is not None
    assert {row["steps"][0] for row in found.values()} == {found["real"]["steps"][0]}
    measured = studies.fillings_measured(tail, whole, rows, beside=beside)
    assert list(measured) == ["real validation images", "after 1", "inversion"]
    lacking = len(studies.missing_labels(tail.ws.data.train, 10))
    assert measured["after 1"]["num_generated"] == measured["inversion"]["num_generated"] == lacking
    assert all(row["fd"] >= 0 for row in measured.values())


def test_of_a_balanced_set_there_is_no_filling_to_measure(method):
    even = AugmentedMethod(method.ws.holding(long_tailed(method.ws.data, 1.0, 2, 0)))
    assert studies.fillings_measured(even, method.ws) == {}


def test_as_many_of_each_class():
    found = studies.of_counts(split_of(0, 0, 0, 1, 2, 2), torch.tensor([2, 3, 0]))
    assert found.labels.tolist() == [0, 0, 1] and found.images[:, 0, 0, 0].tolist() == [0, 1, 3]


def test_a_frozen_encoders_linear_head_is_scikit_learns(method):
    """One penalty, by hand; the best of several is no worse on the validation images."""
    data = method.ws.data
    embedded = {
        name: method.encoder.embeddings(getattr(data, name).images).numpy() for name in ("train", "val", "test")
    }
    mean, deviation = embedded["train"].mean(0), embedded["train"].std(0)
    scaled = {name: (those - mean) / deviation for name, those in embedded.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(studies, "PENALTIES", (0.1,))
        found = studies.probe(method, data.train)
    by_hand = LogisticRegression(C=0.1, max_iter=2000).fit(scaled["train"], data.train.labels)
    for name in ("val", "test"):
        assert found[name] == pytest.approx(by_hand.score(scaled[name], getattr(data, name).labels), abs=0.01)
    assert studies.probe(method, data.train)["val"] >= found["val"]
    with pytest.raises(ValueError, match="all of these images are of one"):
        studies.probe(method, data.train.take((data.train.labels == 0).nonzero()[:, 0]))


def test_a_leak_draws_from_images_that_the_run_does_not_have(method):
    """It is another result, and its images are made from real ones of the whole training set."""
    whole = load("digits:100", image_size=method.ws.data.image_size).train
    with pytest.raises(ValueError, match='"leak" draws from the whole training set'):
        studies.study(method, "leak", 1)
    few, all_of_them = method.source("random image"), method.source("random image", real=whole)
    assert method.ws.run.fingerprint(few.step) != method.ws.run.fingerprint(all_of_them.step)
    labels = torch.arange(10)
    made = all_of_them.build()
    rows = made.conditioner.real_rows(labels, torch.arange(10), method.ws.settings.seed)[:, 0]
    assert whole.labels[rows].tolist() == labels.tolist() and int(rows.max()) >= len(method.ws.data.train)
    found, frozen = (of(method, "leak", 1, whole) for of in (studies.study, studies.probes))
    assert list(frozen) == [("real", "real"), *found]
    real, made = method.ws.data.train, synthetic(method.ws, few, 1)
    both = Split(torch.cat([real.images, made.images]), torch.cat([real.labels, made.labels]))
    assert frozen["those it has", "both"] == studies.probe(method, both)
    assert frozen["real", "real"] == studies.probe(method, real)
    assert [value for value, kind in found if kind == "both"] == ["those it has", "the whole training set: LEAKS"]


def test_a_study_has_a_row_for_each_value_and_kind(method):
    names = studies.studies(method)
    assert set(names) == {"conditionings", "guidance", "dropout", "strength", "shots", "leak"}
    found = studies.study(method, "shots", 1)
    assert set(found) == {(value, kind) for value in ("1", "2", "4") for kind in ("real", "generated", "both")}
    assert found["1", "real"]["num_images"] == 10 and found["4", "both"]["num_images"] == 80
    strength = studies.study(method, "strength", 1)
    assert {row["point"]["strength"] for row in strength.values()} == {0.25, 0.5, 0.75, 1.0}
    with pytest.raises(ValueError, match="Unknown study 'shot'.*shots"):
        studies.study(method, "shot", 1)
