"""The loss and the samplers against numbers worked out by hand, closed forms and diffusers' own pipeline."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline

from sdgen_lib import diffusion
from sdgen_lib.sample import generate_latents

# Stable Diffusion's schedule, in numpy: scaled-linear betas 0.00085..0.012.
ALPHAS = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)


def test_the_tiny_models_schedule_is_stable_diffusions(tiny):
    np.testing.assert_allclose(tiny.alphas_cumprod.numpy(), ALPHAS, rtol=1e-4)


def test_add_noise():
    latents, noise = torch.tensor([2.0, -1.0]).view(2, 1, 1, 1), torch.tensor([1.0, 3.0]).view(2, 1, 1, 1)
    found = diffusion.add_noise(latents, noise, torch.tensor([0.64, 0.36]))
    assert found.flatten().tolist() == pytest.approx([0.8 * 2 + 0.6 * 1, 0.6 * -1 + 0.8 * 3])
    assert torch.equal(diffusion.add_noise(latents, noise, torch.tensor(1.0)), latents)
    assert torch.equal(diffusion.add_noise(latents, noise, torch.tensor(0.0)), noise)


def test_diffusion_loss_by_hand():
    seen = {}

    def predict_noise(latents, t, context):
        seen.update(latents=latents, t=t, context=context)
        return latents / 2

    latents, noise = torch.tensor([2.0, -1.0]).view(2, 1, 1, 1), torch.tensor([1.0, 3.0]).view(2, 1, 1, 1)
    t, context = torch.tensor([1, 0]), torch.zeros(2, 1, 4)
    loss = diffusion.diffusion_loss(predict_noise, latents, context, t, noise, torch.tensor([0.36, 0.64]))
    # Noisy: 2.2 and 1.8; predicted 1.1 and 0.9; errors 0.1 and 2.1; squares 0.01 and 4.41.
    assert seen["latents"].flatten().tolist() == pytest.approx([2.2, 1.8])
    assert seen["t"] is t and seen["context"] is context
    assert float(loss) == pytest.approx((0.01 + 4.41) / 2)


@pytest.mark.parametrize(("scale", "expected", "batches"), [(0, 1, [2]), (0.5, 3, [4]), (1, 5, [2]), (3, 13, [4])])
def test_guided_noise(scale, expected, batches):
    """The prediction is the context's mean: 5 conditional, 1 unconditional."""
    sizes, times = [], []

    def predict_noise(latents, t, context):
        sizes.append(len(latents))
        times.append(t)
        assert len(t) == len(context) == len(latents) and t.dtype == torch.int64
        return context.mean(dim=(1, 2)).view(-1, 1, 1, 1) * torch.ones_like(latents)

    latents = torch.randn(2, 4, 3, 3)
    found = diffusion.guided_noise(predict_noise, latents, 17, torch.full((2, 6, 8), 5.0), torch.ones(6, 8), scale)
    assert found.shape == latents.shape and torch.equal(found, torch.full_like(latents, expected))
    assert sizes == batches  # the half without weight is not computed, and no more than one pass is made
    assert (times[0] == 17).all()


def test_guided_noise_keeps_each_image_with_its_context():
    def predict_noise(latents, t, context):
        return latents * context.mean(dim=(1, 2)).view(-1, 1, 1, 1)

    latents = torch.tensor([1.0, 10.0]).view(2, 1, 1, 1)
    context = torch.tensor([2.0, 3.0]).view(2, 1, 1)
    found = diffusion.guided_noise(predict_noise, latents, 0, context, torch.tensor([[1.0]]), 2.0)
    assert found.flatten().tolist() == [1 + 2 * (2 - 1), 10 + 2 * (30 - 10)]


# --- timesteps ---


def test_inference_timesteps_are_the_released_codes():
    """round(i * 999 / (n - 1)), halves to even, in exact fractions."""
    for n in range(2, 1001):
        expected = [round(Fraction(i * 999, n - 1)) for i in reversed(range(n))]
        assert diffusion.inference_timesteps(n).tolist() == expected, n
    assert diffusion.inference_timesteps(1).tolist() == [999]
    assert diffusion.inference_timesteps(5, num_train_timesteps=5).tolist() == [4, 3, 2, 1, 0]


@pytest.mark.parametrize("name", list(diffusion.SAMPLERS))
@pytest.mark.parametrize("steps", [0, 1001])
def test_every_sampler_refuses_an_impossible_number_of_steps(name, steps):
    alphas, noise = torch.from_numpy(ALPHAS).float(), torch.zeros(1, 1, 1, 1)
    with pytest.raises(ValueError, match=f"from 1 to .*not {steps}"):
        diffusion.SAMPLERS[name](lambda latents, t: latents, noise, steps, alphas)


@pytest.mark.parametrize("n", [0, -1, 1001])
def test_inference_timesteps_refuses(n):
    with pytest.raises(ValueError, match=f"from 1 to 1000, not {n}"):
        diffusion.inference_timesteps(n)


# --- closed forms ---


@pytest.mark.parametrize("name", list(diffusion.SAMPLERS))
@pytest.mark.parametrize("steps", [1, 2, 7, 20])
def test_data_of_a_single_point_is_returned(name, steps):
    """With the exact noise predictor of data that is one point x0, every step predicts x0: it is the result."""
    alphas = torch.from_numpy(ALPHAS).float()
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(1, 4, 2, 2, generator=generator), torch.randn(3, 4, 2, 2, generator=generator)

    def guided(latents, t):
        return (latents - alphas[t].sqrt() * x0) / (1 - alphas[t]).sqrt()

    seen = []
    found = diffusion.SAMPLERS[name](guided, noise, steps, alphas, lambda i, _, predicted: seen.append((i, predicted)))
    torch.testing.assert_close(found, x0.expand(3, -1, -1, -1), atol=1e-4, rtol=1e-4)
    assert [i for i, _ in seen] == list(range(steps))
    for _, predicted in seen:
        torch.testing.assert_close(predicted, x0.expand(3, -1, -1, -1), atol=1e-3, rtol=1e-3)


def gaussian(mean, deviation, alphas):
    """The exact noise predictor of Gaussian data."""

    def guided(latents, t):
        a = alphas[t]
        return (1 - a).sqrt() * (latents - a.sqrt() * mean) / (a * deviation**2 + 1 - a)

    return guided


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20, 50])
def test_ddim_on_gaussian_data_is_a_linear_recursion(steps):
    """For data N(m, s^2), z = x - sqrt(a) m obeys z' = z (s^2 sqrt(a a') + sqrt((1-a)(1-a'))) / (a s^2 + 1 - a)."""
    mean, deviation = 0.7, 0.4
    noise = np.random.default_rng(0).normal(size=(2, 4, 2, 2))
    visited = [ALPHAS[round(i * 999 / (steps - 1))] for i in reversed(range(steps))] if steps > 1 else [ALPHAS[999]]
    z = noise - math.sqrt(visited[0]) * mean
    for a, b in zip(visited, [*visited[1:], 1.0], strict=True):
        z = z * (deviation**2 * math.sqrt(a * b) + math.sqrt((1 - a) * (1 - b))) / (a * deviation**2 + 1 - a)
    alphas = torch.from_numpy(ALPHAS)
    found = diffusion.ddim(gaussian(mean, deviation, alphas), torch.from_numpy(noise), steps, alphas)
    np.testing.assert_allclose(found.numpy(), z + mean, atol=1e-9)


@pytest.mark.parametrize(("name", "steps", "tolerance"), [("ddim", 1000, 6e-3), ("dpm-solver++", 500, 7e-3)])
def test_many_steps_reach_the_exact_flow(name, steps, tolerance):
    """The probability-flow ODE of Gaussian data: a noise's distance from the mean, in standard deviations, stays."""
    mean, deviation, alphas = 0.7, 0.4, torch.from_numpy(ALPHAS)
    noise = torch.linspace(-2, 2, 9, dtype=torch.float64).view(-1, 1, 1, 1)
    last = ALPHAS[999]
    distance = (noise.numpy() - math.sqrt(last) * mean) / math.sqrt(last * deviation**2 + 1 - last)
    found = diffusion.SAMPLERS[name](gaussian(mean, deviation, alphas), noise, steps, alphas)
    np.testing.assert_allclose(found.numpy(), mean + deviation * distance, atol=tolerance)


# --- diffusers' own pipeline ---


def both(tiny, scheduler, sampler, steps):
    """The picture of one prompt at guidance 3, ours and the pipeline's, from the same latents and contexts."""
    pipeline = StableDiffusionPipeline(
        vae=tiny.vae, unet=tiny.unet, text_encoder=tiny.text_encoder, tokenizer=tiny.tokenizer, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(1, *tiny.latent_shape, generator=torch.Generator().manual_seed(3))
    context, empty = tiny.text_context(["red circle on blue"]), tiny.text_context([""])
    theirs = pipeline(
        prompt_embeds=context, negative_prompt_embeds=empty, latents=noise, guidance_scale=3.0,
        num_inference_steps=steps, height=tiny.image_size, width=tiny.image_size, output_type="np",
    ).images  # fmt: skip
    ours = generate_latents(
        tiny, context, empty[0], noise, num_inference_steps=steps, guidance_scale=3.0, sampler=sampler
    )
    theirs = np.round(theirs * 255).astype(int).transpose(0, 3, 1, 2)
    return tiny.decode(ours).numpy().astype(int), theirs


def test_ddim_is_the_pipelines(tiny):
    """diffusers' DDIM steps from t to t - 1000 // n; ours to the next timestep of the list, round(i * 999 / (n - 1)).

    The two agree at every step only where 999 / (n - 1) is the whole number 1000 // n: at n = 1000. (At n = 334 the
    list has stride 3, but 1000 // 334 is 2.)
    """
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="linspace",
        set_alpha_to_one=True, clip_sample=False,
    )  # fmt: skip
    ours, theirs = both(tiny, scheduler, "ddim", 1000)
    assert theirs.std() > 5  # a picture, not a flat field
    assert np.abs(ours - theirs).max() <= 1


def test_dpm_solver_is_the_pipelines(tiny):
    scheduler = DPMSolverMultistepScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="linspace"
    )
    ours, theirs = both(tiny, scheduler, "dpm-solver++", 12)
    assert theirs.std() > 5
    assert np.abs(ours - theirs).max() <= 1
