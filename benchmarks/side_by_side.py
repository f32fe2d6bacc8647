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
from analysis.statistics import TTest, holm
from analysis.tables import p_value
from benchmarks.type_one_error import earlier_test, table


def before(evidence: Evidence, model: str, other: str) -> TTest:
    """Test the difference of two models' accuracy on the test part, as the program did before."""
    runs = evidence.of(model)
    by_image = {}
    for split in runs.index:
        one, two = (evidence.predictions(evidence.of(name).loc[split], "test") for name in (model, other))
        by_image[split] = pd.Series((one.predicted == one.true) - 1.0 * (two.predicted == two.true), index=one.index)
    values = pd.DataFrame(by_image).T.to_numpy()
    fixed_test = not np.isnan(values).any()
    n_train, n_val, n_test = (int(runs[f"n_{part}"].iloc[0]) for part in ("train", "val", "test"))
    return earlier_test(values, fixed_test, n_train, n_val, n_test if fixed_test else n_train + n_val + n_test)


def _in_points(mean: float, low: float, high: float) -> str:
    return f"{100 * mean:+.1f} ± {50 * (high - low):.1f}"


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
    tests = [before(evidence, row["model_a"], row["model_b"]) for _, row in now.iterrows()]
    adjusted = pd.Series([test.p for test in tests]).groupby(now["family"]).transform(holm)
    rows = [
        [
            f"{row['model_a']} − {row['model_b']}",
            _in_points(test.mean, test.low, test.high), p_value(p),
            _in_points(row["difference"], row["low"], row["high"]), p_value(row["p_holm"]), row["verdict"],
        ]
        for (_, row), test, p in zip(now.iterrows(), tests, adjusted, strict=True)
    ]  # fmt: skip
    print(table(["pair", "before", "Holm p", "now", "Holm p", "verdict now"], rows))


if __name__ == "__main__":
    main()
