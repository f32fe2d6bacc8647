"""Scores of a classifier from its confusion matrix."""

import numpy as np


def matrix(true: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Counts, int64 of shape (K, K) with true classes in rows, of labels of shape (n,)."""
    return np.bincount(true * classes + predicted, minlength=classes**2).reshape(classes, classes)


def accuracy(confusion: np.ndarray) -> float:
    """Share of images whose class was predicted; `confusion` has shape (K, K), true classes in rows."""
    return float(np.trace(confusion) / confusion.sum())


def f1_micro(confusion: np.ndarray) -> float:
    """F1 over all decisions. With one label an image each error is a false positive and a false negative once.

    So it equals accuracy; it is reported because readers look for it.
    """
    true_positive = float(np.trace(confusion))
    errors = float(confusion.sum()) - true_positive
    return 2 * true_positive / (2 * true_positive + errors + errors)


def f1_macro(confusion: np.ndarray) -> float:
    """Mean of the classes' F1 over the classes that occur as truth or as prediction (as in scikit-learn)."""
    true_positive = np.diag(confusion).astype(float)
    occurrences = confusion.sum(0) + confusion.sum(1)  # (K,), 2 TP + FP + FN
    occurs = occurrences > 0
    return float(np.mean(2 * true_positive[occurs] / occurrences[occurs]))
