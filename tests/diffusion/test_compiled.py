"""A compiled UNet draws what the uncompiled one draws, and is used by no one who has not asked for it."""

import dataclasses
import json
import shutil

import pytest
import torch

from sdgen_lib.diffusion import backbone
from sdgen_lib.diffusion.conditions import Condition, ContextTable
from sdgen_lib.diffusion.generate import generate
from sdgen_lib.diffusion.generator import LatentGenerator
from sdgen_lib.diffusion.training import Latents, fit, held_out_losses

N = 4  # latents that pass at once


@pytest.fixture
def passed(monkeypatch):
    """How many latents each pass through a compiled UNet had; it doubles its answers, so that it is told apart."""
    sizes = []

    def compiled(unet, *example, **named):
        def fast(latents, *rest, **named):
            sizes.append(len(latents))
            answer = unet(latents, *rest, **named)
            return dataclasses.replace(answer, sample=2 * answer.sample)

        assert example[0].dtype == unet.dtype
        assert all(len(given) == N for given in (*example, *named.values()))
        return fast

    monkeypatch.setattr(backbone, "compiled", compiled)
    return sizes


def table(model):
    contexts = model.text_context(["white digit 1 on black", "black circle on white"])
    return ContextTable(contexts, model.text_context([""])[0])


def batch(model, count=N):
    generator = torch.Generator().manual_seed(0)
    latents, t = torch.randn(count, *model.latent_shape, generator=generator), torch.arange(count)
    return latents, t, Condition(torch.randn(count, model.tokens, model.width, generator=generator))


def test_it_is_passed_by_who_asks_for_it_and_by_nobody_else(tiny_copy, passed):
    plain = tiny_copy.predict_noise(*batch(tiny_copy))
    assert torch.equal(tiny_copy.predict_compiled(*batch(tiny_copy)), plain) and not tiny_copy.is_compiled_for(N)
    for _ in range(2):
        tiny_copy.compile_unet(N)
    assert tiny_copy.is_compiled_for(N) and not tiny_copy.is_compiled_for(N + 1)
    assert torch.equal(tiny_copy.predict_noise(*batch(tiny_copy)), plain) and passed == []
    assert torch.equal(tiny_copy.predict_compiled(*batch(tiny_copy)), 2 * plain) and passed == [N]
    other = batch(tiny_copy, N + 1)
    assert torch.equal(tiny_copy.predict_compiled(*other), tiny_copy.predict_noise(*other)) and passed == [N]


def test_weights_of_another_kind_are_not_passed_through_it(tiny_copy, passed):
    """As while the whole UNet trains: weights of 32 bits, products of 16."""
    tiny_copy.compile_unet(N)
    tiny_copy.dtype = torch.bfloat16
    assert not tiny_copy.is_compiled_for(N)
    tiny_copy.predict_compiled(*batch(tiny_copy))
    assert passed == []


def test_without_a_compiler_all_stays_as_it_was(tiny_copy, monkeypatch):
    monkeypatch.setattr(backbone, "compiled", lambda *example, **named: None)
    tiny_copy.compile_unet(N)
    assert not tiny_copy.is_compiled_for(N)
    assert torch.equal(tiny_copy.predict_compiled(*batch(tiny_copy)), tiny_copy.predict_noise(*batch(tiny_copy)))


def test_only_what_fills_a_batch_passes_it(tiny_copy, passed):
    """With guidance an image passes twice; the rest of a set, and sets without guidance, pass the plain UNet."""
    tiny_copy.compile_unet(N)
    labels = torch.tensor([0, 1, 1, 0, 1])

    def drawn(**options):
        how = {"num_inference_steps": 3, "guidance_scale": 2.0, "batch_size": N // 2, **options}
        return generate(tiny_copy, table(tiny_copy), labels, **how)

    plain = drawn()
    assert passed == []
    fast = drawn(compiled=True)
    assert passed == 2 * 3 * [N]  # two full batches of three steps; the fifth image is alone
    assert not torch.equal(fast[:4], plain[:4]) and torch.equal(fast[4], plain[4])
    passed.clear()
    assert torch.equal(drawn(compiled=True, guidance_scale=1.0), drawn(guidance_scale=1.0)) and passed == []
    drawn(compiled=True, guidance_scale=1.0, batch_size=N)
    assert passed == 3 * [N]


def test_held_out_losses_are_those_of_the_plain_unet_to_the_last_byte(tiny_copy, passed):
    """Whether or not this process has drawn with a compiled UNet for as many latents: a history is a stored result."""
    generator = torch.Generator().manual_seed(0)
    held_out = Latents(torch.randn(N, *tiny_copy.latent_shape, generator=generator), torch.arange(N) % 2)

    def history():
        return json.dumps(held_out_losses(tiny_copy, table(tiny_copy), held_out, 2, batch_size=N)).encode()

    before = history()
    tiny_copy.compile_unet(N)
    assert history() == before and passed == []
    how = dict(num_inference_steps=1, guidance_scale=2.0, batch_size=N // 2, compiled=True)
    generate(tiny_copy, table(tiny_copy), torch.zeros(N // 2, dtype=torch.int64), **how)
    assert passed == [N]
    assert history() == before and passed == [N]


def test_a_training_passes_the_plain_unet(tiny_copy, passed):
    tiny_copy.compile_unet(N)
    train = Latents(torch.zeros(N, *tiny_copy.latent_shape), torch.arange(N) % 2)
    how = dict(epochs=1, batch_size=N, learning_rate=0.0, weight_decay=0.0, clip_norm=1.0, seed=0)
    list(fit(dict(tiny_copy.unet.named_parameters()), tiny_copy, table(tiny_copy), train, **how))
    assert passed == []


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="there is no C++ compiler")
def test_the_compiled_tiny_unet_draws_what_the_plain_one_draws(tiny_copy):
    """Really compiled: 40 s on two cores, seconds where an earlier process has left its cache."""
    labels = torch.tensor([0, 1, 1, 0])
    how = dict(num_inference_steps=10, guidance_scale=2.0, batch_size=2)
    plain = generate(tiny_copy, table(tiny_copy), labels, **how)
    tiny_copy.compile_unet(4)
    assert tiny_copy.is_compiled_for(4)
    fast = generate(tiny_copy, table(tiny_copy), labels, **how, compiled=True)
    difference = (fast.int() - plain.int()).abs()
    assert plain.float().std() > 5 and int(difference.max()) <= 2 and float(difference.float().mean()) < 0.1
    # Weights that are put in place later pass it, too.
    tiny_copy.put_unet("less", lambda: {name: 0.9 * value for name, value in tiny_copy.unet.state_dict().items()})
    plain, fast = (generate(tiny_copy, table(tiny_copy), labels, **how, compiled=kind) for kind in (False, True))
    assert int((fast.int() - plain.int()).abs().max()) <= 2


def test_it_is_compiled_for_the_contexts_that_it_is_given(tiny_copy, monkeypatch):
    """A Class-Encoder may have another number of tokens than the text encoder."""
    asked = []

    def compiled(unet, latents, t, *, encoder_hidden_states):
        asked.append((len(latents), encoder_hidden_states.shape[1]))
        return unet

    monkeypatch.setattr(backbone, "compiled", compiled)
    table = ContextTable(torch.zeros(2, 5, tiny_copy.width), torch.zeros(5, tiny_copy.width))
    made = LatentGenerator(tiny_copy, table, ("a", "b"), 1, 2.0, batch_size=3, compiles=True)
    made([0, 1, 0])
    assert asked == [(6, 5)]
    assert tiny_copy.is_compiled_for(6, 5) and not tiny_copy.is_compiled_for(6)
