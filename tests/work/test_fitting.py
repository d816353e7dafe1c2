"""A training keeps what each epoch leaves; killed at any moment, it goes on to the same files."""

import copy
import types

import flat
import pytest
import torch
from flat import FlatModel, SmallCard, flat_contexts, flat_latents

from sdgen_lib.config import settings
from sdgen_lib.diffusion.training import Latents
from sdgen_lib.machine.ranks import ALONE, Ranks
from sdgen_lib.store import files
from sdgen_lib.work.fitting import HISTORY, MICRO_BATCH, STATE, checkpoint_name, fit_and_keep


def fit_in(folder, backbone, trainable, conditioner, train, ranks=ALONE, **changes):
    """Trains in ``folder``; options of settings and of `fit_and_keep` may be changed. Returns the history."""
    options = dict(epochs=3, batch_size=8, learning_rate=1e-2, probe=dict, title="a test")
    asked = {name: changes.pop(name) for name in tuple(changes) if name in settings.FIELDS}
    s = settings.resolve("demo", backbone="tiny", **asked)
    ws = types.SimpleNamespace(backbone=backbone, ranks=ranks)
    named = dict(trainable.named_parameters())
    names = ("weight_decay", "clip_norm", "label_dropout", "optimizer", "gradient_checkpointing", "seed")
    options |= {name: getattr(s, name) for name in names}
    return fit_and_keep(folder, ws, named, conditioner, train, **{**options, **changes})


def fit_flat(folder, model=None, contexts=None, **changes):
    contexts = contexts or flat_contexts()
    return fit_in(folder, model or FlatModel(), contexts, contexts, flat_latents(30), **changes)


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_an_epoch_leaves(tmp_path):
    contexts, probed = flat_contexts(), []

    def probe():
        probed.append(contexts.contexts.detach().clone())
        return {"right": float(len(probed))}

    history = fit_flat(tmp_path, contexts=contexts, probe=probe)
    assert sorted(content(tmp_path)) == sorted([STATE, *map(checkpoint_name, (1, 2, 3)), HISTORY])
    assert history == files.load_json(tmp_path / HISTORY)
    assert [row["right"] for row in history] == [1, 2, 3] and set(history[0]) == {"train", "right"}
    assert history[0]["train"] > history[2]["train"] > 0
    for epoch, expected in enumerate(probed, 1):  # what was probed is what was kept
        assert torch.equal(files.load_tensors(tmp_path / checkpoint_name(epoch))["contexts"], expected)
    assert torch.equal(probed[-1], contexts.contexts)


def test_settings_reach_the_training(tmp_path):
    results = []
    for k, changes in enumerate(({}, {"seed": 1}, {"weight_decay": 0.5}, {"clip_norm": 1e-9})):
        fit_flat(tmp_path / str(k), **changes)
        results.append(files.load_tensors(tmp_path / str(k) / checkpoint_name(3))["contexts"])
    assert all(not torch.equal(results[0], other) for other in results[1:])


def test_a_checkpoint_may_be_rounded_and_the_training_is_not(tmp_path):
    whole, rounded = flat_contexts(), flat_contexts()
    for name, contexts, dtype in (("whole", whole, None), ("rounded", rounded, torch.float16)):
        fit_flat(tmp_path / name, contexts=contexts, checkpoint_dtype=dtype)
    assert torch.equal(whole.contexts, rounded.contexts)
    kept = files.load_tensors(tmp_path / "rounded" / checkpoint_name(3))["contexts"]
    assert kept.dtype == torch.float16 and torch.equal(kept, whole.contexts.half())


class Killed(BaseException):
    """What a killed process looks like from inside: nothing catches it."""


def killed_at(patch, name, times):
    """The process dies when it is about to write the file ``name`` for the ``times``-th time."""
    written = []

    def killing(save):
        def wrapped(path, *args, **options):
            written.append(path.name)
            if path.name == name and written.count(name) == times:
                raise Killed
            return save(path, *args, **options)

        return wrapped

    for save in ("save_tensors", "save_json"):
        patch.setattr(files, save, killing(getattr(files, save)))


MOMENTS = [
    (checkpoint_name(1), 1),
    (checkpoint_name(2), 1),
    (HISTORY, 1),
    (HISTORY, 2),
    (STATE, 1),
    (STATE, 2),
    (STATE, 3),
]


@pytest.mark.parametrize(("name", "times"), MOMENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_killed_training_ends_as_an_unbroken_one(tmp_path, monkeypatch, name, times, dtype):
    """In float16 with a scaled loss, too. Every file is the same to the last byte."""
    monkeypatch.setattr(FlatModel, "dtype", dtype)

    def fit(folder):
        contexts = flat_contexts()
        return fit_flat(folder, contexts=contexts, probe=lambda: {"sum": float(contexts.contexts.sum())})

    expected = fit(tmp_path / "unbroken")
    with monkeypatch.context() as patch:
        killed_at(patch, name, times)
        with pytest.raises(Killed):
            fit(tmp_path / "killed")
    torch.manual_seed(1234)  # a new process has another global random state
    assert fit(tmp_path / "killed") == expected
    assert content(tmp_path / "killed") == content(tmp_path / "unbroken")


def test_a_killed_training_of_a_unet_ends_as_an_unbroken_one(tiny, tmp_path, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    train = Latents(torch.randn(6, 8, 8, 8, generator=generator), torch.arange(6) % 2)
    contexts = flat.Contexts(torch.randn(2, 8, 64, generator=generator)).requires_grad_(False)

    def fit(folder):
        model = copy.copy(tiny)
        model.unet = copy.deepcopy(tiny.unet)
        how = dict(epochs=2, batch_size=4, learning_rate=1e-3, checkpoint_dtype=torch.float16)
        return fit_in(folder, model, model.unet, contexts, train, **how)

    expected = fit(tmp_path / "unbroken")
    with monkeypatch.context() as patch:
        killed_at(patch, STATE, 2)
        with pytest.raises(Killed):
            fit(tmp_path / "killed")
    assert fit(tmp_path / "killed") == expected
    assert content(tmp_path / "killed") == content(tmp_path / "unbroken")


def test_what_is_done_is_not_done_again(tmp_path, monkeypatch):
    """Nor is more of it kept than its state knows of."""
    with monkeypatch.context() as patch:
        killed_at(patch, STATE, 2)  # after two epochs in the history, with the state of the first
        with pytest.raises(Killed):
            fit_flat(tmp_path)
    calls, known = [], FlatModel.predict_noise
    monkeypatch.setattr(FlatModel, "predict_noise", lambda self, *args: calls.append(1) or known(self, *args))
    assert len(fit_flat(tmp_path)) == 3 and len(calls) == 2 * 4  # two epochs of four batches


def test_a_damaged_state_is_begun_again(tmp_path, monkeypatch):
    expected = fit_flat(tmp_path / "unbroken")
    with monkeypatch.context() as patch:
        killed_at(patch, HISTORY, 2)
        with pytest.raises(Killed):
            fit_flat(tmp_path / "damaged")
    (tmp_path / "damaged" / STATE).write_bytes(b"half of a file")
    assert fit_flat(tmp_path / "damaged") == expected
    found = content(tmp_path / "damaged")
    assert {name: found[name] for name in content(tmp_path / "unbroken")} == content(tmp_path / "unbroken")


def test_a_training_that_fails_keeps_what_earlier_epochs_left(tmp_path, monkeypatch):
    known, calls = FlatModel.predict_noise, []

    def predict_noise(self, *args):
        calls.append(1)
        return known(self, *args) * (float("nan") if len(calls) > 4 else 1)

    monkeypatch.setattr(FlatModel, "predict_noise", predict_noise)
    with pytest.raises(FloatingPointError, match="of a test, epoch 2, is nan"):
        fit_flat(tmp_path)
    assert sorted(content(tmp_path)) == sorted([STATE, checkpoint_name(1), HISTORY])


def test_what_fitted_into_the_memory_is_remembered(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        killed_at(patch, checkpoint_name(2), 1)
        with pytest.raises(Killed):
            fit_flat(tmp_path, model=SmallCard(most=3))
    assert files.load_json(tmp_path / MICRO_BATCH) == {"size": 2, "gradient_checkpointing": True}
    card = SmallCard(most=0, relieved=2)  # nothing else fits, and trying would be told
    fit_flat(tmp_path, model=card)
    assert set(card.sizes) == {2}


def test_gradient_checkpointing_may_be_asked_for(tmp_path):
    card = SmallCard(most=0, relieved=8)
    fit_flat(tmp_path, model=card, gradient_checkpointing=True)
    assert max(card.sizes) == 8


class Second(Ranks):
    """The second of two processes; the first is not there, and adds nothing."""

    def wait(self):
        pass

    def add_up(self, tensors):
        list(tensors)


def test_only_the_first_process_writes(tmp_path, capsys):
    history = fit_flat(tmp_path, ranks=Second(1, 2))
    assert len(history) == 3 and content(tmp_path) == {} and capsys.readouterr().err == ""


def test_a_training_whose_early_checkpoint_was_lost_begins_anew(tmp_path):
    expected = content(tmp_path / "whole") if fit_flat(tmp_path / "whole") else None
    with pytest.MonkeyPatch.context() as patch:
        killed_at(patch, checkpoint_name(3), 1)
        with pytest.raises(Killed):
            fit_flat(tmp_path / "lost")
    (tmp_path / "lost" / checkpoint_name(1)).unlink()
    fit_flat(tmp_path / "lost")
    assert content(tmp_path / "lost") == expected
