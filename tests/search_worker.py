"""A process that takes part in a search, for `test_storage`: a formula stands in for pictures and classifiers."""

import json
import math
import os
import signal
import time
from pathlib import Path

import torch

from sdgen_lib import classifier, data, tune, workers

SPACE = tune.Space((5, 20), (0.0, 7.5), (1, 4))
SETTINGS = {"num_images": 100, "space": [[5, 20], [0.0, 7.5], [1, 4]]}
# Dead workers are missed after seconds, not minutes.
IN_A_HURRY = ((workers, "HEARTBEAT_SECONDS", 1), (workers, "GRACE_SECONDS", 8), (tune, "POLL_SECONDS", 0.2))


def digits():
    return data.load("digits:100", image_size=8)


class Right(torch.nn.Module):
    """In place of a classifier: its one weight is its accuracy."""

    def __init__(self):
        super().__init__()
        self.register_buffer("accuracy", torch.zeros((), dtype=torch.float64))


def train_classifier(images, labels, val, num_classes, *, epochs, seed, on_epoch):
    """An accuracy that is highest at UGS 2 and grows with the epochs."""
    model, history = Right(), []
    for epoch in range(1, epochs + 1):
        history.append(math.exp(-((float(images[1]) - 2) ** 2) / 4) * epoch / epochs)
        model.accuracy.fill_(history[-1])
        on_epoch(epoch, model, history[-1])
    return model, history


def accuracy(model, split):
    """On the test images half of it."""
    return float(model.accuracy) / 2


FORMULA = ((classifier, "train_classifier", train_classifier), (classifier, "accuracy", accuracy))


def take_part(where: str, name: str, begun: Path, n_trials: int, dies_in: int | None) -> None:
    """Works on the search until it is finished; dies by SIGKILL in its ``dies_in``-th trial."""
    for module, attribute, value in (*IN_A_HURRY, *FORMULA):
        setattr(module, attribute, value)
    torch.set_num_threads(1)
    images, trials = digits(), 0

    def images_of(*point):
        nonlocal trials
        trials += 1
        with open(begun, "a") as file:
            file.write(json.dumps([os.getpid(), *point]) + "\n")
        if trials == dies_in:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.05)
        return torch.tensor(point, dtype=torch.float64)

    study = tune.share_study(where, name, SETTINGS)
    with tune.Workers(where) as me:
        tune.search(study, SPACE, images_of, images.train.labels, images, n_trials=n_trials, select_on="val", seed=0,
                    classifier_options={"epochs": 3}, workers=me)  # fmt: skip
