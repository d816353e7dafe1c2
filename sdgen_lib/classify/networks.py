"""The classifiers, by name: uint8 images in, logits out; how they are asked, and how often they are right."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from ..config.messages import unknown_name
from ..data import Split
from ..machine.devices import autocast

# How a block's shortcut makes a picture smaller: (x, stride) -> x. The first is option A of He et al. 2016, the second
# is what the paper's released code does.
SHORTCUTS: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    "subsample": lambda x, stride: x[:, :, ::stride, ::stride],
    "max_pool": lambda x, stride: F.max_pool2d(x, stride, ceil_mode=True),
}
SMALLEST_PICTURE = 32  # pixels; torchvision's networks halve a picture five times


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters (He et al. 2016): a smaller picture, padded channels.

    float (B, channels_in, H, W) -> (B, channels, H / stride, W / stride), rounded up. Raises ValueError for an unknown
    ``shortcut``, one of `SHORTCUTS`.
    """

    def __init__(self, channels_in: int, channels: int, stride: int, shortcut: str = "subsample"):
        super().__init__()
        if shortcut not in SHORTCUTS:
            raise unknown_name("shortcut", shortcut, SHORTCUTS)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.stride, self.extra, self.shortcut = stride, channels - channels_in, shortcut

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        same = self.stride == 1 and not self.extra
        smaller = SHORTCUTS[self.shortcut]
        shortcut = x if same else F.pad(smaller(x, self.stride), (0, 0, 0, 0, 0, self.extra))
        x = F.relu(self.norm1(self.conv1(x)), inplace=True)
        return F.relu(self.norm2(self.conv2(x)).add_(shortcut), inplace=True)


class ResNet20(nn.Module):
    """The CIFAR ResNet20 (He et al. 2016, section 4.2): three stages of three blocks, ``width`` filters in the first.

    Width 16 (0.27 M parameters) is what the name means; the paper's released code has width 64 (4.29 M) and the
    ``shortcut`` "max_pool".
    uint8 (B, 3, H, W), H = W any size from 8 -> logits float32 (B, num_classes). ``dtype``: of its matrix products.
    """

    smallest_batch = 1  # images of a training step
    draws = False  # whether its forward pass in training takes random numbers

    def __init__(
        self, num_classes: int, width: int = 16, dtype: torch.dtype = torch.float32, shortcut: str = "subsample"
    ):
        super().__init__()
        self.dtype = dtype
        stages, channels_in = [], width
        for stage in range(3):
            for block in range(3):
                channels = width * 2**stage
                stages.append(Block(channels_in, channels, 2 if stage > 0 and block == 0 else 1, shortcut))
                channels_in = channels
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(True))
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(channels_in, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        with autocast(images.device, self.dtype):
            x = self.stages(self.stem(images.float() / 127.5 - 1))
            return self.head(x.mean(dim=(2, 3))).float()


class TorchvisionNetwork(nn.Module):
    """A network of torchvision's (``name`` as there) with fresh weights.

    uint8 (B, 3, H, W) -> logits float32 (B, num_classes). Any size: a picture of fewer than 32 pixels is enlarged to 32
    (bilinearly), because these networks halve it five times. ``dtype``: of its matrix products.
    """

    smallest_batch = 2  # its last pictures may have one pixel, and batch normalisation needs two values of a channel

    def __init__(self, name: str, num_classes: int, dtype: torch.dtype = torch.float32):
        from torchvision.models import get_model  # takes seconds to import, and ResNet20 needs none of it
        from torchvision.ops import StochasticDepth

        super().__init__()
        self.network, self.dtype = get_model(name, weights=None, num_classes=num_classes), dtype
        self.draws = any(isinstance(part, nn.Dropout | StochasticDepth) for part in self.modules())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        with autocast(images.device, self.dtype):
            x = images.float() / 127.5 - 1
            height, width = x.shape[-2:]
            if min(height, width) < SMALLEST_PICTURE:
                size = max(height, SMALLEST_PICTURE), max(width, SMALLEST_PICTURE)
                x = F.interpolate(x, size=size, mode="bilinear")
            return self.network(x).float()


TORCHVISION = ("resnet18", "vgg16", "mobilenet_v2", "shufflenet_v2_x1_0", "efficientnet_b0")
NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "resnet20": ResNet20,
    **{name: partial(TorchvisionNetwork, name) for name in TORCHVISION},
}


def build(name: str, num_classes: int, **options) -> nn.Module:
    """The network called ``name`` (one of `NETWORKS`) with fresh weights: uint8 (B, 3, H, W) -> float32 (B, classes).

    ``options``: ``dtype`` for each, ``width`` and ``shortcut`` for "resnet20" alone. The weights come from torch's
    global random numbers. Raises ValueError for an unknown name.
    """
    if name not in NETWORKS:
        raise unknown_name("network", name, NETWORKS)
    return NETWORKS[name](num_classes, **options)


@torch.no_grad()
def logits_of(model: nn.Module, images: torch.Tensor, batch_size: int = 512) -> torch.Tensor:
    """uint8 (N, 3, H, W), or float of 0..255 -> logits, float32 (N, C), on the CPU. Leaves the model in evaluation
    mode."""
    model.eval()
    device = next(model.parameters()).device
    return torch.cat([model(part.to(device)).cpu() for part in images.split(batch_size)])


def predict(model: nn.Module, images: torch.Tensor, batch_size: int = 512) -> torch.Tensor:
    """The predicted classes, int64 (N,), otherwise as `logits_of`."""
    return logits_of(model, images, batch_size).argmax(1)


def probabilities_of(model: nn.Module, images: torch.Tensor, batch_size: int = 512) -> torch.Tensor:
    """The softmax of `logits_of`, float32 (N, C): what the model takes each class's probability for."""
    return logits_of(model, images, batch_size).softmax(1)


def fraction_right(predicted: torch.Tensor, labels: torch.Tensor) -> float:
    """How many of the ``predicted`` classes, int64 (N,), are the ``labels``, int64 (N,): 0..1."""
    return float((predicted == labels).float().mean())


def accuracy(model: nn.Module, split: Split) -> float:
    """Top-1 accuracy, 0..1."""
    return fraction_right(predict(model, split.images), split.labels)
