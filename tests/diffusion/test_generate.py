"""An image depends on (run seed, set, index), its label and the sampler: on nothing else."""

import contextlib
import dataclasses

import pytest
import torch

from sdgen_lib import data
from sdgen_lib.diffusion import backbone
from sdgen_lib.diffusion.conditions import Condition, ContextTable
from sdgen_lib.diffusion.generate import balanced_labels, generate_latents
from sdgen_lib.diffusion.generate import generate as generate_images
from sdgen_lib.machine.seeds import image_noise


@pytest.fixture(scope="module")
def table(tiny):
    """Three classes whose contexts are those of three captions."""
    contexts = tiny.text_context(["white digit 1 on black", "black circle on white", "red square on blue"])
    return ContextTable(contexts, tiny.text_context([""])[0])


LABELS = torch.tensor([0, 1, 2, 1, 0])


@pytest.fixture(scope="module")
def generate(tiny, table):
    def call(labels=LABELS, table=table, **options):
        return generate_images(tiny, table, labels, **{"num_inference_steps": 4, "guidance_scale": 2.0, **options})

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


def test_it_is_the_sampler_step_by_step(tiny, table, whole):
    """The same by hand: noise, contexts, guidance away from the empty prompt's context, decoding."""
    noise = image_noise(0, "set", range(5), tiny.latent_shape)
    told, nothing = Condition(table.contexts[LABELS]), Condition(table.empty[None])
    latents = generate_latents(tiny, told, nothing, noise, num_inference_steps=4, guidance_scale=2.0)
    assert gap(tiny.decode(latents), whole) <= 1


def test_no_two_images_of_a_large_set_start_alike(tiny, generate):
    """Images 74650 and 84988 did, when a seed of 32 bits was drawn for each."""
    one, other = (generate(LABELS[:1], set_name="synthetic", first_index=index) for index in (74650, 84988))
    assert gap(one, other) > 20


class Written:
    """A conditioner that writes down what it is asked."""

    def __init__(self, table):
        self.table, self.asked = table, []

    def __call__(self, labels, indices, seed):
        assert labels.dtype == indices.dtype == torch.int64
        self.asked += [(label, index, seed) for label, index in zip(labels.tolist(), indices.tolist(), strict=True)]
        return self.table(labels)

    def unconditional(self):
        return self.table.unconditional()


def test_a_conditioner_is_told_each_images_label_place_and_seed(generate, table, whole):
    written = Written(table)
    assert gap(generate(table=written, batch_size=2), whole) <= 1
    assert written.asked == [(0, 0, 0), (1, 1, 0), (2, 2, 0), (1, 3, 0), (0, 4, 0)]
    written.asked.clear()
    generate(LABELS[:3], table=written, seed=7, first_index=100)
    assert written.asked == [(0, 100, 7), (1, 101, 7), (2, 102, 7)]


def test_unconditional_is_what_guidance_moves_away_from(generate, table, whole):
    other = ContextTable(table.contexts, table.contexts.mean(0))
    assert gap(generate(table=other), whole) > 20
    assert torch.equal(*[generate(table=t, guidance_scale=1.0) for t in (table, other)])  # at scale 1 it has no weight


def test_without_guidance_the_label_has_no_weight(generate):
    assert torch.equal(generate(guidance_scale=0.0), generate(LABELS.roll(1), guidance_scale=0.0))


def test_the_sampler_is_a_choice(generate, whole):
    assert gap(generate(sampler="dpm-solver++"), whole) > 5
    with pytest.raises(ValueError, match="Unknown sampler 'dim'. Did you mean 'ddim'.*dpm-solver"):
        generate(sampler="dim")


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


@dataclasses.dataclass
class SmallMemory(backbone.Backbone):
    """A backbone on a GPU that holds ``most`` images at once."""

    most: int = 0
    sizes: list = dataclasses.field(default_factory=list)

    def decode(self, latents):
        self.sizes.append(len(latents))
        if len(latents) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return super().decode(latents)


def small_memory(tiny, most):
    return SmallMemory(**{f.name: getattr(tiny, f.name) for f in dataclasses.fields(tiny)}, most=most)


@pytest.mark.parametrize(("most", "sizes", "again"), [(3, [4, 2, 2, 1], [2, 2, 1]), (1, [4, 2, *[1] * 5], [1] * 5)])
def test_a_batch_that_the_gpu_cannot_hold_is_halved_and_stays_so(tiny, table, whole, most, sizes, again, capsys):
    small = small_memory(tiny, most)
    how = dict(num_inference_steps=4, guidance_scale=2.0, batch_size=4)
    assert gap(generate_images(small, table, LABELS, **how), whole) <= 1 and small.sizes == sizes
    assert "going on with 2 images at once, not 4" in capsys.readouterr().out
    small.sizes.clear()
    assert gap(generate_images(small, table, LABELS, **how), whole) <= 1 and small.sizes == again
    assert capsys.readouterr().out == ""  # the next trial does not run into the wall again


def test_a_gpu_that_holds_no_image_says_what_to_do(tiny, table):
    with pytest.raises(MemoryError, match="Not even one image fits .* smaller backbone"):
        generate_images(small_memory(tiny, 0), table, LABELS, num_inference_steps=1, guidance_scale=1.0)


def test_balanced_labels():
    labels = balanced_labels(11, 4)
    assert labels.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2] and labels.dtype == torch.int64


# --- one context for all steps ---


@pytest.mark.parametrize("guidance_scale", [0.0, 1.0, 2.0])
def test_keys_and_values_of_the_context_are_computed_once(tiny, table, monkeypatch, guidance_scale):
    """And the latents are those of who computes them at every step. A callback's own pass has its own context."""
    linear, seen = tiny.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_k, []
    forward = torch.nn.Linear.forward

    def counted(self, x):
        if self is linear:
            seen.append(x)
        return forward(self, x)

    monkeypatch.setattr(torch.nn.Linear, "forward", counted)
    noise, t = image_noise(0, "set", range(2), tiny.latent_shape), torch.tensor([500])
    told, other = Condition(table.contexts[:2]), Condition(table.contexts[2:])
    own_passes = []

    def look(*_):
        own_passes.append(tiny.predict_noise(noise[:1], t, other))

    def latents(**options):
        how = dict(num_inference_steps=5, guidance_scale=guidance_scale, **options)
        return generate_latents(tiny, told, table.unconditional(), noise, **how)

    found = latents()
    assert len(seen) == 1
    assert torch.equal(latents(callback=look), found) and len(seen) == 1 + 1 + 5
    assert all(torch.equal(own, tiny.predict_noise(noise[:1], t, other)) for own in own_passes)
    seen.clear()
    monkeypatch.setattr(backbone.Backbone, "one_context", lambda self: contextlib.nullcontext())
    torch.testing.assert_close(latents(), found)
    assert len(seen) == 5
