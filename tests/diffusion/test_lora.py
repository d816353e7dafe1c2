"""Low-rank adapters: what trains, and that merged weights draw as the adapted UNet does."""

import torch

from sdgen_lib import lora


def predict(model):
    generator = torch.Generator().manual_seed(0)
    latents, context = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 8, 64, generator=generator)
    with torch.no_grad():
        return model.predict_noise(latents, torch.tensor([10, 600]), context)


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
