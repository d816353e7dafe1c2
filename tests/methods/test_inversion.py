"""Diffusion Inversion against closed forms: what a vector becomes, is mixed with, and must belong to."""

import dataclasses
import math

import flat
import pytest
import torch
from torch import nn

from sdgen_lib.config.settings import followed, protocol, resolve
from sdgen_lib.diffusion.generate import balanced_labels, generate_latents
from sdgen_lib.diffusion.samplers import guided_noise
from sdgen_lib.diffusion.training import Latents, fit, fixed_loss, optimizer_for
from sdgen_lib.evaluate import sets
from sdgen_lib.methods import inversion
from sdgen_lib.methods.inversion import InversionMethod, InvertedImages, Vectors, VectorTable
from sdgen_lib.share import export, generator
from sdgen_lib.store import files
from sdgen_lib.tools import bench_tools

# --- stage 1 ---


def own_values(count, seed=0):
    """Flat images, each with channel values of its own: what `flat.FlatModel`'s context must become for each."""
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))


def invert_flat(values, *, epochs=30, optimizer="row-adam", resume=None, **changes):
    table = VectorTable(torch.zeros(1, 4), len(values), sparse=optimizer == "row-adam")
    train = Latents(values[:, :, None, None].expand(-1, 4, 2, 2), torch.zeros(len(values), dtype=torch.int64))
    how = dict(batch_size=4, learning_rate=0.1, weight_decay=0.0, clip_norm=math.inf, seed=0, optimizer=optimizer)
    how |= changes
    named = {"vectors": table.table.weight}
    states = []
    for epoch in fit(named, flat.FlatModel(), table, train, epochs=epochs, resume=resume, **how):
        states.append({name: tensor.detach().clone() for name, tensor in epoch.state.tensors().items()})
    return table, states


@pytest.mark.parametrize("optimizer", ["row-adam", "adamw"])
def test_each_vector_becomes_what_predicts_its_own_image(optimizer):
    """A context that costs the squared distance to the image's values has its minimum there."""
    values = own_values(10)
    table, _ = invert_flat(values, epochs=200, optimizer=optimizer)
    torch.testing.assert_close(table.table.weight.detach(), values, atol=2e-3, rtol=0)


def test_row_adam_leaves_the_rows_outside_of_a_batch_as_they_are():
    values = own_values(8)
    table, _ = invert_flat(values, epochs=1, images_per_epoch=4)  # one batch of half the rows
    moved = table.table.weight.detach().abs().sum(1) > 0
    assert moved.sum() == 4


def test_a_killed_training_of_vectors_goes_on_to_the_same_ones():
    values = own_values(10)
    whole, states = invert_flat(values, epochs=4)
    rest, _ = invert_flat(values, epochs=4, resume=states[1])
    assert torch.equal(whole.table.weight, rest.table.weight)


@pytest.mark.parametrize(("batches", "expected"), [(2, 1.41), (5, 2.24)])
def test_the_released_adamw_moves_a_vector_further_than_lr_a_visit(batches, expected):
    """Of a group in ``batches`` parts, each vector has a gradient in one step of so many, and moves in all of them."""
    table = nn.Parameter(torch.zeros(batches, 1))
    adam = optimizer_for({0.03: [table]}, "adamw", weight_decay=0.0)
    visits = 2000
    for step in range(visits * batches):
        table.grad = torch.zeros_like(table)
        table.grad[step % batches] = 1.0
        adam.step()
    assert float(-table.detach()[0] / 0.03 / visits) == pytest.approx(expected, abs=0.02)


def test_the_released_adamw_decays_the_vectors_outside_of_a_batch():
    table = nn.Parameter(torch.ones(2, 3))
    adam = optimizer_for({0.03: [table]}, "adamw", weight_decay=0.01)
    for _ in range(10):
        table.grad = torch.zeros_like(table)
        table.grad[0] = 1.0
        adam.step()
    torch.testing.assert_close(table[1], torch.full((3,), (1 - 0.03 * 0.01) ** 10))


def test_the_released_start_is_that_of_a_linear_layer():
    found = inversion.uniform_start(100, 5, 768, seed=0)
    linear = nn.Linear(100, 5 * 768).weight.detach()
    assert found.shape == (100, 5, 768) and float(found.std()) == pytest.approx(0.058, abs=5e-4)
    assert float(found.abs().max()) == pytest.approx(float(linear.abs().max()), rel=1e-3)
    assert not torch.equal(found, inversion.uniform_start(100, 5, 768, seed=1))


def test_groups_hold_every_row_once_and_at_most_so_many():
    labels = torch.tensor([0, 1, 0, 1, 0, 1, 0, 0])
    (everything,) = inversion.groups_of(labels, "mixed", None)
    assert everything.tolist() == list(range(8))
    mixed = inversion.groups_of(labels, "mixed", 3)
    assert [len(rows) for rows in mixed] == [3, 3, 2] and torch.cat(mixed).tolist() == list(range(8))
    of_a_class = inversion.groups_of(labels, "class", 3)
    assert [rows.tolist() for rows in of_a_class] == [[0, 2, 4], [6, 7], [1, 3, 5]]


@pytest.mark.parametrize(("images", "largest", "size"), [(50, 128, 50), (200, 128, 100), (100, 50, 50), (7, 3, 3)])
def test_batches_are_even_and_hold_no_image_twice(images, largest, size):
    assert inversion.even_batch(images, largest) == size <= min(images, largest)


# --- stage 2 ---


def inverted(labels, groups=None, **changes):
    n = len(labels)
    vectors = torch.randn(n, 2, 3, generator=torch.Generator().manual_seed(5))
    groups = torch.zeros(n, dtype=torch.int64) if groups is None else torch.tensor(groups)
    away, labels = vectors.mean(0, keepdim=True), torch.as_tensor(labels)
    how = dict(noise=0.0, interpolation=0.0) | changes
    return InvertedImages(vectors, labels, groups, away, torch.zeros(n, dtype=torch.int64), int(max(labels)) + 1, **how)


def test_the_real_images_on_record_are_those_whose_vectors_are_mixed():
    labels, indices = torch.tensor([0, 0, 0, 1, 1, 1]), torch.arange(6)
    alone, mixing = inverted(labels), inverted(labels, interpolation=0.25)
    rows = mixing.real_rows(labels, indices, 3)
    assert torch.equal(rows[:, :1], alone.real_rows(labels, indices, 3)) and (rows[:, 0] != rows[:, 1]).all()
    expected = 0.75 * mixing.vectors[rows[:, 0]] + 0.25 * mixing.vectors[rows[:, 1]]
    torch.testing.assert_close(mixing(labels, indices, 3).context, expected)


@pytest.mark.parametrize("counts", [(7, 7), (20, 20), (10, 30), (3, 8, 12, 6), (20,) * 10])
def test_as_many_images_as_vectors_take_each_of_them_once(counts):
    """In a block with the real class counts, whichever it is, and in a set that is uniform over the classes."""
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    conditioner, n = inverted(labels), len(labels)
    for block in range(4):
        rows = conditioner.rows(labels, torch.arange(block * n, (block + 1) * n))
        assert torch.equal(conditioner.labels[rows], labels)
        taken = rows.bincount(minlength=n)
        assert taken.max() <= 2 and (taken == 1).float().mean() > 0.7
        if len(set(counts)) == 1:
            assert taken.tolist() == [1] * n
    if len(set(counts)) == 1:
        uniform = balanced_labels(n, len(counts))
        assert conditioner.rows(uniform, torch.arange(n)).sort().values.tolist() == list(range(n))


def test_without_noise_and_mixing_an_image_is_told_its_vector():
    conditioner = inverted([0, 1, 1])
    told = conditioner(torch.tensor([1, 0]), torch.tensor([4, 5]), 0)
    rows = conditioner.rows(torch.tensor([1, 0]), torch.tensor([4, 5]))
    assert torch.equal(told.context, conditioner.vectors[rows]) and rows[1] == 0


def test_a_mixture_is_the_papers_sum_of_two_vectors_of_a_class():
    labels = torch.tensor([0] * 5 + [1] * 4)
    conditioner, indices = inverted(labels, interpolation=0.3), torch.arange(40)
    asked = balanced_labels(40, 2)
    rows = conditioner.rows(asked, indices)
    partners = torch.tensor([conditioner.partner(row, i, 7) for i, row in enumerate(rows.tolist())])
    assert torch.equal(labels[partners], asked) and not (partners == rows).any()
    assert len(set(partners[asked == 0].tolist())) == 5  # each of them is somebody's partner
    expected = 0.7 * conditioner.vectors[rows] + 0.3 * conditioner.vectors[partners]
    torch.testing.assert_close(conditioner(asked, indices, 7).context, expected)
    other_seed = conditioner(asked, indices, 8).context
    assert not torch.equal(other_seed, conditioner(asked, indices, 7).context)


def test_the_noise_has_the_strength_that_was_asked_for_and_is_the_images_own():
    quiet, loud = inverted([0, 0]), inverted([0, 0], noise=0.2)
    labels, indices = torch.zeros(2000, dtype=torch.int64), torch.arange(2000)
    noise = loud(labels, indices, 3).context - quiet(labels, indices, 3).context
    assert float(noise.std()) == pytest.approx(0.2, rel=0.03) and abs(float(noise.mean())) < 0.01
    alone = loud(labels[:1], indices[700:701], 3).context
    torch.testing.assert_close(alone[0], loud(labels, indices, 3).context[700])


def test_who_may_be_a_partner():
    labels, groups = [0] * 7 + [1] * 3 + [2], [0] * 6 + [1] * 5
    of_the_class = inverted(labels, groups)
    assert of_the_class.candidates(6).tolist() == [0, 1, 2, 3, 4, 5]  # whatever the group
    assert of_the_class.candidates(10).tolist() == [10]  # alone in its class
    released = inverted(labels, groups, partners="released")
    assert released.candidates(0).tolist() == [1, 2, 3, 4, 5]
    assert released.candidates(8).tolist() == [6, 7, 9, 10]  # 2 others of its class in the group are too few


def test_a_class_without_a_vector_is_an_error():
    with pytest.raises(ValueError, match="Class 1 has no vector"):
        inverted([0, 2])(torch.tensor([1]), torch.tensor([0]), 0)


def found_vectors():
    vectors = torch.arange(4.0)[:, None, None].expand(4, 2, 3).clone()
    return Vectors(vectors, torch.arange(4), torch.tensor([0, 1, 1, 0]), torch.tensor([0, 0, 0, 1]), torch.arange(4))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("mean", [1.5, 1.5, 1.5, 1.5]),
        ("group_mean", [1.0, 1.0, 1.0, 3.0]),
        ("class_mean", [1.5, 1.5, 1.5, 1.5]),
        ("empty_prompt", [9.0, 9.0, 9.0, 9.0]),
    ],
)
def test_what_guidance_leads_away_from(kind, expected):
    contexts, which = inversion.unconditional_contexts(found_vectors(), kind, torch.full((8, 3), 9.0))
    assert contexts.shape[1:] == (2, 3) and contexts[which][:, 0, 0].tolist() == expected
    assert len(contexts) == {"mean": 1, "empty_prompt": 1, "group_mean": 2, "class_mean": 2}[kind]


def test_guidance_leads_each_image_away_from_its_own_context(tiny):
    """The batched sampler with per-image unconditional contexts gives what one image at a time gives."""
    conditioner = inverted([0, 1])
    away = torch.stack([torch.zeros(2, 3), torch.ones(2, 3)])
    conditioner = dataclasses.replace(
        conditioner, unconditional_contexts=away, unconditional_of_vector=torch.tensor([0, 1])
    )
    labels, indices = torch.tensor([0, 1]), torch.tensor([0, 1])
    told, apart = conditioner(labels, indices, 0), conditioner.unconditional_of(labels, indices)
    assert torch.equal(apart.context, away)

    def predict(latents, t, condition):
        return latents * condition.context.mean(dim=(1, 2))[:, None, None, None]

    latents = torch.randn(2, 4, 2, 2)
    together = guided_noise(predict, latents, 5, told, apart, 2.0)
    for i in range(2):
        one = slice(i, i + 1)
        assert torch.allclose(together[one], guided_noise(predict, latents[one], 5, told[one], apart[one], 2.0))


@pytest.mark.slow
def test_a_group_is_learnt_and_drawn_at_stable_diffusions_size():
    """SD 2's UNet and VAE at 128 pixels, with random weights, on the CPU: the released start and tokens."""
    torch.manual_seed(0)
    model = bench_tools.load("sd2-random", "cpu", "auto")
    images = torch.randint(0, 256, (4, 3, 128, 128), dtype=torch.uint8)
    group = Latents(model.encode(images), torch.arange(4))
    table = VectorTable(inversion.uniform_start(4, tokens=5, width=model.width, seed=0), 4)
    at, noise = torch.tensor([100, 300, 500, 800]), torch.randn(group.latents.shape)

    def own(rows):
        return table(group.labels[rows], group.labels[rows])

    @torch.no_grad()
    def loss():
        return fixed_loss(model, group.latents, own, at, noise)

    unet = [parameter.double().sum().item() for parameter in model.unet.parameters()]
    losses = [loss()]
    how = dict(batch_size=4, learning_rate=0.3, weight_decay=0.0, clip_norm=math.inf, schedule="constant", seed=0)
    for _ in fit({"vectors": table.table.weight}, model, table, group, epochs=2, optimizer="adamw", **how):
        losses.append(loss())
    assert losses[0] > losses[1] > losses[2]
    assert unet == [parameter.double().sum().item() for parameter in model.unet.parameters()]
    with torch.no_grad():
        told, start = own(slice(None)), torch.randn(1, *model.latent_shape).expand(4, -1, -1, -1)
        how = dict(num_inference_steps=2, guidance_scale=2.0)
        drawn = model.decode(generate_latents(model, told, table.unconditional(), start, **how))
    assert drawn.shape == images.shape and drawn.dtype == torch.uint8
    assert not torch.equal(drawn[0], drawn[1])  # the same noise, another vector


# --- on a run's data ---


@pytest.fixture(scope="module")
def method(small, tmp_path_factory):
    course = small(tmp_path_factory.mktemp("inversion"), inversion_group_images=4)
    return InversionMethod(course.workspace)


def test_the_vectors_say_whose_they_are(method):
    history, found = method.invert(), method.vectors()
    train = method.ws.data.train
    assert [row["visits"] for row in history] == [1, 2] and set(history[0]) == {
        "visits",
        "train",
        "own",
        "other",
        "mean",
    }
    assert found.rows.tolist() == list(range(6)) and torch.equal(found.labels, train.labels)
    assert found.groups.tolist() == [0, 0, 0, 1, 1, 1]
    assert found.vectors.shape == (6, method.ws.backbone.tokens, method.ws.backbone.width)
    first = method.vectors(checkpoint=1)
    assert not torch.equal(first.vectors, found.vectors)
    with pytest.raises(ValueError, match="from 1 to 2 .*not 3"):
        method.vectors(checkpoint=3)


def test_vectors_of_other_images_are_refused(method, tmp_path):
    found, train = method.vectors(), method.ws.data.train
    found.save(tmp_path / "whole")
    assert torch.equal(Vectors.load(tmp_path / "whole", train).vectors, found.vectors)
    other = dataclasses.replace(train, images=255 - train.images)
    with pytest.raises(ValueError, match="vectors of other images"):
        Vectors.load(tmp_path / "whole", other)
    Vectors(*(getattr(found, f.name)[:-1] for f in dataclasses.fields(found))).save(tmp_path / "short")
    with pytest.raises(ValueError, match=r"no vector for 1 of the 6 training images: \[5\]"):
        Vectors.load(tmp_path / "short", train)
    with pytest.raises(ValueError, match="7 vectors for 6|6 vectors for 5"):
        Vectors.load(tmp_path / "whole", train.take(range(5)))
    files.save_tensors(tmp_path / "nothing", {"vectors": found.vectors})
    with pytest.raises(ValueError, match="holds no vectors"):
        Vectors.load(tmp_path / "nothing", train)


def test_a_block_draws_each_training_image_once(method):
    source, ws = method.source(), method.ws
    images = sets.synthetic(ws, source, 2)
    assert images.images.shape == (12, 3, 8, 8)
    drawing = source.build()
    again = drawing(ws.data.train.labels.sort().values, seed=0, set_name="synthetic", first_index=6)
    assert (again.int() - images.images[6:].int()).abs().max() <= 1


def test_variants_need_no_new_vectors(method):
    ws = method.ws.varied(inversion_noise=0.5, inversion_unconditional="class_mean", inversion_guidance=1.0)
    other = InversionMethod(ws)
    assert ws.run.peek(other.group_step(0)) is not None and ws.backbone is method.ws.backbone
    steps = [sets.block_step(w, m.source(), 1) for w, m in ((ws, other), (method.ws, method))]
    assert ws.run.fingerprint(steps[0]) != method.ws.run.fingerprint(steps[1])
    with pytest.raises(ValueError, match="seed cannot be varied"):
        method.ws.varied(seed=3)


def test_the_released_variants_are_every_checkpoint_with_each_scale(method):
    source = method.released_variants()
    rounds = source.build()
    kinds = [g.guidance_scale for g in rounds.generators]
    assert kinds == [2.0, 3.0, 4.0] * 2 and rounds.period == 6  # two checkpoints here, three by default: 9 x 5 are 45
    labels = method.ws.data.train.labels.sort().values
    drawn = rounds(labels.repeat(2), seed=0, set_name="synthetic", first_index=12)
    for block, part in ((2, drawn[:6]), (3, drawn[6:])):
        one = rounds.generators[block](labels, seed=0, set_name="synthetic", first_index=6 * block)
        assert torch.equal(one, part)
    assert torch.equal(rounds(labels[4:], first_index=4), rounds.generators[0](labels[4:], first_index=4))


def test_few_images_are_the_run_of_that_dataset(small, tmp_path):
    course = small(tmp_path, inversion_images=4)
    few = course.inversion.ws
    assert len(few.data.train) == 4 and few.settings.dataset.endswith("small.npz:4")
    assert few.backbone is course.backbone and few.run.path != course.run.path
    assert small(tmp_path, inversion_images=600).inversion.ws.data is not few.data
    alone = small(tmp_path, inversion_images=1).inversion.ws  # at least one image of each class
    assert sorted(alone.data.train.labels.tolist()) == [0, 1]


def test_recipes_follow_the_paper_and_the_released_code():
    paper, released = (resolve(recipe, "tiny") for recipe in ("paper", "released"))
    assert (paper.inversion_learning_rate, paper.inversion_visits, paper.inversion_schedule) == (0.03, 3000, "constant")
    assert (paper.inversion_noise, paper.inversion_interpolation, paper.inversion_steps) == (0.1, 0.1, 100)
    # Section 3.2: (1 + w) eps_c - w eps_u with w = 2 is eps_u + 3 (eps_c - eps_u); the code's 2 is UGS itself.
    assert (paper.inversion_guidance, released.inversion_guidance) == (3.0, 2.0)
    assert (released.inversion_tokens, released.inversion_group_images, released.inversion_batch_size) == (5, 100, 50)
    assert (released.inversion_unconditional, released.inversion_partners) == ("group_mean", "released")
    rows = {row["setting"] for row in protocol(paper, "inversion")}
    assert rows and all(name.startswith("inversion_") for name in rows)
    assert not rows & {row["setting"] for row in protocol(paper)}
    assert followed(paper, "inversion") == f"the paper in {len(rows)} of {len(rows)} settings"


# --- taken away ---


def test_the_saved_generator_draws_what_the_run_draws(method, tmp_path):
    out = export.export(method.ws, method.source(), "generator", tmp_path / "out")
    loaded = generator.load(out, device="cpu", precision="fp32")
    labels, mine = torch.tensor([0, 1, 1, 0]), method.source().build()
    assert torch.equal(loaded(labels, seed=3, first_index=5), mine(labels, seed=3, first_index=5))
    assert isinstance(loaded.conditioner, InvertedImages) and loaded.conditioner.noise == 0.1
    card = (out / "README.md").read_text()
    assert "2305.15316" in card and "2405.02698" not in card and "learned from one real training image" in card
    exported = export.export(method.ws, method.source(), "npz", tmp_path / "set", multiple=1)
    assert "**Privacy:**" in (exported / "README.md").read_text()


@pytest.mark.parametrize(
    "damage",
    [
        lambda t: t.pop("groups"),
        lambda t: t.update(vectors=t["vectors"][:, :, :-1].contiguous()),
        lambda t: t.update(labels=t["labels"] + 1),
        lambda t: t.update(labels=t["labels"].float()),
        lambda t: t.update(unconditional_of_vector=t["unconditional_of_vector"] - 1),
        lambda t: t.update(vectors=torch.full_like(t["vectors"], float("nan"))),
    ],
    ids=["missing", "width", "class", "dtype", "unconditional", "nan"],
)
def test_damaged_vectors_are_not_loaded(method, tmp_path, damage):
    out = export.export(method.ws, method.source(), "generator", tmp_path / "out")
    path = out / "conditioner.safetensors"
    tensors = files.load_tensors(path)
    damage(tensors)
    files.save_tensors(path, tensors)
    with pytest.raises(ValueError, match="not of these classes and this model"):
        generator.load(out, device="cpu", precision="fp32")
