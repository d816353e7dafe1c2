"""Explorers of the sampler: things to move, and what they do. Each returns a `widgets.Explorer`."""

from __future__ import annotations

import time
from typing import Any

import ipywidgets
import numpy as np
import optuna
import torch
from matplotlib.figure import Figure

from . import figures, report, tune
from .backbone import Backbone
from .class_encoder import ClassEncoder
from .course import Course
from .diffusion import SAMPLERS, guided_noise, inference_timesteps
from .sample import balanced_labels, initial_noise
from .widgets import Clickable, Explorer, picture, show

SEARCHES = {2: "2_tune", 4: "4_retune"}
MANY = 10  # images shown at once


# --- guidance ---


def guidance(course: Course, study: optuna.Study) -> Explorer:
    """Sliders for IS and UGS and a class picker: the same starting noises, redrawn at once.

    The Class-Encoder is that of the best trial of ``study`` (step 2); beside the pictures stands the accuracy of the
    trial nearest to the sliders. The explorer has ``steps``, ``scale`` and ``who``, the three controls.
    """
    s, names, frame = course.settings, course.data.class_names, tune.trials_frame(study)
    best = study.best_params
    steps = ipywidgets.IntSlider(
        value=best["IS"], min=1, max=max(s.steps_max, best["IS"]), description="IS", continuous_update=False
    )
    scale = ipywidgets.FloatSlider(
        value=round(best["UGS"], 1), min=0, max=s.guidance_max, step=0.1, description="UGS", continuous_update=False
    )
    who = ipywidgets.Dropdown(
        options=[("one of each", None), *((n, i) for i, n in enumerate(names))], description="class"
    )
    image, words = picture(), ipywidgets.HTML()

    def draw() -> Figure:
        labels = balanced_labels(MANY, len(names)) if who.value is None else torch.full((MANY,), who.value)
        point = {"IS": steps.value, "UGS": scale.value, "transfer_epoch": best["epoch"], "finetune_epoch": None}
        start = time.perf_counter()
        images = course.draw(point, labels, "explorer")
        seconds = time.perf_counter() - start
        near = nearest_trial(frame, {"IS": steps.value, "UGS": scale.value})
        words.value = (
            f"drawn in {seconds:.2f} s &nbsp;|&nbsp; nearest trial, number {near.name}: IS {near.IS:.0f}, "
            f"UGS {near.UGS:.2f}, CAS {near.value:.1%}" + (" when it was pruned" if near.pruned else "")
        )
        title = f"IS {steps.value}, UGS {scale.value:.1f}; CAS of the nearest trial {near.value:.1%}"
        return figures.image_grid([images], [""], [names[i] for i in labels], scale=0.95, title=title)

    for control in (steps, scale, who):
        control.observe(lambda _: show(image, draw()), "value")
    show(image, draw())
    widget = ipywidgets.VBox([ipywidgets.HBox([steps, scale, who]), image, words])
    explorer = Explorer(widget, draw, "Images of the best trial; sliders for IS and UGS in a live notebook")
    explorer.steps, explorer.scale, explorer.who, explorer.image, explorer.words = steps, scale, who, image, words
    return explorer


def nearest_trial(frame, point: dict[str, float]):
    """The row of `tune.trials_frame` nearest in IS and UGS, each measured by the width of its range."""
    distance = sum(
        ((frame[name] - value) / max(frame[name].max() - frame[name].min(), 1e-9)) ** 2
        for name, value in point.items()
    )  # fmt: skip
    return frame.loc[distance.idxmin()]


# --- denoising ---


@torch.no_grad()
def walk(
    backbone: Backbone, context: torch.Tensor, unconditional: torch.Tensor, noise: torch.Tensor,
    num_inference_steps: int, guidance_scale: float, sampler: str = "ddim",
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:  # fmt: skip
    """Every step of one image's way: what the sampler had, what it predicted, and where the class pushed.

    context (1, tokens, width), unconditional (tokens, width), noise (1, C, H, W) -> a list of (latents before the
    step, predicted x_0, eps with the class - eps without), each (1, C, H, W).
    """
    before, pushes, predictions = [], [], []

    def guided(latents, t):
        with_class, without = (
            guided_noise(backbone.predict_noise, latents, t, context, unconditional, scale) for scale in (1.0, 0.0)
        )
        before.append(latents)
        pushes.append(with_class - without)
        return without + guidance_scale * (with_class - without)

    SAMPLERS[sampler](
        guided, noise.to(backbone.device), num_inference_steps, backbone.alphas_cumprod,
        lambda i, latents, predicted: predictions.append(predicted),
    )  # fmt: skip
    return list(zip(before, predictions, pushes))


def denoising(
    backbone: Backbone, class_encoder: ClassEncoder, class_names: tuple[str, ...], num_inference_steps: int = 20,
    guidance_scale: float = 3.0, seed: int = 0,
) -> Explorer:  # fmt: skip
    """A scrubber over the steps of one image: latents, predicted x_0 and the direction of the class side by side.

    The explorer has ``step`` and ``who``, its controls.
    """
    contexts, away_from = class_encoder.contexts().detach(), class_encoder.unconditional("zero").detach()
    noise = initial_noise(seed, "denoising", [0], backbone.latent_shape)
    timesteps = inference_timesteps(num_inference_steps).tolist()
    step = ipywidgets.IntSlider(value=num_inference_steps // 2, min=1, max=num_inference_steps, description="step")
    play = ipywidgets.Play(value=step.value, min=1, max=num_inference_steps, interval=300)
    ipywidgets.jslink((play, "value"), (step, "value"))
    who = ipywidgets.Dropdown(options=[(n, i) for i, n in enumerate(class_names)], description="class")
    image, seen = picture(), {}

    def take_walk() -> None:
        way = walk(backbone, contexts[[who.value]], away_from, noise, num_inference_steps, guidance_scale)
        latents, predicted, push = (torch.cat(part) for part in zip(*way))
        size = push.square().mean(1, keepdim=True).sqrt()  # over the channels: how hard, and where
        size = (255 * (1 - size / size.max())).round().to(torch.uint8).cpu()
        side = backbone.image_size // size.shape[-1]
        size = size.repeat_interleave(side, -1).repeat_interleave(side, -2).expand(-1, 3, -1, -1)
        seen.update(latents=backbone.decode(latents).cpu(), predicted=backbone.decode(predicted).cpu(), push=size)

    def draw(_=None) -> Figure:
        i = step.value - 1
        return figures.image_grid(
            [torch.stack([seen[name][i] for name in ("latents", "predicted", "push")])], [""],
            ["latents", "predicted x0", "push of the class"], scale=1.9,
            title=f"step {step.value} of {num_inference_steps}, t = {timesteps[i]}",
        )  # fmt: skip

    def still() -> Figure:
        shown = np.unique(np.linspace(0, num_inference_steps - 1, min(MANY, num_inference_steps)).round().astype(int))
        return figures.image_grid(
            [seen[name][shown] for name in ("latents", "predicted", "push")],
            ["latents", "predicted x0", "push of the class"], [f"t={timesteps[i]}" for i in shown], scale=0.8,
            title=f"class {class_names[who.value]}, UGS {guidance_scale:g}",
        )  # fmt: skip

    take_walk()
    step.observe(lambda _: show(image, draw()), "value")
    who.observe(lambda _: (take_walk(), show(image, draw())), "value")
    show(image, draw())
    widget = ipywidgets.VBox([ipywidgets.HBox([play, step, who]), image])
    explorer = Explorer(widget, still, "The steps of one image; a slider over them in a live notebook")
    explorer.step, explorer.who, explorer.image, explorer.seen = step, who, image, seen
    return explorer


# --- the search ---


class SearchExplorer(Explorer):
    """The trials of a search as points; a click shows the images that a trial was scored on."""

    def __init__(self, course: Course, step: int = 2):
        """``step``: 2 or 4, whose search. It need not have begun: hand `update` to it as ``on_trial``."""
        if step not in SEARCHES:
            raise ValueError(f"step must be one of {', '.join(map(str, SEARCHES))} (the searches), not {step!r}.")
        self.course, self.step, self.study, self.chosen = course, step, None, None
        self.points, self.image = Clickable(), picture()
        self.words = ipywidgets.HTML("waiting for the first trial ...")
        refresh = ipywidgets.Button(description="refresh", tooltip="reads the trials that another process added")
        refresh.on_click(lambda _: self.update())
        super().__init__(
            ipywidgets.VBox([self.points, ipywidgets.HBox([refresh, self.words]), self.image]),
            self._still, f"The trials of step {step}; a click on one shows its images in a live notebook",
        )  # fmt: skip
        self.update()

    def update(self, study: optuna.Study | None = None) -> None:
        """Draws the trials that there are now: of ``study``, or as the run folder has them."""
        journal = self.course.run.path / SEARCHES[self.step] / "journal.log"
        if study is None and journal.exists():
            study = tune.open_study(journal, f"step {self.step}")
        if study is None or not study.get_trials(deepcopy=False, states=tune.FINISHED):
            return
        self.study, self.frame = study, tune.trials_frame(study)
        if self.chosen is None:
            self.words.value = f"{len(self.frame)} trials: click on one"
        figure, spots = self._figure()
        self.points.draw(figure, spots, lambda i: self.choose(self.frame.index[i % len(self.frame)]))

    def choose(self, trial: int) -> None:
        """Shows the images of ``trial``, by its number: the first of those that it was scored on."""
        row, names = self.frame.loc[trial], self.course.data.class_names
        point = {"IS": int(row.IS), "UGS": float(row.UGS), **self._epochs(int(row.epoch))}
        labels = balanced_labels(self.course.settings.num_images, len(names))[: 2 * min(len(names), MANY)]
        images = self.course.draw(point, labels, "trial")
        half = len(labels) // 2
        show(
            self.image, figures.image_grid([images[:half], images[half:]], ["", ""], [names[i] for i in labels[:half]])
        )
        self.chosen = trial
        self.words.value = (
            f"trial {trial}: IS {row.IS:.0f}, UGS {row.UGS:.2f}, epoch {row.epoch:.0f}, CAS {row.value:.1%}"
            + (f", pruned after {row.classifier_epochs:.0f} epochs" if row.pruned else "")
        )
        self.update(self.study)

    def _epochs(self, epoch: int) -> dict[str, Any]:
        if self.step == 2:
            return {"transfer_epoch": epoch, "finetune_epoch": None}
        return {"transfer_epoch": self.course.search().best_params["epoch"], "finetune_epoch": epoch}

    def _figure(self) -> tuple[Figure, list]:
        figure = report.trials_by_parameter(self.frame, self.chosen)
        spots = []
        for ax, (x, y) in zip(figure.axes, report.PANELS):
            spots += [(ax, row[x], row[y], f"trial {row.name}: {row.value:.1%}") for _, row in self.frame.iterrows()]
        return figure, spots

    def _still(self) -> Figure:
        if self.study is None:
            figure, ax = figures.new_axes(size=(6, 0.6))
            ax.text(0.5, 0.5, "waiting for the first trial ...", ha="center", va="center")
            ax.axis("off")
            return figure
        return self._figure()[0]
