"""Explorers of the sampler and the searches: things to move, and what they do. Each is a `widgets.Explorer`."""

from __future__ import annotations

import time

import ipywidgets
import numpy as np
import optuna
import pandas as pd
import torch
from matplotlib.figure import Figure

from ..course import Course, Point
from ..diffusion.backbone import Backbone
from ..diffusion.conditions import Condition, Conditioner
from ..diffusion.generate import balanced_labels
from ..diffusion.samplers import SAMPLERS, guided_noise, inference_timesteps
from ..machine.seeds import image_noise
from ..search.search import chosen, trials_frame
from ..search.study import FINISHED, open_study
from . import figures
from .search_figures import PANELS, best_trial, heights, is_pruned, trials_by_parameter
from .widgets import Clickable, Explorer, Words, picker, picture, show

JOURNAL = "journal.log"  # where a search of one process keeps its trials, in its step's folder
SEARCHES = (2, 4)  # the steps that search
MANY = 10  # images shown at once


# --- guidance ---


class GuidanceExplorer(Explorer):
    """Sliders for IS and UGS and a class picker: the same starting noises, redrawn at once.

    What is told to the UNet is that of the chosen trial of ``study`` (step 2); below the pictures stands the accuracy
    of the complete trial nearest to the sliders. Where all were pruned, they stand in, and it is said.
    ``steps``, ``scale`` and ``who`` are the three controls.
    """

    def __init__(self, course: Course, study: optuna.Study):
        s, names = course.settings, course.data.class_names
        self.course, frame = course, trials_frame(study)
        best, complete = best_trial(frame), frame[~is_pruned(frame)]
        self.frame = complete if len(complete) else frame
        self.epoch, most, ugs = int(best.epoch), max(s.steps_max, int(best.IS)), round(float(best.UGS), 1)
        how = {"continuous_update": False}  # a drawing takes its time
        self.steps = ipywidgets.IntSlider(value=int(best.IS), min=1, max=most, description="IS", **how)
        self.scale = ipywidgets.FloatSlider(value=ugs, min=0, max=s.guidance_max, step=0.1, description="UGS", **how)
        self.who = picker(names, ("one of each", None))
        self.image, self.words = picture(), Words()
        controls = (self.steps, self.scale, self.who)
        for control in controls:
            control.observe(lambda _: show(self.image, self._draw()), "value")
        show(self.image, self._draw())
        super().__init__(
            ipywidgets.VBox([ipywidgets.HBox(controls), self.image, self.words]),
            self._draw,
            "Images of the chosen trial; sliders for IS and UGS in a live notebook",
        )

    def _draw(self) -> Figure:
        names, who, where = self.course.data.class_names, self.who.value, (self.steps.value, self.scale.value)
        labels = balanced_labels(MANY, len(names)) if who is None else torch.full((MANY,), who)
        start = time.perf_counter()
        images = self.course.draw(Point(*where, self.epoch), labels, "explorer")
        seconds = time.perf_counter() - start
        near = nearest_trial(self.frame, dict(zip(("IS", "UGS"), where)))
        when = " when it was pruned" if near.pruned else ""
        self.words.say(
            f"drawn in {seconds:.2f} s | nearest trial, number {near.name}: IS {near.IS:.0f}, UGS {near.UGS:.2f}, "
            f"accuracy {near.value:.1%}{when}"
        )
        title = f"IS {where[0]}, UGS {where[1]:.1f}; accuracy of the nearest trial {near.value:.1%}{when}"
        return figures.image_grid([images], [""], [names[i] for i in labels], scale=0.95, title=title)


def nearest_trial(frame: pd.DataFrame, point: dict[str, float]) -> pd.Series:
    """The row of `trials_frame` nearest in IS and UGS, each measured by the width of its range."""
    spans = {name: max(frame[name].max() - frame[name].min(), 1e-9) for name in point}
    distance = sum(((frame[name] - value) / spans[name]) ** 2 for name, value in point.items())
    return frame.loc[distance.idxmin()]


# --- denoising ---


@torch.no_grad()
def walk(
    backbone: Backbone,
    condition: Condition,
    unconditional: Condition,
    noise: torch.Tensor,
    num_inference_steps: int,
    guidance_scale: float,
    sampler: str = "ddim",
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Every step of one image's way: what the sampler had, what it predicted, and where the condition pushed.

    The conditions of one image (B = 1), noise (1, C, H, W) -> a list of (latents before the step, predicted x_0, eps
    with the condition - eps without), each (1, C, H, W).
    """
    before, pushes, predictions = [], [], []

    def guided(latents: torch.Tensor, t: int) -> torch.Tensor:
        told, untold = (
            guided_noise(backbone.predict_noise, latents, t, condition, unconditional, scale) for scale in (1.0, 0.0)
        )
        before.append(latents)
        pushes.append(told - untold)
        return untold + guidance_scale * (told - untold)

    def seen(i: int, latents: torch.Tensor, predicted: torch.Tensor) -> None:
        predictions.append(predicted)

    SAMPLERS[sampler](guided, noise.to(backbone.device), num_inference_steps, backbone.alphas_cumprod, seen)
    return list(zip(before, predictions, pushes))


class DenoisingExplorer(Explorer):
    """A scrubber over the steps of one image: latents, predicted x_0 and the direction of the class side by side.

    ``conditioner``: tells the UNet of a class. ``step`` and ``who`` are the controls.
    """

    SHOWN = {"latents": "latents", "predicted": "predicted x0", "push": "push of the class"}

    def __init__(
        self,
        backbone: Backbone,
        conditioner: Conditioner,
        class_names: tuple[str, ...],
        num_inference_steps: int = 20,
        guidance_scale: float = 3.0,
        seed: int = 0,
    ):
        self.backbone, self.conditioner, self.class_names, self.seed = backbone, conditioner, class_names, seed
        self.num_inference_steps, self.guidance_scale = num_inference_steps, guidance_scale
        self.timesteps = inference_timesteps(num_inference_steps).tolist()
        half = max(1, num_inference_steps // 2)
        self.step = ipywidgets.IntSlider(value=half, min=1, max=num_inference_steps, description="step")
        play = ipywidgets.Play(value=half, min=1, max=num_inference_steps, interval=300)
        ipywidgets.jslink((play, "value"), (self.step, "value"))
        self.who, self.image = picker(class_names), picture()
        self.seen: dict[str, torch.Tensor] = {}  # uint8 (steps, 3, H, W) each
        self._walk()
        show(self.image, self._draw())
        self.step.observe(lambda _: show(self.image, self._draw()), "value")
        self.who.observe(lambda _: self._another(), "value")
        super().__init__(
            ipywidgets.VBox([ipywidgets.HBox([play, self.step, self.who]), self.image]),
            self._still,
            "The steps of one image; a slider over them in a live notebook",
        )

    def _another(self) -> None:
        self._walk()
        show(self.image, self._draw())

    @torch.no_grad()
    def _walk(self) -> None:
        condition = self.conditioner(torch.tensor([self.who.value]), torch.tensor([0]), self.seed)
        noise = image_noise(self.seed, "denoising", [0], self.backbone.latent_shape)
        how = (self.num_inference_steps, self.guidance_scale)
        way = walk(self.backbone, condition, self.conditioner.unconditional(), noise, *how)
        latents, predicted, push = (torch.cat(part) for part in zip(*way))
        drawn = {"latents": self.backbone.decode(latents), "predicted": self.backbone.decode(predicted)}
        self.seen = {name: images.cpu() for name, images in drawn.items()} | {"push": self._shade(push)}

    def _shade(self, push: torch.Tensor) -> torch.Tensor:
        """How hard, and where, as grey images: darker where harder, white where the class changes nothing."""
        size = push.square().mean(1, keepdim=True).sqrt()  # over the channels
        grey = 255 * (1 - size / size.max().clamp_min(1e-12))
        side = self.backbone.image_size // size.shape[-1]
        grey = grey.round().to(torch.uint8).cpu().repeat_interleave(side, -1).repeat_interleave(side, -2)
        return grey.expand(-1, 3, -1, -1)

    def _draw(self) -> Figure:
        i = self.step.value - 1
        title = f"step {self.step.value} of {self.num_inference_steps}, t = {self.timesteps[i]}"
        images = torch.stack([self.seen[name][i] for name in self.SHOWN])
        return figures.image_grid([images], [""], list(self.SHOWN.values()), scale=1.9, title=title)

    def _still(self) -> Figure:
        last = self.num_inference_steps - 1
        at = np.unique(np.linspace(0, last, min(MANY, last + 1)).round().astype(int))
        rows = [self.seen[name][at] for name in self.SHOWN]
        title = f"class {self.class_names[self.who.value]}, UGS {self.guidance_scale:g}"
        columns = [f"t={self.timesteps[i]}" for i in at]
        return figures.image_grid(rows, list(self.SHOWN.values()), columns, scale=0.8, title=title)


# --- the search ---


class SearchExplorer(Explorer):
    """The trials of a search as points; a click shows the images that a trial was scored on."""

    def __init__(self, course: Course, step: int = 2):
        """``step``: 2 or 4, whose search. It need not have begun: hand `update` to it as ``on_trial``."""
        if step not in SEARCHES:
            raise ValueError(f"step must be one of {', '.join(map(str, SEARCHES))} (the searches), not {step!r}.")
        self.course, self.step, self.study, self.chosen = course, step, None, None
        self.points, self.image, self.words = Clickable(), picture(), Words()
        self.words.say("waiting for the first trial ...")
        refresh = ipywidgets.Button(description="refresh", tooltip="reads the trials that another process added")
        refresh.on_click(lambda _: self.update())
        super().__init__(
            ipywidgets.VBox([self.points, ipywidgets.HBox([refresh, self.words]), self.image]),
            self._still,
            f"The trials of step {step}; a click on one shows its images in a live notebook",
        )
        self.update()

    def update(self, study: optuna.Study | None = None) -> None:
        """Draws the trials that there are now: of ``study``, or those in the run's folder, of any process."""
        if study is None:
            study = self._kept()
        if study is None or not study.get_trials(deepcopy=False, states=FINISHED):
            return
        self.study, self.frame = study, trials_frame(study)
        if self.chosen is None:
            self.words.say(f"{len(self.frame)} trials: click on one")
        figure, spots = self._figure()
        self.points.draw(figure, spots, lambda i: self.choose(self.frame.index[i % len(self.frame)]))

    def _kept(self) -> optuna.Study | None:
        method, run = self.course.method, self.course.run
        step = method.tune_step() if self.step == 2 else method.retune_step()
        journal, finished = run.folder(step) / JOURNAL, run.peek(step)
        name = finished.facts["study"] if finished else f"step {self.step}"  # a shared one has another name
        return open_study(journal, name) if journal.exists() else None

    def choose(self, trial: int) -> None:
        """Shows the images of ``trial``, by its number: the first of those that it was scored on."""
        row, names = self.frame.loc[trial], self.course.data.class_names
        labels = balanced_labels(self.course.settings.num_images, len(names))[: 2 * min(len(names), MANY)]
        images = self.course.draw(self._point(row), labels, "trial")
        half = len(labels) // 2
        columns = [names[i] for i in labels[:half]]
        show(self.image, figures.image_grid([images[:half], images[half:]], ["", ""], columns))
        self.chosen = trial
        self.words.say(f"trial {trial}: IS {row.IS:.0f}, UGS {row.UGS:.2f}, epoch {row.epoch:.0f}, {_reached(row)}")
        self.update(self.study)

    def _point(self, row: pd.Series) -> Point:
        steps, guidance, epoch = int(row.IS), float(row.UGS), int(row.epoch)
        if self.step == 2:
            return Point(steps, guidance, epoch)
        return Point(steps, guidance, chosen(self.course.tune()).params["epoch"], epoch)

    def _figure(self) -> tuple[Figure, list]:
        figure = trials_by_parameter(self.frame, self.chosen)
        at, spots = self.frame.assign(value=heights(self.frame)), []
        for ax, (x, y) in zip(figure.axes, PANELS):
            spots += [(ax, at[x][n], at[y][n], f"trial {n}: {_reached(row)}") for n, row in self.frame.iterrows()]
        return figure, spots

    def _still(self) -> Figure:
        if self.study is None:
            figure, ax = figures.new_axes(size=(6, 0.6))
            ax.text(0.5, 0.5, "waiting for the first trial ...", ha="center", va="center")
            ax.axis("off")
            return figure
        return self._figure()[0]


def _reached(row: pd.Series) -> str:
    """What is said of a trial: the accuracy of a pruned one never without the epochs that it had."""
    if row.pruned:
        return f"pruned after {row.classifier_epochs:.0f} epochs, at {row.value:.1%}"
    return f"accuracy {row.value:.1%}" + ("" if np.isnan(row.rescored) else f", drawn anew {row.rescored:.1%}")
