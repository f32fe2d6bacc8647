"""One estimate of an expected score, or of a difference, from all scored images of all splits."""

import functools
import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from analysis.statistics.checks import ALIKE, check_inside, check_rope, check_splits, round_to_zero, tied
from analysis.statistics.resampled import Posterior

N_SHARES = 5  # points of the quadrature over the share
SHARED = 0.5, 1.0  # range of the share of the split-level variance that is passed on by shared training images
TINY = float(np.finfo(np.float64).tiny)  # a p of 0 would claim certainty


@dataclass(frozen=True)
class ScoreEstimate:
    """A mean score or difference over splits and the uncertainty of its expected value, in the units of the scores."""

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
    def is_tie(self) -> bool:
        """Whether all single scores are 0."""
        return self.mean == self.of_images == self.of_training == 0

    @property
    def constant_variance(self) -> float:
        """The variance that more splits of the same images do not reduce."""
        return max(0.0, self.se**2 - self.split_variance / self.n_splits)

    def posterior(self, rope: float) -> Posterior:
        """Give the probabilities that the expected value lies below, within and above [-rope, rope]."""
        check_rope(rope)
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
        All splits have equal weight in `mean`. If all scores are 0, p is 1, and the interval is as if they were
        differences of 0 or +-1: where none of N images differs, less than 1 - 0.05^(1/(N + 1)) of others do.

    Raises
    ------
    ValueError
        If there are fewer than `MIN_SPLITS` splits or two images; an image occurs twice in a training; the trainings
        of a split scored different images; a value is not finite; or all scores are equal and not 0.

    Notes
    -----
    Linearised scores, such as those of macro-F1, are treated as independent between images: see `tracking.scores`.
    Where every image is scored once (one repetition of folds without a test part), sigma_b and sigma_e cannot be told
    apart, and need not be.

    References
    ----------
    Hanley and Lippman-Hand (1983). If nothing goes wrong, is everything all right? JAMA 249, 1743-1745.
    Gelman (2006). Prior distributions for variance parameters in hierarchical models. Bayesian Analysis 1, 515-534.
    Searle, Casella and McCulloch (1992). Variance Components. Wiley.
    """
    # Seeds of a split share what the split does to a model: as single scores they reject a true null in half of the
    # cases, even beside a random intercept by split (findings/statsmodels_split_intercept.sh)
    return estimate(scores, arrange(splits, images, seeds), n_train, n_pool)


@dataclass(frozen=True)
class Arrangement:
    """Split, image and training (a seed of a split) of each score of a long array, numbered from 0 without gaps.

    What follows from these alone is counted once for all scores in the same arrangement.
    """

    split: np.ndarray  # int64, shape (n,), as the others
    image: np.ndarray
    training: np.ndarray

    @functools.cached_property
    def split_of(self) -> np.ndarray:
        """Split of each training."""
        split_of = np.zeros(self.training.max() + 1, np.int64)
        split_of[self.training] = self.split
        return split_of

    @functools.cached_property
    def n_seeds(self) -> np.ndarray:
        """Trainings of each split, shape (J,)."""
        return np.bincount(self.split_of)

    @functools.cached_property
    def sizes(self) -> np.ndarray:
        """Scored images of each training."""
        return np.bincount(self.training)

    @functools.cached_property
    def cells(self) -> "Cells":
        """The arrangement of the means over the trainings of a split.

        Raises
        ------
        ValueError
            If the trainings of a split scored different images.
        """
        if len(self.sizes) == len(self.n_seeds):
            return Cells(self.split, self.image)
        numbers, cell = np.unique(self.split * (self.image.max() + 1) + self.image, return_inverse=True)
        cells = Cells(numbers // (self.image.max() + 1), numbers % (self.image.max() + 1), cell)
        if np.any(np.bincount(cell) != self.n_seeds[cells.split]):
            raise ValueError("the trainings of a split must have scored the same images")
        return cells


@dataclass(frozen=True)
class Cells:
    """Split and image of each pair of the two that was scored."""

    split: np.ndarray  # int64, shape (m,)
    image: np.ndarray
    cell: np.ndarray | None = None  # number of the pair of each score; None if each has one score

    @functools.cached_property
    def scored(self) -> np.ndarray:
        """Images of each split, shape (J,)."""
        return np.bincount(self.split)

    @functools.cached_property
    def times(self) -> np.ndarray:
        """Splits of each image."""
        return np.bincount(self.image)

    @functools.cached_property
    def squared_weights(self) -> float:
        """Sum over the images of the squared weight in the mean of all."""
        return float(np.sum((np.bincount(self.image, 1 / self.scored[self.split]) / len(self.scored)) ** 2))


def arrange(splits: ArrayLike, images: ArrayLike, seeds: ArrayLike | None = None) -> Arrangement:
    """Check and number the labels of `score_estimate`; models scored on the same images share them."""
    labels = [np.asarray(label) for label in ((splits, images) if seeds is None else (splits, images, seeds))]
    if any(label.ndim != 1 or label.shape != labels[0].shape for label in labels):
        raise ValueError("scores, splits, images and seeds must be equally long arrays of one dimension")
    if any(label.dtype.kind == "f" and np.isnan(label).any() for label in labels):  # else all NaN would be one
        raise ValueError("a split, an image or a seed is not a number")
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
    check_inside("n_train", n_train, 0, math.inf)
    if not n_train <= n_pool < math.inf:
        raise ValueError(f"the pool of {n_pool} images must hold the {n_train} training images")
    parts = variance_parts(values, arrangement)
    mean = round_to_zero(float(np.mean(parts.means)))
    if tied(values):
        if mean:
            raise ValueError(f"all single scores are equal ({mean:g}), which tells nothing of their spread")
        half = 1 - 0.05 ** (1 / (len(arrangement.cells.times) + 1))
        se, one = half / float(special.ndtri(0.975)), np.ones(1)
        return ScoreEstimate(0.0, se, -half, half, 1.0, len(parts.means), 0.0, 0.0, 0.0, 0.0, se**2, one, se * one)
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


def variance_parts(values: np.ndarray, arrangement: Arrangement) -> VarianceParts:
    """Analyse the variance of single scores, float of shape (n,): between images, within them, and between the seeds.

    Errors are those of `Arrangement.cells`.
    """
    training, split_of, n_seeds = arrangement.training, arrangement.split_of, arrangement.n_seeds
    by_training = np.bincount(training, values) / arrangement.sizes
    means = np.bincount(split_of, by_training) / n_seeds
    values = values - by_training[training]  # what a training adds to all its images is no noise of single ones
    cells, seed_df, noise_of_seeds = arrangement.cells, len(by_training) - len(n_seeds), 0.0
    if cells.cell is not None:
        over_seeds = np.bincount(cells.cell, values) / n_seeds[cells.split]
        squares = float(np.sum((values - over_seeds[cells.cell]) ** 2))
        noise_of_seeds = squares / max(1, len(values) - len(over_seeds) - seed_df)
        values = over_seeds
    times = cells.times
    total, n_splits, n_images = len(values), len(means), len(times)
    sums = np.bincount(cells.image, values)
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
        n=1 / float(np.mean(1 / cells.scored)),
        n_seeds=1 / float(np.mean(1 / n_seeds)),
        squared_weights=cells.squared_weights,
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
