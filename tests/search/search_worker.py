"""For the search's tests: a classifier whose accuracy is a formula, and a process that takes part in a search."""

import json
import math
import os
import signal
import time
from pathlib import Path

import torch

from sdgen_lib import data
from sdgen_lib.search import search, study

SPACE = search.Space((5, 20), (0.0, 7.5), (1, 4))


def digits():
    return data.load("digits:100", image_size=8)


class Right(torch.nn.Module):
    """In place of a classifier: its one weight is its accuracy."""

    def __init__(self):
        super().__init__()
        self.register_buffer("accuracy", torch.zeros((), dtype=torch.float64))


def images_of(*point):
    """In place of images: where in the space they were asked for."""
    return torch.tensor(point, dtype=torch.float64)


def train_classifier(training, val, num_classes, *, epochs, seed, on_epoch):
    """An accuracy that is highest at UGS 2 and grows with the epochs."""
    model, history = Right(), []
    for epoch in range(1, epochs + 1):
        history.append(math.exp(-((float(training.images[1]) - 2) ** 2) / 4) * epoch / epochs)
        model.accuracy.fill_(history[-1])
        on_epoch(epoch, model, history[-1])
    return model, history


def accuracy(model, split):
    """On the test images half of it."""
    return float(model.accuracy) / 2


FORMULA = ((search, "train_classifier", train_classifier), (search, "accuracy", accuracy))


def run(trials, images, make=images_of, n_trials=3, epochs=2, shared=True, **changes):
    """`search.search` on the study ``trials``; ``images`` is the dataset."""
    options = {"select_on": "val", "seed": 0, "classifier_seed": 0, "classifier_options": {"epochs": epochs}, **changes}
    return search.search(trials, SPACE, make, images.train.labels, images, n_trials=n_trials, shared=shared, **options)


def take_part(where, name, folder: Path, n_trials, workers=1, dies_in=None, heartbeat=1, grace=3):
    """Works on a shared search to its end; dies by SIGKILL in its ``dies_in``-th trial.

    Appends every point that it begins to ``folder/begun``, and waits there in its first trial for as many ``workers``
    (dead ones count) to have begun one. Keeps the search in ``folder/<pid>.log``.
    """
    for module, attribute, value in FORMULA:
        setattr(module, attribute, value)
    study.HEARTBEAT_SECONDS, study.GRACE_SECONDS = heartbeat, grace
    torch.set_num_threads(1)
    begun = []

    def make(*point):
        begun.append(point)
        with open(folder / "begun", "a") as file:
            file.write(json.dumps([os.getpid(), *point]) + "\n")
        time.sleep(0.1)  # for a first sign of life
        while len({pid for pid, *_ in map(json.loads, (folder / "begun").read_text().splitlines())}) < workers:
            time.sleep(0.1)
        if len(begun) == dies_in:
            os.kill(os.getpid(), signal.SIGKILL)
        return images_of(*point)

    shared = run(study.share_study(where, name), digits(), make, n_trials, epochs=3)
    study.keep(shared, folder / f"{os.getpid()}.log", n_trials)
