"""The networks: ResNet20 as in its paper, torchvision's as in torchvision."""

import copy
import pickle

import pytest
import torch
import torchvision
from torch.nn.functional import interpolate

from sdgen_lib import classify
from sdgen_lib.classify import networks
from sdgen_lib.data import Split


def count(model):
    return sum(p.numel() for p in model.parameters())


def expected_count(classes, w):
    """Convolutions 9 in out, normalisation 2 each; 1 + 18 of them; a linear head."""
    stem = 3 * w * 9 + 2 * w
    stages = sum(
        before * after * 9 + 2 * after + 5 * (after * after * 9 + 2 * after)
        for before, after in ((w, w), (w, 2 * w), (2 * w, 4 * w))
    )
    return stem + stages + 4 * w * classes + classes


@pytest.mark.parametrize(
    ("classes", "width", "millions"), [(10, 16, 0.27), (10, 64, 4.29), (2, 16, 0.27), (9, 8, 0.07)]
)
def test_parameters(classes, width, millions):
    model = classify.build("resnet20", classes, width=width)
    assert isinstance(model, classify.ResNet20)
    assert count(model) == expected_count(classes, width)
    assert round(count(model) / 1e6, 2) == millions


def test_twenty_layers_with_weights():
    model = classify.ResNet20(10)
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    assert len(layers) == 20


@pytest.mark.parametrize(("channels", "stride"), [(4, 1), (8, 2)])
def test_a_block_that_adds_nothing_is_its_shortcut(channels, stride):
    block = networks.Block(4, channels, stride)
    torch.nn.init.zeros_(block.norm2.weight)
    x = torch.randn(2, 4, 6, 6)
    found = block(x)
    assert found.shape == (2, channels, 6 // stride, 6 // stride)
    assert torch.equal(found[:, :4], x[:, :, ::stride, ::stride].clamp(min=0))
    assert (found[:, 4:] == 0).all()


@pytest.mark.parametrize("size", [4, 7])
def test_the_released_codes_shortcut_is_max_pooling(size):
    block = networks.Block(4, 8, 2, "max_pool")
    torch.nn.init.zeros_(block.norm2.weight)
    x = torch.rand(2, 4, size, size)
    found, half = block(x), (size + 1) // 2
    assert found.shape == (2, 8, half, half)
    for i in range(half):
        for j in range(half):
            corner = x[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
            assert torch.equal(found[:, :4, i, j], corner.amax((2, 3)))
    assert (found[:, 4:] == 0).all()


@pytest.mark.parametrize("shortcut", ["subsample", "max_pool"])
@pytest.mark.parametrize("size", [8, 16, 28, 32])
def test_any_size(size, shortcut):
    images = torch.randint(0, 256, (3, 3, size, size), dtype=torch.uint8)
    assert classify.ResNet20(7, shortcut=shortcut)(images).shape == (3, 7)


def test_a_model_can_be_copied_and_pickled():
    model = classify.ResNet20(3, 4).eval()
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(images), model(images))


def test_unknown_names_are_errors_that_name_the_nearest():
    with pytest.raises(ValueError, match="Unknown network 'resnet19'. Did you mean 'resnet1?8"):
        classify.build("resnet19", 10)
    with pytest.raises(ValueError, match="Unknown network 'nothing'. Allowed: efficientnet_b0, .*, vgg16"):
        classify.build("nothing", 10)
    with pytest.raises(ValueError, match="Unknown shortcut 'max_pol'. Did you mean 'max_pool'"):
        classify.build("resnet20", 10, shortcut="max_pol")


# --- torchvision's ------------------------------------------------------------------------------------

PUBLISHED = {
    "resnet18": torchvision.models.ResNet18_Weights.IMAGENET1K_V1,
    "vgg16": torchvision.models.VGG16_Weights.IMAGENET1K_V1,
    "mobilenet_v2": torchvision.models.MobileNet_V2_Weights.IMAGENET1K_V1,
    "shufflenet_v2_x1_0": torchvision.models.ShuffleNet_V2_X1_0_Weights.IMAGENET1K_V1,
    "efficientnet_b0": torchvision.models.EfficientNet_B0_Weights.IMAGENET1K_V1,
}
SMALL = sorted(set(PUBLISHED) - {"vgg16"})  # vgg16 has 134 million parameters


def test_these_are_the_networks():
    assert set(classify.NETWORKS) == {"resnet20", *PUBLISHED}


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_parameters_of_the_published_network(name):
    with torch.device("meta"):
        assert count(classify.build(name, 1000)) == PUBLISHED[name].meta["num_params"]


@pytest.mark.parametrize("name", SMALL)
def test_the_answers_are_the_published_networks(name):
    model = classify.build(name, 5).eval()
    theirs = getattr(torchvision.models, name)(num_classes=5).eval()
    theirs.load_state_dict(model.network.state_dict())
    images = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8)
    images[0], images[1] = 0, 255
    assert torch.equal(model(images), theirs(torch.stack([torch.full((3, 40, 40), -1.0), torch.ones(3, 40, 40)])))


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_any_size_of_the_published_networks(name):
    model = classify.build(name, 7).eval()
    for height, width in ((8, 8), (28, 28), (32, 32), (28, 65)):
        images = torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8)
        logits = model(images)
        assert logits.shape == (2, 7) and logits.dtype == torch.float32 and logits.isfinite().all()


def test_small_pictures_are_enlarged():
    model = classify.build("resnet18", 3).eval()
    images = torch.randint(0, 256, (2, 3, 28, 28), dtype=torch.uint8)
    larger = interpolate(images.float() / 127.5 - 1, size=32, mode="bilinear")
    assert torch.allclose(model(images), model.network(larger), atol=1e-6)


@pytest.mark.parametrize("name", ["resnet20", *SMALL])
def test_the_dtype_is_that_of_the_matrix_products(name):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        exact = classify.build(name, 4).eval()
        torch.manual_seed(0)
        rounded = classify.build(name, 4, dtype=torch.bfloat16).eval()
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert all(p.dtype == torch.float32 for p in rounded.parameters())
    assert rounded(images).dtype == torch.float32
    assert not torch.equal(exact(images), rounded(images))
    assert torch.allclose(exact(images), rounded(images), atol=0.05)


@pytest.mark.parametrize("name", sorted(classify.NETWORKS))
def test_who_draws_random_numbers_says_so(name):
    """And only who does: two passes in training differ."""
    model = classify.build(name, 4)
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    state = torch.get_rng_state()
    with torch.no_grad():
        model(images)
    assert model.draws == (not torch.equal(torch.get_rng_state(), state))


# --- answers ------------------------------------------------------------------------------------------


def test_accuracy_and_predict():
    """A model that answers with the brightest colour channel."""

    class Brightest(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.unused = torch.nn.Parameter(torch.zeros(1))

        def forward(self, images):
            return images.float().mean((2, 3))

    images = torch.zeros(7, 3, 8, 8, dtype=torch.uint8)
    images[torch.arange(7), torch.tensor([0, 1, 2, 0, 1, 2, 2])] = 200
    assert classify.predict(Brightest(), images, batch_size=3).tolist() == [0, 1, 2, 0, 1, 2, 2]
    assert classify.accuracy(Brightest(), Split(images, torch.tensor([0, 1, 2, 0, 0, 0, 2]))) == pytest.approx(5 / 7)
