"""The part of the tiny model's source domain that is no glyph: textures, things with light on them, cells, fundi.

Every picture is geometry, noise and chance. What they have of photographs is their statistics: power spectra that
fall with the frequency, edges where one thing hides another, shading, texture at many scales. Dead leaves and
spectra as training data: Baradad et al., *Learning to See by Looking at Noise* (arXiv 2106.05963).

Each function of `FAMILIES` draws ``n`` pictures, float32 (n, 3, 32, 32), some values a little outside 0..1, and their
captions, of six words at most.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from .source_colours import COLOURS, SIZE, colour, uniform

NUMBERS = ("one", "two", "three", "four")
Drawn = tuple[torch.Tensor, list[str]]


def _pick(options: tuple[str, ...], n: int, generator: torch.Generator) -> list[str]:
    return [options[i] for i in torch.randint(len(options), (n,), generator=generator).tolist()]


def _pairs(n: int, generator: torch.Generator) -> tuple[list[str], list[str]]:
    """Two different colours' names for each of ``n`` pictures."""
    names = list(COLOURS)
    first = torch.randint(len(names), (n,), generator=generator)
    second = (first + torch.randint(1, len(names), (n,), generator=generator)) % len(names)
    return [names[i] for i in first.tolist()], [names[i] for i in second.tolist()]


def _grid() -> tuple[torch.Tensor, torch.Tensor]:
    """(y, x) of the pixels, -1..1, each (32, 32)."""
    side = torch.linspace(-1, 1, SIZE)
    return torch.meshgrid(side, side, indexing="ij")


def noise_field(n: int, low: float, high: float, generator: torch.Generator) -> torch.Tensor:
    """Noise whose power falls as 1 / frequency^(2 a), ``a`` uniform in low..high: (n, 1, 32, 32), mean 0, std 1."""
    across, down = torch.fft.rfftfreq(SIZE), torch.fft.fftfreq(SIZE)
    frequency = torch.hypot(down[:, None], across[None, :]).clamp(min=1 / SIZE)
    a = uniform(n, low, high, generator).view(n, 1, 1)
    spectrum = torch.fft.rfft2(torch.randn(n, SIZE, SIZE, generator=generator)) / frequency**a
    field = torch.fft.irfft2(spectrum, s=(SIZE, SIZE))
    field = field - field.mean((1, 2), keepdim=True)
    return (field / field.std((1, 2), keepdim=True).clamp(min=1e-6)).unsqueeze(1)


def roughen(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Half of the pictures with grain on them, grey or coloured, fine or coarse: float (n, 3, 32, 32) in -1..1 -> same.

    For a VAE, whose code is to hold for pictures unlike the source's.
    """
    n = len(images)

    def share() -> torch.Tensor:
        return _column(torch.rand(n, generator=generator))

    colours = torch.cat([noise_field(n, 0.3, 1.7, generator) for _ in range(3)], 1)
    grain = 1.5 * share() * colours.mean(1, keepdim=True) + (1 - 0.8 * share()) * colours
    return (images + (share() < 0.5) * 0.6 * share() * grain).clamp(-1, 1)


def _edge(signed: torch.Tensor, softness: float | torch.Tensor = 0.06) -> torch.Tensor:
    """A mask, 1 where ``signed`` is negative (inside), with an edge of about a pixel."""
    return torch.sigmoid(-signed / softness)


def _column(values: torch.Tensor) -> torch.Tensor:
    return values.view(-1, 1, 1, 1)


def _oval(size: torch.Tensor, low: float, generator: torch.Generator) -> torch.Tensor:
    """Two radii each: ``size`` (n,), and ``low`` to 1 of it: (n, 2)."""
    return torch.stack([size, size * uniform(len(size), low, 1.0, generator)], 1)


def _blob(n: int, generator: torch.Generator, centre: torch.Tensor, radius: torch.Tensor, bent: float) -> torch.Tensor:
    """Signed distance, roughly, to ellipses with bent outlines: centres (n, 2), radii (n, 2) -> (n, 1, 32, 32)."""
    y, x = _grid()
    turn = uniform(n, 0, math.pi, generator)
    cos, sin = _column(turn.cos()), _column(turn.sin())
    dx, dy = x - _column(centre[:, 0]), y - _column(centre[:, 1])
    u, v = (cos * dx + sin * dy) / _column(radius[:, 0]), (-sin * dx + cos * dy) / _column(radius[:, 1])
    r = torch.hypot(u, v)
    if bent:
        angle = torch.atan2(v, u)
        for k in (2, 3, 5):
            phase = _column(uniform(n, 0, 2 * math.pi, generator))
            r = r + _column(uniform(n, 0, bent, generator)) / k * torch.cos(k * angle + phase)
    return (r - 1) * _column(radius.min(1).values)


def _box(n: int, generator: torch.Generator, centre: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """Signed distance, roughly, to turned rectangles of half sides ``radius``: -> (n, 1, 32, 32)."""
    y, x = _grid()
    turn = uniform(n, -0.6, 0.6, generator)
    cos, sin = _column(turn.cos()), _column(turn.sin())
    dx, dy = x - _column(centre[:, 0]), y - _column(centre[:, 1])
    u, v = (cos * dx + sin * dy).abs() - _column(radius[:, 0]), (-sin * dx + cos * dy).abs() - _column(radius[:, 1])
    return torch.maximum(u, v)


def _light(n: int, generator: torch.Generator) -> torch.Tensor:
    """A slope of light over the picture, from a random side: (n, 1, 32, 32), -1..1."""
    y, x = _grid()
    angle = uniform(n, 0, 2 * math.pi, generator)
    return (_column(angle.cos()) * x + _column(angle.sin()) * y) / math.sqrt(2)


def _ground(names: list[str], generator: torch.Generator) -> torch.Tensor:
    """A background of one colour with some light and some texture: (n, 3, 32, 32)."""
    n = len(names)
    texture = noise_field(n, 0.4, 2.0, generator) * _column(uniform(n, 0.0, 0.09, generator))
    slope = _light(n, generator) * _column(uniform(n, 0.0, 0.25, generator))
    return colour(names, generator) + texture + slope


# --- textures ---


def clouds(n: int, generator: torch.Generator) -> Drawn:
    """Two colours mixed by a field of noise, from fine grain to broad clouds."""
    first, second = _pairs(n, generator)
    share = torch.sigmoid(noise_field(n, 0.6, 2.4, generator) * _column(uniform(n, 0.7, 2.5, generator)))
    grain = noise_field(n, 0.0, 1.0, generator) * _column(uniform(n, 0.0, 0.06, generator))
    pictures = share * colour(first, generator) + (1 - share) * colour(second, generator) + grain
    return pictures, [f"{a} and {b} clouds" for a, b in zip(first, second)]


def gradients(n: int, generator: torch.Generator) -> Drawn:
    """From one colour to another, along a line or from the middle outwards."""
    y, x = _grid()
    first, second = _pairs(n, generator)
    line = 0.5 + 0.6 * _light(n, generator)
    centre = torch.rand(n, 2, generator=generator) * 1.2 - 0.6
    out = torch.hypot(x - _column(centre[:, 0]), y - _column(centre[:, 1]))
    rings = out / _column(uniform(n, 0.8, 2.0, generator))
    radial = torch.rand(n, generator=generator) < 0.5
    share = torch.where(_column(radial), rings, line).clamp(0, 1)
    grain = noise_field(n, 0.0, 2.0, generator) * _column(uniform(n, 0.0, 0.05, generator))
    pictures = (1 - share) * colour(first, generator) + share * colour(second, generator) + grain
    return pictures, [f"{a} {'glow in' if r else 'to'} {b}" for a, b, r in zip(first, second, radial.tolist())]


def stripes(n: int, generator: torch.Generator) -> Drawn:
    """Waves and checks of two colours, soft or hard, bent by a field of noise."""
    y, x = _grid()
    first, second = _pairs(n, generator)
    bend = noise_field(n, 1.5, 2.5, generator) * _column(uniform(n, 0.0, 0.5, generator))
    angle, many = uniform(n, 0, math.pi, generator), uniform(n, math.log(3), math.log(22), generator).exp()
    cos, sin = _column(angle.cos()), _column(angle.sin())
    along = torch.sin((cos * x + sin * y + bend) * _column(many) + _column(uniform(n, 0, 6.28, generator)))
    across = torch.sin((-sin * x + cos * y + bend) * _column(many) + _column(uniform(n, 0, 6.28, generator)))
    checked = torch.rand(n, generator=generator) < 0.4
    wave = torch.where(_column(checked), along * across, along)
    share = torch.sigmoid(wave * _column(uniform(n, 1.0, 12.0, generator)))
    pictures = share * colour(first, generator) + (1 - share) * _ground(second, generator)
    return pictures, [f"{a} {'checks' if c else 'stripes'} on {b}" for a, b, c in zip(first, second, checked.tolist())]


def leaves(n: int, generator: torch.Generator, things: int = 40) -> Drawn:
    """Dead leaves: discs and boxes, dropped on one another, many small ones, each with its own light and texture."""
    tint = torch.rand(n, 3, generator=generator)
    loyal = _column(uniform(n, 0.2, 0.8, generator))
    texture = [noise_field(n, 0.3, 2.0, generator) * 0.12 for _ in range(4)]
    pictures = tint.view(n, 3, 1, 1) + texture[0]
    for k in range(things):
        centre = torch.rand(n, 2, generator=generator) * 2.2 - 1.1
        radius = 0.1 / torch.rand(n, 2, generator=generator).clamp(min=0.13)
        shape = _box(n, generator, centre, radius) if k % 3 == 0 else _blob(n, generator, centre, radius, 0.0)
        own = torch.rand(n, 3, generator=generator)
        fill = loyal * tint.view(n, 3, 1, 1) + (1 - loyal) * own.view(n, 3, 1, 1)
        fill = fill + texture[k % 4] * _column(uniform(n, 0.0, 1.5, generator))
        fill = fill + _light(n, generator) * _column(uniform(n, 0.0, 0.3, generator))
        pictures = torch.lerp(pictures, fill, _edge(shape, 0.03))
    return pictures, ["leaves"] * n


def speckle(n: int, generator: torch.Generator) -> Drawn:
    """Layers of grain in grey, as sound draws tissue, with or without a dark hole in it and its shadow."""
    y, x = _grid()
    level = 0.45 + 0.15 * noise_field(n, 1.5, 2.5, generator)
    bands = torch.sin(y * _column(uniform(n, 3, 14, generator)) + 1.5 * noise_field(n, 2.0, 2.5, generator))
    level = level + bands * _column(uniform(n, 0.0, 0.15, generator))
    grain = 1 + noise_field(n, 0.0, 1.0, generator) * _column(uniform(n, 0.1, 0.45, generator))
    centre = torch.randn(n, 2, generator=generator) * 0.2
    radius = torch.stack([uniform(n, 0.2, 0.75, generator), uniform(n, 0.15, 0.5, generator)], 1)
    hole = _edge(_blob(n, generator, centre, radius, 0.5), _column(uniform(n, 0.03, 0.15, generator)))
    below = _edge((x - _column(centre[:, 0])).abs() - _column(radius[:, 0]) * 0.7, 0.1) * (y > _column(centre[:, 1]))
    holed = torch.rand(n, generator=generator) < 0.5
    dark = hole * _column(uniform(n, 0.5, 0.95, generator)) + below * _column(uniform(n, -0.35, 0.35, generator))
    level = torch.where(_column(holed), level * (1 - dark), level)
    names = [f"grey speckle{' with dark hole' if h else ''}" for h in holed.tolist()]
    return (level * grain).expand(n, 3, SIZE, SIZE), names


# --- things ---


def _shaded(mask: torch.Tensor, signed: torch.Tensor, base: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A thing's surface: lighter towards the light, darker at the rim, some texture. (n, 3, 32, 32)."""
    n = len(mask)
    depth = (-signed / _column((-signed).flatten(1).amax(1).clamp(min=0.05))).clamp(0, 1)
    lit = _light(n, generator) * _column(uniform(n, 0.0, 0.8, generator))
    rim = (depth.sqrt() - 0.7) * _column(uniform(n, 0.0, 0.5, generator))
    texture = noise_field(n, 0.2, 2.0, generator) * _column(uniform(n, 0.0, 0.1, generator))
    return base + lit + rim + texture


def things(n: int, generator: torch.Generator) -> Drawn:
    """One to four balls or boxes of one colour, with light on them, some with a shadow."""
    first, second = _pairs(n, generator)
    count = torch.randint(1, 5, (n,), generator=generator)
    boxes = torch.rand(n, generator=generator) < 0.5
    pictures, base = _ground(second, generator), colour(first, generator)
    for k in range(4):
        spread = _column((count > 1) * 0.45 + 0.12).flatten()
        centre = torch.randn(n, 2, generator=generator) * spread[:, None]
        size = uniform(n, 0.25, 0.8, generator) / count.clamp(min=1).float().sqrt()
        radius = _oval(size, 0.6, generator)
        blob, box = _blob(n, generator, centre, radius, 0.0), _box(n, generator, centre, radius)
        signed = torch.where(_column(boxes), box, blob)
        here = _column((k < count).float())
        fallen = torch.roll(signed, (2, 2), (2, 3))
        shadow = _edge(fallen, 0.12) * here * _column(uniform(n, 0.0, 0.5, generator))
        pictures = pictures * (1 - shadow)
        mask = _edge(signed) * here
        pictures = torch.lerp(pictures, _shaded(mask, signed, base, generator), mask)
    kinds = zip(count.tolist(), first, boxes.tolist(), second)
    return pictures, [f"{NUMBERS[c - 1]} {a} {'box' if b else 'ball'} on {g}" for c, a, b, g in kinds]


def scenes(n: int, generator: torch.Generator) -> Drawn:
    """A sky, a ground, and a creature or a machine of a few overlapping parts before them."""
    y, _ = _grid()
    ground, sky = _pairs(n, generator)
    first, _ = _pairs(n, generator)
    horizon = _column(uniform(n, -1.2, 0.9, generator))
    tilt = _light(n, generator) * _column(uniform(n, 0.0, 0.3, generator))
    above = _edge(y - horizon + tilt + 0.1 * noise_field(n, 1.0, 2.0, generator), 0.05)
    pictures = torch.lerp(_ground(ground, generator), _ground(sky, generator), above)
    machine = torch.rand(n, generator=generator) < 0.5
    middle = torch.randn(n, 2, generator=generator) * 0.15
    size = uniform(n, 0.3, 0.75, generator)
    base = colour(first, generator)
    for part in range(5):
        away = torch.randn(n, 2, generator=generator) * size[:, None] * (0.5 if part else 0.0)
        shrink = uniform(n, 0.2, 0.6, generator) if part else uniform(n, 0.7, 1.0, generator)
        radius = (size * shrink)[:, None] * torch.stack(
            [uniform(n, 0.7, 1.2, generator), uniform(n, 0.35, 0.8, generator)], 1
        )
        blob, box = (_blob(n, generator, middle + away, radius, 0.3), _box(n, generator, middle + away, radius))
        signed = torch.where(_column(machine), box, blob)
        own = base + _column(torch.randn(n, generator=generator) * 0.12)
        odd = _column(torch.rand(n, generator=generator) < 0.2)
        own = torch.where(odd, torch.rand(n, 3, 1, 1, generator=generator), own)
        mask = _edge(signed, 0.05)
        pictures = torch.lerp(pictures, _shaded(mask, signed, own, generator), mask)
    kinds = zip(first, machine.tolist(), ground, sky)
    return pictures, [f"{a} {'machine' if m else 'creature'} on {g} under {s}" for a, m, g, s in kinds]


def cells(n: int, generator: torch.Generator) -> Drawn:
    """A stained cell among pale discs: a bent outline, a dark nucleus of one to four lobes, maybe granules."""
    y, x = _grid()
    dark, tissue = _pairs(n, generator)
    pictures = 0.5 * _ground(tissue, generator) + 0.5  # paler than the colour's name
    pale = colour(tissue, generator)
    for _ in range(5):  # the others: discs with a lighter middle
        centre = torch.rand(n, 2, generator=generator) * 2.6 - 1.3
        radius = uniform(n, 0.25, 0.45, generator)[:, None].expand(n, 2)
        signed = _blob(n, generator, centre, radius, 0.15)
        middle = 0.12 * _edge(signed + 0.5 * _column(radius[:, 0]), 0.1)
        here = _column((torch.rand(n, generator=generator) < 0.6).float())
        pictures = torch.lerp(pictures, 0.75 * pale + 0.2 + middle, _edge(signed, 0.05) * here * 0.8)
    centre = torch.randn(n, 2, generator=generator) * 0.12
    size = uniform(n, 0.35, 0.85, generator)
    body = _blob(n, generator, centre, _oval(size, 0.75, generator), 0.3)
    stain = colour(dark, generator)
    granules = noise_field(n, 0.0, 0.8, generator).clamp(min=0) * _column(uniform(n, 0.0, 0.35, generator))
    plasma = torch.lerp(pictures.mean((2, 3), keepdim=True), stain, _column(uniform(n, 0.15, 0.7, generator)))
    plasma = plasma + granules * (stain - plasma) + 0.04 * noise_field(n, 0.3, 1.5, generator)
    pictures = torch.lerp(pictures, plasma.expand_as(pictures), _edge(body, 0.05))
    lobes = torch.randint(1, 5, (n,), generator=generator)
    nucleus = torch.full((n, 1, SIZE, SIZE), 9.0)
    start = uniform(n, 0, 2 * math.pi, generator)
    for k in range(4):
        angle = start + k * 1.3
        away = (lobes > 1) * 0.42 * size
        at = centre + torch.stack([angle.cos() * away, angle.sin() * away], 1)
        radius = size * uniform(n, 0.45, 0.8, generator) / lobes.float() ** 0.45
        lobe = _blob(n, generator, at, _oval(radius, 0.7, generator), 0.3)
        nucleus = torch.where(_column(k < lobes), torch.minimum(nucleus, lobe), nucleus)
    inner = stain * _column(uniform(n, 0.45, 0.95, generator)) + 0.06 * noise_field(n, 0.2, 1.5, generator)
    pictures = torch.lerp(pictures, inner, _edge(nucleus, 0.05))
    kinds = zip(dark, lobes.tolist(), tissue)
    return pictures, [f"{a} cell {NUMBERS[k - 1]} lobes on {b}" for a, k, b in kinds]


def _curves(n: int, generator: torch.Generator, start: torch.Tensor, length: float) -> torch.Tensor:
    """Distance to one bent line a picture, which begins at ``start`` (n, 2): (n, 1, 32, 32)."""
    y, x = _grid()
    angle = uniform(n, 0, 2 * math.pi, generator)
    turning = uniform(n, -2.5, 2.5, generator)
    reach = uniform(n, 0.5, 1.0, generator) * length
    nearest = torch.full((n, 1, SIZE, SIZE), 9.0)
    at, steps = start.clone(), 14
    for _ in range(steps):
        nearest = torch.minimum(nearest, torch.hypot(x - _column(at[:, 0]), y - _column(at[:, 1])))
        at = at + (reach / steps)[:, None] * torch.stack([angle.cos(), angle.sin()], 1)
        angle = angle + turning / steps
    return nearest


def strokes(n: int, generator: torch.Generator) -> Drawn:
    """One to four strokes of a pen, bent."""
    first, second = _pairs(n, generator)
    count = torch.randint(1, 5, (n,), generator=generator)
    nearest = torch.full((n, 1, SIZE, SIZE), 9.0)
    for k in range(4):
        curve = _curves(n, generator, torch.rand(n, 2, generator=generator) * 1.4 - 0.7, 2.0)
        nearest = torch.where(_column(k < count), torch.minimum(nearest, curve), nearest)
    mask = _edge(nearest - _column(uniform(n, 0.04, 0.16, generator)), 0.03)
    pictures = torch.lerp(_ground(second, generator), colour(first, generator).expand(n, 3, SIZE, SIZE), mask)
    return pictures, [f"{NUMBERS[c - 1]} {a} strokes on {b}" for c, a, b in zip(count.tolist(), first, second)]


def fundi(n: int, generator: torch.Generator) -> Drawn:
    """A round field of one colour in the dark, brighter in one place, with veins that start there, maybe spots."""
    y, x = _grid()
    names = _pick(tuple(c for c in COLOURS if c != "black"), n, generator)
    field = _edge(torch.hypot(x, y) - _column(uniform(n, 0.8, 1.3, generator)), 0.04)
    base = colour(names, generator) * _column(uniform(n, 0.6, 1.1, generator))
    shade = 1 + _light(n, generator) * _column(uniform(n, 0.0, 0.5, generator))
    shade = shade + 0.06 * noise_field(n, 1.0, 2.5, generator)
    shade = shade - 0.35 * torch.hypot(x, y) ** 2 * _column(uniform(n, 0.0, 1.0, generator))
    pictures = base * shade
    centre = torch.stack([uniform(n, -0.6, 0.6, generator), uniform(n, -0.25, 0.25, generator)], 1)
    for _ in range(5):
        vein = _edge(_curves(n, generator, centre, 1.6) - _column(uniform(n, 0.0, 0.05, generator)), 0.03)
        pictures = pictures * (1 - vein * _column(uniform(n, 0.0, 0.45, generator)))
    bright = _edge(_blob(n, generator, centre, uniform(n, 0.12, 0.25, generator)[:, None].expand(n, 2), 0.1), 0.06)
    pictures = pictures + bright * _column(uniform(n, 0.1, 0.5, generator))
    spotted = torch.rand(n, generator=generator) < 0.4
    spots = (noise_field(n, 0.4, 1.2, generator) - 1.9).clamp(min=0) * _column(uniform(n, -0.5, 0.8, generator))
    pictures = pictures + torch.where(_column(spotted), spots, torch.zeros(()))
    words = ("spots", "veins")
    return pictures * field, [f"{a} disc with {words[not s]} on black" for a, s in zip(names, spotted.tolist())]


FAMILIES: dict[Callable[[int, torch.Generator], Drawn], float] = {  # how often each is drawn, of all that is no glyph
    leaves: 2.0,
    scenes: 2.5,
    things: 1.5,
    cells: 1.5,
    fundi: 1.0,
    speckle: 0.7,
    clouds: 1.0,
    gradients: 0.7,
    stripes: 1.0,
    strokes: 0.8,
}


def captions() -> list[str]:
    """Some captions of these families, which between them hold every word."""
    generator = torch.Generator().manual_seed(0)
    return sorted({caption for family in FAMILIES for caption in family(64, generator)[1]})
