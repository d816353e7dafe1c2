"""Augmented conditioning: each of the ten conditionings against a vector worked out by hand."""

import dataclasses

import pytest
import torch
from torchvision.transforms import v2

from sdgen_lib.config.settings import AUGMENTED, followed, protocol, resolve
from sdgen_lib.diffusion.conditions import ContextTable
from sdgen_lib.methods import augmented
from sdgen_lib.methods.augmented import PAPER, RELEASED, AugmentedImages, RealStarts

DIM = 6


class Means:
    """An image encoder whose embedding is known: the mean of each half of each channel, top and bottom."""

    width = DIM

    def embeddings(self, images):
        halves = images.float().unflatten(2, (2, -1)).mean((3, 4))
        return halves.flatten(1) / 255

    def told(self, embeddings, noise_level, noise):
        """[embedding + level * noise, level]: plain, and easy to take apart."""
        stated = torch.full((len(embeddings), DIM), float(noise_level) + 1)
        return torch.cat([embeddings + noise_level * noise, stated], 1)


def conditioner(how, n=4, **changes):
    """Two classes, ``n`` flat images of each, told apart by their grey values."""
    labels = torch.arange(2 * n) % 2
    images = (10 * torch.arange(2 * n, dtype=torch.uint8)).view(-1, 1, 1, 1).expand(-1, 3, 8, 8).contiguous()
    table = ContextTable(torch.tensor([[[1.0]], [[2.0]]]), torch.zeros(1, 1))
    encoder = Means()
    given = dict(how=how) | changes
    return AugmentedImages(table, encoder, images, labels, encoder.embeddings(images), **given)


LABELS, INDICES = torch.tensor([0, 1, 1, 0, 1, 0]), torch.arange(6)


def told_of(how, **changes):
    made = conditioner(how, **changes)
    return made, made(LABELS, INDICES, 5), made.pairs(LABELS, INDICES, 5)


def test_the_names_are_the_settings_choices():
    assert tuple(PAPER) == tuple(RELEASED) == AUGMENTED and len(PAPER) == 10


def test_random_image_is_the_embedding_of_an_image_of_the_class():
    made, told, pairs = told_of(PAPER["random image"])
    assert torch.equal(made.labels[pairs], LABELS[:, None].expand(-1, 2))
    assert (pairs[:, 0] != pairs[:, 1]).all()
    assert torch.equal(told.embedding[:, :DIM], made.embeddings[pairs[:, 0]])
    assert torch.equal(told.context[:, 0, 0], LABELS.float() + 1)
    assert (told.embedding[:, DIM:] == 1).all()  # noise level 0, as `Means` states it


def test_the_real_images_on_record_are_those_that_are_told_of():
    made, told, pairs = told_of(PAPER["random image"])
    rows = made.real_rows(LABELS, INDICES, 5)
    assert rows.shape == (6, 1) and torch.equal(told.embedding[:, :DIM], made.embeddings[rows[:, 0]])
    mixed = conditioner(PAPER["cutmix"]).real_rows(LABELS, INDICES, 5)
    assert torch.equal(mixed, pairs)


def test_every_image_of_a_class_takes_its_turn():
    made = conditioner(PAPER["random image"])
    many = torch.zeros(400, dtype=torch.int64)
    counts = torch.bincount(made.pairs(many, torch.arange(400), 0)[:, 0], minlength=8)
    assert (counts[1::2] == 0).all() and counts[::2].min() > 70


@pytest.mark.parametrize("protocol", [PAPER, RELEASED])
def test_mixup_of_embeddings_lies_between_the_two(protocol):
    made, told, pairs = told_of(protocol["embedding mixup"])
    one, other = made.embeddings[pairs[:, 0], 0], made.embeddings[pairs[:, 1], 0]
    share = (told.embedding[:, 0] - other) / (one - other)
    assert ((share >= 0) & (share <= 1)).all() and share.unique().numel() == 6
    expected = share[:, None] * made.embeddings[pairs[:, 0]] + (1 - share[:, None]) * made.embeddings[pairs[:, 1]]
    torch.testing.assert_close(told.embedding[:, :DIM], expected)


def test_shares_are_uniform():
    """Beta(1, 1), as released."""
    made = conditioner(PAPER["embedding mixup"], n=2)  # an image's partner is the other one
    many, indices = torch.zeros(2000, dtype=torch.int64), torch.arange(2000)
    told, pairs = made(many, indices, 0).embedding[:, 0], made.pairs(many, indices, 0)
    one, other = made.embeddings[pairs[:, 0], 0], made.embeddings[pairs[:, 1], 0]
    share = ((told - other) / (one - other)).sort().values
    assert (share - torch.linspace(0, 1, 2000)).abs().max() < 0.04  # Kolmogorov-Smirnov's 99 % is 0.036


def test_mixup_of_pixels_is_of_the_images():
    """These flat images' embeddings are linear in their pixels: mixing either is the same, to rounding of 1 / 255."""
    made, told, pairs = told_of(PAPER["mixup"])
    one, other = made.embeddings[pairs[:, 0], 0], made.embeddings[pairs[:, 1], 0]
    share = (told.embedding[:, 0] - other) / (one - other)
    assert ((share > -0.06) & (share < 1.06)).all()
    assert (told.embedding[:, :DIM] - told.embedding[:, :1]).abs().max() < 1e-6  # flat images stay flat


@pytest.mark.parametrize(("share", "expected"), [(1.0, [1] * 6), (0.0, [2] * 6), (0.5, [2, 2, 2, 1, 1, 1])])
def test_cutmix_of_embeddings_takes_a_prefix_of_the_second(share, expected):
    one, other = torch.ones(DIM), torch.full((DIM,), 2.0)
    assert augmented.cutmix_embeddings(one, other, share, torch.Generator()).tolist() == expected


def test_cutmix_of_embeddings_reaches_the_model():
    made, told, pairs = told_of(PAPER["embedding cutmix"])
    one, other = made.embeddings[pairs[:, 0]], made.embeddings[pairs[:, 1]]
    from_other = told.embedding[:, :DIM] == other
    assert (from_other | (told.embedding[:, :DIM] == one)).all()
    assert (from_other.int().diff(dim=1) <= 0).all() and 0 < from_other.float().mean() < 1


def test_the_released_cutmix_of_embeddings_is_the_first_image():
    made, told, pairs = told_of(RELEASED["embedding cutmix"])
    assert torch.equal(told.embedding[:, :DIM], made.embeddings[pairs[:, 0]])
    plain = told_of(RELEASED["random image"])[1]
    assert torch.equal(told.embedding, plain.embedding)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 1.0])
def test_cutmix_of_pixels_is_torchvisions(share, monkeypatch):
    """Its box, from the same two random numbers: half of sqrt(1 - share) of each side to each side of the centre."""
    one, other = torch.zeros(3, 20, 12), torch.ones(3, 20, 12)
    y, x = (torch.rand(2, generator=torch.Generator().manual_seed(4)) * torch.tensor([20, 12])).long().tolist()
    drawn = iter([torch.tensor([x]), torch.tensor([y])])
    monkeypatch.setattr(torch, "randint", lambda *_, **__: next(drawn))
    monkeypatch.setattr(torch, "_sample_dirichlet", lambda *_: torch.tensor([share, 1 - share]))
    theirs, _ = v2.CutMix(num_classes=2)(torch.stack([other, one]), torch.tensor([0, 1]))  # each with the one before
    ours = augmented.cutmix(one, other, share, torch.Generator().manual_seed(4))
    assert torch.equal(ours, theirs[1])


def test_a_crop_is_torchvisions_and_each_image_has_its_own():
    image = torch.arange(3 * 16 * 16).view(3, 16, 16).float()
    random = torch.Generator().manual_seed(0)
    first, second = augmented.crop(image, random), augmented.crop(image, random)
    assert first.shape == image.shape and not torch.equal(first, second)
    state = torch.random.get_rng_state()
    again = augmented.crop(image, torch.Generator().manual_seed(0))
    assert torch.equal(again, first) and torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_only_the_released_code_crops_before_it_mixes_pixels(name):
    assert RELEASED[name].cropped and RELEASED[f"{name} + dropout"].cropped
    assert not any(how.cropped for how in PAPER.values())
    assert not any(how.cropped for key, how in RELEASED.items() if not key.startswith(name[:3]) and "x" not in key)


def test_the_papers_dropout_is_a_dropout_layer_on_the_embedding():
    """Survivors grow by 1 / (1 - p); the numbers that tell the noise level stay."""
    made, told, pairs = told_of(PAPER["random image + dropout"], dropout=0.4)
    plain = made.embeddings[pairs[:, 0]]
    kept = told.embedding[:, :DIM] != 0
    torch.testing.assert_close(told.embedding[:, :DIM], kept * plain / 0.6)
    assert (told.embedding[:, DIM:] == 1).all()
    embedding, random = torch.ones(10_000), torch.Generator().manual_seed(0)
    dropped = augmented.drop_and_rescale(embedding, 0.4, random)
    assert float((dropped == 0).float().mean()) == pytest.approx(0.4, abs=0.02)
    assert float(dropped.mean()) == pytest.approx(1, abs=0.03)  # the mean is kept


def test_the_released_dropout_is_on_all_that_is_told_and_does_not_rescale():
    made, told, pairs = told_of(RELEASED["random image + dropout"], dropout=0.4)
    plain = torch.cat([made.embeddings[pairs[:, 0]], torch.ones(6, DIM)], 1)
    kept = told.embedding != 0
    torch.testing.assert_close(told.embedding, kept * plain)
    assert not kept[:, DIM:].all()


@pytest.mark.parametrize(("p", "share"), [(0.0, 0.0), (1.0, 1.0)])
def test_dropping_nothing_and_everything(p, share):
    for drop in (augmented.drop, augmented.drop_and_rescale):
        found = drop(torch.ones(50), p, torch.Generator())
        assert float((found == 0).float().mean()) == share and torch.isfinite(found).all()


def test_dropout_comes_after_the_mix():
    """Where nothing is dropped, a mix with dropout is that mix."""
    for name in AUGMENTED:
        if name.endswith("+ dropout"):
            with_none = told_of(PAPER[name], dropout=0.0)[1].embedding
            torch.testing.assert_close(with_none, told_of(PAPER[name.removesuffix(" + dropout")])[1].embedding)


@pytest.mark.parametrize("name", AUGMENTED)
@pytest.mark.parametrize("protocol", [PAPER, RELEASED], ids=["paper", "released"])
def test_an_image_does_not_depend_on_its_batch(name, protocol):
    made = conditioner(protocol[name], noise_level=3)
    whole = made(LABELS, INDICES, 5).embedding
    parts = [made(LABELS[rows], INDICES[rows], 5).embedding for rows in (slice(0, 1), slice(1, 5), slice(5, 6))]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(made(LABELS, INDICES, 6).embedding, whole)  # another seed


def test_noise_is_on_the_altered_embedding():
    quiet, loud = (told_of(PAPER["embedding mixup"], noise_level=level)[1].embedding for level in (0, 2))
    noise = (loud - quiet)[:, :DIM] / 2
    assert noise.std() == pytest.approx(1, abs=0.4) and (loud - quiet)[:, DIM:].unique().tolist() == [2]


def test_guidance_leads_away_from_zeros():
    nothing = conditioner(PAPER["mixup"]).unconditional()
    assert torch.equal(nothing.embedding, torch.zeros(1, 2 * DIM)) and nothing.context.shape == (1, 1, 1)


def test_a_class_of_one_image_is_mixed_with_itself_and_of_none_is_refused():
    made = conditioner(PAPER["embedding mixup"], n=1)
    told = made(LABELS, INDICES, 0).embedding[:, :DIM]
    torch.testing.assert_close(told, made.embeddings[LABELS])
    with pytest.raises(ValueError, match="Class 7 has no real image"):
        made(torch.tensor([7]), torch.tensor([0]), 0)


def test_pictures_of_what_is_mixed():
    made = conditioner(PAPER["cutmix"])
    shown, pairs = made.mixed_pixels(LABELS, INDICES, 5), made.pairs(LABELS, INDICES, 5)
    for image, (first, second) in zip(shown, pairs.tolist(), strict=True):
        assert set(image.unique().tolist()) <= {10 * first, 10 * second}
    torch.testing.assert_close(made.encoder.embeddings(shown), made(LABELS, INDICES, 5).embedding[:, :DIM])


# --- starting from a real image ---


def test_img2img_starts_from_an_image_of_the_class():
    latents = torch.arange(8.0).view(8, 1, 1, 1)
    table = ContextTable(torch.tensor([[[1.0]], [[2.0]]]), torch.zeros(1, 1))
    made = RealStarts(table, latents, torch.arange(8) % 2, 0.5)
    told = made(LABELS, INDICES, 3)
    assert torch.equal(told.start.flatten().long() % 2, LABELS) and told.strength == 0.5 and told.embedding is None
    assert torch.equal(told[2:4].start, told.start[2:4]) and told[2:4].strength == 0.5
    assert made.unconditional().start is None


# --- the method ---


@pytest.fixture(scope="module")
def method(tmp_path_factory, micro):
    from sdgen_lib.course import Course

    runs = tmp_path_factory.mktemp("augmented")
    return Course(micro(runs, augmented_images=20, augmented_steps=3, augmented_text="prompt")).augmented


def test_the_method_draws_with_the_unclip_model_from_a_few_images(method):
    assert method.ws.settings.backbone == "tiny-unclip" and len(method.ws.data.train) == 20
    for name in ("text", "img2img", "random image", "cutmix + dropout"):
        images = method.generator(name)([0, 1, 2])
        assert images.shape == (3, 3, 16, 16) and images.dtype == torch.uint8 and images.float().std() > 5
    with pytest.raises(ValueError, match="Unknown conditioning 'cutmx'.*cutmix"):
        method.generator("cutmx")


def test_img2img_without_strength_is_the_image_after_the_vae(method):
    """Nothing is drawn anew; and at strength 1 the image is all but gone."""
    ws = method.ws
    draw = dataclasses.replace(method.generator("img2img"), conditioner=None)
    conditioner, labels = method.conditioner("img2img"), torch.arange(4)
    still = dataclasses.replace(draw, conditioner=dataclasses.replace(conditioner, strength=0.0))(labels)
    rows = conditioner(labels, torch.arange(4), 0).start
    torch.testing.assert_close(
        dataclasses.replace(draw, image_size=32, conditioner=dataclasses.replace(conditioner, strength=0.0))(labels),
        ws.backbone.decode(rows).cpu(),
    )
    anew = dataclasses.replace(draw, conditioner=dataclasses.replace(conditioner, strength=1.0))(labels)
    assert (still.float() - anew.float()).abs().mean() > 10


def test_img2img_starts_from_the_images_that_are_given(method):
    """Not from the training images at the same places."""
    real = method.ws.data.train.take([7])
    label = int(real.labels[0])
    told = method.conditioner("img2img", real=real)(torch.tensor([label]), torch.tensor([3]), 0)
    torch.testing.assert_close(told.start, method.ws.backbone.encode(real.images))


def test_the_unclip_model_of_a_run(tmp_path):
    def beside(backbone, **more):
        return augmented.unclip_beside(resolve("demo", backbone=str(backbone), **more))

    (tmp_path / "own" / "image_encoder").mkdir(parents=True)
    assert beside("tiny") == beside("tiny-unclip") == "tiny-unclip"
    assert beside("sd2") == beside("sd2.1-unclip") == "sd2.1-unclip"
    assert beside(tmp_path / "own") == str(tmp_path / "own")
    assert beside("sd2", augmented_backbone="tiny-unclip") == "tiny-unclip"


def test_each_choice_is_another_generator(method):
    run = method.ws.run
    found = {
        run.fingerprint(method.source(*asked).step)
        for asked in [("text",), ("random image",), ("mixup",), ("mixup", 3.0), ("img2img",)]
    }
    assert len(found) == 5
    varied = augmented.AugmentedMethod(method.ws.varied(augmented_dropout=0.2))
    assert varied.ws.run.fingerprint(varied.source("mixup").step) not in found


def test_the_class_encoder_can_tell_the_class(tmp_path, micro):
    """Step 1 with the unCLIP model, which is told of no image meanwhile."""
    from sdgen_lib.course import Course

    given = dict(augmented_images=20, augmented_steps=3, augmented_text="class_encoder", transfer_epochs=1)
    method = Course(micro(tmp_path, **given)).augmented
    images = method.generator("random image")([0, 1, 2])
    assert images.shape == (3, 3, 16, 16)
    contexts = method.conditioner("text").contexts
    assert contexts.shape[0] == 10 and (contexts[0] - contexts[1]).abs().max() > 0


def test_recipes_and_protocol():
    released, demo = resolve("released", backbone="tiny"), resolve("demo", backbone="tiny")
    assert (released.augmented_protocol, released.augmented_guidance) == ("released", 10.0)
    assert demo.augmented_text == "class_encoder"
    rows = {row["setting"] for row in protocol(demo, "augmented")}
    assert rows == {name for name in vars(demo) if name.startswith("augmented_")} - {
        "augmented_study",
        "augmented_others",
    }
    assert "paper" in followed(resolve("paper", backbone="tiny"), "augmented")
