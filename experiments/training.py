"""Training and evaluation of one model on one split: `fit` yields one record an epoch and knows of no tracker.

All images stay on the device as uint8; a batch is a gather by index. Per epoch the host plans the order (and the
augmentation) with one generator, sends it in one copy, and reads loss and confusion matrix back once.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from datasets import ImageData, Split
from experiments import metrics
from experiments.config import TrainingConfig

Network = TypeVar("Network", bound=nn.Module)
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
EVALUATION_PIXELS = {"cpu": 512 * 28 * 28, "cuda": 4096 * 28 * 28}  # a batch: fits the cache; fills the card


class TrainingDivergedError(Exception):
    """The loss is not finite any more; the message has the epoch and which loss."""


@dataclass(frozen=True)
class DeviceImages:
    """A data set on the device.

    Attributes
    ----------
    pixels : Tensor of uint8, shape (N, height, width, channels)
    labels : Tensor of int64, shape (N,)
    moments : Tensor of int64, shape (2, N, channels)
        Sum and sum of squares of each image's pixels, from which every split's normalisation follows exactly.
    num_classes : int
    """

    pixels: Tensor
    labels: Tensor
    moments: Tensor
    num_classes: int

    @classmethod
    def load(cls, data: ImageData, device: str) -> "DeviceImages":
        """Copy a data set to the device, once for all models and splits."""
        pixels = torch.from_numpy(data.images).to(device)
        chunks = (chunk.long() for chunk in torch.split(pixels, 256))  # few at a time: int64 is 8 times as large
        moments = torch.cat([torch.stack([x.sum((1, 2)), x.square().sum((1, 2))]) for x in chunks], dim=1)
        return cls(pixels, torch.from_numpy(data.labels).to(device), moments, len(data.classes))

    def normalisation(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel over the images at `indices`, in units of 0 to 255."""
        rows = torch.from_numpy(indices).to(self.moments.device)
        total, squares = self.moments[:, rows].sum(1).double()
        count = len(indices) * self.pixels.shape[1] * self.pixels.shape[2]
        mean = total / count
        std = (squares / count - mean.square()).clamp_min(0).sqrt()
        return mean.float(), torch.where(std < 1e-6, 1.0, std).float()  # all pixels alike: nothing to scale


@dataclass(frozen=True)
class Evaluation:
    """What a model makes of some images.

    Attributes
    ----------
    loss : float
        Mean cross-entropy, in nats.
    confusion : numpy.ndarray of int64, shape (K, K)
        Counts; rows are true classes, columns predictions.
    predicted : Tensor of int64, shape (n,)
        On the device, in the order of the indices.
    probability : Tensor of float32, shape (n,)
        The model's probability of the predicted class.
    """

    loss: float
    confusion: np.ndarray
    predicted: Tensor
    probability: Tensor

    def scores(self) -> dict[str, float]:
        """The scores by name."""
        return {
            "accuracy": metrics.accuracy(self.confusion),
            "f1_micro": metrics.f1_micro(self.confusion),
            "f1_macro": metrics.f1_macro(self.confusion),
            "loss": self.loss,
        }


@dataclass(frozen=True)
class EpochRecord:
    """One epoch of training.

    Attributes
    ----------
    epoch : int
        From 1.
    lr : float or None
        The learning rate of this epoch; None for a baseline, which has none.
    train_loss, train_accuracy : float
        Means over the epoch's batches, each before its own step.
    val : Evaluation
        After the epoch's last step.
    improved : bool
        Whether this is the lowest validation loss so far.
    seconds : float
        Since the last record was handed out: training, validation, and what the caller did with that record.
    """

    epoch: int
    lr: float | None
    train_loss: float
    train_accuracy: float
    val: Evaluation
    improved: bool
    seconds: float


class Batches:
    """Gathers normalised batches of a resident data set.

    Parameters
    ----------
    data : DeviceImages
    mean, std : Tensor of float32, shape (channels,)
        Of the training part (`DeviceImages.normalisation`).
    """

    def __init__(self, data: DeviceImages, mean: Tensor, std: Tensor) -> None:
        self.data = data
        self.scale = (1 / std).view(1, -1, 1, 1)
        self.shift = (-mean / std).view(1, -1, 1, 1)
        self.size = data.pixels.shape[1]
        self.arange = torch.arange(self.size, device=data.pixels.device)

    def normalise(self, pixels: Tensor) -> Tensor:
        """Turn uint8 (n, H, W, C) into float32 (n, C, H, W) in channels_last memory, without a copy for that."""
        return torch.addcmul(self.shift, pixels.permute(0, 3, 1, 2).float(), self.scale)

    def plain(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Images and labels at `rows`, shape (n,)."""
        return self.normalise(self.data.pixels[rows]), self.data.labels[rows]

    def augmented(self, rows: Tensor, moves: Tensor) -> tuple[Tensor, Tensor]:
        """The same, shifted and flipped.

        `moves` has shape (n, 3): downwards, to the right (pixels), and 1 to flip. A shifted crop of an image padded
        by reflection is a gather with reflected coordinates, so nothing is padded.
        """
        down, right, flip = moves[:, :, None].unbind(1)  # (n, 1) each
        y = self._reflect(self.arange + down)
        x = self._reflect(self.arange + right)
        x = torch.where(flip == 1, self.size - 1 - x, x)
        pixels = self.data.pixels[rows[:, None, None], y[:, :, None], x[:, None, :]]  # (n, H, W, C)
        return self.normalise(pixels), self.data.labels[rows]

    def _reflect(self, coordinates: Tensor) -> Tensor:
        coordinates = coordinates.abs()
        return self.size - 1 - (self.size - 1 - coordinates).abs()


def plan_epoch(train: np.ndarray, size: int, augment: bool, generator: torch.Generator) -> Tensor:
    """Draw the order of an epoch and each image's augmentation.

    Returns
    -------
    Tensor of int64, shape (n_train, 4)
        Index of the image, shift down, shift right (up to an eighth of `size`), and whether to flip.
    """
    order = torch.from_numpy(train)[torch.randperm(len(train), generator=generator)]
    plan = torch.zeros(len(train), 4, dtype=torch.int64)
    plan[:, 0] = order
    if augment:
        reach = size // 8
        plan[:, 1:3] = torch.randint(-reach, reach + 1, (len(train), 2), generator=generator)
        plan[:, 3] = torch.randint(0, 2, (len(train),), generator=generator)
    return plan


def split_batches(plan: Tensor, batch_size: int) -> list[Tensor]:
    """Cut a plan into as few batches as `batch_size` allows, of equal size to within one image.

    A small last batch would move BatchNorm's running statistics, which evaluation uses, as far as a full one does,
    and BatchNorm cannot train on a single image at all: three images are one batch even where two were asked for.
    """
    count = min(math.ceil(len(plan) / batch_size), max(1, len(plan) // 2))
    return list(torch.tensor_split(plan, count))


def split_seed(seed: int, number: int) -> int:
    """Seed of everything random in one split of a run; all models share it, so they see the same batches."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])


def initialise(build: Callable[[], Network], seed: int, device: str) -> Network:
    """Build a model whose weights follow from the seed alone, on the device, in channels_last memory."""
    torch.manual_seed(seed)
    return build().to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


class TrainingState:
    """All that an epoch changes and the next one depends on: a training that goes on from it gives the same bits.

    Parameters
    ----------
    model : nn.Module
        On the device that trains it, in channels_last memory.
    config : TrainingConfig
        Resolved (no `auto`).
    seed : int
        Of batch order, augmentation, and dropout.

    Attributes
    ----------
    epoch, best_epoch : int
        Epochs done, and the one with the lowest validation loss; 0 before the first.
    best : Evaluation or None
        Of the validation part after the best epoch.
    best_weights : dict of str to Tensor
        Weights and buffers then, on the device.
    """

    def __init__(self, model: nn.Module, config: TrainingConfig, seed: int) -> None:
        self.model = model
        self.config = config
        self.device = next(model.parameters()).device
        torch.manual_seed(seed)  # dropout draws from the global generator
        self.generator = torch.Generator().manual_seed(seed)
        self.optimizer = torch.optim.AdamW(model.parameters(), config.lr, weight_decay=config.weight_decay, fused=True)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, config.epochs)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")
        self.epoch = self.best_epoch = 0
        self.best: Evaluation | None = None
        self.best_weights = clone_state(model)

    @property
    def is_done(self) -> bool:
        """Whether all epochs are done, or `patience` of them have not lowered the validation loss."""
        return self.epoch >= self.config.epochs or self.epoch - self.best_epoch >= self.config.patience

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` takes: tensors, numbers, and dicts and lists of them."""
        parts = {name: getattr(self, name).state_dict() for name in _STATEFUL}
        generators = {"generator": self.generator.get_state(), "torch": torch.get_rng_state()}
        if self.device.type == "cuda":
            generators["cuda"] = torch.cuda.get_rng_state(self.device)
        best = self.best and {**vars(self.best), "confusion": torch.from_numpy(self.best.confusion)}
        epochs = {"epoch": self.epoch, "best_epoch": self.best_epoch}
        return {**parts, **generators, **epochs, "best": best, "best_weights": self.best_weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there; tensors may lie on another device."""
        for name in _STATEFUL:
            getattr(self, name).load_state_dict(state[name])
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["torch"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"], self.device)
        self.epoch, self.best_epoch = state["epoch"], state["best_epoch"]
        best = state["best"]
        self.best = Evaluation(**{**best, "confusion": best["confusion"].numpy()}) if best else None
        self.best_weights = {key: value.to(self.device) for key, value in state["best_weights"].items()}


_STATEFUL = ("model", "optimizer", "schedule", "scaler")  # attributes with a state_dict of their own


def fit(state: TrainingState, data: DeviceImages, split: Split) -> Iterator[EpochRecord]:
    """Train a model on a split and yield one record an epoch; at the end the model has its best epoch's weights.

    AdamW, cosine schedule over `config.epochs`, early stopping on the validation loss. On the CPU the same seed and
    number of threads give the same numbers bit for bit, also where the state was saved between two epochs and
    loaded by another process.

    Parameters
    ----------
    state : TrainingState
        New, or loaded. When a record is handed out it is that of the record's epoch.
    data : DeviceImages
        On the model's device.
    split : Split
        Of which `train` is trained and `val` selected on; `test` is not looked at.

    Yields
    ------
    EpochRecord

    Raises
    ------
    TrainingDivergedError
        A loss is not finite.
    """
    model, config = state.model, state.config
    batches = Batches(data, *data.normalisation(split.train))
    val_rows = torch.from_numpy(split.val).to(state.device)  # once: a copy from the host waits for what is queued
    started = time.perf_counter()
    while not state.is_done:
        plan = plan_epoch(split.train, batches.size, config.augment, state.generator)
        totals = _train_epoch(state, batches, plan.to(state.device, non_blocking=True))
        val = _evaluate_on_device(model, batches, val_rows, config.precision)
        lr = state.optimizer.param_groups[0]["lr"]
        state.schedule.step()
        (train_loss, correct), evaluation = _read_back(totals, val)  # the epoch's one host sync
        state.epoch += 1
        for name, loss in (("training", train_loss), ("validation", evaluation.loss)):
            if not math.isfinite(loss):
                raise TrainingDivergedError(f"the {name} loss is {loss} in epoch {state.epoch}; a lower --lr may help")
        if improved := state.best is None or evaluation.loss < state.best.loss:
            state.best, state.best_epoch, state.best_weights = evaluation, state.epoch, clone_state(model)
        now = time.perf_counter()
        seconds, started = now - started, now
        n = len(split.train)
        yield EpochRecord(state.epoch, lr, train_loss / n, correct / n, evaluation, improved, seconds)
    model.load_state_dict(state.best_weights)


def clone_state(model: nn.Module) -> dict[str, Tensor]:
    """Copy of the weights and buffers, on their device."""
    return {key: value.clone() for key, value in model.state_dict().items()}


def _autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[object]:
    return torch.autocast(device.type, AUTOCAST.get(precision), enabled=precision in AUTOCAST)


def _train_epoch(state: TrainingState, batches: Batches, plan: Tensor) -> Tensor:
    """One pass over the plan; returns the sum of losses and the count of hits, on the device (float64)."""
    model, config, optimizer, scaler = state.model, state.config, state.optimizer, state.scaler
    totals = torch.zeros(2, dtype=torch.float64, device=plan.device)
    model.train()
    for batch in split_batches(plan, config.batch_size):
        x, y = batches.augmented(batch[:, 0], batch[:, 1:]) if config.augment else batches.plain(batch[:, 0])
        optimizer.zero_grad(set_to_none=True)
        with _autocast(plan.device, config.precision):
            logits = model(x)
        loss = cross_entropy(logits.float(), y)
        scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        scaler.step(optimizer)
        scaler.update()
        with torch.no_grad():
            totals += torch.stack([loss * len(y), (logits.argmax(1) == y).sum()])
    return totals


@dataclass(frozen=True)
class _Pass:
    """An evaluation before it is read back: sum of losses, flat confusion counts, predictions, probabilities."""

    loss: Tensor
    confusion: Tensor
    predicted: Tensor
    probability: Tensor


@torch.inference_mode()
def _evaluate_on_device(model: nn.Module, batches: Batches, rows: Tensor, precision: str) -> _Pass:
    device, classes = rows.device, batches.data.num_classes
    loss = torch.zeros((), dtype=torch.float64, device=device)
    confusion = torch.zeros(classes * classes, dtype=torch.int64, device=device)
    predicted, probability = [], []
    model.eval()
    for batch in torch.split(rows, max(16, EVALUATION_PIXELS.get(device.type, 2**20) // batches.size**2)):
        x, y = batches.plain(batch)
        with _autocast(device, precision):
            logits = model(x)
        log_probability = logits.float().log_softmax(1)
        highest, prediction = log_probability.max(1)
        loss -= log_probability.gather(1, y[:, None]).sum()
        # not bincount, which waits for the device to learn its output's size
        confusion.scatter_add_(0, y * classes + prediction, torch.ones_like(y))
        predicted.append(prediction)
        probability.append(highest.exp())
    return _Pass(loss, confusion, torch.cat(predicted), torch.cat(probability))


def _read_back(totals: Tensor, result: _Pass) -> tuple[list[float], Evaluation]:
    """Bring totals, loss and confusion matrix to the host in one copy."""
    numbers = torch.cat([totals, result.loss[None], result.confusion.double()]).tolist()
    *first, loss = numbers[: len(totals) + 1]
    side = math.isqrt(len(result.confusion))
    confusion = np.array(numbers[len(totals) + 1 :], dtype=np.int64).reshape(side, side)
    return first, Evaluation(loss / int(confusion.sum()), confusion, result.predicted, result.probability)


def evaluate(
    model: nn.Module, data: DeviceImages, indices: np.ndarray, mean: Tensor, std: Tensor, precision: str
) -> Evaluation:
    """Evaluate a model as `fit` does after each epoch: same batches, same bits.

    Parameters
    ----------
    model : nn.Module
        On the device of `data`, in channels_last memory (in another layout the last bits differ).
    data : DeviceImages
    indices : numpy.ndarray of int64, shape (n,)
        Which images.
    mean, std : Tensor of float32, shape (channels,)
        Of the model's training part (`DeviceImages.normalisation`).
    precision : str
        fp32, bf16 or fp16.
    """
    device = data.pixels.device
    result = _evaluate_on_device(model, Batches(data, mean, std), torch.from_numpy(indices).to(device), precision)
    return _read_back(torch.zeros(0, dtype=torch.float64, device=device), result)[1]
