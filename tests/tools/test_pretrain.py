"""The recipe of the tiny model runs end to end, and its tokenizer knows every caption."""

import csv

import pytest
import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPTokenizer

from sdgen_lib import backbone, backbone_files, pretrain_tiny, source_images


def captions(with_digits=True):
    colours = list(source_images.COLOURS)
    made = {f"soft {colours[i % 12]} {name} on {colours[(i + k) % 12]}"
            for i, name in enumerate(source_images.glyph_names(with_digits)) for k in range(1, 12)}  # fmt: skip
    return sorted(made | {"leaves", "soft leaves"})


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return pretrain_tiny.build_tokenizer(tmp_path_factory.mktemp("tokenizer"), with_digits=True)


@pytest.fixture(scope="module", params=["built", "shipped", "stock"])
def tokenizer(request, built):
    """The one just built, the shipped one as this package reads it, and as the stock class does."""
    if request.param == "built":
        return built
    if request.param == "shipped":
        return backbone.load("tiny", device="cpu").tokenizer
    return CLIPTokenizer.from_pretrained(backbone_files.TINY, subfolder="tokenizer")


def test_every_caption_fits_and_every_word_is_one_token(tokenizer):
    assert tokenizer.model_max_length == pretrain_tiny.TOKENS == 8
    for caption in captions():
        ids = tokenizer(caption).input_ids
        assert len(ids) == len(caption.split()) + 2 <= 8, caption
        assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
        assert len({*ids, tokenizer.bos_token_id, tokenizer.eos_token_id}) == len(set(caption.split())) + 2


def test_different_words_are_different_tokens(tokenizer):
    words = sorted({word for caption in captions() for word in caption.split()})
    ids = [tokenizer(word).input_ids[1] for word in words]
    assert len(set(ids)) == len(words) == 12 + 10 + 26 + 7 + 6  # colours, digits, letters, shapes; soft on leaves ...


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
        pretrain_tiny.main([*arguments, *request.param])
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
