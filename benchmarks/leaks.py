"""Effect of pictures that are in both the published training and test folder on the test score of a task.

What      From the stored predictions: the test accuracy of each finished model of the newest complete comparison group,
          on all test images, on those of which the training folder holds the same picture (an equal perceptual hash),
          on those that are there a little changed, and on the others; and the same for the group that differs from it
          in `--leak-free` alone, which trained on none of them
Time      seconds

    python benchmarks/leaks.py task2

docs/leaks.md has its output.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import pandas as pd

import analysis
import datasets
from analysis.formats import markdown_table
from analysis.groups import ComparisonError, alike_but_for, expected_splits
from datasets.duplicates import near_duplicates
from experiments.task import find
from tracking import StoreError


def divide_test_images(data: datasets.ImageData) -> dict[str, np.ndarray]:
    """Indices of the test images, by how the training folder repeats them."""
    test = np.arange(data.n_pool, len(data.labels))
    shared = datasets.leaking(datasets.duplicate_groups(data), np.arange(data.n_pool), test)
    found = near_duplicates(data)
    is_shared_pair = (found.pairs[:, 0] < data.n_pool) & (found.pairs[:, 1] >= data.n_pool)
    same = np.unique(found.pairs[is_shared_pair & (found.distance == 0), 1])
    return {
        "all": test,
        "in both folders": same,
        "in both, changed": np.setdiff1d(shared, same),
        "the others": np.setdiff1d(test, shared),
    }


def accuracies(group: pd.DataFrame, parts: dict[str, np.ndarray], tracking_uri: str | None) -> pd.DataFrame:
    """Mean and sd over splits of the accuracy (%) on each part, a row a model that has all its splits."""
    rows = {}
    for model, runs in analysis.finished(group).groupby("model"):
        if len(runs) < expected_splits(group):
            continue
        correct = []
        for _, run in runs.iterrows():
            predictions = analysis.load_predictions(run, tracking_uri).query("part == 'test'").set_index("index")
            correct.append((predictions["true"] == predictions["pred"]).reindex(parts["all"]))
        of_split = {
            name: pd.Series([100 * each.loc[indices].mean() for each in correct]) for name, indices in parts.items()
        }
        rows[model] = {name: f"{values.mean():.1f} ± {values.std():.1f}" for name, values in of_split.items()}
    return pd.DataFrame.from_dict(rows, orient="index", columns=list(parts))


def print_tables(task: str, data_dir: Path | None, tracking_uri: str | None) -> None:
    """Print a table for each way to train."""
    data = datasets.load(find(task).data, data_dir)
    parts = divide_test_images(data)
    runs = analysis.load_runs([task], tracking_uri)
    runs = runs[runs["dataset_digest"] == data.digest]
    stated = analysis.choose_group(runs[runs["leak_free"].eq(False)])
    groups = alike_but_for("leak_free", stated, runs)
    print(f"Test accuracy in %, mean ± sd over splits: {', '.join(f'{n} ({len(i):,})' for n, i in parts.items())}")
    for group in sorted(groups, key=lambda group: bool(group["leak_free"].iloc[0])):
        print("\n--leak-free:" if group["leak_free"].iloc[0] else "\nas stated:")
        print(markdown_table(accuracies(group, parts, tracking_uri).rename_axis("model").reset_index()))


def main() -> None:
    """Read the options and print the tables; an error is one sentence."""
    parser = argparse.ArgumentParser(description="Measure the effect of shared pictures; see the module's docstring.")
    parser.add_argument("task", choices=("task1", "task2"))
    parser.add_argument("--data-dir", type=Path, default=os.environ.get("DATA_DIR"))
    parser.add_argument("--tracking-uri")
    options = parser.parse_args()
    try:
        print_tables(options.task, options.data_dir, options.tracking_uri)
    except (StoreError, datasets.DatasetError, ComparisonError) as error:
        raise SystemExit(f"Error: {error}") from None


if __name__ == "__main__":
    main()
