"""The recipes, and where the paper or its released code fixes a setting: data that `settings` reads."""

from __future__ import annotations

from typing import Any

# What each recipe changes of the paper's protocol.
RECIPES: dict[str, dict[str, Any]] = {
    "paper": {},
    # What the authors' code does where it departs from the paper's text (the right column of `paper.DEPARTURES`).
    "released": dict(
        backbone="sd1.4", image_size=None, antialias=False, class_encoder_rank=500, class_encoder_tokens=100,
        n_trials_retune=40, pruning=False, select_on="test", search_plateau_patience=25, search_stop_patience=50,
        classifier_width=64, classifier_shortcut="max_pool", class_mix="balanced", larger_sets="random",
    ),
    # One T4 hour: fewer images and trials; three classifiers a set, so that the tables carry a spread.
    "workshop": dict(
        image_size=None, transfer_epochs=15, class_encoder_start="empty_prompt", transfer_learning_rate=1e-3,
        finetune_epochs=5, n_trials=20, num_images=500, steps_max=25, default_steps=25, classifier_epochs=40,
        max_multiple=2, classifier_seeds=3, classifier_batch_size=64,
    ),
    # Minutes on two CPU cores with the tiny model. Its rates are its own: the paper's 1e-4 and 1e-5 suit contexts of
    # 77 x 1024 numbers and a UNet of 866 M parameters. Step 1 on digits, CAS at IS 10 and UGS 1 / 3, one classifier:
    # rate 3e-3 for 24 epochs 38 / 58 %, rate 0.1 for 12 epochs 93 / 91 %.
    "demo": dict(
        image_size=None, class_encoder_start="empty_prompt", transfer_epochs=12, transfer_batch_size=32,
        transfer_learning_rate=0.1, finetune_epochs=8, finetune_learning_rate=1e-4, weight_decay=0.0,
        sample_batch_size=200, n_trials=18, num_images=400, steps_max=12, classifier_epochs=24,
        classifier_batch_size=32, classifier_learning_rate=3e-3, classifier_epoch_images=400,
        classifier_epoch_limit=1200,
        plateau_patience=4, stop_patience=8, classifier_seeds=3, max_multiple=3,
    ),
}  # fmt: skip

# The settings that the paper or its released code speaks of, and where: what `protocol` compares a run with.
SOURCES = {
    "backbone": "section 4; released: KerasCV 0.6.1's SD 1.x",
    "image_size": "section 4; released: each set's own",
    "antialias": "released: the search's resizing",
    "class_encoder_rank": "section 3, step 1; released: Dense(500), Dense(100 x 768)",
    "class_encoder_tokens": "section 3, step 1; released: 100",
    "unconditional": "not in the paper; released: the zero vector",
    **dict.fromkeys(("transfer_epochs", "transfer_batch_size", "transfer_learning_rate"), "section 3, step 1"),
    **dict.fromkeys(("weight_decay", "clip_norm"), "section 3, step 1; released: decoupled (AdamW)"),
    **dict.fromkeys(("finetune_epochs", "finetune_batch_size", "finetune_learning_rate"), "section 3, step 3"),
    "finetune_method": "section 3, step 3: the whole UNet",
    "sampler": "released: KerasCV's deterministic DDIM",
    **dict.fromkeys(("n_trials", "num_images", "steps_min", "steps_max", "guidance_max"), "section 3, step 2"),
    "n_trials_retune": "section 3, step 4; released: 40 trials",
    "pruning": "section 3, step 2: Hyperband; released: no trial is ever pruned",
    "select_on": "paper: 'a real test set'; released: the tables' test set",
    "classifier_width": "section 4: ResNet20; released: first stage of 64 filters",
    "classifier_shortcut": "He et al. 2016, option A; released: max-pooling",
    **dict.fromkeys(("classifier_epochs", "classifier_batch_size", "classifier_learning_rate", "label_smoothing",
                     "plateau_patience", "stop_patience"), "section 4"),
    **dict.fromkeys(("search_plateau_patience", "search_stop_patience"), "released: 25 and 50 in the searches"),
    "max_multiple": "section 3, step 5",
    "class_mix": "section 3, step 5; released: balanced",
    "larger_sets": "not in the paper; released: random parts of one x10 set",
}  # fmt: skip
