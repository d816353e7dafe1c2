"""The procedural source domain of the tiny model: captioned pictures made from nothing but fonts and chance.

Glyphs come from the fonts that matplotlib ships (DejaVu, STIX and Computer Modern: free licences), shapes from a few
lines of geometry; the other half is in `source_scenes`. No image of any target dataset is involved. Note that the
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

from . import source_scenes
from .source_colours import COLOURS, SIZE, colour, uniform

ATLAS_SIZE = 64  # pixels, the side of the mask from which a glyph is warped
FONTS = """DejaVuSans DejaVuSans-Bold DejaVuSans-BoldOblique DejaVuSans-Oblique DejaVuSansMono
DejaVuSansMono-Bold DejaVuSansMono-Oblique DejaVuSerif DejaVuSerif-Bold DejaVuSerif-Italic
STIXGeneral STIXGeneralBol STIXGeneralItalic STIXGeneralBolIta cmb10 cmr10 cmss10 cmti10 cmtt10""".split()
OTHERS = 0.5  # how many of the pictures show no glyph
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


def _warp(masks: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A random pen: rotation, shear, stretch, shift and a smooth elastic field. (n, 64, 64) -> (n, 1, 32, 32)."""
    n = len(masks)
    angle = uniform(n, -0.25, 0.25, generator)
    shear = uniform(n, -0.35, 0.35, generator)
    height = uniform(n, 0.75, 1.25, generator)  # of the picture, as sampling scale: below 1 enlarges
    width = height * uniform(n, 0.75, 1.35, generator)
    shift = torch.randn(n, 2, generator=generator) * 0.06
    cos, sin = angle.cos(), angle.sin()
    across = torch.stack([cos * width, (shear * cos - sin) * height, shift[:, 0]], 1)
    down = torch.stack([sin * width, (shear * sin + cos) * height, shift[:, 1]], 1)
    theta = torch.stack([across, down], 1)
    grid = F.affine_grid(theta, (n, 1, SIZE, SIZE), align_corners=False)
    amplitude = uniform(n, 0.0, 0.13, generator).view(n, 1, 1, 1)
    elastic = torch.randn(n, 2, 4, 4, generator=generator) * amplitude
    elastic = F.interpolate(elastic, size=SIZE, mode="bicubic", align_corners=True)
    warped = F.grid_sample(masks.unsqueeze(1), grid + elastic.permute(0, 2, 3, 1), align_corners=False)
    # Blur, then threshold at a random level: thinner or thicker strokes from the same glyph.
    blurred = F.avg_pool2d(F.avg_pool2d(warped, 3, 1, 1), 3, 1, 1)
    level = uniform(n, 0.25, 0.5, generator).view(n, 1, 1, 1)
    return torch.sigmoid((blurred - level) * 12)


def _soften(pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Through a coarse grid and back, as a low-resolution scan would: (n, c, 32, 32) -> same shape."""
    side = int(torch.randint(9, 18, (1,), generator=generator))
    coarse = F.interpolate(pictures, size=side, mode="bilinear", antialias=True)
    return F.interpolate(coarse, size=SIZE, mode="bilinear")


def distort(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Pictures as the real world might hand them over: turned, bent, thicker or thinner, coarse and noisy.

    For an encoder that is to see what a picture shows and not how. uint8 (n, 3, 32, 32) -> same.
    """
    n, pictures = len(images), images.float() / 255

    def some(share: float) -> torch.Tensor:
        return (torch.rand(n, generator=generator) < share).view(n, 1, 1, 1)

    angle, shear = uniform(n, -0.15, 0.15, generator), uniform(n, -0.15, 0.15, generator)
    height, width = uniform(n, 0.85, 1.15, generator), uniform(n, 0.85, 1.15, generator)
    shift = torch.randn(n, 2, generator=generator) * 0.05
    cos, sin = angle.cos(), angle.sin()
    across = torch.stack([cos * width, (shear * cos - sin) * height, shift[:, 0]], 1)
    down = torch.stack([sin * width, (shear * sin + cos) * height, shift[:, 1]], 1)
    grid = F.affine_grid(torch.stack([across, down], 1), (n, 1, SIZE, SIZE), align_corners=False)
    elastic = torch.randn(n, 2, 4, 4, generator=generator) * uniform(n, 0.0, 0.1, generator).view(n, 1, 1, 1)
    elastic = F.interpolate(elastic, size=SIZE, mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    bent = F.grid_sample(pictures, grid + elastic, align_corners=False, padding_mode="border")
    pictures = torch.where(some(0.5), bent, pictures)
    pictures = torch.where(some(0.1), F.max_pool2d(pictures, 3, 1, 1), pictures)  # thicker where it is bright,
    pictures = torch.where(some(0.1), -F.max_pool2d(-pictures, 3, 1, 1), pictures)  # or thinner
    pictures = torch.where(some(0.5), _soften(pictures, generator), pictures)
    pictures += torch.randn(pictures.shape, generator=generator) * uniform(n, 0.0, 0.15, generator).view(n, 1, 1, 1)
    return (pictures.clamp(0, 1) * 255).round().to(torch.uint8)


def draw(n: int, generator: torch.Generator, with_digits: bool = True) -> tuple[torch.Tensor, list[str]]:
    """Draws ``n`` captioned pictures of the source domain.

    Half of them hold one glyph or shape ("soft white digit 7 on black"), two thirds of these in black and white:
    with every colour at once the model learns style but not *which* glyph. The others are of `source_scenes`.

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
    drawn = torch.stack([masks[name][v] for name, v in zip(names, variants)])
    shapes = _warp(drawn.to(generator.device), generator)

    pairs = [("white", "black"), ("black", "white")] + [(f, b) for f in COLOURS for b in COLOURS if f != b]
    coloured = len(pairs) - 2
    pair = choose(pairs, [0.47, 0.20] + [0.33 / coloured] * coloured)
    foreground, background = (colour(list(side), generator) for side in zip(*pair))
    pictures = shapes * foreground + (1 - shapes) * background

    soft = torch.rand(n, generator=generator) < 0.5
    pictures = torch.where(soft.view(n, 1, 1, 1), _soften(pictures, generator), pictures)
    captions = [
        f"{'soft ' if s else ''}{fore} {name} on {back}" for s, (fore, back), name in zip(soft.tolist(), pair, names)
    ]
    other = torch.rand(n, generator=generator) < OTHERS
    shares = torch.tensor(list(source_scenes.FAMILIES.values()))
    kind = torch.multinomial(shares, n, replacement=True, generator=generator)
    for k, family in enumerate(source_scenes.FAMILIES):
        rows = (other & (kind == k)).nonzero().flatten()
        if not len(rows):
            continue
        drawn, told = family(len(rows), generator)
        drawn = torch.where(soft[rows].view(-1, 1, 1, 1), _soften(drawn, generator), drawn)
        pictures[rows] = drawn
        for i, caption in zip(rows.tolist(), told):
            captions[i] = caption
    pictures += torch.randn(pictures.shape, generator=generator) * 0.01
    return (pictures.clamp(0, 1) * 255).round().to(torch.uint8), captions
