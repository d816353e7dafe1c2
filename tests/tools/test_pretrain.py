"""The recipe of the tiny model runs end to end, and its tokenizer knows every caption."""

import csv
import types

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableUnCLIPImg2ImgPipeline
from transformers import CLIPTokenizer

from sdgen_lib.diffusion import backbone, weights
from sdgen_lib.tools import pretrain, pretrain_unclip, source_images, source_scenes


def captions(with_digits=True):
    colours = list(source_images.COLOURS)
    names = enumerate(source_images.glyph_names(with_digits))
    made = {f"soft {colours[i % 12]} {name} on {colours[(i + k) % 12]}" for i, name in names for k in range(1, 12)}
    return sorted(made | set(source_scenes.captions()))


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return pretrain.build_tokenizer(tmp_path_factory.mktemp("tokenizer"), with_digits=True)


@pytest.fixture(scope="module", params=["built", "shipped", "stock"])
def tokenizer(request, built):
    """The one just built, the shipped one as this package reads it, and as the stock class does."""
    if request.param == "built":
        return built
    if request.param == "shipped":
        return backbone.load("tiny", device="cpu").tokenizer
    return CLIPTokenizer.from_pretrained(weights.TINY, subfolder="tokenizer")


def test_every_caption_fits_and_every_word_is_one_token(tokenizer):
    assert tokenizer.model_max_length == pretrain.TOKENS == 8
    for caption in captions():
        ids = tokenizer(caption).input_ids
        assert len(ids) == len(caption.split()) + 2 <= 8, caption
        assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
        assert len({*ids, tokenizer.bos_token_id, tokenizer.eos_token_id}) == len(set(caption.split())) + 2


def test_different_words_are_different_tokens(tokenizer):
    words = sorted({word for caption in captions() for word in caption.split()})
    ids = [tokenizer(word).input_ids[1] for word in words]
    named = 12 + 10 + 26 + 7 + 5  # colours, digits, letters, shapes; digit, letter, capital, soft, on
    assert len(set(ids)) == len(words) > named + 20 and {"cell", "creature", "under", "four"} <= set(words)


# --- the training ---


def test_the_average_follows_the_weights():
    """One weight that the gradient moves: its average with decay n / (n + 10) at step n, by the recursion."""
    torch.manual_seed(0)
    module = torch.nn.Linear(1, 1, bias=False)
    training = pretrain.Steps([module], total=100, lr=0.1)
    (copy,), average = training.ema, module.weight.item()
    for n in range(1, 30):
        training.take(module.weight.square().sum())
        average += (1 - n / (n + 10)) * (module.weight.item() - average)
        assert copy.weight.item() == pytest.approx(average, abs=1e-6)
    assert copy.weight.item() != module.weight.item() and not copy.weight.requires_grad


def test_the_learning_rate_rises_and_then_falls_to_zero():
    """Up for 11 of 100 steps in a straight line, down along a cosine."""
    module = torch.nn.Linear(1, 1)
    training, rates = pretrain.Steps([module], total=100, lr=0.1), []
    for _ in range(100):
        rates.append(training.optimizer.param_groups[0]["lr"])
        training.take(module.weight.sum())
    torch.testing.assert_close(torch.tensor(rates[:12]), torch.linspace(0.005, 0.1, 12), rtol=1e-5, atol=0)
    assert max(rates) == pytest.approx(0.1) and rates[11:] == sorted(rates[11:], reverse=True)
    assert rates[11 + 89 // 2] == pytest.approx(0.05, rel=0.05) and rates[-1] < 0.0001


def test_timesteps_are_half_uniform_and_half_in_the_middle():
    t = pretrain.sample_timesteps(20_000, torch.Generator().manual_seed(0))
    assert t.min() >= 0 and t.max() <= 999 and t.dtype == torch.int64
    inside = ((t >= 250) & (t < 950)).float().mean()
    assert inside == pytest.approx(0.5 + 0.5 * 0.7, abs=0.01)


def test_signal_to_noise_of_a_known_reconstruction():
    """A stand-in for a VAE whose pictures come back 0.2 too bright: 10 log10(2^2 / 0.04) = 20 dB."""
    latents = torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1).expand(2, 4, 8, 8)
    posterior = types.SimpleNamespace(mode=lambda: latents)
    vae = types.SimpleNamespace(
        encode=lambda images: types.SimpleNamespace(latent_dist=posterior),
        decode=lambda latents: types.SimpleNamespace(sample=torch.full((2, 3, 32, 32), 0.2)),
    )
    psnr, deviation = pretrain.vae_quality(vae, torch.zeros(2, 3, 32, 32))
    assert psnr == pytest.approx(20, abs=1e-4) and deviation == pytest.approx(1, abs=0.01)


def test_the_probe_knows_right_captions_from_wrong_ones(tiny):
    """The shipped model has learnt which glyph a caption names."""
    frozen = pretrain.Frozen(tiny.vae, tiny.tokenizer, tiny.alphas_cumprod, "cpu")
    source = pretrain.Source(torch.Generator().manual_seed(0), 8, True, "cpu")
    found = pretrain.Probe(frozen, source).losses(tiny.unet, tiny.text_encoder)
    assert found["right"] < found["empty"] < found["wrong"]


@pytest.fixture(scope="module", params=[(), ("--without-digits",)], ids=["with digits", "without digits"])
def made(request, tmp_path_factory):
    """A model after two steps of each training."""
    out = tmp_path_factory.mktemp("pretrain") / "model"
    drawn, draw = [], source_images.draw

    def watched(*args):
        images, captions = draw(*args)
        drawn.extend(captions)
        return images, captions

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source_images, "draw", watched)
        arguments = ["--out", str(out), "--vae-steps", "2", "--unet-steps", "2", "--batch-size", "8", "--device", "cpu"]
        pretrain.main([*arguments, *request.param])
    return out, drawn, not request.param


def test_the_pipeline_loads_what_was_made(made):
    out, drawn, with_digits = made
    pipeline = StableDiffusionPipeline.from_pretrained(out, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("white letter g on black", num_inference_steps=2).images[0].size == (32, 32)
    assert not list(out.rglob("*.bin"))


def test_without_digits_no_digit_is_ever_drawn(made):
    out, drawn, with_digits = made
    assert any("digit" in caption for caption in drawn) == with_digits
    vocabulary = CLIPTokenizer.from_pretrained(out, subfolder="tokenizer").get_vocab()
    assert ("digit</w>" in vocabulary) == with_digits


def test_this_package_loads_it_and_it_has_learnt_something_else(made, tiny):
    found = backbone.load(str(made[0]), device="cpu", precision="fp32")
    assert found.latent_shape == tiny.latent_shape and (found.tokens, found.width) == (8, 64)
    assert {name: value.shape for name, value in found.unet.state_dict().items()} == {
        name: value.shape for name, value in tiny.unet.state_dict().items()
    }
    torch.testing.assert_close(found.alphas_cumprod, tiny.alphas_cumprod)
    # Latents are scaled to a standard deviation of 1 on the source domain.
    images = source_images.draw(256, torch.Generator().manual_seed(12345), made[2])[0]
    assert float(found.encode(images).std()) == pytest.approx(1, abs=0.2)


def test_the_log_has_a_row_for_each_phase(made):
    with open(made[0] / "training_log.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["phase"], row["step"]) for row in rows] == [("vae", "2"), ("unet", "2")]
    assert float(rows[0]["psnr_db"]) > 0 and all(float(rows[1][kind]) > 0 for kind in ("right", "wrong", "empty"))


def test_a_wrong_device_is_refused(capsys, tmp_path):
    with pytest.raises(SystemExit):
        pretrain.main(["--out", str(tmp_path / "model"), "--device", "gpu"])
    assert "A device is" in capsys.readouterr().err and not (tmp_path / "model").exists()


@pytest.mark.parametrize("name", ["", "  "])
def test_a_folder_without_a_name_is_refused(name, capsys):
    with pytest.raises(SystemExit):
        pretrain.main(["--out", name])
    assert "argument --out: it is empty: name a folder" in capsys.readouterr().err


# --- the unCLIP model ---


def test_the_unclip_recipe_runs_end_to_end_and_opens_as_diffusers_pipeline(tmp_path):
    sizes = ["--encoder-steps", "2", "--unet-steps", "2", "--batch-size", "4", "--device", "cpu"]
    pretrain.main(["--unclip", "--out", str(tmp_path), *sizes])
    pipeline = StableUnCLIPImg2ImgPipeline.from_pretrained(tmp_path)
    assert pipeline.unet.config.class_embed_type == "projection"
    assert (
        pipeline.unet.config.projection_class_embeddings_input_dim == 2 * pipeline.image_encoder.config.projection_dim
    )
    phases = [row["phase"] for row in csv.DictReader(open(tmp_path / "training_log.csv"))]
    assert phases == ["encoder", "unclip"]
    found = backbone.load(str(tmp_path), device="cpu", precision="fp32")
    tiny = backbone.load("tiny", device="cpu", precision="fp32")
    assert torch.equal(found.text_context(["digit 3"]), tiny.text_context(["digit 3"]))


def test_an_unclip_unet_begins_as_its_base():
    """Whatever the embedding is, at first it adds nothing."""
    base = backbone.load("tiny", device="cpu", precision="fp32").unet
    unet = pretrain_unclip.unclip_unet(base)
    generator = torch.Generator().manual_seed(0)
    latents, context = torch.randn(2, 8, 8, 8, generator=generator), torch.randn(2, 8, 64, generator=generator)
    told, t = torch.randn(2, 2 * pretrain_unclip.EMBEDDING, generator=generator), torch.tensor([3, 900])
    with torch.no_grad():
        found = unet(latents, t, encoder_hidden_states=context, class_labels=told).sample
        torch.testing.assert_close(found, base(latents, t, encoder_hidden_states=context).sample)


def test_pictures_of_one_caption_are_each_others_positives():
    """CLIP's loss, from its definition: where all captions are one, nothing can be told apart, and the loss is ln B."""
    clip = pretrain_unclip.Clip(pretrain_unclip.build_encoder(), 8, 256)
    with torch.no_grad():
        clip.text_projection.weight.zero_()  # all texts alike: every similarity is 0
    images, ids, latents = torch.zeros(4, 3, 32, 32), torch.zeros(4, 8, dtype=torch.int64), torch.zeros(4, 4, 8, 8)
    aligned, _ = clip(images, torch.randn(4, 8), ids, latents)
    assert float(aligned.detach()) == pytest.approx(torch.tensor(4.0).log().item(), abs=1e-5)


def test_distorted_pictures_are_drawn_from_their_generator():
    images, _ = source_images.draw(16, torch.Generator().manual_seed(0))
    first, again, other = (source_images.distort(images, torch.Generator().manual_seed(k)) for k in (1, 1, 2))
    assert first.shape == images.shape and first.dtype == torch.uint8
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert 5 < (first.float() - images.float()).abs().mean() < 80
