"""From how many trials fANOVA names the setting that matters: `analysis.study.importances` on simulated scores.

What      the score of a configuration falls with the squared distance of the learning rate from its best value, and by
          a tenth of that with the weight decay; splits shift it, and noise has a sd of one point. The table has the
          share of simulations in which the weight decay is said to matter more
Time      about 10 minutes on 1 CPU core; needs requirements-tuning.txt

    python benchmarks/importance.py

docs/statistics.md has its result.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import pandas as pd

from analysis import study

SPACE = "lr=0.0001..0.01 weight_decay=0.001..0.1"
STEEP, FLAT, NOISE = 0.2, 0.02, 0.01


def trials(configurations: int, splits: int, rng: np.random.Generator) -> pd.DataFrame:
    """Draw the trials of a model, in the columns of `analysis.tuning.load_trials` that are used."""
    points, best = rng.random((configurations, 2)), rng.uniform(0.3, 0.7, 2)
    rows = [
        {
            "split": split, "trial": number, "lr": 10 ** (-4 + 2 * lr), "weight_decay": 10 ** (-3 + 2 * decay),
            "score": 0.8 + shift - STEEP * (lr - best[0]) ** 2 - FLAT * (decay - best[1]) ** 2
            + NOISE * rng.standard_normal(),
        }
        for split, shift in enumerate(0.01 * rng.standard_normal(splits))
        for number, (lr, decay) in enumerate(points)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def wrong(configurations: int, splits: int, simulations: int, rng: np.random.Generator) -> float:
    """Return the share of simulations in which the weight decay comes first."""
    found = [study.importances(trials(configurations, splits, rng), SPACE) for _ in range(simulations)]
    return sum(next(iter(shares)) != "lr" for shares in found) / simulations


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="When fANOVA names the wrong setting; see the module's docstring.")
    parser.add_argument("--simulations", type=int, default=40)
    simulations = parser.parse_args().simulations
    study.FEWEST_CONFIGURATIONS = study.FEWEST_SPLITS = 1  # what it refuses is measured, too
    rng = np.random.default_rng(0)
    print("| configurations | 1 split | 5 splits | 10 splits |\n| --: | --: | --: | --: |")
    for configurations in (8, 12, 16, 24, 32):
        shares = [wrong(configurations, splits, simulations, rng) for splits in (1, 5, 10)]
        print(f"| {configurations} | {' | '.join(f'{share:.2f}' for share in shares)} |", flush=True)


if __name__ == "__main__":
    main()
