"""The paper's method (arXiv 2405.02698, section 3): a Class-Encoder in the text encoder's place, and steps 1 to 4.

Step 1 trains the Class-Encoder alone; step 2 searches IS, UGS and its epoch; step 3 fine-tunes the UNet; step 4
searches again. `ROWS` are the generators that stand after each of them: the columns of the paper's table 1.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import optuna
import torch
import torch.nn.functional as F
from torch import nn

from ..config.messages import unknown_name
from ..config.settings import Settings, View
from ..diffusion import lora
from ..diffusion.conditions import Condition, ContextTable
from ..diffusion.generate import balanced_labels
from ..diffusion.generator import LatentGenerator
from ..diffusion.training import FIXED_NOISES, held_out_losses
from ..machine.passes import Pass, Work, total
from ..machine.seeds import derived
from ..search import search as searches
from ..search.search import Space, chosen
from ..search.study import FINISHED, UNREADABLE, keep, open_study, resume_study, share_study
from ..store import files
from ..store.run import DIGITS, Step, results
from ..work import cost
from ..work.fitting import HISTORY, checkpoint_name, fit_and_keep
from ..work.workspace import Source, Workspace, classifier_options, classifier_work, never_made

ROWS = ("after 1", "after 2", "after 3", "after 4")  # of table 1: where the steps stand
JOURNAL = "journal.log"
ENCODER = "class_encoder."  # before the names of its parameters in a checkpoint of step 3
TRAINING_VERSION = 3  # of steps 1 and 3: raised whenever the same settings would train otherwise
SEARCH_VERSION = 6  # of both searches: raised whenever the same settings would score or choose trials otherwise
RETUNE_VERSION = SEARCH_VERSION + 1  # of step 4, whose given points changed once on their own
SAMPLING = ("sampling", "class_encoder", "precision", "seed")  # what drawing an image reads, besides its point


class ClassEncoder(nn.Module):
    """A linear map from a one-hot class vector to the UNet's context: (B, num_classes) -> (B, tokens, width).

    The paper's is a weight matrix and a bias (``rank`` None). Its released code has two in a row, with a bias on the
    first alone: num_classes -> ``rank`` 500 -> 100 x 768; still linear, begun as Keras does (Glorot uniform, bias 0).
    ``tokens`` need not be the text encoder's number: cross-attention takes any.

    ``start``, float (tokens, width), for ``rank`` None: the context that every class begins with (the empty prompt's,
    say); the weights then begin at zero. ``None`` begins with torch's default random weights. Fed the all-zero vector,
    the map returns what all classes share: the unconditional context of the paper's released code.
    """

    def __init__(
        self, num_classes: int, tokens: int, width: int, start: torch.Tensor | None = None, rank: int | None = None
    ):
        super().__init__()
        self.num_classes, self.tokens, self.width = num_classes, tokens, width
        if rank is None:
            self.linear = nn.Linear(num_classes, tokens * width)
        else:
            self.linear = nn.Sequential(nn.Linear(num_classes, rank), nn.Linear(rank, tokens * width, bias=False))
            for layer in self.linear:
                nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(self.linear[0].bias)
        if start is not None:
            if rank is not None:
                raise ValueError("A Class-Encoder of two maps has no bias to begin at a context: use start=None.")
            nn.init.zeros_(self.linear.weight)
            with torch.no_grad():
                self.linear.bias.copy_(start.reshape(-1))

    def forward(self, one_hot: torch.Tensor) -> torch.Tensor:
        """float (B, num_classes) -> float (B, tokens, width)."""
        return self.linear(one_hot).view(-1, self.tokens, self.width)

    def contexts(self) -> torch.Tensor:
        """The context of each class: float (num_classes, tokens, width). Keeps gradients."""
        return self(torch.eye(self.num_classes, device=self.device))

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def unconditional(self, kind: str = "zero", empty_prompt: torch.Tensor | None = None) -> torch.Tensor:
        """The context that guidance moves away from: float (tokens, width).

        ``kind``: "zero", the map of the zero vector (released code); "class_mean", the mean of the classes'
        contexts (Diffusion Inversion's choice); "empty_prompt", the text encoder's, passed as ``empty_prompt``.
        """
        if kind == "zero":
            return self(torch.zeros(1, self.num_classes, device=self.device))[0]
        if kind == "class_mean":
            return self.contexts().mean(0)
        if kind == "empty_prompt":
            if empty_prompt is None:
                raise ValueError("unconditional='empty_prompt' needs the text encoder's context for the empty prompt.")
            return empty_prompt.to(self.device, torch.float32)
        raise unknown_name("unconditional context", kind, ("zero", "class_mean", "empty_prompt"))

    def conditioner(self, kind: str = "zero", empty_prompt: torch.Tensor | None = None) -> ClassConditioner:
        """This Class-Encoder as a `Conditioner`; arguments as `unconditional`."""
        return ClassConditioner(self, kind, empty_prompt)


@dataclasses.dataclass(frozen=True)
class ClassConditioner:
    """A `Conditioner`: what the Class-Encoder makes of each label. Keeps gradients."""

    encoder: ClassEncoder
    kind: str = "zero"
    empty_prompt: torch.Tensor | None = None

    def __call__(self, labels: torch.Tensor, indices: torch.Tensor | None = None, seed: int = 0) -> Condition:
        # Not rows of `contexts`: on several cores the gradient of such a choice adds up in another order each time.
        one_hot = F.one_hot(labels.to(self.encoder.device), self.encoder.num_classes)
        return Condition(self.encoder(one_hot.float()))

    def unconditional(self) -> Condition:
        return Condition(self.encoder.unconditional(self.kind, self.empty_prompt)[None])

    def table(self) -> ContextTable:
        """The same contexts, computed once: for sampling, and to be saved."""
        with torch.no_grad():
            return ContextTable(self.encoder.contexts(), self.unconditional().context[0])


@dataclasses.dataclass(frozen=True)
class Point:
    """Where the method samples: IS, UGS, the Class-Encoder's epoch, the UNet's epoch (None: as pretrained)."""

    num_inference_steps: int
    guidance_scale: float
    transfer_epoch: int
    finetune_epoch: int | None = None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class ClassEncoderMethod:
    """The steps of the method on one run's data. Each is done when it is asked for, after those that it needs."""

    name = "class_encoder"
    rows = ROWS

    def __init__(self, ws: Workspace):
        self.ws = ws

    # --- what the steps are ---

    @property
    def transfer_step(self) -> Step:
        s = self.ws.settings
        return Step(
            "1_transfer",
            self._make_transfer,
            topics=("class_encoder", "transfer", "training", "seed", "precision"),
            needs=(self.ws.latents_step,),
            work=lambda: self._training_work(
                Pass("context gradient", s.transfer_batch_size),
                s.transfer_epochs,
                s.transfer_epoch_images,
                before=self.ws.latents_step,
            ),
            title="Step 1: Class-Encoder",
            version=TRAINING_VERSION,
            together=True,
        )

    def tune_step(self, on_trial: Callable[[optuna.Study], None] | None = None) -> Step:
        return Step(
            "2_tune",
            version=SEARCH_VERSION,
            make=lambda folder, s: self._make_search(folder, s, self.tune_step(), self.first_space(), on_trial),
            topics=("search", "search_space", "classifier", *SAMPLING),
            needs=(self.transfer_step,),
            roots=("data",),
            inputs=self.ws.drawing(),
            work=lambda: self._search_work(self.ws.settings.n_trials, self.first_space(), self.ws.settings.rescored),
            title=f"Step 2: the search, {self.ws.settings.n_trials} trials",
        )

    @property
    def finetune_step(self) -> Step:
        s = self.ws.settings
        kind = "weight gradient" if s.finetune_method == "full" else "context gradient"
        return Step(
            "3_finetune",
            self._make_finetune,
            topics=("class_encoder", "finetune", "training", "seed", "precision"),
            needs=(self.ws.latents_step, self.transfer_step, self.tune_step()),
            work=lambda: self._training_work(
                Pass(kind, s.finetune_batch_size), s.finetune_epochs, s.finetune_epoch_images
            ),
            title="Step 3: UNet",
            version=TRAINING_VERSION,
            together=True,
        )

    def retune_step(self, on_trial: Callable[[optuna.Study], None] | None = None) -> Step:
        return Step(
            "4_retune",
            version=RETUNE_VERSION,
            make=lambda folder, s: self._make_search(folder, s, self.retune_step(), self.second_space(), on_trial),
            topics=("retune", "search_space", "classifier", *SAMPLING),
            needs=(self.transfer_step, self.tune_step(), self.finetune_step),
            roots=("data",),
            inputs=self.ws.drawing(),
            work=self._retune_work,
            title=f"Step 4: the search, {_retune_trials(self.ws.settings)} trials",
        )

    def steps(self) -> tuple[Step, ...]:
        """Steps 1 to 4, in their order."""
        return self.transfer_step, self.tune_step(), self.finetune_step, self.retune_step()

    # --- doing them ---

    def transfer(self) -> list[dict[str, float]]:
        """Step 1: trains the Class-Encoder alone. The losses of every epoch, see `diffusion.held_out_losses`."""
        return files.load_json(self.ws.run.file(self.transfer_step, HISTORY))

    def tune(self, on_trial: Callable[[optuna.Study], None] | None = None) -> optuna.Study:
        """Step 2: the first search, over IS, UGS and the Class-Encoder's epoch; ``on_trial(study)`` after a trial."""
        return self._study(self.tune_step(on_trial), self.ws.settings.n_trials, self.first_space, on_trial)

    def finetune(self) -> list[dict[str, float]]:
        """Step 3: fine-tunes the UNet alone, with the Class-Encoder of the best epoch of step 2."""
        return files.load_json(self.ws.run.file(self.finetune_step, HISTORY))

    def retune(self, on_trial: Callable[[optuna.Study], None] | None = None) -> optuna.Study:
        """Step 4: the second search, bounded by the first, over IS, UGS and the UNet's epoch."""
        study = self._study(self.retune_step(on_trial), _retune_trials(self.ws.settings), self.second_space, on_trial)
        if self.ws.settings.keep_unets == "used":
            last = self.ws.settings.finetune_epochs
            kept = {chosen(study).params["epoch"], last}  # rows "after 4" and "after 3"
            tuned = self.ws.run.fingerprint(self.finetune_step)
            for other in results(self.ws.run.path, "4_retune"):  # with other settings, of the same UNets
                if other.record["needs"].get("3_finetune") == tuned:
                    kept.add(other.facts["best"]["epoch"])
            unused = {checkpoint_name(epoch) for epoch in set(range(1, last)) - kept}
            self.ws.run.discard(self.finetune_step, unused)
        return study

    def first_space(self) -> Space:
        """What step 2 chooses from."""
        s = self.ws.settings
        return Space((s.steps_min, s.steps_max), (s.guidance_min, s.guidance_max), (1, s.transfer_epochs))

    def second_space(self) -> Space:
        """What step 4 chooses from: bounded by the best of step 2, which is done first."""
        return self.first_space().after(chosen(self.tune()).params, self.ws.settings.finetune_epochs)

    def _bounded_space(self) -> Space:
        """As `second_space` if step 2 is done, for an estimate; else the first one."""
        return self.second_space() if self.ws.run.peek(self.tune_step()) else self.first_space()

    # --- sampling ---

    def point(self, row: str) -> Point:
        """Where a row of table 1 samples. Does the steps it needs. Raises ValueError for an unknown row."""
        self._check(row)
        s = self.ws.settings
        if row == "after 1":
            return Point(s.default_steps, s.default_guidance, s.transfer_epochs)
        first = chosen(self.tune()).params
        point = Point(first["IS"], first["UGS"], first["epoch"])
        if row == "after 3":
            point = dataclasses.replace(point, finetune_epoch=s.finetune_epochs)
        if row == "after 4":
            second = chosen(self.retune()).params
            point = Point(second["IS"], second["UGS"], first["epoch"], second["epoch"])
        return point

    def source(self, row: str) -> Source:
        """The generator of a row of table 1, as tables, sets and exports take it."""
        self._check(row)
        needs = {
            "after 1": (self.transfer_step,),
            "after 2": (self.transfer_step, self.tune_step()),
            "after 3": (self.transfer_step, self.tune_step(), self.finetune_step),
            "after 4": (self.transfer_step, self.tune_step(), self.finetune_step, self.retune_step()),
        }[row]
        topics = (*SAMPLING, "default_point") if row == "after 1" else SAMPLING
        step = Step(
            f"generator/{row}", make=never_made, topics=topics, needs=needs, roots=("model",), inputs=self.ws.drawing()
        )
        return Source(
            row,
            step,
            build=lambda: self._generator(self.point(row), self.ws.run.fingerprint(step)),
            point=lambda: self.point(row).to_dict(),
            passes=lambda images: self._drawing_work(row, images),
            facts={} if row == "after 1" else {"select_on": self.ws.settings.select_on},
        )

    def generator(self, row: str = "after 4") -> LatentGenerator:
        """The generator of a row of table 1. Does the steps it needs."""
        return self.source(row).build()

    def generator_at(self, point: Point) -> LatentGenerator:
        """The generator at any point, for pictures. Does the steps it needs."""
        return self._generator(point, "")

    def _check(self, row: str) -> None:
        if row not in ROWS:
            raise ValueError(f"row must be one of {', '.join(ROWS)}, not {row!r}.")

    def _generator(self, point: Point, fingerprint: str) -> LatentGenerator:
        ws, s = self.ws, self.ws.settings.view(*SAMPLING, "how")
        empty = ws.backbone.text_context([""])[0] if s.unconditional == "empty_prompt" else None
        conditioner = self.class_encoder_at(point, s).conditioner(s.unconditional, empty)
        at = point.num_inference_steps, point.guidance_scale
        return ws.latent_generator(s, conditioner.table(), *at, fingerprint, self._unet(point.finetune_epoch))

    def new_class_encoder(self, s: Settings | View | None = None) -> ClassEncoder:
        """An untrained Class-Encoder for this data and backbone."""
        s, backbone = s or self.ws.settings, self.ws.backbone
        start = backbone.text_context([""])[0] if s.class_encoder_start == "empty_prompt" else None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(s.seed)
            encoder = ClassEncoder(
                self.ws.data.num_classes,
                s.class_encoder_tokens or backbone.tokens,
                backbone.width,
                start,
                s.class_encoder_rank,
            )
        return encoder.to(backbone.device)

    def class_encoder(self, epoch: int, s: Settings | View | None = None) -> ClassEncoder:
        """The Class-Encoder of an epoch of step 1, frozen."""
        encoder = self.new_class_encoder(s)
        path = self.ws.run.file(self.transfer_step, checkpoint_name(epoch))
        encoder.load_state_dict(files.load_tensors(path))
        return encoder.requires_grad_(False).eval()

    def class_encoder_at(self, point: Point, s: Settings | View | None = None) -> ClassEncoder:
        """The Class-Encoder that a point samples with, frozen: step 1's, or step 3's if that trained it along."""
        if point.finetune_epoch is None or not self.ws.run.result(self.finetune_step).facts["class_encoder_trained"]:
            return self.class_encoder(point.transfer_epoch, s)
        encoder = self.new_class_encoder(s)
        tensors = files.load_tensors(self.ws.run.file(self.finetune_step, checkpoint_name(point.finetune_epoch)))
        encoder.load_state_dict({n.removeprefix(ENCODER): t for n, t in tensors.items() if n.startswith(ENCODER)})
        return encoder.requires_grad_(False).eval()

    def _unet(self, epoch: int | None) -> tuple[str, Callable[[], dict[str, torch.Tensor] | None]]:
        """The UNet's weights at an epoch of step 3, as `Backbone.put_unet` takes them."""
        if epoch is None:
            return "pretrained", lambda: None
        step = self.finetune_step
        key = f"{self.ws.run.fingerprint(step)[:DIGITS]} epoch {epoch}"

        def load() -> dict[str, torch.Tensor]:
            with self.ws.run.alone():  # of several ranks only those come here whose UNet holds other weights
                kept = files.load_tensors(self.ws.run.file(step, checkpoint_name(epoch)))
            return {name: tensor for name, tensor in kept.items() if not name.startswith(ENCODER)}

        return key, load

    # --- making them ---

    def _losses(self, conditioner: ClassConditioner) -> Mapping[str, float]:
        ws = self.ws
        return held_out_losses(ws.backbone, conditioner, ws.latents["val"], ws.data.num_classes)

    def _make_transfer(self, folder: Path, s: View) -> dict[str, Any]:
        ws, encoder = self.ws, self.new_class_encoder(s)
        # The probe's unconditional context is the zero vector's, whatever the sampler will take.
        conditioner = encoder.conditioner("zero")
        ws.backbone.put_unet(*self._unet(None))
        fit_and_keep(
            folder,
            ws,
            dict(encoder.named_parameters()),
            conditioner,
            ws.latents["train"],
            epochs=s.transfer_epochs,
            batch_size=s.transfer_batch_size,
            learning_rate=s.transfer_learning_rate,
            images_per_epoch=s.transfer_epoch_images,
            probe=lambda: self._losses(conditioner),
            title="Class-Encoder",
            **_training_options(s),
        )
        return {"revision": ws.backbone.source.revision}

    def _make_finetune(self, folder: Path, s: View) -> dict[str, Any]:
        ws, unet, epoch = self.ws, self.ws.backbone.unet, chosen(self.tune()).params["epoch"]
        self._check_disk(folder, s)
        encoder, own_rates = self.class_encoder(epoch, s), {}
        conditioner = encoder.conditioner("zero")
        if s.finetune_method == "lora":
            ws.backbone.put_unet(*self._unet(None))
            ws.backbone.unet_key = None  # what is about to train is no checkpoint
            with torch.random.fork_rng():
                torch.manual_seed(s.seed)
                trainable = lora.add(unet, s.lora_rank)
        else:
            ws.backbone.set_unet(dtype=torch.float32)  # what trains needs more digits than what is frozen
            trainable = dict(unet.named_parameters())
        if s.finetune_encoder_learning_rate is not None:
            trained = {ENCODER + name: parameter for name, parameter in encoder.named_parameters()}
            own_rates = dict.fromkeys(trained, s.finetune_encoder_learning_rate)
            trainable |= trained
        fit_and_keep(
            folder,
            ws,
            trainable,
            conditioner,
            ws.latents["train"],
            epochs=s.finetune_epochs,
            batch_size=s.finetune_batch_size,
            learning_rate=s.finetune_learning_rate,
            own_rates=own_rates,
            images_per_epoch=s.finetune_epoch_images,
            probe=lambda: self._losses(conditioner),
            checkpoint_dtype=None if s.finetune_method == "lora" else torch.float16,  # half of the disk
            title="UNet",
            **_training_options(s),
        )
        return {
            "transfer_epoch": epoch,
            "class_encoder_trained": bool(own_rates),
            "revision": ws.backbone.source.revision,
        }

    def _check_disk(self, folder: Path, s: View) -> None:
        """Says what step 3 will keep, if it is much; raises OSError where the disk has no room for it."""
        parameters = sum(p.numel() for p in self.ws.backbone.unet.parameters())
        if s.finetune_method == "lora" or parameters < 100e6:
            return
        epochs, state = 2 * parameters * s.finetune_epochs, 12 * parameters  # float16; weights and AdamW in float32
        free = shutil.disk_usage(folder).free
        if self.ws.ranks.first:
            print(
                f"Keeps {s.finetune_epochs} UNets of {2 * parameters / 1e9:.1f} GB (keep_unets='used' deletes all but "
                f"two after step 4), and while it trains {state / 1e9:.0f} GB to go on from; finetune_method='lora' "
                "needs some MB instead."
            )
        if free < (needed := epochs + 2 * state):  # a new state is written before the old one goes
            raise OSError(
                f"Step 3 needs up to {needed / 1e9:.0f} GB in {folder}, where {free / 1e9:.0f} GB are free: "
                "choose another runs_dir, fewer finetune_epochs or finetune_method='lora'."
            )

    # --- the searches ---

    def _study(
        self, step: Step, n_trials: int, space: Callable[[], Space], on_trial: Callable[[optuna.Study], None] | None
    ) -> optuna.Study:
        """The finished study of a search step; made first, alone or with every process that shares its storage."""
        ws = self.ws
        if ws.settings.storage and not ws.run.agreed(ws.run.peek(step) is not None):
            shared = self._shared_study(step)  # first of all: a storage that cannot be opened must not cost a training
            for need in step.needs:
                ws.run.result(need)
            view, chosen_from = ws.settings.view(*step.topics, "how"), space()
            with ws.run.alone():
                self._run_trials(shared, view, step, chosen_from, on_trial, shared=True)
        for _ in range(2):
            result = ws.run.result(step)
            study = None
            enough = whole = False
            with contextlib.suppress(*UNREADABLE):
                study = open_study(result.folder / JOURNAL, result.facts["study"])
                enough = len(study.get_trials(deepcopy=False, states=FINISHED)) >= n_trials
                whole = enough and chosen(study).params == result.facts["best"]
            if ws.run.agreed(whole):
                return study
            if ws.ranks.first:
                print(
                    f"{step.name}: its {JOURNAL} is not what the search ended with (trials are missing, damaged, "
                    "changed, or others are better): the search is done again."
                )
                if enough:  # to go on with these trials would end elsewhere
                    files.move_aside(result.folder / JOURNAL)
            ws.run.forget(step)
        raise files.DamagedFile(f"{result.folder / JOURNAL} lost trials once more: check the disk.")

    def _shared_study(self, step: Step) -> optuna.Study:
        ws = self.ws
        run, fingerprint = ws.run.path, ws.run.fingerprint(step)[:DIGITS]
        return share_study(ws.settings.storage, f"{run.parent.name}/{run.name}: {_study_name(step)}, {fingerprint}")

    def _make_search(
        self, folder: Path, s: View, step: Step, space: Space, on_trial: Callable[[optuna.Study], None] | None
    ) -> dict[str, Any]:
        journal, n_trials = folder / JOURNAL, _trials(step, s)
        if s.storage:
            shared = self._run_trials(self._shared_study(step), s, step, space, on_trial, shared=True)
            study = keep(shared, journal, n_trials)
        else:
            study = self._run_trials(resume_study(journal, _study_name(step)), s, step, space, on_trial)
        if s.rescored:
            labels = self._labels(_rescoring_images(s))
            searches.rescore(
                study,
                self._images_of(s, step, "rescoring", labels),
                labels,
                self.ws.data,
                count=s.rescored,
                select_on=s.select_on,
                classifier_seeds=[derived(s.seed, step.name, k) for k in range(1, s.rescoring_classifiers + 1)],
                classifier_options=classifier_options(s, in_search=True),
            )
        best = chosen(study)
        return {"study": study.study_name, "best": best.params, "best_value": best.value}

    def _run_trials(
        self,
        study: optuna.Study,
        s: View,
        step: Step,
        space: Space,
        on_trial: Callable[[optuna.Study], None] | None,
        shared: bool = False,
    ) -> optuna.Study:
        known = self._known(space) if step.name == "4_retune" and s.incumbent_first else []
        labels = self._labels(s.num_images)
        return searches.search(
            study,
            space,
            self._images_of(s, step, "trial", labels),
            labels,
            self.ws.data,
            known=known,
            n_trials=_trials(step, s),
            select_on=s.select_on,
            seed=s.seed,
            classifier_seed=derived(s.seed, step.name),
            classifier_options=classifier_options(s, in_search=True),
            pruning=s.pruning,
            on_trial=on_trial,
            shared=shared,
        )

    def _labels(self, images: int) -> torch.Tensor:
        return balanced_labels(images, self.ws.data.num_classes)

    def _images_of(
        self, s: View, step: Step, set_name: str, labels: torch.Tensor
    ) -> Callable[[int, float, int], torch.Tensor]:
        """Draws the images of a search's trial from the noise of ``set_name``, one for each of ``labels``."""
        best_transfer = None if step.name == "2_tune" else chosen(self.tune()).params["epoch"]

        def images_of(num_inference_steps: int, guidance_scale: float, epoch: int) -> torch.Tensor:
            transfer, finetune = (epoch, None) if best_transfer is None else (best_transfer, epoch)
            generator = self.generator_at(Point(num_inference_steps, guidance_scale, transfer, finetune))
            # The same noise in every trial: trials differ by their parameters alone.
            return generator(labels, seed=s.seed, set_name=set_name)

        return images_of

    def _known(self, space: Space) -> list[dict[str, float]]:
        """The points that step 4 tries first: that of the row before it, and the same without guidance, at UGS 1.

        (At the smallest UGS of the space where that is more: below 1 the class is told less than it was trained to be.)
        A UNet that was fine-tuned on the classes needs little guidance or none. The few images of a trial hide that:
        guidance makes them typical, which helps most where there are few.
        """
        before = self.point("after 3")
        incumbent = {"IS": before.num_inference_steps, "UGS": before.guidance_scale, "epoch": before.finetune_epoch}
        points = [space.nearest(point) for point in (incumbent, incumbent | {"UGS": 1.0})]
        return points[:1] if points[0] == points[1] else points

    # --- what they cost ---

    def _training_work(self, gradient: Pass, epochs: int, epoch_images: int | None, before: Step | None = None) -> Work:
        data = self.ws.data
        held_out = Pass("unet", min(256, len(data.val)))
        work = {
            gradient: epochs * (epoch_images or len(data.train)),
            held_out: epochs * 3 * FIXED_NOISES * len(data.val),
        }
        return work if before is None or self.ws.run.peek(before) else total([work, before.work()])

    def _retune_work(self) -> Work:
        s = self.ws.settings
        rescored = s.rescored + 2 * (s.incumbent_first and s.rescored > 0)  # the known points too, at most
        return self._search_work(_retune_trials(s), self._bounded_space(), rescored)

    def _search_work(self, n_trials: int, space: Space, rescored: int) -> Work:
        """At the middle of the range of IS: what a search will draw is not known."""
        s = self.ws.settings
        images = n_trials * s.num_images + rescored * _rescoring_images(s)
        share = cost.PRUNED_SHARE if s.pruning else 1.0
        trainings = ((n_trials * share, s.num_images), (rescored * s.rescoring_classifiers, _rescoring_images(s)))
        trained = [
            {kind: times * count for kind, count in self._classifier_work(count_images).items()}
            for times, count_images in trainings
        ]
        return total([self.ws.drawn(sum(space.IS) / 2, 2.0, images), *trained])

    def _classifier_work(self, images: int) -> Work:
        return classifier_work(self.ws.settings, images, self._pixels(), self.ws.data.num_classes)

    def _drawing_work(self, row: str, images: int) -> Work:
        s, needed = self.ws.settings, {"after 4": self.retune_step()}.get(row, self.tune_step())
        if row == "after 1":
            return self.ws.drawn(s.default_steps, s.default_guidance, images)
        if not self.ws.run.peek(needed):
            return self.ws.drawn((s.steps_min + s.steps_max) / 2, 2.0, images)
        point = self.point(row)
        return self.ws.drawn(point.num_inference_steps, point.guidance_scale, images)

    def _pixels(self) -> int:
        return self.ws.settings.image_size or self.ws.data.image_size


def _training_options(s: View) -> dict[str, Any]:
    """What both trainings share of the arguments of `fit_and_keep`."""
    return dict(
        weight_decay=s.weight_decay,
        clip_norm=s.clip_norm,
        label_dropout=s.label_dropout,
        optimizer=s.optimizer,
        gradient_checkpointing=s.gradient_checkpointing,
        seed=s.seed,
    )


def _study_name(step: Step) -> str:
    return f"step {step.name[0]}"


def _rescoring_images(s: Settings | View) -> int:
    return s.rescoring_images or s.num_images


def _retune_trials(s: Settings | View) -> int:
    return s.n_trials_retune or s.n_trials


def _trials(step: Step, s: View) -> int:
    return s.n_trials if step.name == "2_tune" else _retune_trials(s)
