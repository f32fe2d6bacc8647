"""Fitting the baselines `majority` and `linear` on a split, by scikit-learn; scored as the networks are."""

import math
import time
import warnings

import numpy as np
import torch
from torch import Tensor, nn

import datasets
from datasets import Split
from experiments.training.cross_fitting import SCORES_HALF, WHOLE, Snapshot, by_place, rows_of_halves
from experiments.training.evaluation import evaluate
from experiments.training.fit import EpochRecord
from experiments.training.images import DeviceImages, Part
from experiments.training.state import clone_state
from models.layers import LayerStack

Coefficients = dict[str, Tensor]  # parameters of a model's last layer
PENALTIES = (1e4, 1e3, 1e2, 1e1)  # L2 penalty of the linear model, from strong to weak


def fit_baseline(
    name: str, model: LayerStack, data: DeviceImages, split: Split, precision: str, half: np.ndarray | None = None
) -> tuple[EpochRecord, list[Snapshot]]:
    """Set a baseline's coefficients from a split, and record it as `fit` does a network's epoch.

    Parameters
    ----------
    name : str
        Key of `models.BASELINES`.
    model : LayerStack
        On the device of `data`; its last layer is filled in.
    data : DeviceImages
    split : Split
        `train` is fitted and `val` chooses the penalty of `linear`; `test` is not looked at.
    precision : str
        Of the evaluation, as for the networks.
    half : numpy.ndarray of uint8, shape (n_val,), optional
        As for `fit`.

    Returns
    -------
    EpochRecord
    list of Snapshot
        As `TrainingState.chosen`, with penalties in place of epochs.
    """
    started = time.perf_counter()
    mean, std = data.normalisation(split.train)
    if half is None:
        half = datasets.halve(split.val, data.labels.cpu().numpy())
    if name == "majority":
        rows = torch.from_numpy(split.train).to(data.device)
        counts = torch.bincount(data.labels[rows], minlength=data.num_classes)
        chosen: list[Coefficients] = [{"logits": (counts / counts.sum()).log()}] * (1 + len(SCORES_HALF))
    else:
        parts = (Part(data, indices, mean, std, torch.float32) for indices in (split.train, split.val))
        features = [_features(model, part) for part in parts]
        chosen = _logistic_regression(features[0], features[1], half)
    snapshots: dict[int, Snapshot] = {}
    for coefficients in reversed(chosen):  # that of the whole part last: it stays in the model
        if coefficients is chosen[WHOLE] or id(coefficients) not in snapshots:
            _fill(model.layers[-1], coefficients)
            val = evaluate(model, data, split.val, mean, std, precision)
            snapshots[id(coefficients)] = Snapshot(1, val, clone_state(model))
    train, best = evaluate(model, data, split.train, mean, std, precision), snapshots[id(chosen[WHOLE])].val
    seconds = time.perf_counter() - started
    record = EpochRecord(1, None, train.loss, train.scores()["accuracy"], best, None, improved=True, seconds=seconds)
    return record, [snapshots[id(coefficients)] for coefficients in chosen]


def _fill(layer: nn.Module, coefficients: Coefficients) -> None:
    with torch.no_grad():
        for key, value in coefficients.items():
            layer.get_parameter(key).copy_(value)


@torch.inference_mode()
def _features(model: LayerStack, part: Part) -> tuple[np.ndarray, np.ndarray]:
    """The inputs of the model's last layer, shape (n, features), and the labels of some images."""
    front = nn.Sequential(*model.layers[:-1])
    return torch.cat([front(x).cpu() for x in part.slices(512)]).numpy(), part.labels.cpu().numpy()


def _logistic_regression(
    train: tuple[np.ndarray, np.ndarray], val: tuple[np.ndarray, np.ndarray], half: np.ndarray
) -> list[Coefficients]:
    """Fit with ever weaker penalties until the validation loss rises, for the whole part and for each of its halves.

    In one thread: its products are too small to be shared. With two a fit took 8 times as long beside other work, and
    with 16 five times as long on an idle machine; and so its bits do not depend on the number of cores.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss
    from threadpoolctl import threadpool_limits

    model = LogisticRegression(tol=1e-3, max_iter=1000, warm_start=True)  # each starts from the one before
    chosen: list[Coefficients] = []
    lowest = [math.inf] * (1 + len(SCORES_HALF))
    falling = [True] * len(lowest)
    rows = np.arange(len(half)), rows_of_halves(half)
    with threadpool_limits(1), warnings.catch_warnings(action="ignore", category=ConvergenceWarning):
        for penalty in PENALTIES:  # without convergence it is near enough for a baseline
            model.set_params(C=1 / penalty).fit(*train)
            now, probs = _coefficients(model.coef_, model.intercept_), model.predict_proba(val[0])
            whole, *of_halves = (
                log_loss(val[1][of_part], probs[of_part], labels=model.classes_) for of_part in (rows[0], *rows[1])
            )
            losses = by_place(whole, of_halves)
            falling = [was and loss < low for was, loss, low in zip(falling, losses, lowest, strict=True)]
            if not any(falling):
                break
            former = chosen or [now] * len(losses)
            chosen = [now if falls else kept for falls, kept in zip(falling, former, strict=True)]
            lowest = [loss if falls else low for falls, loss, low in zip(falling, losses, lowest, strict=True)]
    return chosen


def _coefficients(weight: np.ndarray, bias: np.ndarray) -> Coefficients:
    """Copies of a fitted model's coefficients, with a row for each class."""
    if len(weight) == 1:  # two classes: one row of logits for the second, against zero for the first
        weight, bias = np.vstack([np.zeros_like(weight), weight]), np.append(0.0, bias)
    return {"weight": torch.tensor(weight), "bias": torch.tensor(bias)}
