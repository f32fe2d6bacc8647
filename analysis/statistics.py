"""Statistics of scores over splits: one estimate from all scored images, and tests for scores of whole splits.

Scores of splits are not independent: splits share training images, and often the images that score them.
docs/statistics.md says which method suits which protocol, and how well each holds its error rate.

All functions raise a `ValueError` if there are too few splits, or a value is not finite or out of its range. None
takes a tie for certainty: equal differences other than 0 have no spread to test them by, and are refused.
"""

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

MAX_SPLITS = 1_000_000  # upper limit of the search in `splits_needed`
MIN_SPLITS = 4  # fewest for an interval or a p: with fewer, families of tests find too much (docs/statistics.md)
N_SHARES = 5  # points of the quadrature over the share
SHARED = 0.5, 1.0  # range of the share of the split-level variance that is passed on by shared training images
TINY = float(np.finfo(np.float64).tiny)  # a p of 0 would claim certainty
ZERO = 1e-12  # values below are 0 but for rounding
ALIKE = 1e-9  # values that differ by less, relative to the largest, differ by rounding


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


@dataclass(frozen=True)
class McNemar:
    """Numbers of images that only one of two models classifies correctly, and the exact two-sided p-value."""

    only_a: int
    only_b: int
    p: float


@dataclass(frozen=True)
class ScoreEstimate:
    """A mean score or difference over splits, and what is known of its expected value, in the units of the scores."""

    mean: float
    se: float  # standard deviation of the posterior
    low: float  # ends of the 95 % interval
    high: float
    p: float  # two-sided: twice the posterior probability of the other sign; 1 for mean 0
    n_splits: int
    of_images: float  # parts of the variance of one training's score: the choice of the scored images,
    of_training: float  # training images and, without `seeds`, the seed,
    of_seeds: float  # weights and batches; NaN without `seeds`
    split_variance: float  # what more splits reduce: the variance of the mean is split_variance / J + a constant,
    constant_of_images: float  # of which the scored images are this part
    # posterior of the expected value: a mixture of normal distributions around `mean`
    weights: np.ndarray = field(repr=False, compare=False)
    sds: np.ndarray = field(repr=False, compare=False)

    @property
    def constant_variance(self) -> float:
        """The variance that more splits of the same images do not reduce."""
        return max(0.0, self.se**2 - self.split_variance / self.n_splits)

    def posterior(self, rope: float) -> Posterior:
        """Give the probabilities that the expected value lies below, within and above [-rope, rope]."""
        _check_rope(rope)
        if self.se == 0:
            return posterior(self.mean, 0, 1, rope)
        worse, better = (float(self.weights @ special.ndtr((-rope + sign * self.mean) / self.sds)) for sign in (-1, 1))
        return Posterior(worse, max(0.0, 1 - (worse + better)), better)


def score_estimate(
    scores: ArrayLike,
    splits: ArrayLike,
    images: ArrayLike,
    n_train: float,
    n_pool: float,
    seeds: ArrayLike | None = None,
) -> ScoreEstimate:
    """Estimate an expected score, or an expected paired difference, from all images that the splits scored.

    The score of image i in split j is modelled as mu + b_i + t_j + e_ij. The mean over the splits' means then has the
    variance::

        sigma_b^2 sum_i w_i^2 + (1 + (J - 1) o lam)/J sigma_t^2 + sigma_e^2/(n J)

    with w_i the weight of image i in the mean, n scored images a split, and o = n_train/n_pool the training images
    that two splits share. sigma_b and sigma_e are taken from the analysis of variance of the single scores. What
    little is known of sigma_t comes from the sample variance of the splits' means, whose expectation is
    (1 - o lam) sigma_t^2 + sigma_e^2/n + what the choice of images adds, and of lam nothing. Both are integrated out:
    sigma_t has a half-Cauchy prior with median sigma_e/sqrt(n), lam a uniform one on `SHARED`.

    Parameters
    ----------
    scores : array_like of float, shape (n,)
        Score of one image in one split, or the difference of two models there; e.g. `Score.per_image`'s values.
    splits, images : array_like, shape (n,)
        Number of the split, and an identifier of the image: the same for the same image in all splits.
    n_train, n_pool : float
        Training images of a split, and the number of images that they are drawn from.
    seeds : array_like, shape (n,), optional
        Number of the training (seed) within the split, if there are several a split on the same images. t_j is then
        the sum of an effect of the training images and one of each seed, which are estimated apart; lam concerns the
        former alone.

    Returns
    -------
    ScoreEstimate
        All splits have equal weight in `mean`. If all scores are 0, so are `se` and the interval, and p is 1.

    Raises
    ------
    ValueError
        If there are fewer than `MIN_SPLITS` splits or two images; an image occurs twice in a training; the trainings
        of a split scored different images; a value is not finite; or all scores are equal and not 0.

    Notes
    -----
    A `scores` array of macro-F1 or other linearised scores is scored as if they were independent: see
    `tracking.scores`. Where every image is scored once (folds without a test part), sigma_b and sigma_e cannot be
    told apart, and need not be.

    References
    ----------
    Gelman (2006). Prior distributions for variance parameters in hierarchical models. Bayesian Analysis 1, 515-534.
    Searle, Casella and McCulloch (1992). Variance Components. Wiley.
    """
    # Seeds of a split share what the split does to a model: as single scores they reject a true null in half of the
    # cases, even beside a random intercept by split (findings/statsmodels_split_intercept.sh)
    return estimate(scores, arrange(splits, images, seeds), n_train, n_pool)


@dataclass(frozen=True)
class Arrangement:
    """Split, image and training (a seed of a split) of each score of a long array, numbered from 0 without gaps."""

    split: np.ndarray  # int64, shape (n,), as the others
    image: np.ndarray
    training: np.ndarray


def arrange(splits: ArrayLike, images: ArrayLike, seeds: ArrayLike | None = None) -> Arrangement:
    """Check and number what `score_estimate` is given beside the scores; models scored on the same images share it."""
    labels = [np.asarray(label) for label in ((splits, images) if seeds is None else (splits, images, seeds))]
    if any(label.ndim != 1 or label.shape != labels[0].shape for label in labels):
        raise ValueError("scores, splits, images and seeds must be equally long arrays of one dimension")
    numbers = [_numbered(label) for label in labels]
    n_splits, n_images = (int(number.max(initial=-1)) + 1 for number in numbers[:2])
    check_splits(n_splits)
    if n_images < 2:
        raise ValueError("an estimate takes the scores of at least two images")
    training = numbers[0]
    if seeds is not None:
        training = _numbered(numbers[0] * (numbers[2].max() + 1) + numbers[2])
    if np.bincount(training * n_images + numbers[1]).max() > 1:
        raise ValueError("an image has two scores in one split; more trainings of a split are told apart by `seeds`")
    return Arrangement(numbers[0], numbers[1], training)


def estimate(scores: ArrayLike, arrangement: Arrangement, n_train: float, n_pool: float) -> ScoreEstimate:
    """Return the `score_estimate` of scores in this arrangement; checking and numbering it takes half of the time."""
    values = np.asarray(scores, np.float64)
    if values.shape != arrangement.split.shape:
        raise ValueError("scores, splits, images and seeds must be equally long arrays of one dimension")
    if not np.isfinite(values).all():
        raise ValueError("a score is not finite")
    _check_inside("n_train", n_train, 0, math.inf)
    if not n_train <= n_pool < math.inf:
        raise ValueError(f"the pool of {n_pool} images must hold the {n_train} training images")
    parts = variance_parts(values, arrangement.split, arrangement.image, arrangement.training)
    mean = _round_to_zero(float(np.mean(parts.means)))
    if _tied(values):
        if mean:
            raise ValueError(f"all single scores are equal ({mean:g}), which tells nothing of their spread")
        one = np.ones(1)
        return ScoreEstimate(0.0, 0.0, 0.0, 0.0, 1.0, len(parts.means), 0.0, 0.0, 0.0, 0.0, 0.0, one, 0 * one)
    return _integrate(mean, parts, n_train / n_pool)


@dataclass(frozen=True)
class VarianceParts:
    """Sample variances of means, and components of the variance of single scores, of J splits with R seeds each."""

    means: np.ndarray  # (J,)
    n: float  # scored images a split, harmonic mean
    n_seeds: float  # R, harmonic mean
    squared_weights: float  # sum over the images of the squared weight in the mean of all
    of_images: float  # sigma_b^2
    noise: float  # sigma_e^2 of a mean over the seeds
    noise_of_seeds: float  # the part of it that differs between the seeds of a split, for one seed; 0 without seeds
    seed_variance: float  # of a split's means by seed; 0 without seeds
    seed_df: int  # degrees of freedom of the two


def _numbered(labels: np.ndarray) -> np.ndarray:
    """Number equal labels from 0, in their order; whole numbers without sorting them, which takes ten times as long."""
    if labels.dtype.kind not in "iu" or not len(labels) or labels.min() < 0 or labels.max() > 10 * len(labels):
        return np.asarray(np.unique(labels, return_inverse=True)[1])
    occurs = np.bincount(labels) > 0
    return np.asarray((np.cumsum(occurs) - 1)[labels])


def variance_parts(values: np.ndarray, split: np.ndarray, image: np.ndarray, training: np.ndarray) -> VarianceParts:
    """Analyse the variance of single scores: between images, within them, and between the seeds of a split.

    Parameters
    ----------
    values : numpy.ndarray of float, shape (n,)
    split, image, training : numpy.ndarray of int, shape (n,)
        Numbers from 0, without gaps. Without seeds a training is a split.
    """
    split_of = np.zeros(training.max() + 1, np.int64)  # of each training
    split_of[training] = split
    by_training = np.bincount(training, values) / np.bincount(training)
    n_seeds = np.bincount(split_of)  # (J,)
    means = np.bincount(split_of, by_training) / n_seeds
    values = values - by_training[training]  # what a training adds to all its images is no noise of single ones
    seed_df, noise_of_seeds = len(by_training) - len(n_seeds), 0.0
    if seed_df:
        cells, cell = np.unique(split * (image.max() + 1) + image, return_inverse=True)  # an image in a split
        split, image = cells // (image.max() + 1), cells % (image.max() + 1)
        counts = np.bincount(cell)
        if np.any(counts != n_seeds[split]):
            raise ValueError("the trainings of a split must have scored the same images")
        over_seeds = np.bincount(cell, values) / counts
        squares = float(np.sum((values - over_seeds[cell]) ** 2))
        noise_of_seeds = squares / max(1, len(values) - len(cells) - seed_df)
        values = over_seeds
    scored, times = np.bincount(split), np.bincount(image)  # images of each split, splits of each image
    total, n_splits, n_images = len(values), len(scored), len(times)
    sums = np.bincount(image, values)
    between, squares = float(np.sum(sums**2 / times)), float(values @ values)
    df = total - n_images - n_splits + 1
    if df < 1:  # every image once: its effect and the noise are one
        of_images, noise = 0.0, squares / max(1, total - n_splits)
    else:
        noise = max(0.0, squares - between) / df
        typical = (total - float(np.sum(times.astype(np.float64) ** 2)) / total) / (n_images - 1)
        of_images = max(0.0, (between / (n_images - 1) - noise) / typical)
    return VarianceParts(
        means=means,
        n=1 / float(np.mean(1 / scored)),
        n_seeds=1 / float(np.mean(1 / n_seeds)),
        squared_weights=float(np.sum((np.bincount(image, 1 / scored[split]) / n_splits) ** 2)),
        of_images=of_images,
        # a residual more, of the typical size: none at all would claim that there is no noise
        noise=(noise * max(df, 1) + squares / total) / (max(df, 1) + 1),
        noise_of_seeds=noise_of_seeds,
        seed_variance=float(np.sum((by_training - means[split_of]) ** 2)) / max(1, seed_df),
        seed_df=seed_df,
    )


def _integrate(mean: float, parts: VarianceParts, overlap: float) -> ScoreEstimate:
    """Integrate out the unknown variances by quadrature; `overlap` is the share of training images in common."""
    n_splits, n_seeds = len(parts.means), parts.n_seeds
    noise = parts.noise / parts.n
    noise_of_seeds = parts.noise_of_seeds / parts.n
    s2 = float(np.var(parts.means, ddof=1))
    images = parts.of_images * parts.squared_weights  # in the variance of the mean
    drawn = max(0.0, parts.of_images / parts.n - images) * n_splits / (n_splits - 1)  # in the expectation of s2
    # axes: sigma_t (training images, or all of the split), sigma_s (seeds), lam
    largest = math.sqrt(max(s2, parts.seed_variance))
    scale = math.sqrt(noise + noise_of_seeds * (1 - 1 / n_seeds)) or largest  # of one training
    step = min(0.25, 0.6 / math.sqrt(2 * max(n_splits - 1, parts.seed_df)))  # finer than the likelihood is wide
    sigma = np.exp(np.arange(math.log(0.01 * scale), math.log(100 * max(scale, largest)), step))
    prior = sigma / (scale**2 + sigma**2)  # half-Cauchy, by log sigma
    nodes, prior_of_share = np.polynomial.legendre.leggauss(N_SHARES)
    share = overlap * (SHARED[0] + (SHARED[1] - SHARED[0]) * (1 + nodes) / 2)
    training, seed = (sigma**2)[:, None, None], np.zeros((1, 1, 1))
    log_weight = np.log(prior)[:, None, None] + np.log(prior_of_share)
    if parts.seed_df:
        seed = (sigma**2)[None, :, None]
        log_weight = log_weight + np.log(prior)[:, None]
        log_weight = log_weight + _log_likelihood(parts.seed_variance, seed + noise_of_seeds, parts.seed_df)
    expected = training * (1 - share) + seed / n_seeds + noise + drawn
    log_weight = log_weight + _log_likelihood(s2, expected, n_splits - 1)
    weights = np.exp(log_weight - log_weight.max())
    weights /= weights.sum()
    shared = training * share
    variance = shared + (training - shared + seed / n_seeds + noise) / n_splits + images

    def average(values: np.ndarray) -> float:
        return float(np.sum(weights * values))

    likely = weights > 1e-16 * weights.max()  # the others take time and change no digit
    mixture = weights[likely] / weights[likely].sum()
    sds = np.sqrt(np.broadcast_to(variance, weights.shape)[likely])
    half = _half_width(mixture, sds)
    return ScoreEstimate(
        mean=mean,
        se=math.sqrt(average(variance)),
        low=mean - half,
        high=mean + half,
        p=min(1.0, max(TINY, 2 * float(mixture @ special.ndtr(-abs(mean) / sds)))),
        n_splits=n_splits,
        of_images=parts.of_images / parts.n,
        of_training=average(training) + max(0.0, noise - noise_of_seeds / n_seeds),
        of_seeds=average(seed) + noise_of_seeds if parts.seed_df else math.nan,
        split_variance=average(expected),
        constant_of_images=max(0.0, images - drawn / n_splits),
        weights=mixture,
        sds=sds,
    )


def _log_likelihood(sample_variance: float, expected: np.ndarray, df: int) -> np.ndarray:
    """Log density of a sample variance of normal values with this expectation, but for a constant."""
    return np.asarray(-df / 2 * (np.log(expected) + sample_variance / expected))


def _half_width(weights: np.ndarray, sds: np.ndarray, confidence: float = 0.95) -> float:
    """Half the width of the central interval of a mixture of normal distributions with one mean, by Newton's method.

    The distribution function is concave from 0 on, so the steps approach the solution from below.
    """
    half, step = 0.0, math.inf
    while step > ALIKE * half:
        missing = (1 + confidence) / 2 - float(weights @ special.ndtr(half / sds))
        step = missing / float(weights @ (np.exp(-((half / sds) ** 2) / 2) / sds)) * math.sqrt(2 * math.pi)
        half += step
    return half


def check_splits(n_splits: int) -> None:
    """Raise a `ValueError` that names the number of splits that an interval or a p takes, if these are fewer."""
    if n_splits < MIN_SPLITS:
        count = "1 split is" if n_splits == 1 else f"{n_splits or 'no'} splits are"
        raise ValueError(f"{count} finished, and an interval or a verdict takes {MIN_SPLITS}")


def ttest(mean: float, se: float, df: float, confidence: float = 0.95) -> TTest:
    """Test a mean against 0, two-sided, with the interval mean -+ t_{(1 + confidence) / 2, df} se.

    If `se` is 0, `low` = `high` = `mean`, and p is 1 for mean 0 (t = 0), else 0 (t = inf with the mean's sign).

    Parameters
    ----------
    mean, se : float
        A mean and its standard error, in the same units; `se` may be 0.
    df : float
        Degrees of freedom of `se`, above 0.
    confidence : float
        Confidence level of the interval, in (0, 1).
    """
    mean, se = _check_scale(mean, se, df)
    _check_inside("confidence", confidence, 0, 1)
    if se == 0:
        return TTest(mean, se, mean, mean, math.copysign(math.inf, mean) if mean else 0.0, df, float(mean == 0))
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
    mean, se = _check_scale(mean, se, df)
    _check_rope(rope)
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
    _check_sizes(n_train=n_train, n_images=n_images)
    _, variance, splits = _moments(differences)
    return math.sqrt((1 / splits + n_train / n_images) * variance + _check_variance(image_variance) / n_images)


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
    _check_sizes(n_train=n_train, n_val=n_val, n_test=n_test)
    _, variance, splits = _moments(differences)
    return math.sqrt((1 / splits + n_val / n_train) * variance + _check_variance(image_variance) / n_test)


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
    _check_scale(0, se, n_splits - 1)
    _check_inside("n_images", n_images, 1, math.inf)
    of_images = _check_variance(image_variance) / n_images
    if of_images > (1 + 1e-9) * se**2:
        raise ValueError("the image term is more than the whole squared standard error")
    share = min(1.0, of_images / se**2) if se else 0.0
    return 1 / ((1 - share) ** 2 / (n_splits - 1) + share**2 / (n_images - 1))


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
    _check_inside("confidence", confidence, 0, 1)
    if not 0.5 <= power < 1:
        raise ValueError(f"power must lie between 0.5 and 1, not be {power}")
    variances = _check_variance(split_variance), _check_variance(constant_variance)

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


def _moments(differences: ArrayLike) -> tuple[float, float, int]:
    """Mean, sample variance (ddof 1) and number of differences; the variance of nearly equal ones is exactly 0."""
    values = np.asarray(differences, np.float64)
    if values.ndim != 1 or len(values) < 2:
        raise ValueError("a test takes the differences of at least two splits")
    if not np.isfinite(values).all():
        raise ValueError("a difference is not finite: a split has no score")
    mean = _round_to_zero(float(np.mean(values)))
    return mean, 0.0 if _tied(values) else float(np.var(values, ddof=1)), len(values)


def _tied(values: np.ndarray) -> bool:
    """Whether all values are equal but for rounding."""
    return bool(np.ptp(values) <= max(ZERO, ALIKE * np.max(np.abs(values))))


def _round_to_zero(mean: float) -> float:
    return 0.0 if abs(mean) < ZERO else mean


def _corrected(differences: ArrayLike, n_train: float, n_test: float) -> tuple[float, float, int]:
    """Mean, its standard error corrected for resampling, and degrees of freedom."""
    _check_sizes(n_train=n_train, n_test=n_test)
    mean, variance, splits = _moments(differences)
    if mean and not variance:
        raise ValueError(f"all {splits} differences are equal ({mean:g}), which tells nothing of their spread")
    return mean, math.sqrt((1 / splits + n_test / n_train) * variance), splits - 1


def _check_sizes(**sizes: float) -> None:
    for name, size in sizes.items():
        _check_inside(name, size, 0, math.inf)


def _check_inside(name: str, value: float, low: float, high: float) -> None:
    if not low < value < high:
        raise ValueError(f"{name} must lie between {low} and {high}, not be {value}")


def _check_variance(variance: float) -> float:
    if not 0 <= variance < math.inf:
        raise ValueError(f"a variance must be 0 or more, not {variance}")
    return float(variance)


def _check_rope(rope: float) -> None:
    if not 0 <= rope < math.inf:
        raise ValueError(f"the region of practical equivalence must be 0 or more, not {rope}")


def _check_scale(mean: float, se: float, df: float) -> tuple[float, float]:
    if not (math.isfinite(mean) and 0 <= se < math.inf):
        raise ValueError(f"a mean must be finite and its standard error 0 or more, not {mean} and {se}")
    _check_inside("df", df, 0, math.inf)
    return float(mean), float(se)
