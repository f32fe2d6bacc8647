"""Reading the result database into tidy pandas frames."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from tracking import StoreError, open_store
from tracking.keys import FINAL_METRICS, PARAMS, TAGS

TYPES: dict[str, type] = {
    **dict.fromkeys(("split", "n_splits", "n_train", "n_val", "n_test", "parameters", "macs"), int),
    **dict.fromkeys(("batch_size", "epochs", "patience", "threads", "seed"), int),
    **dict.fromkeys(("lr", "weight_decay"), float),
}
FLAGS = ("leak_free", "augment")


def load_runs(tasks: Sequence[str], tracking_uri: str | None = None) -> pd.DataFrame:
    """Read every split's run of some tasks, whatever its group and status.

    Parameters
    ----------
    tasks : sequence of str
        Such as `["task1", "task3"]`.
    tracking_uri : str, optional
        See `tracking.open_store`.

    Returns
    -------
    pandas.DataFrame
        One row a child run, oldest first: `run_id`, `parent_id`, `status`, `start_time`, `end_time` (UTC), and every
        key of `tracking.keys` that a child has, params in their own types. What a run lacks is missing (NaN, NA).

    Raises
    ------
    StoreError
        There is no store, or it cannot be opened.
    """
    from mlflow.entities import ViewType

    store = open_store(tracking_uri)
    found = [store.experiment_id(task) for task in tasks]
    experiments = [experiment for experiment in found if experiment is not None]
    rows: list[dict[str, Any]] = []
    token: str | None = None
    while experiments:
        page = store.client.search_runs(experiments, "", ViewType.ACTIVE_ONLY, 1000, page_token=token)
        rows += [_row(run) for run in page if "mlflow.parentRunId" in run.data.tags]
        token = page.token
        if not token:
            break
    columns = ["run_id", "parent_id", "status", "start_time", "end_time", *TAGS, *PARAMS, *FINAL_METRICS]
    runs = pd.DataFrame(rows, columns=columns)
    for column in ("start_time", "end_time"):
        runs[column] = pd.to_datetime(runs[column], unit="ms", utc=True)
    for key in FINAL_METRICS:
        runs[key] = runs[key].astype(float)
    return runs.sort_values(["start_time", "run_id"], ignore_index=True)


def _row(run: Any) -> dict[str, Any]:
    info, data = run.info, run.data
    params: dict[str, Any] = {}
    for key, text in data.params.items():
        try:
            params[key] = text == "True" if key in FLAGS else TYPES.get(key, str)(text)
        except ValueError:
            raise StoreError(f"run {info.run_id} has {key} = {text!r}, which is no {TYPES[key].__name__}") from None
    fixed = {
        "run_id": info.run_id,
        "parent_id": data.tags["mlflow.parentRunId"],
        "status": info.status,
        "start_time": info.start_time,
        "end_time": info.end_time,
    }
    # only final metrics: `lr` is a parameter and, by epoch, a metric too
    scores = {key: value for key, value in data.metrics.items() if key in FINAL_METRICS}
    return {**data.tags, **scores, **params, **fixed}
