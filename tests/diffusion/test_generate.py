"""An image depends on (run seed, set, index), its label and the sampler: on nothing else."""

import contextlib
import itertools

import pytest
import torch

from sdgen_lib import backbone, data, sample
from sdgen_lib.class_encoder import ClassEncoder


@pytest.fixture(scope="module")
def encoder(tiny):
    """Three classes whose contexts are those of three captions."""
    made = ClassEncoder(3, tiny.tokens, tiny.width, start=tiny.text_context([""])[0])
    contexts = tiny.text_context(["white digit 1 on black", "black circle on white", "red square on blue"])
    with torch.no_grad():
        made.linear.weight.copy_((contexts - made.contexts()[0]).reshape(3, -1).T)
    return made.requires_grad_(False)


LABELS = torch.tensor([0, 1, 2, 1, 0])


@pytest.fixture(scope="module")
def generate(tiny, encoder):
    def call(labels=LABELS, **options):
        return sample.generate(tiny, encoder, labels, **{"num_inference_steps": 4, "guidance_scale": 2.0, **options})

    return call


@pytest.fixture(scope="module")
def whole(generate):
    return generate()


def gap(one, other):
    return int((one.int() - other.int()).abs().max())


def test_layout(whole):
    assert whole.dtype == torch.uint8 and whole.shape == (5, 3, 32, 32) and whole.device.type == "cpu"


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_the_batch_size_does_not_matter(generate, whole, batch_size):
    assert gap(generate(batch_size=batch_size), whole) <= 1


def test_resizing_without_antialiasing(generate, whole):
    """16 of 32 pixels: bilinear samples between each two pixels; antialiasing looks further around."""
    expected = whole.float().unflatten(3, (16, 2)).mean(4).unflatten(2, (16, 2)).mean(3)
    found = generate(image_size=16, antialias=False)
    assert (found.float() - expected).abs().max() <= 1
    assert gap(generate(image_size=16), found) > 5


def test_shards_make_the_same_set(generate, whole):
    shards = [generate(LABELS[a:b], first_index=a) for a, b in ((0, 2), (2, 5))]
    assert gap(torch.cat(shards), whole) <= 1


def test_images_differ_by_index_set_seed_and_label(generate, whole):
    assert gap(whole[1], whole[3]) > 20  # the same label
    for other in ({"set_name": "other"}, {"seed": 1}, {"first_index": 1}):
        changed = generate(**other)
        assert all(gap(a, b) > 20 for a, b in zip(changed, whole, strict=True)), other
    assert gap(generate(LABELS.roll(2))[0], whole[0]) > 20  # class 1 from the noise of a class 0


def test_it_is_the_sampler_step_by_step(tiny, encoder, whole):
    """The same by hand: noise, contexts, guidance away from the zero vector's context, decoding."""
    noise = sample.initial_noise(0, "set", range(5), tiny.latent_shape)
    away_from = encoder.linear.bias.view(8, 64)
    latents = sample.generate_latents(
        tiny, encoder.contexts()[LABELS], away_from, noise, num_inference_steps=4, guidance_scale=2.0
    )
    assert gap(tiny.decode(latents), whole) <= 1


def test_unconditional_is_what_guidance_moves_away_from(generate, whole):
    assert gap(generate(unconditional="class_mean"), whole) > 20
    assert gap(generate(unconditional="empty_prompt"), whole) <= 1  # this encoder's bias is the empty prompt's context
    one = [generate(guidance_scale=1.0, unconditional=kind) for kind in ("zero", "class_mean")]
    assert torch.equal(*one)  # at scale 1 it has no weight


def test_without_guidance_the_label_has_no_weight(generate):
    assert torch.equal(generate(guidance_scale=0.0), generate(LABELS.roll(1), guidance_scale=0.0))


def test_the_sampler_is_a_choice(generate, whole):
    assert gap(generate(sampler="dpm-solver++"), whole) > 5
    with pytest.raises(KeyError):
        generate(sampler="euler")


def test_image_size(generate, whole):
    small = generate(image_size=16)
    assert small.shape == (5, 3, 16, 16) and torch.equal(small, data.resize(whole, 16))


@pytest.mark.parametrize("scale", [-0.1, float("nan")])
def test_a_negative_guidance_scale_is_refused(generate, scale):
    with pytest.raises(ValueError, match="guidance_scale must be at least 0"):
        generate(guidance_scale=scale)


def test_progress_is_told(generate, capsys):
    done = []
    generate(batch_size=2, on_batch=done.append)
    assert done == [2, 4, 5]
    assert capsys.readouterr().err == ""
    generate(progress="drawing digits")
    shown = capsys.readouterr().err
    assert "drawing digits" in shown and "5/5" in shown


class SmallMemory:
    """A backbone on a GPU that holds ``most`` images at once."""

    def __init__(self, backbone, most):
        self.backbone, self.most, self.sizes = backbone, most, []

    def __getattr__(self, name):
        return getattr(self.backbone, name)

    def decode(self, latents):
        self.sizes.append(len(latents))
        if len(latents) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return self.backbone.decode(latents)


@pytest.mark.parametrize(("most", "sizes"), [(3, [4, 2, 2, 1]), (1, [4, 2, 1, 1, 1, 1, 1])])
def test_a_batch_that_the_gpu_cannot_hold_is_halved(tiny, encoder, whole, most, sizes, capsys):
    small = SmallMemory(tiny, most)
    drawn = sample.generate(small, encoder, LABELS, num_inference_steps=4, guidance_scale=2.0, batch_size=4)
    assert small.sizes == sizes and gap(drawn, whole) <= 1
    assert "going on with 2 images at once, not 4" in capsys.readouterr().out


def test_a_gpu_that_holds_no_image_says_what_to_do(tiny, encoder):
    with pytest.raises(MemoryError, match="Not even one image fits .* smaller backbone"):
        sample.generate(SmallMemory(tiny, 0), encoder, LABELS, num_inference_steps=1, guidance_scale=1.0)


# --- noise and labels ---


def test_initial_noise_is_standard_normal():
    noise = sample.initial_noise(0, "a", range(400), (4, 8, 8))
    assert noise.shape == (400, 4, 8, 8) and noise.dtype == torch.float32
    values = noise.flatten()
    assert abs(float(values.mean())) < 0.015 and abs(float(values.std()) - 1) < 0.015
    assert abs(float((values**4).mean()) - 3) < 0.15  # a normal distribution's fourth moment
    rows = noise.flatten(1)
    correlations = (rows @ rows.T / rows.shape[1]).fill_diagonal_(0)
    assert float(correlations.abs().max()) < 6 / 16  # 256 values: 1/16 is one standard deviation


def test_initial_noise_belongs_to_seed_set_and_index():
    one = sample.initial_noise(0, "a", range(10), (4, 2, 2))
    assert torch.equal(one[[7, 2]], sample.initial_noise(0, "a", [7, 2], (4, 2, 2)))
    keys = itertools.product((0, 1, 2**32 - 1), ("trial", "table 1", "synthetic"), (0, 1, 10**6))
    seen = {sample.initial_noise(seed, name, [i], (4, 2, 2)).numpy().tobytes() for seed, name, i in keys}
    assert len(seen) == 27


def test_balanced_labels():
    labels = sample.balanced_labels(11, 4)
    assert labels.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2] and labels.dtype == torch.int64


# --- one context for all steps ---


@pytest.mark.parametrize("guidance_scale", [0.0, 1.0, 2.0])
def test_keys_and_values_of_the_context_are_computed_once(tiny, encoder, monkeypatch, guidance_scale):
    """And the latents are those of who computes them at every step. A callback's own pass has its own context."""
    linear, seen = tiny.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_k, []
    forward = torch.nn.Linear.forward

    def counted(self, x):
        if self is linear:
            seen.append(x)
        return forward(self, x)

    monkeypatch.setattr(torch.nn.Linear, "forward", counted)
    noise, t = sample.initial_noise(0, "set", range(2), tiny.latent_shape), torch.tensor([500])
    other = encoder.contexts()[2:]
    own_passes = []

    def look(*_):
        own_passes.append(tiny.predict_noise(noise[:1], t, other))

    def latents(**options):
        return sample.generate_latents(
            tiny, encoder.contexts()[:2], encoder.unconditional(), noise, num_inference_steps=5,
            guidance_scale=guidance_scale, **options,
        )  # fmt: skip

    found = latents()
    assert len(seen) == 1
    assert torch.equal(latents(callback=look), found) and len(seen) == 1 + 1 + 5
    assert all(torch.equal(own, tiny.predict_noise(noise[:1], t, other)) for own in own_passes)
    seen.clear()
    monkeypatch.setattr(backbone.Backbone, "one_context", lambda self: contextlib.nullcontext())
    torch.testing.assert_close(latents(), found)
    assert len(seen) == 5
