"""The one training loop: what trains, what it learns, and that a killed training ends as an unbroken one."""

import copy
import math
import sys

import numpy as np
import pytest
import torch

from sdgen_lib import runs, train
from sdgen_lib.class_encoder import ClassEncoder

OPTIONS = dict(epochs=3, batch_size=8, learning_rate=1e-3, weight_decay=0.0, clip_norm=10.0, seed=0)


def latents_for(shape, count=20, classes=2, seed=0):
    """Each class has a mean of its own."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    means = torch.linspace(-1, 1, classes)[labels].view(-1, 1, 1, 1)
    return train.Latents(means + 0.2 * torch.randn(count, *shape, generator=generator), labels)


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return ClassEncoder(2, 8, 64)


def named(module):
    return dict(module.named_parameters())


def fit_tiny(tiny_copy, encoder, folder, what, **changes):
    data, held_out = latents_for((4, 8, 8)), latents_for((4, 8, 8), count=6, seed=1)
    trainable = named({"class encoder": encoder, "unet": tiny_copy.unet}[what])
    return train.fit(trainable, tiny_copy, encoder, data, held_out, folder, **{**OPTIONS, **changes})


def weights(*modules):
    return [{name: value.clone() for name, value in module.state_dict().items()} for module in modules]


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("what", ["class encoder", "unet"])
def test_only_what_is_named_trains(tiny_copy, encoder, tmp_path, what):
    modules = (encoder, tiny_copy.unet, tiny_copy.vae, tiny_copy.text_encoder)
    encoder.requires_grad_(False)
    before = weights(*modules)
    history = fit_tiny(tiny_copy, encoder, tmp_path, what, epochs=2)
    changed = [not same(old, new) for old, new in zip(before, weights(*modules), strict=True)]
    assert changed == [what == "class encoder", what == "unet", False, False]
    for parameter in (p for module in modules for p in module.parameters()):
        assert not parameter.requires_grad and parameter.grad is None  # a large UNet's gradients are gigabytes
    assert history.index.tolist() == [1, 2] and history.index.name == "epoch"
    assert list(history) == ["train", "right", "wrong", "empty"] and np.isfinite(history.to_numpy()).all()
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"epoch_001.safetensors", "epoch_002.safetensors", "history.json", "state.safetensors"}
    saved = runs.load_tensors(train.checkpoint_path(tmp_path, 2))
    trained = (encoder if what == "class encoder" else tiny_copy.unet).state_dict()
    assert set(saved) == set(trained)
    for name, value in trained.items():  # a UNet's checkpoint is in half precision
        torch.testing.assert_close(saved[name].float(), value, atol=1e-3 if what == "unet" else 0, rtol=1e-3)
    assert not same(saved, runs.load_tensors(train.checkpoint_path(tmp_path, 1)))


def test_the_unets_loss_falls(tiny_copy, encoder, tmp_path):
    """Latents like none that the tiny UNet has seen, learnt by heart."""
    history = fit_tiny(tiny_copy, encoder, tmp_path, "unet", epochs=6, learning_rate=1e-3)
    assert history.right.iloc[-1] < 0.9 * history.right.iloc[0]


# --- a model whose right answers are known ---

VALUES = torch.tensor([[1.0, 0.0, -1.0, 0.5], [-1.0, 2.0, 0.0, 0.0], [0.0, 0.0, 1.0, -2.0]])  # of three classes


def flat_latents(count):
    labels = torch.arange(count) % 3
    return train.Latents(VALUES[labels].view(-1, 4, 1, 1).expand(-1, -1, 2, 2).clone(), labels)


def flat_encoder(contexts=None):
    made = ClassEncoder(3, 1, 4, start=torch.zeros(1, 4))
    if contexts is not None:
        with torch.no_grad():
            made.linear.weight.copy_(contexts.T)
    return made


def test_held_out_losses_by_hand(flat_model):
    """Right contexts cost nothing; another one the mean squared difference of the two classes' channel values."""
    found = train.held_out_losses(flat_model, flat_encoder(VALUES), flat_latents(30), torch.zeros(1, 4), batch_size=7)
    assert found["right"] == pytest.approx(0, abs=1e-10)
    assert found["empty"] == pytest.approx(float(VALUES.square().mean()), rel=1e-4)
    pairs = [float((VALUES[i] - VALUES[j]).square().mean()) for i in range(3) for j in range(3) if i != j]
    assert min(pairs) < found["wrong"] < max(pairs)  # which wrong label is drawn by chance
    two = train.Latents(*(part[flat_latents(30).labels < 2] for part in vars(flat_latents(30)).values()))
    pair_encoder = ClassEncoder(2, 1, 4, start=torch.zeros(1, 4))
    with torch.no_grad():
        pair_encoder.linear.weight.copy_(VALUES[:2].T)
    found = train.held_out_losses(flat_model, pair_encoder, two, torch.zeros(1, 4))
    assert found["wrong"] == pytest.approx(float((VALUES[0] - VALUES[1]).square().mean()), rel=1e-4)  # the only other


def test_held_out_losses_repeat_themselves(tiny, encoder):
    held_out, away_from = latents_for((4, 8, 8), count=5), tiny.text_context([""])[0]
    one = train.held_out_losses(tiny, encoder, held_out, away_from)
    torch.manual_seed(77)
    assert one == train.held_out_losses(tiny, encoder, held_out, away_from)
    again = train.held_out_losses(tiny, encoder, held_out, away_from, batch_size=2)
    assert all(again[kind] == pytest.approx(one[kind], rel=1e-4) for kind in one)


def test_the_class_encoder_learns_each_classs_context(flat_model, tmp_path):
    encoder = flat_encoder()
    history = train.fit(named(encoder), flat_model, encoder, flat_latents(30), flat_latents(9), tmp_path,
                        **{**OPTIONS, "epochs": 60, "learning_rate": 0.1})  # fmt: skip
    torch.testing.assert_close(encoder.contexts()[:, 0], VALUES, atol=0.02, rtol=0)
    assert history.train.iloc[0] > 0.3 and history.train.iloc[-1] < 1e-3
    last = history.iloc[-1]
    assert last["right"] < 1e-3 and last["wrong"] > 1 and last["empty"] > 0.1


def fit_flat(flat_model, folder, **changes):
    encoder = flat_encoder()
    options = {**OPTIONS, **changes}
    history = train.fit(named(encoder), flat_model, encoder, flat_latents(30), flat_latents(9), folder, **options)
    return encoder, history


def test_the_learning_rate_is_a_cosine_to_zero(flat_model, tmp_path, monkeypatch):
    seen, step = [], torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self, *args: (seen.append(self.param_groups[0]["lr"]), step(self, *args))[1]
    )
    fit_flat(flat_model, tmp_path, epochs=4, batch_size=9, learning_rate=0.02)
    total = 4 * math.ceil(30 / 9)
    assert len(seen) == total == 16
    assert seen == pytest.approx([0.01 * (1 + math.cos(math.pi * k / total)) for k in range(total)])


def test_weight_decay_and_clipping_reach_the_optimiser(flat_model, tmp_path, monkeypatch):
    made, clipped, adamw = [], [], torch.optim.AdamW
    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.optim, "AdamW", lambda *args, **options: made.append(options) or adamw(*args, **options))
    monkeypatch.setattr(
        torch.nn.utils, "clip_grad_norm_", lambda parameters, norm: clipped.append(norm) or clip(parameters, norm)
    )
    fit_flat(flat_model, tmp_path, epochs=1, weight_decay=0.25, clip_norm=1.5)
    assert [(options["lr"], options["weight_decay"]) for options in made] == [(1e-3, 0.25)]
    assert set(clipped) == {1.5} and len(clipped) == 4


def test_every_epoch_sees_every_image_once(flat_model, tmp_path):
    known, seen = flat_model.predict_noise, []

    def predict_noise(latents, t, context):
        if torch.is_grad_enabled():
            seen.append(context.detach())
        return known(latents, t, context)

    flat_model.predict_noise = predict_noise
    encoder = flat_encoder(VALUES)
    train.fit(named(encoder), flat_model, encoder, flat_latents(30), flat_latents(9), tmp_path,
              **{**OPTIONS, "epochs": 1, "learning_rate": 0.0})  # fmt: skip
    assert [len(part) for part in seen] == [8, 8, 8, 6]
    counts = [int((torch.cat(seen)[:, 0] == value).all(1).sum()) for value in VALUES]
    assert counts == [10, 10, 10]


# --- stopping, going on ---


class Killed(BaseException):
    """What a killed process looks like from inside: nothing catches it."""


@pytest.mark.parametrize("what", ["class encoder", "unet"])
@pytest.mark.parametrize("at", ["epoch_002.safetensors", "history.json", "state.safetensors"])
def test_a_killed_training_ends_as_an_unbroken_one(tiny_copy, encoder, tmp_path, monkeypatch, what, at):
    if what == "unet" and at == "epoch_002.safetensors":
        pytest.skip("as the class encoder's")
    unbroken = [copy.deepcopy(encoder), copy.copy(tiny_copy)]
    unbroken[1].unet = copy.deepcopy(tiny_copy.unet)
    expected = fit_tiny(unbroken[1], unbroken[0], tmp_path / "unbroken", what)

    saved, (save_tensors, save_json) = [], (runs.save_tensors, runs.save_json)

    def killing(save):
        def wrapped(path, *args, **options):
            saved.append(path.name)
            if path.name == at and (at == "epoch_002.safetensors" or saved.count(at) == 2):
                raise Killed
            return save(path, *args, **options)

        return wrapped

    first = [copy.deepcopy(encoder), copy.copy(tiny_copy)]
    first[1].unet = copy.deepcopy(tiny_copy.unet)
    with monkeypatch.context() as patch:
        patch.setattr(runs, "save_tensors", killing(save_tensors))
        patch.setattr(runs, "save_json", killing(save_json))
        with pytest.raises(Killed):
            fit_tiny(first[1], first[0], tmp_path / "killed", what)
    assert not (tmp_path / "killed" / "epoch_003.safetensors").exists()

    torch.manual_seed(1234)  # a new process has another global random state
    found = fit_tiny(tiny_copy, encoder, tmp_path / "killed", what)
    assert found.equals(expected)
    names = sorted(path.name for path in (tmp_path / "unbroken").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "killed").iterdir()) and len(names) == 5
    for name in names:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "unbroken" / name).read_bytes(), name


def test_a_finished_training_is_not_repeated(flat_model, tmp_path):
    _, expected = fit_flat(flat_model, tmp_path)
    flat_model.predict_noise = None  # any use of it fails
    encoder, found = fit_flat(flat_model, tmp_path)
    assert found.equals(expected)
    assert same(encoder.state_dict(), runs.load_tensors(train.checkpoint_path(tmp_path, 3)))


def test_the_seed_decides(flat_model, tmp_path):
    histories = [fit_flat(flat_model, tmp_path / str(k), seed=seed)[1] for k, seed in enumerate((0, 0, 1))]
    assert histories[0].equals(histories[1]) and not histories[0].equals(histories[2])


def test_a_loss_that_is_not_finite_stops_the_training(flat_model, tmp_path):
    known, calls = flat_model.predict_noise, []

    def predict_noise(latents, t, context):
        calls.append(torch.is_grad_enabled())
        return known(latents, t, context) * (math.nan if sum(calls) > 4 else 1)  # from epoch 2 on

    flat_model.predict_noise = predict_noise
    with pytest.raises(FloatingPointError, match=r"epoch 2, is nan from batch 1 of 4 on: lower the .*0\.001"):
        fit_flat(flat_model, tmp_path)
    assert sorted(path.name for path in tmp_path.glob("epoch_*")) == ["epoch_001.safetensors"]


# --- memory and number formats ---


class Card:
    """Stands for an accelerator on which ``most`` images fit at once, with gradient checkpointing ``relieved``."""

    def __init__(self, model, most, relieved=None):
        self.known, self.most, self.relieved, self.sizes = model.predict_noise, most, relieved or most, []
        model.unet = self  # what `fit` asks of a UNet
        self.is_gradient_checkpointing = False

    def enable_gradient_checkpointing(self):
        self.is_gradient_checkpointing = True

    def disable_gradient_checkpointing(self):
        self.is_gradient_checkpointing = False

    def __call__(self, latents, t, context):
        if torch.is_grad_enabled():
            if len(latents) > (self.relieved if self.is_gradient_checkpointing else self.most):
                raise torch.OutOfMemoryError("tried to allocate too much\nand more lines")
            self.sizes.append(len(latents))
        return self.known(latents, t, context)


@pytest.fixture
def gradients(monkeypatch):
    """The gradients of every step, as the optimiser gets them: AdamW itself would enlarge their rounding."""
    seen, step = [], torch.optim.AdamW.step

    def recorded(self, *args, **options):
        seen.append([p.grad.clone() for p in self.param_groups[0]["params"]])
        return step(self, *args, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", recorded)
    return seen


def test_a_small_card_gets_parts_of_a_batch_and_the_same_gradients(flat_model, tmp_path, capsys, gradients):
    still = dict(epochs=1, learning_rate=0.0)
    _, history = fit_flat(flat_model, tmp_path / "large", **still)
    flat_model.predict_noise = card = Card(flat_model, most=3)
    _, small_history = fit_flat(flat_model, tmp_path / "small", **still)
    assert max(card.sizes) == 2  # 8, then 4, then 2
    assert len(gradients) == 8
    torch.testing.assert_close(gradients[4:], gradients[:4])
    torch.testing.assert_close(torch.tensor(small_history.to_numpy()), torch.tensor(history.to_numpy()))
    said = capsys.readouterr().out
    assert "gradient checkpointing" in said and "4 images at once, not 8" in said and "2 images at once, not 4" in said
    assert runs.load_json(tmp_path / "small" / "micro_batch.json") == {"size": 2, "gradient_checkpointing": True}
    assert not card.is_gradient_checkpointing  # sampling needs none


def test_what_was_found_is_remembered(flat_model, tmp_path):
    flat_model.predict_noise = Card(flat_model, most=3)
    fit_flat(flat_model, tmp_path, epochs=1)
    (tmp_path / "state.safetensors").unlink()
    flat_model.predict_noise = card = Card(flat_model, most=1)
    card.known, card.most, card.relieved = card.known.known, 0, 2  # fits only what was found, with checkpointing
    fit_flat(flat_model, tmp_path, epochs=1)
    assert set(card.sizes) == {2}


def test_gradient_checkpointing_comes_first_and_may_suffice(flat_model, tmp_path):
    flat_model.predict_noise = card = Card(flat_model, most=3, relieved=8)
    fit_flat(flat_model, tmp_path)
    assert max(card.sizes) == 8


def test_gradient_checkpointing_changes_no_gradient(tiny_copy, encoder, tmp_path):
    other = copy.copy(tiny_copy)
    other.unet = copy.deepcopy(tiny_copy.unet)
    one = fit_tiny(tiny_copy, encoder, tmp_path / "plain", "unet", epochs=1)
    two = fit_tiny(other, encoder, tmp_path / "checkpointed", "unet", epochs=1, gradient_checkpointing=True)
    torch.testing.assert_close(torch.tensor(one.to_numpy()), torch.tensor(two.to_numpy()), atol=1e-5, rtol=1e-4)
    assert not other.unet.is_gradient_checkpointing


def test_a_card_too_small_for_one_image(flat_model, tmp_path):
    flat_model.predict_noise = Card(flat_model, most=0)
    with pytest.raises(MemoryError, match="Not even one image.*finetune_method='lora'.*tried to allocate too much$"):
        fit_flat(flat_model, tmp_path)


def test_float16_scales_the_loss_and_not_the_gradients(flat_model, tmp_path, monkeypatch, gradients):
    still = dict(epochs=1, learning_rate=0.0)
    fit_flat(flat_model, tmp_path / "fp32", **still)
    flat_model.dtype = torch.float16
    scaled, backward = [], torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: scaled.append(float(loss.detach())) or backward(loss))
    _, history = fit_flat(flat_model, tmp_path / "fp16", **still)
    assert min(scaled) > 1000 * history.train.max()
    torch.testing.assert_close(gradients[4:], gradients[:4])
    state = runs.load_tensors(tmp_path / "fp16" / "state.safetensors")
    assert float(state["loss_scale"]) >= 1024


@pytest.mark.parametrize("name", ["adamw", "adamw-8bit"])
def test_an_optimiser_goes_on_from_its_saved_state(name):
    if name == "adamw-8bit":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes, an optional requirement, is not installed")
    torch.manual_seed(0)
    start, target = torch.randn(64, 128), torch.randn(64, 128)

    def steps(parameter, adam, count):
        for _ in range(count):
            adam.zero_grad()
            (parameter - target).square().sum().backward()
            adam.step()

    def new(value):
        parameter = torch.nn.Parameter(value.clone())
        return parameter, train.optimizer_for([parameter], name, learning_rate=0.05, weight_decay=0.0)

    unbroken, adam = new(start)
    steps(unbroken, adam, 6)
    first, adam = new(start)
    steps(first, adam, 3)
    second, again = new(first.detach())
    train._load_optimizer(again, train._optimizer_tensors(adam))
    steps(second, again, 3)
    assert torch.equal(second, unbroken) and not torch.equal(first, unbroken)
    if name == "adamw-8bit":
        assert {value.dtype for value in adam.state[first].values() if torch.is_tensor(value)} >= {torch.uint8}


def test_automatic_choice_of_the_optimiser():
    parameter = torch.nn.Parameter(torch.zeros(4))
    assert type(train.optimizer_for([parameter], "auto", learning_rate=1.0, weight_decay=0.0)) is torch.optim.AdamW


def test_a_missing_8_bit_optimiser_gives_the_ways_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ImportError, match="pip install bitsandbytes.*finetune_method='lora'.*optimizer='adamw'"):
        train.optimizer_for([torch.nn.Parameter(torch.zeros(4))], "adamw-8bit", learning_rate=1.0, weight_decay=0.0)
