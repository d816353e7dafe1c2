"""The procedural source domain of the tiny model: captioned pictures made from nothing but fonts and chance.

Glyphs come from the fonts that matplotlib ships (DejaVu, STIX and Computer Modern: free licences), shapes and
dead-leaves textures from a few lines of geometry. No image of any target dataset is involved. Note that the
digits 0..9 of those fonts *are* part of the domain unless ``with_digits=False``.
"""

from __future__ import annotations

import functools
import string
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

SIZE = 32  # pixels, the side of every source image
ATLAS_SIZE = 64  # pixels, the side of the mask from which a glyph is warped
FONTS = """DejaVuSans DejaVuSans-Bold DejaVuSans-BoldOblique DejaVuSans-Oblique DejaVuSansMono
DejaVuSansMono-Bold DejaVuSansMono-Oblique DejaVuSerif DejaVuSerif-Bold DejaVuSerif-Italic
STIXGeneral STIXGeneralBol STIXGeneralItalic STIXGeneralBolIta cmb10 cmr10 cmss10 cmti10 cmtt10""".split()
COLOURS = {
    "black": (12, 12, 12),
    "white": (243, 243, 243),
    "grey": (128, 128, 128),
    "red": (205, 45, 45),
    "green": (55, 150, 65),
    "blue": (50, 80, 190),
    "yellow": (230, 210, 70),
    "orange": (230, 135, 45),
    "purple": (130, 65, 160),
    "brown": (125, 85, 50),
    "pink": (235, 150, 180),
    "cyan": (80, 190, 210),
}
SHAPES = ("circle", "square", "triangle", "diamond", "ring", "cross", "bar")


def glyph_names(with_digits: bool = True) -> list[str]:
    """The things that can be drawn, as their captions call them: 'digit 7', 'letter g', 'capital g', 'star'."""
    digits = [f"digit {c}" for c in string.digits] if with_digits else []
    return (
        digits
        + [f"letter {c}" for c in string.ascii_lowercase]
        + [f"capital {c}" for c in string.ascii_lowercase]
        + list(SHAPES)
    )


def _glyph_mask(name: str, font: Path) -> np.ndarray:
    """One glyph, its bounding box stretched to a common height: float32 (64, 64) in 0..1."""
    kind, character = name.split()
    character = character.upper() if kind == "capital" else character
    image = Image.new("L", (200, 200))
    ImageDraw.Draw(image).text((50, 30), character, fill=255, font=ImageFont.truetype(str(font), 100))
    image = image.crop(image.getbbox())
    scale = 52 / max(image.size)
    image = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.BILINEAR)
    mask = Image.new("L", (ATLAS_SIZE, ATLAS_SIZE))
    mask.paste(image, ((ATLAS_SIZE - image.width) // 2, (ATLAS_SIZE - image.height) // 2))
    return np.asarray(mask, dtype=np.float32) / 255


def _shape_mask(name: str) -> np.ndarray:
    """One shape on the unit square: float32 (64, 64), 0 or 1."""
    y, x = np.mgrid[-1 : 1 : ATLAS_SIZE * 1j, -1 : 1 : ATLAS_SIZE * 1j]
    r = np.hypot(x, y)
    inside = {
        "circle": r < 0.75,
        "square": np.maximum(abs(x), abs(y)) < 0.65,
        "triangle": (y < 0.65) & (y > 2.2 * abs(x) - 0.75),
        "diamond": abs(x) + abs(y) < 0.8,
        "ring": (r < 0.8) & (r > 0.5),
        "cross": (np.minimum(abs(x), abs(y)) < 0.22) & (np.maximum(abs(x), abs(y)) < 0.8),
        "bar": (abs(x) < 0.25) & (abs(y) < 0.8),
    }[name]
    return inside.astype(np.float32)


@functools.cache
def atlas(with_digits: bool = True) -> dict[str, torch.Tensor]:
    """Every glyph in every font: name -> float32 (variants, 64, 64) masks in 0..1."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    masks = {}
    for name in glyph_names(with_digits):
        variants = [_shape_mask(name)] if name in SHAPES else [_glyph_mask(name, folder / f"{f}.ttf") for f in FONTS]
        masks[name] = torch.from_numpy(np.stack(variants))
    return masks


def _uniform(n: int, low: float, high: float, generator: torch.Generator) -> torch.Tensor:
    return torch.rand(n, generator=generator) * (high - low) + low


def _warp(masks: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A random pen: rotation, shear, stretch, shift and a smooth elastic field. (n, 64, 64) -> (n, 1, 32, 32)."""
    n = len(masks)
    angle = _uniform(n, -0.25, 0.25, generator)
    shear = _uniform(n, -0.35, 0.35, generator)
    height = _uniform(n, 0.75, 1.25, generator)  # of the picture, as sampling scale: below 1 enlarges
    width = height * _uniform(n, 0.75, 1.35, generator)
    shift = torch.randn(n, 2, generator=generator) * 0.06
    cos, sin = angle.cos(), angle.sin()
    across = torch.stack([cos * width, (shear * cos - sin) * height, shift[:, 0]], 1)
    down = torch.stack([sin * width, (shear * sin + cos) * height, shift[:, 1]], 1)
    theta = torch.stack([across, down], 1)
    grid = F.affine_grid(theta, (n, 1, SIZE, SIZE), align_corners=False)
    amplitude = _uniform(n, 0.0, 0.13, generator).view(n, 1, 1, 1)
    elastic = torch.randn(n, 2, 4, 4, generator=generator) * amplitude
    elastic = F.interpolate(elastic, size=SIZE, mode="bicubic", align_corners=True)
    warped = F.grid_sample(masks.unsqueeze(1), grid + elastic.permute(0, 2, 3, 1), align_corners=False)
    # Blur, then threshold at a random level: thinner or thicker strokes from the same glyph.
    blurred = F.avg_pool2d(F.avg_pool2d(warped, 3, 1, 1), 3, 1, 1)
    level = _uniform(n, 0.25, 0.5, generator).view(n, 1, 1, 1)
    return torch.sigmoid((blurred - level) * 12)


def _soften(pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Through a coarse grid and back, as a low-resolution scan would: (n, c, 32, 32) -> same shape."""
    side = int(torch.randint(9, 18, (1,), generator=generator))
    coarse = F.interpolate(pictures, size=side, mode="bilinear", antialias=True)
    return F.interpolate(coarse, size=SIZE, mode="bilinear")


def _leaves(n: int, generator: torch.Generator, discs: int = 40) -> torch.Tensor:
    """Dead leaves: discs of power-law radius dropped on one another. (n, 3, 32, 32) in 0..1."""
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    pictures = torch.rand(n, 3, 1, 1, generator=generator).expand(n, 3, SIZE, SIZE).clone()
    tint = torch.rand(n, 3, generator=generator)
    for _ in range(discs):
        centre = torch.rand(n, 2, generator=generator) * SIZE
        radius = 2 / torch.rand(n, generator=generator).clamp(min=0.15)
        colour = (0.5 * tint + 0.5 * torch.rand(n, 3, generator=generator)).view(n, 3, 1, 1)
        inside = (x - centre[:, 0, None, None]) ** 2 + (y - centre[:, 1, None, None]) ** 2 < radius[:, None, None] ** 2
        pictures = torch.where(inside.unsqueeze(1), colour, pictures)
    return pictures


def distort(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Pictures as the real world might hand them over: turned, bent, thicker or thinner, coarse and noisy.

    For an encoder that is to see what a picture shows and not how. uint8 (n, 3, 32, 32) -> same.
    """
    n, pictures = len(images), images.float() / 255

    def some(share: float) -> torch.Tensor:
        return (torch.rand(n, generator=generator) < share).view(n, 1, 1, 1)

    angle, shear = _uniform(n, -0.15, 0.15, generator), _uniform(n, -0.15, 0.15, generator)
    height, width = _uniform(n, 0.85, 1.15, generator), _uniform(n, 0.85, 1.15, generator)
    shift = torch.randn(n, 2, generator=generator) * 0.05
    cos, sin = angle.cos(), angle.sin()
    across = torch.stack([cos * width, (shear * cos - sin) * height, shift[:, 0]], 1)
    down = torch.stack([sin * width, (shear * sin + cos) * height, shift[:, 1]], 1)
    grid = F.affine_grid(torch.stack([across, down], 1), (n, 1, SIZE, SIZE), align_corners=False)
    elastic = torch.randn(n, 2, 4, 4, generator=generator) * _uniform(n, 0.0, 0.1, generator).view(n, 1, 1, 1)
    elastic = F.interpolate(elastic, size=SIZE, mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    bent = F.grid_sample(pictures, grid + elastic, align_corners=False, padding_mode="border")
    pictures = torch.where(some(0.5), bent, pictures)
    pictures = torch.where(some(0.1), F.max_pool2d(pictures, 3, 1, 1), pictures)  # thicker where it is bright,
    pictures = torch.where(some(0.1), -F.max_pool2d(-pictures, 3, 1, 1), pictures)  # or thinner
    pictures = torch.where(some(0.5), _soften(pictures, generator), pictures)
    pictures += torch.randn(pictures.shape, generator=generator) * _uniform(n, 0.0, 0.15, generator).view(n, 1, 1, 1)
    return (pictures.clamp(0, 1) * 255).round().to(torch.uint8)


def _colour(names: list[str], generator: torch.Generator) -> torch.Tensor:
    base = torch.tensor([COLOURS[name] for name in names], dtype=torch.float32) / 255
    return (base + torch.randn(base.shape, generator=generator) * 0.04).clamp(0, 1).view(-1, 3, 1, 1)


def draw(n: int, generator: torch.Generator, with_digits: bool = True) -> tuple[torch.Tensor, list[str]]:
    """Draws ``n`` captioned pictures of the source domain.

    Nine in ten hold one glyph or shape ("soft white digit 7 on black"), two thirds of them in black and white:
    with every colour and texture at once the model learns style but not *which* glyph. The rest are textures.

    Returns images, uint8 (n, 3, 32, 32), and their ``n`` captions.
    """

    def choose(options, probabilities=None):
        weights = torch.tensor(probabilities) if probabilities else torch.ones(len(options))
        return [options[i] for i in torch.multinomial(weights, n, replacement=True, generator=generator).tolist()]

    masks = atlas(with_digits)
    families = {}  # digits, letters, capitals: equally often; shapes more rarely
    for name in masks:
        families.setdefault(name.split()[0] if " " in name else "shape", []).append(name)
    share = {"digit": 3.0, "letter": 3.0, "capital": 3.0, "shape": 1.0}
    names = choose(list(masks), [share[f] / len(members) for f, members in families.items() for _ in members])
    variants = [int(v * len(masks[name])) for v, name in zip(torch.rand(n, generator=generator).tolist(), names)]
    shapes = _warp(torch.stack([masks[name][v] for name, v in zip(names, variants)]), generator)

    pairs = [("white", "black"), ("black", "white")] + [(f, b) for f in COLOURS for b in COLOURS if f != b]
    coloured = len(pairs) - 2
    pair = choose(pairs, [0.47, 0.20] + [0.33 / coloured] * coloured)
    foreground, background = (_colour(list(side), generator) for side in zip(*pair))
    pictures = shapes * foreground + (1 - shapes) * background

    soft = torch.rand(n, generator=generator) < 0.5
    pictures = torch.where(soft.view(n, 1, 1, 1), _soften(pictures, generator), pictures)
    captions = [
        f"{'soft ' if s else ''}{fore} {name} on {back}" for s, (fore, back), name in zip(soft.tolist(), pair, names)
    ]
    textured = torch.rand(n, generator=generator) < 0.1
    for i in textured.nonzero().flatten().tolist():
        captions[i] = "soft leaves" if soft[i] else "leaves"
    if textured.any():
        leaves = _leaves(int(textured.sum()), generator)
        leaves = torch.where(soft[textured].view(-1, 1, 1, 1), _soften(leaves, generator), leaves)
        pictures[textured] = leaves
    pictures += torch.randn(pictures.shape, generator=generator) * 0.01
    return (pictures.clamp(0, 1) * 255).round().to(torch.uint8), captions
