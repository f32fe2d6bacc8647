"""Training of one model on one split: `fit` yields one record an epoch and knows of no tracker.

Images are on the device, normalised once a split; a batch is a gather by index. Per epoch the host plans the order (and
the augmentation) with one generator, sends it in one copy, and reads loss and confusion matrix back once. How layers
are computed is chosen in models/execution, by device and kind of layer.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import datasets
from datasets import Split
from experiments.training import hardware
from experiments.training.cross_fitting import WHOLE, rows_of_halves
from experiments.training.evaluation import Evaluation, Pass, read_back
from experiments.training.images import DeviceImages, Part, plan_epoch, split_batches
from experiments.training.state import TrainingState


class TrainingDivergedError(Exception):
    """The loss is not finite any more; the message has the epoch and which loss."""


@dataclass(frozen=True)
class EpochRecord:
    """One epoch of training."""

    epoch: int  # from 1
    lr: float | None  # learning rate of this epoch; None for a baseline
    train_loss: float  # this and the next: mean over the batches, each before its step
    train_accuracy: float
    val: Evaluation  # after the epoch's last step
    half_losses: tuple[float, float] | None  # its loss on each half of the validation part; None for a baseline
    improved: bool  # whether this is the lowest validation loss so far
    seconds: float  # since the last record: training, validation, and the work of the caller


def fit(
    state: TrainingState,
    data: DeviceImages,
    split: Split,
    half: np.ndarray | None = None,
    until: int | None = None,
) -> Iterator[EpochRecord]:
    """Train a model on a split and yield one record an epoch; at the end the model has its best epoch's weights.

    AdamW, cosine schedule over `config.epochs`, early stopping on the validation loss. On the CPU the same seed and
    number of threads give the same numbers bit for bit, also if the state was saved between two epochs and loaded
    elsewhere.

    The images that choose the best epoch cannot judge it: their score is the highest of many. So each half of them also
    chooses an epoch of its own, which scores the other half (`TrainingState.chosen`).

    Parameters
    ----------
    state : TrainingState
        New, or loaded. When a record is yielded, it is that of the record's epoch.
    data : DeviceImages
        On the model's device.
    split : Split
        `train` is trained on and `val` selected on; `test` is not looked at.
    half : numpy.ndarray of uint8, shape (n_val,), optional
        From `datasets.halve`, which divides the validation part unless given. If one is empty, both are the whole part.

    until : int, optional
        Stop after this epoch. The schedule is that of all epochs, so a training that goes on later gives the same bits.

    Raises
    ------
    TrainingDivergedError
        A loss is not finite.
    """
    model, config = state.model, state.config
    started = time.perf_counter()
    normalisation = data.normalisation(split.train)
    train = Part(data, split.train, *normalisation, state.dtype, keep=True)
    validate = state.validation(data, split.val, *normalisation)
    if half is None:
        half = datasets.halve(split.val, data.labels.cpu().numpy())
    exact = hardware.exact_device(data.device)
    labels = data.labels[torch.from_numpy(split.val).to(data.device)].to(exact)
    rows = [torch.from_numpy(rows).to(exact) for rows in rows_of_halves(half)]
    last = config.epochs if until is None else until
    while not state.is_done and state.epoch < last:
        plan = plan_epoch(len(train), train.size, config.augment, state.generator)
        totals = _train_epoch(state, train, plan)
        passed = validate()
        sums = torch.cat([totals, _losses(passed, labels, rows)])
        lr = state.optimizer.param_groups[0]["lr"]
        state.schedule.step()
        (train_loss, correct, *of_halves), evaluation = read_back(sums, passed)  # the epoch's one host sync
        half_losses = of_halves[0] / len(rows[0]), of_halves[1] / len(rows[1])
        state.epoch += 1
        for name, loss in (("training", train_loss), ("validation", evaluation.loss)):
            if not math.isfinite(loss):
                raise TrainingDivergedError(f"the {name} loss is {loss} in epoch {state.epoch}; a lower --lr may help")
        improved = state.choose(evaluation, half_losses)
        now = time.perf_counter()
        seconds, started = now - started, now
        n = len(split.train)
        yield EpochRecord(state.epoch, lr, train_loss / n, correct / n, evaluation, half_losses, improved, seconds)
    if state.chosen:
        model.load_state_dict(state.chosen[WHOLE].weights)


def _losses(passed: Pass, labels: Tensor, rows: list[Tensor]) -> Tensor:
    """Sums of the losses of some rows each (float64)."""
    losses = -passed.log_probs.gather(1, labels[:, None])[:, 0].double()
    return torch.stack([losses[of_half].sum() for of_half in rows])


def _train_epoch(state: TrainingState, train: Part, plan: Tensor) -> Tensor:
    """One pass over the plan; returns the sum of losses and the count of hits (float64)."""
    config = state.config
    exact = hardware.exact_device(state.device)
    totals = torch.zeros(2, dtype=torch.float64 if state.device == exact else torch.float32, device=state.device)
    state.model.train()
    if train.data.resident:
        plan = plan.to(state.device, non_blocking=True)
    for x, y in train.batches(split_batches(plan, config.batch_size), config.augment):
        totals += state.gradients(x, y)
        state.scaler.step(state.optimizer)
        state.scaler.update()
    return totals.to(exact).double()
