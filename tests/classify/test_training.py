"""The training of a classifier: by the protocol, on mixtures, for an exact number of steps."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch.nn.functional import log_softmax, one_hot

from sdgen_lib import classify, data
from sdgen_lib.classify import Mixture, training
from sdgen_lib.classify.mixtures import Batches, batch_sizes
from sdgen_lib.data import Split


@pytest.fixture(scope="module")
def small():
    return data.load("digits:100", image_size=8)


def train_small(small, parts=None, **options):
    options = {"width": 4, "epochs": 6, "batch_size": 32, **options}
    return classify.train_classifier(small.train if parts is None else parts, small.val, 10, **options)


def equal_states(mine, theirs):
    return list(mine) == list(theirs) and all(torch.equal(value, theirs[name]) for name, value in mine.items())


def equal(model, other):
    return equal_states(model.state_dict(), other.state_dict())


def numbered(count, size=8):
    """Images that are known by their brightness, of class 0..9."""
    images = torch.arange(count, dtype=torch.uint8).view(count, 1, 1, 1).expand(count, 3, size, size)
    return Split(images.contiguous(), torch.arange(count) % 10)


@pytest.fixture
def seen(monkeypatch):
    """The batches of a training: lists of the numbers of `numbered` images."""
    batches, forward = [], classify.ResNet20.forward

    def watched(self, images):
        if self.training:
            batches.append(images[:, 0, 0, 0].tolist())
        return forward(self, images)

    monkeypatch.setattr(classify.ResNet20, "forward", watched)
    return batches


# --- the protocol -------------------------------------------------------------------------------------


def plain_loop(images, labels, val, epochs, batch_size, seed, loss_of):
    """The training written out; returns its best epoch's weights and the validation accuracies."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = classify.ResNet20(10, 4).to(memory_format=torch.channels_last)
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=True)
    images = images.contiguous(memory_format=torch.channels_last)
    history, states = [], []
    for _ in range(epochs):
        model.train()
        for rows in torch.randperm(len(labels), generator=order).split(batch_size):
            optimizer.zero_grad()
            loss_of(model(images[rows]), labels[rows], rows).backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            right = model(val.images).argmax(1) == val.labels
        history.append(int(right.sum()) / len(right))
        states.append(copy.deepcopy(model.state_dict()))
    return states[history.index(max(history))], history


OPTIONS = dict(epochs=3, batch_size=32, seed=4, learning_rate=0.01)


def test_it_is_the_plain_training_loop(small):
    smoothed = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
    expected, accuracies = plain_loop(
        small.train.images,
        small.train.labels,
        small.val,
        3,
        32,
        4,
        lambda logits, labels, rows: smoothed(logits, labels),
    )
    model, history = train_small(small, **OPTIONS)
    assert history == pytest.approx(accuracies) and equal_states(model.state_dict(), expected)
    # The parts of a mixture without a ratio are one set.
    parts = Mixture((small.train.take(range(30)), small.train.take(range(30, 100))))
    model, history = train_small(small, parts, **OPTIONS)
    assert history == pytest.approx(accuracies) and equal_states(model.state_dict(), expected)


def test_weights_of_parts_weigh_the_losses_of_their_images(small):
    weights = torch.tensor([3.0] * 30 + [0.5] * 70)

    def weighted(logits, labels, rows):
        targets = 0.9 * one_hot(labels, 10) + 0.1 / 10
        losses = -(targets * log_softmax(logits, 1)).sum(1)
        return (losses * weights[rows]).sum() / weights[rows].sum()

    train = small.train
    expected, accuracies = plain_loop(train.images, train.labels, small.val, 1, 32, 4, weighted)
    parts = Mixture((train.take(range(30)), train.take(range(30, 100))), weights=(3, 0.5))
    model, history = train_small(small, parts, **{**OPTIONS, "epochs": 1})
    assert history == pytest.approx(accuracies)
    assert torch.allclose(model.head.weight, expected["head.weight"], atol=1e-4)
    unweighted, _ = train_small(small, **{**OPTIONS, "epochs": 1})
    assert not torch.allclose(model.head.weight, unweighted.head.weight, atol=1e-3)


def test_the_best_epochs_weights_come_back(small, monkeypatch):
    """The accuracy goes up and down: its highest value first in the second of six epochs."""
    states, accuracies, scripted = [], [], [0.2, 0.5, 0.3, 0.5, 0.4, 0.1]
    real = training.accuracy
    monkeypatch.setattr(training, "accuracy", lambda model, split: scripted[len(states)])

    def on_epoch(epoch, model, value):
        assert epoch == len(states) + 1
        states.append({k: v.clone() for k, v in model.state_dict().items()})
        accuracies.append(value)

    model, history = train_small(small, on_epoch=on_epoch)
    assert history == accuracies == scripted
    assert all(torch.equal(v, states[1][k]) for k, v in model.state_dict().items())
    assert not all(torch.equal(v, states[1][k]) for k, v in states[3].items())  # there was something to restore
    monkeypatch.setattr(training, "accuracy", real)
    model, history = train_small(small)
    assert classify.accuracy(model, small.val) == max(history)


@pytest.fixture
def rates(monkeypatch):
    """The learning rate of each step."""
    found, step = [], torch.optim.Adam.step

    def watched(self, *args, **options):
        found.append(self.param_groups[0]["lr"])
        return step(self, *args, **options)

    monkeypatch.setattr(torch.optim.Adam, "step", watched)
    return found


NEVER = dict(width=4, batch_size=100, learning_rate=1e-3, plateau_patience=3, stop_patience=7)


def never_right(small):
    """Validation labels that are never predicted: the accuracy stays 0, the first epoch remains the best."""
    return Split(small.val.images[:10], torch.full((10,), 10))


def test_early_stopping_and_plateau(small, rates):
    _, history = classify.train_classifier(small.train, never_right(small), 11, epochs=30, **NEVER)
    assert history == [0.0] * 8  # the best one and seven more
    # One step an epoch. Epoch 1 sets the best; after 3 epochs without a better one the rate falls, and after 3 more.
    assert rates == pytest.approx([1e-3] * 4 + [1e-4] * 3 + [1e-5])


def keras_rates(accuracies, rate, patience, factor=0.1, min_delta=1e-4, min_lr=1e-5):
    """The rate of each epoch by Keras' documented rule of ReduceLROnPlateau (mode "max", no cooldown), written out."""
    best, wait, found = -np.inf, 0, []
    for accuracy in accuracies:
        found.append(rate)
        if accuracy > best + min_delta:
            best, wait = accuracy, 0
            continue
        wait += 1
        if wait >= patience and rate > min_lr:
            rate, wait = max(rate * factor, min_lr), 0
    return found


def keras_epochs(accuracies, patience):
    """How many epochs Keras' EarlyStopping (mode "max", min_delta 0) lets pass, written out."""
    best, wait = -np.inf, 0
    for epoch, accuracy in enumerate(accuracies, 1):
        wait += 1
        if accuracy > best:
            best, wait = accuracy, 0
        elif wait >= patience:
            return epoch
    return len(accuracies)


def scripted(monkeypatch, accuracies):
    """Makes a training's validation accuracies these."""
    left = iter(accuracies)
    monkeypatch.setattr(training, "accuracy", lambda model, split: next(left))


ONE_STEP = dict(width=4, batch_size=100)  # an epoch


@pytest.mark.parametrize("patience", [1, 2, 3, 5])
@pytest.mark.parametrize("rate", [1e-3, 3e-3, 1e-5, 2e-6])
@pytest.mark.parametrize("seed", range(3))
def test_patience_counts_as_keras_counts(small, rates, monkeypatch, patience, rate, seed):
    """On random walks, some of whose steps are smaller than the difference that counts as better."""
    random = np.random.default_rng(seed)
    accuracies = 0.5 + np.cumsum(random.choice([-0.01, -5e-5, 0.0, 5e-5, 9e-5, 2e-4, 0.01], size=40))
    scripted(monkeypatch, accuracies)
    patiences = {"plateau_patience": patience, "stop_patience": 6}
    _, history = classify.train_classifier(
        small.train, small.val, 10, epochs=40, learning_rate=rate, **patiences, **ONE_STEP
    )
    assert len(history) == keras_epochs(accuracies, 6)
    assert rates == pytest.approx(keras_rates(accuracies[: len(history)], rate, patience))


@pytest.mark.parametrize(("best", "ended"), [(10, 35), (6, 31)])
def test_the_protocols_patiences_are_those_of_the_published_trainings(small, rates, monkeypatch, best, ended):
    """The histories published with the paper (BloodMNIST, x9 and x1) have these best epochs, lengths and rates."""
    scripted(monkeypatch, [0.1 * (epoch == best) + 0.5 for epoch in range(1, 101)])
    _, history = classify.train_classifier(small.train, small.val, 10, **ONE_STEP)
    assert len(history) == ended
    assert rates == pytest.approx([1e-3] * (best + 10) + [1e-4] * 10 + [1e-5] * 5)


def test_on_epoch_and_on_step_can_stop(small):
    class Stop(Exception):
        pass

    seen = []

    def stop_at_two(number, *_):
        seen.append(number)
        if number == 2:
            raise Stop

    for name in ("on_epoch", "on_step"):
        seen.clear()
        with pytest.raises(Stop):
            train_small(small, **{name: stop_at_two})
        assert seen == [1, 2]


def test_epochs_of_a_large_set_end_early_and_go_on(small, seen):
    """25 images, 10 an epoch: after five epochs each was seen twice, never one a third time before all were."""
    train_small(small, numbered(25), epochs=5, batch_size=10, epoch_limit=10)
    assert [len(batch) for batch in seen] == [10] * 5
    stream = [value for batch in seen for value in batch]
    assert sorted(stream[:25]) == sorted(stream[25:]) == list(range(25)) and stream[:25] != stream[25:]


def test_of_a_large_validation_set_epochs_are_compared_by_a_part_and_the_best_one_is_measured_by_all(small):
    """The part has each class in its proportion, and is the same in every training."""
    part = training.looked_at(small.val, 40)
    assert len(part) == 40 and torch.equal(part.images, training.looked_at(small.val, 40).images)
    shares = part.labels.bincount(minlength=10) / 40 - small.val.labels.bincount(minlength=10) / len(small.val)
    assert shares.abs().max() < 0.05
    looked = []
    _, history = train_small(
        small, val_images=40, on_epoch=lambda epoch, model, _: looked.append(classify.accuracy(model, part))
    )
    assert history == looked
    result = classify.score(
        small.train, small.val, {}, 10, width=4, epochs=6, batch_size=32, val_images=40, on_epoch=None
    )
    model, _ = train_small(small, val_images=40)
    assert result.val_accuracy == classify.accuracy(model, small.val) != max(history)
    assert training.looked_at(small.val, None) is small.val is training.looked_at(small.val, len(small.val))


@pytest.mark.parametrize(("epoch_images", "passes"), [(1, 1), (10, 1), (11, 2), (25, 3), (30, 3)])
def test_an_epoch_passes_over_a_small_set_several_times(small, seen, epoch_images, passes):
    train_small(small, numbered(10), epochs=2, batch_size=10, epoch_images=epoch_images)
    stream = [value for batch in seen for value in batch]
    assert len(stream) == 2 * 10 * passes
    assert all(sorted(stream[k : k + 10]) == list(range(10)) for k in range(0, len(stream), 10))


# --- an exact number of steps -------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "measured_after"), [(1, [1]), (4, [4]), (5, [4, 5]), (12, [4, 8, 12])])
def test_exactly_so_many_steps(small, steps, measured_after):
    """100 images, 32 a batch: 4 steps an epoch."""
    taken, measured = [], []
    _, history = train_small(
        small, steps=steps, epochs=1, on_step=taken.append, on_epoch=lambda *_: measured.append(taken[-1])
    )
    assert taken == list(range(1, steps + 1))
    assert measured == measured_after and len(history) == len(measured)


def test_as_many_steps_as_so_many_epochs_are_the_same_training(small):
    model, history = train_small(small, epochs=3)
    other, same = train_small(small, steps=12)
    assert history == same and equal(model, other)


def test_steps_are_taken_without_early_stopping(small, rates):
    _, history = classify.train_classifier(small.train, never_right(small), 11, steps=20, **NEVER)
    assert len(history) == len(rates) == 20
    assert rates[5] == pytest.approx(1e-4)  # the plateaus stay


@pytest.mark.parametrize("steps", [0, -3])
def test_no_steps_are_an_error(small, steps):
    with pytest.raises(ValueError, match="steps"):
        train_small(small, steps=steps)


# --- mixtures -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "batch_size", "counts"),
    [
        ((1, 7), 8, [1, 7]),
        ((1, 1), 256, [128, 128]),
        ((1, 7), 20, [3, 17]),  # 2.5 and 17.5: the first of equal remainders
        ((1, 2, 3), 32, [5, 11, 16]),  # 5.33, 10.67, 16
        ((2, 0, 1), 10, [7, 0, 3]),
        ((3,), 5, [5]),
    ],
)
def test_shares_of_a_batch(ratio, batch_size, counts):
    assert Mixture((numbered(9),) * len(ratio), ratio).shares(batch_size) == counts


@pytest.mark.parametrize("batch_size", [7, 8, 31, 64, 101])
@pytest.mark.parametrize("ratio", [(1, 2), (3, 5, 7), (1, 1, 1, 1)])
def test_shares_are_within_one_image_of_the_ratio(ratio, batch_size):
    counts = Mixture((numbered(9),) * len(ratio), ratio).shares(batch_size)
    assert sum(counts) == batch_size
    assert all(abs(count - Fraction(batch_size * part, sum(ratio))) < 1 for count, part in zip(counts, ratio))


def test_each_batch_keeps_the_ratio_and_each_part_its_queue(small, seen):
    """11 images of part 0 and 60 of part 1, 2 and 6 a batch: 9 steps an epoch, as 71 images would have."""
    both = numbered(71)
    mixture = Mixture((both.take(range(11)), both.take(range(11, 71))), ratio=(1, 3))
    train_small(small, mixture, epochs=2, batch_size=8)
    assert [len(batch) for batch in seen] == [8] * 18
    first, second = ([v for batch in seen for v in batch if (v < 11) == part] for part in (True, False))
    assert all(sum(v < 11 for v in batch) == 2 for batch in seen)
    for stream, numbers in ((first, range(11)), (second, range(11, 71))):
        size = len(numbers)
        passes = [stream[start : start + size] for start in range(0, len(stream), size)]
        for one in passes[:-1]:
            assert sorted(one) == list(numbers)
        assert len(set(passes[-1])) == len(passes[-1])
        assert passes[0] != sorted(passes[0]) and (len(passes) < 3 or passes[0] != passes[1])


def test_an_epoch_has_the_steps_of_the_concatenation():
    for options in (
        dict(epoch_size=71, batch_size=8),
        dict(epoch_size=5, batch_size=8),
        dict(epoch_size=64, batch_size=8),
    ):
        parts = (numbered(4), numbered(67))
        mixed, joined = (len(Batches(Mixture(parts, ratio), smallest=1, seed=0, **options)) for ratio in ((1, 1), None))
        assert mixed == joined


def test_the_parts_have_orders_of_their_own():
    """Two equal parts: what is drawn of one says nothing of the other; another seed, another order."""
    batches = Batches(Mixture((numbered(20), numbered(20)), (1, 1)), 40, 40, 1, seed=0)
    (rows,) = batches
    assert rows[:20].max() < 20 <= rows[20:].min()
    assert rows[:20].tolist() != (rows[20:] - 20).tolist()
    (others,) = Batches(Mixture((numbered(20), numbered(20)), (1, 1)), 40, 40, 1, seed=1)
    assert others[:20].tolist() != rows[:20].tolist() and others[20:].tolist() != rows[20:].tolist()


def test_soft_labels_that_are_certain_are_hard_labels(small):
    soft = Split(small.train.images, one_hot(small.train.labels, 10).double())
    model, history = train_small(small, epochs=1)
    other, same = train_small(small, soft, epochs=1)
    assert history == same and torch.allclose(model.head.weight, other.head.weight, atol=1e-4)
    part, rest = soft.take(range(40)), small.train.take(range(40, 100))
    third, same = train_small(small, Mixture((part, rest)), epochs=1)
    assert history == same and equal(third, other)


def test_soft_labels_are_learnt(small):
    """Each image is class 3 with probability 0.7, class 5 with 0.3: so says the model."""
    labels = torch.zeros(100, 10)
    labels[:, 3], labels[:, 5] = 0.7, 0.3
    soft, val = Split(small.train.images, labels), Split(small.val.images, torch.full_like(small.val.labels, 3))
    options = dict(steps=80, epoch_images=8000, batch_size=100, label_smoothing=0.0, learning_rate=0.02)
    model, _ = classify.train_classifier(soft, val, 10, width=4, **options)
    with torch.no_grad():
        probabilities = model.eval()(small.train.images).softmax(1).mean(0)
    assert probabilities[3] == pytest.approx(0.7, abs=0.05) and probabilities[5] == pytest.approx(0.3, abs=0.05)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda a, b: Mixture(()), "at least one image"),
        (lambda a, b: Mixture((a.take([]),)), "at least one image"),
        (lambda a, b: Mixture((a, numbered(4, size=16))), r"\(3, 8, 8\), \(3, 16, 16\)"),
        (lambda a, b: Mixture((a, b), ratio=(1,)), "ratio has 1 numbers; .* each of 2 parts"),
        (lambda a, b: Mixture((a, b), weights=(1, 2, 3)), "weights has 3 numbers"),
        (lambda a, b: Mixture((a, b), ratio=(0, 0)), "not all of them 0"),
        (lambda a, b: Mixture((a, b), ratio=(-1, 2)), "whole numbers from 0"),
        (lambda a, b: Mixture((a, b), ratio=(0.5, 0.5)), "whole numbers from 0"),
        (lambda a, b: Mixture((a, b), weights=(0, 1)), "above 0"),
        (lambda a, b: Mixture((a, b), weights=(float("nan"), 1)), "above 0"),
        (lambda a, b: Mixture((a, b.take([])), ratio=(1, 1)), r"the parts have \[9, 0\] images"),
        (lambda a, b: Mixture((a, b), ratio=(1, 99)).shares(8), "too small for the ratio"),
    ],
)
def test_parts_that_do_not_fit_are_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make(numbered(9), numbered(5))


def test_probabilities_of_other_classes_are_an_error(small):
    with pytest.raises(ValueError, match="10 columns"):
        train_small(small, Split(small.train.images, torch.ones(100, 9) / 9))


# --- networks and augmentations -----------------------------------------------------------------------


def test_unknown_names_are_errors(small):
    for options in (dict(network="resnet21"), dict(shortcut="none"), dict(augmentation="mix_up")):
        with pytest.raises(ValueError, match="Unknown .* Allowed"):
            train_small(small, **options)


@pytest.mark.parametrize("network", ["resnet18", "mobilenet_v2", "shufflenet_v2_x1_0", "efficientnet_b0"])
def test_another_network_is_trained(small, network):
    taken = []
    model, history = train_small(small, small.train.take(range(33)), network=network, epochs=1, on_step=taken.append)
    assert isinstance(model, classify.networks.TorchvisionNetwork) and len(history) == 1
    assert taken == [1]  # the one image that is left of 32 joins them


@pytest.mark.parametrize("augmentation", ["mixup", "crop_flip+cutout"])
def test_it_learns_with_an_augmentation(augmentation):
    digits = data.load("digits", image_size=8)
    options = dict(width=8, epochs=8, batch_size=64, learning_rate=3e-3, augmentation=augmentation)
    _, history = classify.train_classifier(digits.train, digits.val, 10, **options)
    assert max(history) > 0.6


@pytest.mark.parametrize("augmentation", ["crop_flip", "mixup"])
def test_augmentation_changes_what_the_network_sees(small, seen, augmentation):
    part = numbered(100)
    train_small(small, part, epochs=1, batch_size=100)
    plain = seen.copy()
    train_small(small, part, epochs=1, batch_size=100, augmentation=augmentation)
    assert sorted(plain[0]) == list(range(100)) and sorted(seen[1]) != list(range(100))


def test_weights_and_mixing_go_together(small):
    """All the weight on one part is (nearly) a training on labels of this part alone."""
    other = Split(small.train.images, (small.train.labels + 1) % 10)
    for augmentation in ("mixup", "cutmix"):
        mixture = Mixture((small.train, other), ratio=(1, 1), weights=(1, 1e-6))
        model, _ = train_small(small, mixture, steps=80, augmentation=augmentation, learning_rate=0.01)
        assert classify.accuracy(model, small.train) > 0.6


@pytest.mark.parametrize(("images", "batch_size"), [(33, 32), (5, 1), (1, 8)])
def test_a_last_batch_of_one_image_is_no_obstacle(small, images, batch_size):
    model, history = train_small(small, small.train.take(range(images)), epochs=1, batch_size=batch_size)
    assert len(history) == 1
    with torch.random.fork_rng():
        torch.manual_seed(0)
        untrained = classify.ResNet20(10, 4)
    assert not torch.equal(model.head.weight, untrained.head.weight)  # it has trained at all


@pytest.mark.parametrize(
    ("epoch_size", "batch_size", "smallest", "sizes"),
    [
        (65, 32, 1, [32, 32, 1]),
        (65, 32, 2, [32, 33]),
        (66, 32, 2, [32, 32, 2]),
        (64, 32, 2, [32, 32]),
        (20, 32, 2, [20]),
        (3, 2, 2, [3]),
        (1, 32, 1, [1]),
    ],
)
def test_sizes_of_batches(epoch_size, batch_size, smallest, sizes):
    assert batch_sizes(epoch_size, batch_size, smallest) == sizes


@pytest.mark.parametrize(("images", "batch_size"), [(1, 32), (40, 1)])
def test_one_image_a_batch_is_an_error_for_the_networks_that_cannot(small, images, batch_size):
    with pytest.raises(ValueError, match="needs 2 images in each training step"):
        train_small(small, small.train.take(range(images)), network="resnet18", batch_size=batch_size)


# --- random numbers -----------------------------------------------------------------------------------

DRAWING = {
    "plain": dict(),
    "augmented": dict(augmentation="crop_flip+randaugment+mixup"),
    "mixed": dict(ratio=(1, 3)),
    "dropout": dict(network="mobilenet_v2", batch_size=50),
}


def drawn(small, name, seed=5):
    options = dict(DRAWING[name])
    ratio = options.pop("ratio", None)
    parts = Mixture((small.train.take(range(30)), small.train.take(range(30, 100))), ratio)
    return train_small(small, parts, **{"epochs": 2, "seed": seed, **options})


@pytest.mark.parametrize("name", DRAWING)
def test_the_seed_decides_and_nothing_else(small, name):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    model, history = drawn(small, name)
    assert torch.equal(torch.get_rng_state(), state)  # the caller's random numbers are left alone
    torch.manual_seed(2)
    again, same = drawn(small, name)
    assert history == same and equal(model, again)
    other, _ = drawn(small, name, seed=6)
    assert not equal(model, other)


def test_trainings_in_threads_are_those_one_by_one(small):
    works = [(name, seed) for name in DRAWING for seed in (5, 6)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = [drawn(small, *work) for work in works]
        start = threading.Barrier(4)

        def together(work):
            torch.set_num_threads(1)
            start.wait(60)
            return drawn(small, *work)

        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(together, works))
    finally:
        torch.set_num_threads(threads)
    for (model, history), (expected, same) in zip(found, alone):
        assert history == same and equal(model, expected)
