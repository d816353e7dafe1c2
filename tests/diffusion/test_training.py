"""The one training loop: what trains, what it learns, and that one that goes on ends as an unbroken one."""

import copy
import dataclasses
import functools
import math
import sys
import threading

import flat
import pytest
import torch
from flat import VALUES, FlatModel, SmallCard, flat_contexts, flat_latents

from sdgen_lib.diffusion import backbone
from sdgen_lib.diffusion.conditions import Condition, ContextTable
from sdgen_lib.diffusion.training import Latents, TrainingState, fit, held_out_losses, optimizer_for

OPTIONS = dict(epochs=3, batch_size=8, learning_rate=1e-3, weight_decay=0.0, clip_norm=10.0, seed=0)


def latents_for(shape, count=20, classes=2, seed=0):
    """Each class has a mean of its own."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    means = torch.linspace(-1, 1, classes)[labels].view(-1, 1, 1, 1)
    return Latents(means + 0.2 * torch.randn(count, *shape, generator=generator), labels)


@pytest.fixture
def contexts():
    """Of two classes, for the tiny model."""
    return flat.Contexts(torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(0)))


def named(module):
    return dict(module.named_parameters())


def train_tiny(model, contexts, what, **changes):
    trainable = named({"contexts": contexts, "unet": model.unet}[what])
    return fit(trainable, model, contexts, latents_for((8, 8, 8)), **{**OPTIONS, **changes})


def train_flat(model=None, contexts=None, count=30, **changes):
    """The contexts that three classes' flat images teach, and the losses of the epochs."""
    contexts = contexts or flat_contexts()
    epochs = fit(named(contexts), model or FlatModel(), contexts, flat_latents(count), **{**OPTIONS, **changes})
    return contexts, [epoch.loss for epoch in epochs]


def weights(*modules):
    return [{name: value.clone() for name, value in module.state_dict().items()} for module in modules]


def same(one, other):
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("what", ["contexts", "unet"])
def test_only_what_is_named_trains(tiny_copy, contexts, what):
    modules = (contexts, tiny_copy.unet, tiny_copy.vae, tiny_copy.text_encoder)
    contexts.requires_grad_(False)
    before = weights(*modules)
    epochs = list(train_tiny(tiny_copy, contexts, what, epochs=2))
    changed = [not same(old, new) for old, new in zip(before, weights(*modules), strict=True)]
    assert changed == [what == "contexts", what == "unet", False, False]
    for parameter in (p for module in modules for p in module.parameters()):
        assert not parameter.requires_grad and parameter.grad is None  # a large UNet's gradients are gigabytes
    assert [epoch.number for epoch in epochs] == [1, 2] and all(math.isfinite(epoch.loss) for epoch in epochs)


def test_a_training_that_is_left_early_leaves_everything_frozen(tiny_copy, contexts):
    training = train_tiny(tiny_copy, contexts, "contexts", gradient_checkpointing=True)
    next(training)
    assert contexts.contexts.requires_grad and tiny_copy.unet.is_gradient_checkpointing
    training.close()
    assert not contexts.contexts.requires_grad and contexts.contexts.grad is None
    assert not tiny_copy.unet.is_gradient_checkpointing


def test_a_trained_unet_is_no_more_what_its_name_says(tiny_copy, contexts):
    """Its weights are put in place anew; a training of something else leaves them."""
    loaded = []
    pretrained = weights(tiny_copy.unet)[0]

    def put():
        tiny_copy.put_unet("mine", lambda: loaded.append(1) or pretrained)

    put()
    list(train_tiny(tiny_copy, contexts, "contexts", epochs=1))
    put()
    assert loaded == [1] and tiny_copy.unet_key == "mine"
    list(train_tiny(tiny_copy, contexts, "unet", epochs=1))
    assert tiny_copy.unet_key is None and not same(weights(tiny_copy.unet)[0], pretrained)
    put()
    assert loaded == [1, 1] and same(weights(tiny_copy.unet)[0], pretrained)


def test_the_unets_loss_falls(tiny_copy, contexts):
    """Latents like none that the tiny UNet has seen, learnt by heart."""

    def right():
        return held_out_losses(tiny_copy, contexts, latents_for((8, 8, 8), count=6, seed=1), 2)["right"]

    found = [right() for _ in train_tiny(tiny_copy, contexts, "unet", epochs=6)]
    assert found[-1] < 0.9 * found[0]


# --- a model whose right answers are known ---


def test_held_out_losses_by_hand():
    """Right contexts cost nothing; another one the mean squared difference of the two classes' channel values."""
    found = held_out_losses(FlatModel(), flat_contexts(VALUES), flat_latents(30), 3, batch_size=7)
    assert found["right"] == pytest.approx(0, abs=1e-10)
    assert found["empty"] == pytest.approx(float(VALUES.square().mean()), rel=1e-4)
    pairs = [float((VALUES[i] - VALUES[j]).square().mean()) for i in range(3) for j in range(3) if i != j]
    assert min(pairs) < found["wrong"] < max(pairs)  # which wrong label is drawn by chance
    whole = flat_latents(30)
    two = Latents(whole.latents[whole.labels < 2], whole.labels[whole.labels < 2])
    found = held_out_losses(FlatModel(), flat.Contexts(VALUES[:2, None]), two, 2)
    assert found["wrong"] == pytest.approx(float((VALUES[0] - VALUES[1]).square().mean()), rel=1e-4)  # the only other


def test_held_out_losses_repeat_themselves(tiny, contexts):
    held_out = latents_for((8, 8, 8), count=5)
    one = held_out_losses(tiny, contexts, held_out, 2)
    torch.manual_seed(77)
    assert one == held_out_losses(tiny, contexts, held_out, 2)
    again = held_out_losses(tiny, contexts, held_out, 2, batch_size=2)
    assert all(again[kind] == pytest.approx(one[kind], rel=1e-4) for kind in one)


def test_each_classs_context_is_learnt():
    contexts, losses = train_flat(epochs=60, learning_rate=0.1)
    torch.testing.assert_close(contexts.contexts[:, 0], VALUES, atol=0.02, rtol=0)
    assert losses[0] > 0.3 and losses[-1] < 1e-3
    last = held_out_losses(FlatModel(), contexts, flat_latents(9), 3)
    assert last["right"] < 1e-3 and last["wrong"] > 1 and last["empty"] > 0.1


@pytest.fixture
def rates(monkeypatch):
    """The learning rate of every step."""
    seen, step = [], torch.optim.AdamW.step

    def recorded(self, *args, **options):
        seen.append(self.param_groups[0]["lr"])
        return step(self, *args, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", recorded)
    return seen


def test_the_learning_rate_is_a_cosine_to_zero(rates):
    train_flat(epochs=4, batch_size=9, learning_rate=0.02)
    total = 4 * math.ceil(30 / 9)
    assert len(rates) == total == 16
    assert rates == pytest.approx([0.01 * (1 + math.cos(math.pi * k / total)) for k in range(total)])


def test_weight_decay_and_clipping_reach_the_optimiser(monkeypatch):
    made, clipped, adamw = [], [], torch.optim.AdamW
    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(
        torch.optim, "AdamW", lambda groups, **options: made.append((groups, options)) or adamw(groups, **options)
    )
    monkeypatch.setattr(
        torch.nn.utils, "clip_grad_norm_", lambda parameters, norm: clipped.append(norm) or clip(parameters, norm)
    )
    train_flat(epochs=1, weight_decay=0.25, clip_norm=1.5)
    (((group,), options),) = made
    assert (group["first_lr"], options["weight_decay"]) == (1e-3, 0.25)
    assert set(clipped) == {1.5} and len(clipped) == 4


class Written(flat.Contexts):
    """A conditioner that writes down what it is asked."""

    def __init__(self, contexts):
        super().__init__(contexts)
        self.asked = []

    def forward(self, labels, indices=None, seed=0):
        self.asked.append((labels.tolist(), indices.tolist(), seed))
        return super().forward(labels)


def test_every_epoch_sees_every_image_once_and_says_which():
    """What depends on an image, and not on its class alone, is told which row of the training set it is."""
    written = Written(VALUES[:, None])
    train_flat(contexts=written, epochs=2, seed=5, learning_rate=0.0)
    assert [len(labels) for labels, _, _ in written.asked] == 2 * [8, 8, 8, 6]
    orders = []
    for epoch in (written.asked[:4], written.asked[4:]):
        orders.append([i for _, indices, _ in epoch for i in indices])
        assert sorted(orders[-1]) == list(range(30)) and {seed for _, _, seed in epoch} == {5}
        assert [i % 3 for i in orders[-1]] == [label for labels, _, _ in epoch for label in labels]
    assert orders[0] != orders[1]


@pytest.mark.parametrize("images", [1, 7, 30, 45, 100])
def test_an_epoch_may_be_shorter_or_longer_than_the_training_set(images):
    """No image comes a second time before all have come once, over the ends of the epochs."""
    written = Written(torch.zeros(3, 1, 4))
    _, losses = train_flat(contexts=written, epochs=4, images_per_epoch=images, learning_rate=0.0)
    rows = [i for _, indices, _ in written.asked for i in indices]
    assert len(rows) == 4 * images and len(written.asked) == 4 * math.ceil(images / OPTIONS["batch_size"])
    counts = [rows[:end].count(i) for end in range(1, len(rows) + 1) for i in range(30)]
    per_end = [counts[k : k + 30] for k in range(0, len(counts), 30)]
    assert all(max(seen) - min(seen) <= 1 for seen in per_end)
    cost = (VALUES**2).mean(1)  # of an image of each class, told nothing
    for epoch, loss in enumerate(losses):
        seen = torch.tensor(rows[epoch * images : (epoch + 1) * images]) % 3
        assert loss == pytest.approx(cost[seen].mean().item(), rel=1e-4)


class Told(FlatModel):
    """Writes down the contexts that it is given."""

    def __init__(self):
        super().__init__()
        self.contexts = []

    def predict_noise(self, latents, t, condition):
        self.contexts.append(condition.context.detach().clone())
        return super().predict_noise(latents, t, condition)


def test_a_share_of_the_labels_is_dropped_for_the_unconditional_context():
    """A binomial count: 3000 images and a share of 0.2 leave it between 500 and 700 but once in 10^5 runs."""
    model = Told()
    train_flat(model, flat_contexts(VALUES), count=300, epochs=10, label_dropout=0.2, learning_rate=0.0)
    dropped = [(told == 0).all(-1).flatten() for told in model.contexts]
    assert 500 < int(torch.cat(dropped).sum()) < 700
    assert len({tuple(flags.tolist()) for flags in dropped}) > 50  # others in each batch
    model = Told()
    train_flat(model, flat_contexts(VALUES), epochs=3, learning_rate=0.0)
    assert not any((told == 0).all(-1).any() for told in model.contexts)


def test_parts_of_a_batch_drop_the_same_labels():
    whole, parts = Told(), Told()
    for model, at_once in ((whole, 8), (parts, 3)):
        train_flat(model, flat_contexts(VALUES), epochs=2, label_dropout=0.5, at_once=at_once, learning_rate=0.0)
    assert len(parts.contexts) > len(whole.contexts)
    assert torch.equal(torch.cat(whole.contexts), torch.cat(parts.contexts))


class Trained(flat.Contexts):
    """A conditioner whose unconditional context is learnt too."""

    def __init__(self, contexts):
        super().__init__(contexts)
        self.empty = torch.nn.Parameter(torch.zeros_like(self.contexts[:1]))

    def unconditional(self):
        return Condition(self.empty)


def test_dropped_labels_teach_the_unconditional_context_the_mean_of_all():
    """The image that costs least, where nothing is known of it, is the mean of all images."""
    contexts = Trained(torch.zeros(3, 1, 4))
    train_flat(contexts=contexts, epochs=80, label_dropout=0.5, learning_rate=0.05)
    torch.testing.assert_close(contexts.empty[0, 0].detach(), VALUES.mean(0), atol=0.1, rtol=0)
    torch.testing.assert_close(contexts.contexts[:, 0].detach(), VALUES, atol=0.1, rtol=0)


def test_a_parameter_may_have_a_rate_of_its_own():
    """Adam's first step is as long as its learning rate, whatever the gradient."""
    contexts = Trained(torch.zeros(3, 1, 4))
    before = weights(contexts)[0]
    options = dict(epochs=1, batch_size=30, label_dropout=0.5, learning_rate=0.01, clip_norm=1e9)
    train_flat(contexts=contexts, own_rates={"empty": 0.3}, **options)
    moved = {name: (value - before[name]).abs().max().item() for name, value in weights(contexts)[0].items()}
    assert moved == pytest.approx({"contexts": 0.01, "empty": 0.3}, rel=1e-4)


def test_rates_fall_together_and_a_resumed_training_has_them_all(monkeypatch):
    seen, step = [], torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW,
        "step",
        lambda self, *a, **o: (
            seen.append({g["params"][0].shape: g["lr"] for g in self.param_groups}) or step(self, *a, **o)
        ),
    )
    train, options = (
        flat_latents(30),
        dict(epochs=3, label_dropout=0.3, own_rates={"contexts": 0.2}, learning_rate=0.01),
    )
    contexts = Trained(torch.zeros(3, 1, 4))
    unbroken = states(FlatModel(), contexts, train, contexts, **options)
    assert all(rates[(3, 1, 4)] == pytest.approx(20 * rates[(1, 1, 4)]) for rates in seen)
    assert [rates[(1, 1, 4)] for rates in seen] == sorted((rates[(1, 1, 4)] for rates in seen), reverse=True)
    contexts = Trained(torch.ones(3, 1, 4))
    again = states(FlatModel(), contexts, train, contexts, resume=unbroken[0], **options)
    assert len(again) == 2 and same(again[-1], unbroken[-1])


def test_the_seed_decides():
    losses = [train_flat(seed=seed)[1] for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def test_a_loss_that_is_not_finite_stops_the_training(monkeypatch):
    known, calls = FlatModel.predict_noise, []

    def predict_noise(self, latents, t, condition):
        calls.append(len(latents))
        return known(self, latents, t, condition) * (math.nan if len(calls) > 6 else 1)

    monkeypatch.setattr(FlatModel, "predict_noise", predict_noise)
    contexts, seen = flat_contexts(), []
    with pytest.raises(FloatingPointError, match=r"of the test, epoch 2, is nan from batch 3 of 4 on: lower .*0\.001"):
        for epoch in fit(named(contexts), FlatModel(), contexts, flat_latents(30), **OPTIONS, title="the test"):
            seen.append(epoch.number)
    assert seen == [1]


# --- going on ---


def kept(state):
    """The state as a file would hold it."""
    return {name: value.detach().clone() for name, value in state.tensors().items()}


def states(model, contexts, train, trainable, **options):
    """What each epoch leaves."""
    return [kept(epoch.state) for epoch in fit(named(trainable), model, contexts, train, **{**OPTIONS, **options})]


@pytest.mark.parametrize("after", [1, 2])
@pytest.mark.parametrize("what", ["contexts", "unet"])
def test_a_training_goes_on_as_if_it_had_never_stopped(tiny_copy, contexts, what, after):
    """Bit for bit: weights, moments, counts. The process that goes on has another random state, and other weights."""
    models = [dataclasses.replace(tiny_copy, unet=copy.deepcopy(tiny_copy.unet)) for _ in range(2)]
    tables = [copy.deepcopy(contexts) for _ in range(2)]
    train = latents_for((8, 8, 8))
    trained = [{"contexts": table, "unet": model.unet}[what] for model, table in zip(models, tables, strict=True)]
    unbroken = states(models[0], tables[0], train, trained[0])
    torch.manual_seed(1234)
    with torch.no_grad():
        for parameter in trained[1].parameters():
            parameter.add_(torch.randn_like(parameter))
    resumed = states(models[1], tables[1], train, trained[1], resume=unbroken[after - 1])
    assert [int(state["epoch"]) for state in unbroken] == [1, 2, 3] and len(resumed) == 3 - after
    for found, expected in zip(resumed, unbroken[after:], strict=True):
        assert same(found, expected)
    assert {name.rpartition(".")[2] for name in unbroken[0] if name.startswith("optimizer.")} == {
        "step",
        "exp_avg",
        "exp_avg_sq",
    }
    assert same(*weights(*trained))


def test_a_resumed_cosine_goes_on_where_it_was(rates):
    contexts = flat_contexts()
    state = kept(next(fit(named(contexts), FlatModel(), contexts, flat_latents(30), **OPTIONS)).state)
    rates.clear()
    train_flat(resume=state)
    assert rates == pytest.approx([0.0005 * (1 + math.cos(math.pi * k / 12)) for k in range(4, 12)])


class HalfModel(FlatModel):
    """Says of itself that it computes in float16; at batch ``at`` the gradients of the scaled loss overflow."""

    dtype = torch.float16

    def __init__(self, at=None):
        super().__init__()
        self.at, self.batches = at, 0

    def predict_noise(self, latents, t, condition):
        self.batches += 1
        factor = 1e18 if self.batches == self.at else 1
        return super().predict_noise(latents, t, condition) * factor


@pytest.mark.parametrize("after", range(1, 8))
def test_a_scaled_training_goes_on_as_if_it_had_never_stopped(monkeypatch, after):
    """The scale grows after some steps without an overflow: how many there were is part of the state."""
    scaler = functools.partial(torch.amp.GradScaler, growth_interval=6)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    options = dict(epochs=8, learning_rate=0.05)
    unbroken, resumed = flat_contexts(), flat_contexts(VALUES)
    # The first step's gradients are no numbers: it is left out, and the scale halved.
    expected = states(HalfModel(at=1), unbroken, flat_latents(30), unbroken, **options)
    found = states(HalfModel(), resumed, flat_latents(30), resumed, **options, resume=expected[after - 1])
    assert all(same(one, other) for one, other in zip(found, expected[after:], strict=True))
    scales = [float(state["scaler.scale"]) for state in expected]
    assert scales[0] == 2**15 and len(set(scales)) >= 4  # 32 steps: it grew several times
    assert {int(state["scaler._growth_tracker"]) for state in expected} > {1}


def test_a_state_of_other_parameters_is_refused():
    contexts = flat_contexts()
    (state,) = states(FlatModel(), contexts, flat_latents(6), contexts, epochs=1)
    other = torch.nn.Linear(2, 2)
    with pytest.raises(KeyError, match="model.weight"):
        next(fit(named(other), FlatModel(), contexts, flat_latents(6), **OPTIONS, resume=state))
    assert not other.weight.requires_grad


@pytest.mark.parametrize("name", ["adamw", "adamw-8bit"])
def test_an_optimiser_goes_on_from_its_saved_state(name):
    if name == "adamw-8bit":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes, an optional requirement, is not installed")
    torch.manual_seed(0)
    start, target = torch.randn(64, 128), torch.randn(64, 128)

    def new(value):
        parameter = torch.nn.Parameter(value.clone())
        adam = optimizer_for({0.05: [parameter]}, name, weight_decay=0.0)
        return TrainingState({"p": parameter}, adam, torch.amp.GradScaler("cpu", enabled=False))

    def steps(state, count):
        for _ in range(count):
            state.optimizer.zero_grad()
            (state.trainable["p"] - target).square().sum().backward()
            state.optimizer.step()
        return kept(state)

    unbroken = steps(new(start), 6)
    halfway = steps(new(start), 3)
    second = new(torch.zeros_like(start))
    second.load(halfway)
    assert same(steps(second, 3), unbroken) and not torch.equal(halfway["model.p"], unbroken["model.p"])
    if name == "adamw-8bit":
        assert {value.dtype for value in halfway.values()} >= {torch.uint8}


def test_automatic_choice_of_the_optimiser():
    parameter = torch.nn.Parameter(torch.zeros(4))
    assert type(optimizer_for({1.0: [parameter]}, "auto", weight_decay=0.0)) is torch.optim.AdamW


def test_a_missing_8_bit_optimiser_gives_the_ways_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ImportError, match="pip install bitsandbytes.*finetune_method='lora'.*optimizer='adamw'"):
        optimizer_for({1.0: [torch.nn.Parameter(torch.zeros(4))]}, "adamw-8bit", weight_decay=0.0)


# --- several processes ---


class Together:
    """Stands for the ranks of two processes: threads that add up what they hold."""

    count, barrier, held = 2, threading.Barrier(2, timeout=60), [None, None]

    def __init__(self, rank):
        self.rank, self.first = rank, rank == 0

    def wait(self):
        self.barrier.wait()

    def add_up(self, tensors):
        tensors = list(tensors)
        self.held[self.rank] = [tensor.clone() for tensor in tensors]
        self.wait()
        for mine, parts in zip(tensors, zip(*self.held, strict=True), strict=True):
            mine.copy_(sum(parts))
        self.wait()


def test_two_processes_train_as_one():
    """9 images in batches of 4: of the last one, with one image, the second process has none."""
    options, found = dict(count=9, epochs=3, batch_size=4, learning_rate=0.05), {}

    def work(rank):
        found[rank] = train_flat(ranks=Together(rank), **options)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone, losses = train_flat(**options)
    assert found[0][1] == found[1][1] == pytest.approx(losses)
    assert torch.equal(found[0][0].contexts, found[1][0].contexts)
    torch.testing.assert_close(found[0][0].contexts, alone.contexts, atol=1e-4, rtol=1e-4)


# --- memory and number formats ---


@pytest.fixture
def gradients(monkeypatch):
    """The gradients of every step, as the optimiser gets them: AdamW itself would enlarge their rounding."""
    seen, step = [], torch.optim.AdamW.step

    def recorded(self, *args, **options):
        seen.append([p.grad.clone() for p in self.param_groups[0]["params"]])
        return step(self, *args, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", recorded)
    return seen


def test_a_small_card_gets_parts_of_a_batch_and_the_same_gradients(capsys, gradients):
    still = dict(epochs=1, learning_rate=0.0)
    _, losses = train_flat(**still)
    card, contexts = SmallCard(most=3), flat_contexts()
    (epoch,) = fit(named(contexts), card, contexts, flat_latents(30), **{**OPTIONS, **still})
    assert max(card.sizes) == 2 == epoch.micro_batch.size  # 8, then 4, then 2
    assert len(gradients) == 8
    torch.testing.assert_close(gradients[4:], gradients[:4])
    assert epoch.loss == pytest.approx(losses[0])
    said = capsys.readouterr().out
    assert "gradient checkpointing" in said and "4 images at once, not 8" in said and "2 images at once, not 4" in said
    assert not card.is_gradient_checkpointing  # sampling needs none


def test_it_begins_with_what_an_earlier_one_has_found():
    card = SmallCard(most=0, relieved=2)  # fits only so, with checkpointing
    train_flat(card, epochs=1, at_once=2, gradient_checkpointing=True)
    assert set(card.sizes) == {2}


def test_gradient_checkpointing_comes_first_and_may_suffice():
    card = SmallCard(most=3, relieved=8)
    train_flat(card)
    assert max(card.sizes) == 8


def test_gradient_checkpointing_changes_no_gradient(tiny_copy, contexts):
    other = dataclasses.replace(tiny_copy, unet=copy.deepcopy(tiny_copy.unet))
    (one,) = train_tiny(tiny_copy, contexts, "unet", epochs=1)
    training = train_tiny(other, contexts, "unet", epochs=1, gradient_checkpointing=True)
    two = next(training)
    assert other.unet.is_gradient_checkpointing and next(training, None) is None
    assert two.loss == pytest.approx(one.loss, rel=1e-4) and not other.unet.is_gradient_checkpointing


def test_a_card_too_small_for_one_image():
    with pytest.raises(MemoryError, match="Not even one image.*finetune_method='lora'.*tried to allocate too much$"):
        train_flat(SmallCard(most=0))


def test_held_out_losses_fit_a_small_card_and_do_not_run_into_the_wall_twice(tiny, contexts, monkeypatch, capsys):
    model, sizes, predict = dataclasses.replace(tiny), [], backbone.Backbone.predict_noise

    def predict_noise(self, latents, t, condition):
        sizes.append(len(latents))
        if len(latents) > 2:
            raise torch.OutOfMemoryError("too much")
        return predict(self, latents, t, condition)

    held_out = latents_for((8, 8, 8), count=4)
    expected = held_out_losses(model, contexts, held_out, 2)
    monkeypatch.setattr(backbone.Backbone, "predict_noise", predict_noise)
    assert held_out_losses(model, contexts, held_out, 2) == pytest.approx(expected, rel=1e-4)
    assert sizes == [4, *12 * [2]] and "2 images at once" in capsys.readouterr().out
    held_out_losses(model, contexts, held_out, 2)
    assert sizes == [4, *24 * [2]] and capsys.readouterr().out == ""


def test_float16_scales_the_loss_and_not_the_gradients(monkeypatch, gradients):
    still = dict(epochs=1, learning_rate=0.0)
    train_flat(**still)
    scaled, backward = [], torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: scaled.append(float(loss.detach())) or backward(loss))
    _, losses = train_flat(HalfModel(), **still)
    assert min(scaled) > 1000 * max(losses)
    torch.testing.assert_close(gradients[4:], gradients[:4])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_trains_keeps_its_digits_where_products_have_fewer(tiny_copy, contexts, dtype):
    """Step 3's weights, held in float32, move by steps that 16 bits cannot hold; all their gradients are finite."""
    tiny_copy.dtype = dtype
    before = weights(tiny_copy.unet)[0]
    how = dict(epochs=1, learning_rate=1e-6, batch_size=4)
    list(fit(named(tiny_copy.unet), tiny_copy, contexts, latents_for((8, 8, 8), count=4), **{**OPTIONS, **how}))
    after = weights(tiny_copy.unet)[0]
    moved = torch.cat([(after[name] - before[name]).flatten() for name in before]).abs()
    assert {value.dtype for value in after.values()} == {torch.float32}
    assert 0 < float(moved.max()) < 1.3e-6 and float((moved > 0).float().mean()) > 0.5


def test_a_fixed_table_is_a_conditioner_too(tiny_copy):
    """The UNet learns from prompts' contexts as well as from those that a method has learnt."""
    table = ContextTable(tiny_copy.text_context(["white digit 1 on black", "red circle on blue"]), torch.zeros(8, 64))
    losses = [epoch.loss for epoch in train_tiny(tiny_copy, table, "unet", epochs=6)]
    assert sum(losses[3:]) < sum(losses[:3])
