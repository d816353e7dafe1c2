"""Classifiers: networks, augmentations, one training loop, and scores on any test set."""

from .augment import AUGMENTATIONS
from .mixtures import Mixture
from .networks import NETWORKS, ResNet20, accuracy, build, predict
from .scores import Result, Score, score
from .training import train_classifier

__all__ = [
    "AUGMENTATIONS",
    "NETWORKS",
    "Mixture",
    "ResNet20",
    "Result",
    "Score",
    "accuracy",
    "build",
    "predict",
    "score",
    "train_classifier",
]
