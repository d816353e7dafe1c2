"""The chapters as methods: each does the missing earlier steps first, says so, and reuses what the run folder holds."""

from __future__ import annotations

import functools
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
import torch
from tqdm.auto import tqdm

from . import backbone as backbones
from . import classifier, cost, data, devices, runs, train, tune
from .class_encoder import ClassEncoder
from .sample import balanced_labels, generate
from .settings import Settings

ROWS = ("after 1", "after 2", "after 3", "after 4")  # of table 1


def classifier_options(settings: Settings) -> dict[str, Any]:
    """The keyword arguments of `classifier.train_classifier` that a run's settings fix."""
    device = devices.default_device()
    return dict(
        width=settings.classifier_width, epochs=settings.classifier_epochs,
        batch_size=settings.classifier_batch_size, epoch_images=settings.classifier_epoch_images,
        learning_rate=settings.classifier_learning_rate,
        label_smoothing=settings.label_smoothing, plateau_patience=settings.plateau_patience,
        stop_patience=settings.stop_patience, device=device,
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
        self._loaded: tuple[int, int | None] | None = None

    def __str__(self) -> str:
        s, d = self.settings, self.data
        folder = os.path.relpath(self.run.path)
        changed = ", ".join(f"{name}={getattr(s, name)!r}" for name in s.given if name != "backbone")
        return "\n".join([
            f"dataset   {s.dataset}: {d.num_classes} classes, {len(d.train)} training, {len(d.val)} validation and "
            f"{len(d.test)} test images of {d.image_size}x{d.image_size} pixels",
            f"backbone  {s.backbone}, on {devices.default_device()}",
            f"recipe    {s.recipe}" + (f", with {changed}" if changed else ""),
            f"seed      {s.seed}",
            f"results   {folder}",
        ])  # fmt: skip

    # --- the parts ---

    @functools.cached_property
    def backbone(self) -> backbones.Backbone:
        return backbones.load(self.settings.backbone, precision=self.settings.precision)

    @functools.cached_property
    def _pretrained(self) -> dict[str, torch.Tensor]:
        """The UNet's own weights, to return to after fine-tuned ones."""
        return {name: value.detach().clone() for name, value in self.backbone.unet.state_dict().items()}

    @functools.cached_property
    def latents(self) -> dict[str, train.Latents]:
        """The train and val splits after the VAE, encoded once and kept in the run folder."""
        path = self.run.path / "latents.safetensors"
        if not path.exists():
            print("Encoding the real images once with the VAE ...")
            runs.save_tensors(path, {s: self.backbone.encode(getattr(self.data, s).images) for s in ("train", "val")})
        tensors = runs.load_tensors(path)
        device = self.backbone.device
        return {s: train.Latents(tensors[s].to(device), getattr(self.data, s).labels.to(device)) for s in tensors}

    def new_class_encoder(self) -> ClassEncoder:
        """An untrained Class-Encoder for this data and backbone."""
        start = self.backbone.text_context([""])[0] if self.settings.class_encoder_start == "empty_prompt" else None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.seed)
            encoder = ClassEncoder(self.data.num_classes, self.backbone.tokens, self.backbone.width, start)
        return encoder.to(self.backbone.device)

    def use(self, transfer_epoch: int, finetune_epoch: int | None = None) -> ClassEncoder:
        """Loads the Class-Encoder of ``transfer_epoch`` and into the backbone the UNet of ``finetune_epoch``.

        ``None`` is the pretrained UNet. Returns the Class-Encoder, frozen.
        """
        self._loaded = None  # whatever `draw` had loaded is replaced
        encoder = self.new_class_encoder()
        encoder.load_state_dict(runs.load_tensors(train.checkpoint_path(self.run.folder("1_transfer"), transfer_epoch)))
        pretrained = self._pretrained
        if finetune_epoch is None:
            self.backbone.unet.load_state_dict(pretrained)
        else:
            path = train.checkpoint_path(self.run.folder("3_finetune"), finetune_epoch)
            self.backbone.unet.load_state_dict(runs.load_tensors(path))
        return encoder.requires_grad_(False).eval()

    def draw(
        self,
        point: dict[str, Any],
        labels: torch.Tensor,
        set_name: str,
        first_index: int = 0,
        progress: str | None = None,
    ) -> torch.Tensor:
        """Images of ``labels`` at a point {IS, UGS, transfer_epoch, finetune_epoch}: uint8, the classifier's size."""
        if self._loaded != (wanted := (point["transfer_epoch"], point["finetune_epoch"])):
            self._encoder, self._loaded = self.use(*wanted), wanted
        return generate(
            self.backbone, self._encoder, labels, num_inference_steps=point["IS"], guidance_scale=point["UGS"],
            seed=self.settings.seed, set_name=set_name, first_index=first_index, image_size=self.data.image_size,
            unconditional=self.settings.unconditional, sampler=self.settings.sampler,
            batch_size=self.settings.sample_batch_size, progress=progress,
        )  # fmt: skip

    # --- the steps ---

    def _fit(
        self, step: str, title: str, parts: Callable[[], tuple[torch.nn.Module, ClassEncoder]], **facts: Any
    ) -> pd.DataFrame:
        """A training step, unless it is done; ``parts()`` -> (what trains, the Class-Encoder)."""
        folder, prefix = self.run.folder(step), step[2:]
        if self.run.is_done(step):
            history = runs.load_json(folder / "history.json")
            return pd.DataFrame(history, index=pd.RangeIndex(1, len(history) + 1, name="epoch"))
        s = self.settings
        print(f"Step {step[0]}: {title} ({cost.text(self, step)}).")
        asked = {name: getattr(s, name) for name in runs.STEP_FIELDS[step]}
        if runs.load_json(folder / "settings.json") != asked:  # what an earlier attempt left is of other settings
            shutil.rmtree(folder)
            runs.save_json(folder / "settings.json", asked)
        start = time.perf_counter()
        trainable, encoder = parts()
        self._loaded = None  # what is about to train is no checkpoint
        history = train.fit(
            trainable, self.backbone, encoder, self.latents["train"], self.latents["val"], folder,
            epochs=getattr(s, f"{prefix}_epochs"), batch_size=getattr(s, f"{prefix}_batch_size"),
            learning_rate=getattr(s, f"{prefix}_learning_rate"), weight_decay=s.weight_decay, clip_norm=s.clip_norm,
            seed=s.seed, unconditional=s.unconditional, title=title,
        )  # fmt: skip
        self.run.record(step, time.perf_counter() - start, **facts)
        (folder / "state.safetensors").unlink(missing_ok=True)  # was needed only to go on
        return history

    def transfer(self) -> pd.DataFrame:
        """Step 1: trains the Class-Encoder alone. The loss curve, one row per epoch (see `train.fit`)."""
        return self._fit("1_transfer", "Class-Encoder", lambda: (encoder := self.new_class_encoder(), encoder))

    def _search(self, step: str, space: tune.Space, point_of: Callable[[dict], dict], on_trial) -> optuna.Study:
        s, folder = self.settings, self.run.folder(step)
        done = self.run.is_done(step)
        study = tune.open_study(folder / "journal.log", f"step {step[0]}")
        finished = len(study.get_trials(deepcopy=False, states=tune.FINISHED))
        if done and (finished >= s.n_trials or "n_trials" not in s.given):
            return study
        print(f"Step {step[0]}: the search, {s.n_trials} trials ({cost.text(self, step, space)}).")
        start = time.perf_counter()
        labels = balanced_labels(s.num_images, self.data.num_classes)

        def images_of(steps: int, guidance: float, epoch: int) -> torch.Tensor:
            # The same noise in every trial: trials differ by their parameters alone.
            return self.draw(point_of({"IS": steps, "UGS": guidance, "epoch": epoch}), labels, "trial")

        tune.search(
            study, space, images_of, labels, self.data, n_trials=s.n_trials, select_on=s.select_on, seed=s.seed,
            classifier_options=classifier_options(s), on_trial=on_trial,
        )  # fmt: skip
        self.run.record(step, time.perf_counter() - start, n_trials=s.n_trials, best=study.best_params)
        return study

    def search(self, on_trial: Callable[[optuna.Study], None] | None = None) -> optuna.Study:
        """Step 2: the first search, over IS, UGS and the Class-Encoder's epoch."""
        s = self.settings
        space = tune.Space((s.steps_min, s.steps_max), (0.0, s.guidance_max), (1, len(self.transfer())))

        def point_of(p):
            return {"IS": p["IS"], "UGS": p["UGS"], "transfer_epoch": p["epoch"], "finetune_epoch": None}

        return self._search("2_tune", space, point_of, on_trial)

    def finetune(self) -> pd.DataFrame:
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
            return self.backbone.unet, self.use(epoch)  # `use` loads the pretrained weights into the UNet

        return self._fit("3_finetune", "UNet", parts, transfer_epoch=epoch)

    def research(self, on_trial: Callable[[optuna.Study], None] | None = None) -> optuna.Study:
        """Step 4: the second search, bounded by the first, over IS, UGS and the UNet's epoch."""
        epochs = len(self.finetune())
        best, s = self.search().best_params, self.settings
        first = tune.Space((s.steps_min, s.steps_max), (0.0, s.guidance_max), (1, s.transfer_epochs))

        def point_of(p):
            return {"IS": p["IS"], "UGS": p["UGS"], "transfer_epoch": best["epoch"], "finetune_epoch": p["epoch"]}

        return self._search("4_retune", first.after(best, epochs), point_of, on_trial)

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

    def _scores(self, images: torch.Tensor, labels: torch.Tensor, title: str) -> dict[str, list[float]]:
        """CAS over the run's classifier seeds: {"test": [...], "val": [...]} as fractions."""
        found = [
            classifier.score(images, labels, self.data.val, self.data.test, self.data.num_classes,
                             seed=self.settings.seed + k, **classifier_options(self.settings))
            for k in tqdm(range(self.settings.classifier_seeds), desc=title, unit="classifier")
        ]  # fmt: skip
        return {"test": [f.test_accuracy for f in found], "val": [f.val_accuracy for f in found]}

    def _same(self, found: dict[str, Any] | None, point: dict[str, Any] | None, num_images: int) -> bool:
        """Whether a stored row of a table is what the settings ask for now."""
        asked = (point, num_images, self.settings.classifier_seeds)
        return bool(found) and asked == (found["point"], found["num_images"], len(found["test"]))

    def cas(self, row: str) -> dict[str, Any]:
        """A row of table 1: where it samples, its CAS with each classifier seed, and the seconds it took to generate.

        The images start from fresh noise, of no trial; kept in ``table_1.json``.
        """
        path = self.run.path / "table_1.json"
        rows = runs.load_json(path, {})
        point = self.point(row)
        if not self._same(rows.get(row), point, self.settings.num_images):
            labels = balanced_labels(self.settings.num_images, self.data.num_classes)
            start = time.perf_counter()
            images = self.draw(point, labels, "table 1", progress=f"{row}: generating")
            seconds = time.perf_counter() - start
            rows[row] = {"point": point, **self._scores(images, labels, f"{row}: CAS"), "seconds": seconds,
                         "num_images": len(labels), "select_on": self.settings.select_on}  # fmt: skip
            runs.save_json(path, rows)
        return rows[row]

    def synthetic(self, multiple: int) -> data.Split:
        """Step 5: the first ``multiple`` blocks of the one synthetic set, each with the real class counts.

        Block b repeats the labels of the real training set; so x1 < x2 < .. are prefixes of one set. Blocks are kept as
        ``5_datasets/block_01.npz`` ... and made where missing.
        """
        folder, labels = self.run.folder("5_datasets"), self.data.train.labels.sort().values
        point, images = self.point("after 4"), []
        for block in range(1, multiple + 1):
            path = folder / f"block_{block:02d}.npz"
            note = folder / f"block_{block:02d}.json"
            if not path.exists() or runs.load_json(note) != point:
                new = self.draw(point, labels, "synthetic", (block - 1) * len(labels), f"block {block} of {multiple}")
                with runs.whole_file(path) as temporary, open(temporary, "wb") as file:
                    np.savez(file, images=new.permute(0, 2, 3, 1).numpy(), labels=labels.numpy())
                runs.save_json(note, point)
            with np.load(path, allow_pickle=False) as file:
                images.append(torch.from_numpy(file["images"]).permute(0, 3, 1, 2))
        return data.Split(torch.cat(images), labels.repeat(multiple))

    def scaling(self) -> dict[str, dict[str, list[float]]]:
        """The row of table 2: accuracies with real images and with x1 .. xK, each seed; kept in ``table_2.json``."""
        path, point = self.run.path / "table_2.json", self.point("after 4")
        rows, start = runs.load_json(path, {}), time.perf_counter()
        rows = {name: row for name, row in rows.items() if row["point"] in (None, point)}  # none of another step 4
        names = ["real", *(f"x{k}" for k in range(1, self.settings.max_multiple + 1))]
        n = len(self.data.train)  # of each set: where it samples, how many images
        wanted = {name: (None, n) if name == "real" else (point, int(name[1:]) * n) for name in names}
        if not all(self._same(rows.get(name), *wanted[name]) for name in names):
            print(f"Step 5: {names[-1]} synthetic set, {len(names)} x {self.settings.classifier_seeds} classifiers "
                  f"({cost.text(self, '5_datasets')}).")  # fmt: skip
        for name in names:
            at, _ = wanted[name]
            if not self._same(rows.get(name), *wanted[name]):
                split = self.data.train if name == "real" else self.synthetic(int(name[1:]))
                rows[name] = {"point": at, "num_images": len(split), **self._scores(split.images, split.labels, name)}
                runs.save_json(path, rows)
        if not self.run.is_done("5_datasets"):
            self.run.record("5_datasets", time.perf_counter() - start)
        return {name: rows[name] for name in names}
