"""Test sets that differ from the training images: corruptions of them, and the same classes from another dataset."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image

from ..config.messages import printable, shown, unknown_name
from ..machine.seeds import derived
from .images import ImageData, Split, resize

SEVERITIES = (1, 2, 3, 4, 5)
Corruption = Callable[[torch.Tensor, int, torch.Generator], torch.Tensor]

# How strong each corruption is at severities 1 to 5. All but the last row: the CIFAR-10-C constants of Hendrycks and
# Dietterich 2019 (github.com/hendrycks/robustness, ImageNet-C/create_c/make_cifar_c.py), made for 32 pixels.
STRENGTHS: dict[str, tuple[float, ...]] = {
    "gaussian_noise": (0.04, 0.06, 0.08, 0.09, 0.10),  # standard deviation, of values 0..1
    "shot_noise": (500, 250, 100, 75, 50),  # photons of a white pixel
    "impulse_noise": (0.01, 0.02, 0.03, 0.05, 0.07),  # share of the values
    "gaussian_blur": (0.4, 0.6, 0.7, 0.8, 1.0),  # standard deviation in pixels, of 32
    "brightness": (0.05, 0.1, 0.15, 0.2, 0.3),  # added to the largest channel, of values 0..1
    "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),  # of the distance to the mean, what is left
    "pixelate": (0.95, 0.9, 0.85, 0.75, 0.65),  # of the side, what is left
    "jpeg": (80, 65, 58, 50, 40),  # quality
    "occlusion": (0.2, 0.3, 0.4, 0.5, 0.6),  # side of the square, of the image's; our own
}
DESIGNED_FOR = 32  # pixels
GREY = 127
SOME = 5  # names in an error


def _strength(name: str, severity: int) -> float:
    if severity not in SEVERITIES:
        raise ValueError(f"severity is {shown(severity)}; it must be a whole number from 1 to {SEVERITIES[-1]}.")
    return STRENGTHS[name][int(severity) - 1]


def _as_images(values: torch.Tensor) -> torch.Tensor:
    """float 0..1 and beyond -> uint8, rounded (theirs are cut off to whole numbers, half a grey level darker)."""
    return (values.clamp(0, 1) * 255).round().to(torch.uint8)


def gaussian_noise(images: torch.Tensor, severity: int, generator: torch.Generator) -> torch.Tensor:
    """Normal noise on every value."""
    noise = torch.randn(images.shape, generator=generator)
    return _as_images(images / 255 + _strength("gaussian_noise", severity) * noise)


def shot_noise(images: torch.Tensor, severity: int, generator: torch.Generator) -> torch.Tensor:
    """As if light were counted photon by photon: Poisson."""
    photons = _strength("shot_noise", severity)
    return _as_images(torch.poisson(images / 255 * photons, generator) / photons)


def impulse_noise(images: torch.Tensor, severity: int, generator: torch.Generator) -> torch.Tensor:
    """Some values, whichever channel's, become 0 or 255, as often the one as the other."""
    share, drawn = _strength("impulse_noise", severity), torch.rand(images.shape, generator=generator)
    return images.masked_fill(drawn < share, 255).masked_fill(drawn < share / 2, 0)


def gaussian_blur(images: torch.Tensor, severity: int, generator: torch.Generator) -> torch.Tensor:
    """A blur, cut off at four standard deviations as theirs. Two differences: outside the image its mirror picture is
    taken, not its border; and an image of more than 32 pixels is blurred more, in proportion."""
    from torchvision.transforms.v2 import functional  # takes a second, and most runs shift nothing

    height, width = images.shape[-2:]
    sigma = _strength("gaussian_blur", severity) * max(1.0, min(height, width) / DESIGNED_FOR)
    reach = min(int(4 * sigma + 0.5), min(height, width) - 1)  # a mirror picture is no larger
    return functional.gaussian_blur(images, [2 * reach + 1] * 2, [sigma, sigma])


def brightness(images: torch.Tensor, severity: int, generator: torch.Generator) -> torch.Tensor:
    """More of HSV's value, the largest channel: the three channels grow in proportion, and black becomes grey."""
    images = images / 255
    value = images.amax(1, keepdim=True)
    brighter = (value + _strength("brightness", severity)).clamp(max=1)
    return _as_images(torch.where(value > 0, images * brighter / value.clamp(min=1 / 255), brighter))


def contrast(images: torch.Tensor, severity: int, generator: torch.Generator) -> torch.Tensor:
    """Nearer to the image's mean of each channel."""
    images = images / 255
    mean = images.mean((2, 3), keepdim=True)
    return _as_images(mean + _strength("contrast", severity) * (images - mean))


def pixelate(images: torch.Tensor, severity: int, generator: torch.Generator) -> torch.Tensor:
    """Made smaller and larger again, by Pillow's boxes as theirs."""
    share = _strength("pixelate", severity)

    def pixelated(picture: Image.Image) -> Image.Image:
        small = picture.resize([int(side * share) for side in picture.size], Image.Resampling.BOX)
        return small.resize(picture.size, Image.Resampling.BOX)

    return _by_pillow(images, pixelated)


def jpeg(images: torch.Tensor, severity: int, generator: torch.Generator) -> torch.Tensor:
    """Compressed and unpacked, by Pillow as theirs."""
    quality = int(_strength("jpeg", severity))

    def compressed(picture: Image.Image) -> Image.Image:
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=quality)
        return Image.open(file)

    return _by_pillow(images, compressed)


def _by_pillow(images: torch.Tensor, change: Callable[[Image.Image], Image.Image]) -> torch.Tensor:
    """Each image, uint8 (3, H, W), as Pillow's picture through ``change`` and back."""
    found = torch.empty_like(images)
    for row, image in enumerate(images):
        changed = change(Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy())))
        found[row] = torch.from_numpy(np.array(changed)).permute(2, 0, 1)
    return found


def occlusion(images: torch.Tensor, severity: int, generator: torch.Generator) -> torch.Tensor:
    """A grey square, wholly inside, at a random place: the cutout of DeVries and Taylor 2017 as a test, our own."""
    height, width = images.shape[-2:]
    side = max(1, round(_strength("occlusion", severity) * min(height, width)))
    images = images.clone()
    for image in images:
        down, across = torch.rand(2, generator=generator).tolist()  # shares: a larger square lies about where it was
        top, left = int(down * (height - side + 1)), int(across * (width - side + 1))
        image[:, top : top + side, left : left + side] = GREY
    return images


#: The corruptions by name: (images uint8 (N, 3, H, W), severity 1..5, random numbers on the CPU) -> uint8 (N, 3, H, W).
#: They raise ValueError for another severity.
CORRUPTIONS: dict[str, Corruption] = {
    "gaussian_noise": gaussian_noise,
    "shot_noise": shot_noise,
    "impulse_noise": impulse_noise,
    "gaussian_blur": gaussian_blur,
    "brightness": brightness,
    "contrast": contrast,
    "pixelate": pixelate,
    "jpeg": jpeg,
    "occlusion": occlusion,
}


def corrupted(split: Split, name: str, severity: int, seed: int) -> Split:
    """``split`` with each image corrupted by ``name``, one of `CORRUPTIONS`; labels stay.

    Image i's random numbers depend on ``seed``, ``name`` and i alone: they are the same in a part that begins alike,
    and at each severity, which so differ by their strength. Raises ValueError for an unknown name or a severity that
    is not 1, 2, 3, 4 or 5.
    """
    if name not in CORRUPTIONS:
        raise unknown_name("corruption", name, CORRUPTIONS)
    _strength(name, severity)  # also where there is no image
    images, generator = torch.empty_like(split.images), torch.Generator()
    for row in range(len(split)):
        generator.manual_seed(derived(seed, f"corruption {name}", row))
        images[row] = CORRUPTIONS[name](split.images[row : row + 1], severity, generator)[0]
    return Split(images, split.labels)


def same_classes(data: ImageData, other: ImageData) -> Split:
    """The test images of ``other``, a dataset of the same classes, in ``data``'s size and with its labels.

    Classes are matched by name, whatever their order; by number where neither dataset has names of its own ("0" or
    "class 0" and so on). Raises ValueError if the classes are not the same; says which are missing and which are more.
    """
    return matched(data, other.name, other.class_names, other.test)


def matched(data: ImageData, name: str, class_names: Sequence[str], split: Split, all_of_them: bool = True) -> Split:
    """``split``, of a dataset called ``name`` with these classes, in ``data``'s size and with its labels.

    ``all_of_them``: False where ``split`` may lack some of the classes. Otherwise as `same_classes`.
    """
    theirs, ours = class_names, data.class_names
    if _are_numbers(theirs) and _are_numbers(ours) and len(theirs) == len(ours):
        theirs = ours
    lacking, more = ([n for n in a if n not in set(b)] for a, b in ((ours, theirs), (theirs, ours)))
    if more or (lacking and all_of_them):
        found = [f"{what} {listed(names)}" for what, names in (("lacks", lacking), ("has besides", more)) if names]
        raise ValueError(
            f"The classes of {printable(shown(name))} are not those of {printable(shown(data.name))}: it "
            f"{' and '.join(found)}; give a dataset with the same class names, or two without names of their own."
        )
    number = torch.tensor([ours.index(name) for name in theirs])
    return Split(resize(split.images, data.image_size), number[split.labels])


def _are_numbers(names: Sequence[str]) -> bool:
    """Whether the names only count the classes, as those of a file without names, and of digits, do."""
    return any(list(names) == [f"{before}{i}" for i in range(len(names))] for before in ("", "class "))


def listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SOME} more" if len(names) > SOME else ""
    return ", ".join(repr(printable(name)) for name in names[:SOME]) + more
