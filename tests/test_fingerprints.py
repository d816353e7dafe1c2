"""A result is another one exactly where a setting is another one that its making reads."""

import contextlib
import dataclasses
import shutil

import pytest
import small as small_run

from sdgen_lib.config.settings import FIELDS, Settings, resolve
from sdgen_lib.course import ROWS, Course
from sdgen_lib.diffusion.weights import TINY
from sdgen_lib.evaluate import cas, scaling, sets
from sdgen_lib.methods.augmented import AugmentedMethod
from sdgen_lib.methods.inversion import InversionMethod
from sdgen_lib.store.run import Run
from sdgen_lib.work.workspace import Workspace

# Another value of each setting, allowed beside all the others of the small run.
OTHER = dict(
    dataset=None,  # the content counts, see below
    backbone=None,
    recipe=None,
    runs_dir=None,
    storage=None,
    seed=1,
    image_size=None,
    antialias=False,
    precision="bf16",
    class_encoder_rank=3,
    class_encoder_tokens=5,
    class_encoder_start="random",
    unconditional="class_mean",
    transfer_epochs=3,
    transfer_epoch_images=7,
    transfer_batch_size=3,
    transfer_learning_rate=0.05,
    finetune_epochs=1,
    finetune_epoch_images=7,
    finetune_encoder_learning_rate=0.01,
    label_dropout=0.3,
    finetune_batch_size=3,
    finetune_learning_rate=2e-4,
    weight_decay=0.1,
    clip_norm=1.0,
    finetune_method="lora",
    lora_rank=2,
    optimizer="adamw",
    gradient_checkpointing=True,
    keep_unets="used",
    sampler="dpm-solver++",
    sample_batch_size=5,
    compile_unet="no",
    default_steps=1,
    default_guidance=2.0,
    n_trials=5,
    n_trials_retune=3,
    pruning=False,
    num_images=8,
    steps_min=2,
    steps_max=3,
    guidance_min=0.5,
    guidance_max=2.5,
    incumbent_first=False,
    rescored=1,
    rescoring_classifiers=4,
    rescoring_images=20,
    select_on="test",
    inversion_images=4,
    inversion_tokens=3,
    inversion_start="uniform",
    inversion_groups="class",
    inversion_group_images=2,
    inversion_visits=3,
    inversion_checkpoints=1,
    inversion_batch_size=3,
    inversion_optimizer="adamw",
    inversion_learning_rate=0.01,
    inversion_schedule="constant",
    inversion_weight_decay=0.1,
    inversion_steps=1,
    inversion_guidance=3.0,
    inversion_unconditional="class_mean",
    inversion_noise=0.2,
    inversion_noise_unit="spread",
    inversion_interpolation=0.3,
    inversion_partners="released",
    inversion_study="noise",
    augmented_backbone="tiny",
    augmented_images=4,
    augmented_conditioning="cutmix",
    augmented_protocol="released",
    augmented_dropout=0.2,
    augmented_noise_level=5,
    augmented_strength=0.5,
    augmented_text="prompt",
    augmented_prompt="{}",
    augmented_steps=1,
    augmented_guidance=3.0,
    augmented_tail_factor=10.0,
    augmented_tail_largest=3,
    augmented_others=True,
    augmented_study="shots",
    worth_generator="after 1",
    worth_steps=7,
    worth_guidance=2.5,
    worth_images=4,
    worth_multiple=2,
    mixing_study="amount",
    shifted_to="digits",
    classifier_width=5,
    classifier_shortcut="max_pool",
    classifier_epochs=3,
    classifier_batch_size=5,
    classifier_learning_rate=1e-2,
    label_smoothing=0.2,
    plateau_patience=3,
    stop_patience=3,
    search_plateau_patience=2,
    search_stop_patience=2,
    classifier_epoch_images=12,
    classifier_epoch_limit=12,
    classifier_val_images=6,
    classifier_seeds=3,
    max_multiple=3,
    class_mix="balanced",
    larger_sets="random",
)


def results(course: Course) -> dict:
    """Every kind of result of a run: a step by its name."""
    ws, source = course.workspace, course.source()
    steps = [ws.latents_step, *course.method.steps()]
    steps += [cas.cas_step(ws, course.source(row)) for row in ROWS]
    steps += [sets.block_step(ws, source, block) for block in (0, 1, 2)]
    steps += [scaling.scaling_step(ws, source, name) for name in ("real", "x1", "x2")]
    inversion = InversionMethod(ws)
    steps += [inversion.group_step(0), inversion.vectors_step(1)]
    steps += [sets.block_step(ws, inversion.source(1), 1)]
    steps += [sets.block_step(ws, AugmentedMethod(ws.on("tiny-unclip")).source("mixup"), 1)]
    return {name_of(step): step for step in steps}


def name_of(step) -> str:
    """A step's name; that of a block of the other method's images says so."""
    inverted = any(need.name.startswith("inversion/") for need in step.needs)
    augmented = "conditioning" in step.inputs
    return step.name + (" of inversion" if inverted else " of augmented" if augmented else "")


def upstream(step) -> set[str]:
    """The names of a step and of all the steps that it needs."""
    return {name_of(step)}.union(*(upstream(need) for need in step.needs))


class Spied(Settings):
    """Settings that note which field was read while which result was being made."""

    reads: dict = {}
    making: list = []

    def __getattribute__(self, name):
        if name in FIELDS and Spied.making and Spied.making[-1]:
            Spied.reads.setdefault(Spied.making[-1], set()).add(name)
        return super().__getattribute__(name)


@contextlib.contextmanager
def making(name):
    Spied.making.append(name)
    try:
        yield
    finally:
        Spied.making.pop()


@pytest.fixture(scope="module")
def read(small, tmp_path_factory):
    """For each result the settings that were really read while it was made, over runs that take every branch."""
    make, fingerprint, record = Run._make, Run.fingerprint, Run._record
    with pytest.MonkeyPatch.context() as patch:

        def spied_make(self, step):
            with making(name_of(step)):
                make(self, step)

        def unseen(function):
            def quiet(*args):
                with making(None):  # it reads what a step declares, and not what the step's work needs
                    return function(*args)

            return quiet

        patch.setattr(Run, "_make", spied_make)
        patch.setattr(Run, "fingerprint", unseen(fingerprint))
        patch.setattr(Run, "_record", unseen(record))
        # What it will cost, and whether compiling makes up for its minute, changes no result but for rounding.
        patch.setattr(Workspace, "_announcement", unseen(Workspace._announcement))
        patch.setattr(Workspace, "compiles", unseen(Workspace.compiles))
        Spied.reads, Spied.making = {}, []
        for changes in ({}, {"finetune_method": "lora", "larger_sets": "random", "unconditional": "class_mean"}):
            plain = small(tmp_path_factory.mktemp("spied"), **changes).settings
            course = Course(Spied(**{f.name: getattr(plain, f.name) for f in dataclasses.fields(plain)}))
            for step in results(course).values():
                course.run.result(step)
        return dict(Spied.reads)


HOW = {"runs_dir", "storage", "recipe", "given", "sample_batch_size", "compile_unet", "gradient_checkpointing"}
HOW |= {
    "keep_unets",
    "inversion_study",
    "augmented_study",
    "augmented_others",
    "augmented_backbone",
    "worth_generator",
    "worth_steps",
    "worth_guidance",
    "worth_multiple",
    "mixing_study",
}  # say how a result is made, and change at most its rounding


def test_every_setting_is_tried():
    assert set(OTHER) | {"given"} == set(FIELDS)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, other in OTHER.items() if other is not None])
def test_a_setting_changes_the_results_that_read_it_and_no_others(name, read, small, tmp_path):
    # x2 reads larger_sets and max_multiple only where sets are drawn at random; the Class-Encoder's own size and start
    # are read together.
    base = {"larger_sets": "random"} if name == "max_multiple" else {}
    base |= {"class_encoder_start": "random"} if name in ("class_encoder_rank", "class_encoder_tokens") else {}
    before, after = small(tmp_path, **base), small(tmp_path, **base, **{name: OTHER[name]})
    old, new = results(before), results(after)
    changed = {step for step in old if before.run.fingerprint(old[step]) != after.run.fingerprint(new[step])}
    readers = {step for step in new if any(name in read.get(part, ()) for part in upstream(new[step]))}
    if name == "larger_sets":  # another way to put the same blocks together
        readers = {"table_2/x1", "table_2/x2"}
    assert changed == (set() if name in HOW else readers)


def test_a_backbone_of_other_content_gives_other_results(small, tmp_path):
    shutil.copytree(TINY, tmp_path / "a" / "model")
    shutil.copytree(TINY, tmp_path / "b" / "model")
    config = tmp_path / "b" / "model" / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace("0.012", "0.011"))
    same, other = (small(tmp_path, backbone=str(tmp_path / name / "model")) for name in "ab")
    for name, step in results(same).items():
        equal = same.run.fingerprint(step) == other.run.fingerprint(results(other)[name])
        assert equal == (name == "table_2/real"), name  # classifiers of real images need no backbone


def test_data_of_other_content_gives_other_results(small, tmp_path):
    first = small(tmp_path)
    other = small(tmp_path, dataset=str(small_run.write_dataset(tmp_path / "small.npz", seed=1)))
    for name, step in results(first).items():
        assert first.run.fingerprint(step) != other.run.fingerprint(results(other)[name]), name


def test_images_of_a_compiled_unet_are_results_of_their_own(small, tmp_path):
    """In 16 bits they differ from the others: a search, a set and a table of them are not the others'."""
    runs = {
        "auto": small(tmp_path),
        "never": small(tmp_path, compile_unet="no"),
        "always": small(tmp_path, compile_unet="yes"),
        "in other batches": small(tmp_path, compile_unet="yes", sample_batch_size=5),
    }
    of = {kind: {n: run.run.fingerprint(step) for n, step in results(run).items()} for kind, run in runs.items()}
    assert of["auto"] == of["never"]  # so short a search is over before the compiler is
    trained = {name for name in of["auto"] if name.startswith("inversion/")}
    undrawn = {"latents", "1_transfer", "table_2/real"} | trained
    for kind, other in (("auto", "always"), ("always", "in other batches")):
        assert {name for name in of["auto"] if of[kind][name] == of[other][name]} == undrawn


@pytest.mark.parametrize("name", ["max_multiple", "n_trials_retune", "rescored", "worth_multiple"])
def test_what_auto_compiles_hangs_on_what_every_search_reads_alone(name, tmp_path):
    """Else a larger set or a longer step 4 would have step 2 searched again."""
    options = {"backbone": "tiny", "runs_dir": str(tmp_path), "num_images": 1000, "steps_min": 10, "steps_max": 15}
    for trials, compiled in ((1, False), (2, True)):
        for value in (1, 40):
            course = Course(resolve(recipe="demo", **options, n_trials=trials, **{name: value}))
            assert course.workspace.compiles() == compiled
