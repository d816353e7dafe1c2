"""Steps 1 to 4 of the method: each does the missing earlier ones first, says so, and reuses what the folder holds."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import time
from collections.abc import Callable
from typing import Any

import optuna
import pandas as pd
import torch

from . import cost, lora, runs, train, tune
from .class_encoder import ClassEncoder
from .parts import Parts, classifier_options
from .ranks import ALONE, Ranks
from .sample import balanced_labels, generate

ROWS = ("after 1", "after 2", "after 3", "after 4")  # of table 1: where the steps stand


class Steps(Parts):
    """Training, searching, fine-tuning and searching again; `use` and `draw` sample where these have come to."""

    _loaded: tuple[int, int | None] | None = None  # the checkpoints that `use` has put in place

    def use(self, transfer_epoch: int, finetune_epoch: int | None = None) -> ClassEncoder:
        """Loads the Class-Encoder of ``transfer_epoch`` and into the backbone the UNet of ``finetune_epoch``.

        ``None`` is the pretrained UNet. Returns the Class-Encoder, frozen.
        """
        for step, redo, epoch in (("1_transfer", self.transfer, transfer_epoch),
                                  ("3_finetune", self.finetune, finetune_epoch)):  # fmt: skip
            if epoch and not runs.is_whole(train.checkpoint_path(self.run.folder(step), epoch)):
                redo()
        was, self._loaded = self._loaded, None  # until all of it is in place
        encoder = self.new_class_encoder()
        encoder.load_state_dict(runs.load_tensors(train.checkpoint_path(self.run.folder("1_transfer"), transfer_epoch)))
        if was is None or was[1] != finetune_epoch:
            self.backbone.set_unet(self.unet_weights(finetune_epoch))
        self._encoder, self._loaded = encoder.requires_grad_(False).eval(), (transfer_epoch, finetune_epoch)
        return encoder

    def reset(self) -> None:
        """For who changes the backbone's weights by hand: the next `use` or `draw` loads them anew."""
        self._loaded = None

    def draw(
        self,
        point: dict[str, Any],
        labels: torch.Tensor,
        set_name: str,
        first_index: int = 0,
        progress: str | None = None,
    ) -> torch.Tensor:
        """Images of ``labels`` at a point {IS, UGS, transfer_epoch, finetune_epoch}: uint8, the classifier's size."""
        self._prepare(point, len(labels))
        return generate(
            self.backbone, self._encoder, labels, num_inference_steps=point["IS"], guidance_scale=point["UGS"],
            seed=self.settings.seed, set_name=set_name, first_index=first_index, image_size=self.data.image_size,
            antialias=self.settings.antialias, unconditional=self.settings.unconditional, sampler=self.settings.sampler,
            batch_size=self.settings.sample_batch_size, progress=progress,
        )  # fmt: skip

    def _prepare(self, point: dict[str, Any], num_images: int) -> None:
        """Puts a point's weights in place and then, if that many images are worth it, compiles the UNet."""
        if self._loaded != (wanted := (point["transfer_epoch"], point["finetune_epoch"])):
            self.use(*wanted)
        if num_images >= self.settings.sample_batch_size and self.compiles:
            self.backbone.compile_unet(2 * self.settings.sample_batch_size)  # guidance passes each image twice

    # --- the steps ---

    def _fit(
        self, step: str, title: str, parts: Callable[[], tuple[dict, ClassEncoder]], ranks: Ranks, **facts: Any
    ) -> pd.DataFrame:
        """A training step, unless it is done; ``parts()`` -> (parameters that train, by name; the Class-Encoder).

        Several ``ranks`` train together; the first alone holds the step's lock and writes its files.
        """
        with self.run.lock(step) if ranks.first else contextlib.nullcontext():
            ranks.wait()
            folder, prefix, s = self.run.folder(step), step[2:], self.settings
            state = folder / "state.safetensors"  # is only needed to go on
            if self.run.is_done(step) and (history := runs.load_json(folder / "history.json")):
                ranks.wait()
                if ranks.first:
                    runs.discard(state)
                return pd.DataFrame(history, index=pd.RangeIndex(1, len(history) + 1, name="epoch"))
            asked = {**{name: getattr(s, name) for name in runs.STEP_FIELDS[step]}, **facts}
            if ranks.first:
                print(f"Step {step[0]}: {title} ({cost.text(self, step)}).")
                if runs.load_json(folder / "settings.json") != asked:  # what an earlier attempt left is of others
                    shutil.rmtree(folder)
                    runs.save_json(folder / "settings.json", asked)
            ranks.wait()
            start = time.perf_counter()
            trainable, encoder = parts()
            history = train.fit(
                trainable, self.backbone, encoder, self.latents["train"], self.latents["val"], folder,
                epochs=getattr(s, f"{prefix}_epochs"), batch_size=getattr(s, f"{prefix}_batch_size"),
                learning_rate=getattr(s, f"{prefix}_learning_rate"), weight_decay=s.weight_decay, clip_norm=s.clip_norm,
                seed=s.seed, unconditional=s.unconditional, optimizer=s.optimizer,
                gradient_checkpointing=s.gradient_checkpointing, ranks=ranks, title=title,
            )  # fmt: skip
            if ranks.first:
                self.run.record(step, time.perf_counter() - start, revision=self.backbone.source.revision, **facts)
                runs.discard(state)
            ranks.wait()  # until it is on record: whoever sees it missing would train it again, alone
            return history

    def transfer(self, ranks: Ranks = ALONE) -> pd.DataFrame:
        """Step 1: trains the Class-Encoder alone. The loss curve, one row per epoch (see `train.fit`)."""

        def parts():
            encoder = self.new_class_encoder()
            return dict(encoder.named_parameters()), encoder

        return self._fit("1_transfer", "Class-Encoder", parts, ranks)

    def _search(self, step: str, *how: Any) -> optuna.Study:
        """A search, alone or, with ``storage`` given, together with every process that was given the same one."""
        if self.settings.storage is None:
            with self.run.lock(step):
                return self._search_now(step, *how)
        return self._search_now(step, *how)

    def _search_now(
        self, step: str, n_trials: int, space: tune.Space, point_of: Callable[[dict], dict], on_trial
    ) -> optuna.Study:
        s, journal, name = self.settings, self.run.folder(step) / "journal.log", f"step {step[0]}"
        if runs.is_whole(journal) and self.run.is_done(step):
            study = tune.open_study(journal, name)
            finished = len(study.get_trials(deepcopy=False, states=tune.FINISHED))
            if finished >= n_trials or "n_trials" not in s.given:
                return study
        print(f"Step {step[0]}: the search, {n_trials} trials ({cost.text(self, step, space)}).")
        start = time.perf_counter()
        labels = balanced_labels(s.num_images, self.data.num_classes)

        def images_of(steps: int, guidance: float, epoch: int) -> torch.Tensor:
            # The same noise in every trial: trials differ by their parameters alone.
            return self.draw(point_of({"IS": steps, "UGS": guidance, "epoch": epoch}), labels, "trial")

        def search(study: optuna.Study, workers: tune.Workers | None = None) -> optuna.Study:
            return tune.search(
                study, space, images_of, labels, self.data, n_trials=n_trials, select_on=s.select_on, seed=s.seed,
                pruning=s.pruning, classifier_options=classifier_options(s, in_search=True), on_trial=on_trial,
                workers=workers,
            )  # fmt: skip

        asked = {**{field: getattr(s, field) for field in runs.STEP_FIELDS[step]}, "space": dataclasses.astuple(space)}
        if s.storage is None:
            runs.forget_checksum(journal)
            study = search(tune.resume_study(journal, name, asked))
        else:
            shared = tune.share_study(s.storage, f"{self.run.path.parent.name}/{self.run.path.name}: {name}", asked)
            with tune.Workers(s.storage) as workers:
                search(shared, workers)
            with self.run.lock(step):
                study = tune.keep(shared, journal)
        runs.note_checksum(journal)
        self.run.record(step, time.perf_counter() - start, n_trials=n_trials, best=study.best_params)
        if step == "4_retune" and s.keep_unets == "used":
            kept = {study.best_params["epoch"], space.epoch[1]}  # rows "after 4" and "after 3"
            for epoch in set(range(1, space.epoch[1])) - kept:
                runs.discard(train.checkpoint_path(self.run.folder("3_finetune"), epoch))
        return study

    def search(self, on_trial: Callable[[optuna.Study], None] | None = None) -> optuna.Study:
        """Step 2: the first search, over IS, UGS and the Class-Encoder's epoch."""
        s = self.settings
        space = tune.Space((s.steps_min, s.steps_max), (0.0, s.guidance_max), (1, len(self.transfer())))

        def point_of(p):
            return {"IS": p["IS"], "UGS": p["UGS"], "transfer_epoch": p["epoch"], "finetune_epoch": None}

        return self._search("2_tune", s.n_trials, space, point_of, on_trial)

    def finetune(self, ranks: Ranks = ALONE) -> pd.DataFrame:
        """Step 3: fine-tunes the UNet alone, with the Class-Encoder of the best epoch of step 2."""

        epoch = self.search().best_params["epoch"]
        if self.run.is_done("3_finetune"):
            was = self.run.manifest["steps"]["3_finetune"].get("transfer_epoch", epoch)
            if was != epoch:
                raise ValueError(
                    f"The search of step 2 now prefers epoch {epoch} of the Class-Encoder, but this run's UNet was "
                    f"fine-tuned with epoch {was}. Delete {self.run.path / '3_finetune'} and the steps after it, "
                    "or choose another runs_dir."
                )

        def parts():
            self._check_disk()
            encoder, model, s = self.use(epoch), self.backbone, self.settings
            self._loaded = None  # what is about to train is no checkpoint
            if s.finetune_method == "lora":
                with torch.random.fork_rng():
                    torch.manual_seed(s.seed)
                    return lora.add(model.unet, s.lora_rank), encoder
            model.set_unet(dtype=torch.float32)  # what trains needs more digits than what is frozen
            return dict(model.unet.named_parameters()), encoder

        return self._fit("3_finetune", "UNet", parts, ranks, transfer_epoch=epoch)

    def _check_disk(self) -> None:
        """Says what step 3 will keep, if it is much; raises OSError where the disk has no room for it."""
        s, parameters = self.settings, sum(p.numel() for p in self.backbone.unet.parameters())
        if s.finetune_method == "lora" or parameters < 100e6:
            return
        epochs, state = 2 * parameters * s.finetune_epochs, 12 * parameters  # float16; weights and AdamW in float32
        free = shutil.disk_usage(self.run.path).free
        print(
            f"Keeps {s.finetune_epochs} UNets of {2 * parameters / 1e9:.1f} GB (keep_unets='used' deletes all but two "
            f"after step 4), and while it trains {state / 1e9:.0f} GB to go on from; finetune_method='lora' needs some "
            "MB instead."
        )
        if free < (needed := epochs + 2 * state):  # a new state is written before the old one goes
            raise OSError(
                f"Step 3 needs up to {needed / 1e9:.0f} GB in {self.run.path}, where {free / 1e9:.0f} GB are free: "
                "choose another runs_dir, fewer finetune_epochs or finetune_method='lora'."
            )

    def research(self, on_trial: Callable[[optuna.Study], None] | None = None) -> optuna.Study:
        """Step 4: the second search, bounded by the first, over IS, UGS and the UNet's epoch."""
        epochs = len(self.finetune())
        best, s = self.search().best_params, self.settings
        first = tune.Space((s.steps_min, s.steps_max), (0.0, s.guidance_max), (1, s.transfer_epochs))

        def point_of(p):
            return {"IS": p["IS"], "UGS": p["UGS"], "transfer_epoch": best["epoch"], "finetune_epoch": p["epoch"]}

        n_trials = s.n_trials_retune or s.n_trials
        return self._search("4_retune", n_trials, first.after(best, epochs), point_of, on_trial)

    def point(self, row: str) -> dict[str, Any]:
        """Where a row of table 1 samples: {IS, UGS, transfer_epoch, finetune_epoch}. Does the steps it needs."""
        if row not in ROWS:
            raise ValueError(f"row must be one of {', '.join(ROWS)}, not {row!r}.")
        if row == "after 1":
            s = self.settings
            return {
                "IS": s.default_steps,
                "UGS": s.default_guidance,
                "transfer_epoch": len(self.transfer()),
                "finetune_epoch": None,
            }
        found = self.search().best_params
        point = {"IS": found["IS"], "UGS": found["UGS"], "transfer_epoch": found["epoch"], "finetune_epoch": None}
        if row == "after 3":
            point["finetune_epoch"] = len(self.finetune())
        if row == "after 4":
            second = self.research().best_params
            point.update(IS=second["IS"], UGS=second["UGS"], finetune_epoch=second["epoch"])
        return point
