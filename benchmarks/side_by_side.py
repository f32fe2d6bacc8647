"""The verdicts of a task's stored runs by the estimate of today and by the tests that the program used before.

What      for each pair of models the difference of accuracy, its 95 % interval, Holm's p and whether the pair is told
          apart: by the test part alone (components of variance; `before` in type_one_error.py), and by all images that
          did not choose the epoch. The runs are the same
Time      seconds

    python benchmarks/side_by_side.py task1 --tracking-uri sqlite:///mlruns/mlflow.db
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import pandas as pd

import analysis
from analysis.comparison import compare
from analysis.evidence import Evidence, default_metric
from analysis.groups import choose_group
from analysis.statistics import (
    TTest,
    component_standard_error,
    fixed_test_standard_error,
    holm,
    image_variance,
    satterthwaite_df,
    ttest,
)
from analysis.tables import p_value
from benchmarks.type_one_error import table


def earlier_test(evidence: Evidence, model: str, other: str) -> TTest:
    """Test the difference of two models' accuracy on the test part, as the program did before."""
    runs = evidence.of(model)
    correct: list[dict[int, float]] = []
    for split in runs.index:
        parts = [evidence.predictions(evidence.of(name).loc[split], "test") for name in (model, other)]
        right = [(part.predicted == part.true).astype(float) for part in parts]
        correct.append(dict(zip(parts[0].index.tolist(), right[0] - right[1], strict=True)))
    images = sorted(set().union(*correct))
    differences = np.array([[of_split.get(image, np.nan) for image in images] for of_split in correct])
    means, variance = np.nanmean(differences, axis=1), image_variance(differences)
    n_train, n_val, n_test = (int(runs[f"n_{part}"].iloc[0]) for part in ("train", "val", "test"))
    if all(of_split.keys() == correct[0].keys() for of_split in correct):  # one published test part
        se = fixed_test_standard_error(means, variance, n_train, n_val, n_test)
    else:
        se = component_standard_error(means, variance, n_train, n_test)
    return ttest(float(means.mean()), se, satterthwaite_df(se, variance, n_test, len(means)))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Compare today's verdicts with earlier ones; see the docstring.")
    parser.add_argument("task")
    parser.add_argument("--tracking-uri")
    arguments = parser.parse_args()
    runs = analysis.load_runs([arguments.task], arguments.tracking_uri)
    evidence = Evidence(choose_group(runs), arguments.tracking_uri)
    metric = default_metric(runs)
    now = compare(evidence, metric)
    before = [earlier_test(evidence, row["model_a"], row["model_b"]) for _, row in now.iterrows()]
    adjusted = pd.Series([test.p for test in before]).groupby(now["family"]).transform(holm)
    rows = []
    for (_, row), test, p in zip(now.iterrows(), before, adjusted, strict=True):
        old = [100 * test.mean, 50 * (test.high - test.low), p]
        new = [100 * row["difference"], 50 * (row["high"] - row["low"]), row["p_holm"]]
        cells = [f"{values[0]:+.1f} ± {values[1]:.1f} | {p_value(values[2])}" for values in (old, new)]
        rows.append([f"{row['model_a']} − {row['model_b']}", *" | ".join(cells).split(" | "), row["verdict"]])
    print(table(["pair", "before", "Holm p", "now", "Holm p", "verdict now"], rows))


if __name__ == "__main__":
    main()
