"""Seeds and noise depend on what they are for, and no two of them are the same."""

import hashlib

import numpy as np
import pytest
import scipy.stats
import torch

from sdgen_lib.machine.seeds import derived, image_noise

# --- seeds ---


def test_a_derived_seed_is_numpys():
    """The formula once more, in numpy's other way of making a child: by the spawn key's own argument, from bytes."""
    digest = hashlib.sha256(b"table").digest()
    words = [int.from_bytes(digest[at : at + 4], "little") for at in range(0, 32, 4)]
    parent = np.random.SeedSequence([7, *words])
    child = parent.spawn(6)[5]  # the sixth child has the spawn key (5,)
    assert derived(7, "table", 5) == child.generate_state(1)[0]
    assert derived(7, "table") == parent.generate_state(1)[0]
    assert derived(7, "table", 5, 2) == child.spawn(3)[2].generate_state(1)[0]


def test_a_derived_seed_stays_what_it_is():
    """Stored results came from these."""
    assert [derived(0, "table", 0), derived(1, "table", 0), derived(0, "search")] == [1558078851, 760363269, 867058054]


def test_runs_share_no_seed():
    """Runs 0 and 1 with three classifiers each took seeds 0, 1, 2 and 1, 2, 3."""
    found = [
        derived(seed, purpose, *numbers)
        for seed in range(50)
        for purpose in ("table", "search", "")
        for numbers in [(), (0,), (1,), (2,), (0, 0), (0, 1), (1, 0)]
    ]
    assert len(set(found)) == len(found) == 50 * 3 * 7  # by chance, two of them would agree once in 8000 tries
    assert all(type(seed) is int and 0 <= seed < 2**32 for seed in found)


def test_derived_seeds_are_uniform():
    found = np.array([derived(0, "uniform", k) for k in range(4000)]) / 2**32
    assert scipy.stats.kstest(found, "uniform").pvalue > 0.001


@pytest.mark.parametrize(("seed", "numbers"), [(-1, ()), (2**32, ()), (0, (-1,)), (0, (1, 2**32)), (0, (10**5000,))])
def test_other_numbers_are_refused(seed, numbers):
    with pytest.raises(ValueError, match="must be a whole number from 0 to 4294967295, not "):
        derived(seed, "table", *numbers)
    with pytest.raises(TypeError):
        derived(1.5, "table")


def test_numpys_and_torchs_numbers_count_as_numbers():
    assert derived(np.int64(3), "table", torch.tensor(4), np.uint8(5)) == derived(3, "table", 4, 5)


# --- noise ---

SHAPE = (4, 2, 2)


def test_an_images_noise_is_philox_far_along():
    """The counter begins at i * 2**192: numpy gets there by skipping so many blocks, too."""
    noise = image_noise(7, "synthetic", [0, 1, 2**40 + 3], SHAPE)
    assert noise.dtype == torch.float32 and noise.shape == (3, *SHAPE) and noise.device.type == "cpu"
    key = int.from_bytes(hashlib.sha256(b"7:synthetic").digest()[:16], "little")
    for row, index in enumerate([0, 1, 2**40 + 3]):
        stream = np.random.Generator(np.random.Philox(key=key).advance(index * 2**192))
        expected = stream.standard_normal(SHAPE, dtype=np.float32)
        assert np.array_equal(noise[row].numpy(), expected)


def test_an_images_noise_does_not_depend_on_the_batch():
    whole = image_noise(0, "set", range(12), SHAPE)
    order = torch.tensor([7, 3, 11, 3])
    assert torch.equal(image_noise(0, "set", order, SHAPE), whole[order])
    assert torch.equal(torch.cat([image_noise(0, "set", range(at, at + 4), SHAPE) for at in (0, 4, 8)]), whole)


def test_no_two_images_of_a_large_set_begin_alike():
    """Seeds of 32 bits met after 75 000 images: 74650 and 84988 were the first pair."""
    noise = image_noise(0, "synthetic", range(120_000), (2,))
    assert len(torch.unique(noise, dim=0)) == len(noise)
    assert not torch.equal(noise[74650], noise[84988])


def test_sets_and_runs_share_no_noise():
    found = [image_noise(seed, name, [5], SHAPE) for seed in (0, 1, 10) for name in ("a", "b", "0:a", "")]
    assert len(torch.unique(torch.cat(found), dim=0)) == len(found)


def test_noise_is_standard_normal_and_uncorrelated():
    noise = image_noise(3, "set", range(2000), SHAPE).flatten(1).double().numpy()
    assert scipy.stats.kstest(noise.ravel(), "norm").pvalue > 0.001
    neighbours = np.corrcoef(noise[:-1].ravel(), noise[1:].ravel())[0, 1]
    assert abs(neighbours) < 4 / np.sqrt(noise.size)  # four standard errors


def test_edges():
    assert image_noise(0, "set", [], (2,)).shape == (0, 2)
    assert image_noise(0, "set", [2**64 - 1, 0], ()).shape == (2,)
    for wrong in (-1, 2**64):
        with pytest.raises(ValueError, match="an image's index must be a whole number from 0 to 18446744073709551615"):
            image_noise(0, "set", [3, wrong], SHAPE)
    with pytest.raises(ValueError, match="seed must be"):
        image_noise(2**32, "set", [0], SHAPE)
