"""Set metrics: how far generated images are from real ones, whether they cover them, and whether they copy them.

All but the extractors work on matrices of features, float (N, d), one row an image. What they say depends on the
features, so a table names these: "FD in ResNet20 features". It is "FID" in Inception's features alone.
"""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..classify import ResNet20, train_classifier
from ..config.messages import shown, unknown_name
from ..data import Split
from ..diffusion.backbone import Backbone
from ..machine.devices import as_device
from ..machine.seeds import derived

INCEPTION = "Inception"  # the features that the FID is defined in
NEIGHBOURS = 5  # k of Naeem et al. 2020
PAIRS_AT_ONCE, ROWS_AT_ONCE = 2**22, 1024  # distances in memory: 32 MB, and a few times that while they are compared
EDGE = 1 - 1e-9  # of a radius: what is nearer to the edge is on it, where rounding alone would decide
BAR_AFTER = 5  # seconds; shorter work shows no bar
MEASURES = ("fd", "precision", "recall", "density", "coverage", "authenticity")


@dataclass(frozen=True)
class Extractor:
    """Features of images: uint8 (N, 3, H, W) -> float32 (N, d), on the CPU. Build it with `extractor`.

    ``name``: the features, as a table says them. ``of_batch``: uint8 (B, 3, H, W) on the CPU -> float (B, ..).
    """

    name: str
    of_batch: Callable[[torch.Tensor], torch.Tensor]

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, batch_size: int = 256) -> torch.Tensor:
        """Raises ValueError for images that are not uint8 (N, 3, H, W), or none."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or not len(images):
            raise ValueError(
                f"The images are {images.dtype} {tuple(images.shape)}; they must be uint8 (N, 3, H, W), 0..255, one or "
                "more."
            )
        parts = tqdm(images.split(batch_size), desc=f"{self.name} features", unit="batch", delay=BAR_AFTER)
        return torch.cat([self.of_batch(part).flatten(1).float().cpu() for part in parts])


def _resnet20(network: ResNet20) -> Extractor:
    """The penultimate layer of ``network``, after pooling; it should have been trained on real images, see `judge`."""
    if not isinstance(network, ResNet20):
        raise ValueError(f"ResNet20 features are those of a trained ResNet20, not of {shown(network)}.")
    headless = copy.deepcopy(network).eval()
    headless.head = nn.Identity()
    device = next(network.parameters()).device
    return Extractor("ResNet20", lambda images: headless(images.to(device)))


def _vae(backbone: Backbone) -> Extractor:
    """The latents of ``backbone``, flattened."""
    return Extractor(f"VAE ({backbone.name})", backbone.encode)


def _inception(device: str | torch.device | None = None) -> Extractor:
    """The 2048 features of the Inception network that the FID is defined with, of images resized to 299 x 299.

    torch-fidelity has the network as Heusel et al. 2017 used it; its weights, 91 MB, are downloaded once. Raises
    ImportError or ConnectionError, each with what to do, where one of them is missing.
    """
    other = 'or choose features that need no download: "resnet20" or "vae" (their distance is no FID).'
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
    except ImportError as error:
        raise ImportError(f"Inception's features need torch-fidelity: pip install torch-fidelity, {other}") from error
    file = Path(torch.hub.get_dir(), "checkpoints", Path(URL_INCEPTION_V3).name)
    try:
        # Read as numbers and nothing else, before torch-fidelity unpickles the same file.
        torch.hub.load_state_dict_from_url(URL_INCEPTION_V3, check_hash=True, weights_only=True)
    except OSError as error:  # no network, no such address, a full disk
        raise ConnectionError(
            f"Inception's weights are not in {file} and cannot be downloaded ({error}). Put the file from "
            f"{URL_INCEPTION_V3} there, {other}"
        ) from error
    device = as_device(device)
    network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(file)).to(device)
    return Extractor(INCEPTION, lambda images: network(images.to(device))[0])


EXTRACTORS: dict[str, Callable[..., Extractor]] = {"resnet20": _resnet20, "vae": _vae, "inception": _inception}


def extractor(name: str, *source) -> Extractor:
    """The features called ``name``, one of `EXTRACTORS`, of ``source``.

    ``extractor("resnet20", network)``: a trained `ResNet20`. ``extractor("vae", backbone)``: a backbone.
    ``extractor("inception")``: the FID's own, maybe with a device. Raises ValueError for an unknown name.
    """
    if name not in EXTRACTORS:
        raise unknown_name("features", name, EXTRACTORS)
    return EXTRACTORS[name](*source)


def judge(train: Split, val: Split, num_classes: int, seed: int, *, epochs: int = 100, **options) -> ResNet20:
    """A ResNet20 trained on the *real* images ``train``, for its features.

    ``seed``: the run's; the network's is derived from it, so that it is none of those that a table's rows train.
    ``options`` as in `train_classifier`.
    """
    with tqdm(total=epochs, desc="ResNet20 for features", unit="epoch", delay=BAR_AFTER) as bar:
        network, _ = train_classifier(
            train,
            val,
            num_classes,
            epochs=epochs,
            seed=derived(seed, "set metrics' network"),
            on_epoch=lambda *_: bar.update(),
            **options,
        )
    return network


def distance_name(features: str) -> str:
    """What the Frechet distance is called in features of that name: "FD in ResNet20 features"; "FID" in Inception's."""
    return "FID" if features == INCEPTION else f"FD in {features} features"


def _matrix(name: str, values: Any, at_least: int, why: str) -> torch.Tensor:
    """``values`` as float64 (N, d) on the CPU; raises ValueError unless they are finite, and N is ``at_least``."""
    values = torch.as_tensor(values)
    if values.ndim != 2 or not values.shape[1] or not values.is_floating_point():
        raise ValueError(
            f"The {name} features are {values.dtype} {tuple(values.shape)}; they must be float (N, d), a row an image."
        )
    if len(values) < at_least:
        raise ValueError(f"There are {len(values)} {name} images; {why} takes {at_least} or more.")
    if bad := int((~values.isfinite()).any(dim=1).sum()):
        raise ValueError(f"{bad} of the {len(values)} rows of {name} features have a value that is nan or infinite.")
    return values.detach().cpu().double()


def _matrices(
    real: Any, generated: Any, real_least: int, generated_least: int, why: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both as `_matrix`, of one width, shifted by the real mean: no distance changes, and rounding errors shrink."""
    real, generated = _matrix("real", real, real_least, why), _matrix("generated", generated, generated_least, why)
    if real.shape[1] != generated.shape[1]:
        raise ValueError(
            f"Real images have {real.shape[1]} features and generated ones {generated.shape[1]}; take both from one "
            "extractor."
        )
    return real - real.mean(dim=0), generated - real.mean(dim=0)


def _k(k: int) -> int:
    """``k`` as a whole number; raises ValueError below 1."""
    if operator.index(k) < 1:
        raise ValueError(f"k is {shown(k)}; it must be a whole number of neighbours from 1.")
    return operator.index(k)


def frechet_distance(real: Any, generated: Any) -> float:
    """The squared Frechet distance of two Gaussians with the means and covariances of the features; 0 or more.

    float (N, d) and (M, d), N and M at least 2. |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) (Dowson and Landau 1982;
    Heusel et al. 2017), the covariances divided by N - 1. Fewer images give larger distances, above all where there are
    not more than d of them: compare sets of equal size. Raises ValueError for features that do not fit.
    """
    real, generated = _matrices(real, generated, 2, 2, "a Frechet distance")
    difference = real.mean(dim=0) - generated.mean(dim=0)
    # With S1 = A'A and S2 = B'B, tr (S1 S2)^(1/2) is the sum of the singular values of AB', or of their triangles'.
    # The eigenvalues of S1 S2, which libraries take, are as exact only where both covariances have full rank.
    a, b = ((x - x.mean(dim=0)) / math.sqrt(len(x) - 1) for x in (real, generated))
    triangle_a, triangle_b = (torch.linalg.qr(x, mode="r").R for x in (a, b))
    root = torch.linalg.svdvals(triangle_a @ triangle_b.T).sum()
    distance = difference.square().sum() + a.square().sum() + b.square().sum() - 2 * root
    return max(0.0, float(distance))  # rounding may leave -1e-14


def _rows(count: int, others: int, title: str) -> Iterator[slice]:
    """Slices of range(``count``), so small that their distances to all ``others`` fit into memory."""
    size = max(1, min(PAIRS_AT_ONCE // others, ROWS_AT_ONCE))
    for start in tqdm(range(0, count, size), desc=title, unit="part", delay=BAR_AFTER, leave=False):
        yield slice(start, min(start + size, count))


def _distances(points: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Euclidean, (N, M), by a matrix product: far faster than differences, and right to some 1e-8 of the lengths."""
    return torch.cdist(points, others, compute_mode="use_mm_for_euclid_dist")


def _neighbours(points: torch.Tensor, others: torch.Tensor | None, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k nearest of ``others`` to each of ``points``, nearest first: distance float64 (N, k), index int64 (N, k).

    None: the nearest of ``points`` themselves, each but itself. Found by `_distances`, then measured by differences:
    so a copy is at 0.
    """
    targets, distances, indices = points if others is None else others, [], []
    for rows in _rows(len(points), len(targets), "nearest neighbours"):
        between = _distances(points[rows], targets)
        if others is None:
            between[torch.arange(len(between)), torch.arange(rows.start, rows.stop)] = math.inf
        index = between.topk(k, largest=False).indices
        exact = torch.stack([(points[rows] - targets[column]).norm(dim=1) for column in index.T], dim=1)
        order = exact.argsort(dim=1, stable=True)
        distances.append(exact.gather(1, order))
        indices.append(index.gather(1, order))
    return torch.cat(distances), torch.cat(indices)


def precision_recall_density_coverage(real: Any, generated: Any, k: int = NEIGHBOURS) -> dict[str, float]:
    """Fidelity and diversity by neighbourhoods: "precision", "recall", "density", "coverage" of float (N, d), (M, d).

    The ball of an image reaches to its k-th neighbour of its own set, itself not counted; its edge is outside.
    Precision: the share of generated images in some real ball. Recall: of real images in some generated ball
    (Kynkaanniemi et al. 2019). Density: how many real balls a generated image is in, divided by k: it may exceed 1.
    Coverage: the share of real balls with a generated image in them (Naeem et al. 2020).
    All are 0..1 but density. Of two large samples of one distribution, equal in size, density expects 1 and coverage
    1 - 2^-k (their section 3.3); of sets of unequal sizes, other values. Raises ValueError for fewer than k + 1 images
    of either kind, and features that do not fit.
    """
    k = _k(k)
    real, generated = _matrices(real, generated, k + 1, k + 1, f"k = {k}")
    real_radius, radius = (_neighbours(points, None, k)[0][:, -1] * EDGE for points in (real, generated))
    precise = inside = 0
    recalled, covered = (torch.zeros(len(real), dtype=torch.bool) for _ in range(2))
    for rows in _rows(len(generated), len(real), "precision, recall, density, coverage"):
        between = _distances(generated[rows], real)
        in_real = between < real_radius
        precise += int(in_real.any(dim=1).sum())
        inside += int(in_real.sum())
        covered |= in_real.any(dim=0)
        recalled |= (between < radius[rows, None]).any(dim=0)
    return {
        "precision": precise / len(generated),
        "recall": float(recalled.double().mean()),
        "density": inside / (k * len(generated)),
        "coverage": float(covered.double().mean()),
    }


def densities(real: Any, generated: Any, k: int = NEIGHBOURS) -> torch.Tensor:
    """In how many real balls each generated image is, divided by k: float64 (M,); their mean is the density.

    float (N, d) and (M, d), N at least k + 1; balls and errors as in `precision_recall_density_coverage`.
    """
    k = _k(k)
    real, generated = _matrices(real, generated, k + 1, 1, f"k = {k}")
    radius = _neighbours(real, None, k)[0][:, -1] * EDGE
    parts = _rows(len(generated), len(real), "density")
    return torch.cat([(_distances(generated[rows], real) < radius).sum(dim=1) for rows in parts]).double() / k


def nearest(real: Any, generated: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Each generated image's nearest real one: its index int64 (M,), and its distance in the features, float64 (M,).

    float (N, d) and (M, d), one image or more of each. Raises ValueError for features that do not fit.
    """
    real, generated = _matrices(real, generated, 1, 1, "a nearest neighbour")
    distance, index = _neighbours(generated, real, 1)
    return index[:, 0], distance[:, 0]


def authenticity(real: Any, generated: Any) -> float:
    """The share of generated images that copy no real one, 0..1; in percent it is the AuthPct of Alaa et al. 2022.

    An image is a copy if it is no farther from its nearest real image than that one is from its own nearest real
    neighbour. New images of the same distribution do not reach 1: measure what real images that were not trained on
    reach. float (N, d) and (M, d), N at least 2. Raises ValueError for features that do not fit.
    """
    return float((authenticities(real, generated) > 1).double().mean())


def authenticities(real: Any, generated: Any) -> torch.Tensor:
    """Each generated image's distance to its nearest real image, over that one's to its own nearest: float64 (M,).

    It is 1 or less for a copy, see `authenticity`; infinite where the real image has a twin, and the generated one is
    another. Arguments and errors as there.
    """
    real, generated = _matrices(real, generated, 2, 1, "authenticity")
    distance, index = _neighbours(generated, real, 1)
    own = _neighbours(real, None, 1)[0][index[:, 0], 0]
    return torch.where(distance[:, 0] == 0, 0.0, distance[:, 0] / own)


def compare(real: Any, generated: Any, features: str, k: int = NEIGHBOURS) -> dict[str, Any]:
    """All `MEASURES` of a generated set, float (M, d), against a real one, float (N, d), in ``features``.

    ``features``: their name, an extractor's ``name``. Beside the measures: "features", "num_real", "num_generated", and
    a "note", "" where there is nothing to say. Raises ValueError for fewer than k + 1 images, and features that do not
    fit.
    """
    neighbourhoods = precision_recall_density_coverage(real, generated, k)
    few, width = min(len(real), len(generated)), len(real[0])
    return {
        "features": features,
        "num_real": len(real),
        "num_generated": len(generated),
        "fd": frechet_distance(real, generated),
        **neighbourhoods,
        "authenticity": authenticity(real, generated),
        "note": f"{few} images for {width} features: the {distance_name(features)} is too large"
        if few <= width
        else "",
    }


def per_class(
    real: Any, generated: Any, real_labels: Any, labels: Any, features: str, k: int = NEIGHBOURS
) -> dict[int, dict[str, Any]]:
    """`compare` of each class's images: by class, of all that either set has, in order.

    ``real_labels`` and ``labels``: whole numbers (N,) and (M,), those of the real and the generated images. A class
    with fewer than k + 1 images of either kind has nan for each measure, and a "note" that says so. Raises ValueError
    for labels that are not one an image, and features that do not fit.
    """
    k = _k(k)
    real, generated = _matrix("real", real, 1, "a comparison"), _matrix("generated", generated, 1, "a comparison")
    real_labels, labels = _labels("real", real_labels, len(real)), _labels("generated", labels, len(generated))
    rows = {}
    for label in sorted({*real_labels.tolist(), *labels.tolist()}):
        of_real, of_generated = real[real_labels == label], generated[labels == label]
        if min(len(of_real), len(of_generated)) > k:
            rows[label] = compare(of_real, of_generated, features, k)
            continue
        rows[label] = {
            "features": features,
            "num_real": len(of_real),
            "num_generated": len(of_generated),
            **dict.fromkeys(MEASURES, math.nan),
            "note": f"{len(of_real)} real and {len(of_generated)} generated images: k = {k} takes {k + 1} of each",
        }
    return rows


def _labels(name: str, labels: Any, count: int) -> torch.Tensor:
    """``labels`` as whole numbers (N,) on the CPU; raises ValueError unless they are ``count`` of these."""
    labels = torch.as_tensor(labels)
    if labels.ndim != 1 or labels.is_floating_point() or len(labels) != count:
        raise ValueError(
            f"The labels of the {name} images are {labels.dtype} {tuple(labels.shape)}; they must be whole numbers "
            f"({count},), one an image."
        )
    return labels.cpu()
