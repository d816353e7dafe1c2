"""The shipped model is a Stable Diffusion like any other; loading says what is wrong and the ways out."""

import shutil

import huggingface_hub
import pytest
import torch
from diffusers import StableDiffusionPipeline

from sdgen_lib import backbone, backbone_files, data
from sdgen_lib.sample import generate_latents


@pytest.fixture(scope="module")
def pipeline():
    """As any user of diffusers would load the folder."""
    found = StableDiffusionPipeline.from_pretrained(backbone_files.TINY, safety_checker=None)
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
    files = [path for path in backbone_files.TINY.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 20e6
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".csv", ".txt", ".md"}
    assert sum(path.suffix == ".safetensors" for path in files) == 3


def test_sizes(tiny):
    assert tiny.latent_shape == (4, 8, 8) and tiny.image_size == 32
    images = torch.zeros(3, 3, 20, 20, dtype=torch.uint8)
    assert tiny.encode(images).shape == (3, 4, 8, 8)
    predicted = tiny.predict_noise(torch.zeros(2, 4, 8, 8), torch.tensor([0, 999]), torch.zeros(2, 8, 64))
    assert predicted.shape == (2, 4, 8, 8)


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
    context, empty = tiny.text_context([caption]).expand(seeds, -1, -1), tiny.text_context([""])[0]
    latents = generate_latents(tiny, context, empty, noise, num_inference_steps=30, guidance_scale=3.0)
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
    return shutil.copytree(backbone_files.TINY, tmp_path / "model")


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
    weights = a_copy / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save({}, a_copy / "unet" / "diffusion_pytorch_model.bin")
    weights.unlink()
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
    latents, context = torch.randn(2, 4, 8, 8, generator=generator), tiny.text_context(["white letter a on black", ""])
    t = torch.tensor([500, 100])
    exact, near = (model.predict_noise(latents, t, context).float() for model in (tiny, rough))
    assert 0 < (exact - near).abs().max() < 0.15


def test_a_compiled_unet_passes_what_it_was_compiled_for(tiny_copy, monkeypatch):
    """Just that many latents, without gradients, in the precision it is held in; all else as before."""
    passed = []

    def compiled(unet, *example, **named):
        assert example[0].shape == (2, *tiny_copy.latent_shape) and example[0].dtype == unet.dtype

        def fast(latents, *rest, **named):
            passed.append(len(latents))
            return unet(latents, *rest, **named)

        return fast

    monkeypatch.setattr(backbone, "compiled", compiled)
    assert tiny_copy.gains_by_compiling
    for _ in range(2):
        tiny_copy.compile_unet(2)

    def answer(n):
        zeros = torch.zeros(n, *tiny_copy.latent_shape), torch.zeros(n, dtype=torch.int64)
        return tiny_copy.predict_noise(*zeros, torch.zeros(n, tiny_copy.tokens, tiny_copy.width))

    answer(2)
    with torch.no_grad():
        found = answer(2), answer(1), answer(4)
    assert passed == [2]
    torch.testing.assert_close(found[0], answer(2))
    tiny_copy.dtype = torch.bfloat16  # as while the whole UNet trains: weights of 32 bits, products of 16
    with torch.no_grad():
        answer(2)
    assert passed == [2]
    monkeypatch.setattr(backbone, "compiled", lambda *example, **named: None)  # where there is no compiler
    tiny_copy.compile_unet(3), answer(3)


def test_set_unet_goes_there_and_back(tiny_copy):
    """What is stored in 16 bits is still the file's when more digits are asked for."""
    pretrained = {name: value.clone() for name, value in tiny_copy.unet.state_dict().items()}
    zeros = {name: torch.zeros_like(value) for name, value in pretrained.items()}
    tiny_copy.set_unet(zeros, torch.bfloat16)
    assert tiny_copy.unet.dtype == torch.bfloat16
    assert all((value == 0).all() for value in tiny_copy.unet.state_dict().values())
    tiny_copy.set_unet(dtype=torch.float32)
    assert all(torch.equal(value, pretrained[name]) for name, value in tiny_copy.unet.state_dict().items())
