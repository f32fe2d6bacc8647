"""The registry of scores: name, label, unit, direction, and the contribution of each image.

Training computes them, the store keeps them as `<part>/<name>`, and tables, figures and tests look up here how to show
and compare them. Scores that are not registered are refused.
"""

import difflib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    PerImage = Callable[[np.ndarray, np.ndarray], np.ndarray]

PARTS = {  # prefix of the scores of a finished split
    "best_val": "validation at the best epoch: optimistic, since these images chose the epoch",
    "cross_val": "validation, each half at the epoch that the other half chose: no image chose its own epoch",
    "last_val": "validation at the last epoch",
    "test": "test part at the best epoch: these images chose nothing",
}
ALL = "all"  # prefix of the scores of cross-fitted validation and test images together, which follow from those


class UnknownScoreError(ValueError):
    """No score has this name; the message names the nearest ones."""


@dataclass(frozen=True)
class Score:
    """A score of a classifier on a set of images."""

    name: str  # in keys and options
    label: str  # in tables and figures
    unit: str  # "%" for a share in [0, 1], shown in per cent and its differences in points; else the unit itself
    higher_is_better: bool
    # Maps true and predicted classes, int64 of shape (n,), to values of shape (n,) whose mean is the score and whose
    # variance over n is its sampling variance. None if the score does not follow from the predicted classes.
    per_image: "PerImage | None"
    # The same from probabilities of all classes, float64 of shape (n, K), in place of predicted classes
    of_probabilities: "PerImage | None" = None
    above: int = 0  # classes: with no more than these it tells nothing

    @property
    def sign(self) -> int:
        """1 if higher is better, else -1."""
        return 1 if self.higher_is_better else -1

    @property
    def is_share(self) -> bool:
        """Whether values lie in [0, 1] and are shown in per cent."""
        return self.unit == "%"

    @property
    def scale(self) -> float:
        """Factor from a value to the displayed number."""
        return 100.0 if self.is_share else 1.0

    @property
    def difference_unit(self) -> str:
        """Unit of a difference."""
        return "points" if self.is_share else self.unit


def correct(true: "np.ndarray", predicted: "np.ndarray") -> "np.ndarray":
    """1 for each correctly predicted image, else 0; the mean is the accuracy."""
    return (true == predicted).astype(float)  # type: ignore[no-any-return]


def macro_f1_values(true: "np.ndarray", predicted: "np.ndarray") -> "np.ndarray":
    """Values of the images whose mean is macro-F1 and whose variance over n is its sampling variance.

    F1 of class k is F_k = 2 TP_k / D_k, with D_k = 2 TP_k + FP_k + FN_k the times that k occurs as truth or as
    prediction, a ratio of two means. To first order (delta method) image i of n with truth t and prediction p adds
    its influence to the mean F over the C classes that occur::

        value_i = F + (n/C) (2 [t = p] / D_t - F_t / D_t - F_p / D_p)

    Takes the true and predicted classes, shape (n,), and returns float64 of shape (n,); single values may lie outside
    [0, 1]. A `ValueError` is raised if the arrays are empty or their shapes differ.

    References
    ----------
    Takahashi, Yamamoto, Kuchiba and Koyama (2022). Confidence interval for micro-averaged F1 and macro-averaged F1
    scores. Applied Intelligence 52, 4961-4972. Their variance is that of these values over n.
    """
    import numpy as np  # late: --help needs none

    true, predicted = np.asarray(true), np.asarray(predicted)
    if true.ndim != 1 or true.shape != predicted.shape or not len(true):
        raise ValueError("true and predicted classes must be two equally long arrays, not empty")
    classes, codes = np.unique(np.concatenate([true, predicted]), return_inverse=True)
    t, p = np.split(codes, 2)
    occurrences = np.bincount(codes).astype(np.float64)  # (C,), 2 TP + FP + FN
    f1 = 2 * np.bincount(t[t == p], minlength=len(classes)) / occurrences
    loss = f1 / occurrences
    influence = 2 * (t == p) / occurrences[t] - loss[t] - loss[p]
    return np.asarray(np.mean(f1) + len(t) / len(classes) * influence)


def _of_class(kind: str, label: int, true: "np.ndarray", predicted: "np.ndarray") -> "np.ndarray":
    """Values of the images whose mean is the precision, recall or F1 of a class, by the delta method.

    Each is a ratio of two means: of hits, and of the images (weighted, for F1) that count. Where none counts (the class
    is never predicted, or does not occur) it is undefined, and the values are NaN.
    """
    import numpy as np

    is_true, is_predicted = true == label, predicted == label
    counts = {"precision": is_predicted, "recall": is_true, "f1": (is_true + is_predicted.astype(float)) / 2}[kind]
    if not counts.any():
        return np.full(len(true), np.nan)
    hits = is_true & is_predicted
    ratio = hits.sum() / counts.sum()
    return np.asarray(ratio + (hits - ratio * counts) / counts.mean())


def log_loss_values(true: "np.ndarray", probabilities: "np.ndarray") -> "np.ndarray":
    """Cross-entropy of each image in nats; a probability below `SMALLEST` counts as that."""
    import numpy as np

    return np.asarray(-np.log(np.maximum(probabilities[np.arange(len(true)), true], SMALLEST)))


def brier_values(true: "np.ndarray", probabilities: "np.ndarray") -> "np.ndarray":
    """Squared distance between the probabilities of each image and the truth: 0 to 2, for all numbers of classes."""
    import numpy as np

    of_truth = probabilities[np.arange(len(true)), true]
    return np.asarray((probabilities**2).sum(1) + 1 - 2 * of_truth)


def auc_values(true: "np.ndarray", probabilities: "np.ndarray") -> "np.ndarray":
    """Values of the images whose mean is the macro ROC AUC, one class against the rest, and their sampling variance.

    The AUC of a class is the share of pairs of an image of it and another image in which the former has the higher
    probability of the class (ties count half). An image's value is the share among its own pairs, weighted so that the
    values' variance over n is DeLong's. The mean is over the classes that occur; a single one leaves nothing to rank,
    and the values are NaN.

    References
    ----------
    DeLong, DeLong and Clarke-Pearson (1988). Comparing the areas under two or more correlated receiver operating
    characteristic curves. Biometrics 44, 837-845.
    """
    import numpy as np

    n = len(true)
    present = np.unique(true)
    values = np.zeros(n)
    for label in present:
        of_class = true == label
        positives, negatives = int(of_class.sum()), int(n - of_class.sum())
        if not negatives:
            return np.full(n, np.nan)
        score = probabilities[:, label]
        order = np.argsort(score)
        ordered, is_positive = score[order], of_class[order]
        place = np.cumsum(np.r_[False, ordered[1:] > ordered[:-1]])  # equal scores share a place
        at_place = np.bincount(place, is_positive)
        below = np.cumsum(at_place) - at_place / 2  # positives with a lower score, and half of those with the same
        others_at_place = np.bincount(place) - at_place
        others_below = np.cumsum(others_at_place) - others_at_place / 2
        shares = np.empty(n)  # of the other kind that an image is ranked rightly against
        shares[order] = np.where(is_positive, others_below[place] / negatives, 1 - below[place] / positives)
        auc = shares[of_class].mean()
        values += auc + (shares - auc) * n / np.where(of_class, positives, negatives)
    return values / len(present)


def calibration_values(true: "np.ndarray", probabilities: "np.ndarray") -> "np.ndarray":
    """Values of the images whose mean is the calibration error of the predicted class: see `excess_values`."""
    return excess_values(probabilities.argmax(1) == true, probabilities.max(1))


def excess_values(hits: "np.ndarray", certainty: "np.ndarray") -> "np.ndarray":
    """Values whose mean is the calibration error (ECE in `BINS` equal bins) of predictions with these probabilities.

    In a bin with more hits than the probabilities promise, an image's value is its hit minus its probability, in the
    others the opposite. Both are noisy, so the mean is above 0 for perfectly calibrated probabilities, too.

    References
    ----------
    Guo, Pleiss, Sun and Weinberger (2017). On calibration of modern neural networks. ICML.
    """
    import numpy as np

    excess, bins = hits - certainty, calibration_bins(certainty)
    return np.asarray(excess * np.where(np.bincount(bins, excess, BINS) < 0, -1, 1)[bins])


def calibration_bins(certainty: "np.ndarray") -> "np.ndarray":
    """The bin of each probability: (0, 1/15], (1/15, 2/15], ..., numbered from 0."""
    import numpy as np

    return np.asarray(np.clip(np.ceil(certainty * BINS).astype(int) - 1, 0, BINS - 1))


def top_5_values(true: "np.ndarray", probabilities: "np.ndarray") -> "np.ndarray":
    """1 for each image whose class is among the five likeliest, else 0; of equally likely ones the first count."""
    import numpy as np

    of_truth = probabilities[np.arange(len(true)), true, None]
    is_earlier = np.arange(probabilities.shape[1]) < true[:, None]
    before = (probabilities > of_truth) | ((probabilities == of_truth) & is_earlier)
    return np.asarray((before.sum(1) < 5).astype(float))


# Probability that the log loss of an impossible truth counts, for all dtypes (findings/sklearn_log_loss_dtype.sh)
SMALLEST = 1e-15
BINS = 15  # of the calibration error
SCORES: dict[str, Score] = {  # computed in training
    score.name: score
    for score in (
        Score("accuracy", "accuracy", "%", True, correct),
        Score("f1_micro", "micro-F1", "%", True, correct),  # equals accuracy if each image has one label
        Score("f1_macro", "macro-F1", "%", True, macro_f1_values),
        Score("loss", "loss", "nats", False, None, log_loss_values),
    )
}
DERIVED: dict[str, Score] = {  # computed from the stored probabilities of all classes, when they are asked for
    score.name: score
    for score in (
        Score("auc", "macro AUC", "%", True, None, auc_values),
        Score("brier", "Brier score", "(0 to 2)", False, None, brier_values),
        Score("calibration_error", "calibration error", "%", False, None, calibration_values),
        Score("top_5", "top-5 accuracy", "%", True, None, top_5_values, above=5),
    )
}
OF_CLASSES = {"precision": "precision", "recall": "recall", "f1": "F1"}  # of one class: f1:3 is that of label 3
METRICS: tuple[str, ...] = tuple(f"{part}/{name}" for part in PARTS for name in SCORES)


def score_of(metric: str) -> Score:
    """Look up the score of a metric such as `test/accuracy`; an unknown one raises an `UnknownScoreError`."""
    part, _, name = metric.partition("/")
    scores = SCORES | ({} if part == "last_val" else DERIVED)  # of the last epoch no predictions are kept
    kind, _, label = name.partition(":")
    if part in (*PARTS, ALL) and part != "last_val" and kind in OF_CLASSES and label.isdecimal():
        per_image = functools.partial(_of_class, kind, int(label))
        return Score(name, f"{OF_CLASSES[kind]} of class {label}", "%", True, per_image)
    if part not in (*PARTS, ALL) or name not in scores:
        further = (*(f"{ALL}/{name}" for name in SCORES), *(f"test/{name}" for name in DERIVED))
        near = difflib.get_close_matches(metric, METRICS, 3) or difflib.get_close_matches(metric, further, 3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join((*METRICS, *further))}"
        raise UnknownScoreError(f"unknown metric {metric!r}; {hint}")
    return scores[name]
