"""How much a comparison depends on the learning rate that all of its models share.

What      The validation accuracy at the best epoch, mean ± sd over splits, of each network that has all its splits, by
          learning rate: of the newest complete comparison group, and of those that differ from it in the learning rate
          alone. The test part is left alone: it must not choose a setting
Time      seconds, when the runs are there

    for lr in 3e-4 1e-3 3e-3; do python experiments/task3.py -m lenet5 -m resnetcnn --lr $lr; done
    python benchmarks/sensitivity.py task3

results/README.md has its output.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pandas as pd

import analysis
from analysis.formats import markdown_table
from analysis.groups import ComparisonError, alike_but_for, expected_splits
from tracking import StoreError
from tracking.keys import BASELINES

METRIC = "best_val/accuracy"


def table(runs: pd.DataFrame) -> pd.DataFrame:
    """A row a model, a column a learning rate: mean ± sd in %."""
    reference = analysis.choose_group(runs)
    done = pd.concat([analysis.finished(group) for group in alike_but_for("lr", reference, runs)])
    done = done[~done["model"].isin(BASELINES)]
    scores = (100 * done[METRIC]).groupby([done["model"], done["lr"]]).agg(["mean", "std", "count"])
    scores = scores[scores["count"] == expected_splits(reference)]
    cells = scores.apply(lambda row: f"{row['mean']:.1f} ± {row['std']:.1f}", axis=1)
    return cells.unstack("lr").fillna("")


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description="Scores by learning rate; see the module's docstring.")
    parser.add_argument("task")
    parser.add_argument("--tracking-uri")
    options = parser.parse_args()
    try:
        cells = table(analysis.load_runs([options.task], options.tracking_uri))
    except (StoreError, ComparisonError) as error:
        raise SystemExit(f"Error: {error}") from None
    print(markdown_table(cells.rename(columns="{:g}".format).reset_index()))


if __name__ == "__main__":
    main()
