"""What several rooms' tests need: the tiny model, a model whose right answers are known, a finished micro run."""

import copy
import dataclasses
import threading
import types

import optuna
import pytest
import small as small_run
import torch

from sdgen_lib.classify import networks
from sdgen_lib.config import settings
from sdgen_lib.course import ROWS, Course
from sdgen_lib.diffusion import backbone
from sdgen_lib.evaluate.scaling import scaling_work
from sdgen_lib.machine.passes import total
from sdgen_lib.work import cost


def pytest_addoption(parser):
    parser.addoption("--screenshots", metavar="DIR", help="leave pictures of the chapters in JupyterLab there")


@pytest.fixture(scope="session")
def tiny():
    """The shipped tiny model on the CPU in float32: tests compare to rounding."""
    return backbone.load("tiny", device="cpu", precision="fp32")


@pytest.fixture
def tiny_copy(tiny):
    """The tiny model with a UNet of its own, which a test may change."""
    return dataclasses.replace(tiny, unet=copy.deepcopy(tiny.unet))


def predict_of_flat_images(alphas_cumprod):
    """The exact noise of noisy flat images: the context (B, 1, 4) holds the value of each latent channel."""

    def predict_noise(latents, t, condition):
        alpha_bar = alphas_cumprod[t].view(-1, 1, 1, 1)
        return (latents - alpha_bar.sqrt() * condition.context.view(-1, 4, 1, 1)) / (1 - alpha_bar).sqrt()

    return predict_noise


@pytest.fixture
def flat_model():
    """Stands for a backbone that knows everything about its data: images of one value per channel, set by the context.

    Latents are (4, 2, 2), contexts (1, 4), ten timesteps whose alpha_bar is 0.5: an error e of a channel's value
    costs exactly e squared in the loss.
    """
    alphas_cumprod = torch.full((10,), 0.5)
    return types.SimpleNamespace(
        alphas_cumprod=alphas_cumprod,
        predict_noise=predict_of_flat_images(alphas_cumprod),
        device="cpu",
        text_context=lambda prompts: torch.zeros(len(prompts), 1, 4),
        dtype=torch.float32,
        loss_weight=lambda t: None,
        unet=types.SimpleNamespace(is_gradient_checkpointing=False, disable_gradient_checkpointing=lambda: None),
    )


MICRO = dict(
    dataset="digits:100",
    backbone="tiny",
    recipe="demo",
    precision="fp32",
    transfer_epochs=2,
    finetune_epochs=2,
    transfer_epoch_images="none",
    finetune_epoch_images="none",
    n_trials=4,
    num_images=40,
    classifier_epochs=3,
    classifier_seeds=2,
    classifier_epoch_images=1,
    max_multiple=2,
    default_steps=5,
    steps_min=5,
    steps_max=6,
    rescored=1,  # as many as there are complete trials, whatever was pruned
    rescoring_classifiers=2,
    rescoring_images=50,
    guidance_min=0.0,
    guidance_max=7.5,
    inversion_images=20,
    inversion_visits=3,
    inversion_steps=5,
    augmented_images=20,
    augmented_steps=3,
    augmented_tail_largest=5,
    worth_images=20,
    worth_steps=5,
    worth_multiple=2,
)


@pytest.fixture(scope="session")
def micro():
    """``micro(runs_dir, **changes)`` -> the settings of the smallest run that passes through every step."""
    return lambda runs_dir, **changes: settings.resolve(**{**MICRO, "runs_dir": str(runs_dir), **changes})


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """``small(runs_dir, **changes)`` -> a course of the smallest run there is, see `small.SMALL`."""
    path = small_run.write_dataset(tmp_path_factory.mktemp("data") / "small.npz")

    def course(runs_dir, **changes):
        given = {"dataset": str(path), **small_run.SMALL, "runs_dir": str(runs_dir), **changes}
        return Course(settings.resolve(**given))

    return course


@dataclasses.dataclass
class Finished:
    """A micro run through every step: its folder's base, results, and the work that each step really did.

    ``work[step]`` counts images: "pass" through the UNet without a gradient, "trained" through it with one, "encode"
    and "decode" through the VAE, "classifier" through a classifier in training.
    """

    runs_dir: str
    course: Course
    rows: dict
    scaling: dict
    work: dict


@pytest.fixture(scope="session")
def finished(tmp_path_factory, micro):
    runs_dir = tmp_path_factory.mktemp("runs")
    course = Course(micro(runs_dir))
    works = [step.work() for step in course.method.steps()] + [scaling_work(course.workspace, course.source())]
    cost.seconds(course.backbone, total(works))  # now, so that its own passes are not counted
    work, now, counting = {}, {}, threading.Lock()
    predict_noise, forward = backbone.Backbone._predict, networks.ResNet20.forward
    encode, decode = backbone.Backbone.encode, backbone.Backbone.decode

    def counted_predict(self, unet, latents, t, condition):
        now["trained" if torch.is_grad_enabled() else "pass"] += len(latents)
        return predict_noise(self, unet, latents, t, condition)

    def counted_forward(self, images):
        with counting:  # a table's classifiers may train in several threads
            now["classifier"] += len(images) if self.training else 0
        return forward(self, images)

    def counted_encode(self, images, *args):
        now["encode"] += len(images)
        return encode(self, images, *args)

    def counted_decode(self, latents):
        now["decode"] += len(latents)
        return decode(self, latents)

    def counted(step, call):
        nonlocal now
        now = work[step] = dict.fromkeys(("pass", "trained", "encode", "decode", "classifier"), 0)
        return call()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backbone.Backbone, "_predict", counted_predict)
        patch.setattr(backbone.Backbone, "encode", counted_encode)
        patch.setattr(backbone.Backbone, "decode", counted_decode)
        patch.setattr(networks.ResNet20, "forward", counted_forward)
        for step, call in (
            ("1_transfer", course.transfer),
            ("2_tune", course.tune),
            ("3_finetune", course.finetune),
            ("4_retune", course.retune),
        ):
            counted(step, call)
        rows = counted("table 1", lambda: {row: course.cas(row) for row in ROWS})
        scaling = counted("5_datasets", course.scaling)
    return Finished(str(runs_dir), course, rows, scaling, work)


DISTRIBUTIONS = {
    "IS": optuna.distributions.IntDistribution(1, 101),
    "UGS": optuna.distributions.FloatDistribution(0.0, 1.0),
    "epoch": optuna.distributions.IntDistribution(1, 10),
}


@pytest.fixture
def study_of():
    """``study_of(rows)`` -> a study of trials made by hand, from rows (IS, UGS, epoch, value, pruned)."""

    def make(rows, distributions=DISTRIBUTIONS, name="by hand"):
        study = optuna.create_study(direction="maximize", study_name=name)
        for steps, guidance, epoch, value, pruned in rows:
            state = optuna.trial.TrialState.PRUNED if pruned else optuna.trial.TrialState.COMPLETE
            study.add_trial(
                optuna.trial.create_trial(
                    params={"IS": steps, "UGS": guidance, "epoch": epoch},
                    distributions=distributions,
                    state=state,
                    value=None if pruned else value,
                    user_attrs={
                        "value": value,
                        "val_accuracy": value,
                        "test_accuracy": value / 2,
                        "classifier_epochs": 3 if pruned else 9,
                        "seconds": 1.5,
                    },
                    intermediate_values=dict.fromkeys(range(1, 4 if pruned else 10), value),
                )
            )
        return study

    return make
