"""Pictures of Diffusion Inversion: what stands where, and that it is drawn from the vectors it says."""

import numpy as np
import pytest
import torch

from sdgen_lib.methods.inversion import InversionMethod
from sdgen_lib.show import inversion_figures


@pytest.fixture(scope="module")
def method(small, tmp_path_factory):
    return InversionMethod(small(tmp_path_factory.mktemp("figures")).workspace)


def shown(figure):
    """The pictures of a grid in its order, uint8 (H, W, 3)."""
    return [ax.images[0].get_array() for ax in figure.axes if ax.images]


def as_array(images):
    return [image.permute(1, 2, 0).numpy() for image in images]


def same(pictures, images):
    return all(np.array_equal(a, b) for a, b in zip(pictures, as_array(images), strict=True))


def test_the_first_of_each_class_come_first(method):
    labels = method.ws.data.train.labels
    rows = inversion_figures.one_of_each(method, 4)
    assert sorted(labels[rows[:2]].tolist()) == [0, 1] and len(set(rows)) == 4


def test_the_ends_of_a_mixture_are_the_two_vectors(method):
    vectors = method.vectors().vectors
    contexts = inversion_figures.mixed(method, 1, 4, [0.0, 0.25, 1.0])
    expected = torch.stack([vectors[1], 0.75 * vectors[1] + 0.25 * vectors[4], vectors[4]])
    torch.testing.assert_close(contexts, expected)


def test_a_row_of_noise_begins_with_the_real_image_and_its_own_vector(method):
    pictures = shown(inversion_figures.by_noise(method, [2], [0.0, 5.0]))
    assert same(pictures[:1], method.ws.data.train.images[[2]])
    start = inversion_figures.image_noise(0, inversion_figures.START, [2], method.ws.backbone.latent_shape)
    # Drawn alone here and in a batch there: sums of floats may end in another last digit, so a level of 1 of 255.
    alone = as_array(method.draw(method.vectors().vectors[[2]], start))[0].astype(int)
    assert np.abs(pictures[1].astype(int) - alone).max() <= 1
    assert np.abs(pictures[2].astype(int) - alone).max() > 1


def test_a_row_of_mixtures_stands_between_its_real_images(method):
    figure = inversion_figures.by_mixing(method, [(0, 3)], [0.0, 1.0])
    pictures = shown(figure)
    assert same([pictures[0], pictures[-1]], method.ws.data.train.images[[0, 3]]) and len(pictures) == 4


def test_the_walk_goes_where_its_sliders_say(method):
    walk = inversion_figures.Walk(method, 0, 3)
    train = method.ws.data.train.images
    walk.share.value = 1.0
    contexts = method.vectors().vectors[[3]]
    start = inversion_figures.image_noise(0, inversion_figures.START, [0], method.ws.backbone.latent_shape)
    assert (walk.way[-1].int() - method.draw(contexts, start)[0].int()).abs().max() <= 1
    assert "100% of the second" in walk.words.value
    walk.second.value = 5
    assert same(shown(walk._draw())[2:], train[[5]]) and len(shown(walk.still())) == 13
    assert walk._repr_mimebundle_()["image/png"]
