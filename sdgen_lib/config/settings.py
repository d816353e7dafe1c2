"""Everything a run depends on, in one frozen dataclass: each setting's value, range, source and readers, once."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .messages import printable, shown, unknown_name
from .recipes import RECIPES

AUGMENTED = tuple(
    name + dropped
    for name in ("random image", "mixup", "embedding mixup", "cutmix", "embedding cutmix")
    for dropped in ("", " + dropout")
)  # the ten conditionings of augmented conditioning
SHARED = ("dataset", "backbone", "recipe", "seed", "runs_dir")  # the parameters every notebook declares
MANY = 10**7  # the upper end of a count that nothing else bounds: far beyond what any run needs

# What a step may say that it reads; its code is then handed the fields of these topics alone.
TOPICS = {
    "data": "what the data holds; in a result's key by the data's own hash",
    "model": "which Stable Diffusion; in a result's key by the hash of its files",
    "precision": "the number format of matrix products",
    "seed": "what all random numbers are derived from",
    "class_encoder": "the Class-Encoder's layout and start",
    "transfer": "the training of step 1",
    "finetune": "the training of step 3",
    "training": "what both trainings share",
    "sampling": "how an image is drawn, besides the point",
    "inversion": "the vectors of Diffusion Inversion and their training",
    "variants": "how Diffusion Inversion draws new images from its vectors",
    "augmented": "how augmented conditioning draws",
    "default_point": "the point of the table row 'after 1'",
    "search_space": "what step 2 chooses from",
    "search": "the search of step 2",
    "retune": "the search of step 4",
    "cas": "the generated set that a CAS is measured with",
    "classifier": "the classifier and its training",
    "table": "the rows of a table",
    "set": "what a synthetic set holds",
    "larger_sets": "how synthetic sets of several sizes hang together",
    "how": "how it is computed, in no result's key (but see compile_unet): what comes out differs by rounding at most",
}


def setting(
    default: Any,
    *,
    read_by: tuple[str, ...],
    doc: str,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] | None = None,
    source: str | None = None,
    what: str | None = None,
) -> Any:
    """One field of `Settings`, with all that is known of it in the field's ``metadata``.

    ``read_by``: its `TOPICS`. ``low`` and ``high``: the range of a number, inclusive. ``choices``: the texts it may be.
    ``source``: where the paper or its released code speaks of it; None: they do not. ``what``: what a free text stands
    for, in the words of an error.
    """
    known = dict(read_by=read_by, doc=doc, low=low, high=high, choices=choices, source=source, what=what)
    return dataclasses.field(default=default, metadata=known)


@dataclasses.dataclass(frozen=True)
class Settings:
    """One run. The default values are the paper's protocol (arXiv 2405.02698, sections 3 and 4)."""

    # --- which run ---
    dataset: str = setting(
        "digits", what="a name or a path", read_by=("data",), doc="a named set, an .npz file or a folder of images"
    )
    backbone: str = setting(
        "tiny",
        what="a name or a path",
        read_by=("model",),
        source="section 4; released: KerasCV 0.6.1's SD 1.x",
        doc="a named model, a folder or a Hub id",
    )
    recipe: str = setting("paper", choices=tuple(RECIPES), read_by=("how",), doc="where the other values come from")
    seed: int = setting(0, low=0, high=2**32 - 1, read_by=("seed",), doc="what all random numbers are derived from")
    runs_dir: str | None = setting(
        None, what="a folder", read_by=("how",), doc="None: `runs/` of the checkout, else of the working directory"
    )
    storage: str | None = setting(
        None, what="an Optuna URL", read_by=("how",), doc="of a search that several processes share"
    )
    image_size: int | None = setting(
        32,
        low=8,
        high=1024,
        read_by=("data",),
        source="section 4; released: each set's own",
        doc="pixels, the classifier's; None: the dataset's own",
    )
    antialias: bool = setting(
        True,
        read_by=("sampling",),
        source="released: the search's resizing",
        doc="when generated images are made smaller for the classifier",
    )
    precision: str = setting(
        "auto",
        choices=("auto", "fp32", "bf16", "fp16"),
        read_by=("precision",),
        doc="of matrix products; auto: bf16 where the processor computes in it",
    )

    # --- step 1: the Class-Encoder; step 3: the UNet ---
    class_encoder_rank: int | None = setting(
        None,
        low=1,
        high=MANY,
        read_by=("class_encoder",),
        source="section 3, step 1; released: Dense(500), Dense(100 x 768)",
        doc="None: one linear map; else two, through so many numbers",
    )
    class_encoder_tokens: int | None = setting(
        None,
        low=1,
        high=MANY,
        read_by=("class_encoder",),
        source="section 3, step 1; released: 100",
        doc="None: as many as the text encoder's context has",
    )
    class_encoder_start: str = setting(
        "random", choices=("random", "empty_prompt"), read_by=("class_encoder",), doc="its contexts before step 1"
    )
    unconditional: str = setting(
        "zero",
        choices=("zero", "empty_prompt", "class_mean"),
        read_by=("sampling",),
        source="not in the paper; released: the zero vector",
        doc="the context that guidance leads away from",
    )
    transfer_epochs: int = setting(
        50,
        low=1,
        high=MANY,
        read_by=("transfer",),
        source="section 3, step 1",
        doc="epochs of step 1, a checkpoint each",
    )
    transfer_epoch_images: int | None = setting(
        None,
        low=1,
        high=MANY,
        read_by=("transfer",),
        source="section 3, step 1: the training set",
        doc="images that an epoch of step 1 passes; None: the training set once",
    )
    transfer_batch_size: int = setting(
        64, low=1, high=MANY, read_by=("transfer",), source="section 3, step 1", doc="images of one optimiser step"
    )
    transfer_learning_rate: float = setting(
        1e-4, low=1e-12, high=100.0, read_by=("transfer",), source="section 3, step 1", doc="at the start; cosine to 0"
    )
    finetune_epochs: int = setting(
        10,
        low=1,
        high=MANY,
        read_by=("finetune",),
        source="section 3, step 3",
        doc="epochs of step 3, a checkpoint each",
    )
    finetune_epoch_images: int | None = setting(
        None,
        low=1,
        high=MANY,
        read_by=("finetune",),
        source="section 3, step 3: the training set",
        doc="images that an epoch of step 3 passes; None: the training set once",
    )
    finetune_batch_size: int = setting(
        16, low=1, high=MANY, read_by=("finetune",), source="section 3, step 3", doc="images of one optimiser step"
    )
    finetune_learning_rate: float = setting(
        1e-5, low=1e-12, high=100.0, read_by=("finetune",), source="section 3, step 3", doc="at the start; cosine to 0"
    )
    finetune_encoder_learning_rate: float | None = setting(
        None,
        low=1e-12,
        high=100.0,
        read_by=("finetune",),
        source="section 3, step 3: frozen",
        doc="of the Class-Encoder, where step 3 trains it along with the UNet; None: it stays frozen",
    )
    label_dropout: float = setting(
        0.0,
        low=0.0,
        high=1.0,
        read_by=("training",),
        source="section 3, step 1: no label is dropped",
        doc="share of training images told no class, but the zero vector's context (Ho and Salimans 2022)",
    )
    weight_decay: float = setting(
        4e-3,
        low=0.0,
        high=100.0,
        read_by=("training",),
        source="section 3, step 1; released: decoupled (AdamW)",
        doc="decoupled, of both trainings",
    )
    clip_norm: float = setting(
        10.0, low=1e-12, high=1e12, read_by=("training",), source="section 3, step 1", doc="the gradient's largest norm"
    )
    finetune_method: str = setting(
        "full",
        choices=("full", "lora"),
        read_by=("finetune",),
        source="section 3, step 3: the whole UNet",
        doc="lora: low-rank updates of the attention alone (Hu et al. 2022)",
    )
    lora_rank: int = setting(16, low=1, high=MANY, read_by=("finetune",), doc="of the updates, with lora")
    optimizer: str = setting(
        "auto",
        choices=("auto", "adamw", "adamw-8bit"),
        read_by=("training",),
        doc="auto: AdamW; its state in 8 bits where it would fill the accelerator",
    )
    gradient_checkpointing: bool = setting(
        False, read_by=("how",), doc="slower, less memory; also begun by itself when memory runs out"
    )
    keep_unets: str = setting(
        "all",
        choices=("all", "used"),
        read_by=("how",),
        doc="used: delete the step 3 checkpoints that no table needs, once step 4 has chosen",
    )

    # --- sampling, and the searches of steps 2 and 4 ---
    sampler: str = setting(
        "ddim",
        choices=("ddim", "dpm-solver++"),
        read_by=("sampling",),
        source="released: KerasCV's deterministic DDIM",
        doc="how the noise is taken away",
    )
    sample_batch_size: int = setting(128, low=1, high=MANY, read_by=("how",), doc="images drawn at once")
    compile_unet: str = setting(
        "auto",
        choices=("auto", "yes", "no"),
        read_by=("how",),
        doc="for sampling; auto: where it pays. It changes 16-bit images: they are results of their own",
    )
    default_steps: int = setting(
        50, low=1, high=1000, read_by=("default_point",), doc="inference steps of the row 'after 1'"
    )
    default_guidance: float = setting(
        7.5, low=0.0, high=1000.0, read_by=("default_point",), doc="guidance scale of the row 'after 1'"
    )
    n_trials: int = setting(
        50, low=1, high=MANY, read_by=("search", "retune"), source="section 3, step 2", doc="finished trials of step 2"
    )
    n_trials_retune: int | None = setting(
        None,
        low=1,
        high=MANY,
        read_by=("retune",),
        source="section 3, step 4; released: 40 trials",
        doc="of step 4; None: as many as in step 2",
    )
    pruning: bool = setting(
        True,
        read_by=("search", "retune"),
        source="section 3, step 2: Hyperband; released: no trial is ever pruned",
        doc="stop a trial whose classifier falls behind",
    )
    incumbent_first: bool = setting(
        False,
        read_by=("retune",),
        source="section 3, step 4: no point is given",
        doc="step 4 first tries the point of the row 'after 3', as it is and at UGS 1",
    )
    rescored: int = setting(
        0,
        low=0,
        high=MANY,
        read_by=("search", "retune"),
        source="section 3: the best trial is taken",
        doc="best trials drawn anew and scored again, to choose among; 0: the first score chooses",
    )
    rescoring_classifiers: int = setting(
        3, low=1, high=1000, read_by=("search", "retune"), doc="classifiers that score each of them"
    )
    rescoring_images: int | None = setting(
        None,
        low=1,
        high=MANY,
        read_by=("search", "retune"),
        doc="images drawn anew for each of them; None: as many as for a trial",
    )
    num_images: int = setting(
        4000,
        low=1,
        high=MANY,
        read_by=("search", "retune", "cas"),
        source="section 3, step 2",
        doc="of one trial, uniform over classes",
    )
    steps_min: int = setting(
        5, low=1, high=1000, read_by=("search_space",), source="section 3, step 2", doc="fewest inference steps (IS)"
    )
    steps_max: int = setting(
        50, low=1, high=1000, read_by=("search_space",), source="section 3, step 2", doc="most inference steps (IS)"
    )
    guidance_min: float = setting(
        0.0, low=0.0, high=1000.0, read_by=("search_space",), source="section 3, step 2", doc="smallest guidance (UGS)"
    )
    guidance_max: float = setting(
        7.5, low=0.0, high=1000.0, read_by=("search_space",), source="section 3, step 2", doc="largest guidance (UGS)"
    )
    select_on: str = setting(
        "val",
        choices=("val", "test"),
        read_by=("search", "retune"),
        source="paper: 'a real test set'; released: the tables' test set",
        doc="the images whose accuracy chooses the best trial",
    )
    search_plateau_patience: int | None = setting(
        None,
        low=1,
        high=MANY,
        read_by=("search", "retune"),
        source="released: 25 and 50 in the searches",
        doc="plateau_patience in the searches; None: the same",
    )
    search_stop_patience: int | None = setting(
        None,
        low=1,
        high=MANY,
        read_by=("search", "retune"),
        source="released: 25 and 50 in the searches",
        doc="stop_patience in the searches; None: the same",
    )

    # --- Diffusion Inversion (Zhou et al. 2023): a vector for every training image, and its variants ---
    inversion_images: int | None = setting(
        None,
        low=1,
        high=MANY,
        read_by=("data",),
        source="appendix B: all, on MedMNIST 500 of each class",
        doc="training images that are inverted, in the classes' proportions; None: all",
    )
    inversion_tokens: int | None = setting(
        None,
        low=1,
        high=MANY,
        read_by=("inversion",),
        source="section 3.1: the text encoder's output; released: 5",
        doc="context tokens of a vector; None: as many as the text encoder's context has",
    )
    inversion_start: str = setting(
        "uniform",
        choices=("uniform", "empty_prompt", "class_context"),
        read_by=("inversion",),
        source="not in the paper; released: uniform, within 1 / sqrt(vectors trained together)",
        doc="the vectors before training; class_context: what step 1's Class-Encoder makes of each image's class",
    )
    inversion_groups: str = setting(
        "mixed",
        choices=("mixed", "class"),
        read_by=("inversion",),
        source="not in the paper; released: in file order, on MedMNIST one class",
        doc="whether the vectors that train together may be of several classes",
    )
    inversion_group_images: int | None = setting(
        None,
        low=1,
        high=MANY,
        read_by=("inversion",),
        source="not in the paper; released: 100",
        doc="most vectors that train together; None: as many as there are",
    )
    inversion_visits: int = setting(
        3000, low=1, high=MANY, read_by=("inversion",), source="section 4.1", doc="times that each vector is trained"
    )
    inversion_checkpoints: int = setting(
        3,
        low=1,
        high=1000,
        read_by=("inversion",),
        source="appendix B: variants of 1000, 2000 and 3000 steps",
        doc="checkpoints of the vectors, at equal distances; the last one is at the end",
    )
    inversion_batch_size: int = setting(
        50,
        low=1,
        high=MANY,
        read_by=("inversion",),
        source="not in the paper; released: 50",
        doc="most images of one optimiser step; all that train together are divided evenly",
    )
    inversion_optimizer: str = setting(
        "adamw",
        choices=("adamw", "row-adam"),
        read_by=("inversion",),
        source="section 4.1",
        doc="adamw moves vectors outside of a batch too (momentum, decay); row-adam those in it alone, no decay",
    )
    inversion_learning_rate: float = setting(
        0.03, low=1e-12, high=100.0, read_by=("inversion",), source="section 4.1", doc="at the start"
    )
    inversion_schedule: str = setting(
        "constant",
        choices=("constant", "cosine"),
        read_by=("inversion",),
        source="section 4.1",
        doc="of the learning rate; cosine: to 0",
    )
    inversion_weight_decay: float = setting(
        0.01,
        low=0.0,
        high=100.0,
        read_by=("inversion",),
        source="not in the paper; released: PyTorch's default",
        doc="decoupled, of adamw",
    )
    inversion_steps: int = setting(
        100, low=1, high=1000, read_by=("variants",), source="section 4.1", doc="inference steps (IS) of a variant"
    )
    inversion_guidance: float = setting(
        3.0,
        low=0.0,
        high=1000.0,
        read_by=("variants",),
        source="section 3.2: (1 + w) eps_c - w eps_u with w = 2; released: eps_u + 2 (eps_c - eps_u)",
        doc="guidance scale (UGS)",
    )
    inversion_unconditional: str = setting(
        "mean",
        choices=("mean", "group_mean", "class_mean", "empty_prompt"),
        read_by=("variants",),
        source="section 3.2: the mean of all vectors; released: of the group",
        doc="the context that guidance leads away from",
    )
    inversion_noise: float = setting(
        0.1, low=0.0, high=1000.0, read_by=("variants",), source="section 3.2", doc="what is added to a vector (lambda)"
    )
    inversion_noise_unit: str = setting(
        "absolute",
        choices=("absolute", "spread"),
        read_by=("variants",),
        source="section 3.2",
        doc="spread: the noise is in standard deviations of the vectors' numbers",
    )
    inversion_interpolation: float = setting(
        0.1,
        low=0.0,
        high=1.0,
        read_by=("variants",),
        source="section 3.2",
        doc="the partner's share in a vector (alpha)",
    )
    inversion_partners: str = setting(
        "class",
        choices=("class", "released"),
        read_by=("variants",),
        source="section 3.2: two random vectors",
        doc="who may be: all of its class; released: those of its class and group, or all of the group if few",
    )

    inversion_study: str = setting(
        "visits",
        choices=(
            *("visits", "guidance", "steps", "unconditional", "noise", "interpolation"),
            *("generated", "real", "ratio", "augmentation", "network"),
        ),
        read_by=("how",),
        doc="the choice whose worth chapter 09 shows",
    )

    # --- augmented conditioning (Chen et al. 2024): a class and an altered real image of it ---
    augmented_backbone: str = setting(
        "auto",
        what="a name or a path",
        read_by=("how",),
        source="section 4: Stable Diffusion 2.1-unclip",
        doc="an unCLIP model; auto: the tiny one beside the tiny backbone, else sd2.1-unclip",
    )
    augmented_images: int | None = setting(
        None,
        low=1,
        high=MANY,
        read_by=("data",),
        source="section 4.1: all; section 4.2: 1 to 16 of each class",
        doc="real images to draw from and to train beside, in the classes' proportions; None: all",
    )
    augmented_conditioning: str = setting(
        "embedding cutmix + dropout",
        choices=("text", "img2img", *AUGMENTED),
        read_by=("augmented",),
        source="section 3.2; the best of table 1",
        doc="what is done to the real image; text: the class alone; img2img: it is where sampling starts",
    )
    augmented_protocol: str = setting(
        "paper",
        choices=("paper", "released"),
        read_by=("augmented",),
        source="section 3.2; released: crops, no rescaling, CutMix of embeddings has no effect",
        doc="how the conditionings are done",
    )
    augmented_dropout: float = setting(
        0.4,
        low=0.0,
        high=1.0,
        read_by=("augmented",),
        source="section 3.2",
        doc="share of an embedding that is dropped",
    )
    augmented_noise_level: int = setting(
        0, low=0, high=999, read_by=("augmented",), source="released: 0", doc="of the noise on an embedding"
    )
    augmented_strength: float = setting(
        0.75,
        low=0.0,
        high=1.0,
        read_by=("augmented",),
        source="not in the paper; Real-Fake: 0.75; DA-Fusion: 0.25 to 1",
        doc="of img2img: how much is drawn anew",
    )
    augmented_text: str = setting(
        "prompt",
        choices=("prompt", "class_encoder"),
        read_by=("augmented",),
        source="section 3.2: the class label",
        doc="what tells the class; class_encoder: that of step 1, trained with the unCLIP model",
    )
    augmented_prompt: str = setting(
        "a photo of {}",
        what="a text with {} for the class",
        read_by=("augmented",),
        source="released: the class's name",
        doc="with {} for the class's name",
    )
    augmented_steps: int = setting(
        30, low=1, high=1000, read_by=("augmented",), source="appendix D, table 4", doc="inference steps (IS)"
    )
    augmented_guidance: float = setting(
        2.0,
        low=0.0,
        high=1000.0,
        read_by=("augmented",),
        source="appendix B: best of 2, 4, 7, 10; released: 10",
        doc="guidance (UGS)",
    )

    augmented_tail_factor: float = setting(
        100.0,
        low=1.0,
        high=1e6,
        read_by=("data",),
        source="section 4.1: ImageNet-LT, 1280 to 5 images",
        doc="of chapter 11's long tail: the largest class beside the smallest",
    )
    augmented_tail_largest: int | None = setting(
        None,
        low=1,
        high=MANY,
        read_by=("data",),
        source="section 4.1: 1280",
        doc="images of its largest class; None: all",
    )
    augmented_others: bool = setting(
        False,
        read_by=("how",),
        doc="chapter 11 also fills the long tail by the Class-Encoder and by Diffusion Inversion",
    )
    augmented_study: str = setting(
        "conditionings",
        choices=("conditionings", "guidance", "dropout", "strength", "shots", "leak"),
        read_by=("how",),
        doc="the choice whose worth chapter 11 shows",
    )

    # --- real and generated images together ---
    worth_generator: str = setting(
        "after 4",
        choices=("after 1", "after 2", "after 3", "after 4", "inversion", "augmented"),
        read_by=("how",),
        doc="whose images chapters 12 to 14 take: the paper's after step 1 .. 4, or another method's",
    )
    worth_steps: int | None = setting(
        None, low=1, high=1000, read_by=("how",), doc="inference steps of 'after 1' there; None: default_steps"
    )
    worth_guidance: float | None = setting(
        None, low=0.0, high=1000.0, read_by=("how",), doc="guidance scale of 'after 1' there; None: default_guidance"
    )
    worth_images: int | None = setting(
        None,
        low=1,
        high=MANY,
        read_by=("data",),
        doc="real images of chapters 12 to 14, to generate from and to train with; None: all",
    )
    worth_multiple: int = setting(
        3, low=1, high=1000, read_by=("how",), doc="generated images there, times the real ones"
    )
    mixing_study: str = setting(
        "ratio",
        choices=("ratio", "amount", "augmentation", "network", "labels", "training", "real"),
        read_by=("how",),
        doc="the choice whose worth chapter 12 shows",
    )
    shifted_to: str | None = setting(
        None,
        what="a dataset's name or path",
        read_by=("data",),
        doc="a dataset of the same classes, whose test images chapter 14 tests on, too",
    )

    # --- the classifier ---
    classifier_width: int = setting(
        16,
        low=1,
        high=1024,
        read_by=("classifier",),
        source="section 4: ResNet20; released: first stage of 64 filters",
        doc="filters of the first stage; 16 is what the name ResNet20 means",
    )
    classifier_shortcut: str = setting(
        "subsample",
        choices=("subsample", "max_pool"),
        read_by=("classifier",),
        source="He et al. 2016, option A; released: max-pooling",
        doc="how a shortcut gets smaller",
    )
    classifier_epochs: int = setting(
        100, low=1, high=MANY, read_by=("classifier",), source="section 4", doc="at most; see stop_patience"
    )
    classifier_batch_size: int = setting(
        256, low=1, high=MANY, read_by=("classifier",), source="section 4", doc="images of one optimiser step"
    )
    classifier_learning_rate: float = setting(
        1e-3, low=1e-12, high=100.0, read_by=("classifier",), source="section 4", doc="at the start; lower on a plateau"
    )
    label_smoothing: float = setting(
        0.1, low=0.0, high=1.0, read_by=("classifier",), source="section 4", doc="of the cross-entropy"
    )
    plateau_patience: int = setting(
        10,
        low=1,
        high=MANY,
        read_by=("classifier",),
        source="section 4",
        doc="epochs without a better one until the learning rate falls",
    )
    stop_patience: int = setting(
        25,
        low=1,
        high=MANY,
        read_by=("classifier",),
        source="section 4",
        doc="epochs without a better one until the training ends",
    )
    classifier_epoch_images: int = setting(
        1,
        low=1,
        high=MANY,
        read_by=("classifier",),
        doc="an epoch of a smaller set passes over it as often as it takes to see so many",
    )
    classifier_epoch_limit: int | None = setting(
        None, low=1, high=MANY, read_by=("classifier",), doc="an epoch of a larger set ends after so many images"
    )
    classifier_val_images: int | None = setting(
        None,
        low=1,
        high=MANY,
        read_by=("classifier",),
        doc="validation images that compare epochs, of a larger set; all of them measure the best one",
    )
    classifier_seeds: int = setting(
        1, low=1, high=1000, read_by=("table",), doc="classifiers trained on each set of the tables"
    )

    # --- step 5: synthetic sets of 1 to max_multiple times the real one ---
    max_multiple: int = setting(
        10,
        low=1,
        high=1000,
        read_by=("larger_sets",),
        source="section 3, step 5",
        doc="the largest set's size over the real one's",
    )
    class_mix: str = setting(
        "real",
        choices=("real", "balanced"),
        read_by=("set",),
        source="section 3, step 5; released: balanced",
        doc="of the synthetic sets; balanced: equal numbers",
    )
    larger_sets: str = setting(
        "nested",
        choices=("nested", "random"),
        read_by=("larger_sets",),
        source="not in the paper; released: random parts of one x10 set",
        doc="x1 begins x2 begins x3 ...; random: x2 .. are random parts of xK, x1 is apart",
    )

    given: tuple[str, ...] = setting((), read_by=("how",), doc="the names that were set by hand, over the recipe")

    def to_dict(self) -> dict[str, Any]:
        """The plain values by name; without ``storage``, which may hold a password and changes no result."""
        return {name: getattr(self, name) for name in FIELDS if name != "storage"}

    def view(self, *topics: str) -> View:
        """The fields of these `TOPICS` alone; raises ValueError for an unknown topic."""
        return View(self, topics)


FIELDS = {field.name: field for field in dataclasses.fields(Settings)}


@functools.cache
def fields_read_by(*topics: str) -> tuple[str, ...]:
    """The names of the fields of these `TOPICS`, sorted; raises ValueError for an unknown topic."""
    for topic in topics:
        if topic not in TOPICS:
            raise unknown_name("topic", topic, TOPICS)
    return tuple(sorted(name for name, field in FIELDS.items() if set(topics) & set(field.metadata["read_by"])))


class View:
    """The fields of some topics of a run's settings, read-only. Reading any other is an AttributeError.

    A step's code is handed one, so that it cannot read what it has not declared.
    """

    def __init__(self, settings: Settings, topics: tuple[str, ...]):
        vars(self).update({name: getattr(settings, name) for name in fields_read_by(*topics)})

    def __getattr__(self, name: str) -> Any:  # called for what is not here
        if name not in FIELDS:
            raise AttributeError(f"There is no setting {name!r}.", name=name, obj=self)
        topics = ", ".join(FIELDS[name].metadata["read_by"])
        message = f"{name} is not declared: a step that reads {name} must declare one of its topics ({topics})."
        raise AttributeError(message, name=name, obj=self)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"Settings are read-only: {name} cannot be set here.", name=name, obj=self)

    def __repr__(self) -> str:
        return f"View({', '.join(f'{name}={value!r}' for name, value in self.to_dict().items())})"

    def to_dict(self) -> dict[str, Any]:
        """The plain values by name, sorted; without ``storage``, which may hold a password."""
        return {name: value for name, value in vars(self).items() if name != "storage"}


def _checked(name: str, value: Any) -> Any:
    """One parameter's value as its field holds it; raises ValueError that says what is allowed."""
    field = FIELDS[name]
    kind, optional = field.type.removesuffix(" | None"), field.type.endswith(" | None")
    if optional and isinstance(value, str) and value.strip().lower() == "none":
        return None
    or_none = ' or "none"' if optional else ""
    known = field.metadata
    if known["choices"]:
        if not isinstance(value, str) or value not in known["choices"]:
            raise unknown_name(f"value for {name}", value, known["choices"])
        return value
    if kind == "str":
        text = str(value) if isinstance(value, (str, Path)) else ""
        if not text.strip() or len(text) > 1000 or printable(text) != text:
            hint = ""
            if isinstance(value, int | float) and not isinstance(value, bool):
                hint = f" papermill's -p makes numbers of such names: give -r {name} {shown(value)}."
            raise ValueError(
                f"{name} must be {known['what']}{or_none}, of printable characters, not {shown(value)}.{hint}"
            )
        return text
    if kind == "bool":
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, not {shown(value)}.")
        return value
    real, low, high = kind == "float", known["low"], known["high"]
    is_number = isinstance(value, (int, float) if real else int) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:  # NaN too
        number = "number" if real else "whole number"
        raise ValueError(f"{name} must be a {number} from {low} to {high}{or_none}, not {shown(value)}.")
    return float(value) if real else value


def resolve(recipe: str | None = "auto", backbone: str | None = "auto", **given: Any) -> Settings:
    """Settings of a run: the recipe's values, over them what is given.

    Python's ``None`` means the recipe's value. The text "none" means None itself, where a setting may be that:
    ``resolve("paper", image_size="none")`` takes the dataset's own size.
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
    allowed = [name for name in FIELDS if name != "given"]
    for name in given:
        if name not in allowed:
            raise unknown_name("parameter", name, allowed)
    asked = {**given, "backbone": backbone}
    by_hand = {name: _checked(name, value) for name, value in asked.items() if value is not None}
    names = tuple(sorted(set(by_hand) - {*SHARED, "storage"}))
    values = {**RECIPES[recipe], **by_hand, "recipe": recipe, "given": names}
    settings = Settings(**values | _what_follows(values, by_hand))
    _check_together(settings)
    return settings


def _what_follows(values: Mapping[str, Any], by_hand: Mapping[str, Any]) -> dict[str, Any]:
    """What a recipe's own values become beside those set by hand.

    The other end of a range follows one that was set beyond it; step 4 has no more trials than step 2 was given; where
    trials were given fewer images than the recipe's, so has the rescoring, in proportion.
    """
    found, retune = {}, values.get("n_trials_retune")
    if retune and "n_trials" in by_hand and "n_trials_retune" not in by_hand:
        found["n_trials_retune"] = min(retune, by_hand["n_trials"])
    rescoring, of_a_trial = values.get("rescoring_images"), RECIPES[values["recipe"]].get("num_images")
    if rescoring and of_a_trial and "num_images" in by_hand and "rescoring_images" not in by_hand:
        found["rescoring_images"] = min(rescoring, math.ceil(rescoring * by_hand["num_images"] / of_a_trial))
    for low, high in (("steps_min", "steps_max"), ("guidance_min", "guidance_max")):
        lowest, highest = (values.get(name, FIELDS[name].default) for name in (low, high))
        if lowest > highest and (low in by_hand) != (high in by_hand):
            found |= {low: highest} if high in by_hand else {high: lowest}
    return found


def _check_together(settings: Settings) -> None:
    """Raises ValueError for values that are right one by one, and not together."""
    if settings.steps_min > settings.steps_max:
        raise ValueError(f"steps_min ({settings.steps_min}) must not exceed steps_max ({settings.steps_max}).")
    if settings.guidance_min > settings.guidance_max:
        raise ValueError(
            f"guidance_min ({settings.guidance_min:g}) must not exceed guidance_max ({settings.guidance_max:g})."
        )
    in_memory = re.fullmatch(r"sqlite(\+\w+)?:/{2,3}(:memory:)?(\?.*)?", settings.storage or "")
    if settings.storage and ("://" not in settings.storage or settings.storage.startswith("://") or in_memory):
        raise ValueError(
            f"storage {shown(settings.storage.split('@')[-1])} is no Optuna URL of a database that can be shared (a "
            "journal file, or a database in memory, is for one process): give sqlite:///search.db, "
            "postgresql://user@host/name or grpc://host:13000, or leave storage out."
        )
    empty_prompt = "empty_prompt" in (settings.class_encoder_start, settings.unconditional)
    if empty_prompt and (settings.class_encoder_rank or settings.class_encoder_tokens):
        raise ValueError(
            "The empty prompt's context (class_encoder_start or unconditional) fits the paper's Class-Encoder alone: "
            "give no class_encoder_rank or class_encoder_tokens with it, or choose 'random' and 'zero'."
        )


def unlike_recipe(values: Mapping[str, Any], recipe: str) -> dict[str, Any]:
    """Those of some settings' ``values`` that are not as in the recipe, by name, sorted; the shared ones left out."""
    usual = Settings(**RECIPES.get(recipe, {}))
    known = sorted(set(values) & set(FIELDS) - set(SHARED))
    return {name: values[name] for name in known if values[name] != getattr(usual, name)}


def protocol(settings: Settings, method: str = "class_encoder") -> list[dict[str, Any]]:
    """What a run follows and where it departs: a row for each setting a method's paper or its released code fixes.

    ``method`` "class_encoder" (the first paper), "inversion" (Diffusion Inversion) or "augmented" (conditioning).
    Each row has ``setting``, ``this run``, ``paper``, ``released code`` (their values) and ``source``.
    """
    columns = {
        "this run": settings.to_dict(),
        "paper": {**Settings().to_dict(), "backbone": "sd2"},
        "released code": {**Settings().to_dict(), **RECIPES["released"]},
    }
    return [
        {"setting": name, **{column: values[name] for column, values in columns.items()}, "source": source}
        for name, field in FIELDS.items()
        if (source := field.metadata["source"]) and method == method_of(name)
    ]


LISTED = {"class_encoder": "00", "inversion": "08", "augmented": "10"}  # the chapters that show `protocol`


def method_of(name: str) -> str:
    """The method whose paper a setting comes from; what no other method alone reads is the first one's."""
    first = name.split("_")[0]
    return first if first in LISTED else "class_encoder"


def followed(settings: Settings, method: str = "class_encoder") -> str:
    """One line: in how many of those settings a run is as the paper, or as its released code if that is the recipe."""
    like = "released code" if settings.recipe == "released" else "paper"
    rows = protocol(settings, method)
    same = sum(row["this run"] == row[like] for row in rows)
    text = f"the {like} in {same} of {len(rows)} settings"
    return text if same == len(rows) else f"{text} (chapter {LISTED[method]} lists where it departs)"
