"""Low-rank adapters: what trains, in which digits, and that merged weights draw as the adapted UNet does."""

import flat
import pytest
import torch

from sdgen_lib.diffusion import backbone, lora
from sdgen_lib.diffusion.conditions import Condition
from sdgen_lib.diffusion.training import Latents, fit


def predict(model):
    generator = torch.Generator().manual_seed(0)
    latents, context = torch.randn(2, 8, 8, 8, generator=generator), torch.randn(2, 8, 64, generator=generator)
    with torch.no_grad():
        return model.predict_noise(latents, torch.tensor([10, 600]), Condition(context))


def test_only_small_updates_train_and_they_begin_at_nothing(tiny_copy):
    before = predict(tiny_copy)
    trainable = lora.add(tiny_copy.unet, rank=4)
    assert torch.equal(predict(tiny_copy), before)
    assert {name for name, p in tiny_copy.unet.named_parameters() if p.requires_grad} == set(trainable)
    size = sum(p.numel() for p in trainable.values())
    assert 0 < size < 0.05 * sum(p.numel() for p in tiny_copy.unet.parameters())
    assert all(min(p.shape) == 4 for p in trainable.values())


def test_merged_weights_draw_as_the_adapted_unet(tiny_copy):
    pretrained, before = set(tiny_copy.unet.state_dict()), predict(tiny_copy)
    trainable = lora.add(tiny_copy.unet, rank=4)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in trainable.values():
            p.copy_(0.2 * torch.randn_like(p))
    weights, adapted = {name: p.detach().clone() for name, p in trainable.items()}, predict(tiny_copy)
    assert (adapted - before).abs().max() > 0.01
    assert lora.is_lora(weights) and not lora.is_lora(tiny_copy.vae.state_dict())
    tiny_copy.set_unet(weights, torch.float32)
    torch.testing.assert_close(predict(tiny_copy), adapted, atol=1e-4, rtol=1e-4)
    assert set(tiny_copy.unet.state_dict()) == pretrained  # a plain UNet again
    tiny_copy.set_unet(dtype=torch.float32)
    torch.testing.assert_close(predict(tiny_copy), before)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_small_updates_are_not_lost_in_a_16_bit_model(precision):
    """AdamW moves each number by about the learning rate: 1e-5, less than half of what 16 bits can tell apart at 1e-2.

    In float16 a training also needs gradients of 32 bits: its scaler refuses others.
    """
    model = backbone.load("tiny", device="cpu", precision=precision)
    frozen = {name: value.clone() for name, value in model.unet.state_dict().items()}
    torch.manual_seed(0)
    trainable = lora.add(model.unet, rank=2)
    assert {p.dtype for p in trainable.values()} == {torch.float32} and model.unet.dtype == model.dtype
    before = {name: p.detach().clone() for name, p in trainable.items()}
    generator = torch.Generator().manual_seed(0)
    train = Latents(torch.randn(4, *model.latent_shape, generator=generator), torch.arange(4) % 2)
    told = flat.Contexts(torch.randn(2, model.tokens, model.width, generator=generator)).requires_grad_(False)
    how = dict(batch_size=2, learning_rate=1e-5, weight_decay=0.0, clip_norm=1e9, seed=0)
    list(fit(trainable, model, told, train, epochs=3, **how))
    moved = {name: (p - before[name]).abs() for name, p in trainable.items()}
    assert max(float(change.max()) for change in moved.values()) < 6.1e-5  # six steps
    for factor in ("lora_A", "lora_B"):
        changes = torch.cat([change.flatten() for name, change in moved.items() if factor in name])
        assert float((changes > 0).float().mean()) > 0.95, factor
    for name, value in model.unet.state_dict().items():
        if ".lora_" not in name:
            assert torch.equal(value, frozen[name.replace(".base_layer", "")]), name


def test_a_16_bit_model_takes_its_own_updates(tiny):
    """Sampling with them: added to the pretrained weights in 32 bits, and then rounded once."""
    model = backbone.load("tiny", device="cpu", precision="bf16")
    torch.manual_seed(0)
    updates = {name: 0.2 * torch.randn_like(p) for name, p in lora.add(model.unet, rank=2).items()}
    model.set_unet(updates)
    exact = backbone.load("tiny", device="cpu", precision="fp32")
    exact.set_unet(updates)
    assert model.unet.dtype == torch.bfloat16 and (predict(exact) - predict(tiny)).abs().max() > 0.01
    expected = exact.unet.state_dict()
    assert all(torch.equal(value, expected[name].bfloat16()) for name, value in model.unet.state_dict().items())
