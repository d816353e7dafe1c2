"""What is known of each generated image: beside brute force, and beside mistakes that were planted."""

import numpy as np
import pytest
import torch

from sdgen_lib import data
from sdgen_lib.classify import ResNet20
from sdgen_lib.data import Split
from sdgen_lib.evaluate import metrics, quality
from sdgen_lib.evaluate.sets import synthetic_blocks


def features(count: int, seed: int, width: int = 5) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_densities_are_counted_ball_by_ball():
    real, made, k = features(40, 0), features(30, 1), 5
    found = metrics.densities(real, made, k)
    radius = np.sort(np.linalg.norm(real[:, None] - real[None], axis=2), axis=1)[:, k]
    inside = np.linalg.norm(made[:, None] - real[None], axis=2) < radius
    np.testing.assert_allclose(found, inside.sum(1) / k)
    whole = metrics.precision_recall_density_coverage(real, made, k)
    assert float(found.mean()) == pytest.approx(whole["density"])
    assert float((found > 0).double().mean()) == pytest.approx(whole["precision"])


def test_a_copy_has_no_authenticity_and_a_stranger_much():
    real = torch.tensor([[0.0], [1.0], [5.0], [5.0]])
    made = torch.tensor([[0.0], [1.5], [-3.0], [5.0], [7.0]])
    assert metrics.authenticities(real, made).tolist() == [0.0, 0.5, 3.0, 0.0, float("inf")]
    assert metrics.authenticity(real, made) == pytest.approx(2 / 5)


@pytest.fixture
def pictures():
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (60, 3, 8, 8), generator=random).to(torch.uint8)
    return Split(images[:40], torch.arange(40) % 3), Split(images[40:], torch.arange(20) % 3)


def test_scores_are_those_of_brute_force(pictures):
    real, made = pictures
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network = ResNet20(3, width=4).eval()
    found = quality.image_scores(network, real, made, k=3)
    with torch.no_grad():
        told = network(made.images).softmax(1)
    torch.testing.assert_close(found["confidence"], told[torch.arange(20), made.labels])
    assert found["agreement"].tolist() == (told.argmax(1) == made.labels).float().tolist()
    extract = metrics.extractor("resnet20", network)
    known, new = extract(real.images), extract(made.images)
    for i in (0, 7, 19):
        own = known[real.labels == made.labels[i]]
        distance = (own - new[i]).norm(dim=1)
        assert float(found["nearness"][i]) == pytest.approx(-float(distance.min()), rel=1e-4)
        between = (own[:, None] - own[None]).norm(dim=2).sort(dim=1).values[:, 3]
        assert float(found["density"][i]) == pytest.approx(int((distance < between).sum()) / 3)
        assert float(found["contrast"][i]) == pytest.approx(made.images[i].double().numpy().std(), rel=1e-5)
    assert set(found) == set(quality.SCORES)


def test_a_class_needs_a_real_image_and_makes_do_with_one(pictures):
    real, made = pictures
    network = ResNet20(3, width=4)
    one = real.take([*(real.labels != 2).nonzero()[:, 0].tolist(), 2])
    scores = quality.image_scores(network, one, made)
    assert scores["density"][made.labels == 2].tolist() == [0.0] * int((made.labels == 2).sum())
    assert bool((scores["nearness"][made.labels == 2] < 0).all())
    with pytest.raises(ValueError, match="class number 2 and no real one"):
        quality.image_scores(network, real.take((real.labels != 2).nonzero()[:, 0]), made)


def test_planted_mistakes_are_what_they_are_called(pictures):
    _, made = pictures
    found = quality.planted(made, 3, share=0.2, seed=0)
    counts = {name: int(rows.sum()) for name, rows in found.groups.items()}
    assert counts == {"mislabelled": 4, "blank": 4, "left alone": 12}
    moved, blank, left = found.groups.values()
    assert bool((found.images.labels[moved] != made.labels[moved]).all()) and int(found.images.labels.max()) <= 2
    assert found.images.images[blank].unique().tolist() == [127]
    assert torch.equal(found.images.labels[~moved], made.labels[~moved])
    assert torch.equal(found.images.images[left], made.images[left])
    with pytest.raises(ValueError, match="not 3 and 0.7"):
        quality.planted(made, 3, share=0.7, seed=0)
    with pytest.raises(ValueError, match="2 classes or more"):
        quality.planted(made, 1, share=0.1, seed=0)


@pytest.mark.slow
def test_planted_mistakes_are_found_and_good_images_left_in_peace():
    """A fifth of real images that the judge did not learn from is mislabelled, a fifth painted grey."""
    digits = data.load("digits:600")
    network = metrics.judge(digits.train, digits.val, digits.num_classes, 0, epochs=12, batch_size=32)
    of_real = quality.image_scores(network, digits.train, digits.val)
    spoilt = quality.planted(digits.test, digits.num_classes, share=0.2, seed=0)
    wrong = quality.suspects(quality.image_scores(network, digits.train, spoilt.images), of_real)
    mislabelled, blank, left = spoilt.groups.values()
    assert float(wrong["another class"][mislabelled].float().mean()) > 0.9
    assert wrong["blank"][blank].all() and not wrong["blank"][~blank].any()
    flagged = wrong["another class"] | wrong["unlike any"]
    assert float(flagged[left].float().mean()) < 0.15
    table = quality.class_quality(
        quality.image_scores(network, digits.train, spoilt.images),
        of_real,
        network,
        digits.val,
        spoilt.images,
        digits.class_names,
    )
    assert list(table["taken for the class %"]) == sorted(table["taken for the class %"])
    assert 50 < table["taken for the class %"].mean() < 75  # a fifth mislabelled, and a fifth of grey is of no class
    assert int(table["generated"].sum()) == len(digits.test)


def test_a_runs_scores_are_made_once(small, tmp_path, monkeypatch):
    course = small(tmp_path)
    ws, source = course.workspace, course.source("after 1")
    first = quality.scores_of(ws, source, [1, 2])
    made = synthetic_blocks(ws, source, [1, 2])
    expected = quality.image_scores(quality.judge_of(ws), ws.data.train, made)
    for name, values in expected.items():
        torch.testing.assert_close(first[name], values)
    monkeypatch.setattr(quality, "image_scores", lambda *_: pytest.fail("made again"))
    monkeypatch.setattr(metrics, "judge", lambda *_: pytest.fail("trained again"))
    again = quality.scores_of(small(tmp_path).workspace, small(tmp_path).source("after 1"), [1, 2])
    assert all(torch.equal(first[name], again[name]) for name in quality.SCORES)
