"""Diffusion Inversion (Zhou et al. 2023, arXiv 2305.15316): a vector for every training image, and variants of these.

Stage 1 looks for the context c* with which the frozen UNet best predicts the noise on one image (section 3.1):
c* = argmin_c E || eps - eps_theta(z_t, t, c) ||^2. Stage 2 draws new images from vectors that are disturbed by noise,
c + lambda n, and mixed with another one, (1 - alpha) c_i + alpha c_j (section 3.2).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..config.settings import Settings, View
from ..data import Split, resize
from ..diffusion.conditions import Condition
from ..diffusion.generate import generate_latents
from ..diffusion.generator import LatentGenerator, Rounds
from ..diffusion.training import FIXED_NOISES, Latents, fixed_loss
from ..machine.passes import Pass
from ..machine.ranks import ALONE
from ..machine.seeds import derived, image_noise
from ..store import files
from ..store.run import Step
from ..work import cost
from ..work.fitting import HISTORY, checkpoint_name, fit_and_keep
from ..work.workspace import Source, Workspace, never_made

VECTORS = "vectors.safetensors"
VERSION = 1  # raised whenever the same settings would give other vectors or variants
SAMPLING = ("variants", "sampling", "precision", "seed")  # what drawing an image reads
PARTNERS = 5  # of each vector in the released code
RELEASED_GUIDANCE = (2.0, 3.0, 4.0)  # appendix B.2.2: 3 scales x 3 checkpoints x 5 partners are 45 variants


# --- stage 1: the vectors ---


class VectorTable(nn.Module):
    """A vector for each of n images: a `Conditioner` of these images by their ``indices``, that trains.

    ``start`` float (tokens, width) or (n, tokens, width). ``sparse``: only the rows of a batch have gradients.
    """

    def __init__(self, start: torch.Tensor, count: int, sparse: bool = False):
        super().__init__()
        self.shape = start.shape[-2:]
        flat = start.expand(count, *self.shape).reshape(count, -1)
        self.table = nn.Embedding.from_pretrained(flat.clone(), freeze=False, sparse=sparse)

    def forward(self, labels: torch.Tensor, indices: torch.Tensor, seed: int = 0) -> Condition:
        return Condition(self.table(indices.to(self.table.weight.device)).view(-1, *self.shape))

    def unconditional(self) -> Condition:
        """The mean of all vectors."""
        return Condition(self.table.weight.mean(0).view(1, *self.shape))


def uniform_start(count: int, tokens: int, width: int, seed: int) -> torch.Tensor:
    """What ``nn.Linear(count, tokens * width).weight`` begins with: uniform within 1 / sqrt(count) (released code).

    float (count, tokens, width).
    """
    generator, bound = torch.Generator().manual_seed(seed), 1 / math.sqrt(count)
    return torch.empty(count, tokens, width).uniform_(-bound, bound, generator=generator)


def groups_of(labels: torch.Tensor, kind: str, largest: int | None) -> list[torch.Tensor]:
    """The rows, int64, of the vectors that train together: all, or as many as evenly as ``largest`` allows.

    ``kind`` "mixed" keeps the order of the training set; with "class" all of a group are of one class.
    """
    whole = [torch.arange(len(labels))] if kind == "mixed" else [(labels == c).nonzero()[:, 0] for c in labels.unique()]
    return [part for rows in whole for part in rows.chunk(math.ceil(len(rows) / (largest or len(rows))))]


def even_batch(images: int, largest: int) -> int:
    """Images of a batch, so that equal ones of at most ``largest`` make a round of all the ``images``.

    Larger than a round, a batch would hold an image twice, and its vector would move once in two visits.
    """
    return math.ceil(images / math.ceil(images / largest))


@dataclasses.dataclass(frozen=True)
class Vectors:
    """The trained vectors: float32 (N, tokens, width), and of each one: int64 (N,) its ``rows`` in the training set,
    its ``labels``, its ``groups`` (which it was trained in) and ``images``, a hash of its image."""

    vectors: torch.Tensor
    rows: torch.Tensor
    labels: torch.Tensor
    groups: torch.Tensor
    images: torch.Tensor

    def save(self, path: Path) -> None:
        files.save_tensors(path, {f.name: getattr(self, f.name) for f in dataclasses.fields(self)})

    @classmethod
    def load(cls, path: Path, train: Split) -> Vectors:
        """As `save` left them. Raises ValueError unless each row of ``train`` has the vector of just that image."""
        tensors = files.load_tensors(path)
        names = {f.name for f in dataclasses.fields(cls)}
        if set(tensors) != names or len({len(tensor) for tensor in tensors.values()}) != 1:
            raise ValueError(f"{path} holds no vectors of Diffusion Inversion: train them again.")
        found = cls(**tensors)
        missing = sorted(set(range(len(train))) - set(found.rows.tolist()))
        if missing:
            raise ValueError(
                f"{path} has no vector for {len(missing)} of the {len(train)} training images: {missing[:5]} .."
            )
        if len(found.rows) != len(train):
            raise ValueError(f"{path} has {len(found.rows)} vectors for {len(train)} training images.")
        foreign = found.rows[found.images != image_hashes(train)[found.rows]].tolist()
        if foreign:
            raise ValueError(
                f"{path} has vectors of other images: of training images {foreign[:5]} and {len(foreign)} in all."
            )
        return found


def image_hashes(split: Split) -> torch.Tensor:
    """The first 64 bits of the SHA-256 of each image's pixels and label: int64 (N,)."""
    pixels, labels = split.images.contiguous().numpy(), split.labels.tolist()
    digests = [
        hashlib.sha256(image.tobytes() + f"{label}".encode()).digest()[:8] for image, label in zip(pixels, labels)
    ]
    return torch.from_numpy(np.frombuffer(b"".join(digests), "<i8").copy())


# --- stage 2: variants ---


@dataclasses.dataclass(frozen=True)
class InvertedImages:
    """A `Conditioner`: tells each image of a set a disturbed vector of a training image of its class.

    ``vectors`` float (N, tokens, width), ``labels`` and ``groups`` int64 (N,); ``noise``: the standard deviation of
    what is added to each number of a vector; ``interpolation``: the partner's share, 0..1; ``partners``: see
    `candidates`. ``unconditional_contexts`` float (K, tokens, width) and ``unconditional_of_vector`` int64 (N,): what
    guidance leads away from, and which of these for each vector.
    """

    vectors: torch.Tensor = dataclasses.field(repr=False)
    labels: torch.Tensor = dataclasses.field(repr=False)
    groups: torch.Tensor = dataclasses.field(repr=False)
    unconditional_contexts: torch.Tensor = dataclasses.field(repr=False)
    unconditional_of_vector: torch.Tensor = dataclasses.field(repr=False)
    num_classes: int
    noise: float = 0.1
    interpolation: float = 0.1
    partners: str = "class"

    def __call__(self, labels: torch.Tensor, indices: torch.Tensor, seed: int) -> Condition:
        rows = self.rows(labels, indices)
        context = self.vectors[rows]
        if self.interpolation:
            partners = self.real_rows(labels, indices, seed)[:, 1]
            context = (1 - self.interpolation) * context + self.interpolation * self.vectors[partners]
        if self.noise:
            noise = image_noise(seed, "noise on a vector", indices.tolist(), context.shape[1:])
            context = context + self.noise * noise.to(context.device)
        return Condition(context)

    def real_rows(self, labels: torch.Tensor, indices: torch.Tensor, seed: int) -> torch.Tensor:
        """As of `FromRealImages`: the vector's own image, and its partner's where vectors are mixed."""
        rows = self.rows(labels, indices)
        if not self.interpolation:
            return rows[:, None]
        partners = [self.partner(row, index, seed) for row, index in zip(rows.tolist(), indices.tolist())]
        return torch.stack([rows, torch.tensor(partners, dtype=torch.int64)], dim=1)

    def unconditional(self) -> Condition:
        return Condition(self.unconditional_contexts.mean(0, keepdim=True))

    def unconditional_of(self, labels: torch.Tensor, indices: torch.Tensor) -> Condition:
        return Condition(self.unconditional_contexts[self.unconditional_of_vector[self.rows(labels, indices)]])

    def rows(self, labels: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """The vector of each image: int64 (B,). Raises ValueError for a class that has none.

        As many images of a class as it has vectors take each of them once, whether their indices follow each other or
        are ``num_classes`` apart (`balanced_labels`).
        """
        found = torch.empty_like(labels)
        for label in labels.unique().tolist():
            members = self._members(label)
            at, n = labels == label, len(members)
            i = indices[at]
            # Without the second summand, steps of num_classes would miss vectors where both numbers share a divisor.
            found[at] = members[(i + i // math.lcm(n, self.num_classes)) % n]
        return found

    def _members(self, label: int) -> torch.Tensor:
        members = (self.labels == label).nonzero()[:, 0]
        if not len(members):
            raise ValueError(f"Class {label} has no vector: no training image of it was inverted.")
        return members

    def candidates(self, row: int) -> torch.Tensor:
        """The vectors that one may be mixed with: int64 (n,), itself where there is no other.

        With ``partners`` "class" all others of its class. "released": the others of its class in its group, or, where
        these are fewer than 5, all others in the group, of whatever class.
        """
        same, itself = self.labels == self.labels[row], torch.arange(len(self.labels)) == row
        if self.partners == "released":
            group = self.groups == self.groups[row]
            same = same & group if int((same & group & ~itself).sum()) >= PARTNERS else group
        others = (same & ~itself).nonzero()[:, 0]
        return others if len(others) else torch.tensor([row])

    def partner(self, row: int, index: int, seed: int) -> int:
        """The vector that image ``index`` of a set is mixed with, if its own is ``row``."""
        candidates = self.candidates(row)
        return int(candidates[derived(seed, "partner of a vector", index) % len(candidates)])


def unconditional_contexts(
    found: Vectors, kind: str, empty_prompt: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The contexts that guidance leads away from, float (K, tokens, width), and which is each vector's, int64 (N,).

    ``kind`` "mean": of all vectors (section 3.2); "group_mean" (released code) or "class_mean"; "empty_prompt": the
    text encoder's, passed as ``empty_prompt``, cut to the vectors' tokens.
    """
    n = len(found.rows)
    if kind == "empty_prompt":
        return empty_prompt[None, : found.vectors.shape[1]].to(found.vectors), torch.zeros(n, dtype=torch.int64)
    parts = {"mean": torch.zeros(n, dtype=torch.int64), "group_mean": found.groups, "class_mean": found.labels}[kind]
    _, which = parts.unique(return_inverse=True)
    means = [found.vectors[which == part].mean(0) for part in range(int(which.max()) + 1)]
    return torch.stack(means), which


# --- the method on a run's data ---


class InversionMethod:
    """Diffusion Inversion of a run's training images. What it needs is made when it is asked for."""

    name = "inversion"

    def __init__(self, ws: Workspace):
        self.ws = ws

    @functools.cached_property
    def groups(self) -> list[torch.Tensor]:
        """The rows of the training set whose vectors train together."""
        s = self.ws.settings
        return groups_of(self.ws.data.train.labels, s.inversion_groups, s.inversion_group_images)

    def group_step(self, group: int) -> Step:
        """The training of one group of vectors."""
        s, needs = self.ws.settings, [self.ws.latents_step]
        if s.inversion_start == "class_context":
            needs.append(self._class_encoder().transfer_step)
        images = len(self.groups[group])
        title = f"The vectors of {images} images, {s.inversion_visits} visits each"
        return Step(
            f"inversion/group_{group:04d}",
            lambda folder, view: self._make_group(folder, view, group),
            topics=("inversion", "seed", "precision"),
            needs=tuple(needs),
            roots=("data", "model"),
            inputs={"group": group},
            work=lambda: {
                Pass("context gradient", even_batch(images, s.inversion_batch_size)): images * s.inversion_visits
            },
            title=title if len(self.groups) == 1 else "",
            version=VERSION,
        )

    def vectors_step(self, checkpoint: int) -> Step:
        """All vectors as they were at a checkpoint, from 1, in one file."""

        def make(folder: Path, s: View) -> dict[str, Any]:
            train, rows = self.ws.data.train, torch.cat(self.groups)
            parts = [self._group_file(number, checkpoint) for number in range(len(self.groups))]
            groups = torch.cat([torch.full((len(part),), number) for number, part in enumerate(self.groups)])
            vectors, order = torch.cat(parts), rows.argsort()
            images = image_hashes(train)
            Vectors(vectors[order], rows[order], train.labels, groups[order], images).save(folder / VECTORS)
            return {"visits": self.visits(checkpoint), "checkpoint": checkpoint, "groups": len(self.groups)}

        steps = tuple(self.group_step(number) for number in range(len(self.groups)))
        return Step(
            "inversion/vectors", make, needs=steps, roots=("data",), inputs={"checkpoint": checkpoint}, version=VERSION
        )

    def visits(self, checkpoint: int) -> int:
        """How often each image was visited up to a checkpoint."""
        s = self.ws.settings
        return round(s.inversion_visits * checkpoint / s.inversion_checkpoints)

    # --- doing it ---

    def invert(self) -> list[dict[str, float]]:
        """Learns all vectors. The mean losses of each checkpoint over the groups.

        "train": of its part of the training; "own": on fixed noise, with each image's own vector; "other": with the
        next image's; "mean": with the mean of all vectors.
        """
        steps = [self.group_step(number) for number in range(len(self.groups))]
        todo = [step for step in steps if self.ws.run.peek(step) is None]
        if len(steps) > 1 and todo:
            about = cost.readable(sum(cost.seconds(self.ws.backbone, step.work()) for step in todo))
            print(f"Vectors: {len(todo)} groups, {self.ws.settings.inversion_visits} visits (about {about} here).")
        weights = [len(rows) for rows in self.groups]
        found = [files.load_json(self.ws.run.file(step, HISTORY)) for step in steps]
        return [
            {"visits": self.visits(number + 1)}
            | {
                name: sum(w * history[number][name] for w, history in zip(weights, found)) / sum(weights)
                for name in found[0][number]
            }
            for number in range(len(found[0]))
        ]

    def vectors(self, checkpoint: int | None = None) -> Vectors:
        """The vectors at a checkpoint from 1 (None: the last one), learned first if they are not there.

        Raises ValueError for a checkpoint that there is not.
        """
        last = self.ws.settings.inversion_checkpoints
        checkpoint = last if checkpoint is None else checkpoint
        if not 1 <= checkpoint <= last:
            raise ValueError(f"checkpoint must be from 1 to {last} (inversion_checkpoints), not {checkpoint}.")
        if any(self.ws.run.peek(self.group_step(number)) is None for number in range(len(self.groups))):
            self.invert()
        return Vectors.load(self.ws.run.file(self.vectors_step(checkpoint), VECTORS), self.ws.data.train)

    def conditioner(self, checkpoint: int | None = None, s: Settings | View | None = None) -> InvertedImages:
        """What the variants are told, with the settings' noise, partners and unconditional context."""
        s, found, backbone = s or self.ws.settings, self.vectors(checkpoint), self.ws.backbone
        empty = backbone.text_context([""])[0].cpu() if s.inversion_unconditional == "empty_prompt" else None
        contexts, which = unconditional_contexts(found, s.inversion_unconditional, empty)
        unit = float(found.vectors.std()) if s.inversion_noise_unit == "spread" else 1.0
        return InvertedImages(
            found.vectors.to(backbone.device),
            found.labels,
            found.groups,
            contexts.to(backbone.device),
            which,
            self.ws.data.num_classes,
            noise=unit * s.inversion_noise,
            interpolation=s.inversion_interpolation,
            partners=s.inversion_partners,
        )

    def generator(self, checkpoint: int | None = None, guidance_scale: float | None = None) -> LatentGenerator:
        """Draws variants of the training images; with the vectors of a checkpoint, and the settings' UGS or another."""
        source = self.source(checkpoint, guidance_scale)
        return source.build()

    def draw(self, contexts: torch.Tensor, noise: torch.Tensor, guidance_scale: float | None = None) -> torch.Tensor:
        """Images of any contexts, for pictures: float (B, tokens, width) -> uint8 (B, 3, H, W), on the CPU.

        ``noise`` float (B, C, H, W) of latents, or (1, C, H, W): all start from the same. Guidance leads away from the
        mean of all vectors.
        """
        ws, s, vectors = self.ws, self.ws.settings, self.vectors().vectors
        ws.backbone.put_unet("pretrained", lambda: None)
        latents = generate_latents(
            ws.backbone,
            Condition(contexts.to(ws.backbone.device)),
            Condition(vectors.mean(0, keepdim=True).to(ws.backbone.device)),
            noise.expand(len(contexts), -1, -1, -1),
            num_inference_steps=s.inversion_steps,
            guidance_scale=s.inversion_guidance if guidance_scale is None else guidance_scale,
            sampler=s.sampler,
        )
        return resize(ws.backbone.decode(latents), ws.data.image_size, s.antialias).cpu()

    def source(self, checkpoint: int | None = None, guidance_scale: float | None = None) -> Source:
        """The generator, as tables, sets and exports take it; arguments as `generator`."""
        ws, s = self.ws, self.ws.settings
        checkpoint = s.inversion_checkpoints if checkpoint is None else checkpoint
        scale = s.inversion_guidance if guidance_scale is None else float(guidance_scale)
        step = Step(
            "generator/inversion",
            make=never_made,
            topics=SAMPLING,
            needs=(self.vectors_step(checkpoint),),
            roots=("model",),
            inputs={"guidance_scale": scale, **ws.drawing()},
            version=VERSION,
        )
        point = {
            "num_inference_steps": s.inversion_steps,
            "guidance_scale": scale,
            "visits": self.visits(checkpoint),
            "noise": s.inversion_noise,
            "interpolation": s.inversion_interpolation,
        }
        return Source(
            self.name,
            step,
            build=lambda: self._generator(checkpoint, scale, ws.run.fingerprint(step)),
            point=lambda: point,
            passes=lambda images: ws.drawn(s.inversion_steps, scale, images),
            facts={"inverted_images": len(ws.data.train)},
        )

    def released_variants(self) -> Source:
        """The released code's 45 variants of each vector: 3 checkpoints x UGS 2, 3, 4 x 5 random partners.

        A block of a set, one image a vector, has one checkpoint and scale; the next block has the next of them.
        """
        ws, s = self.ws, self.ws.settings
        kinds = [(k, scale) for k in range(1, s.inversion_checkpoints + 1) for scale in RELEASED_GUIDANCE]
        sources = [self.source(k, scale) for k, scale in kinds]
        period = len(ws.data.train)
        step = Step(
            "generator/inversion_released_variants",
            make=never_made,
            topics=SAMPLING,
            needs=tuple(self.vectors_step(k) for k in range(1, s.inversion_checkpoints + 1)),
            roots=("model",),
            inputs={"guidance_scales": list(RELEASED_GUIDANCE), **ws.drawing()},
            version=VERSION,
        )
        return Source(
            "inversion, released variants",
            step,
            build=lambda: Rounds([source.build() for source in sources], period, ws.run.fingerprint(step)),
            point=lambda: {
                **sources[0].point(),
                "guidance_scale": list(RELEASED_GUIDANCE),
                "visits": "every checkpoint",
            },
            passes=lambda images: ws.drawn(s.inversion_steps, RELEASED_GUIDANCE[0], images),
            facts={"inverted_images": period},
        )

    # --- making them ---

    def _class_encoder(self):
        from .class_encoder import ClassEncoderMethod  # here: it brings Optuna

        return ClassEncoderMethod(self.ws)

    def _start(self, s: View, rows: torch.Tensor, group: int) -> torch.Tensor:
        backbone = self.ws.backbone
        tokens = s.inversion_tokens or backbone.tokens
        if s.inversion_start == "uniform":
            return uniform_start(len(rows), tokens, backbone.width, derived(s.seed, "vectors", group))
        if s.inversion_start == "empty_prompt":
            empty = backbone.text_context([""])[0].float()
            if tokens > len(empty):
                raise ValueError(
                    f"inversion_tokens={tokens} are more than the {len(empty)} of the empty prompt: give fewer, or "
                    "inversion_start='uniform'."
                )
            return empty[:tokens]
        encoder = self._class_encoder().class_encoder(self.ws.settings.transfer_epochs)
        with torch.no_grad():
            return encoder.contexts()[self.ws.data.train.labels[rows]][:, :tokens]

    def _make_group(self, folder: Path, s: View, group: int) -> dict[str, Any]:
        ws, rows = self.ws, self.groups[group]
        device, whole = ws.backbone.device, ws.latents["train"]
        train = Latents(whole.latents[rows.to(device)], whole.labels[rows.to(device)])
        table = VectorTable(
            self._start(s, rows, group).to(device), len(rows), sparse=s.inversion_optimizer == "row-adam"
        )
        ws.backbone.put_unet("pretrained", lambda: None)
        fit_and_keep(
            folder,
            ws,
            {"vectors": table.table.weight},
            table,
            train,
            epochs=s.inversion_checkpoints,
            batch_size=even_batch(len(rows), s.inversion_batch_size),
            images_per_epoch=math.ceil(len(rows) * s.inversion_visits / s.inversion_checkpoints),
            learning_rate=s.inversion_learning_rate,
            weight_decay=s.inversion_weight_decay,
            clip_norm=math.inf,
            optimizer=s.inversion_optimizer,
            schedule=s.inversion_schedule,
            seed=derived(s.seed, "inversion", group),
            probe=lambda: self._losses(table, train),
            gradient_checkpointing=s.gradient_checkpointing,
            ranks=ALONE,
            title="vectors",
        )
        return {"images": len(rows), "tokens": table.shape[0]}

    @torch.no_grad()
    def _losses(self, table: VectorTable, train: Latents) -> dict[str, float]:
        """On fixed noise: with each image's own vector, the next one's, and the mean of all."""
        n, backbone = len(train), self.ws.backbone
        generator, everywhere = torch.Generator().manual_seed(0), torch.arange(n)
        told = {
            "own": lambda rows: table(train.labels[rows], everywhere[rows]),
            "other": lambda rows: table(train.labels[rows], (everywhere[rows] + 1) % n),
            "mean": lambda rows: table.unconditional().expand(len(everywhere[rows])),
        }
        totals = dict.fromkeys(told, 0.0)
        for _ in range(FIXED_NOISES):
            t = torch.randint(0, len(backbone.alphas_cumprod), (n,), generator=generator)
            noise = torch.randn(train.latents.shape, generator=generator)
            for kind, condition in told.items():
                totals[kind] += fixed_loss(backbone, train.latents, condition, t, noise) / FIXED_NOISES
        return totals

    def _group_file(self, group: int, checkpoint: int) -> torch.Tensor:
        tensors = files.load_tensors(self.ws.run.file(self.group_step(group), checkpoint_name(checkpoint)))
        vectors = tensors["vectors"].float()
        return vectors.view(len(vectors), -1, self.ws.backbone.width)

    def _generator(self, checkpoint: int, guidance_scale: float, fingerprint: str) -> LatentGenerator:
        ws, s = self.ws, self.ws.settings.view(*SAMPLING, "how")
        return ws.latent_generator(s, self.conditioner(checkpoint, s), s.inversion_steps, guidance_scale, fingerprint)
