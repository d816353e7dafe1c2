"""The Class-Encoder is one linear map, and nothing else; as a conditioner it tells each image its class's context."""

import numpy as np
import pytest
import torch

from sdgen_lib.diffusion.training import Batches
from sdgen_lib.methods.class_encoder import ENCODER, ClassEncoder, Point
from sdgen_lib.search.search import Space
from sdgen_lib.store import files
from sdgen_lib.work.fitting import checkpoint_name


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return ClassEncoder(num_classes=3, tokens=2, width=5)


def by_hand(encoder, vectors):
    """vectors (B, C) -> (B, tokens, width), by numpy from the stored weights."""
    weight, bias = encoder.linear.weight.detach().numpy(), encoder.linear.bias.detach().numpy()
    return (vectors @ weight.T + bias).reshape(len(vectors), encoder.tokens, encoder.width)


def test_it_is_a_matrix_product(encoder):
    vectors = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    with torch.no_grad():
        found = encoder(torch.from_numpy(vectors))
    assert found.shape == (4, 2, 5)
    np.testing.assert_allclose(found.numpy(), by_hand(encoder, vectors), atol=1e-6)


def test_contexts_are_those_of_the_one_hot_vectors(encoder):
    contexts = encoder.contexts()
    np.testing.assert_allclose(contexts.detach().numpy(), by_hand(encoder, np.eye(3, dtype=np.float32)), atol=1e-6)
    contexts[1].sum().backward()
    assert encoder.linear.weight.grad[:, 1].abs().min() == 1  # class 1's column, and it alone, has a gradient
    assert encoder.linear.weight.grad[:, [0, 2]].abs().max() == 0


def shapes(module):
    return {name: tuple(p.shape) for name, p in module.named_parameters()}


def test_nothing_but_one_weight_and_one_bias(encoder):
    assert shapes(encoder) == {"linear.weight": (10, 3), "linear.bias": (10,)}


def test_a_start_context_is_every_classs_first(encoder):
    start = torch.arange(10.0).view(2, 5)
    begun = ClassEncoder(3, 2, 5, start)
    for context in begun.contexts().detach():
        assert torch.equal(context, start)
    start.zero_()  # the encoder holds a copy
    assert begun.contexts().detach().sum() == 3 * 45
    spread = encoder.contexts().detach()
    assert not torch.equal(spread[0], spread[1])  # without a start the classes differ


@pytest.fixture
def released():
    """The shape of the released code's, smaller: 3 classes -> 4 numbers -> 5 tokens of 2."""
    torch.manual_seed(0)
    encoder = ClassEncoder(3, 5, 2, rank=4)
    with torch.no_grad():
        encoder.linear[0].bias.normal_()
    return encoder


def test_the_released_codes_two_maps(released):
    first, second = released.linear
    assert shapes(released) == {"linear.0.weight": (4, 3), "linear.0.bias": (4,), "linear.1.weight": (10, 4)}
    vectors = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    weight, bias, weight_2 = (p.detach().numpy() for p in released.parameters())
    by_numpy = (vectors @ weight.T + bias) @ weight_2.T
    with torch.no_grad():
        np.testing.assert_allclose(released(torch.from_numpy(vectors)).numpy(), by_numpy.reshape(6, 5, 2), atol=1e-5)
        shared = (second.weight @ first.bias).view(5, 2)
        torch.testing.assert_close(released.unconditional("zero"), shared)
        many = released(torch.randn(50, 3)).flatten(1) - shared.flatten()
    assert int(torch.linalg.matrix_rank(many)) == 3  # linear: no more than there are classes, whatever lies between


def test_the_released_codes_start(released):
    fresh = ClassEncoder(100, 100, 768, rank=500)
    assert (fresh.linear[0].bias == 0).all()
    for layer in fresh.linear:  # Keras' Glorot uniform: +-sqrt(6 / (fan in + fan out))
        limit = (6 / sum(layer.weight.shape)) ** 0.5
        assert 0.99 * limit < float(layer.weight.detach().abs().max()) < 1.0001 * limit
    with pytest.raises(ValueError, match="use start=None"):
        ClassEncoder(3, 5, 2, start=torch.zeros(5, 2), rank=4)


def test_the_three_unconditional_contexts(encoder):
    zero = by_hand(encoder, np.zeros((1, 3), np.float32))[0]
    np.testing.assert_allclose(encoder.unconditional("zero").detach().numpy(), zero, atol=1e-6)
    mean = by_hand(encoder, np.eye(3, dtype=np.float32)).mean(0)
    np.testing.assert_allclose(encoder.unconditional("class_mean").detach().numpy(), mean, atol=1e-6)
    assert np.abs(mean - zero).max() > 0.01
    empty = torch.full((2, 5), 3.0, dtype=torch.float64)
    found = encoder.unconditional("empty_prompt", empty)
    assert found.dtype == torch.float32 and torch.equal(found, empty.float())


def test_unconditional_errors(encoder):
    with pytest.raises(ValueError, match="needs the text encoder's context"):
        encoder.unconditional("empty_prompt")
    with pytest.raises(ValueError, match="Unknown unconditional context 'zeros'.*class_mean"):
        encoder.unconditional("zeros")


# --- as a conditioner ---


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_its_gradients_are_the_same_whenever_they_are_computed(two_threads):
    """On two cores, of contexts as large as Stable Diffusion's. The closed form: the sum over a class's images."""
    torch.manual_seed(0)
    encoder = ClassEncoder(10, 77, 1024)
    labels, weights = torch.randint(0, 10, (32,)), torch.randn(32, 77, 1024)
    conditioner = encoder.conditioner()
    found = set()
    for _ in range(12):
        encoder.zero_grad()
        (conditioner(labels).context * weights).sum().backward()
        found.add((encoder.linear.weight.grad.numpy().tobytes(), encoder.linear.bias.grad.numpy().tobytes()))
    assert len(found) == 1
    flat = weights.double().flatten(1)
    of_class = torch.stack([flat[labels == label].sum(0) for label in range(10)], 1)
    torch.testing.assert_close(encoder.linear.weight.grad.double(), of_class, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(encoder.linear.bias.grad.double(), flat.sum(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["zero", "class_mean"])
def test_it_tells_each_image_its_classs_context(encoder, kind):
    told, labels = encoder.conditioner(kind), torch.tensor([2, 0, 2, 1])
    vectors = np.eye(3, dtype=np.float32)
    for conditioner in (told, told.table()):
        condition = conditioner(labels, torch.arange(4), 0)
        found, expected = condition.context.detach().numpy(), by_hand(encoder, vectors[labels])
        np.testing.assert_allclose(found, expected, atol=1e-6)
        assert condition.embedding is None and conditioner.unconditional().context.shape == (1, 2, 5)
        away = by_hand(encoder, vectors).mean(0) if kind == "class_mean" else by_hand(encoder, vectors[:1] * 0)[0]
        np.testing.assert_allclose(conditioner.unconditional().context[0].detach().numpy(), away, atol=1e-6)


def test_the_empty_prompts_context_goes_along(encoder):
    empty = torch.full((2, 5), 3.0)
    told = encoder.conditioner("empty_prompt", empty)
    assert torch.equal(told.unconditional().context[0], empty)
    assert torch.equal(told.table().unconditional().context[0], empty)


def test_it_keeps_gradients_and_its_table_does_not(encoder):
    told = encoder.conditioner()
    told(torch.tensor([1, 1]), torch.arange(2), 0).context[0].sum().backward()
    assert encoder.linear.weight.grad[:, 1].abs().min() == 1 and encoder.linear.weight.grad[:, 0].abs().max() == 0
    table = told.table()
    assert not table.contexts.requires_grad and not table.empty.requires_grad
    with torch.no_grad():
        encoder.linear.weight.zero_()
    assert table.contexts.abs().max() > 0  # what it was when the table was made


# --- step 3 ---


def checkpoint(course, epoch):
    return files.load_tensors(course.run.file(course.method.finetune_step, checkpoint_name(epoch)))


@pytest.mark.parametrize("rate", ["none", 0.05])
def test_step_3_trains_the_class_encoder_along_or_leaves_it(small, tmp_path, rate):
    course = small(tmp_path, finetune_encoder_learning_rate=rate)
    course.finetune()
    method, epoch = course.method, course.method.point("after 3").transfer_epoch
    first, at = method.class_encoder(epoch), method.point("after 3")
    then = method.class_encoder_at(at)
    names = {name.removeprefix(ENCODER) for name in checkpoint(course, 2) if name.startswith(ENCODER)}
    assert torch.equal(then.linear.weight, first.linear.weight) == (rate == "none")
    assert names == (set() if rate == "none" else {"linear.weight", "linear.bias"})
    for name in names:  # what is sampled with is what was kept
        assert torch.equal(then.state_dict()[name], checkpoint(course, 2)[ENCODER + name].float())
    assert torch.equal(method.class_encoder_at(method.point("after 2")).linear.weight, first.linear.weight)
    contexts = course.generator("after 3").conditioner.contexts
    assert torch.equal(contexts, then.contexts())
    course.generator("after 3").prepare(1)  # the UNet takes its own weights alone
    unet = course.backbone.unet.state_dict()
    assert not any(name.startswith(ENCODER) for name in unet)
    torch.testing.assert_close(unet["conv_in.weight"].float(), checkpoint(course, 2)["conv_in.weight"].float())


def test_an_epoch_of_either_training_may_be_a_number_of_images(small, tmp_path, monkeypatch):
    seen, of = [], Batches.of
    monkeypatch.setattr(Batches, "of", lambda self, epoch: (seen.append(b := list(of(self, epoch))), iter(b))[1])
    course = small(tmp_path, transfer_epoch_images=9, finetune_epoch_images=14)  # 6 images, batches of 4
    course.finetune()
    assert [sum(map(len, batches)) for batches in seen] == [9, 9, 14, 14]
    assert [len(row) for row in (course.transfer(), course.finetune())] == [2, 2]
    (gradient,) = [count for kind, count in course.method.transfer_step.work().items() if "gradient" in kind.kind]
    assert gradient == 18


@pytest.mark.parametrize(("least", "expected"), [(0.0, [2.5, 1.0]), (1.0, [2.5, 1.0]), (1.5, [2.5, 1.5])])
def test_step_4_is_given_the_point_before_it_and_the_same_without_guidance(
    small, tmp_path, monkeypatch, least, expected
):
    """Never UGS 0, where no class is told."""
    method = small(tmp_path).method
    monkeypatch.setattr(method, "point", lambda row: Point(5, 2.5, 1, 2))
    known = method._known(Space((2, 9), (least, 3.0), (1, 2)))
    assert known == [{"IS": 5, "UGS": guidance, "epoch": 2} for guidance in expected]
