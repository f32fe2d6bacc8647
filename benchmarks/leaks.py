"""What pictures that stand in the published training and test folder do to the test score of a task.

What      From the stored predictions: the test accuracy of each finished model of the newest complete comparison group,
          on all test images, on those that are in the training folder as they are (with the same perceptual hash), on
          those that are there slightly changed, and on the others; and the same for the newest complete group of
          `--leak-free`, which trained on none of them
Time      seconds

    python benchmarks/leaks.py task2

results/task2/README.md has what it printed.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import pandas as pd

import analysis
import datasets
from analysis.groups import ComparisonError
from datasets.duplicates import near_duplicates


def divide_test_images(data: datasets.ImageData) -> dict[str, np.ndarray]:
    """Indices of the test images by what the training folder holds of them."""
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


def accuracies(runs: pd.DataFrame, parts: dict[str, np.ndarray]) -> pd.DataFrame:
    """Mean and sd over splits of the accuracy (%) on each part, a row a model that has all its splits."""
    rows = {}
    for model, of_model in analysis.finished(runs).groupby("model"):
        if len(of_model) < of_model["n_splits"].iloc[0]:
            continue
        correct = []
        for _, run in of_model.iterrows():
            predictions = analysis.load_predictions(run).query("part == 'test'").set_index("index")
            correct.append((predictions["true"] == predictions["pred"]).reindex(parts["all"]))
        of_split = {name: [100 * each.loc[indices].mean() for each in correct] for name, indices in parts.items()}
        rows[model] = {
            name: f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}" for name, values in of_split.items()
        }
    return pd.DataFrame.from_dict(rows, orient="index", columns=list(parts))


def main() -> None:
    """Print a table for each way to train."""
    parser = argparse.ArgumentParser(description="What shared pictures do to a test score; see the module's docstring.")
    parser.add_argument("task", choices=("task1", "task2"))
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--tracking-uri")
    options = parser.parse_args()
    data = datasets.load(options.task, options.data_dir)
    parts = divide_test_images(data)
    runs = analysis.load_runs([options.task], options.tracking_uri)
    runs = runs[runs["dataset_digest"] == data.digest]
    print(f"Test accuracy in %, mean ± sd over splits: {', '.join(f'{n} ({len(i):,})' for n, i in parts.items())}")
    for leak_free, title in ((False, "as stated"), (True, "--leak-free")):
        try:
            group = analysis.choose_group(runs[runs["leak_free"].eq(leak_free)])
        except ComparisonError as error:
            print(f"{title}: {error}")
            continue
        table = accuracies(group, parts)
        print(f"\n| {title} | {' | '.join(table.columns)} |\n|---{'|--:' * len(table.columns)}|")
        for model, row in table.iterrows():
            print(f"| {model} | {' | '.join(row)} |")


if __name__ == "__main__":
    main()
