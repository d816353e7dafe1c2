"""ResNet20, its training, accuracy and the Classification Accuracy Score (CAS)."""

from __future__ import annotations

import copy
import dataclasses
import math
import threading
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from .data import Split
from .devices import autocast

_random_state = threading.Lock()  # there is one for all threads


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters (option A of He et al. 2016): subsample, pad channels.

    The paper's released code makes the shortcut smaller by max-pooling.
    """

    def __init__(self, channels_in: int, channels: int, stride: int, shortcut: str = "subsample"):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.stride, self.extra = stride, channels - channels_in
        self.smaller = {"subsample": lambda x: x[:, :, ::stride, ::stride],
                        "max_pool": lambda x: F.max_pool2d(x, stride, ceil_mode=True)}[shortcut]  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        same = self.stride == 1 and not self.extra
        shortcut = x if same else F.pad(self.smaller(x), (0, 0, 0, 0, 0, self.extra))
        x = F.relu(self.norm1(self.conv1(x)), inplace=True)
        return F.relu(self.norm2(self.conv2(x)).add_(shortcut), inplace=True)


class ResNet20(nn.Module):
    """The CIFAR ResNet20 (He et al. 2016, section 4.2): three stages of three blocks, ``width`` filters in the first.

    Width 16 (0.27 M parameters) is what the name means; the paper's released code has width 64 (4.29 M) and the
    ``shortcut`` "max_pool".
    uint8 (B, 3, H, W), H = W any size from 8 -> logits float32 (B, num_classes). ``dtype``: of its matrix products.
    """

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


@dataclasses.dataclass(frozen=True)
class Score:
    """What one classifier reached, as fractions 0..1, at the epoch with the best real validation accuracy."""

    val_accuracy: float
    test_accuracy: float  # its CAS, if it was trained on generated images
    best_epoch: int
    epochs: int  # trained, early stopping included
    predicted: torch.Tensor = dataclasses.field(compare=False, repr=False)  # classes of the test images, int64 (N,)


@torch.no_grad()
def predict(model: ResNet20, images: torch.Tensor, batch_size: int = 512) -> torch.Tensor:
    """uint8 (N, 3, H, W) -> predicted class, int64 (N,), on the CPU."""
    model.eval()
    device = next(model.parameters()).device
    return torch.cat([model(part.to(device)).argmax(1).cpu() for part in images.split(batch_size)])


def accuracy(model: ResNet20, split: Split) -> float:
    """Top-1 accuracy, 0..1."""
    return float((predict(model, split.images) == split.labels).float().mean())


def train_classifier(
    images: torch.Tensor, labels: torch.Tensor, val: Split, num_classes: int, *, width: int = 16,
    shortcut: str = "subsample", epochs: int = 100, batch_size: int = 256, epoch_images: int = 1,
    epoch_limit: int | None = None, learning_rate: float = 1e-3, label_smoothing: float = 0.1,
    plateau_patience: int = 10, stop_patience: int = 25, seed: int = 0, device: str = "cpu",
    dtype: torch.dtype = torch.float32, on_epoch: Callable[[int, ResNet20, float], None] | None = None,
) -> tuple[ResNet20, list[float]]:  # fmt: skip
    """Trains a ResNet20 from scratch by the paper's protocol (section 4), without augmentation.

    ``images`` uint8 (N, 3, H, W) and ``labels`` int64 (N,), real or generated; ``val`` real images, which set the
    learning rate's plateaus (factor 0.1) and the early stopping. An epoch sees every image, those of a set smaller than
    ``epoch_images`` several times, so that small sets are not also trained for fewer steps; with an ``epoch_limit`` it
    ends after so many, and the next epoch goes on from there, so that large sets cost no more. ``on_epoch(epoch, model,
    val accuracy)`` may raise to stop (a search's pruner does). Returns the model with the weights of its best epoch,
    and the validation accuracy of every epoch.
    """
    with _random_state, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ResNet20(num_classes, width, dtype, shortcut).to(device, memory_format=torch.channels_last)
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate, fused=True)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", factor=0.1, patience=plateau_patience)
    images = images.to(device).contiguous(memory_format=torch.channels_last)  # rows keep it: convolutions are faster so
    labels = labels.to(device)
    epoch_size = len(images) * max(1, math.ceil(epoch_images / len(images)))
    epoch_size, queue = min(epoch_size, epoch_limit or epoch_size), torch.empty(0, dtype=torch.int64)
    best, best_epoch, history = copy.deepcopy(model.state_dict()), 0, []
    for epoch in range(1, epochs + 1):
        model.train()
        while len(queue) < epoch_size:
            queue = torch.cat([queue, torch.randperm(len(images), generator=order)])
        shuffled, queue = queue[:epoch_size], queue[epoch_size:]
        for rows in shuffled.split(batch_size):
            loss = F.cross_entropy(model(images[rows]), labels[rows], label_smoothing=label_smoothing)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        history.append(accuracy(model, val))
        plateau.step(history[-1])
        if best_epoch == 0 or history[-1] > history[best_epoch - 1]:
            best, best_epoch = copy.deepcopy(model.state_dict()), epoch
        if on_epoch:
            on_epoch(epoch, model, history[-1])
        if epoch - best_epoch >= stop_patience:
            break
    model.load_state_dict(best)
    return model, history


def score(images: torch.Tensor, labels: torch.Tensor, val: Split, test: Split, num_classes: int, **options) -> Score:
    """Trains a classifier on ``images`` and tests it on real ones: the CAS if they were generated.

    (Ravuri and Vinyals 2019.) ``options`` as in `train_classifier`.
    """
    model, history = train_classifier(images, labels, val, num_classes, **options)
    best, predicted = max(history), predict(model, test.images)
    correct = float((predicted == test.labels).float().mean())
    return Score(best, correct, history.index(best) + 1, len(history), predicted)
