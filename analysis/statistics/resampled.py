"""Tests and standard errors for the scores of whole splits, which share training images and often scored images."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from analysis.statistics.checks import check_inside, check_rope, check_scale, check_sizes, check_variance, moments


@dataclass(frozen=True)
class TTest:
    """Result of a two-sided t test of a mean against 0, in the units of the scores."""

    mean: float
    se: float  # standard error of the mean
    low: float  # ends of the confidence interval of the mean
    high: float
    t: float  # mean / se
    df: float
    p: float  # probability of a |t| at least as large if the expected mean is 0


@dataclass(frozen=True)
class Posterior:
    """Probabilities, summing to 1, that a difference lies below, in and above the region of practical equivalence."""

    p_worse: float
    p_equivalent: float
    p_better: float


def ttest(mean: float, se: float, df: float, confidence: float = 0.95) -> TTest:
    """Test a mean against 0, two-sided, with the interval mean -+ t_{(1 + confidence) / 2, df} se.

    If both are 0, so are the ends of the interval and t, and p is 1. A `se` of 0 beside another mean is an error.

    Parameters
    ----------
    mean, se : float
        A mean and its standard error, in the same units; `se` may be 0.
    df : float
        Degrees of freedom of `se`, above 0.
    confidence : float
        Confidence level of the interval, in (0, 1).
    """
    mean, se = check_scale(mean, se, df)
    check_inside("confidence", confidence, 0, 1)
    if se == 0:
        if mean:
            raise ValueError(f"a standard error of 0 beside a mean of {mean:g} would claim certainty")
        return TTest(0.0, 0.0, 0.0, 0.0, 0.0, df, 1.0)
    t = mean / se
    half = float(special.stdtrit(df, (1 + confidence) / 2)) * se
    return TTest(mean, se, mean - half, mean + half, t, df, 2 * float(special.stdtr(df, -abs(t))))


def corrected_resampled_ttest(differences: ArrayLike, n_train: float, n_test: float, confidence: float = 0.95) -> TTest:
    """Test the mean difference over splits, each of which draws its scored images anew from one pool.

    With d_j the difference on split j of J, mean d and sample variance s2 (ddof 1)::

        t = d / sqrt((1/J + n_test/n_train) s2),   df = J - 1

    The result is in the units of the differences. If all are 0, p is 1; if they are equal to another number, which
    happens to counts on few splits, a `ValueError` is raised.

    Parameters
    ----------
    differences : array_like of float, shape (J,)
        Score of one model minus that of the other on each split, J at least 2.
    n_train, n_test : float
        Numbers of training and scored images of a split. For k folds n_test/n_train is 1/(k - 1).
    confidence : float
        Confidence level of the interval, in (0, 1).

    Notes
    -----
    n_test/n_train is rho/(1 - rho) for a correlation rho = n_test/(n_test + n_train) between splits. This is a rule of
    thumb: the true rho depends on the share of the variance that comes from the training images.

    References
    ----------
    Nadeau and Bengio (2003). Inference for the generalization error. Machine Learning 52, 239-281.
    """
    return ttest(*_corrected(differences, n_train, n_test), confidence)


def posterior(mean: float, se: float, df: float, rope: float) -> Posterior:
    """Give the posterior probabilities of a difference: Student t with location `mean`, scale `se` and `df`.

    Parameters
    ----------
    mean, se, df : float
        See `ttest`. If `se` is 0 the posterior is a point mass at `mean`.
    rope : float
        Half-width of the region of practical equivalence [-rope, rope], in the units of `mean`; 0 or more.

    Returns
    -------
    Posterior
        P(difference < -rope), P(-rope <= difference <= rope), P(difference > rope).
    """
    mean, se = check_scale(mean, se, df)
    check_rope(rope)
    if se == 0:
        return Posterior(float(mean < -rope), float(abs(mean) <= rope), float(mean > rope))
    worse = float(special.stdtr(df, (-rope - mean) / se))
    better = float(special.stdtr(df, (mean - rope) / se))  # symmetric: swapping the models swaps the two exactly
    return Posterior(worse, max(0.0, 1 - (worse + better)), better)


def bayesian_correlated_ttest(differences: ArrayLike, n_train: float, n_test: float, rope: float = 0.01) -> Posterior:
    """Give the probabilities that a model is worse than, equivalent to and better than another.

    The `posterior` of the mean difference has df J - 1, location d and, for rho = n_test/(n_test + n_train)::

        scale^2 = (1/J + rho/(1 - rho)) s2

    This is the standard error of `corrected_resampled_ttest`, whose parameters, protocols and errors are the same. If
    all differences are 0 it is a point mass.

    Parameters
    ----------
    differences, n_train, n_test
        See `corrected_resampled_ttest`.
    rope : float
        Half-width of the region of practical equivalence, in the units of `differences`. The default is one point of a
        score in [0, 1].

    References
    ----------
    Corani and Benavoli (2015). A Bayesian approach for comparing cross-validated algorithms on multiple data sets.
    Machine Learning 100, 285-304.
    Benavoli, Corani, Demsar and Zaffalon (2017). Time for a change: a tutorial for comparing multiple classifiers
    through Bayesian analysis. Journal of Machine Learning Research 18, 1-36.
    """
    return posterior(*_corrected(differences, n_train, n_test), rope)


def _corrected(differences: ArrayLike, n_train: float, n_test: float) -> tuple[float, float, int]:
    """Mean, its standard error corrected for resampling, and degrees of freedom."""
    check_sizes(n_train=n_train, n_test=n_test)
    mean, variance, splits = moments(differences)
    if mean and not variance:
        raise ValueError(f"all {splits} differences are equal ({mean:g}), which tells nothing of their spread")
    return mean, math.sqrt((1 / splits + n_test / n_train) * variance), splits - 1


def image_variance(values: ArrayLike) -> float:
    """Estimate the variance between images of their expected value over splits: the component sigma2_img.

    One-way random-effects analysis of variance with the images as groups. Image i of I was evaluated n_i times with
    mean m_i; n is the sum of n_i, m the mean of all values::

        MSB = sum_i n_i (m_i - m)^2 / (I - 1)         MSW = sum_ij (v_ij - m_i)^2 / (n - I)
        n0  = (n - sum_i n_i^2 / n) / (I - 1)         sigma2_img = max(0, (MSB - MSW) / n0)

    Parameters
    ----------
    values : array_like of float, shape (J, N)
        Value of image i in split j, NaN if not evaluated there: of one model, or the paired difference of two;
        correctness (0 or 1), or `tracking.scores.macro_f1_values`.

    Returns
    -------
    float
        Variance of single images, in squared units of `values`; divide by the number of images for that of a mean.

    Raises
    ------
    ValueError
        If the shape is wrong, a value is infinite, fewer than two images were evaluated, or none was evaluated twice
        (as in the validation parts of k folds), which leaves the component undetermined.

    Notes
    -----
    An effect of a split on all its images counts as variation within images. If every split has the same images, this
    lowers the estimate by the variance between splits over J, which is negligible beside the variance of images.

    References
    ----------
    Searle, Casella and McCulloch (1992). Variance Components, chapter 3. Wiley.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 2 or np.isinf(values).any():
        raise ValueError("values of images must be finite or NaN, in an array of shape (splits, images)")
    counts = (~np.isnan(values)).sum(0)  # (N,)
    values, counts = values[:, counts > 0], counts[counts > 0]
    images, total = len(counts), int(counts.sum())
    if images < 2 or total == images:
        raise ValueError("the variance between images takes two images, and some that were evaluated in two splits")
    means = np.nansum(values, axis=0) / counts
    between = float(np.sum(counts * (means - np.nansum(values) / total) ** 2)) / (images - 1)
    within = float(np.nansum((values - means) ** 2)) / (total - images)
    typical_count = (total - float(np.sum(counts**2)) / total) / (images - 1)  # n0; equal counts give that count
    return max(0.0, (between - within) / typical_count)


def component_standard_error(differences: ArrayLike, image_variance: float, n_train: float, n_images: float) -> float:
    """Give the standard error of a mean over splits with large, overlapping scored parts, each drawn anew.

    ::

        SE^2 = s2/J + sigma2_img/N + (n_train/N) s2

    More splits reduce the first term only. The second reflects the finite number N of images. The third reflects the
    overlap of training parts, n_train/N on average. The result is in the units of the differences, for `ttest` and
    `posterior` with the degrees of freedom of `satterthwaite_df`.

    Parameters
    ----------
    differences : array_like of float, shape (J,)
        One per split, J at least 2.
    image_variance : float
        sigma2_img of the scored images, from the function `image_variance`.
    n_train, n_images : float
        Number of training images of a split, and the number N of images that all its parts are drawn from.
    """
    check_sizes(n_train=n_train, n_images=n_images)
    _, variance, splits = moments(differences)
    return math.sqrt((1 / splits + n_train / n_images) * variance + check_variance(image_variance) / n_images)


def fixed_test_standard_error(
    differences: ArrayLike, image_variance: float, n_train: float, n_val: float, n_test: float
) -> float:
    """Give the standard error of a mean over splits that are all scored on one fixed test part.

    ::

        SE^2 = (1/J + n_val/n_train) s2 + sigma2_img/n_test

    The splits vary only in training, so s2 does not contain the variance due to the test images, which all splits
    share. The factor of s2 is that of `corrected_resampled_ttest` for the two parts of the pool. Units, use and errors
    are those of `component_standard_error`.

    Parameters
    ----------
    differences, image_variance
        See `component_standard_error`; the scored images are the test images.
    n_train, n_val, n_test : float
        Numbers of training and validation images of a split, and of images of the fixed test part.
    """
    check_sizes(n_train=n_train, n_val=n_val, n_test=n_test)
    _, variance, splits = moments(differences)
    return math.sqrt((1 / splits + n_val / n_train) * variance + check_variance(image_variance) / n_test)


def satterthwaite_df(se: float, image_variance: float, n_images: float, n_splits: int) -> float:
    """Give the degrees of freedom of a standard error with an image term, weighted by the terms' contributions.

    With v = sigma2_img/n the image term of SE^2, estimated from n images, and the rest estimated from J splits::

        df = SE^4 / ((SE^2 - v)^2 / (J - 1) + v^2 / (n - 1))

    This ranges from J - 1 without an image term (or if `se` is 0) to n - 1 with nothing else. J - 1 throughout would
    treat the image term as being as uncertain as the rest, which leaves the test almost without power. An image term
    above SE^2 is an error.

    Parameters
    ----------
    se : float
        From `component_standard_error` or `fixed_test_standard_error`.
    image_variance, n_images : float
        sigma2_img, and its divisor there, the number of images n; more than one.
    n_splits : int
        J, at least 2.

    References
    ----------
    Satterthwaite (1946). An approximate distribution of estimates of variance components. Biometrics Bulletin 2,
    110-114.
    """
    check_scale(0, se, n_splits - 1)
    check_inside("n_images", n_images, 1, math.inf)
    of_images = check_variance(image_variance) / n_images
    if of_images > (1 + 1e-9) * se**2:
        raise ValueError("the image term is more than the whole squared standard error")
    share = min(1.0, of_images / se**2) if se else 0.0
    return 1 / ((1 - share) ** 2 / (n_splits - 1) + share**2 / (n_images - 1))
