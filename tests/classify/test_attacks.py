"""Attacks: against a closed form, and on trained networks."""

import dataclasses
import json

import pytest
import torch
from torch import nn

from sdgen_lib import classify, data
from sdgen_lib.classify import ATTACKS, Attack, fgsm, pgd
from sdgen_lib.classify.networks import NETWORKS, fraction_right, predict


class Linear(nn.Module):
    """One linear layer on the grey levels: its loss's gradient is W^T (softmax - one hot)."""

    def __init__(self, classes=3, size=4, seed=0):
        super().__init__()
        numbers = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(0.002 * torch.randn(classes, 3 * size * size, generator=numbers))

    def forward(self, images):
        return images.float().flatten(1) @ self.weight.T


def some(count=10, size=4, classes=3):
    numbers = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (count, 3, size, size), generator=numbers, dtype=torch.uint8)
    return images, torch.arange(count) % classes


@pytest.mark.parametrize("epsilon", [0.5, 2, 8])
def test_fgsm_of_a_linear_model_is_the_closed_form(epsilon):
    model, (images, labels) = Linear(), some()
    weight = model.weight.detach().double()
    x = images.double().flatten(1)
    slope = ((x @ weight.T).softmax(1) - nn.functional.one_hot(labels, 3)) @ weight
    expected = (x + epsilon * slope.sign()).clamp(0, 255).view_as(images)
    found = fgsm(model, images, labels, epsilon)
    assert found.dtype == torch.float32 and torch.equal(found.double(), expected)


def test_pgd_of_two_classes_and_a_linear_model_ends_in_the_worst_corner():
    """The gradient's sign is the same everywhere: enough steps lead to x + epsilon sign from any start."""
    model, (images, labels) = Linear(classes=2), some(classes=2)
    weight = model.weight.detach()
    towards = (weight[1] - weight[0]).sign() * (1 - 2 * labels)[:, None]
    worst = (images.flatten(1) + 3 * towards).clamp(0, 255).view_as(images)
    assert torch.equal(pgd(model, images, labels, epsilon=3, step=1, steps=6, seed=5), worst)


def small_net(name="resnet20", classes=10, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return classify.build(name, classes, **({"width": 4} if name == "resnet20" else {}), **options)


@pytest.mark.parametrize("attack", [Attack(2, 2), Attack(2, 0.5, 3, random_start=True), Attack(0.3, 0.2, 2)])
@pytest.mark.parametrize("name", ["resnet20", "resnet18", "mobilenet_v2"])
def test_no_attack_goes_further_than_it_may(name, attack):
    model, (images, labels) = small_net(name), some(6, 12, 10)
    images[0], images[1] = 0, 255
    found = attack(model, images, labels, batch_size=4)
    away = (found - images.float()).abs()
    assert found.shape == images.shape and 0 <= found.min() and found.max() <= 255
    assert away.max() <= attack.epsilon + 1e-4 and away.flatten(1).amax(1)[2:].min() > 0


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_takes_grey_levels_that_are_no_whole_numbers(name):
    """As it takes whole ones, and it is differentiable at them; vgg16 is large and only looked at on one image."""
    model, (images, _) = small_net(name).eval(), some(1, 32)
    levels = images.float().requires_grad_()
    logits = model(levels)
    assert torch.equal(logits, model(images))
    (slope,) = torch.autograd.grad(logits.square().sum(), levels)
    assert slope.abs().max() > 0


def test_the_model_is_left_as_it_was():
    model, (images, labels) = small_net(), some(6, 12, 10)
    model.train()
    model.stages[0].eval()  # a part of its own mode
    modes, state = [part.training for part in model.modules()], {k: v.clone() for k, v in model.state_dict().items()}
    model.stem[0].weight.grad = torch.ones_like(model.stem[0].weight)
    for attack in ATTACKS.values():
        with torch.no_grad():
            found = attack(model, images, labels)
        assert not found.requires_grad
    assert [part.training for part in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [n for n, p in model.named_parameters() if p.grad is not None] == ["stem.0.weight"]
    assert (model.stem[0].weight.grad == 1).all() and all(p.requires_grad for p in model.parameters())
    model.zero_grad()

    class Broken(Linear):
        def forward(self, images):
            raise RuntimeError("no answer")

    broken = Broken().train()
    with pytest.raises(RuntimeError, match="no answer"):
        fgsm(broken, *some(), 2)
    assert broken.training


def test_a_start_is_the_images_own_and_uniform():
    model = Linear(size=16)
    model.weight.data.zero_()  # nothing to climb: the attack stays at its start
    images = torch.full((40, 3, 16, 16), 100, dtype=torch.uint8)
    labels = torch.zeros(40).long()
    found = pgd(model, images, labels, epsilon=4, step=1, steps=1, seed=0) - 100
    assert found.abs().max() <= 4 and float(found.mean()) == pytest.approx(0, abs=0.05)
    shares = torch.histc(found, 8, -4, 4) / found.numel()
    assert torch.allclose(shares, torch.full((8,), 1 / 8), atol=0.01)
    attack = Attack(4, 1, random_start=True)
    assert torch.equal(attack(model, images, labels, batch_size=7) - 100, found)
    assert torch.equal(attack(model, images[:5], labels[:5]) - 100, found[:5])
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(pgd(model, images, labels, 4, 1, 1, seed=1) - 100, found)


def test_a_trained_network_loses_to_both_and_more_to_many_steps():
    digits = data.load("digits", image_size=16)
    model, _ = classify.train_classifier(digits.train, digits.val, 10, width=8, epochs=6, batch_size=64)
    test = digits.test.take(range(200))
    attacked = {"none": test.images} | {
        "small fgsm": fgsm(model, test.images, test.labels, 2),
        "fgsm": fgsm(model, test.images, test.labels, 16),
        "pgd": pgd(model, test.images, test.labels, 16, 4, 10),
    }
    found = {name: fraction_right(predict(model, images), test.labels) for name, images in attacked.items()}
    assert found["none"] > 0.9 and found["none"] >= found["small fgsm"] >= found["fgsm"] >= found["pgd"]
    assert found["none"] - found["fgsm"] > 0.1
    noise = 16 * (2 * torch.rand(test.images.shape, generator=torch.Generator().manual_seed(0)) - 1).sign()
    random = fraction_right(predict(model, (test.images + noise).clamp(0, 255)), test.labels)
    assert random > found["fgsm"] + 0.1  # it is the direction that does it, not its length
    losses = [
        nn.functional.cross_entropy(classify.networks.logits_of(model, images), test.labels)
        for images in attacked.values()
    ]
    assert losses == sorted(losses)


def test_attacks_are_data():
    assert [attack.epsilon for attack in ATTACKS.values()] == [2, 2]
    assert all(f"{attack.epsilon}/255" in name for name, attack in ATTACKS.items())
    for attack in ATTACKS.values():
        assert Attack(**json.loads(json.dumps(dataclasses.asdict(attack)))) == attack
    model, (images, labels) = small_net(), some(5, 12, 10)
    first, second = (attack(model, images, labels) for attack in ATTACKS.values())
    assert torch.equal(first, fgsm(model, images, labels, 2))
    assert torch.equal(second, pgd(model, images, labels, 2, 0.5, 10))


def test_an_epsilon_of_0_changes_nothing_and_no_image_is_none():
    images, labels = some()
    assert torch.equal(fgsm(Linear(), images, labels, 0), images.float())
    assert torch.equal(pgd(Linear(), images, labels, 0, 1, 3), images.float())
    assert fgsm(Linear(), images[:0], labels[:0], 2).shape == (0, 3, 4, 4)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((-1, 1), "epsilon is -1; it must be 0 or more"),
        ((float("nan"), 1), "epsilon is nan"),
        ((2, 0), "step is 0; it must be above 0"),
        ((2, 1, 0), "steps is 0; it must be a whole number from 1"),
    ],
)
def test_what_is_no_attack_is_refused(numbers, message):
    with pytest.raises(ValueError, match=message):
        Attack(*numbers)
