"""Training of one model on one split: `fit` yields one record an epoch and knows of no tracker.

Images are on the device, normalised once a split; a batch is a gather by index. Per epoch the host plans the order (and
the augmentation) with one generator, sends it in one copy, and reads loss and confusion matrix back once. How layers
are computed is chosen in models/execution.py, by device and kind of layer.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from datasets import Split
from experiments.training.evaluation import Evaluation, read_back
from experiments.training.images import DeviceImages, Part, plan_epoch, split_batches
from experiments.training.state import TrainingState, clone_state


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
    improved: bool  # whether this is the lowest validation loss so far
    seconds: float  # since the last record: training, validation, and the work of the caller


def fit(state: TrainingState, data: DeviceImages, split: Split) -> Iterator[EpochRecord]:
    """Train a model on a split and yield one record an epoch; at the end the model has its best epoch's weights.

    AdamW, cosine schedule over `config.epochs`, early stopping on the validation loss. On the CPU the same seed and
    number of threads give the same numbers bit for bit, also if the state was saved between two epochs and loaded
    elsewhere.

    Parameters
    ----------
    state : TrainingState
        New, or loaded. When a record is yielded, it is that of the record's epoch.
    data : DeviceImages
        On the model's device.
    split : Split
        `train` is trained on and `val` selected on; `test` is not looked at.

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
    while not state.is_done:
        plan = plan_epoch(len(train), train.size, config.augment, state.generator)
        totals = _train_epoch(state, train, plan)
        passed = validate()
        lr = state.optimizer.param_groups[0]["lr"]
        state.schedule.step()
        (train_loss, correct), evaluation = read_back(totals, passed)  # the epoch's one host sync
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


def _train_epoch(state: TrainingState, train: Part, plan: Tensor) -> Tensor:
    """One pass over the plan; returns the sum of losses and the count of hits, on the device (float64)."""
    config = state.config
    totals = torch.zeros(2, dtype=torch.float64, device=state.device)
    state.model.train()
    if train.data.resident:
        plan = plan.to(state.device, non_blocking=True)
    for x, y in train.batches(split_batches(plan, config.batch_size), config.augment):
        totals += state.gradients(x, y)
        state.scaler.step(state.optimizer)
        state.scaler.update()
    return totals
