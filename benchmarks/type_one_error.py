"""How often the tests of analysis/statistics.py find a difference that is not there, and how often one that is.

What      two models of equal expected score, compared under each protocol again and again, each time with new images;
          at a nominal 5 %, 5 % of the comparisons should find a difference. Every row is another division of the
          variance of one split's difference: how much is due to the training images, to the seed, and to the images
          that score. The tables in docs/statistics.md are the output
Sizes     task 1 as it is; task 2 and 3 with their proportions on 590 + 148 and 1,000 images
Time      about 3 minutes on 1 CPU core

    python benchmarks/type_one_error.py
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from analysis.statistics import (
    TTest,
    component_standard_error,
    corrected_resampled_ttest,
    fixed_test_standard_error,
    image_variance,
    satterthwaite_df,
    ttest,
)

SIZE = 0.05
TRUE_DIFFERENCE = 2.0  # for the power, in standard deviations of one split's difference
NOISE = 0.5  # of the seed's variance, the part that changes single images and not the network as a whole
SHARES = (  # of the variance of one split's difference: training images, seed, scored images
    (0, 1, 0),
    (0.1, 0.8, 0.1),
    (0.2, 0.6, 0.2),
    (1 / 3, 1 / 3, 1 / 3),
    (0.6, 0.2, 0.2),
    (0.2, 0.2, 0.6),
    (1, 0, 0),
    (0, 0, 1),
)
TRAIN, VAL, TEST = range(3)  # parts of a split


@dataclass(frozen=True)
class Comparison:
    """Everything that a test may look at: `differences` (J,) and, NaN where not evaluated, `images` (J, N)."""

    protocol: "Protocol"
    differences: np.ndarray
    images: np.ndarray


Test = Callable[[Comparison], TTest]


@dataclass(frozen=True)
class Protocol:
    """A way to split, the part that scores, and the tests: ours first, then the alternatives."""

    title: str
    n_splits: int
    n_train: int
    n_val: int
    n_test: int
    scored: int
    tests: Mapping[str, Test]
    folds: bool = False
    fixed_test: bool = False

    def split(self, rng: np.random.Generator) -> np.ndarray:
        """Draw the part of each image in each split, shape (J, N); a fixed test part is the last images."""
        sizes = (self.n_train, self.n_val, 0 if self.fixed_test else self.n_test)
        if self.folds:
            fold = rng.permutation(sum(sizes)) % self.n_splits
            parts = np.where(fold == np.arange(self.n_splits)[:, None], VAL, TRAIN)
        else:
            parts = rng.permuted(np.tile(np.repeat((TRAIN, VAL, TEST), sizes), (self.n_splits, 1)), axis=1)
        fixed = np.full((self.n_splits, self.n_test if self.fixed_test else 0), TEST)
        return np.concatenate([parts, fixed], axis=1)

    def compare(self, rng: np.random.Generator) -> Iterator[Comparison]:
        """Draw images, splits and seeds once, and give the comparison for each row of `SHARES`; true difference 0.

        The difference on a split is the sum of four independent parts: the mean over the training images of an effect
        of each, the split's seed, the mean over the scored images of an effect of each, and of a noise of each that
        every split draws anew (counted with the seed).
        """
        parts = self.split(rng)
        scored = parts == self.scored
        n_scored = math.sqrt(scored[0].sum())  # each of the four has variance 1 before it is weighted
        training = (parts == TRAIN) @ rng.standard_normal(parts.shape[1]) / math.sqrt(self.n_train)  # (J,)
        seed = rng.standard_normal(self.n_splits)
        image = n_scored * rng.standard_normal(parts.shape[1])  # (N,)
        noise = n_scored * rng.standard_normal(parts.shape)  # (J, N)
        for of_training, of_seed, of_images in SHARES:
            network = math.sqrt(of_training) * training + math.sqrt(of_seed * (1 - NOISE)) * seed
            values = network[:, None] + math.sqrt(of_images) * image + math.sqrt(of_seed * NOISE) * noise
            values[~scored] = np.nan
            yield Comparison(self, np.nanmean(values, axis=1), values)


def plain(comparison: Comparison) -> TTest:
    """Paired t test, as if splits were independent."""
    d = comparison.differences
    return ttest(float(np.mean(d)), float(np.std(d, ddof=1)) / math.sqrt(len(d)), len(d) - 1)


def corrected(comparison: Comparison) -> TTest:
    """Corrected resampled t with the parts' sizes; of a fixed test part, with those that the pool is divided into."""
    protocol = comparison.protocol
    n_scored = protocol.n_test if protocol.scored == TEST and not protocol.fixed_test else protocol.n_val
    return corrected_resampled_ttest(comparison.differences, protocol.n_train, n_scored)


def training_overlap(comparison: Comparison) -> TTest:
    """The same with the correlation of two splits set to the share of training images that they have in common."""
    protocol = comparison.protocol
    others = protocol.n_splits - 1
    overlap = (others - 1) / others if protocol.folds else protocol.n_train / (protocol.n_train + protocol.n_val)
    return corrected_resampled_ttest(comparison.differences, 1 - overlap, overlap)


def components(comparison: Comparison) -> TTest:
    """Components of variance: for one fixed test part, or for large parts that overlap."""
    protocol, d = comparison.protocol, comparison.differences
    images = image_variance(comparison.images)
    if protocol.fixed_test:
        se = fixed_test_standard_error(d, images, protocol.n_train, protocol.n_val, protocol.n_test)
    else:
        se = component_standard_error(d, images, protocol.n_train, comparison.images.shape[1])
    return ttest(float(np.mean(d)), se, len(d) - 1)


def components_satterthwaite(comparison: Comparison) -> TTest:
    """The same standard error, with degrees of freedom that say how well each of its terms is known."""
    protocol, test = comparison.protocol, components(comparison)
    n_images = protocol.n_test if protocol.fixed_test else comparison.images.shape[1]
    df = satterthwaite_df(test.se, image_variance(comparison.images), n_images, protocol.n_splits)
    return ttest(test.mean, test.se, df)


OWN_PART = {"corrected t": corrected, "plain t": plain, "training overlap": training_overlap}
COMPONENTS = {"components": components_satterthwaite, "with df J - 1": components, "plain t": plain}
ONE_TEST_PART = {**COMPONENTS, "no image term": corrected}
LARGE_PARTS = {**COMPONENTS, "corrected t": corrected}
PROTOCOLS = (
    Protocol("task 1, validation: holdout 3:2, J = 5", 5, 334, 223, 0, VAL, OWN_PART),
    Protocol("task 1, test: holdout 3:2, J = 5, one test part", 5, 334, 223, 140, TEST, ONE_TEST_PART, fixed_test=True),
    Protocol("task 2, validation: 5 folds", 5, 472, 118, 0, VAL, OWN_PART, folds=True),
    Protocol(
        "task 2, test: 5 folds, one test part", 5, 472, 118, 148, TEST, ONE_TEST_PART, folds=True, fixed_test=True
    ),
    Protocol("task 3, test: holdout 2:49:49, J = 10", 10, 20, 490, 490, TEST, LARGE_PARTS),
)


def rejections(protocol: Protocol, repetitions: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Give the share of comparisons in which each test finds a difference, shape (shares, tests): size and power.

    A true difference shifts only the mean, so the power comes from the same draws.
    """
    found = np.zeros((2, len(SHARES), len(protocol.tests)))
    for _ in range(repetitions):
        for row, comparison in enumerate(protocol.compare(rng)):
            for column, test in enumerate(protocol.tests.values()):
                result = test(comparison)
                found[0, row, column] += result.p < SIZE
                low, high = result.low + TRUE_DIFFERENCE, result.high + TRUE_DIFFERENCE
                found[1, row, column] += low > 0 or high < 0
    return found[0] / repetitions, found[1] / repetitions


def main() -> None:
    """Print one Markdown table a protocol."""
    parser = argparse.ArgumentParser(description="Simulated size and power of the tests, as Markdown tables.")
    parser.add_argument("--repetitions", type=int, default=6000, help="comparisons a row (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the simulation (default: %(default)s)")
    options = parser.parse_args()
    start = time.perf_counter()
    for number, protocol in enumerate(PROTOCOLS):
        names = list(protocol.tests)
        columns = [f"{what}: {name}" for what in ("size", "power") for name in names]
        print(f"\n**{protocol.title}**\n")
        print(f"| training / seed / images | {' | '.join(columns)} |")
        print("|---|" + "--:|" * len(columns))
        size, power = rejections(protocol, options.repetitions, np.random.default_rng((options.seed, number)))
        for shares, sizes, powers in zip(SHARES, size, power, strict=True):
            cells = [f"{value:.3f}" for value in sizes] + [f"{value:.2f}" for value in powers]
            print(f"| {' / '.join(f'{share:.2g}' for share in shares)} | {' | '.join(cells)} |", flush=True)
    error, largest = (math.sqrt(p * (1 - p) / options.repetitions) for p in (SIZE, 0.5))
    print(f"\n{options.repetitions} comparisons a row; Monte Carlo standard error {error:.4f} for a share of {SIZE},")
    print(f"at most {largest:.4f} for any. {time.perf_counter() - start:.0f} s.")


if __name__ == "__main__":
    main()
