"""The one training loop: which parameters train, and what the UNet is told of each image, are its arguments."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import nn

from ..machine.memory import MicroBatch
from ..machine.ranks import ALONE, Ranks
from ..machine.seeds import derived
from .backbone import Backbone
from .conditions import Condition, Conditioner
from .loss import diffusion_loss

# The share of the first learning rate, at each share of the training.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "constant": lambda done: 1.0,
}
FIXED_NOISES = 2  # noises per held-out latent: enough that the loss of two epochs can be compared


@dataclasses.dataclass(frozen=True)
class Latents:
    """A split after the VAE: latents float32 (N, C, H, W) and labels int64 (N,), on the device."""

    latents: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)


@torch.no_grad()
def held_out_losses(
    backbone: Backbone, conditioner: Conditioner, held_out: Latents, num_classes: int, batch_size: int = 256
) -> dict[str, float]:
    """The diffusion loss on held-out images with their right label, a wrong one and the unconditional context.

    Timesteps and noise are fixed, so that epochs compare. A model that uses the label shows right < empty and
    right < wrong; a loss that falls while the three draw together has forgotten the class.
    """
    n, labels, indices = len(held_out), held_out.labels, torch.arange(len(held_out))
    generator, empty = torch.Generator().manual_seed(0), conditioner.unconditional()
    totals = dict.fromkeys(("right", "wrong", "empty"), 0.0)
    for _ in range(FIXED_NOISES):
        t = torch.randint(0, len(backbone.alphas_cumprod), (n,), generator=generator)
        noise = torch.randn(held_out.latents.shape, generator=generator)
        wrong = (labels + torch.randint(1, num_classes, (n,), generator=generator).to(labels.device)) % num_classes
        told = {
            "right": lambda rows: conditioner(labels[rows], indices[rows], 0),
            "wrong": lambda rows: conditioner(wrong[rows], indices[rows], 0),
            "empty": lambda rows: empty.expand(len(indices[rows])),
        }
        for kind, condition in told.items():
            loss = fixed_loss(backbone, held_out.latents, condition, t, noise, batch_size)
            totals[kind] += loss / FIXED_NOISES
    return totals


def fixed_loss(
    backbone: Backbone,
    latents: torch.Tensor,
    condition: Callable[[slice], Condition],
    t: torch.Tensor,
    noise: torch.Tensor,
    batch_size: int = 256,
) -> float:
    """The mean loss of latents (N, C, H, W) at t (N,) with ``noise``, which may lie on the CPU."""
    sums: list[float] = []

    def work(rows: slice) -> None:
        at = t[rows].to(backbone.device)
        loss = diffusion_loss(
            backbone.predict_noise,
            latents[rows],
            condition(rows),
            at,
            noise[rows].to(backbone.device),
            backbone.alphas_cumprod,
            backbone.loss_weight(at),
        )
        sums.append(float(loss) * len(at))

    backbone.micro_batch("held-out losses", batch_size).run(len(latents), sums.clear, work)
    return sum(sums) / len(latents)


def optimizer_for(
    groups: Mapping[float, list[nn.Parameter]], name: str, *, weight_decay: float
) -> torch.optim.Optimizer:
    """AdamW (the released code's Keras Adam decays decoupled too), or with a state of 8 bits (Dettmers et al. 2022).

    ``groups``: the parameters by their learning rate. Each of the optimiser's groups keeps its rate as "first_lr".

    ``name`` "auto" takes 8 bits where weights, gradients and a float32 state, 16 bytes a parameter, would fill more
    than 60 % of a CUDA card: the whole UNet of Stable Diffusion on 15 GiB. "row-adam" is for tables with sparse
    gradients: a row without one stays as it is, and nothing decays. Raises ImportError, with the ways out, where
    bitsandbytes is needed and missing.
    """
    parameters = [{"params": params, "lr": rate, "first_lr": rate} for rate, params in groups.items()]
    device = parameters[0]["params"][0].device
    if name == "auto":
        needed = 16 * sum(p.numel() for params in groups.values() for p in params)
        small = device.type == "cuda" and needed > 0.6 * torch.cuda.get_device_properties(device).total_memory
        name = "adamw-8bit" if small else "adamw"
    if name == "adamw":
        return torch.optim.AdamW(parameters, weight_decay=weight_decay, fused=True)
    if name == "row-adam":
        return torch.optim.SparseAdam(parameters)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ImportError(
            "Training this UNet here needs an optimiser state of 8 bits: pip install bitsandbytes, or choose "
            "finetune_method='lora', or optimizer='adamw' if the memory suffices."
        ) from error
    return AdamW8bit(parameters, weight_decay=weight_decay)


@dataclasses.dataclass
class TrainingState:
    """All that a training goes on from after an epoch: parameters, optimiser, loss scale. safetensors can hold it."""

    trainable: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    epoch: int = 0

    def tensors(self) -> dict[str, torch.Tensor]:
        """By flat names: "epoch", "model.<name>", "optimizer.<number>.<quantity>", "scaler.<quantity>".

        They are what trains, not copies of it: save them before the training goes on.
        """
        # Not `optimizer.state_dict()`, in which bitsandbytes puts the quantities of 8 bits a level deeper.
        states = [self.optimizer.state.get(p, {}) for p in self.trainable.values()]
        return {
            "epoch": torch.tensor(self.epoch),
            **{f"model.{name}": p for name, p in self.trainable.items()},
            **{f"optimizer.{i}.{key}": torch.as_tensor(v) for i, s in enumerate(states) for key, v in s.items()},
            **{f"scaler.{key}": torch.tensor(value) for key, value in self.scaler.state_dict().items()},
        }

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Goes back to where `tensors` was called, and may take those over. Raises KeyError where one is missing."""
        self.epoch = int(tensors["epoch"])
        with torch.no_grad():
            for name, parameter in self.trainable.items():
                parameter.copy_(tensors[f"model.{name}"])
        state: dict[int, dict[str, torch.Tensor | int]] = {}
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                _, number, key = name.split(".")
                # torch counts the steps in a float, bitsandbytes in a plain number
                is_count = key == "step" and not value.is_floating_point()
                state.setdefault(int(number), {})[key] = int(value) if is_count else value
        # It moves each quantity to where the optimiser wants it: a fused one on a card wants the count there, too.
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        if self.scaler.is_enabled():
            known = self.scaler.state_dict()
            self.scaler.load_state_dict({k: type(v)(tensors[f"scaler.{k}"].item()) for k, v in known.items()})


@dataclasses.dataclass(frozen=True)
class Batch:
    """What one step of the optimiser trains on, on the CPU.

    ``rows`` int64 (B,) of the training set; ``t`` int64 (B,) timesteps; ``noise`` float (B, C, H, W); ``dropped`` bool
    (B,): whether the image is told the unconditional context instead of its own.
    """

    rows: torch.Tensor
    t: torch.Tensor
    noise: torch.Tensor
    dropped: torch.Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, part: slice) -> Batch:
        return Batch(self.rows[part], self.t[part], self.noise[part], self.dropped[part])


@dataclasses.dataclass
class Batches:
    """The training images, noises and timesteps of each epoch, which come from (``seed``, epoch) alone.

    An epoch is ``images`` long (None: as the training set). The epochs are the parts of one endless row of random
    orders of the training set: none of its images comes an (n + 1)-th time before all have come n times.
    """

    train: Latents
    batch_size: int
    seed: int
    num_timesteps: int
    images: int | None = None
    label_dropout: float = 0.0

    @property
    def images_per_epoch(self) -> int:
        return self.images or len(self.train)

    @property
    def per_epoch(self) -> int:
        return math.ceil(self.images_per_epoch / self.batch_size)

    def of(self, epoch: int) -> Iterator[Batch]:
        """The batches of an epoch, from 1."""
        generator = torch.Generator().manual_seed(derived(self.seed, "noise of training epoch", epoch))
        for rows in self._rows(epoch).split(self.batch_size):
            t = torch.randint(0, self.num_timesteps, (len(rows),), generator=generator)
            noise = torch.randn(len(rows), *self.train.latents.shape[1:], generator=generator)
            yield Batch(rows, t, noise, torch.rand(len(rows), generator=generator) < self.label_dropout)

    def _rows(self, epoch: int) -> torch.Tensor:
        n, first, last = len(self.train), (epoch - 1) * self.images_per_epoch, epoch * self.images_per_epoch
        orders = [self._order(number) for number in range(first // n, math.ceil(last / n))]
        return torch.cat(orders)[first % n :][: self.images_per_epoch]

    def _order(self, number: int) -> torch.Tensor:
        seed = derived(self.seed, "order of the training images", number)
        return torch.randperm(len(self.train), generator=torch.Generator().manual_seed(seed))


@dataclasses.dataclass(frozen=True)
class Gradients:
    """The gradients of a batch's mean loss, added up over what fits into the memory at once and over all ranks."""

    state: TrainingState
    backbone: Backbone
    conditioner: Conditioner
    batches: Batches
    micro_batch: MicroBatch
    ranks: Ranks

    def compute(self, batch: Batch) -> torch.Tensor:
        """Leaves them in the parameters. Returns the loss, a scalar on the device."""
        train, device = self.batches.train, self.backbone.device
        whole, batch = len(batch), batch[slice(self.ranks.rank, None, self.ranks.count)]
        rows, t = batch.rows.to(train.labels.device), batch.t.to(device)
        noise, dropped = batch.noise.to(device), batch.dropped.to(device)
        losses: list[torch.Tensor] = []

        def begin() -> None:
            self.state.optimizer.zero_grad(set_to_none=True)
            losses.clear()

        def work(part: slice) -> None:
            at = rows[part]
            told = self.conditioner(train.labels[at], at, self.batches.seed)
            if self.batches.label_dropout:
                told = told.where(dropped[part], self.conditioner.unconditional())
            loss = diffusion_loss(
                self.backbone.predict_noise,
                train.latents[at],
                told,
                t[part],
                noise[part],
                self.backbone.alphas_cumprod,
                self.backbone.loss_weight(t[part]),
            )
            loss = loss * (len(at) / whole)
            self.state.scaler.scale(loss).backward()
            losses.append(loss.detach())

        self.micro_batch.run(len(batch), begin, work)
        return self._added_up(sum(losses, start=torch.zeros((), device=device)))

    def _added_up(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss of all ranks; the gradients become all ranks' too."""
        if self.ranks.count > 1:
            parameters = list(self.state.trainable.values())
            for p in parameters:  # there were fewer rows than ranks
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            self.ranks.add_up([loss, *(p.grad for p in parameters)])
        return loss


@dataclasses.dataclass(frozen=True)
class Epoch:
    """What an epoch of `fit` leaves: its number from 1, its mean training loss, the state to go on from."""

    number: int
    loss: float
    state: TrainingState
    micro_batch: MicroBatch


def fit(
    trainable: Mapping[str, nn.Parameter],
    backbone: Backbone,
    conditioner: Conditioner,
    train: Latents,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    weight_decay: float,
    clip_norm: float,
    seed: int,
    own_rates: Mapping[str, float] | None = None,
    images_per_epoch: int | None = None,
    label_dropout: float = 0.0,
    optimizer: str = "auto",
    schedule: str = "cosine",
    resume: Mapping[str, torch.Tensor] | None = None,
    at_once: int | None = None,
    gradient_checkpointing: bool = False,
    ranks: Ranks = ALONE,
    title: str = "training",
) -> Iterator[Epoch]:
    """Trains ``trainable`` with the diffusion loss, and yields after every epoch.

    ``trainable``: parameters, by name, of a conditioner or of the backbone's UNet; all else stays frozen. AdamW, global
    clip norm, cosine decay to zero over all steps (paper, section 3, step 1). ``own_rates``: the learning rates, by
    name, of parameters that do not have ``learning_rate``. ``images_per_epoch``: how long an epoch is; None: once over
    the training set. ``label_dropout`` (0..1): the share of images that are told the conditioner's unconditional
    context, so that guidance has one that was trained (Ho and Salimans 2022). ``optimizer``: see `optimizer_for`.
    ``schedule`` "cosine" or "constant": of the learning rates. ``clip_norm`` infinity clips nothing.

    Each epoch's order, timesteps and noise come from (seed, epoch) alone, so that with ``resume``, the
    `TrainingState.tensors` of an earlier epoch, a killed training goes on to the same result.

    Several ``ranks`` share each batch and add their gradients up: the result is one process's, up to rounding. Where
    the accelerator's memory runs out, gradient checkpointing is switched on, then a batch goes through in parts whose
    gradients add up to the batch's (``at_once``: begin with so many images). float16 scales the loss.
    Raises FloatingPointError if the loss stops being finite.
    """
    share_of_rate = SCHEDULES[schedule]
    rates = {name: (own_rates or {}).get(name, learning_rate) for name in trainable}
    state = _begun(trainable, backbone, optimizer, rates, weight_decay)
    batches = Batches(train, batch_size, seed, len(backbone.alphas_cumprod), images_per_epoch, label_dropout)
    micro_batch = MicroBatch(min(at_once or batch_size, batch_size), lambda: _checkpoints_gradients(backbone))
    gradients = Gradients(state, backbone, conditioner, batches, micro_batch, ranks)
    try:
        if resume:
            state.load(resume)
        ranks.wait()  # until all of them have read where to go on from
        if gradient_checkpointing:
            backbone.unet.enable_gradient_checkpointing()
        done, total_steps = state.epoch * batches.per_epoch, epochs * batches.per_epoch
        for epoch in range(state.epoch + 1, epochs + 1):
            losses: list[torch.Tensor] = []  # of each batch; looked at once an epoch, so that a card need not wait
            for batch in batches.of(epoch):
                losses.append(gradients.compute(batch) * (len(batch) / batches.images_per_epoch))
                _step(state, share_of_rate(done / total_steps), clip_norm)
                done += 1
            state.epoch = epoch
            yield Epoch(epoch, _mean_loss(losses, title, epoch, learning_rate), state, micro_batch)
    finally:
        state.optimizer.zero_grad(set_to_none=True)
        backbone.unet.disable_gradient_checkpointing()
        for parameter in state.trainable.values():
            parameter.requires_grad_(False)


def _begun(
    trainable: Mapping[str, nn.Parameter],
    backbone: Backbone,
    optimizer: str,
    rates: Mapping[str, float],
    weight_decay: float,
) -> TrainingState:
    """The state before the first epoch: what trains asks for gradients from now on."""
    # In the optimiser's order, whose groups have a rate each: its state goes by numbers.
    names = [name for rate in dict.fromkeys(rates.values()) for name in trainable if rates[name] == rate]
    trainable = {name: trainable[name].requires_grad_(True) for name in names}
    if not {id(p) for p in trainable.values()}.isdisjoint(map(id, backbone.unet.parameters())):
        backbone.unet_key = None  # its weights will be none that anybody named
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in trainable.items():
        groups.setdefault(rates[name], []).append(parameter)
    adam = optimizer_for(groups, optimizer, weight_decay=weight_decay)
    # Small gradients vanish in float16 unless the loss is made large first; elsewhere this does nothing.
    scaler = torch.amp.GradScaler(torch.device(backbone.device).type, enabled=backbone.dtype == torch.float16)
    return TrainingState(trainable, adam, scaler)


def _step(state: TrainingState, share: float, clip_norm: float) -> None:
    """One step of the optimiser, at this share of each first rate, along gradients of a norm of at most ``clip_norm``.

    The norm is that of all parameters together.
    """
    for group in state.optimizer.param_groups:
        group["lr"] = share * group["first_lr"]
    state.scaler.unscale_(state.optimizer)
    if clip_norm < math.inf:  # sparse gradients have no norm in torch
        nn.utils.clip_grad_norm_(list(state.trainable.values()), clip_norm)
    state.scaler.step(state.optimizer)
    state.scaler.update()


def _checkpoints_gradients(backbone: Backbone) -> bool:
    """Switches gradient checkpointing on; returns whether it was off."""
    if backbone.unet.is_gradient_checkpointing:
        return False
    backbone.unet.enable_gradient_checkpointing()
    return True


def _mean_loss(losses: list[torch.Tensor], title: str, epoch: int, learning_rate: float) -> float:
    """The sum of an epoch's batch losses, each already weighted by its share of the images."""
    found = torch.stack(losses).cpu()
    if not torch.isfinite(found).all():
        first = int((~torch.isfinite(found)).nonzero()[0])
        raise FloatingPointError(
            f"Loss of {title}, epoch {epoch}, is {float(found[first])} from batch {first + 1} of {len(found)} on: "
            f"lower the learning rate of {learning_rate:g}. What earlier epochs left is kept."
        )
    return float(found.sum())
