"""How often the interval of macro-F1 covers the true value, with a rare class among few images.

What      images of three classes, of which one is rare, predicted rightly with a given probability; the interval is
          mean ± 1.96 standard errors of the values whose mean is macro-F1 (`tracking.scores.macro_f1_values`), the true
          value that of 5 million images. The interval of accuracy stands beside it
Time      a minute on 1 CPU core

    python benchmarks/interval_coverage.py

docs/statistics.md has its result.
"""

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from tracking.scores import correct, macro_f1_values

REPLICATES = 4000
CASES = [(rare, n, right) for rare in (0.03, 0.1, 1 / 3) for n in (140, 1000) for right in (0.6, 0.8, 0.95)]
SCORES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {"macro-F1": macro_f1_values, "accuracy": correct}


def draw(rare: float, right: float, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw the true and the predicted classes of n images; predictions that are not right are of any class."""
    true = rng.choice(3, n, p=[rare, (1 - rare) / 2, (1 - rare) / 2])
    return true, np.where(rng.random(n) < right, true, rng.integers(3, size=n))


def coverage(rare: float, n: int, right: float, rng: np.random.Generator) -> dict[str, float]:
    """Return the share of intervals that hold the true value, by score."""
    everything = draw(rare, right, 5_000_000, rng)
    truth = {name: values(*everything).mean() for name, values in SCORES.items()}
    held = dict.fromkeys(SCORES, 0)
    for _ in range(REPLICATES):
        images = draw(rare, right, n, rng)
        for name, function in SCORES.items():
            values = function(*images)
            held[name] += bool(abs(values.mean() - truth[name]) <= 1.96 * values.std(ddof=1) / np.sqrt(n))
    return {name: count / REPLICATES for name, count in held.items()}


def main() -> None:
    """Print the table."""
    rng = np.random.default_rng(0)
    print(f"| rare class | images | rightly predicted | {' | '.join(SCORES)} |\n|{' --: |' * (3 + len(SCORES))}")
    for rare, n, right in CASES:
        shares = " | ".join(f"{share:.2f}" for share in coverage(rare, n, right, rng).values())
        print(f"| {rare:.2f} | {n} | {right:.2f} | {shares} |")


if __name__ == "__main__":
    main()
