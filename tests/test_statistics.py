"""Tests and intervals against other implementations, brute force, and their promised error rate."""

import math
import time
import warnings
from dataclasses import astuple
from unittest import mock

import baycomp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import optimize, stats
from sklearn.metrics import f1_score
from statsmodels.stats.contingency_tables import mcnemar as statsmodels_mcnemar
from statsmodels.stats.multitest import multipletests

from analysis import statistics
from analysis.statistics import (
    bayesian_correlated_ttest,
    component_standard_error,
    corrected_resampled_ttest,
    fixed_test_standard_error,
    holm,
    image_variance,
    mcnemar,
    posterior,
    satterthwaite_df,
    score_estimate,
    splits_needed,
    ttest,
)
from benchmarks.type_one_error import PROTOCOLS, TRAIN, TYPICAL, draw, false_families, tallies
from tracking.scores import macro_f1_values

SCORES = st.floats(-1, 1).map(lambda score: round(score, 6))
DIFFERENCES = st.lists(SCORES, min_size=2, max_size=20).map(np.array)
SIZES = st.integers(1, 70_000)
P_VALUES = st.lists(st.floats(0, 1), max_size=15).map(np.array)


# t tests


@settings(deadline=None)
@given(DIFFERENCES, SIZES, SIZES)
def test_corrected_t_is_scikit_learns_example(differences: np.ndarray, n_train: int, n_test: int) -> None:
    assume(np.ptp(differences) > 0)
    # "Statistical comparison of models using grid search": its p is one-sided
    corrected_std = np.sqrt(np.var(differences, ddof=1) * (1 / len(differences) + n_test / n_train))
    t = np.mean(differences) / corrected_std
    p = 2 * stats.t.sf(np.abs(t), len(differences) - 1)
    result = corrected_resampled_ttest(differences, n_train, n_test)
    assert result.t == pytest.approx(t, rel=1e-12)
    assert result.p == pytest.approx(p, rel=1e-12)
    assert (result.df, result.se) == (len(differences) - 1, pytest.approx(corrected_std, rel=1e-12))
    assert (result.low > 0 or result.high < 0) == (result.p < 0.05)


def test_ttest_without_correction_is_scipys() -> None:
    differences = np.random.default_rng(0).normal(0.3, 1, 12)
    expected = stats.ttest_1samp(differences, 0)
    result = ttest(np.mean(differences), stats.sem(differences), 11, 0.9)
    assert (result.t, result.p) == (
        pytest.approx(expected.statistic, rel=1e-12),
        pytest.approx(expected.pvalue, rel=1e-12),
    )
    assert (result.low, result.high) == pytest.approx(tuple(expected.confidence_interval(0.9)), rel=1e-12)


@settings(deadline=None)
@given(st.lists(SCORES, min_size=2, max_size=10).map(np.array), st.floats(0.001, 0.2))
def test_bayesian_t_is_baycomps_for_folds(differences: np.ndarray, rope: float) -> None:
    k = len(differences)
    expected = baycomp.CorrelatedTTest.probs(np.zeros(k), differences, rope)
    # baycomp has no exact answer for equal differences whose variance rounding leaves above 0
    assume(np.ptp(differences) > 0)
    result = astuple(bayesian_correlated_ttest(differences, k - 1, 1, rope))
    assert result == pytest.approx(expected, abs=1e-12)
    worse, _, better = astuple(bayesian_correlated_ttest(differences, k - 1, 1, 0))
    assert (worse, better) == pytest.approx(baycomp.two_on_single(np.zeros(k), differences), abs=1e-12)


@settings(deadline=None)
@given(DIFFERENCES, SIZES, SIZES, st.floats(0, 0.3))
def test_swapping_models_mirrors_and_order_of_splits_is_nothing(
    differences: np.ndarray, n_train: int, n_test: int, rope: float
) -> None:
    assume(np.ptp(differences) > 0)
    one = corrected_resampled_ttest(differences, n_train, n_test)
    other = corrected_resampled_ttest(-differences, n_train, n_test)
    mirrored = (-other.mean, other.se, -other.high, -other.low, -other.t, other.df, other.p)
    assert astuple(one) == mirrored
    belief = bayesian_correlated_ttest(differences, n_train, n_test, rope)
    assert astuple(belief) == astuple(bayesian_correlated_ttest(-differences, n_train, n_test, rope))[::-1]
    assert sum(astuple(belief)) == pytest.approx(1, abs=1e-12)
    assert min(astuple(belief)) >= 0
    shuffled = np.random.default_rng(0).permutation(differences)
    assert astuple(corrected_resampled_ttest(shuffled, n_train, n_test)) == pytest.approx(
        astuple(one), rel=1e-6, abs=1e-9
    )


@pytest.mark.parametrize("n", [2, 3, 10])
def test_a_tie_is_no_certainty(n: int) -> None:
    rounding = np.where(np.arange(n) % 2, 0.3, 0.1 + 0.2)  # equal but for the last bit
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for zeros in (np.zeros(n), rounding - 0.3):
            result = corrected_resampled_ttest(zeros, 3, 2)
            assert astuple(result) == (0, 0, 0, 0, 0, n - 1, 1)
            assert astuple(bayesian_correlated_ttest(zeros, 3, 2, 0.05)) == (0, 1, 0)
    for tied in (np.full(n, 0.1), np.full(n, -0.1), rounding):
        for test in (corrected_resampled_ttest, bayesian_correlated_ttest):
            with pytest.raises(ValueError, match=f"all {n} differences are equal"):
                test(tied, 3, 2)
    with pytest.raises(ValueError, match="certainty"):
        ttest(0.1, 0, 4)


def test_a_point_mass_on_the_border_is_equivalent() -> None:
    assert astuple(posterior(0.01, 0, 4, 0.01)) == (0, 1, 0)
    assert astuple(posterior(-0.01, 0, 4, 0.01)) == (0, 1, 0)
    assert astuple(posterior(0, 0, 4, 0)) == (0, 1, 0)


@pytest.mark.parametrize("differences", [[], [0.1], [0.1, math.nan], [math.inf, 0.1], [[0.1, 0.2], [0.3, 0.4]]])
def test_differences_that_no_test_can_use(differences: list[float]) -> None:
    for function in (corrected_resampled_ttest, bayesian_correlated_ttest):
        with pytest.raises(ValueError, match="at least two splits|not finite"):
            function(differences, 3, 2)
    with pytest.raises(ValueError, match="at least two splits|not finite"):
        component_standard_error(differences, 0.1, 3, 5)
    with pytest.raises(ValueError, match="at least two splits|not finite"):
        fixed_test_standard_error(differences, 0.1, 3, 2, 4)


@pytest.mark.parametrize("size", [0, -1, math.nan, math.inf])
def test_sizes_must_be_positive(size: float) -> None:
    for sizes in ((size, 2), (3, size)):
        with pytest.raises(ValueError, match=r"n_t(rain|est) must lie"):
            corrected_resampled_ttest([0.1, 0.2], *sizes)
        with pytest.raises(ValueError, match=r"n_(train|images) must lie"):
            component_standard_error([0.1, 0.2], 0.1, *sizes)
    with pytest.raises(ValueError, match="n_val must lie"):
        fixed_test_standard_error([0.1, 0.2], 0.1, 3, size, 4)


def test_other_arguments_out_of_range() -> None:
    with pytest.raises(ValueError, match="practical equivalence"):
        bayesian_correlated_ttest([0.1, 0.2], 3, 2, -0.01)
    with pytest.raises(ValueError, match="practical equivalence"):
        posterior(0.1, 0, 4, math.nan)
    with pytest.raises(ValueError, match="confidence"):
        ttest(0.1, 0.1, 4, 1)
    for mean, se, df in ((math.nan, 1, 4), (0, -1, 4), (0, math.nan, 4), (0, 1, 0)):
        with pytest.raises(ValueError, match="mean must be finite|df"):
            ttest(mean, se, df)
    with pytest.raises(ValueError, match="variance must be 0 or more"):
        component_standard_error([0.1, 0.2], -1e-3, 3, 5)


# One estimate from all images

VAL, TEST = 60, 40  # images that a split of `scored` validates, of a pool of 150, and test images


def scored(
    seed: int, *, n_splits: int = 5, n_seeds: int = 1, folds: bool = False, images: float = 0.3, noise: float = 0.5,
    training: float = 0.02, seeds: float = 0.0, discrete: bool = False, mean: float = 0.02,
) -> tuple[np.ndarray, ...]:  # fmt: skip
    """Scores of known parts, as sd; their splits, images and seeds."""
    rng = np.random.default_rng(seed)
    effect = rng.normal(0, images, 150 + TEST)
    order, rows = rng.permutation(150), []
    for split in range(n_splits):
        val = order[split::n_splits] if folds else rng.permutation(150)[:VAL]
        index = np.concatenate([val, np.arange(150, 150 + TEST)])
        of_split = rng.normal(0, training)
        for number in range(n_seeds):
            values = mean + effect[index] + of_split + rng.normal(0, seeds) + rng.normal(0, noise, len(index))
            values = np.clip(np.round(values), -1, 1) if discrete else values
            rows.append((values, np.full(len(index), split), index, np.full(len(index), number)))
    return tuple(np.concatenate(column) for column in zip(*rows, strict=True))


def plain_estimate(scores, splits, images, n_train: float, n_pool: float) -> tuple[float, float, float]:
    """Mean, half-width and p of one training a split, by loops and a fine Riemann sum; slow."""
    by_split = {split: scores[splits == split] for split in set(splits.tolist())}
    means = {split: values.mean() for split, values in by_split.items()}
    centred = np.array([score - means[split] for score, split in zip(scores, splits, strict=True)])
    groups = [centred[images == image] for image in set(images.tolist())]
    n, j = len(scores), len(means)
    df = n - len(groups) - j + 1
    within = sum(((group - group.mean()) ** 2).sum() for group in groups) / df
    between = sum(len(group) * group.mean() ** 2 for group in groups) / (len(groups) - 1)
    typical = (n - sum(len(group) ** 2 for group in groups) / n) / (len(groups) - 1)
    of_images = max(0.0, (between - within) / typical)
    noise = (within * df + (centred**2).sum() / n) / (df + 1) * np.mean([1 / len(v) for v in by_split.values()])
    weight = [sum(1 / len(by_split[split]) for split in splits[images == image]) / j for image in set(images.tolist())]
    of_mean = of_images * sum(w**2 for w in weight)
    drawn = (of_images * np.mean([1 / len(v) for v in by_split.values()]) - of_mean) * j / (j - 1)
    s2 = np.var(list(means.values()), ddof=1)
    scale = math.sqrt(noise)
    sigmas = np.arange(0.02, 100, 0.04) * scale
    chance, sds = [], []
    for lam in np.arange(0.525, 1, 0.05):
        shared = n_train / n_pool * lam
        expected = sigmas**2 * (1 - shared) + noise + drawn
        of_s2 = stats.chi2.pdf((j - 1) * s2 / expected, j - 1) / expected
        chance.append(stats.halfcauchy.pdf(sigmas, scale=scale) * of_s2)
        sds.append(np.sqrt(sigmas**2 * (shared + (1 - shared) / j) + noise / j + of_mean))
    chance, sds = np.concatenate(chance) / np.sum(chance), np.concatenate(sds)
    outside = lambda half: 2 * float(chance @ stats.norm.sf(half / sds))  # noqa: E731
    half = optimize.brentq(lambda half: outside(half) - 0.05, 0, 100 * math.sqrt(s2 + of_mean + noise))
    mean = float(np.mean(list(means.values())))
    return mean, half, outside(abs(mean))


@pytest.mark.parametrize(
    "case", [{}, {"folds": True}, {"discrete": True, "n_splits": 4}, {"training": 0.3}, {"images": 0.0, "n_splits": 10}]
)
def test_score_estimate_is_the_plain_one(case: dict) -> None:
    scores, splits, images, _ = scored(3, **case)
    mean, half, p = plain_estimate(scores, splits, images, 90, 150)
    estimate = score_estimate(scores, splits, images, 90, 150)
    assert estimate.mean == pytest.approx(mean, rel=1e-12)
    assert (estimate.high - estimate.low) / 2 == pytest.approx(half, rel=0.01)
    assert estimate.p == pytest.approx(p, rel=0.02)
    assert (estimate.low + estimate.high) / 2 == pytest.approx(mean) and estimate.n_splits == case.get("n_splits", 5)
    assert (estimate.p < 0.05) == (estimate.low > 0 or estimate.high < 0)


@settings(deadline=None, max_examples=12)
@given(st.integers(0, 2**31), st.integers(4, 8), st.booleans(), st.integers(1, 2), st.floats(0, 0.5), st.booleans())
def test_score_estimate_has_the_symmetries_of_its_model(
    seed: int, n_splits: int, folds: bool, n_seeds: int, training: float, discrete: bool
) -> None:
    case = {"n_splits": n_splits, "folds": folds, "n_seeds": n_seeds, "training": training, "discrete": discrete}
    scores, splits, images, seeds = scored(seed, **case)
    given_seeds = seeds if n_seeds > 1 else None
    base = score_estimate(scores, splits, images, 90, 150, given_seeds)
    assert base.low < base.mean < base.high and base.se > 0 and 0 < base.p <= 1
    order = np.random.default_rng(seed).permutation(len(scores))
    names = np.array([f"image {number}.png" for number in 1000 - images])
    same = [
        score_estimate(scores[order], splits[order], images[order], 90, 150, None if n_seeds == 1 else seeds[order]),
        score_estimate(scores, 7 - splits, names, 90, 150, given_seeds),
        score_estimate(scores, splits, images, 90, 150, 5 - 2 * seeds),
    ]
    numbers = ("mean", "se", "low", "high", "p", "of_images", "of_training", "split_variance", "constant_variance")
    for other in same:
        for name in numbers:
            assert getattr(other, name) == pytest.approx(getattr(base, name), rel=1e-6, abs=1e-12), name
    scaled = score_estimate(-100 * scores, splits, images, 90, 150, given_seeds)
    assert (scaled.mean, scaled.se, scaled.low, scaled.high, scaled.p) == pytest.approx(
        (-100 * base.mean, 100 * base.se, -100 * base.high, -100 * base.low, base.p), rel=1e-6
    )
    shifted = score_estimate(scores + 3, splits, images, 90, 150, given_seeds)
    assert (shifted.mean, shifted.se, shifted.low) == pytest.approx((base.mean + 3, base.se, base.low + 3), rel=1e-6)
    belief, mirrored = base.posterior(0.03), scaled.posterior(3)
    assert astuple(belief) == pytest.approx(astuple(mirrored)[::-1], abs=1e-9)
    assert sum(astuple(belief)) == pytest.approx(1) and min(astuple(belief)) >= 0
    assert 2 * min(base.posterior(0).p_worse, base.posterior(0).p_better) == pytest.approx(base.p, rel=1e-9)


def test_score_estimate_finds_known_parts() -> None:
    found = [score_estimate(*scored(seed, n_splits=20, training=0.08)[:3], 90, 150) for seed in range(30)]
    n = VAL + TEST
    assert np.mean([each.of_images for each in found]) == pytest.approx(0.3**2 / n, rel=0.15)
    assert np.mean([each.of_training for each in found]) == pytest.approx(0.08**2 + 0.5**2 / n, rel=0.5)
    case = {"n_splits": 30, "n_seeds": 2, "training": 0.02, "seeds": 0.15}
    apart = [score_estimate(*scored(seed, **case)[:3], 90, 150, scored(seed, **case)[3]) for seed in range(10)]
    assert np.mean([each.of_seeds for each in apart]) == pytest.approx(0.15**2 + 0.5**2 / n, rel=0.2)
    assert np.mean([each.of_training for each in apart]) < 0.2 * np.mean([each.of_seeds for each in apart])
    assert np.isnan(found[0].of_seeds)


def test_a_second_seed_is_information() -> None:
    """Where seeds are everything, knowing so makes the interval narrower than averaging the seeds alone does."""
    ratios = []
    for number in range(20):
        scores, splits, images, seeds = scored(number, n_seeds=2, training=0.0, seeds=0.1)
        apart = score_estimate(scores, splits, images, 90, 150, seeds)
        order = np.lexsort((seeds, images, splits))
        averaged = scores[order].reshape(-1, 2).mean(1)
        together = score_estimate(averaged, splits[order][::2], images[order][::2], 90, 150)
        assert apart.mean == pytest.approx(together.mean)
        ratios.append((apart.high - apart.low) / (together.high - together.low))
    assert np.median(ratios) < 0.95


@pytest.mark.parametrize("case", [
    {"training": 0.0}, {"training": 0.05, "n_splits": 4}, {"folds": True, "discrete": True}, {"noise": 0.05},
    {"discrete": True, "n_splits": 4}, {"n_seeds": 2, "seeds": 0.1},
])  # fmt: skip
def test_score_estimate_claims_too_much_in_no_more_than_one_of_twenty(case: dict) -> None:
    trials = 200 // case.get("n_seeds", 1) ** 2
    found = 0
    for number in range(trials):
        scores, splits, images, seeds = scored(number, mean=0, **case)
        found += score_estimate(scores, splits, images, 90, 150, seeds).p < 0.05
    assert found <= 0.05 * trials + 2 * math.sqrt(0.05 * trials)


def test_nothing_but_ties() -> None:
    _, splits, images, seeds = scored(0, n_seeds=2)
    zeros = np.where(np.arange(len(splits)) % 2, 0.1 + 0.2 - 0.3, 0.0)
    for estimate in (
        score_estimate(0 * zeros, splits, images, 90, 150, seeds),
        score_estimate(zeros, splits, images, 90, 150, seeds),
    ):
        n = len(np.unique(images))
        assert (estimate.mean, estimate.p, estimate.is_tie) == (0, 1, True) and estimate.high == -estimate.low
        assert (1 - estimate.high) ** (n + 1) == pytest.approx(0.05)  # of n images none, of as many others a few
        belief = estimate.posterior(0.01)
        assert belief.p_worse == belief.p_better and estimate.posterior(estimate.high).p_equivalent == pytest.approx(
            0.95
        )
    for value in (1.0, -0.5):
        with pytest.raises(ValueError, match="all single scores are equal"):
            score_estimate(np.full(len(splits), value), splits, images, 90, 150, seeds)
    one_differs = np.ones(len(splits))
    one_differs[0] = 0.0
    estimate = score_estimate(one_differs, splits, images, 90, 150, seeds)
    assert 0 < estimate.p < 0.001 and estimate.low < estimate.mean < estimate.high


def test_equal_means_of_splits_are_no_certainty() -> None:
    """Each split counts 21 to 19: the sd over splits is 0, and p is not."""
    values = np.repeat([1.0, -1.0], [21, 19])
    rng = np.random.default_rng(0)
    scores = np.concatenate([rng.permutation(values) for _ in range(4)])
    estimate = score_estimate(scores, np.repeat(np.arange(4), 40), np.tile(np.arange(40), 4), 90, 150)
    assert estimate.p > 0.3 and estimate.high - estimate.low > 0.2


@pytest.mark.parametrize("images", ["own", "shared"])
def test_scores_that_vary_by_split_alone_have_an_answer(images: str) -> None:
    splits = np.repeat(np.arange(5), 20)
    index = np.arange(100) if images == "own" else np.tile(np.arange(20), 5)
    scores = np.repeat([0.1, 0.2, -0.1, 0.3, 0.0], 20)
    estimate = score_estimate(scores, splits, index, 90, 150)
    assert estimate.mean == pytest.approx(0.1) and 0.05 < estimate.p < 1 and estimate.low < 0 < estimate.high
    assert estimate.high - estimate.low > 2 * np.std([0.1, 0.2, -0.1, 0.3, 0.0])


def test_unbalanced_splits_count_alike() -> None:
    scores, splits, images, _ = scored(1)
    kept = (splits != 2) | (images % 3 == 0)  # one split scores a third of its images
    estimate = score_estimate(scores[kept], splits[kept], images[kept], 90, 150)
    means = [scores[kept & (splits == split)].mean() for split in range(5)]
    assert estimate.mean == pytest.approx(np.mean(means))
    whole = score_estimate(scores, splits, images, 90, 150)
    assert estimate.of_images > whole.of_images
    added = np.append(scores, 1.0), np.append(splits, 0), np.append(images, 9999)  # an image of one split alone
    assert score_estimate(*added, 90, 150).se == pytest.approx(whole.se, rel=0.1)


def test_score_estimate_refuses() -> None:
    scores, splits, images, seeds = scored(2, n_seeds=2)
    one = seeds == 0
    for few in range(4):
        kept = one & (splits < few)
        with pytest.raises(ValueError, match="an interval or a verdict takes 4"):
            score_estimate(scores[kept], splits[kept], images[kept], 90, 150)
    with pytest.raises(ValueError, match="told apart by `seeds`"):
        score_estimate(scores, splits, images, 90, 150)
    with pytest.raises(ValueError, match="must have scored the same images"):
        score_estimate(scores[1:], splits[1:], images[1:], 90, 150, seeds[1:])
    with pytest.raises(ValueError, match="equally long"):
        score_estimate(scores, splits[1:], images, 90, 150)
    with pytest.raises(ValueError, match="equally long"):
        score_estimate(scores[None], splits[None], images[None], 90, 150)
    with pytest.raises(ValueError, match="not finite"):
        score_estimate(np.where(images == 3, np.nan, scores), splits, images, 90, 150, seeds)
    for labels in ((np.where(splits == 1, np.nan, splits), images), (splits, np.where(images == 3, np.nan, images))):
        with pytest.raises(ValueError, match="is not a number"):
            score_estimate(scores[one], *(each[one] for each in labels), 90, 150)
    with pytest.raises(ValueError, match="at least two images"):
        score_estimate(np.arange(5.0), np.arange(5), np.zeros(5), 90, 150)
    for n_train, n_pool in ((0, 150), (-1, 150), (math.nan, 150), (151, 150), (90, math.inf), (90, math.nan)):
        with pytest.raises(ValueError, match="n_train must lie|must hold"):
            score_estimate(scores[one], splits[one], images[one], n_train, n_pool)


# Components of variance


def textbook_image_variance(values: np.ndarray) -> float:
    groups = [[value for value in column if not math.isnan(value)] for column in values.T]
    groups = [group for group in groups if group]
    n = sum(len(group) for group in groups)
    grand = sum(sum(group) for group in groups) / n
    between = within = 0.0
    for group in groups:
        mean = sum(group) / len(group)
        between += len(group) * (mean - grand) ** 2
        within += sum((value - mean) ** 2 for value in group)
    between /= len(groups) - 1
    within /= n - len(groups)
    n0 = (n - sum(len(group) ** 2 for group in groups) / n) / (len(groups) - 1)
    return max(0.0, (between - within) / n0)


@settings(deadline=None)
@given(st.integers(2, 6), st.integers(2, 30), st.floats(0, 0.9), st.floats(0, 3), st.integers(0, 2**31))
def test_image_variance_is_the_textbooks(splits: int, n: int, missing: float, spread: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = 5 + spread * rng.standard_normal(n) + rng.standard_normal((splits, n))
    values[rng.random((splits, n)) < missing] = np.nan
    counts = (~np.isnan(values)).sum(0)
    if (counts > 0).sum() < 2 or counts.max() < 2:
        with pytest.raises(ValueError, match="takes two images"):
            image_variance(values)
    else:
        assert image_variance(values) == pytest.approx(textbook_image_variance(values), rel=1e-9, abs=1e-9)


def test_image_variance_finds_a_known_one_and_is_fast() -> None:
    rng = np.random.default_rng(1)
    values = rng.normal(0, 0.3, 70_000) + rng.normal(0, 0.5, (10, 70_000))
    values[rng.random(values.shape) < 0.51] = np.nan  # task 3: each split evaluates about half
    start = time.perf_counter()
    estimate = image_variance(values)
    assert time.perf_counter() - start < 1
    assert estimate == pytest.approx(0.09, rel=0.03)
    assert image_variance(rng.integers(0, 2, (2, 5)) * 0) == 0


def test_image_variance_refuses() -> None:
    folds = np.where(np.arange(10) % 5 == np.arange(5)[:, None], 1.0, np.nan)  # every image once
    for values in (folds, np.zeros(3), np.full((2, 2), np.inf), np.zeros((3, 1)), np.full((2, 3), np.nan)):
        with pytest.raises(ValueError, match="images"):
            image_variance(values)


def test_standard_errors_by_hand() -> None:
    differences = [0.01, 0.03, 0.05]  # s2 = 0.0004
    assert component_standard_error(differences, 0.2, 2, 100) ** 2 == pytest.approx(0.0004 / 3 + 0.002 + 0.000008)
    assert fixed_test_standard_error(differences, 0.2, 30, 20, 50) ** 2 == pytest.approx(
        0.0004 * (1 / 3 + 2 / 3) + 0.004
    )
    assert fixed_test_standard_error(differences, 0, 30, 20, 50) == pytest.approx(
        corrected_resampled_ttest(differences, 30, 20).se, rel=1e-12
    )


def test_satterthwaites_degrees_of_freedom() -> None:
    assert satterthwaite_df(0.1, 0, 140, 5) == pytest.approx(4)
    assert satterthwaite_df(0, 0, 140, 5) == pytest.approx(4)
    assert satterthwaite_df(0.1, 1.4, 140, 5) == pytest.approx(139)
    assert satterthwaite_df(0.1, 0.7, 140, 5) == pytest.approx(0.01**2 / (0.005**2 / 4 + 0.005**2 / 139))
    with pytest.raises(ValueError, match="image term"):
        satterthwaite_df(0.1, 1.5, 140, 5)


# Macro-F1


@settings(deadline=None)
@given(st.integers(2, 11), st.integers(1, 200), st.integers(0, 2**31))
def test_macro_f1_values_average_to_macro_f1(classes: int, n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    present = rng.choice(classes, rng.integers(1, classes + 1), replace=False)  # some classes never occur
    true, predicted = rng.choice(present, n), rng.choice(present, n)
    values = macro_f1_values(true, predicted)
    assert values.shape == (n,)
    assert np.mean(values) == pytest.approx(f1_score(true, predicted, average="macro"), abs=1e-12)


@pytest.mark.parametrize("classes", [2, 10])
def test_macro_f1_values_are_jackknife_values(classes: int) -> None:
    rng = np.random.default_rng(classes)
    n = 400
    true = rng.choice(classes, n, p=np.arange(1, classes + 1) / np.arange(1, classes + 1).sum())
    predicted = np.where(rng.random(n) < 0.7, true, rng.integers(0, classes, n))
    macro = f1_score(true, predicted, average="macro")
    without = [f1_score(np.delete(true, i), np.delete(predicted, i), average="macro") for i in range(n)]
    pseudo = n * macro - (n - 1) * np.array(without)
    values = macro_f1_values(true, predicted)
    assert np.corrcoef(values, pseudo)[0, 1] > 0.999
    assert np.var(values) == pytest.approx(np.var(pseudo), rel=0.1)  # the jackknife's is larger, by order 1/n


def test_macro_f1_values_have_its_sampling_variance() -> None:
    rng = np.random.default_rng(3)
    draws, n = 10_000, 500
    true = rng.choice(3, (draws, n), p=(0.6, 0.3, 0.1))
    predicted = np.where(rng.random((draws, n)) < 0.7, true, rng.integers(0, 3, (draws, n)))
    values = np.array([macro_f1_values(*pair) for pair in zip(true, predicted, strict=True)])
    assert np.mean(values.var(1)) / n == pytest.approx(np.var(values.mean(1)), rel=0.07)  # 1.4 % Monte Carlo


def test_macro_f1_values_refuse() -> None:
    for pair in (([], []), ([1, 2], [1]), ([[1]], [[1]])):
        with pytest.raises(ValueError, match="equally long"):
            macro_f1_values(*pair)


# Many tests


@settings(deadline=None, max_examples=25)
@given(P_VALUES, st.integers(0, 2**31))
def test_holm_is_statsmodels(p_values: np.ndarray, seed: int) -> None:
    adjusted = holm(p_values)
    assert adjusted.dtype == np.float64 and adjusted.shape == p_values.shape
    if len(p_values):
        with mock.patch("gc.collect", new=int):  # which statsmodels calls, and takes a second in a large process
            assert adjusted == pytest.approx(multipletests(p_values, method="holm")[1], abs=1e-12)
    assert np.all(adjusted >= p_values) and np.all(adjusted <= 1)
    assert np.all(np.diff(adjusted[np.argsort(p_values)]) >= 0)
    order = np.random.default_rng(seed).permutation(len(p_values))
    assert np.array_equal(holm(p_values[order]), adjusted[order])


@pytest.mark.parametrize("p_values", [[0.1, math.nan], [-0.1], [1.1], [[0.1]]])
def test_holm_refuses(p_values: list[float]) -> None:
    with pytest.raises(ValueError, match="from 0 to 1"):
        holm(p_values)


@settings(deadline=None)
@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 40), st.integers(0, 40))
def test_mcnemar_is_statsmodels(both: int, only_a: int, only_b: int, neither: int) -> None:
    counts = (both, only_a, only_b, neither)
    a, b = np.repeat([True, True, False, False], counts), np.repeat([True, False, True, False], counts)
    result = mcnemar(a, b)
    assert (result.only_a, result.only_b) == (only_a, only_b)
    if only_a + only_b:
        expected = statsmodels_mcnemar([[both, only_a], [only_b, neither]], exact=True).pvalue
        assert result.p == pytest.approx(expected, rel=1e-9)
    else:
        assert result.p == 1
    swapped = mcnemar(b, a)
    assert (swapped.only_a, swapped.only_b, swapped.p) == (only_b, only_a, pytest.approx(result.p, rel=1e-12))


def test_mcnemar_refuses() -> None:
    right = np.array([True, False])
    for pair in ((right, right[:1]), (right.astype(int), right), (right[None], right[None])):
        with pytest.raises(ValueError, match="boolean"):
            mcnemar(*pair)


# Planning


@settings(deadline=None, max_examples=60)
@given(st.floats(0.2, 3), st.floats(0, 2), st.floats(0, 0.2), st.sampled_from([0.5, 0.8, 0.95]))
def test_splits_needed_is_brute_forces(difference: float, split: float, constant: float, power: float) -> None:
    j = np.arange(2, 2000)
    quantiles = stats.t.ppf(0.975, j - 1) + stats.t.ppf(power, j - 1)
    enough = difference >= quantiles * np.sqrt(split / j + constant)
    needed = splits_needed(-difference, split, constant, power=power)
    if enough.any():
        assert needed == j[enough.argmax()]
    else:
        assert needed is None or needed >= 2000


def test_splits_needed_at_the_ends() -> None:
    assert splits_needed(0, 1, 1) is None
    assert splits_needed(0, 0, 0) is None
    assert splits_needed(0.1, 0, 0) == 2
    assert splits_needed(2.8, 1, 1) is None  # the limit is (1.960 + 0.842) sd
    assert splits_needed(2.81, 1, 1) > 100
    assert splits_needed(1e-6, 1, 0) is None  # 8e12 splits
    assert splits_needed(0.01, 1, 0) == pytest.approx(7.849 / 1e-4, rel=0.01)
    assert splits_needed(0.00281, 1, 0) < statistics.MAX_SPLITS
    for arguments in ((math.nan, 1, 1), (1, -1, 1), (1, 1, math.inf)):
        with pytest.raises(ValueError, match="finite|variance"):
            splits_needed(*arguments)
    with pytest.raises(ValueError, match="power"):
        splits_needed(1, 1, 1, power=0.3)


# Error rate: the published one, in small


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda protocol: protocol.title)
def test_size_and_power_where_training_images_decide_little(protocol) -> None:
    one, two, earlier = tallies(protocol, TYPICAL, 60, np.random.default_rng(0))
    assert max(one.found, two.found) <= 3 + 2 * math.sqrt(3)
    assert two.width < min(one.width, earlier.width) and two.powerful > earlier.powerful
    if not protocol.folds:  # for folds the earlier test was as narrow
        assert one.width < earlier.width and one.powerful > earlier.powerful


def test_families_find_no_more_than_they_may() -> None:
    found = false_families(PROTOCOLS[0].with_splits(4), TYPICAL, 40, np.random.default_rng(0))
    few = false_families(PROTOCOLS[0].with_splits(2), TYPICAL, 20, np.random.default_rng(0))
    assert few[1, -1] > 0.05 and statistics.MIN_SPLITS == 4  # the earlier test, which two splits deceive
    assert found.shape == (2, 3) and (found[0] <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 40)).all()
    assert (np.diff(found, axis=1) >= -0.05).all()


def test_simulated_differences_have_the_shares_that_they_claim() -> None:
    """Half the variance by split, a quarter each of noise and images: the analysis of variance finds them."""
    protocol, rng = PROTOCOLS[0], np.random.default_rng(1)
    parts = []
    for _ in range(60):
        correct, part = draw(protocol, (0.0, 0.5, 0.25, 0.25), 2, 1, rng)
        split, place = np.nonzero(part != TRAIN)
        found = statistics.variance_parts((correct[0] - correct[1])[0][split, place], statistics.arrange(split, place))
        parts.append((np.var(found.means, ddof=1), found.noise / found.n, found.of_images / found.n))
    variance, noise, images = np.mean(parts, axis=0)
    assert (noise + images) / variance == pytest.approx(0.5, abs=0.12) and noise / variance > images / variance > 0.1
