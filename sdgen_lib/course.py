"""The chapters as methods: each does the missing earlier steps first, says so, and reuses what the run folder holds."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import shutil
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import torch
from tqdm.auto import tqdm

from . import backbone as backbones
from . import classifier, cost, data, devices, lora, runs, shards, train, tune
from .class_encoder import ClassEncoder
from .ranks import ALONE, Ranks
from .sample import balanced_labels, generate
from .settings import Settings, followed

ROWS = ("after 1", "after 2", "after 3", "after 4")  # of table 1


def classifier_options(settings: Settings, in_search: bool = False) -> dict[str, Any]:
    """The keyword arguments of `classifier.train_classifier` that a run's settings fix; a search may wait longer."""
    device = devices.default_device()
    return dict(
        width=settings.classifier_width, shortcut=settings.classifier_shortcut, epochs=settings.classifier_epochs,
        batch_size=settings.classifier_batch_size, epoch_images=settings.classifier_epoch_images,
        epoch_limit=settings.classifier_epoch_limit,
        learning_rate=settings.classifier_learning_rate,
        label_smoothing=settings.label_smoothing,
        plateau_patience=in_search and settings.search_plateau_patience or settings.plateau_patience,
        stop_patience=in_search and settings.search_stop_patience or settings.stop_patience, device=device,
        dtype=devices.classifier_dtype(settings.precision, device),
    )  # fmt: skip


class Course:
    """One run: its data, backbone and folder, and the five steps of the method.

    ``Course(settings)`` loads the data and checks it; the backbone is loaded when first needed. Every step returns its
    result, from the run folder where it is already there.
    """

    def __init__(self, settings: Settings):
        self.settings = settings
        self.data = data.load(
            settings.dataset, settings.image_size, settings.seed, base_dir=Path(__file__).resolve().parents[1]
        )
        self.run = runs.Run(settings, self.data.slug)
        self._loaded: tuple[int, int | None] | None = None  # the checkpoints that `use` has put in place

    def __str__(self) -> str:
        s, d = self.settings, self.data
        folder = os.path.relpath(self.run.path)
        changed = ", ".join(f"{name}={getattr(s, name)!r}" for name in s.given if name != "backbone")
        lines = [
            f"dataset   {s.dataset}: {d.num_classes} classes, {len(d.train)} training, {len(d.val)} validation and "
            f"{len(d.test)} test images of {d.image_size}x{d.image_size} pixels",
            f"backbone  {s.backbone}, on {devices.default_device()}",
            f"recipe    {s.recipe}" + (f", with {changed}" if changed else ""),
            f"follows   {followed(s)}",
            f"seed      {s.seed}",
        ]  # fmt: skip
        how = dict(width=120, subsequent_indent=" " * 10, break_long_words=False, break_on_hyphens=False)
        return "\n".join([*(textwrap.fill(line, **how) for line in lines), f"results   {folder}"])

    # --- the parts ---

    @functools.cached_property
    def backbone(self) -> backbones.Backbone:
        return backbones.load(self.settings.backbone, precision=self.settings.precision)

    @functools.cached_property
    def compiles(self) -> bool:
        """Whether the UNet is compiled for sampling: as ``compile_unet`` says, or (auto) where that was measured to be
        faster and the run's searches and sets take so many passes that it makes up for the minute it takes."""
        s = self.settings
        if s.compile_unet == "auto":
            steps = ("2_tune", "4_retune", "5_datasets")
            passes = sum(cost.count(s, step, len(self.data.train), len(self.data.val))["pass"] for step in steps)
            return self.backbone.gains_by_compiling and passes >= 100_000
        return s.compile_unet == "yes"

    @functools.cached_property
    def latents(self) -> dict[str, train.Latents]:
        """The train and val splits after the VAE, encoded once and kept in the run folder."""
        path = self.run.path / "latents.safetensors"
        with self.run.lock(path.name):
            if not runs.is_whole(path):
                print("Encoding the real images once with the VAE ...")
                splits = ("train", "val")
                runs.save_tensors(path, {s: self.backbone.encode(getattr(self.data, s).images) for s in splits})
        tensors = runs.load_tensors(path)
        device = self.backbone.device
        return {s: train.Latents(tensors[s].to(device), getattr(self.data, s).labels.to(device)) for s in tensors}

    def new_class_encoder(self) -> ClassEncoder:
        """An untrained Class-Encoder for this data and backbone."""
        s, tokens = self.settings, self.settings.class_encoder_tokens or self.backbone.tokens
        start = self.backbone.text_context([""])[0] if s.class_encoder_start == "empty_prompt" else None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(s.seed)
            encoder = ClassEncoder(self.data.num_classes, tokens, self.backbone.width, start, s.class_encoder_rank)
        return encoder.to(self.backbone.device)

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

    def unet_weights(self, finetune_epoch: int | None) -> dict[str, torch.Tensor] | None:
        """A checkpoint of step 3, for `Backbone.set_unet`; ``None``, the pretrained UNet, for None."""
        if finetune_epoch is None:
            return None
        path = train.checkpoint_path(self.run.folder("3_finetune"), finetune_epoch)
        if not path.exists():
            raise FileNotFoundError(
                f"{path} is gone (keep_unets='used' deletes what no table needs): delete {path.parent} and the "
                "steps after it, and they are made again."
            )
        return runs.load_tensors(path)

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

    # --- CAS ---

    def _scores(
        self, sets: dict[str, Callable[[], data.Split]], of: int = 1
    ) -> Iterator[tuple[str, list[classifier.Score]]]:
        """For each set of a table, by its name, the scores of the run's classifier seeds.

        ``of``: the sets of the whole table. On them, and not on how many are left to do, depends how many cores each
        classifier is given, and so its rounding.
        """
        seeds = range(self.settings.seed, self.settings.seed + self.settings.classifier_seeds)

        def score(split: data.Split, seed: int, look: Callable[..., None]) -> classifier.Score:
            return classifier.score(split.images, split.labels, self.data.val, self.data.test, self.data.num_classes,
                                    seed=seed, on_epoch=look, **classifier_options(self.settings))  # fmt: skip

        works = (functools.partial(score, split, seed) for load in sets.values() for split in [load()]
                 for seed in seeds)  # fmt: skip
        found = devices.side_by_side(works, devices.best_at_once(of * len(seeds)))
        with tqdm(total=len(sets) * len(seeds), unit="classifier") as bar, contextlib.closing(found):
            for name in sets:
                bar.set_description(name)
                scores = []
                for _ in seeds:
                    scores.append(next(found))
                    bar.update()
                yield name, scores

    @staticmethod
    def _accuracies(scores: list[classifier.Score]) -> dict[str, list[float]]:
        """A row's accuracies as fractions, as the tables keep them."""
        return {"test": [f.test_accuracy for f in scores], "val": [f.val_accuracy for f in scores]}

    def _same(self, found: dict[str, Any] | None, point: dict[str, Any] | None, num_images: int) -> bool:
        """Whether a stored row of a table is what the settings ask for now."""
        asked = (point, num_images, self.settings.classifier_seeds)
        return bool(found) and asked == (found["point"], found["num_images"], len(found["test"]))

    @runs.one_at_a_time("table_1.json")
    def cas(self, row: str) -> dict[str, Any]:
        """A row of table 1: where it samples, its CAS with each classifier seed, and the seconds it took to generate.

        The images start from fresh noise, of no trial; kept in ``table_1.json``.
        """
        path = self.run.path / "table_1.json"
        rows = runs.load_json(path, {})
        point = self.point(row)
        if not self._same(rows.get(row), point, self.settings.num_images):
            labels = balanced_labels(self.settings.num_images, self.data.num_classes)
            self._prepare(point, len(labels))  # its time is not generation's
            start = time.perf_counter()
            images = self.draw(point, labels, "table 1", progress=f"{row}: generating")
            seconds = time.perf_counter() - start
            ((_, scores),) = self._scores({f"{row}: CAS": lambda: data.Split(images, labels)})
            rows[row] = {"point": point, **self._accuracies(scores), "seconds": seconds, "num_images": len(labels),
                         "select_on": self.settings.select_on}  # fmt: skip
            runs.save_json(path, rows)
        return rows[row]

    @runs.one_at_a_time("5_datasets")
    def synthetic(self, multiple: int) -> data.Split:
        """Step 5: the synthetic set of ``multiple`` times the real one's size.

        It is made of blocks as large as the real set, each with the real class counts (``class_mix`` "balanced": equal
        ones). The first block is x1, the first two are x2, and so on: prefixes of one set. With ``larger_sets``
        "random", as in the released code, x1 is a block apart (number 0) and x2 .. are random parts of all the others.
        """
        s = self.settings
        paths = [self.make_block(block, progress=f"synthetic block {block}") for block in self._blocks(multiple)]
        whole = data.Split(torch.cat([shards.load_images(path) for path in paths]), self._labels().repeat(len(paths)))
        if s.larger_sets == "nested" or multiple == 1:
            return whole
        order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(s.seed * 1009 + multiple))
        return whole.take(order[: multiple * len(self.data.train)])

    def _blocks(self, multiple: int) -> list[int]:
        """The numbers of the blocks that a set is made of, or taken from."""
        if self.settings.larger_sets == "nested":
            return list(range(1, multiple + 1))
        return [0] if multiple == 1 else list(range(1, self.settings.max_multiple + 1))

    def _labels(self) -> torch.Tensor:
        """The labels of a block."""
        real = self.data.train.labels.sort().values
        return balanced_labels(len(real), self.data.num_classes) if self.settings.class_mix == "balanced" else real

    def block_point(self) -> dict[str, Any]:
        """Where the synthetic set samples, and with which class mix: what a block is noted to be of."""
        return {**self.point("after 4"), "class_mix": self.settings.class_mix}

    def make_block(self, block: int, ranks: Ranks = ALONE, progress: str | None = None) -> Path:
        """The file of block ``block`` (1, 2, .., 0 for one apart) of the synthetic set, made if missing.

        See `shards.make_block`.
        """
        path, labels = self.run.folder("5_datasets") / f"block_{block:02d}.npz", self._labels()
        point = self.block_point()
        set_name, first_index = ("synthetic", (block - 1) * len(labels)) if block else ("synthetic x1", 0)
        shards.make_block(
            path, lambda labels, first: self.draw(point, labels, set_name, first), labels, point,
            first_index=first_index, batch_size=self.settings.sample_batch_size, ranks=ranks, progress=progress,
        )  # fmt: skip
        return path

    @runs.one_at_a_time("table_2.json")
    def scaling(self) -> dict[str, dict[str, list[float]]]:
        """The row of table 2: accuracies with real images and with x1 .. xK, each seed; kept in ``table_2.json``."""
        s, path = self.settings, self.run.path / "table_2.json"
        point = {**self.point("after 4"), "class_mix": s.class_mix, "larger_sets": s.larger_sets}
        if s.larger_sets == "random":
            point["of"] = s.max_multiple
        rows, start = runs.load_json(path, {}), time.perf_counter()
        rows = {name: row for name, row in rows.items() if row["point"] in (None, point)}  # none of another step 4
        names = ["real", *(f"x{k}" for k in range(1, s.max_multiple + 1))]
        n = len(self.data.train)  # of each set: where it samples, how many images
        wanted = {name: (None, n) if name == "real" else (point, int(name[1:]) * n) for name in names}
        kept = {name: self._predicted_path(name) for name in names}
        todo = [name for name in names
                if not (self._same(rows.get(name), *wanted[name]) and runs.is_whole(kept[name]))]  # fmt: skip
        if todo:
            print(f"Step 5: {names[-1]} synthetic set, {len(names)} x {s.classifier_seeds} classifiers "
                  f"({cost.text(self, '5_datasets')}).")  # fmt: skip
        with self.run.lock("5_datasets"):  # all of them drawn first: the classifiers will have the cores to themselves
            for block in sorted({block for name in todo if name != "real" for block in self._blocks(int(name[1:]))}):
                self.make_block(block, progress=f"synthetic block {block}")

        def load(name: str) -> data.Split:
            return self.data.train if name == "real" else self.synthetic(int(name[1:]))

        for name, scores in self._scores({name: functools.partial(load, name) for name in todo}, of=len(names)):
            runs.save_tensors(kept[name], {"predicted": scores[0].predicted})
            rows[name] = {"point": wanted[name][0], "num_images": wanted[name][1], **self._accuracies(scores)}
            runs.save_json(path, rows)
        if not self.run.is_done("5_datasets"):
            self.run.record("5_datasets", time.perf_counter() - start)
        return {name: rows[name] for name in names}

    def _predicted_path(self, name: str) -> Path:
        return self.run.folder("5_datasets") / f"predicted_{name}.safetensors"

    def predicted(self, name: str) -> torch.Tensor:
        """What the first classifier of a row of table 2 ("real", "x1", ..) takes the test images for: int64 (N,).

        Raises ValueError for a row that the table has not.
        """
        if name not in (rows := self.scaling()):
            raise ValueError(f"Table 2 has no row {name!r}. It has: {', '.join(rows)} (max_multiple is the last).")
        return runs.load_tensors(self._predicted_path(name))["predicted"]
