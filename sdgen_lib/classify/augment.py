"""Augmentations of training batches, by name: torchvision's, drawn anew for each image."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from ..config.messages import unknown_name

Transform = Callable[[torch.Tensor], torch.Tensor]


def _v2():
    from torchvision.transforms import v2  # takes a second to import, and most trainings augment nothing

    return v2


def _crop_flip(size: tuple[int, int]) -> Transform:
    return _v2().Compose([_v2().RandomCrop(size, padding=min(size) // 8), _v2().RandomHorizontalFlip()])


# The height and width of the images -> what is done to each of them, uint8 (3, H, W) -> uint8 (3, H, W).
OF_AN_IMAGE: dict[str, Callable[[tuple[int, int]], Transform]] = {
    # Zeros around it, a crop of its size, half of them mirrored: He et al. 2016 pad CIFAR's 32 pixels by 4.
    "crop_flip": _crop_flip,
    # Cubuk et al. 2019: two of 14 changes, by the policy that was found on CIFAR-10.
    "autoaugment": lambda size: _v2().AutoAugment(_v2().AutoAugmentPolicy.CIFAR10),
    # Cubuk et al. 2020: two of 14 changes, each as strong as the other.
    "randaugment": lambda size: _v2().RandAugment(num_ops=2, magnitude=9),
    # Hendrycks et al. 2020: a mixture of three chains of changes; without their consistency loss.
    "augmix": lambda size: _v2().AugMix(),
    # DeVries and Taylor 2017: a grey square of half the side. Theirs may lie partly outside the picture.
    "cutout": lambda size: _v2().RandomErasing(p=1, scale=(0.25, 0.25), ratio=(1, 1), value=127),
}
# Those that mix two images of a batch and their labels in the same proportion, uniform in 0..1.
OF_A_BATCH: dict[str, Callable[[], Callable]] = {
    "mixup": lambda: _v2().MixUp(alpha=1.0),  # Zhang et al. 2018: the weighted sum of the images
    "cutmix": lambda: _v2().CutMix(alpha=1.0),  # Yun et al. 2019: a rectangle of one in the other
}
AUGMENTATIONS = ("none", *OF_AN_IMAGE, *OF_A_BATCH)


class Augmentation:
    """The augmentation of a batch that ``names`` says: one of `AUGMENTATIONS`, or several, as "crop_flip+mixup".

    Those of single images come first, in the order of their names. The random numbers are torch's global ones.
    Raises ValueError for an unknown name. An augmentation is false if it is "none".
    """

    def __init__(self, names: str, size: tuple[int, int]):
        chosen = names.split("+")
        for name in chosen:
            if name not in AUGMENTATIONS:
                raise unknown_name("augmentation", name, AUGMENTATIONS)
        self.of_an_image = [OF_AN_IMAGE[name](size) for name in chosen if name in OF_AN_IMAGE]
        self.of_a_batch = [OF_A_BATCH[name]() for name in chosen if name in OF_A_BATCH]

    def __bool__(self) -> bool:
        return bool(self.of_an_image or self.of_a_batch)

    def images(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 (B, 3, H, W) -> uint8 (B, 3, H, W), on the same device."""
        for transform in self.of_an_image:
            images = torch.stack([transform(image) for image in images])
        return images

    def mixed(
        self, images: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Images, label probabilities and loss weights of a batch, mixed: all float32, the images still 0..255.

        uint8 (B, 3, H, W), float32 (B, C), float32 (B,) -> the same shapes. The loss of a mixed image is the mixture of
        the weighted losses that it has with either label: so a probability counts as much as its image's weight.
        """
        order = torch.randperm(len(images))  # torchvision mixes neighbours, which may be of one part of a mixture
        images, labels, weights = images[order].float(), labels[order], weights[order, None]
        weighted = torch.cat([labels * weights, weights], dim=1)
        for mix in self.of_a_batch:
            images, weighted = mix(images, weighted)
        weights = weighted[:, -1]
        return images, weighted[:, :-1] / weights[:, None], weights


def probabilities(labels: torch.Tensor, num_classes: int) -> torch.Tensor:
    """int64 (N,) classes, or float (N, C) probabilities already -> float32 (N, C)."""
    return labels.float() if labels.is_floating_point() else F.one_hot(labels, num_classes).float()
