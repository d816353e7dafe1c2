"""unCLIP models: folders of the true layout, and the sampler against diffusers' ``StableUnCLIPImg2ImgPipeline``."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, StableUnCLIPImg2ImgPipeline, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from sdgen_lib.diffusion import backbone, weights
from sdgen_lib.diffusion.conditions import Condition
from sdgen_lib.diffusion.generate import generate_latents
from sdgen_lib.diffusion.unclip import load_image_encoder

from .sd_layout import UNET, write, write_json

D = 24  # numbers of an embedding


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Stable Diffusion 2.1-unclip's layout, as diffusers saves it: narrow layers, random weights."""
    folder = write(tmp_path_factory.mktemp("unclip"), "sd2")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        told = dict(class_embed_type="projection", projection_class_embeddings_input_dim=2 * D)
        unet = dict(attention_head_dim=[2, 4, 4, 4], cross_attention_dim=64, use_linear_projection=True)
        UNet2DConditionModel(**UNET, **unet, **told).save_pretrained(folder / "unet")
        vision = CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            projection_dim=D,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=56,
            patch_size=14,
        )
        CLIPVisionModelWithProjection(vision).save_pretrained(folder / "image_encoder")
        normalizer = StableUnCLIPImageNormalizer(D)
        normalizer.mean.data = torch.randn(1, D)
        normalizer.std.data = torch.rand(1, D) + 0.5
        normalizer.save_pretrained(folder / "image_normalizer")
    DDPMScheduler(beta_schedule="squaredcos_cap_v2").save_pretrained(folder / "image_noising_scheduler")
    CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}).save_pretrained(
        folder / "feature_extractor"
    )
    index = json.loads((folder / "model_index.json").read_text())
    del index["safety_checker"]
    index |= {
        "_class_name": "StableUnCLIPImg2ImgPipeline",
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
        "image_normalizer": ["stable_diffusion", "StableUnCLIPImageNormalizer"],
        "image_noising_scheduler": ["diffusers", "DDPMScheduler"],
    }
    write_json(folder / "model_index.json", index)
    return folder


@pytest.fixture(scope="module")
def pipeline(folder):
    return StableUnCLIPImg2ImgPipeline.from_pretrained(folder, torch_dtype=torch.float32)


@pytest.fixture
def encoder(folder):
    return load_image_encoder(folder, "cpu")


def pictures(count, side=40):
    return torch.randint(0, 256, (count, 3, side, side), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)


def test_embeddings_are_the_pipelines(encoder, pipeline):
    images = pictures(3)
    pil = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    pixels = pipeline.feature_extractor(images=pil, return_tensors="pt").pixel_values
    with torch.no_grad():
        theirs = pipeline.image_encoder(pixels).image_embeds
    torch.testing.assert_close(encoder.embeddings(images), theirs, atol=1e-5, rtol=1e-4)
    assert encoder.width == D and encoder.embeddings(images[:0]).shape == (0, D)


@pytest.mark.parametrize("level", [0, 1, 500, 999])
def test_the_noise_on_an_embedding_is_the_pipelines(encoder, pipeline, level):
    embeddings, noise = torch.randn(2, 4, D, generator=torch.Generator().manual_seed(0))
    theirs = pipeline.noise_image_embeddings(embeddings.clone(), noise_level=torch.tensor([level]), noise=noise)
    ours = encoder.told(embeddings, level, noise)
    assert ours.shape == (4, 2 * D)
    torch.testing.assert_close(ours, theirs)
    mixed = encoder.told(embeddings, torch.tensor([5, level, 7, level]), noise)
    torch.testing.assert_close(mixed[1::2], ours[1::2])


@pytest.mark.parametrize("level", [-1, 1000])
def test_a_noise_level_that_does_not_exist_is_refused(encoder, level):
    with pytest.raises(ValueError, match=f"noise_level must be from 0 to 999, not {level}"):
        encoder.told(torch.zeros(1, D), level, torch.zeros(1, D))


def both(model, pipeline, told, scale):
    """A picture of one context and one embedding, ours and the pipeline's, from the same latents."""
    betas = 1 - model.alphas_cumprod.double() / torch.cat([torch.ones(1), model.alphas_cumprod[:-1]]).double()
    pipeline.scheduler = DPMSolverMultistepScheduler(
        timestep_spacing="linspace", trained_betas=betas.tolist(), prediction_type=model.prediction
    )
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(3))
    prompts = model.text_context(["red cat"]), model.text_context([""])
    size = dict(height=model.image_size, width=model.image_size, output_type="np")
    # The pipeline draws the noise on the embedding itself: from a generator, so that it can be drawn here, too.
    theirs = pipeline(
        prompt_embeds=prompts[0],
        negative_prompt_embeds=prompts[1],
        image_embeds=told[0],
        noise_level=told[1],
        generator=torch.Generator().manual_seed(7),
        latents=noise,
        num_inference_steps=6,
        guidance_scale=scale,
        **size,
    ).images
    return prompts, noise, np.round(theirs * 255).astype(int).transpose(0, 3, 1, 2)


@pytest.mark.parametrize(("scale", "level"), [(3.0, 0), (1.0, 0), (2.0, 300)])
def test_images_are_the_pipelines(folder, pipeline, encoder, scale, level):
    """Same noise, same embedding, same images: to rounding."""
    model = backbone.load(str(folder), device="cpu", precision="fp32")
    embedding = encoder.embeddings(pictures(1))
    (context, empty), noise, theirs = both(model, pipeline, (embedding, level), scale)
    own = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(7))
    told = Condition(context, encoder.told(embedding, level, own))
    nothing = Condition(empty, torch.zeros(1, 2 * D))
    how = dict(num_inference_steps=6, guidance_scale=scale, sampler="dpm-solver++")
    ours = model.decode(generate_latents(model, told, nothing, noise, **how)).numpy().astype(int)
    assert theirs.std() > 5
    assert np.abs(ours - theirs).max() <= 1


def test_without_an_embedding_an_unclip_model_is_told_of_no_image(folder):
    """Zeros, its own unconditional: so whatever knows contexts alone works with it."""
    model = backbone.load(str(folder), device="cpu", precision="fp32")
    generator = torch.Generator().manual_seed(0)
    latents, context = torch.randn(2, *model.latent_shape, generator=generator), model.text_context(["cat", ""])
    t = torch.tensor([10, 700])
    expected = model.unet(latents, t, encoder_hidden_states=context, class_labels=torch.zeros(2, 2 * D)).sample
    assert torch.equal(model.predict_noise(latents, t, Condition(context)), expected)
    other = model.predict_noise(latents, t, Condition(context, torch.ones(2, 2 * D)))
    assert (other - expected).abs().max() > 1e-3


def test_the_fingerprint_is_of_the_image_encoder_too(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    first = weights.fingerprint(weights.find(str(copy)))
    assert first == weights.fingerprint(weights.find(str(folder)))
    config = copy / "image_encoder" / "config.json"
    config.write_text(config.read_text() + "\n")
    assert weights.fingerprint(weights.find(str(copy))) != first


def test_a_model_without_image_encoder_is_no_unclip(tiny):
    with pytest.raises(FileNotFoundError, match="is no unCLIP model: its feature_extractor, .*tiny-unclip"):
        load_image_encoder(tiny.source.folder, "cpu")


# --- the shipped one ---


def test_the_shipped_unclip_opens_as_diffusers_pipeline():
    stock = StableUnCLIPImg2ImgPipeline.from_pretrained(weights.NAMES["tiny-unclip"], torch_dtype=torch.float32)
    model = backbone.load("tiny-unclip", device="cpu", precision="fp32")
    encoder = load_image_encoder(model.source.folder, "cpu")
    image = pictures(1, 32)
    embedding = encoder.embeddings(image)
    (context, empty), noise, theirs = both(model, stock, (embedding, 0), 2.0)
    own = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(7))
    told = Condition(context, encoder.told(embedding, 0, own))
    nothing = Condition(empty, torch.zeros(1, 2 * encoder.width))
    how = dict(num_inference_steps=6, guidance_scale=2.0, sampler="dpm-solver++")
    ours = model.decode(generate_latents(model, told, nothing, noise, **how)).numpy().astype(int)
    assert theirs.std() > 5 and np.abs(ours - theirs).max() <= 1
    compiles = dataclasses.replace(model)
    assert compiles.gains_by_compiling


def test_the_shipped_unclip_has_the_tiny_models_vae_and_text_encoder(tiny):
    """Only the UNet and what sees images are its own: pictures and contexts of both models are the same."""
    model = backbone.load("tiny-unclip", device="cpu", precision="fp32")
    images = pictures(4, 32)
    assert torch.equal(model.encode(images), tiny.encode(images))
    assert torch.equal(model.text_context(["digit 7"]), tiny.text_context(["digit 7"]))


def test_the_shipped_unclip_uses_the_image():
    """The loss on pictures of the source, told by the image, is far below that without; another one's is worse."""
    from sdgen_lib.tools import source_images

    model = backbone.load("tiny-unclip", device="cpu", precision="fp32")
    encoder = load_image_encoder(model.source.folder, "cpu")
    images, _ = source_images.draw(96, torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(0)
    latents = model.encode(images)
    t, noise = torch.randint(250, 950, (96,), generator=generator), torch.randn(latents.shape, generator=generator)
    alpha_bar = model.alphas_cumprod[t].view(-1, 1, 1, 1)
    noisy = alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * noise
    told, empty = encoder.told(encoder.embeddings(images), 0, torch.zeros(96, encoder.width)), model.text_context([""])

    def loss(embedding):
        with torch.no_grad():
            found = model.predict_noise(noisy, t, Condition(empty.expand(96, -1, -1), embedding))
        return float((found - noise).square().mean())

    right, none, wrong = loss(told), loss(torch.zeros_like(told)), loss(told.roll(1, 0))
    assert right < 0.95 * none and wrong > right * 1.1
