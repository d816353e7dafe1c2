"""The loss against numbers worked out by hand."""

import numpy as np
import pytest
import torch

from sdgen_lib.diffusion.conditions import Condition
from sdgen_lib.diffusion.loss import add_noise, diffusion_loss, example_losses

LATENTS = torch.tensor([2.0, -1.0]).view(2, 1, 1, 1)
NOISE = torch.tensor([1.0, 3.0]).view(2, 1, 1, 1)


def test_add_noise():
    found = add_noise(LATENTS, NOISE, torch.tensor([0.64, 0.36]))
    assert found.flatten().tolist() == pytest.approx([0.8 * 2 + 0.6 * 1, 0.6 * -1 + 0.8 * 3])
    assert torch.equal(add_noise(LATENTS, NOISE, torch.tensor(1.0)), LATENTS)
    assert torch.equal(add_noise(LATENTS, NOISE, torch.tensor(0.0)), NOISE)


def half(latents, t, condition):
    return latents / 2


def test_diffusion_loss_by_hand():
    seen = {}

    def predict_noise(latents, t, condition):
        seen.update(latents=latents, t=t, condition=condition)
        return half(latents, t, condition)

    t, condition = torch.tensor([1, 0]), Condition(torch.zeros(2, 1, 4))
    loss = diffusion_loss(predict_noise, LATENTS, condition, t, NOISE, torch.tensor([0.36, 0.64]))
    # Noisy: 2.2 and 1.8; predicted 1.1 and 0.9; errors 0.1 and 2.1; squares 0.01 and 4.41.
    assert seen["latents"].flatten().tolist() == pytest.approx([2.2, 1.8])
    assert seen["t"] is t and seen["condition"] is condition
    assert loss.shape == () and float(loss) == pytest.approx((0.01 + 4.41) / 2)


def test_example_losses_by_hand():
    arguments = (
        half,
        LATENTS,
        Condition(torch.zeros(2, 1, 4)),
        torch.tensor([1, 0]),
        NOISE,
        torch.tensor([0.36, 0.64]),
    )
    assert example_losses(*arguments).tolist() == pytest.approx([0.01, 4.41], rel=1e-4)
    weight = torch.tensor([3.0, 0.5])
    assert example_losses(*arguments, weight).tolist() == pytest.approx([0.03, 2.205], rel=1e-4)
    assert float(diffusion_loss(*arguments, weight)) == pytest.approx((0.03 + 2.205) / 2, rel=1e-4)


def test_each_image_has_its_own_loss_and_the_batchs_is_their_mean(tiny):
    """In numpy, image by image; and no image's loss depends on the others in its batch."""
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(5, *tiny.latent_shape, generator=generator) for _ in range(2))
    t, weight = torch.tensor([0, 200, 500, 800, 999]), torch.rand(5, generator=generator)
    condition = Condition(torch.randn(5, tiny.tokens, tiny.width, generator=generator))
    with torch.no_grad():
        rest = (t, noise, tiny.alphas_cumprod, weight)
        found = example_losses(tiny.predict_noise, latents, condition, *rest)
        mean = diffusion_loss(tiny.predict_noise, latents, condition, *rest)
        for i in range(5):
            alpha_bar = float(tiny.alphas_cumprod[t[i]])
            noisy = np.sqrt(alpha_bar) * latents[i].numpy() + np.sqrt(1 - alpha_bar) * noise[i].numpy()
            one = tiny.unet(
                torch.tensor(noisy).float()[None], t[i], encoder_hidden_states=condition.context[i : i + 1]
            ).sample
            expected = float(weight[i]) * np.square(one[0].numpy() - noise[i].numpy()).mean()
            assert float(found[i]) == pytest.approx(expected, rel=1e-3)
    assert found.shape == (5,) and float(mean) == pytest.approx(float(found.mean()), rel=1e-6)


def test_a_16_bit_prediction_is_compared_in_32_bits():
    def predict_noise(latents, t, condition):
        return torch.full_like(latents, 1 / 3).to(torch.bfloat16)

    noise = torch.full((1, 1, 1, 1), 1e-4)
    found = example_losses(
        predict_noise, noise, Condition(torch.zeros(1, 1, 1)), torch.tensor([0]), noise, torch.ones(1)
    )
    expected = (float(torch.tensor(1 / 3).bfloat16()) - 1e-4) ** 2
    assert found.dtype == torch.float32 and float(found) == pytest.approx(expected, rel=1e-6)
