"""The shipped model is a Stable Diffusion like any other; loading says what is wrong and the ways out."""

import dataclasses
import shutil

import huggingface_hub
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from sdgen_lib import data
from sdgen_lib.diffusion import backbone, weights
from sdgen_lib.diffusion.conditions import Condition
from sdgen_lib.diffusion.generate import generate_latents


@pytest.fixture(scope="module")
def pipeline():
    """As any user of diffusers would load the folder."""
    found = StableDiffusionPipeline.from_pretrained(weights.TINY, safety_checker=None)
    found.set_progress_bar_config(disable=True)
    return found


def test_the_stock_pipeline_loads_the_folder_and_answers_a_prompt(pipeline):
    image = pipeline("white digit 7 on black", num_inference_steps=4).images[0]
    assert image.size == (32, 32)
    low, high = image.convert("L").getextrema()
    assert high - low > 20


def test_text_context_is_the_pipelines(tiny, pipeline):
    prompts = ["white digit 7 on black", "", "soft red circle on blue", "a word that no caption has and many more"]
    theirs, _ = pipeline.to(torch.float32).encode_prompt(prompts, "cpu", 1, do_classifier_free_guidance=False)
    ours = tiny.text_context(prompts)
    assert ours.shape == (4, tiny.tokens, tiny.width) == (4, 8, 64) and ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    assert (ours[0] - ours[2]).abs().max() > 0.1


def test_the_folder_is_small_and_holds_nothing_to_unpickle():
    files = [path for path in weights.TINY.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 20e6
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".csv", ".txt", ".md"}
    assert sum(path.suffix == ".safetensors" for path in files) == 3


def test_sizes(tiny):
    assert tiny.latent_shape == (8, 8, 8) and tiny.image_size == 32
    images = torch.zeros(3, 3, 20, 20, dtype=torch.uint8)
    assert tiny.encode(images).shape == (3, 8, 8, 8)
    predicted = tiny.predict_noise(torch.zeros(2, 8, 8, 8), torch.tensor([0, 999]), Condition(torch.zeros(2, 8, 64)))
    assert predicted.shape == (2, 8, 8, 8)


def test_everything_is_frozen_and_in_evaluation_mode(tiny):
    for part in (tiny.vae, tiny.unet, tiny.text_encoder):
        assert not any(parameter.requires_grad for parameter in part.parameters())
        assert not any(module.training for module in part.modules())
        assert {parameter.dtype for parameter in part.parameters()} == {torch.float32}


def test_encode_and_decode_keep_the_picture(tiny):
    """Digits are of no class that the autoencoder was trained on as such: scans of handwriting, enlarged."""
    images = data.load("digits", image_size=32).test.images[:64]
    again = tiny.decode(tiny.encode(images))
    assert again.dtype == torch.uint8 and again.shape == images.shape
    error = (again.float() - images.float()).square().mean()
    assert 10 * torch.log10(255**2 / error) > 25


def test_encode_does_not_depend_on_the_batch_and_draws_no_noise(tiny):
    images = data.load("digits", image_size=16).test.images[:5]
    torch.testing.assert_close(tiny.encode(images), tiny.encode(images, batch_size=2), atol=1e-4, rtol=1e-4)
    assert torch.equal(tiny.encode(images), tiny.encode(images))


def test_latents_have_the_scale_that_the_unet_expects(tiny):
    assert 0.5 < float(tiny.encode(data.load("digits").train.images[:200]).std()) < 2


def draw(tiny, caption, seeds=8):
    """Pictures of a caption, float (seeds, 3, 32, 32) in 0..255."""
    noise = torch.randn(seeds, *tiny.latent_shape, generator=torch.Generator().manual_seed(11))
    caption, empty = (Condition(tiny.text_context([text])) for text in (caption, ""))
    latents = generate_latents(tiny, caption.expand(seeds), empty, noise, num_inference_steps=30, guidance_scale=3.0)
    return tiny.decode(latents).float()


def centre_and_corners(pictures):
    """Mean colours, each (N, 3), of the 8x8 pixels in the middle and of the four 4x4 corners."""
    ends = torch.cat([pictures[..., :4], pictures[..., -4:]], -1)
    return pictures[..., 12:20, 12:20].mean((2, 3)), torch.cat([ends[..., :4, :], ends[..., -4:, :]], -2).mean((2, 3))


def test_it_draws_a_red_circle_on_blue(tiny):
    centre, corners = centre_and_corners(draw(tiny, "red circle on blue"))
    assert int((centre[:, 0] > centre[:, 2] + 40).sum()) >= 6
    assert int((corners[:, 2] > corners[:, 0] + 40).sum()) >= 6


def test_it_draws_a_white_square_on_black(tiny):
    centre, corners = (part.mean(1) for part in centre_and_corners(draw(tiny, "white square on black")))
    assert int((centre > 180).sum()) >= 6
    assert int((corners < 70).sum()) >= 6


# --- loading ---


@pytest.fixture
def a_copy(tmp_path):
    return shutil.copytree(weights.TINY, tmp_path / "model")


def test_a_local_folder_is_loaded_like_the_name(a_copy, tiny):
    found = backbone.load(str(a_copy), device="cpu", precision="fp32")
    assert found.name == str(a_copy) and found.image_size == 32
    mine, theirs = found.unet.state_dict(), tiny.unet.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="Unknown backbone 'tinny'.*Did you mean 'tiny'.*sd1.4"):
        backbone.load("tinny")


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "~/no-such-model"])
def test_a_missing_folder(name):
    with pytest.raises(FileNotFoundError, match="No folder /.*tiny.*diffusers layout or a Hub id"):
        backbone.load(name)


def test_a_folder_without_a_unet(a_copy):
    with pytest.raises(FileNotFoundError, match="no unet/config.json.*model_index.json"):
        backbone.load(str(a_copy / "vae"))


@pytest.mark.parametrize("part", ["vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_folder_without_another_part_names_it(a_copy, part):
    shutil.rmtree(a_copy / part)
    with pytest.raises(OSError, match=part):
        backbone.load(str(a_copy), device="cpu")


def test_pickled_weights_are_not_read(a_copy):
    torch.save({}, a_copy / "unet" / "diffusion_pytorch_model.bin")
    (a_copy / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        backbone.load(str(a_copy), device="cpu")


def test_a_hub_id_without_network_gives_the_ways_out(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="nobody-here/no-such-model.*give its path.*HF_HOME.*backbone='tiny'"):
        backbone.load("nobody-here/no-such-model")


def test_bf16_halves_the_weights_and_comes_near_fp32(tiny):
    rough = backbone.load("tiny", device="cpu", precision="bf16")
    assert rough.unet.dtype == torch.bfloat16 and rough.vae.dtype == torch.float32
    generator = torch.Generator().manual_seed(0)
    latents, t = torch.randn(2, *tiny.latent_shape, generator=generator), torch.tensor([500, 100])
    condition = Condition(tiny.text_context(["white letter a on black", ""]))
    exact, near = (model.predict_noise(latents, t, condition).float() for model in (tiny, rough))
    assert 0 < (exact - near).abs().max() < 0.15


@pytest.mark.parametrize("device", ["cpu:0", torch.device("cpu"), torch.device("cpu", 0)])
def test_every_name_of_a_device_is_that_device(tiny, device):
    """What is written in another way is computed in the same way: by the same attention, kept in the same memory."""
    found = backbone.load("tiny", device=device, precision="auto")
    usual = backbone.load("tiny", device="cpu", precision="auto")
    assert (found.device, found.dtype) == ("cpu", usual.dtype)
    kinds = [{type(p) for p in model.unet.attn_processors.values()} for model in (found, usual)]
    assert kinds[0] == kinds[1] and found.gains_by_compiling
    assert dataclasses.replace(tiny, device=device).device == "cpu"
    assert weights.fingerprint(backbone.find("tiny", "bf16", device)) == usual.fingerprint


MISSING = [("gpu", "A device is .*'gpu'"), ("cuda:99", "There is no device"), ("mps", "There is no device 'mps'")]


@pytest.mark.parametrize(("device", "message"), MISSING)
def test_a_device_that_is_not_there_is_refused_before_anything_is_read(monkeypatch, device, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(weights, "find", None)
    for use in (backbone.load, lambda name, device: backbone.find(name, device=device)):
        with pytest.raises(ValueError, match=message):
            use("tiny", device=device)


# --- what it is told ---


@pytest.fixture
def unclip(tiny):
    """The tiny model with a random UNet that also takes an embedding, as an unCLIP model's does."""
    torch.manual_seed(0)
    channels = tiny.latent_shape[0]
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=tiny.width,
        attention_head_dim=8,
        class_embed_type="projection",
        projection_class_embeddings_input_dim=6,
    )
    return dataclasses.replace(tiny, unet=unet.requires_grad_(False).eval())


def test_an_embedding_reaches_the_unet(unclip):
    """As diffusers' own unCLIP pipeline hands it over: the argument ``class_labels``."""
    generator = torch.Generator().manual_seed(0)
    latents, t = torch.randn(2, *unclip.latent_shape, generator=generator), torch.tensor([10, 700])
    context = torch.randn(2, unclip.tokens, unclip.width, generator=generator)
    one, other = torch.randn(2, 2, 6, generator=generator)
    found = [unclip.predict_noise(latents, t, Condition(context, embedding)) for embedding in (one, other)]
    expected = unclip.unet(latents, t, encoder_hidden_states=context, class_labels=one).sample
    assert torch.equal(found[0], expected) and (found[0] - found[1]).abs().max() > 1e-3
    assert torch.equal(unclip.predict_compiled(latents, t, Condition(context, one)), expected)


def test_guidance_moves_away_from_an_embedding_too(unclip):
    """One step of DDIM with guidance, written out."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(3, *unclip.latent_shape, generator=generator)
    told = Condition(torch.randn(3, 8, 64, generator=generator), torch.randn(3, 6, generator=generator))
    nothing = Condition(torch.randn(1, 8, 64, generator=generator), torch.zeros(1, 6))
    found = generate_latents(unclip, told, nothing, noise, num_inference_steps=1, guidance_scale=2.5)
    t, alpha_bar = torch.tensor([999, 999, 999]), unclip.alphas_cumprod[999]
    conditional = unclip.unet(noise, t, told.context, class_labels=told.embedding).sample
    without = unclip.unet(noise, t, nothing.context.expand(3, -1, -1), class_labels=torch.zeros(3, 6)).sample
    eps = without + 2.5 * (conditional - without)
    torch.testing.assert_close(found, (noise - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt(), atol=1e-3, rtol=1e-4)


def test_an_embedding_too_many_is_refused_and_one_too_few_is_zeros(tiny, unclip):
    """diffusers drops the one without a word, and raises for the other."""
    latents, t = torch.zeros(1, *tiny.latent_shape), torch.tensor([5])
    without, embedded = Condition(torch.zeros(1, 8, 64)), Condition(torch.zeros(1, 8, 64), torch.zeros(1, 6))
    with pytest.raises(ValueError, match="'tiny' takes no embedding"):
        tiny.predict_noise(latents, t, embedded)
    assert torch.equal(unclip.predict_noise(latents, t, without), unclip.predict_noise(latents, t, embedded))


# --- the UNet's weights ---


def test_set_unet_goes_there_and_back(tiny_copy):
    """What is stored in 16 bits is still the file's when more digits are asked for."""
    pretrained = {name: value.clone() for name, value in tiny_copy.unet.state_dict().items()}
    zeros = {name: torch.zeros_like(value) for name, value in pretrained.items()}
    tiny_copy.set_unet(zeros, torch.bfloat16)
    assert tiny_copy.unet.dtype == torch.bfloat16
    assert all((value == 0).all() for value in tiny_copy.unet.state_dict().values())
    tiny_copy.set_unet(dtype=torch.float32)
    assert all(torch.equal(value, pretrained[name]) for name, value in tiny_copy.unet.state_dict().items())


class Weights:
    """A loader of weights that are all one number; counts how often it is asked."""

    def __init__(self, model, number):
        self.model, self.number, self.loaded = model, number, 0

    def __call__(self):
        self.loaded += 1
        return {name: torch.full_like(value, self.number) for name, value in self.model.unet.state_dict().items()}


def number_in(model):
    """The number that all weights are."""
    values = {float(value) for p in model.unet.parameters() for value in (p.min(), p.max())}
    assert len(values) == 1
    return values.pop()


def test_weights_are_loaded_once_and_again_after_others(tiny_copy):
    one, two = Weights(tiny_copy, 1.0), Weights(tiny_copy, 2.0)
    for _ in range(2):
        tiny_copy.put_unet("one", one)
        assert number_in(tiny_copy) == 1 and one.loaded == 1 and tiny_copy.unet_key == "one"
    tiny_copy.put_unet("two", two)
    tiny_copy.put_unet("one", one)
    assert number_in(tiny_copy) == 1 and (one.loaded, two.loaded) == (2, 1)
    tiny_copy.set_unet(Weights(tiny_copy, 3.0)())
    assert tiny_copy.unet_key is None
    tiny_copy.put_unet("one", one)
    assert number_in(tiny_copy) == 1 and one.loaded == 3


def test_pretrained_weights_are_there_from_the_start(tiny_copy):
    def never():
        raise AssertionError("loaded")

    tiny_copy.put_unet(backbone.PRETRAINED, never)
    with pytest.raises(AssertionError, match="loaded"):
        tiny_copy.put_unet("other", never)
    tiny_copy.put_unet(backbone.PRETRAINED, never)  # nothing has changed


def test_put_weights_are_held_in_the_models_precision(tiny_copy):
    tiny_copy.set_unet(dtype=torch.bfloat16)
    tiny_copy.put_unet("one", Weights(tiny_copy, 1.0))
    assert tiny_copy.unet.dtype == tiny_copy.dtype == torch.float32
