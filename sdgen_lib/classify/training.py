"""The training of a classifier: on one set or a mixture of sets, for epochs or for an exact number of steps."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from ..data import Split
from ..data.splits import stratified
from ..machine.seeds import derived
from .augment import Augmentation, probabilities
from .mixtures import Batches, Mixture
from .networks import accuracy, build

LOWEST_RATE = 1e-5  # a plateau lowers the learning rate no further (the paper's released code, `min_lr`)
_random_state = threading.Lock()  # torch's global random numbers are one for all threads


class _Stream:
    """Random numbers of one training, for code that takes torch's global ones: initial weights, torchvision, dropout.

    ``with stream():`` makes the global generators go on where this stream stopped, and gives them back as they were.
    One thread at a time is inside. ``device``: that of the code; the CPU's generator is always among them.
    """

    def __init__(self, seed: int, device: str = "cpu"):
        self.generators = [torch.default_generator]
        if torch.device(device).type == "cuda":
            torch.cuda.init()
            index = torch.device(device).index
            self.generators += [torch.cuda.default_generators[torch.cuda.current_device() if index is None else index]]
        self.states = [torch.Generator(g.device).manual_seed(seed).get_state() for g in self.generators]

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        with _random_state:
            before = self._exchange(self.states)
            try:
                yield
            finally:
                self.states = self._exchange(before)

    def _exchange(self, states: list[torch.Tensor]) -> list[torch.Tensor]:
        """Sets the generators' states and returns those that they had."""
        before = [generator.get_state() for generator in self.generators]
        for generator, state in zip(self.generators, states):
            generator.set_state(state)
        return before


class _Optimisation:
    """A model, what it is trained on (on its device), and the optimiser."""

    def __init__(
        self,
        model: nn.Module,
        mixture: Mixture,
        num_classes: int,
        augmentation: Augmentation,
        *,
        learning_rate: float,
        label_smoothing: float,
        class_prior: Sequence[float] | None,
        seed: int,
        device: str,
    ):
        images, labels, weights = mixture.joined(num_classes)
        # Rows keep this memory format: convolutions are faster so.
        self.images = images.to(device).contiguous(memory_format=torch.channels_last)
        self.labels, self.weights = labels.to(device), None if weights is None else weights.to(device)
        self.model, self.num_classes, self.augmentation = model, num_classes, augmentation
        self.label_smoothing = label_smoothing
        self.log_prior = None if class_prior is None else torch.tensor(class_prior, device=device).log()
        self.optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate, fused=True)
        self.own_numbers = _Stream(derived(seed, "classifier's steps"), device) if augmentation or model.draws else None

    def batch(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The images at ``rows``, augmented, their labels, and their weights (None: all the same)."""
        images, labels = self.images[rows], self.labels[rows]
        weights = None if self.weights is None else self.weights[rows]
        if self.augmentation:
            with self.own_numbers():
                images = self.augmentation.images(images)
                if self.augmentation.of_a_batch:
                    labels = probabilities(labels, self.num_classes)
                    weights = torch.ones_like(labels[:, 0]) if weights is None else weights
                    images, labels, weights = self.augmentation.mixed(images, labels, weights)
            images = images.contiguous(memory_format=torch.channels_last)
        return images, labels, weights

    def step(self, rows: torch.Tensor) -> None:
        """One step of the optimiser on the images at ``rows``."""
        images, labels, weights = self.batch(rows)
        with self.own_numbers() if self.model.draws else contextlib.nullcontext():
            logits = self.model(images)
        loss = cross_entropy(logits, labels, weights, self.label_smoothing, self.log_prior)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()


def cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    weights: torch.Tensor | None,
    label_smoothing: float,
    log_prior: torch.Tensor | None = None,
) -> torch.Tensor:
    """The mean cross entropy of a batch, weighted by ``weights``, float (B,), if there are any.

    ``logits`` float (B, C), ``labels`` int64 (B,) or probabilities (B, C). ``log_prior`` float (C,): balanced softmax
    (Ren et al. 2020), which adds the logarithms of the classes' shares to the logits, in training alone.
    """
    if log_prior is not None:
        logits = logits + log_prior
    if weights is None:
        return F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    losses = F.cross_entropy(logits, labels, label_smoothing=label_smoothing, reduction="none")
    return (losses * weights).sum() / weights.sum()


def _epoch(optimisation: _Optimisation, batches: Iterable[torch.Tensor], taken: int, on_step) -> int:
    """The steps of an epoch, after ``taken`` others; returns how many there are now."""
    optimisation.model.train()
    for rows in batches:
        optimisation.step(rows)
        taken += 1
        if on_step:
            on_step(taken)
    return taken


def _plateau(optimizer: torch.optim.Optimizer, patience: int) -> torch.optim.lr_scheduler.ReduceLROnPlateau:
    """Lowers the learning rate as Keras' callback of that name does, which the paper's released code trains with.

    After ``patience`` epochs without a better one the next has a tenth of the rate, and the count begins again.
    Better is more than 1e-4 above the best so far. torch's own count is one longer, and its 1e-4 a share of the best.
    """
    return torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer,
        mode="max",
        factor=0.1,
        patience=max(patience, 1) - 1,
        threshold=1e-4,
        threshold_mode="abs",
        min_lr=LOWEST_RATE,
        eps=0.0,
    )


def _best_of(
    optimisation: _Optimisation,
    batches: Batches,
    val: Split,
    *,
    epochs: int,
    steps: int | None,
    plateau_patience: int,
    stop_patience: int,
    on_epoch,
    on_step,
) -> list[float]:
    """Trains the model and leaves it with the weights of its best epoch; returns each epoch's validation accuracy."""
    model = optimisation.model
    plateau = _plateau(optimisation.optimizer, plateau_patience)
    best, best_epoch, history, taken = copy.deepcopy(model.state_dict()), 0, [], 0
    if steps is not None:
        epochs = math.ceil(steps / len(batches))
    for epoch in range(1, epochs + 1):
        left = None if steps is None else steps - taken
        taken = _epoch(optimisation, itertools.islice(batches, left), taken, on_step)
        history.append(accuracy(model, val))
        plateau.step(history[-1])
        if best_epoch == 0 or history[-1] > history[best_epoch - 1]:
            best, best_epoch = copy.deepcopy(model.state_dict()), epoch
        if on_epoch:
            on_epoch(epoch, model, history[-1])
        if steps is None and epoch - best_epoch >= stop_patience:
            break
    model.load_state_dict(best)
    return history


def looked_at(val: Split, count: int | None) -> Split:
    """The ``count`` images of ``val`` that epochs are compared by, in the classes' proportions, always the same ones.

    None, or as many as there are or more: ``val`` itself.
    """
    return val if count is None or count >= len(val) else val.take(stratified(val.labels, count, seed=0))


def train_classifier(
    training: Split | Mixture,
    val: Split,
    num_classes: int,
    *,
    network: str = "resnet20",
    width: int = 16,
    shortcut: str = "subsample",
    augmentation: str = "none",
    epochs: int = 100,
    steps: int | None = None,
    batch_size: int = 256,
    epoch_images: int = 1,
    epoch_limit: int | None = None,
    val_images: int | None = None,
    learning_rate: float = 1e-3,
    label_smoothing: float = 0.1,
    class_prior: Sequence[float] | None = None,
    plateau_patience: int = 10,
    stop_patience: int = 25,
    seed: int = 0,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    on_epoch: Callable[[int, nn.Module, float], None] | None = None,
    on_step: Callable[[int], None] | None = None,
) -> tuple[nn.Module, list[float]]:
    """Trains a classifier from scratch; the defaults are the paper's protocol (section 4).

    Args:
        training: real or generated images, or a mixture of such sets.
        val: real images. Their accuracy lowers the learning rate and ends the training, both as Keras counts.
        network: one of `networks.NETWORKS`; ``width`` and ``shortcut`` are of "resnet20" alone.
        augmentation: one of `augment.AUGMENTATIONS`, or several, as "crop_flip+mixup".
        epochs: at most so many.
        steps: instead of ``epochs``, exactly so many steps of the optimiser, without early stopping. The validation
            accuracy is measured at the end of each epoch and after the last step.
        class_prior: the share of each class, all above 0, for a balanced softmax (see `cross_entropy`).
        plateau_patience: after so many epochs without a better one the learning rate is a tenth, but at least 1e-5.
        stop_patience: after so many epochs without a better one the training ends.
        epoch_images: an epoch sees every image; those of a set smaller than this several times, so that small sets
            are not also trained for fewer steps.
        epoch_limit: an epoch ends after so many images, and the next one goes on from there, so that large sets cost
            no more.
        val_images: of a larger ``val`` only so many are looked at after an epoch, see `looked_at`.
        seed: decides the weights, the order, the augmentations: nothing else does, and the caller's random numbers
            stay as they are. From 0 to 2**32 - 1.
        dtype: of the network's matrix products.
        on_epoch: called with the epoch (from 1), the model and its validation accuracy; may raise to stop.
        on_step: called with the number of steps so far; may raise to stop.

    Returns:
        The model with the weights of its best epoch, and every epoch's accuracy on the validation images looked at.

    Raises:
        ValueError: an unknown name, parts that do not fit, or a batch too small for the ratio or the network.
    """
    if steps is not None and steps < 1:
        raise ValueError(f"steps is {steps}; it must be a whole number from 1, or None.")
    if class_prior is not None and (len(class_prior) != num_classes or not min(class_prior) > 0):
        raise ValueError(
            f"class_prior is {class_prior}; it must have a share above 0 for each of {num_classes} classes."
        )
    mixture = training if isinstance(training, Mixture) else Mixture((training,))
    augment = Augmentation(augmentation, tuple(mixture.parts[0].images.shape[-2:]))
    options = {"width": width, "shortcut": shortcut} if network == "resnet20" else {}
    with _Stream(seed)():
        model = build(network, num_classes, dtype=dtype, **options)
    model = model.to(device, memory_format=torch.channels_last)
    epoch_size = len(mixture) * max(1, math.ceil(epoch_images / len(mixture)))
    epoch_size = min(epoch_size, epoch_limit or epoch_size)
    batches = Batches(mixture, epoch_size, batch_size, model.smallest_batch, seed)
    optimisation = _Optimisation(
        model,
        mixture,
        num_classes,
        augment,
        learning_rate=learning_rate,
        label_smoothing=label_smoothing,
        class_prior=class_prior,
        seed=seed,
        device=device,
    )
    history = _best_of(
        optimisation,
        batches,
        looked_at(val, val_images),
        epochs=epochs,
        steps=steps,
        plateau_patience=plateau_patience,
        stop_patience=stop_patience,
        on_epoch=on_epoch,
        on_step=on_step,
    )
    return model, history
