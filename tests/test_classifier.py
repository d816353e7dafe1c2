"""ResNet20 as in its paper, and its training by the protocol."""

import pytest
import torch

from sdgen_lib import classifier, data
from sdgen_lib.data import Split


def count(model):
    return sum(p.numel() for p in model.parameters())


def expected_count(classes, w):
    """Convolutions 9 in out, normalisation 2 each; 1 + 18 of them; a linear head."""
    stem = 3 * w * 9 + 2 * w
    stages = sum(
        before * after * 9 + 2 * after + 5 * (after * after * 9 + 2 * after)
        for before, after in ((w, w), (w, 2 * w), (2 * w, 4 * w))
    )
    return stem + stages + 4 * w * classes + classes


@pytest.mark.parametrize(
    ("classes", "width", "millions"), [(10, 16, 0.27), (10, 64, 4.29), (2, 16, 0.27), (9, 8, 0.07)]
)
def test_parameters(classes, width, millions):
    model = classifier.ResNet20(classes, width)
    assert count(model) == expected_count(classes, width)
    assert round(count(model) / 1e6, 2) == millions


def test_twenty_layers_with_weights():
    model = classifier.ResNet20(10)
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    assert len(layers) == 20


@pytest.mark.parametrize(("channels", "stride"), [(4, 1), (8, 2)])
def test_a_block_that_adds_nothing_is_its_shortcut(channels, stride):
    block = classifier.Block(4, channels, stride)
    torch.nn.init.zeros_(block.norm2.weight)
    x = torch.randn(2, 4, 6, 6)
    found = block(x)
    assert found.shape == (2, channels, 6 // stride, 6 // stride)
    assert torch.equal(found[:, :4], x[:, :, ::stride, ::stride].clamp(min=0))
    assert (found[:, 4:] == 0).all()


@pytest.mark.parametrize("size", [4, 7])
def test_the_released_codes_shortcut_is_max_pooling(size):
    block = classifier.Block(4, 8, 2, "max_pool")
    torch.nn.init.zeros_(block.norm2.weight)
    x = torch.rand(2, 4, size, size)
    found, half = block(x), (size + 1) // 2
    assert found.shape == (2, 8, half, half)
    for i in range(half):
        for j in range(half):
            corner = x[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
            assert torch.equal(found[:, :4, i, j], corner.amax((2, 3)))
    assert (found[:, 4:] == 0).all()


@pytest.mark.parametrize("shortcut", ["subsample", "max_pool"])
@pytest.mark.parametrize("size", [8, 16, 28, 32])
def test_any_size(size, shortcut):
    images = torch.randint(0, 256, (3, 3, size, size), dtype=torch.uint8)
    assert classifier.ResNet20(7, shortcut=shortcut)(images).shape == (3, 7)


def test_accuracy_and_predict():
    """A model that answers with the brightest colour channel."""

    class Brightest(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.unused = torch.nn.Parameter(torch.zeros(1))

        def forward(self, images):
            return images.float().mean((2, 3))

    images = torch.zeros(7, 3, 8, 8, dtype=torch.uint8)
    images[torch.arange(7), torch.tensor([0, 1, 2, 0, 1, 2, 2])] = 200
    assert classifier.predict(Brightest(), images, batch_size=3).tolist() == [0, 1, 2, 0, 1, 2, 2]
    assert classifier.accuracy(Brightest(), Split(images, torch.tensor([0, 1, 2, 0, 0, 0, 2]))) == pytest.approx(5 / 7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_learns_the_digits(dtype):
    digits = data.load("digits")
    found = classifier.score(
        digits.train.images, digits.train.labels, digits.val, digits.test, 10, epochs=15, batch_size=64, dtype=dtype
    )
    assert found.test_accuracy > 0.95 and found.val_accuracy > 0.95
    assert 1 <= found.best_epoch <= found.epochs == 15


@pytest.fixture(scope="module")
def small():
    return data.load("digits:100", image_size=8)


def train_small(small, **options):
    return classifier.train_classifier(
        small.train.images, small.train.labels, small.val, 10, **{"width": 4, "epochs": 6, "batch_size": 32, **options}
    )


def test_the_best_epochs_weights_come_back(small, monkeypatch):
    """The accuracy goes up and down: its highest value first in the second of six epochs."""
    states, accuracies, scripted = [], [], [0.2, 0.5, 0.3, 0.5, 0.4, 0.1]
    real = classifier.accuracy
    monkeypatch.setattr(classifier, "accuracy", lambda model, split: scripted[len(states)])

    def on_epoch(epoch, model, value):
        assert epoch == len(states) + 1
        states.append({k: v.clone() for k, v in model.state_dict().items()})
        accuracies.append(value)

    model, history = train_small(small, on_epoch=on_epoch)
    assert history == accuracies == scripted
    assert all(torch.equal(v, states[1][k]) for k, v in model.state_dict().items())
    assert not all(torch.equal(v, states[1][k]) for k, v in states[3].items())  # there was something to restore
    monkeypatch.setattr(classifier, "accuracy", real)
    model, history = train_small(small)
    assert classifier.accuracy(model, small.val) == max(history)


def test_score_reports_that_epoch(small):
    found = classifier.score(small.train.images, small.train.labels, small.val, small.test, 10, width=4, epochs=12,
                             batch_size=32, learning_rate=0.1)  # fmt: skip
    model, history = train_small(small, epochs=12, learning_rate=0.1)
    predicted = classifier.predict(model, small.test.images)
    assert found == classifier.Score(
        max(history), classifier.accuracy(model, small.test), history.index(max(history)) + 1, 12, predicted
    )
    assert torch.equal(found.predicted, predicted)


def test_early_stopping_and_plateau(small, monkeypatch):
    """Validation labels that are never predicted: the accuracy stays 0, the first epoch remains the best."""
    never = Split(small.val.images[:10], torch.full((10,), 10))
    rates, step = [], torch.optim.Adam.step

    def watched(self, *args, **options):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args, **options)

    monkeypatch.setattr(torch.optim.Adam, "step", watched)
    _, history = classifier.train_classifier(
        small.train.images, small.train.labels, never, 11, width=4, epochs=30, batch_size=100, learning_rate=1e-3,
        plateau_patience=3, stop_patience=7,
    )  # fmt: skip
    assert history == [0.0] * 8  # the best one and seven more
    # One step an epoch. Epoch 1 sets the best; after 3 epochs without a better one, the fourth lowers the rate.
    assert rates == pytest.approx([1e-3] * 5 + [1e-4] * 3)


def test_the_seed_decides_and_nothing_else(small):
    torch.manual_seed(1)
    model, history = train_small(small, epochs=2, seed=5)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    again, same = train_small(small, epochs=2, seed=5)
    assert history == same
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in again.state_dict().items())
    other, _ = train_small(small, epochs=2, seed=6)
    assert not torch.equal(other.head.weight, model.head.weight)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)  # the caller's random numbers are left alone


def test_on_epoch_can_stop(small):
    class Stop(Exception):
        pass

    seen = []

    def on_epoch(epoch, model, value):
        seen.append(epoch)
        if epoch == 2:
            raise Stop

    with pytest.raises(Stop):
        train_small(small, on_epoch=on_epoch)
    assert seen == [1, 2]


def test_epochs_of_a_large_set_end_early_and_go_on(small, monkeypatch):
    """25 images, 10 an epoch: after five epochs each was seen twice, never one a third time before all were."""
    seen, forward = [], classifier.ResNet20.forward

    def watched(self, images):
        if self.training:
            seen.append(images[:, 0, 0, 0].tolist())
        return forward(self, images)

    monkeypatch.setattr(classifier.ResNet20, "forward", watched)
    images = torch.arange(25, dtype=torch.uint8).view(25, 1, 1, 1).expand(25, 3, 8, 8)
    classifier.train_classifier(
        images, torch.arange(25) % 10, small.val, 10, width=4, epochs=5, batch_size=10, epoch_limit=10
    )
    assert [len(batch) for batch in seen] == [10] * 5
    stream = [value for batch in seen for value in batch]
    assert sorted(stream[:25]) == sorted(stream[25:]) == list(range(25)) and stream[:25] != stream[25:]


@pytest.mark.parametrize(("epoch_images", "passes"), [(1, 1), (10, 1), (11, 2), (25, 3), (30, 3)])
def test_an_epoch_passes_over_a_small_set_several_times(small, monkeypatch, epoch_images, passes):
    """Ten images, each known by its own brightness."""
    images = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1).expand(10, 3, 8, 8).contiguous()
    seen, forward = [], classifier.ResNet20.forward

    def watched(self, images):
        seen.extend(images[:, 0, 0, 0].tolist() if self.training else [])
        return forward(self, images)

    monkeypatch.setattr(classifier.ResNet20, "forward", watched)
    classifier.train_classifier(
        images, torch.arange(10), small.val, 10, width=4, epochs=2, batch_size=10, epoch_images=epoch_images
    )
    assert len(seen) == 2 * 10 * passes
    assert all(sorted(seen[k : k + 10]) == list(range(10)) for k in range(0, len(seen), 10))


@pytest.mark.parametrize(("images", "batch_size"), [(33, 32), (5, 1), (1, 8)])
def test_a_last_batch_of_one_image_is_no_obstacle(small, images, batch_size):
    part = small.train.take(range(images))
    model, history = classifier.train_classifier(
        part.images, part.labels, small.val, 10, width=4, epochs=1, batch_size=batch_size
    )
    assert len(history) == 1
    with torch.random.fork_rng():
        torch.manual_seed(0)
        untrained = classifier.ResNet20(10, 4)
    assert not torch.equal(model.head.weight, untrained.head.weight)  # it has trained at all
