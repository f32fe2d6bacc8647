"""How often the estimate of analysis/statistics finds a difference that is not there, and how often one that is.

What      models of equal expected accuracy on images drawn anew for each comparison; of 100 comparisons at a level of
          5 %, 5 should find a difference. An image is classified correctly if a sum of normal effects is positive: its
          difficulty, an effect of the image on this model, of the training images, of the seed, and noise. Rows differ
          in what the variance of one split's difference is made of
Beside    the tests used before: corrected resampled t and components of variance, on the test part alone
Families  the probability of any false finding, by Holm's method, among all pairs of 2, 3 and 5 models, by the number of
          splits; here the least number of splits is not enforced
Sizes     task 1 as it is; tasks 2 and 3 with their proportions on 590 + 148 and 1,000 images
Time      about 15 minutes on 1 CPU core

    python benchmarks/type_one_error.py

docs/statistics.md has its tables.
"""

import argparse
import dataclasses
import itertools
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from analysis.statistics import (
    ScoreEstimate,
    TTest,
    checks,
    component_standard_error,
    fixed_test_standard_error,
    holm,
    image_variance,
    satterthwaite_df,
    score_estimate,
    ttest,
)

SIZE = 0.05
DIFFERENCE = 0.05  # true difference in accuracy, for the power
SHARES = (  # of the variance of one split's difference: training images, seed, noise of single images, scored images
    (0, 0.1, 0.85, 0.05),
    (0.05, 0.1, 0.6, 0.25),
    (0.02, 0.02, 0.4, 0.56),
    (0, 0.4, 0.5, 0.1),
    (0.1, 0.1, 0.4, 0.4),
    (0.3, 0.15, 0.35, 0.2),
    (0.6, 0.1, 0.2, 0.1),
    (0, 0.9, 0.08, 0.02),
)
TYPICAL, EXTREME = SHARES[1], SHARES[6]
TRAIN, VAL, TEST = range(3)  # parts of a split


@dataclass(frozen=True)
class Protocol:
    """A way to split images; a fixed test part is the last images."""

    title: str
    n_splits: int
    n_train: int
    n_val: int
    n_test: int
    folds: bool = False
    fixed_test: bool = False

    @property
    def n_pool(self) -> int:
        """Images that training parts are drawn from."""
        return self.n_train + self.n_val + (0 if self.fixed_test else self.n_test)

    def split(self, rng: np.random.Generator) -> np.ndarray:
        """Draw the part of each image in each split, shape (J, N)."""
        sizes = (self.n_train, self.n_val, 0 if self.fixed_test else self.n_test)
        if self.folds:
            fold = rng.permutation(sum(sizes)) % self.n_splits
            parts = np.where(fold == np.arange(self.n_splits)[:, None], VAL, TRAIN)
        else:
            parts = rng.permuted(np.tile(np.repeat((TRAIN, VAL, TEST), sizes), (self.n_splits, 1)), axis=1)
        fixed = np.full((self.n_splits, self.n_test if self.fixed_test else 0), TEST)
        return np.concatenate([parts, fixed], axis=1)

    def with_splits(self, n_splits: int) -> "Protocol":
        """The same with another number of splits; more folds have larger training parts."""
        if not self.folds:
            return dataclasses.replace(self, n_splits=n_splits)
        n_val = self.n_pool // n_splits
        return dataclasses.replace(self, n_splits=n_splits, n_train=n_val * (n_splits - 1), n_val=n_val)


PROTOCOLS = (
    Protocol("task 1: holdout 3:2, J = 5, one test part", 5, 334, 223, 140, fixed_test=True),
    Protocol("task 2: 5 folds, one test part", 5, 472, 118, 148, folds=True, fixed_test=True),
    Protocol("task 3: holdout 2:49:49, J = 10", 10, 20, 490, 490),
)


def draw(
    protocol: Protocol, shares: Sequence[float], n_models: int, n_seeds: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draw which images the models classify correctly.

    Returns
    -------
    correct : numpy.ndarray of float, shape (models, seeds, J, N)
    parts : numpy.ndarray of int, shape (J, N)
    """
    parts = protocol.split(rng)
    n_images = parts.shape[1]
    of_training, of_seed, of_noise, of_images = shares
    single = of_noise + of_images  # of single images; each model's latent variance is 1 of difficulty and 1 of these
    scored = float(np.mean((parts != TRAIN).sum(1)))
    # a correlation of 1/2 between two models: they differ on a third of the images, whose slope is 1/sqrt(2 pi 2)
    per_split = (1 / 3) / scored / single / (2 / (4 * math.pi))  # latent variance that adds the whole to a difference
    effect = rng.standard_normal((n_models, n_images)) / math.sqrt(protocol.n_train)
    training = math.sqrt(of_training * per_split) * np.einsum("mi,ji->mj", effect, parts == TRAIN)
    seed = math.sqrt(of_seed * per_split) * rng.standard_normal((n_models, n_seeds, protocol.n_splits))
    image = math.sqrt(of_images / single) * rng.standard_normal((n_models, n_images))
    noise = math.sqrt(of_noise / single) * rng.standard_normal((n_models, n_seeds, protocol.n_splits, n_images))
    latent = rng.standard_normal(n_images) + image[:, None, None] + noise + (training[:, None] + seed)[..., None]
    return (latent > 0).astype(float), parts


def estimate(differences: np.ndarray, parts: np.ndarray, protocol: Protocol) -> ScoreEstimate:
    """Estimate from all scored images; `differences` have the shape (seeds, J, N)."""
    split, image = np.nonzero(parts != TRAIN)
    n_seeds = len(differences)
    seeds = np.repeat(np.arange(n_seeds), len(split)) if n_seeds > 1 else None
    values = np.concatenate([of_seed[split, image] for of_seed in differences])
    places = np.tile(split, n_seeds), np.tile(image, n_seeds)
    return score_estimate(values, *places, protocol.n_train, protocol.n_pool, seeds)


def before(differences: np.ndarray, parts: np.ndarray, protocol: Protocol) -> TTest:
    """The earlier test, on the test part alone; `differences` have the shape (J, N)."""
    values = np.where(parts == TEST, differences, np.nan)
    n_images = protocol.n_test if protocol.fixed_test else parts.shape[1]
    return earlier_test(values, protocol.fixed_test, protocol.n_train, protocol.n_val, n_images)


def earlier_test(values: np.ndarray, fixed_test: bool, n_train: int, n_val: int, n_images: int) -> TTest:
    """Test differences of images of the test parts, shape (J, N), NaN where an image is in another part.

    `n_images` are those of a fixed test part, or else all that the parts are drawn from.
    """
    means, images = np.nanmean(values, axis=1), image_variance(values)
    if fixed_test:
        se = fixed_test_standard_error(means, images, n_train, n_val, n_images)
    else:
        se = component_standard_error(means, images, n_train, n_images)
    mean, df = float(np.mean(means)), satterthwaite_df(se, images, n_images, len(means))
    try:
        return ttest(mean, se, df)
    except ValueError:  # splits tie: no test answers today, the earlier one was certain
        return TTest(mean, 0.0, mean, mean, math.copysign(math.inf, mean), df, 0.0)


@dataclass
class Tally:
    """Size, half-width and power of a test, over comparisons whose true difference is 0."""

    found: int = 0
    width: float = 0.0
    powerful: int = 0
    n: int = 0

    def add(self, result: ScoreEstimate | TTest) -> None:
        """Count a result. A true difference shifts only the mean, so the power comes from the same comparison."""
        self.found += result.p < SIZE
        self.width += (result.high - result.low) / 2
        self.powerful += result.low + DIFFERENCE > 0 or result.high + DIFFERENCE < 0
        self.n += 1

    @property
    def size(self) -> float:
        """Share of comparisons with a false finding."""
        return self.found / self.n

    def cells(self) -> list[str]:
        """Size, half-width in points, and power."""
        return [f"{self.size:.3f}", f"{100 * self.width / self.n:.1f}", f"{self.powerful / self.n:.2f}"]


def tallies(protocol: Protocol, shares: Sequence[float], repetitions: int, rng: np.random.Generator) -> list[Tally]:
    """Compare two models again and again: the estimate with one seed a split and with two, and the earlier test."""
    one, two, earlier = Tally(), Tally(), Tally()
    for _ in range(repetitions):
        correct, parts = draw(protocol, shares, 2, 2, rng)
        differences = correct[0] - correct[1]
        one.add(estimate(differences[:1], parts, protocol))
        two.add(estimate(differences, parts, protocol))
        earlier.add(before(differences[0], parts, protocol))
    return [one, two, earlier]


def false_families(
    protocol: Protocol, shares: Sequence[float], repetitions: int, rng: np.random.Generator
) -> np.ndarray:
    """Give the share of families with any false finding, shape (2, 3): estimate and earlier test; 1, 3, 10 pairs."""
    sizes = (2, 3, 5)
    found = np.zeros((2, len(sizes)))
    with patch.object(checks, "MIN_SPLITS", 2):  # what is shown here is why so few are refused
        for _ in range(repetitions):
            correct, parts = draw(protocol, shares, max(sizes), 1, rng)
            tested = {}
            for a, b in itertools.combinations(range(max(sizes)), 2):
                differences = correct[a] - correct[b]
                p = estimate(differences, parts, protocol).p, before(differences[0], parts, protocol).p
                tested[a, b] = p
            for column, models in enumerate(sizes):
                family = np.array([p for (_, b), p in tested.items() if b < models])
                found[:, column] += [bool((holm(p) < SIZE).any()) for p in family.T]
    return found / repetitions


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose first column is text."""
    lines = [header, ["---", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Print the Markdown tables."""
    parser = argparse.ArgumentParser(description="Simulated size and power, as Markdown tables.")
    parser.add_argument("--repetitions", type=int, default=2000, help="comparisons a row (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the simulation (default: %(default)s)")
    options = parser.parse_args()
    start = time.perf_counter()
    names = ("one seed", "two seeds", "before")
    header = [
        "training / seed / noise / images",
        *(f"{name}: {what}" for name in names for what in ("size", "±", "power")),
    ]
    for number, protocol in enumerate(PROTOCOLS):
        print(f"\n**{protocol.title}**\n")
        rows = []
        for row, shares in enumerate(SHARES):
            found = tallies(protocol, shares, options.repetitions, np.random.default_rng((options.seed, number, row)))
            rows.append(
                [" / ".join(f"{share:.2g}" for share in shares), *(cell for each in found for cell in each.cells())]
            )
        print(table(header, rows), flush=True)
    print("\n**Any false finding**\n")
    rows = []
    for number, protocol in enumerate(PROTOCOLS):
        for n_splits, shares in itertools.product((2, 3, 4, 5, 10), (TYPICAL, EXTREME)):
            rng = np.random.default_rng((options.seed, 10 + number, n_splits))
            found = false_families(protocol.with_splits(n_splits), shares, options.repetitions // 4, rng)
            cells = [f"{share:.3f}" for share in found.ravel()]
            rows.append([f"{protocol.title.partition(':')[0]}, {shares[0]:.2g}", str(n_splits), *cells])
            print(rows[-1], file=sys.stderr, flush=True)
    sizes = ("1", "3", "10")
    header = ["task, share of training", "J", *(f"{name}: {size}" for name in ("estimate", "before") for size in sizes)]
    print(table(header, rows))
    errors = [math.sqrt(SIZE * (1 - SIZE) / n) for n in (options.repetitions, options.repetitions // 4)]
    print(
        f"\n{options.repetitions} comparisons a row and {options.repetitions // 4} families; Monte Carlo standard error"
    )
    print(f"of a share of 0.05 {errors[0]:.4f} and {errors[1]:.4f}. {time.perf_counter() - start:.0f} s.")


if __name__ == "__main__":
    main()
