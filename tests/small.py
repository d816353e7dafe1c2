"""The smallest run that passes through every step: two classes of 8 pixels, seconds from end to end."""

from pathlib import Path

import numpy as np

SMALL = dict(
    backbone="tiny",
    recipe="demo",
    precision="fp32",
    transfer_epochs=2,
    finetune_epochs=2,
    transfer_epoch_images="none",
    finetune_epoch_images="none",
    transfer_batch_size=4,
    finetune_batch_size=4,
    sample_batch_size=4,
    n_trials=4,
    num_images=6,
    steps_min=1,
    steps_max=2,
    default_steps=2,
    classifier_width=4,
    classifier_epochs=2,
    classifier_batch_size=4,
    classifier_epoch_images=1,
    classifier_seeds=2,
    max_multiple=2,
    inversion_visits=2,
    inversion_checkpoints=2,
    inversion_batch_size=4,
    inversion_steps=2,
    augmented_steps=2,
)


def write_dataset(path: Path, seed: int = 0) -> Path:
    """Two classes, dark and bright, 8 pixels: 6 images to train on, 4 to validate, 4 to test."""
    noise, parts = np.random.default_rng(seed), {}
    for part, count in (("train", 6), ("val", 4), ("test", 4)):
        labels = np.arange(count) % 2
        parts[f"{part}_labels"] = labels
        parts[f"{part}_images"] = (noise.integers(0, 100, (count, 8, 8)) + 120 * labels[:, None, None]).astype(np.uint8)
    np.savez(path, **parts)
    return path
