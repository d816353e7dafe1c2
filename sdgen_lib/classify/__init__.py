"""Classifiers: networks, augmentations, one training loop, and scores on any test set."""

from .attacks import ATTACKS, Attack, fgsm, pgd
from .augment import AUGMENTATIONS
from .mixtures import Mixture
from .networks import NETWORKS, ResNet20, accuracy, build, predict, probabilities_of
from .scores import Result, Score, score
from .training import looked_at, train_classifier

__all__ = [
    "ATTACKS",
    "AUGMENTATIONS",
    "NETWORKS",
    "Attack",
    "Mixture",
    "ResNet20",
    "Result",
    "Score",
    "accuracy",
    "build",
    "fgsm",
    "looked_at",
    "pgd",
    "predict",
    "probabilities_of",
    "score",
    "train_classifier",
]
