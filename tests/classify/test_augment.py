"""Augmentations do to each image what their papers say, and mix labels as they mix images."""

import pytest
import torch
from torch.nn.functional import cross_entropy, one_hot

from sdgen_lib import classify
from sdgen_lib.classify.augment import OF_A_BATCH, OF_AN_IMAGE, Augmentation

SIZE = 16


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture
def images():
    return torch.randint(1, 256, (24, 3, SIZE, SIZE), dtype=torch.uint8)


def of(names):
    return Augmentation(names, (SIZE, SIZE))


def test_the_names():
    names = "none crop_flip autoaugment randaugment augmix cutout mixup cutmix"
    assert set(classify.AUGMENTATIONS) == set(names.split())
    with pytest.raises(ValueError, match="Unknown augmentation 'mixop'. Did you mean 'mixup'"):
        of("crop_flip+mixop")


def test_none_is_false_and_does_nothing(images):
    assert not of("none") and of("crop_flip") and of("mixup")
    assert of("none").images(images) is images


def test_crop_flip_is_a_window_of_the_padded_image_or_its_mirror(images):
    """Two pixels around it, as 4 around CIFAR's 32: 5 x 5 windows, each as it is or mirrored."""
    found = of("crop_flip").images(images)
    assert found.dtype == torch.uint8 and found.shape == images.shape
    drawn = set()
    for before, after in zip(images, found):
        padded = torch.zeros(3, SIZE + 4, SIZE + 4, dtype=torch.uint8)
        padded[:, 2:-2, 2:-2] = before
        same = [
            (top, left, mirrored)
            for top in range(5)
            for left in range(5)
            for mirrored in (False, True)
            if torch.equal(after, _mirrored(padded[:, top : top + SIZE, left : left + SIZE], mirrored))
        ]
        assert len(same) == 1
        drawn.update(same)
    assert len(drawn) > 12  # each image has its own; 24 draws of 50 are about 19 different ones
    assert {mirrored for _, _, mirrored in drawn} == {False, True}


def _mirrored(image, mirrored):
    return image.flip(-1) if mirrored else image


def test_cutout_greys_a_square_of_half_the_side(images):
    found = of("cutout").images(images)
    corners = set()
    for before, after in zip(images, found):
        rows, columns = (after != before).any(0).nonzero().T
        top, left, bottom, right = rows.min(), columns.min(), rows.max() + 1, columns.max() + 1
        assert (bottom - top, right - left) == (SIZE // 2, SIZE // 2)
        assert (after[:, top:bottom, left:right] == 127).all()
        restored = after.clone()
        restored[:, top:bottom, left:right] = before[:, top:bottom, left:right]
        assert torch.equal(restored, before)
        corners.add((int(top), int(left)))
    assert len(corners) > 12  # of 81, in 24 images


@pytest.mark.parametrize("name", sorted(OF_AN_IMAGE))
def test_each_image_has_its_own_draw(name):
    """Of 32 equal images, which a batch-wise draw would leave equal."""
    same = torch.randint(0, 256, (1, 3, SIZE, SIZE), dtype=torch.uint8).repeat(32, 1, 1, 1)
    before, state = same.clone(), torch.get_rng_state()
    found = of(name).images(same)
    assert found.dtype == torch.uint8 and found.shape == same.shape and torch.equal(same, before)
    assert len(found.flatten(1).unique(dim=0)) > 8
    torch.set_rng_state(state)
    assert torch.equal(of(name).images(same), found)


def test_several_in_the_order_of_their_names(images):
    state = torch.get_rng_state()
    found = of("cutout+crop_flip").images(images)
    torch.set_rng_state(state)
    assert torch.equal(found, of("crop_flip").images(of("cutout").images(images)))
    both = of("mixup+crop_flip")
    assert len(both.of_an_image) == len(both.of_a_batch) == 1


def mixed(name, images, weights=None):
    """Each image its own class, so that the labels tell who is mixed with whom."""
    count = len(images)
    labels = one_hot(torch.arange(count), count).float()
    return of(name).mixed(images, labels, torch.ones(count) if weights is None else weights)


def pair(label):
    """Image 1, image 2 and the share of image 1."""
    share, index = label.topk(2)
    assert share.sum() == pytest.approx(1) and (label > 0).sum() <= 2
    return int(index[0]), int(index[1]), float(share[0])


@pytest.mark.parametrize("name", sorted(OF_A_BATCH))
def test_a_batch_keeps_its_images_and_weights(name, images):
    found, labels, weights = mixed(name, images)
    assert found.dtype == labels.dtype == weights.dtype == torch.float32
    assert torch.allclose(labels.sum(0), torch.ones(len(images)))  # each image is used up
    assert torch.allclose(weights, torch.ones(len(images)))


def test_mixup_is_the_sum_that_its_labels_say(images):
    seen = set()
    for found, label in zip(*mixed("mixup", images)[:2]):
        first, second, share = pair(label)
        assert torch.allclose(found, share * images[first].float() + (1 - share) * images[second].float(), atol=1e-3)
        seen.add((first - second) % len(images))
    assert len(seen) > 4  # who is mixed with whom does not follow from the order in the batch


def test_cutmix_is_a_rectangle_whose_area_its_labels_say(images):
    for _ in range(5):  # a rectangle may be empty
        for found, label in zip(*mixed("cutmix", images)[:2]):
            first, second, share = pair(label)
            from_first = (found == images[first]).all(0)
            assert ((found == images[second]).all(0) | from_first).all()
            assert float(from_first.float().mean()) == pytest.approx(share, abs=1e-6)
            assert is_rectangle(from_first) or is_rectangle(~from_first)


def is_rectangle(inside):
    if not inside.any():
        return False
    rows, columns = inside.nonzero().T
    return (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1) == inside.sum()


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_a_mixed_image_costs_the_mixture_of_its_weighted_losses(images, label_smoothing):
    count = len(images)
    weights = torch.rand(count) + 0.1
    state = torch.get_rng_state()
    _, labels, found = mixed("mixup", images, weights)
    torch.set_rng_state(state)
    _, plain, _ = mixed("mixup", images)
    logits = torch.randn(count, count)
    losses = cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing) * found
    assert found.sum() == pytest.approx(float(weights.sum()))
    for row in range(count):
        first, second, share = pair(plain[row])
        first_loss, second_loss = (
            cross_entropy(logits[row], torch.tensor(label), label_smoothing=label_smoothing)
            for label in (first, second)
        )
        expected = share * weights[first] * first_loss + (1 - share) * weights[second] * second_loss
        assert float(losses[row]) == pytest.approx(float(expected), rel=1e-4)
