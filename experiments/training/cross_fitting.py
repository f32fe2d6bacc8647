"""Cross-fitted validation: each half of the validation part chooses the epoch that scores the other half.

The best epoch's score on the images that chose it is the highest of many, so it is too good. A half that had no part in
the choice is scored without that optimism, and both halves together are as many images as before.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from experiments.training import confusion
from experiments.training.evaluation import Evaluation
from tracking.predictions import PartPredictions

WHOLE, SCORES_HALF = 0, (1, 2)  # places of a choice: by the whole part; of the snapshots that score halves 0 and 1


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A model after an epoch."""

    epoch: int
    val: Evaluation  # of the validation part
    weights: dict[str, Tensor]  # and buffers


def rows_of_halves(half: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The places of each half in the validation part: int64. If one is empty, both are the whole part."""
    rows = np.flatnonzero(half == 0), np.flatnonzero(half == 1)
    return rows if len(rows[0]) and len(rows[1]) else (np.arange(len(half)), np.arange(len(half)))


def by_place(whole: float, of_halves: Sequence[float]) -> tuple[float, float, float]:
    """Order the losses of the whole part and of both halves by the place that each one decides."""
    return whole, of_halves[1], of_halves[0]


def evaluation_of(predictions: PartPredictions) -> Evaluation:
    """The evaluation behind the predictions for some images, with the probabilities of all classes."""
    assert predictions.log_probs is not None
    counts = confusion.matrix(predictions.true, predictions.predicted, predictions.log_probs.shape[1])
    log_probs, predicted = torch.from_numpy(predictions.log_probs), torch.from_numpy(predictions.predicted)
    return Evaluation(predictions.loss, counts, predicted, log_probs)
