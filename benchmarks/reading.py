"""How fast analysis/query.py reads the result database, beside MLflow's own functions.

What      `load_runs` against `mlflow.search_runs`: 5,000 runs of splits and their 500 parents, each with all params,
          tags and final metrics of `tracking.keys`. `load_curves` against `MlflowClient.get_metric_history` of each run
          and key: 200 runs, 30 epochs, 8 metrics. Each pair is timed in turn, after one round that does not count, on a
          SQLite file that the system has in memory; then the numbers of both are compared
Time      about 2 minutes on 1 CPU core

    python benchmarks/reading.py

2 cores of an AMD EPYC, shared with other work; Python 3.11.7, mlflow 3.17.2, pandas 3.1.1, SQLite 3.40.1; 2026-11-23:

| | median, ms | min | max | times as fast |
|---|--:|--:|--:|--:|
| `load_runs` | 401 | 390 | 413 | 21.4 |
| `mlflow.search_runs` | 8,599 | 8,066 | 8,698 | 1.0 |
| `load_curves` | 48 | 46 | 73 | 35.0 |
| `MlflowClient.get_metric_history` | 1,686 | 1,578 | 1,927 | 1.0 |
"""

import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import mlflow
import numpy as np
import pandas as pd
from mlflow import MlflowClient
from mlflow.entities import Metric

from analysis import load_curves, load_runs
from analysis.query import FLAGS
from tracking import open_store
from tracking.keys import EPOCH_METRICS, FINAL_METRICS, PARAMS, TAGS

TASK = "task3"
N_SPLITS = 10
TEXTS = {  # params that are no integers
    **{"model": "resnetcnn", "dataset": "FashionMNIST", "protocol": "repeated holdout 2:49:49", "device": "cpu"},
    **{"precision": "bf16", "lr": "0.001", "weight_decay": "0.01"},
    **dict.fromkeys(FLAGS, "False"),
}
WRITTEN_LATER = ("superseded_by", "failure")  # tags that few runs have
COLUMNS = {
    "runs": "run_uuid, name, user_id, status, start_time, end_time, artifact_uri, experiment_id, lifecycle_stage",
    "tags": "run_uuid, key, value",
    "params": "run_uuid, key, value",
    "metrics": "run_uuid, key, value, timestamp, step, is_nan",
    "latest_metrics": "run_uuid, key, value, timestamp, step, is_nan",
}


def make_store(folder: Path, n_runs: int, n_epochs: int) -> tuple[str, str]:
    """Fill a new store with finished splits by inserting rows; return its URI and the experiment's id."""
    store = open_store(f"sqlite:///{folder}/mlflow.db", create=True)
    experiment = store.make_experiment(TASK)
    rng = np.random.default_rng(0)
    rows: dict[str, list[tuple[Any, ...]]] = {table: [] for table in COLUMNS}

    def add_run(name: str, number: int, **tags: str) -> tuple[str, int]:
        run_id, start = rng.bytes(16).hex(), 1_700_000_000_000 + 60_000 * number
        uri = f"file://{folder}/artifacts/{TASK}/{run_id}/artifacts"
        rows["runs"].append((run_id, name, "me", "FINISHED", start, start + 50_000, uri, experiment, "active"))
        tags |= {key: rng.bytes(20).hex() for key in TAGS if key not in WRITTEN_LATER} | {"task": TASK}
        rows["tags"] += [(run_id, key, value) for key, value in {"mlflow.runName": name, **tags}.items()]
        return run_id, start

    for number in range(n_runs):
        split = number % N_SPLITS
        if split == 0:
            parent, _ = add_run("resnetcnn", number)
        run_id, start = add_run(f"resnetcnn split {split}", number, **{"mlflow.parentRunId": parent})
        rows["params"] += [(run_id, key, TEXTS.get(key, str(split))) for key in PARAMS]
        steps = dict.fromkeys(FINAL_METRICS, range(1)) | dict.fromkeys(EPOCH_METRICS, range(1, n_epochs + 1))
        for key, epochs in steps.items():
            points = [(run_id, key, rng.random(), start + 1000 * epoch, epoch, False) for epoch in epochs]
            rows["metrics"] += points
            rows["latest_metrics"].append(points[-1])

    with closing(sqlite3.connect(folder / "mlflow.db")) as database, database:
        for table, columns in COLUMNS.items():
            places = ", ".join("?" * len(columns.split(", ")))
            database.executemany(f"INSERT INTO {table} ({columns}) VALUES ({places})", rows[table])
    return store.uri, experiment


def race(repeats: int, *contestants: Callable[[], Any]) -> list[list[float]]:
    """Time functions in turn; seconds of each, without the first round."""
    seconds: list[list[float]] = [[] for _ in contestants]
    for _ in range(1 + repeats):
        for function, times in zip(contestants, seconds, strict=True):
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
    return [times[1:] for times in seconds]


def print_rows(names: tuple[str, str], ours: list[float], theirs: list[float]) -> None:
    """Print two lines of the table; the ratio is that of the medians."""
    for name, times in zip(names, (ours, theirs), strict=True):
        ratio = median(theirs) / median(times)
        numbers = " | ".join(f"{1000 * value:,.0f}" for value in (median(times), min(times), max(times)))
        print(f"| {name} | {numbers} | {ratio:.1f} |")


def race_runs(folder: Path) -> None:
    """Read all runs with their final metrics."""
    uri, experiment = make_store(folder, n_runs=5000, n_epochs=1)
    mlflow.set_tracking_uri(uri)

    def search() -> pd.DataFrame:
        return mlflow.search_runs([experiment], max_results=50_000)

    print_rows(("`load_runs`", "`mlflow.search_runs`"), *race(5, lambda: load_runs([TASK], uri), search))
    ours, theirs = load_runs([TASK], uri), search()
    theirs = theirs[theirs["tags.mlflow.parentRunId"].notna()].set_index("run_id").loc[ours["run_id"]]
    columns = {f"{kind}.{key}": key for kind, keys in (("params", PARAMS), ("metrics", FINAL_METRICS)) for key in keys}
    columns |= {f"tags.{key}": key for key in TAGS if key not in WRITTEN_LATER}
    theirs = theirs.rename(columns=columns)[list(columns.values())].reset_index()
    ours = ours[theirs.columns]
    flags = {key: theirs[key].map({"True": True, "False": False}) for key in FLAGS}
    pd.testing.assert_frame_equal(ours, theirs.assign(**flags).astype(ours.dtypes), check_exact=True)


def race_curves(folder: Path) -> None:
    """Read all epochs of all runs."""
    uri, _ = make_store(folder, n_runs=200, n_epochs=30)
    client = MlflowClient(uri)
    runs = load_runs([TASK], uri)["run_id"]

    def histories() -> list[tuple[str, str, list[Metric]]]:
        return [(run_id, key, client.get_metric_history(run_id, key)) for run_id in runs for key in EPOCH_METRICS]

    names = ("`load_curves`", "`MlflowClient.get_metric_history`")
    print_rows(names, *race(9, lambda: load_curves([TASK], uri), histories))
    points = [(run_id, point.step, key, point.value) for run_id, key, history in histories() for point in history]
    theirs = pd.DataFrame(points, columns=["run_id", "epoch", "key", "value"])
    theirs = theirs.pivot(index=["run_id", "epoch"], columns="key", values="value")
    ours = load_curves([TASK], uri).set_index(["run_id", "epoch"])[list(theirs.columns)]
    np.testing.assert_array_equal(ours.sort_index().to_numpy(), theirs.sort_index().to_numpy())


if __name__ == "__main__":
    print("| | median, ms | min | max | times as fast |\n|---|--:|--:|--:|--:|")
    for function in (race_runs, race_curves):
        with tempfile.TemporaryDirectory() as folder:
            function(Path(folder))
