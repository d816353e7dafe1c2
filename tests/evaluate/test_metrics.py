"""Set metrics, against closed forms, other libraries and cases small enough to count."""

import math
import subprocess
import sys
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from torch.nn import functional as F

from sdgen_lib.classify import ResNet20
from sdgen_lib.classify.networks import build
from sdgen_lib.data import Split
from sdgen_lib.evaluate import metrics
from sdgen_lib.evaluate.metrics import (
    authenticity,
    compare,
    distance_name,
    extractor,
    frechet_distance,
    judge,
    nearest,
    per_class,
    precision_recall_density_coverage,
)

BLOOD = Path("/work/shared/data/pbcblood28.npz")


def normal(count, width, seed, scale=1.0, shift=0.0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) * scale + shift


def with_moments(mean, covariance, count, seed):
    """Points, float64 (count, d), whose own mean and covariance are exactly these."""
    x = np.random.default_rng(seed).standard_normal((count, len(mean)))
    x -= x.mean(axis=0)
    white = x @ np.linalg.inv(np.linalg.cholesky(np.atleast_2d(np.cov(x.T)))).T
    return white @ np.linalg.cholesky(covariance).T + mean


def covariance(width, seed):
    a = np.random.default_rng(seed).standard_normal((width, 2 * width))
    return a @ a.T / width


# -- Frechet distance


@pytest.mark.parametrize("shift", [0.0, 1000.0])
def test_frechet_distance_is_that_of_the_two_gaussians(shift):
    means, covariances = (np.full(6, shift), np.arange(6.0) + shift), (covariance(6, 1), covariance(6, 2))
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    expected = ((means[0] - means[1]) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)
    real, generated = (with_moments(m, c, n, n) for m, c, n in zip(means, covariances, (40, 70)))
    assert frechet_distance(real, generated) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(generated, real) == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_in_one_dimension():
    real, generated = with_moments([2.0], np.array([[9.0]]), 30, 0), with_moments([-1.0], np.array([[4.0]]), 50, 1)
    assert frechet_distance(real, generated) == pytest.approx((2 + 1) ** 2 + (3 - 2) ** 2)


@pytest.mark.parametrize("counts", [(300, 200), (20, 200), (20, 15)])
def test_frechet_distance_is_torchmetrics_also_with_fewer_images_than_features(counts):
    fid = pytest.importorskip("torchmetrics.image.fid", reason="torchmetrics, the oracle here, is not installed")

    class Given(torch.nn.Identity):
        num_features = 32

    real, generated = normal(counts[0], 32, 0).double(), normal(counts[1], 32, 1, 0.5, 0.2).double()
    oracle = fid.FrechetInceptionDistance(feature=Given())
    oracle.update(real, real=True)
    oracle.update(generated, real=False)
    assert frechet_distance(real, generated) == pytest.approx(float(oracle.compute()), abs=1e-5)


def test_frechet_distance_of_a_set_and_itself_is_0_whatever_its_rank():
    for count in (10, 100):
        same = normal(count, 40, 0, shift=3)
        assert 0 <= frechet_distance(same, same.clone()) < 1e-10


# -- precision, recall, density, coverage


def test_four_measures_counted_by_hand():
    """On a line, k = 1. Real radii: 0, 1, 3, 7 -> 1, 1, 2, 4. Generated radii: 0.5, 2.5, 20 -> 2, 2, 17.5."""
    real, generated = torch.tensor([[0.0], [1.0], [3.0], [7.0]]), torch.tensor([[0.5], [2.5], [20.0]])
    measured = precision_recall_density_coverage(real, generated, k=1)
    # 0.5 is in the balls of 0 and 1; 2.5 in those of 3 alone (7's edge is 3); 20 in none.
    # Real images in generated balls: 0, 1 (0.5's), 1, 3 (2.5's), 3, 7 (20's begins at 2.5).
    assert measured == pytest.approx({"precision": 2 / 3, "recall": 1.0, "density": 3 / 3, "coverage": 3 / 4})


def test_the_edge_of_a_ball_is_outside():
    real = torch.tensor([[0.0], [1.0], [10.0], [11.0]])
    on_the_edges = torch.tensor([[2.0], [9.0], [-1.0], [12.0]])
    measured = precision_recall_density_coverage(real, on_the_edges, k=1)
    assert (measured["precision"], measured["density"], measured["coverage"]) == (0, 0, 0)


def test_sets_far_apart_and_a_set_and_its_copy():
    real = normal(50, 8, 0)
    assert set(precision_recall_density_coverage(real, real + 100).values()) == {0.0}
    # Each ball holds its own centre's copy and k - 1 more: the k-th lies on its edge.
    assert set(precision_recall_density_coverage(real, real.clone()).values()) == {1.0}


def test_mode_collapse_costs_recall_and_coverage_but_no_precision():
    real = normal(400, 4, 0)
    collapsed = precision_recall_density_coverage(real, normal(400, 4, 1, scale=0.1))
    assert collapsed["precision"] > 0.95 and collapsed["density"] > 1
    assert collapsed["recall"] < 0.1 and collapsed["coverage"] < 0.5


@pytest.mark.parametrize("k", [1, 3, 5])
def test_one_distribution_gives_the_expected_density_and_coverage(k):
    """Naeem et al. 2020, section 3.3: of two samples of N, density 1 and coverage 1 - 1/2^k nearly."""
    measured = [precision_recall_density_coverage(normal(1000, 3, s), normal(1000, 3, s + 50), k) for s in range(5)]
    assert np.mean([m["density"] for m in measured]) == pytest.approx(1, abs=0.06)
    assert np.mean([m["coverage"] for m in measured]) == pytest.approx(1 - 0.5**k, abs=0.02)


@pytest.mark.parametrize("pairs", [2**22, 500])
@pytest.mark.parametrize(("counts", "k"), [((300, 200), 5), ((60, 300), 3), ((12, 12), 10), ((30, 40), 1)])
def test_four_measures_are_prdcs_however_they_are_cut(counts, k, pairs, monkeypatch, capsys):
    prdc = pytest.importorskip("prdc", reason="prdc, the oracle here, is not installed")
    monkeypatch.setattr(metrics, "PAIRS_AT_ONCE", pairs)
    real, generated = normal(counts[0], 16, 0, shift=4), normal(counts[1], 16, 1, scale=0.8, shift=4.2)
    expected = prdc.compute_prdc(real.double().numpy(), generated.double().numpy(), nearest_k=k)
    assert precision_recall_density_coverage(real, generated, k) == pytest.approx(expected, abs=1e-12)


# -- copies


def test_nearest_finds_the_copy_at_no_distance():
    real = normal(500, 64, 0, shift=20)
    order = torch.randperm(500, generator=torch.Generator().manual_seed(1))
    index, distance = nearest(real, real[order])
    assert index.tolist() == order.tolist() and distance.tolist() == [0.0] * 500
    index, distance = nearest(torch.tensor([[0.0, 0.0], [3.0, 4.0]]), torch.tensor([[3.0, 3.0], [-5.0, 12.0]]))
    assert (index.tolist(), distance.tolist()) == ([1, 1], pytest.approx([1.0, math.hypot(8, 8)]))


def test_nearest_is_scikit_learns(monkeypatch):
    from sklearn.neighbors import NearestNeighbors

    monkeypatch.setattr(metrics, "PAIRS_AT_ONCE", 1000)
    real, generated = normal(300, 8, 0), normal(77, 8, 1)
    distance, index = NearestNeighbors(n_neighbors=1).fit(real.double()).kneighbors(generated.double())
    found = nearest(real, generated)
    assert found[0].tolist() == index[:, 0].tolist() and found[1].numpy() == pytest.approx(distance[:, 0])


def test_authenticity_counted_by_hand():
    """Real images at 0, 1 and 5: their nearest real neighbours are 1, 1 and 4 away."""
    real = torch.tensor([[0.0], [1.0], [5.0]])
    assert authenticity(real, torch.tensor([[0.4], [-1.5], [7.0], [9.5]])) == 2 / 4  # -1.5 and 9.5 are farther
    assert authenticity(real, torch.tensor([[-1.0]])) == 0  # as far, not farther
    assert authenticity(real, real) == 0


# -- all of them, and by class


def test_compare_says_in_which_features_and_from_how_many_images():
    real, generated = normal(100, 8, 0), normal(60, 8, 1)
    row = compare(real, generated, "ResNet20", k=3)
    assert {**row} == {
        "features": "ResNet20",
        "num_real": 100,
        "num_generated": 60,
        "fd": frechet_distance(real, generated),
        **precision_recall_density_coverage(real, generated, 3),
        "authenticity": authenticity(real, generated),
        "note": "",
    }
    assert set(metrics.MEASURES) < set(row)
    assert "8 images for 8 features: the FD in ResNet20 features is" in compare(real, generated[:8], "ResNet20")["note"]
    assert [distance_name(f) for f in ("VAE (tiny)", "Inception")] == ["FD in VAE (tiny) features", "FID"]


def test_a_class_has_a_row_and_one_with_too_few_images_a_note():
    real, generated = normal(60, 4, 0), normal(50, 4, 1)
    real_labels, labels = (
        torch.tensor([0] * 30 + [2] * 25 + [3] * 5),
        np.array([0] * 20 + [1] * 10 + [2] * 10 + [3] * 10),
    )
    rows = per_class(real, generated, real_labels, labels, "ResNet20")
    assert list(rows) == [0, 1, 2, 3]
    assert rows[0] == compare(real[:30], generated[:20], "ResNet20")
    assert rows[2] == compare(real[30:55], generated[30:40], "ResNet20")
    for label, of_real in ((1, 0), (3, 5)):
        assert all(math.isnan(rows[label][measure]) for measure in metrics.MEASURES)
        assert f"{of_real} real and 10 generated images: k = 5 takes 6 of each" in rows[label]["note"]
    assert all(list(row) == list(rows[0]) for row in rows.values())


# -- what does not fit


FOURS = (precision_recall_density_coverage, lambda real, generated: compare(real, generated, "ResNet20"))


@pytest.mark.parametrize("measure", [frechet_distance, authenticity, nearest, *FOURS])
def test_features_that_do_not_fit_are_refused_by_all(measure):
    good, broken = normal(20, 4, 0), normal(20, 4, 1)
    broken[3, 2], broken[7, 0] = math.nan, math.inf
    for bad in ((broken, good), (good, broken)):
        with pytest.raises(ValueError, match="2 of the 20 rows of .* nan or infinite"):
            measure(*bad)
    with pytest.raises(ValueError, match="Real images have 4 features and generated ones 3"):
        measure(good, good[:, :3])
    with pytest.raises(ValueError, match=r"real features are torch.uint8 \(20, 4\)"):
        measure(good.to(torch.uint8), good)
    with pytest.raises(ValueError, match=r"generated features are torch.float32 \(20, 2, 2\)"):
        measure(good, good.view(20, 2, 2))
    with pytest.raises(ValueError, match="There are 0 generated images"):
        measure(good, good[:0])


@pytest.mark.parametrize("measure", FOURS)
def test_too_few_images_for_k_are_refused(measure):
    six = normal(6, 4, 0)
    measure(six, six)
    with pytest.raises(ValueError, match="There are 5 real images; k = 5 takes 6 or more"):
        measure(six[:5], six)
    with pytest.raises(ValueError, match="There are 5 generated images; k = 5 takes 6 or more"):
        measure(six, six[:5])


def test_one_image_has_no_covariance_and_no_neighbour():
    for measure in (frechet_distance, authenticity):
        with pytest.raises(ValueError, match="There are 1 real images; .* takes 2 or more"):
            measure(normal(1, 4, 0), normal(9, 4, 0))


def test_k_and_labels_that_do_not_fit_are_refused():
    x, y = normal(20, 4, 0), torch.zeros(20, dtype=torch.int64)
    with pytest.raises(ValueError, match="k is 0"):
        precision_recall_density_coverage(x, x, k=0)
    with pytest.raises(TypeError):
        precision_recall_density_coverage(x, x, k=2.5)
    for labels in (y[:19], y.float(), y.view(20, 1)):
        with pytest.raises(ValueError, match=r"labels of the generated images are .* one an image"):
            per_class(x, x, y, labels, "ResNet20")


# -- features


def images(count, size=16, seed=0):
    return torch.randint(
        0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def test_resnet20_features_are_what_its_linear_layer_is_given():
    network, pictures = ResNet20(5), images(10)
    network.stages[0].norm1.running_mean += 0.3
    found = extractor("resnet20", network)
    values = found(pictures, batch_size=4)
    assert (found.name, values.shape, values.dtype, values.requires_grad) == (
        "ResNet20",
        (10, 64),
        torch.float32,
        False,
    )
    assert network.training and isinstance(network.head, torch.nn.Linear)  # as it was
    with torch.no_grad():
        expected = network.eval()(pictures)
    assert torch.allclose(F.linear(values, network.head.weight, network.head.bias), expected, atol=1e-5)


def test_vae_features_are_the_latents(tiny):
    found, pictures = extractor("vae", tiny), images(5)
    values = found(pictures)
    assert found.name == "VAE (tiny)" and torch.allclose(values, tiny.encode(pictures).flatten(1), atol=1e-5)


def test_unknown_features_and_other_images_are_refused():
    with pytest.raises(ValueError, match="Unknown features 'resnet'. Did you mean 'resnet20'"):
        extractor("resnet")
    with pytest.raises(ValueError, match="those of a trained ResNet20, not of"):
        extractor("resnet20", build("resnet18", 3))
    for bad in (images(4).float(), images(4)[0], images(4)[:, :1], images(0)):
        with pytest.raises(ValueError, match=r"must be uint8 \(N, 3, H, W\)"):
            extractor("resnet20", ResNet20(3))(bad)


def test_the_judge_learns_the_real_images_and_depends_on_the_seed_alone():
    labels = torch.arange(60) % 3
    split = Split((images(60) // 4) + (labels * 80).to(torch.uint8).view(-1, 1, 1, 1), labels)
    options = dict(epochs=4, batch_size=10, width=4)
    one, again, other = (judge(split, split, 3, seed, **options) for seed in (0, 0, 1))
    assert torch.equal(one.head.weight, again.head.weight) and not torch.equal(one.head.weight, other.head.weight)
    values = extractor("resnet20", one)(split.images)
    centres = torch.stack([values[labels == c].mean(dim=0) for c in range(3)])
    assert (torch.cdist(values, centres).argmin(dim=1) == labels).float().mean() > 0.8


def test_inception_says_what_is_missing_and_what_to_choose(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ImportError, match='pip install torch-fidelity, or choose .*"resnet20" or "vae"'):
        extractor("inception")


def test_inception_without_its_weights_says_where_they_belong(monkeypatch, tmp_path):
    module = type(sys)("torch_fidelity.feature_extractor_inceptionv3")
    module.URL_INCEPTION_V3, module.FeatureExtractorInceptionV3 = "https://host.example/weights-1234abcd.pth", None
    monkeypatch.setitem(sys.modules, "torch_fidelity", type(sys)("torch_fidelity"))
    monkeypatch.setitem(sys.modules, module.__name__, module)

    def no_network(*_, **options):
        assert options["weights_only"] and options["check_hash"]
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", no_network)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(ConnectionError, match=r"not in .*weights-1234abcd\.pth and cannot .*no route.* \"vae\""):
        extractor("inception")


def test_importing_the_metrics_brings_no_library_for_metrics():
    code = (
        "import sys, sdgen_lib.evaluate.metrics;"
        "print(sorted({'torchmetrics', 'prdc', 'torch_fidelity', 'pandas', 'optuna'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


# -- real images


@pytest.mark.slow
def test_real_images_are_nearer_to_real_ones_than_blurred_ones_are(tiny):
    """Two halves of photographs of blood cells, and one of them blurred, in the tiny model's latents.

    Blurred images lie in the middle of the real ones there: precision, density and coverage do not notice it.
    """
    if not BLOOD.exists():
        pytest.skip(f"{BLOOD} is not on this machine")
    from torchvision.transforms.functional import gaussian_blur

    with np.load(BLOOD, allow_pickle=False) as file:
        pictures = torch.from_numpy(file["train_images"][:1200].transpose(0, 3, 1, 2).copy())
    half, other = pictures[::2], pictures[1::2]
    found = extractor("vae", tiny)
    real, fresh, blurred = (found(x) for x in (half, other, gaussian_blur(other, [7, 7], [2.0, 2.0])))
    alike, unlike, copied = (compare(real, x, found.name) for x in (fresh, blurred, real[:300]))
    assert alike["fd"] < unlike["fd"] / 3
    assert alike["recall"] > unlike["recall"] + 0.3
    assert copied["authenticity"] == 0 and alike["authenticity"] > 0.3
