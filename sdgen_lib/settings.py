"""Everything a run depends on, in one frozen dataclass; the recipes as data; checking of notebook parameters."""

from __future__ import annotations

import ast
import dataclasses
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import errors
from .recipes import RECIPES, SOURCES

SHARED = ("dataset", "backbone", "recipe", "seed", "runs_dir")  # the parameters every notebook declares
CHOICES = {
    "unconditional": ("zero", "empty_prompt", "class_mean"),
    "class_encoder_start": ("random", "empty_prompt"),
    "sampler": ("ddim", "dpm-solver++"),
    "select_on": ("val", "test"),
    "precision": ("auto", "fp32", "bf16", "fp16"),
    "finetune_method": ("full", "lora"),
    "optimizer": ("auto", "adamw", "adamw-8bit"),
    "keep_unets": ("all", "used"),
    "compile_unet": ("auto", "yes", "no"),
    "classifier_shortcut": ("subsample", "max_pool"),
    "class_mix": ("real", "balanced"),
    "larger_sets": ("nested", "random"),
}
# What a number may be where its type alone would allow nonsense: inclusive, and far beyond what any run needs.
RANGES = {
    "seed": (0, 2**32 - 1),
    "image_size": (8, 1024),
    "default_steps": (1, 1000), "steps_min": (1, 1000), "steps_max": (1, 1000),  # the schedule has 1000 timesteps
    "default_guidance": (0.0, 1000.0), "guidance_max": (0.0, 1000.0),
    "transfer_learning_rate": (1e-12, 100.0), "finetune_learning_rate": (1e-12, 100.0),
    "classifier_learning_rate": (1e-12, 100.0),
    "weight_decay": (0.0, 100.0), "clip_norm": (1e-12, 1e12), "label_smoothing": (0.0, 1.0),
    "classifier_width": (1, 1024), "classifier_seeds": (1, 1000), "max_multiple": (1, 1000),
}  # fmt: skip
WHOLE, REAL = (1, 10**7), (0.0, 1e12)  # every other number


@dataclasses.dataclass(frozen=True)
class Settings:
    """One run. The default values are the paper's protocol (arXiv 2405.02698, sections 3 and 4)."""

    dataset: str = "digits"
    backbone: str = "tiny"
    recipe: str = "paper"
    seed: int = 0
    runs_dir: str | None = None  # None: `runs/` of the checkout, else of the working directory
    storage: str | None = None  # of a search that several processes share: an Optuna URL or a journal file's path
    image_size: int | None = 32  # pixels, the classifier's; None: the dataset's own
    antialias: bool = True  # when generated images are made smaller for the classifier
    precision: str = "auto"  # of matrix products; auto: bf16 where the processor computes in it (see devices)

    # Step 1: the Class-Encoder. Step 3: the UNet. Sources: section 3, steps 1 and 3.
    class_encoder_rank: int | None = None  # None: one linear map; else two, through so many numbers
    class_encoder_tokens: int | None = None  # None: as many as the text encoder's context has
    class_encoder_start: str = "random"
    unconditional: str = "zero"  # not stated in the paper; what its released code does
    transfer_epochs: int = 50
    transfer_batch_size: int = 64
    transfer_learning_rate: float = 1e-4
    finetune_epochs: int = 10
    finetune_batch_size: int = 16
    finetune_learning_rate: float = 1e-5
    weight_decay: float = 4e-3
    clip_norm: float = 10.0
    finetune_method: str = "full"  # lora: low-rank updates of the attention alone (Hu et al. 2022)
    lora_rank: int = 16
    optimizer: str = "auto"  # auto: AdamW; its state in 8 bits where it would fill the accelerator (see train)
    gradient_checkpointing: bool = False  # slower, less memory; also begun by itself when memory runs out
    keep_unets: str = "all"  # used: delete the step 3 checkpoints that no table needs, once step 4 has chosen

    # Sampling and the searches of steps 2 and 4. Section 3, steps 2 and 4.
    sampler: str = "ddim"
    sample_batch_size: int = 128
    compile_unet: str = "auto"  # for sampling; auto: where it was measured to pay (see Course.compiles)
    default_steps: int = 50  # Stable Diffusion's own defaults, the row "after 1"
    default_guidance: float = 7.5
    n_trials: int = 50
    n_trials_retune: int | None = None  # of step 4; None: as many as in step 2
    pruning: bool = True
    num_images: int = 4000  # of one trial, uniform over classes
    steps_min: int = 5
    steps_max: int = 50
    guidance_max: float = 7.5
    select_on: str = "val"  # the released code searches on "test", the images its tables report

    # The classifier. Section 4. Width 16 is what the name ResNet20 means; the released code's first stage has 64.
    classifier_width: int = 16
    classifier_shortcut: str = "subsample"
    classifier_epochs: int = 100
    classifier_batch_size: int = 256
    classifier_learning_rate: float = 1e-3
    label_smoothing: float = 0.1
    plateau_patience: int = 10
    stop_patience: int = 25
    search_plateau_patience: int | None = None  # in the searches; None: the two above
    search_stop_patience: int | None = None
    classifier_epoch_images: int = 1  # an epoch of a smaller set passes over it as often as it takes to see so many
    classifier_epoch_limit: int | None = None  # an epoch of a larger set ends after so many
    classifier_seeds: int = 1  # classifiers trained on each set of the tables

    # Step 5: synthetic sets of 1 to max_multiple times the real one.
    max_multiple: int = 10
    class_mix: str = "real"  # of the synthetic sets; balanced: equal numbers
    larger_sets: str = "nested"  # x1 begins x2 begins x3 ...; random: x2 .. are random parts of xK, x1 is apart

    given: tuple[str, ...] = ()  # the names that were set by hand, over the recipe

    def to_dict(self) -> dict[str, Any]:
        """For a run's manifest; without ``storage``, which may hold a password and changes no result."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "storage"}


def shown(value: object, length: int = 120) -> str:
    """``value`` as an error names it: its repr on one line, cut where it would hide the message."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print a whole number of thousands of digits
        text = f"a {type(value).__name__} of {value.bit_length()} bits"
    text = " ".join(text.split())
    return text if len(text) <= length else text[:length] + "..."


def unknown_name(what: str, name: object, allowed) -> ValueError:
    """The error for a misspelt name: says what was wrong, the nearest right name, and all of them.

    Example: ``raise unknown_name("recipe", "dmeo", RECIPES)``.
    """
    allowed = sorted(allowed)
    near = difflib.get_close_matches(shown(name).strip("'"), allowed, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return ValueError(f"Unknown {what} {shown(name)}.{hint} Allowed: {', '.join(allowed)}.")


def _checked(name: str, value: Any, kind: str) -> Any:
    """One parameter's value, of the ``kind`` that its field is annotated with; raises ValueError that says what is
    allowed."""
    if name in CHOICES:
        if not isinstance(value, str) or value not in CHOICES[name]:
            raise unknown_name(f"value for {name}", value, CHOICES[name])
        return value
    texts = {"dataset": "a name or a path", "backbone": "a name or a path", "runs_dir": "a folder or None",
             "storage": "an Optuna URL, a journal file's path or None"}  # fmt: skip
    if name in texts:
        text = str(value) if isinstance(value, (str, Path)) else ""
        if not text.strip() or len(text) > 1000 or not text.isprintable():
            raise ValueError(f"{name} must be {texts[name]}, of printable characters, not {shown(value)}.")
        return text
    if kind == "bool":
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, not {shown(value)}.")
        return value
    real = kind == "float"
    low, high = RANGES.get(name, REAL if real else WHOLE)
    number = isinstance(value, (int, float) if real else int) and not isinstance(value, bool)
    if not number or not low <= value <= high:  # NaN too
        raise ValueError(f"{name} must be a {'' if real else 'whole '}number from {low} to {high}, not {shown(value)}.")
    return float(value) if real else value


def resolve(recipe: str = "auto", backbone: str = "auto", **given: Any) -> Settings:
    """Settings of a run: the recipe's values, over them what is given (``None`` means the recipe's value).

    ``auto`` is the tiny model with the `demo` recipe without a GPU; on one, `workshop` and Stable Diffusion 2 (1.4 with
    `released`, whose authors used a 1.x model).
    Raises ValueError for an unknown name (with the nearest right one), a wrong type or a value out of range.
    """
    import torch  # here, so that checking a parameter costs no second

    gpu = torch.cuda.is_available()
    if recipe is None or (isinstance(recipe, str) and recipe == "auto"):
        recipe = "workshop" if gpu else "demo"
    if not isinstance(recipe, str) or recipe not in RECIPES:
        raise unknown_name("recipe", recipe, ["auto", *RECIPES])
    if backbone is None or (isinstance(backbone, str) and backbone == "auto"):
        backbone = RECIPES[recipe].get("backbone", "sd2") if gpu else "tiny"
    fields = {f.name: f.type.removesuffix(" | None") for f in dataclasses.fields(Settings) if f.name != "given"}
    for name in given:
        if name not in fields:
            raise unknown_name("parameter", name, fields)
    by_hand = {
        name: _checked(name, value, fields[name]) for name, value in {**given, "backbone": backbone}.items()
        if value is not None
    }  # fmt: skip
    values = {**RECIPES[recipe], **by_hand}
    settings = Settings(recipe=recipe, given=tuple(sorted(set(by_hand) - {*SHARED, "storage"})), **values)
    if settings.steps_min > settings.steps_max:
        raise ValueError(f"steps_min ({settings.steps_min}) must not exceed steps_max ({settings.steps_max}).")
    if "empty_prompt" in (settings.class_encoder_start, settings.unconditional) and (
        settings.class_encoder_rank or settings.class_encoder_tokens
    ):
        raise ValueError(
            "The empty prompt's context (class_encoder_start or unconditional) fits the paper's Class-Encoder alone: "
            "give no class_encoder_rank or class_encoder_tokens with it, or choose 'random' and 'zero'."
        )
    return settings


def protocol(settings: Settings) -> list[dict[str, Any]]:
    """What a run follows and where it departs: a row for each setting the paper or its released code fixes.

    Each row has ``setting``, ``this run``, ``paper``, ``released code`` (their values) and ``source``.
    """
    columns = {
        "this run": settings.to_dict(),
        "paper": {**Settings().to_dict(), "backbone": "sd2"},
        "released code": {**Settings().to_dict(), **RECIPES["released"]},
    }
    return [
        {"setting": name, **{column: values[name] for column, values in columns.items()}, "source": source}
        for name, source in SOURCES.items()
    ]


def followed(settings: Settings) -> str:
    """One line: in how many of those settings a run is as the paper, or as its released code if that is the recipe."""
    like = "released code" if settings.recipe == "released" else "paper"
    rows = protocol(settings)
    departures = [f"{row['setting']} {row['this run']} ({row[like]})" for row in rows if row["this run"] != row[like]]
    text = f"the {like} in {len(rows) - len(departures)} of {len(rows)} settings"
    return f"{text}; departs (theirs in brackets): {', '.join(departures)}" if departures else text


def from_notebook(namespace: Mapping[str, Any]) -> Settings:
    """Settings from a notebook's parameters cell and what papermill injected after it.

    Reads the cells that have run (``In``): from the last one that assigns all five shared parameters on, every name
    assigned in it and in papermill's "# Parameters" cell must be a setting. papermill itself only warns about a
    misspelt ``-p`` name and then runs the default; here it is a ValueError with the nearest right name.
    """
    errors.one_line_first()
    assigned: list[str] = []
    for source in namespace.get("In", []):
        try:
            targets = [n.id for node in ast.parse(source).body if isinstance(node, ast.Assign)
                       for n in node.targets if isinstance(n, ast.Name)]  # fmt: skip
        except SyntaxError:  # a cell with an IPython magic
            continue
        if set(SHARED) <= set(targets):
            assigned = targets
        elif assigned and source.startswith("# Parameters"):
            assigned += targets
    fields = [f.name for f in dataclasses.fields(Settings) if f.name != "given"]
    for name in assigned:
        if name not in fields:
            raise unknown_name("parameter", name, fields)
    names = assigned or [name for name in fields if name in namespace]
    return resolve(**{name: namespace[name] for name in names})
