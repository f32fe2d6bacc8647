"""From p-values to decisions: families of tests, tests on the same images, and the splits that an answer takes."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from analysis.statistics.checks import check_inside, check_variance

MAX_SPLITS = 1_000_000  # upper limit of the search in `splits_needed`


@dataclass(frozen=True)
class McNemar:
    """Numbers of images that only one of two models classifies correctly, and the exact two-sided p-value."""

    only_a: int
    only_b: int
    p: float


def holm(p_values: ArrayLike) -> np.ndarray:
    """Adjust the p-values of a family of m tests, shape (m,), to control its family-wise error rate.

    With p sorted in ascending order, adjusted p_(i) = min(1, max over j <= i of (m - j + 1) p_(j)). The result, float64
    of shape (m,), is in the given order, and empty for an empty family.

    References
    ----------
    Holm (1979). A simple sequentially rejective multiple test procedure. Scandinavian Journal of Statistics 6, 65-70.
    """
    p = np.asarray(p_values, np.float64)
    if p.ndim != 1 or not np.all((p >= 0) & (p <= 1)):
        raise ValueError("p-values must be an array of numbers from 0 to 1")
    order = np.argsort(p)
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted


def mcnemar(correct_a: ArrayLike, correct_b: ArrayLike) -> McNemar:
    """Test whether two sets of predictions for the same images are equally often correct: exact and two-sided.

    Under the null hypothesis each image that exactly one model classifies correctly is either's with probability 1/2:
    p = min(1, 2 P(X <= min(only_a, only_b))), X ~ Binomial(only_a + only_b, 1/2). Without such images p is 1.

    Parameters
    ----------
    correct_a, correct_b : array_like of bool, shape (n,)
        Whether each model is correct on image i, in the same order; for k folds the pooled out-of-fold predictions.

    Raises
    ------
    ValueError
        If the arrays are not boolean or their shapes differ.

    Notes
    -----
    This compares the networks as trained, and does not generalise to other training images or seeds.

    References
    ----------
    McNemar (1947). Note on the sampling error of the difference between correlated proportions or percentages.
    Psychometrika 12, 153-157.
    Dietterich (1998). Approximate statistical tests for comparing supervised classification learning algorithms.
    Neural Computation 10, 1895-1923.
    """
    from scipy.stats import binomtest  # late: importing it takes a third of a second

    a, b = np.asarray(correct_a), np.asarray(correct_b)
    if a.ndim != 1 or a.shape != b.shape or a.dtype != np.bool_ or b.dtype != np.bool_:
        raise ValueError("correctness must be two equally long boolean arrays")
    only_a, only_b = int(np.sum(a & ~b)), int(np.sum(b & ~a))
    discordant = only_a + only_b
    return McNemar(only_a, only_b, float(binomtest(only_a, discordant).pvalue) if discordant else 1.0)


def splits_needed(
    difference: float, split_variance: float, constant_variance: float, confidence: float = 0.95, power: float = 0.8
) -> int | None:
    """Give the number of splits needed to detect a difference of this size.

    The smallest J of at least 2 with::

        |difference| >= (t_{(1 + confidence)/2, J-1} + t_{power, J-1}) sqrt(split_variance/J + constant_variance)

    Parameters
    ----------
    difference : float
        The expected difference to detect.
    split_variance, constant_variance : float
        The variance that more splits reduce: s2, of single differences; and the variance that they do not reduce:
        SE^2 - s2/J of the standard error in use. In squared units of `difference`.
    confidence : float
        1 minus the size of the two-sided test, in (0, 1).
    power : float
        Probability of detecting the difference, in [0.5, 1).

    Returns
    -------
    int or None
        None if no number of splits is enough, or more than `MAX_SPLITS` are needed.

    Notes
    -----
    The variances are treated as known, so the result is rough if they come from few splits. The sizes of the parts are
    held fixed; for k folds, which change with k, read it as repetitions of the same holdout.
    """
    if not math.isfinite(difference):
        raise ValueError("the difference must be finite")
    check_inside("confidence", confidence, 0, 1)
    if not 0.5 <= power < 1:
        raise ValueError(f"power must lie between 0.5 and 1, not be {power}")
    variances = check_variance(split_variance), check_variance(constant_variance)

    def enough(splits: int) -> bool:  # monotonic: the quantiles and the standard error decrease with J
        quantiles = special.stdtrit(splits - 1, ((1 + confidence) / 2, power))
        return abs(difference) >= float(np.sum(quantiles)) * math.sqrt(variances[0] / splits + variances[1])

    if difference == 0 or not enough(MAX_SPLITS):
        return None
    low, high = 1, 2  # one split is never enough; double `high` until it is
    while not enough(high):
        low, high = high, min(2 * high, MAX_SPLITS)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
