"""Augmented conditioning (Chen et al., "Augmented Conditioning Is Enough"): a class, and an altered real image of it.

An unCLIP model draws from two things that it is told: a context, which names the class, and the embedding of an image.
Here that is a random training image of the class, or two of them mixed, in pixels or as embeddings, and of the result
some numbers may be dropped (section 3.2). Nothing is trained but, if the class is told by one, a Class-Encoder.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torchvision.transforms.v2 import RandomResizedCrop

from ..config.messages import unknown_name
from ..config.settings import FIELDS, Settings, View
from ..data import Split
from ..diffusion.conditions import Condition, ContextTable
from ..diffusion.generator import LatentGenerator
from ..diffusion.samplers import skipped
from ..diffusion.unclip import ImageEncoder, load_image_encoder
from ..diffusion.weights import NAMES, UNCLIP_BESIDE
from ..machine.seeds import derived, image_noise
from ..store.run import Step
from ..work.workspace import Source, Workspace, never_made

VERSION = 1  # raised whenever the same settings would draw otherwise
SAMPLING = ("augmented", "sampling", "precision", "seed")  # what drawing an image reads
TEXT = "text"  # the class alone: what every conditioning is compared with
STARTS = "img2img"  # the class, and a real image to start from


# --- what happens to an image, or to two ---

Mix = Callable[[torch.Tensor, torch.Tensor, float, torch.Generator], torch.Tensor]
Change = Callable[[torch.Tensor, float, torch.Generator], torch.Tensor]


def mixup(one: torch.Tensor, other: torch.Tensor, share: float, random: torch.Generator) -> torch.Tensor:
    """``share`` of the first and 1 - ``share`` of the second (Zhang et al. 2018); pixels or embeddings."""
    return share * one + (1 - share) * other


def cutmix(one: torch.Tensor, other: torch.Tensor, share: float, random: torch.Generator) -> torch.Tensor:
    """The first with a box of the second, at a random place (Yun et al. 2019). Pixels: (3, H, W) -> same.

    The box has 1 - ``share`` of the area, less where it would leave the image.
    """
    height, width = one.shape[-2:]
    half = math.sqrt(1 - share) / 2
    y, x = (torch.rand(2, generator=random) * torch.tensor([height, width])).long().tolist()
    top, bottom = max(0, y - int(half * height)), min(height, y + int(half * height))
    left, right = max(0, x - int(half * width)), min(width, x + int(half * width))
    mixed = one.clone()
    mixed[:, top:bottom, left:right] = other[:, top:bottom, left:right]
    return mixed


def cutmix_embeddings(one: torch.Tensor, other: torch.Tensor, share: float, random: torch.Generator) -> torch.Tensor:
    """The first embedding, whose leading numbers, 1 - ``share`` of them, are the second's: (d,) -> (d,)."""
    cut = round((1 - share) * len(one))
    return torch.cat([other[:cut], one[cut:]])


def always_the_first(one: torch.Tensor, other: torch.Tensor, share: float, random: torch.Generator) -> torch.Tensor:
    """What the released code's CutMix of embeddings does: it cuts along the batch, so the second never takes part."""
    return one


def drop_and_rescale(embedding: torch.Tensor, p: float, random: torch.Generator) -> torch.Tensor:
    """Each number is zero with probability ``p``; the rest grow by 1 / (1 - p), as in a Dropout layer (section 3.2)."""
    kept = torch.rand(embedding.shape, generator=random) >= p
    return embedding * kept / (1 - p) if p < 1 else torch.zeros_like(embedding)


def drop(told: torch.Tensor, p: float, random: torch.Generator) -> torch.Tensor:
    """The released code's: the numbers that tell the noise level may be dropped, too, and the rest stay as they are."""
    return told * (torch.rand(told.shape, generator=random) >= p)


def crop(image: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """torchvision's RandomResizedCrop with its defaults, drawn from ``random``: float (3, H, W) -> same.

    The released code does it before either mix of pixels, and before nothing else.
    """
    with torch.random.fork_rng(devices=[]):  # it draws from torch's own generator
        torch.manual_seed(int(torch.randint(2**31, (1,), generator=random)))
        return RandomResizedCrop(image.shape[-2:])(image)


@dataclasses.dataclass(frozen=True)
class Conditioning:
    """What is done to a real image of the class before the model is told of it; None: nothing.

    ``pixels``, ``embedding``: how two images are mixed. ``on_embedding`` changes the embedding, ``on_told`` all that
    the model is told, [embedding, noise level]. ``cropped``: both images are, before their pixels are mixed.
    """

    pixels: Mix | None = None
    embedding: Mix | None = None
    on_embedding: Change | None = None
    on_told: Change | None = None
    cropped: bool = False


def _ten(plain: Mapping[str, Conditioning], dropout: Mapping[str, Change]) -> dict[str, Conditioning]:
    """Each of the ``plain`` ones alone and with dropout."""
    found = {}
    for name, conditioning in plain.items():
        found[name] = conditioning
        found[f"{name} + dropout"] = dataclasses.replace(conditioning, **dropout)
    return found


#: The ten of the paper (section 3.2), by name.
PAPER = _ten(
    {
        "random image": Conditioning(),
        "mixup": Conditioning(pixels=mixup),
        "embedding mixup": Conditioning(embedding=mixup),
        "cutmix": Conditioning(pixels=cutmix),
        "embedding cutmix": Conditioning(embedding=cutmix_embeddings),
    },
    {"on_embedding": drop_and_rescale},
)
#: The same as the released code does them.
RELEASED = _ten(
    {
        "random image": Conditioning(),
        "mixup": Conditioning(pixels=mixup, cropped=True),
        "embedding mixup": Conditioning(embedding=mixup),
        "cutmix": Conditioning(pixels=cutmix, cropped=True),
        "embedding cutmix": Conditioning(embedding=always_the_first),
    },
    {"on_told": drop},
)
CONDITIONINGS = {"paper": PAPER, "released": RELEASED}


def random_of(index: int, seed: int) -> torch.Generator:
    """What all chance about image ``index`` of a set comes from, but for its noise."""
    return torch.Generator().manual_seed(derived(seed, "augmented conditioning", index))


def random_row(labels: torch.Tensor, label: int, random: torch.Generator) -> int:
    """The row of a random image of class ``label``. Raises ValueError where ``labels``, int64 (N,), has none."""
    members = (labels == label).nonzero()[:, 0]
    if not len(members):
        raise ValueError(f"Class {label} has no real image to draw from.")
    return int(members[torch.randint(len(members), (1,), generator=random)])


@dataclasses.dataclass(frozen=True)
class AugmentedImages:
    """A `Conditioner`: tells each image of a set its class, and an altered real image of that class.

    ``classes``: tells the class. ``images`` uint8 (N, 3, h, w) with ``labels`` int64 (N,) are the real ones, and
    ``embeddings`` float (N, d), on the CPU, what ``encoder`` makes of them. ``dropout``: a probability, 0..1;
    ``noise_level``: 0..999, of the noise on the altered embedding.
    """

    classes: ContextTable = dataclasses.field(repr=False)
    encoder: ImageEncoder = dataclasses.field(repr=False)
    images: torch.Tensor = dataclasses.field(repr=False)
    labels: torch.Tensor = dataclasses.field(repr=False)
    embeddings: torch.Tensor = dataclasses.field(repr=False)
    how: Conditioning = PAPER["random image"]
    dropout: float = 0.4
    noise_level: int = 0

    def __call__(self, labels: torch.Tensor, indices: torch.Tensor, seed: int) -> Condition:
        random = [random_of(index, seed) for index in indices.tolist()]
        pairs = [self.pair(label, generator) for label, generator in zip(labels.tolist(), random)]
        embeddings = self.altered(pairs, random)
        noise = image_noise(seed, "noise on an embedding", indices.tolist(), embeddings.shape[1:])
        told = self.encoder.told(embeddings, self.noise_level, noise)
        if change := self.how.on_told:
            changed = [change(row, self.dropout, generator) for row, generator in zip(told.cpu(), random)]
            told = torch.stack(changed).to(told.device)
        return Condition(self.classes(labels, indices, seed).context, told)

    def unconditional(self) -> Condition:
        nothing = self.classes.unconditional().context
        return Condition(nothing, torch.zeros(1, 2 * self.encoder.width, device=nothing.device))

    def real_rows(self, labels: torch.Tensor, indices: torch.Tensor, seed: int) -> torch.Tensor:
        """As of `FromRealImages`: of both images where they are mixed, else of the first."""
        return self.pairs(labels, indices, seed)[:, : 2 if self.how.pixels or self.how.embedding else 1]

    def pairs(self, labels: torch.Tensor, indices: torch.Tensor, seed: int) -> torch.Tensor:
        """The rows of the two real images that are drawn for each image of a set, int64 (B, 2), mixed or not."""
        pairs = [self.pair(k, random_of(i, seed)) for k, i in zip(labels.tolist(), indices.tolist())]
        return torch.tensor(pairs, dtype=torch.int64).view(-1, 2)

    def pair(self, label: int, random: torch.Generator) -> tuple[int, int]:
        """The rows of two random images of a class, different ones if it has two. Raises ValueError if it has none."""
        first = random_row(self.labels, label, random)
        members = (self.labels == label).nonzero()[:, 0]
        others = members[members != first] if len(members) > 1 else members
        return first, int(others[torch.randint(len(others), (1,), generator=random)])

    def altered(self, pairs: list[tuple[int, int]], random: list[torch.Generator]) -> torch.Tensor:
        """The embeddings of B altered images: float32 (B, d), on the CPU."""
        how, embeddings = self.how, self.embeddings
        shares = [float(torch.rand((), generator=generator)) for generator in random]  # Beta(1, 1)
        if how.pixels:
            pictures = [self._mixed_pixels(*pair, share, g) for pair, share, g in zip(pairs, shares, random)]
            found = self.encoder.embeddings(torch.stack(pictures)).cpu()
        else:
            found = embeddings[[first for first, _ in pairs]]
        if how.embedding:
            mixed = [
                how.embedding(embeddings[i], embeddings[j], share, g) for (i, j), share, g in zip(pairs, shares, random)
            ]
            found = torch.stack(mixed)
        if how.on_embedding:
            found = torch.stack([how.on_embedding(row, self.dropout, g) for row, g in zip(found, random)])
        return found

    def mixed_pixels(self, labels: torch.Tensor, indices: torch.Tensor, seed: int) -> torch.Tensor:
        """The images themselves after a mix of pixels, for pictures: uint8 (B, 3, h, w). Others: the first image."""
        pictures = []
        for label, index in zip(labels.tolist(), indices.tolist()):
            random = random_of(index, seed)
            first, second = self.pair(label, random)
            share = float(torch.rand((), generator=random))
            mixed = self._mixed_pixels(first, second, share, random) if self.how.pixels else self.images[first]
            pictures.append(mixed)
        return torch.stack(pictures)

    def _mixed_pixels(self, first: int, second: int, share: float, random: torch.Generator) -> torch.Tensor:
        one, other = self.images[first].float(), self.images[second].float()
        if self.how.cropped:
            one, other = crop(one, random), crop(other, random)
        return self.how.pixels(one, other, share, random).round().clamp(0, 255).to(torch.uint8)


@dataclasses.dataclass(frozen=True)
class RealStarts:
    """A `Conditioner`: tells each image its class, and starts it from a noisy real image of that class (img2img).

    (DA-Fusion, Trabucco et al. 2023; Real-Fake, Yuan et al. 2023.) ``latents`` float (N, C, H, W) of the real images
    with ``labels`` int64 (N,); ``strength``: how much of the way is drawn anew, 0 (the image itself) to 1 (all of it).
    """

    classes: ContextTable = dataclasses.field(repr=False)
    latents: torch.Tensor = dataclasses.field(repr=False)
    labels: torch.Tensor = dataclasses.field(repr=False)
    strength: float = 0.75

    def __call__(self, labels: torch.Tensor, indices: torch.Tensor, seed: int) -> Condition:
        rows = self.real_rows(labels, indices, seed)[:, 0]
        context = self.classes(labels, indices, seed).context
        return Condition(context, start=self.latents[rows], strength=self.strength)

    def real_rows(self, labels: torch.Tensor, indices: torch.Tensor, seed: int) -> torch.Tensor:
        """As of `FromRealImages`."""
        rows = [random_row(self.labels, k, random_of(i, seed)) for k, i in zip(labels.tolist(), indices.tolist())]
        return torch.tensor(rows, dtype=torch.int64)[:, None]

    def unconditional(self) -> Condition:
        return self.classes.unconditional()


# --- the method on a run's data ---


def unclip_beside(s: Settings) -> str:
    """The unCLIP model of a run: as ``augmented_backbone`` says, or the one that goes with its backbone."""
    if s.augmented_backbone != "auto":
        return s.augmented_backbone
    own = Path(NAMES.get(s.backbone, s.backbone)).expanduser() / "image_encoder"
    if s.backbone == "sd2.1-unclip" or own.is_dir():
        return s.backbone  # it is one itself
    return UNCLIP_BESIDE.get(s.backbone, "sd2.1-unclip")


class AugmentedMethod:
    """Augmented conditioning on a run's training images, with an unCLIP backbone."""

    name = "augmented"

    def __init__(self, ws: Workspace):
        self.ws = ws

    @functools.cached_property
    def encoder(self) -> ImageEncoder:
        """The backbone's image encoder. Raises FileNotFoundError for a backbone that is no unCLIP."""
        return load_image_encoder(self.ws.backbone.source.folder, self.ws.backbone.device)

    @functools.cached_property
    def _of_training_images(self) -> torch.Tensor:
        return self.encoder.embeddings(self.ws.data.train.images).cpu()

    def embeddings(self, split: Split | None = None) -> torch.Tensor:
        """Of the real training images, or of others: float32 (N, d), on the CPU."""
        if split is None or split is self.ws.data.train:
            return self._of_training_images
        return self.encoder.embeddings(split.images).cpu()

    def classes(self, s: View) -> ContextTable:
        """What tells the model the class: a prompt, or the Class-Encoder of step 1, trained with this backbone."""
        ws = self.ws
        empty = ws.backbone.text_context([""])[0]
        if s.augmented_text == "prompt":
            prompts = [s.augmented_prompt.replace("{}", name) for name in ws.data.class_names]
            return ContextTable(ws.backbone.text_context(prompts), empty)
        encoder = self._class_encoder().class_encoder(ws.settings.transfer_epochs)
        return encoder.conditioner(s.unconditional, empty).table()

    def conditioner(
        self, conditioning: str | None = None, *, dropout: float | None = None, real: Split | None = None
    ) -> AugmentedImages | RealStarts | ContextTable:
        """What the images are told; None: the settings' values. ``conditioning`` "text": the class alone.

        ``real``: the images to draw from, where they are not the run's training images.
        Raises ValueError for an unknown conditioning.
        """
        s, real = self.ws.settings.view(*SAMPLING, "how"), real or self.ws.data.train
        name = self.named(conditioning)
        if name == TEXT:
            return self.classes(s)
        if name == STARTS:
            known = real is self.ws.data.train
            latents = self.ws.latents["train"].latents if known else self.ws.backbone.encode(real.images)
            return RealStarts(self.classes(s), latents, real.labels, s.augmented_strength)
        return AugmentedImages(
            self.classes(s),
            self.encoder,
            real.images,
            real.labels,
            self.embeddings(real),
            CONDITIONINGS[s.augmented_protocol][name],
            s.augmented_dropout if dropout is None else dropout,
            s.augmented_noise_level,
        )

    def named(self, conditioning: str | None) -> str:
        name = self.ws.settings.augmented_conditioning if conditioning is None else conditioning
        allowed = FIELDS["augmented_conditioning"].metadata["choices"]
        if name not in allowed:
            raise unknown_name("conditioning", name, allowed)
        return name

    def source(
        self, conditioning: str | None = None, guidance_scale: float | None = None, real: Split | None = None
    ) -> Source:
        """The generator, as tables, sets and exports take it; None: the settings' values.

        ``real``: the images to draw from, where they are not the run's training images. What is on record of a drawn
        image counts these.
        """
        ws, s, name = self.ws, self.ws.settings, self.named(conditioning)
        scale = s.augmented_guidance if guidance_scale is None else float(guidance_scale)
        strength = s.augmented_strength if name == STARTS else 1.0
        step = Step(
            "generator/augmented",
            make=never_made,
            topics=SAMPLING,
            needs=(self._class_encoder().transfer_step,) if s.augmented_text == "class_encoder" else (),
            roots=("model", "data"),
            inputs={
                "conditioning": name,
                "guidance_scale": scale,
                **({"drawn_from": real.fingerprint} if real else {}),
                **ws.drawing(),
            },
            version=VERSION,
        )
        point = {
            "num_inference_steps": s.augmented_steps,
            "guidance_scale": scale,
            "conditioning": name,
            "dropout": s.augmented_dropout if "dropout" in name else 0.0,
            "noise_level": s.augmented_noise_level,
            "strength": strength,
        }
        return Source(
            self.name,
            step,
            build=lambda: self._generator(name, scale, ws.run.fingerprint(step), real),
            point=lambda: point,
            passes=lambda images: ws.drawn(s.augmented_steps - skipped(strength, s.augmented_steps), scale, images),
            facts={"conditioning": name},
        )

    def generator(self, conditioning: str | None = None, guidance_scale: float | None = None) -> LatentGenerator:
        """Draws images of a class from altered real ones; arguments as `source`."""
        return self.source(conditioning, guidance_scale).build()

    def _class_encoder(self):
        from .class_encoder import ClassEncoderMethod  # here: it brings Optuna

        return ClassEncoderMethod(self.ws)

    def _generator(
        self, conditioning: str, guidance_scale: float, fingerprint: str, real: Split | None
    ) -> LatentGenerator:
        ws, s = self.ws, self.ws.settings.view(*SAMPLING, "how")
        conditioner = self.conditioner(conditioning, real=real)
        return ws.latent_generator(s, conditioner, s.augmented_steps, guidance_scale, fingerprint)
