"""Fitting the baselines `majority` and `linear` on a split, by scikit-learn; scored as the networks are."""

import math
import time
import warnings

import numpy as np
import torch
from torch import Tensor, nn

from datasets import Split
from experiments.training.evaluation import evaluate
from experiments.training.fit import EpochRecord
from experiments.training.images import DeviceImages, Part
from models.layers import LayerStack

PENALTIES = (1e4, 1e3, 1e2, 1e1)  # L2 penalty of the linear model, from strong to weak


def fit_baseline(name: str, model: LayerStack, data: DeviceImages, split: Split, precision: str) -> EpochRecord:
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
    """
    started = time.perf_counter()
    mean, std = data.normalisation(split.train)
    if name == "majority":
        rows = torch.from_numpy(split.train).to(data.device)
        counts = torch.bincount(data.labels[rows], minlength=data.num_classes)
        _fill(model.layers[-1], logits=(counts / counts.sum()).log())
    else:
        parts = (Part(data, indices, mean, std, torch.float32) for indices in (split.train, split.val))
        weight, bias = _logistic_regression(*(_features(model, part) for part in parts))
        _fill(model.layers[-1], weight=weight, bias=bias)
    train, val = (evaluate(model, data, part, mean, std, precision) for part in (split.train, split.val))
    seconds = time.perf_counter() - started
    return EpochRecord(1, None, train.loss, train.scores()["accuracy"], val, improved=True, seconds=seconds)


def _fill(layer: nn.Module, **values: Tensor) -> None:
    with torch.no_grad():
        for key, value in values.items():
            layer.get_parameter(key).copy_(value)


@torch.inference_mode()
def _features(model: LayerStack, part: Part) -> tuple[np.ndarray, np.ndarray]:
    """The inputs of the model's last layer, shape (n, features), and the labels of some images."""
    front = nn.Sequential(*model.layers[:-1])
    return torch.cat([front(x).cpu() for x in part.slices(512)]).numpy(), part.labels.cpu().numpy()


def _logistic_regression(
    train: tuple[np.ndarray, np.ndarray], val: tuple[np.ndarray, np.ndarray]
) -> tuple[Tensor, Tensor]:
    """Fit with ever weaker penalties until the validation loss rises; return weight (K, features) and bias (K,).

    In one thread: its products are too small to be shared. With two a fit took 8 times as long beside other work, and
    with 16 five times as long on an idle machine; and so its bits do not depend on the number of cores.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss
    from threadpoolctl import threadpool_limits

    model = LogisticRegression(tol=1e-3, max_iter=1000, warm_start=True)  # each starts from the one before
    best_loss, weight, bias = math.inf, np.empty(0), np.empty(0)
    with threadpool_limits(1), warnings.catch_warnings(action="ignore", category=ConvergenceWarning):
        for penalty in PENALTIES:  # without convergence it is near enough for a baseline
            model.set_params(C=1 / penalty).fit(*train)
            loss = log_loss(val[1], model.predict_proba(val[0]), labels=model.classes_)
            if loss >= best_loss:
                break
            best_loss, weight, bias = loss, model.coef_.copy(), model.intercept_.copy()
    if len(weight) == 1:  # two classes: one row of logits for the second, against zero for the first
        weight, bias = np.vstack([np.zeros_like(weight), weight]), np.append(0.0, bias)
    return torch.from_numpy(weight), torch.from_numpy(bias)
