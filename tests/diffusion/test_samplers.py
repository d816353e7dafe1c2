"""The samplers against numbers worked out by hand, closed forms and diffusers' own pipeline."""

import dataclasses
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)

from sdgen_lib.diffusion.conditions import Condition
from sdgen_lib.diffusion.generate import generate_latents
from sdgen_lib.diffusion.samplers import (
    SAMPLERS,
    Start,
    ddim,
    guided_noise,
    inference_timesteps,
    passes_per_step,
    skipped,
)

# Stable Diffusion's schedule, in numpy: scaled-linear betas 0.00085..0.012.
ALPHAS = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def test_the_tiny_models_schedule_is_stable_diffusions(tiny):
    np.testing.assert_allclose(tiny.alphas_cumprod.numpy(), ALPHAS, rtol=1e-4)


@pytest.mark.parametrize(("scale", "expected", "batches"), [(0, 1, [2]), (0.5, 3, [4]), (1, 5, [2]), (3, 13, [4])])
def test_guided_noise(scale, expected, batches):
    """The prediction is the context's mean: 5 conditional, 1 unconditional."""
    sizes, times = [], []

    def predict_noise(latents, t, condition):
        sizes.append(len(latents))
        times.append(t)
        assert len(t) == len(condition) == len(latents) and t.dtype == torch.int64
        return condition.context.mean(dim=(1, 2)).view(-1, 1, 1, 1) * torch.ones_like(latents)

    latents = torch.randn(2, 4, 3, 3)
    told, nothing = Condition(torch.full((2, 6, 8), 5.0)), Condition(torch.ones(1, 6, 8))
    found = guided_noise(predict_noise, latents, 17, told, nothing, scale)
    assert found.shape == latents.shape and torch.equal(found, torch.full_like(latents, expected))
    assert sizes == batches  # the half without weight is not computed, and no more than one pass is made
    assert passes_per_step(scale) * len(latents) == sum(batches)
    assert (times[0] == 17).all()


def test_guided_noise_keeps_each_image_with_its_context():
    def predict_noise(latents, t, condition):
        return latents * condition.context.mean(dim=(1, 2)).view(-1, 1, 1, 1)

    latents = torch.tensor([1.0, 10.0]).view(2, 1, 1, 1)
    condition, one = Condition(torch.tensor([2.0, 3.0]).view(2, 1, 1)), Condition(torch.ones(1, 1, 1))
    found = guided_noise(predict_noise, latents, 0, condition, one, 2.0)
    assert found.flatten().tolist() == [1 + 2 * (2 - 1), 10 + 2 * (30 - 10)]
    of_each = Condition(torch.tensor([1.0, 4.0]).view(2, 1, 1))  # an unconditional context for each image
    found = guided_noise(predict_noise, latents, 0, condition, of_each, 2.0)
    assert found.flatten().tolist() == [1 + 2 * (2 - 1), 40 + 2 * (30 - 40)]
    assert guided_noise(predict_noise, latents, 0, condition, of_each, 0.0).flatten().tolist() == [1, 40]


# --- timesteps ---


def test_inference_timesteps_are_the_released_codes():
    """round(i * 999 / (n - 1)), halves to even, in exact fractions."""
    for n in range(2, 1001):
        expected = [round(Fraction(i * 999, n - 1)) for i in reversed(range(n))]
        assert inference_timesteps(n).tolist() == expected, n
    assert inference_timesteps(1).tolist() == [999]
    assert inference_timesteps(5, num_train_timesteps=5).tolist() == [4, 3, 2, 1, 0]


@pytest.mark.parametrize("name", list(SAMPLERS))
@pytest.mark.parametrize("steps", [0, 1001])
def test_every_sampler_refuses_an_impossible_number_of_steps(name, steps):
    alphas, noise = torch.from_numpy(ALPHAS).float(), torch.zeros(1, 1, 1, 1)
    with pytest.raises(ValueError, match=f"from 1 to .*not {steps}"):
        SAMPLERS[name](lambda latents, t: latents, noise, steps, alphas)


@pytest.mark.parametrize("n", [0, -1, 1001])
def test_inference_timesteps_refuses(n):
    with pytest.raises(ValueError, match=f"from 1 to 1000, not {n}"):
        inference_timesteps(n)


# --- closed forms ---


@pytest.mark.parametrize("name", list(SAMPLERS))
@pytest.mark.parametrize("steps", [1, 2, 7, 20, 1000])
def test_data_of_a_single_point_is_returned(name, steps):
    """With the exact noise predictor of data that is one point x0, every step predicts x0: it is the result."""
    alphas = torch.from_numpy(ALPHAS).float()
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(1, 4, 2, 2, generator=generator), torch.randn(3, 4, 2, 2, generator=generator)

    def guided(latents, t):
        return (latents - alphas[t].sqrt() * x0) / (1 - alphas[t]).sqrt()

    seen = []
    found = SAMPLERS[name](guided, noise, steps, alphas, lambda i, _, predicted: seen.append((i, predicted)))
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
    found = ddim(gaussian(mean, deviation, alphas), torch.from_numpy(noise), steps, alphas)
    np.testing.assert_allclose(found.numpy(), z + mean, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "steps", "tolerance"), [("ddim", 1000, 6e-3), ("dpm-solver++", 500, 7e-3), ("dpm-solver++", 1000, 7e-3)]
)
def test_many_steps_reach_the_exact_flow(name, steps, tolerance):
    """The probability-flow ODE of Gaussian data: a noise's distance from the mean, in standard deviations, stays."""
    mean, deviation, alphas = 0.7, 0.4, torch.from_numpy(ALPHAS)
    noise = torch.linspace(-2, 2, 9, dtype=torch.float64).view(-1, 1, 1, 1)
    last = ALPHAS[999]
    distance = (noise.numpy() - math.sqrt(last) * mean) / math.sqrt(last * deviation**2 + 1 - last)
    found = SAMPLERS[name](gaussian(mean, deviation, alphas), noise, steps, alphas)
    np.testing.assert_allclose(found.numpy(), mean + deviation * distance, atol=tolerance)


@pytest.mark.parametrize("steps", [1, 14, 333, 997, 998, 999, 1000])
def test_dpm_solver_visits_each_timestep_once(steps):
    """As diffusers' scheduler does by itself, but for 1000: there it visits 999 twice, and makes NaN."""
    scheduler = DPMSolverMultistepScheduler(timestep_spacing="linspace")
    scheduler.set_timesteps(steps)
    alphas, visited = torch.from_numpy(ALPHAS).float(), []

    def guided(latents, t):
        visited.append(t)
        return torch.zeros_like(latents)

    found = SAMPLERS["dpm-solver++"](guided, torch.ones(1, 1, 1, 1), steps, alphas)
    expected = scheduler.timesteps.tolist() if steps < 1000 else list(range(999, -1, -1))
    assert visited == expected and len(set(visited)) == steps
    assert float(found) == pytest.approx(
        1 / math.sqrt(ALPHAS[999]), rel=1e-3
    )  # without noise x_t = sqrt(alpha_bar) x_0


# --- diffusers' own pipeline ---


def both(tiny, scheduler, sampler, steps):
    """The picture of one prompt at guidance 3, ours and the pipeline's, from the same latents and contexts."""
    networks = dict(vae=tiny.vae, unet=tiny.unet, text_encoder=tiny.text_encoder, tokenizer=tiny.tokenizer)
    unused = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipeline = StableDiffusionPipeline(scheduler=scheduler, **networks, **unused)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(1, *tiny.latent_shape, generator=torch.Generator().manual_seed(3))
    context, empty = tiny.text_context(["red circle on blue"]), tiny.text_context([""])
    how = dict(num_inference_steps=steps, guidance_scale=3.0)
    size = dict(height=tiny.image_size, width=tiny.image_size, output_type="np")
    theirs = pipeline(prompt_embeds=context, negative_prompt_embeds=empty, latents=noise, **how, **size).images
    ours = generate_latents(tiny, Condition(context), Condition(empty), noise, sampler=sampler, **how)
    theirs = np.round(theirs * 255).astype(int).transpose(0, 3, 1, 2)
    return tiny.decode(ours).numpy().astype(int), theirs


def ddim_like_the_pipelines(tiny, steps, **schedule):
    """diffusers' DDIM steps from t to t - 1000 // n; ours to the next timestep of the list, round(i * 999 / (n - 1)).

    The two agree at every step only where 999 / (n - 1) is the whole number 1000 // n: where each timestep is visited.
    (At n = 334 the list has stride 3, but 1000 // 334 is 2.)
    """
    scheduler = DDIMScheduler(timestep_spacing="linspace", set_alpha_to_one=True, clip_sample=False, **schedule)
    ours, theirs = both(tiny, scheduler, "ddim", steps)
    assert theirs.std() > 5  # a picture, not a flat field
    assert np.abs(ours - theirs).max() <= 1


def test_ddim_is_the_pipelines(tiny):
    """On every 25th timestep of the schedule, as if there were no others."""
    short = dataclasses.replace(tiny, alphas_cumprod=tiny.alphas_cumprod[24::25])
    betas = 1 - ALPHAS[24::25] / np.array([1.0, *ALPHAS[24:-1:25]])
    ddim_like_the_pipelines(short, 40, num_train_timesteps=40, trained_betas=betas.tolist())


@pytest.mark.slow
def test_ddim_is_the_pipelines_at_all_timesteps(tiny):
    ddim_like_the_pipelines(tiny, 1000, **BETAS)


def test_dpm_solver_is_the_pipelines(tiny):
    scheduler = DPMSolverMultistepScheduler(timestep_spacing="linspace", **BETAS)
    ours, theirs = both(tiny, scheduler, "dpm-solver++", 12)
    assert theirs.std() > 5
    assert np.abs(ours - theirs).max() <= 1


# --- starting from an image ---


@pytest.mark.parametrize(("strength", "steps"), [(1.0, 10), (0.75, 10), (0.5, 7), (0.25, 30), (0.1, 5), (0.0, 4)])
def test_img2img_leaves_out_as_many_steps_as_diffusers_pipeline(tiny, strength, steps):
    networks = dict(vae=tiny.vae, unet=tiny.unet, text_encoder=tiny.text_encoder, tokenizer=tiny.tokenizer)
    unused = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    scheduler = DDIMScheduler(timestep_spacing="linspace", **BETAS)
    pipeline = StableDiffusionImg2ImgPipeline(scheduler=scheduler, **networks, **unused)
    scheduler.set_timesteps(steps)
    timesteps, _ = pipeline.get_timesteps(steps, strength, "cpu")
    assert skipped(strength, steps) == steps - len(timesteps)


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_img2img_starts_at_a_noisy_image(name):
    """The first latents are x_t of the start at the first timestep that is left; the list goes on as it would."""
    alphas, seen, noise, start = torch.from_numpy(ALPHAS), [], torch.randn(2, 1, 2, 2).double(), torch.ones(2, 1, 2, 2)
    whole = []
    SAMPLERS[name](lambda x, t: whole.append(t) or torch.zeros_like(x), noise, 8, alphas)

    def guided(latents, t):
        seen.append((t, latents.clone()))
        return torch.zeros_like(latents)

    SAMPLERS[name](guided, noise, 8, alphas, None, Start(start.double(), 0.5))
    assert [t for t, _ in seen] == whole[4:]
    t, first = seen[0]
    torch.testing.assert_close(
        first, math.sqrt(ALPHAS[t]) * start + math.sqrt(1 - ALPHAS[t]) * noise, check_dtype=False
    )
    unchanged = SAMPLERS[name](guided, noise, 8, alphas, None, Start(start.double(), 0.0))
    assert torch.equal(unchanged, start.double())


@pytest.mark.parametrize("strength", [-0.1, 1.5, float("nan")])
def test_a_strength_outside_of_0_to_1_is_refused(strength):
    with pytest.raises(ValueError, match="strength must be from 0 to 1, not"):
        skipped(strength, 10)
