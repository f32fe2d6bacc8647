"""Reading the result database into tidy pandas frames."""

import atexit
import contextlib
import functools
import json
import os
import posixpath
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.readers import NAN, RUN_COLUMNS, Client, Database, Experiment, Row, check_tasks, open_reader
from tracking import StoreError, open_store
from tracking.artifacts import folder_with_files, local_path, moves
from tracking.keys import CLASSES, EPOCH_METRICS, FINAL_METRICS, PREDICTIONS, SEEDS, THUMBNAILS
from tracking.predictions import PartPredictions, Predictions
from tracking.settings import LATER, TYPES
from tracking.store import deleted_sentence, own_prefix

TIMES = ("start_time", "end_time")
FLAGS = ("leak_free", "halving", *(key for key, kind in TYPES.items() if kind is bool))
FLOATS = tuple(key for key, kind in TYPES.items() if kind is float)
INTEGERS = (
    "n_splits", "repetitions", "split", "replicate", "tune", "trial", "chosen_trial", "n_train", "n_val", "n_test",
    "parameters", "macs", "threads", "seed", "epoch",
    *(key for key, kind in TYPES.items() if kind is int),
)  # fmt: skip
LABELS = ("run_id", "task", "model", "split")  # identify a run in `load_curves`
PREDICTED_PARTS = ("val", "test")
PROXIED = "mlflow-artifacts:"  # scheme of artifacts whose location only a tracking server knows


def load_runs(tasks: Sequence[str], tracking_uri: str | None = None, parent_id: str | None = None) -> pd.DataFrame:
    """Read the runs of all splits of some tasks, of every group and status.

    Parameters
    ----------
    tasks : sequence of str
        Such as `["task1", "task3"]`. A task without runs has no rows.
    tracking_uri : str, optional
        See `tracking.check_uri`.
    parent_id : str, optional
        Only the splits of this parent run.

    Returns
    -------
    pandas.DataFrame
        One row a child run, oldest first, always with these columns: `run_id`, `parent_id`, `status`, `start_time`,
        `end_time` (UTC), `artifact_uri`, then every tag, param and final metric of `tracking.keys`. Their dtypes are
        fixed: Int64, boolean, float64, str. Missing values are NA, NaN or NaT. `artifact_uri` is the current location
        if a SQLite database was moved together with its artifacts.

    Raises
    ------
    StoreError
        If the store is missing or unreadable, a task is unknown (`UnknownTaskError`), or a param has the wrong type.
    """
    with open_reader(tracking_uri, tasks) as reader:
        experiments = _experiments(reader, tasks)
        rows = reader.runs(experiments, parent_id) if experiments else []
        moved = _moves(experiments, reader.database)
    start = RUN_COLUMNS.index("start_time")
    rows.sort(key=lambda row: (row[start] or 0, row[0]))
    runs = _frame(rows, RUN_COLUMNS, FINAL_METRICS)
    for seed in SEEDS:
        runs[seed] = runs[seed].fillna(runs["seed"])
    runs["replicate"] = runs["replicate"].mask(runs["split"].notna(), runs["replicate"].fillna(0))
    runs = runs.fillna(LATER)
    if moved:
        runs["artifact_uri"] = runs["artifact_uri"].map(lambda uri: _current(uri, moved)).astype("str")
    return runs


def load_curves(tasks: Sequence[str], tracking_uri: str | None = None) -> pd.DataFrame:
    """Read the epoch metrics of all splits of some tasks; parameters and errors as for `load_runs`.

    Returns
    -------
    pandas.DataFrame
        One row a run and epoch, in the order of `load_runs`: `run_id`, `task`, `model`, `split`, `epoch` (Int64), then
        every epoch metric of `tracking.keys`. If an epoch was logged again, the newest value counts; of values from
        the same millisecond, the largest.
    """
    with open_reader(tracking_uri, tasks) as reader:
        experiments = _experiments(reader, tasks)
        runs, points = reader.curves(experiments) if experiments else ([], [])
    runs.sort(key=lambda row: (row[0] or 0, row[1]))
    labels = _frame([row[1:] for row in runs], LABELS, ())
    place = {row[1]: number for number, row in enumerate(runs)}
    ids, epochs, times, *metrics = zip(*points, strict=True) if points else [()] * (3 + len(EPOCH_METRICS))
    run, epoch = np.array([place[run_id] for run_id in ids], dtype=np.int64), np.array(epochs, dtype=np.int64)
    order = np.lexsort((times, epoch, run))
    run, epoch, values = run[order], epoch[order], np.array(metrics, dtype=float)[:, order]
    curves = pd.DataFrame(dict(zip(EPOCH_METRICS, values, strict=True)))
    if ((np.diff(run) == 0) & (np.diff(epoch) == 0)).any():
        curves = curves.groupby([run, epoch], sort=False).last()  # of each metric
        run, epoch = (curves.index.get_level_values(level).to_numpy() for level in (0, 1))
        curves = curves.reset_index(drop=True)
    logged_as_nan = curves.eq(NAN)
    if logged_as_nan.to_numpy().any():
        curves = curves.mask(logged_as_nan)
    labels = labels.take(run).reset_index(drop=True).assign(epoch=pd.array(epoch, dtype="Int64"))
    return pd.concat([labels, curves], axis=1)


def load_predictions(run: "str | pd.Series[Any]", tracking_uri: str | None = None) -> pd.DataFrame:
    """Read a run's predictions for its validation and test parts; parameters as for `local_artifact`.

    Returns
    -------
    pandas.DataFrame
        One row an image: `part` (val or test), `index` in the data set, `true` and `pred` (labels, int64), and `prob`,
        the probability of the predicted label (float32).

    Raises
    ------
    StoreError
        If the run does not exist, has no predictions, or the file is damaged.
    """
    read = read_predictions(run, tracking_uri, probabilities=False)
    parts = [predictions_frame(each) for each in (read.val, read.test)]
    predictions = pd.concat(parts, ignore_index=True)
    names = np.repeat(PREDICTED_PARTS, [len(part) for part in parts])
    predictions.insert(0, "part", pd.Series(names, dtype="str"))
    return predictions


def predictions_frame(part: PartPredictions) -> pd.DataFrame:
    """One row an image: `index`, `true`, `pred` and `prob`, as in `load_predictions`."""
    return pd.DataFrame({"index": part.index, "true": part.true, "pred": part.predicted, "prob": part.probability})


def read_predictions(
    run: "str | pd.Series[Any]", tracking_uri: str | None = None, probabilities: bool = True
) -> Predictions:
    """Read a run's predictions, as `Predictions.read`; errors are those of `load_predictions`."""
    path = local_artifact(run, PREDICTIONS, tracking_uri)
    with _undamaged(path):
        return Predictions.read(path, probabilities)


def load_thumbnails(run: "str | pd.Series[Any]", tracking_uri: str | None = None) -> dict[int, np.ndarray]:
    """Read the thumbnails of a run's most confident mistakes; parameters and errors as for `load_predictions`.

    Returns
    -------
    dict of int to numpy.ndarray
        By index in the data set: uint8, shape (side, side, channels).
    """
    path = local_artifact(run, THUMBNAILS, tracking_uri)
    with _undamaged(path), np.load(path, allow_pickle=False) as arrays:
        return dict(zip(arrays["index"].tolist(), arrays["pixels"], strict=True))


def load_classes(run: "str | pd.Series[Any]", tracking_uri: str | None = None) -> list[str]:
    """Read the class names of a parent run, in the order of labels; errors as for `load_predictions`."""
    path = local_artifact(run, CLASSES, tracking_uri)
    with _undamaged(path):
        return [str(name) for name in json.loads(path.read_text(encoding="utf-8"))]


@contextlib.contextmanager
def _undamaged(path: Path) -> Iterator[None]:
    """Turn the errors that a damaged file causes into a `StoreError`."""
    try:
        yield
    except (OSError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile, zlib.error):
        raise StoreError(f"{path} is damaged; run its task again with --fresh to have it written") from None


def local_artifact(run: "str | pd.Series[Any]", name: str, tracking_uri: str | None = None) -> Path:
    """Return the path of a file that a run logged. A remote file is downloaded, and removed when the process exits.

    Parameters
    ----------
    run : str or pandas.Series
        Id of a parent or child run, or a row of `load_runs`, which is faster.
    name : str
        Path below the run's artifacts, such as `tracking.keys.PREDICTIONS`.
    tracking_uri : str, optional
        See `tracking.check_uri`.

    Raises
    ------
    StoreError
        If there is no such run or file.
    """
    if isinstance(run, str):
        run_id, uri = run, _artifact_uri(run, tracking_uri)
    else:
        run_id, uri = run["run_id"], run["artifact_uri"]
    if uri.startswith(PROXIED) and not (tracking_uri or os.environ.get("MLFLOW_TRACKING_URI", "")).startswith("http"):
        uri = _behind_the_server(uri)
    folder = local_path(uri)
    if folder is None:
        return _download(run_id, uri, name, tracking_uri)
    path = folder / name
    if not path.is_file():
        raise _missing(run_id, name)
    return path


def _experiments(reader: Database | Client, tasks: Sequence[str]) -> list[Experiment]:
    prefix = own_prefix()
    everyone = [experiment for experiment in reader.experiments() if (experiment.prefix or "") == prefix]
    check_tasks(tasks, everyone)
    active = {experiment.owner for experiment in everyone if experiment.stage == "active"}
    experiments = [experiment for experiment in everyone if experiment.owner in tasks]
    experiments = [each for each in experiments if each.stage == "active" or each.owner not in active]
    for experiment in experiments:
        if experiment.stage != "active":
            raise StoreError(deleted_sentence(experiment.name, experiment.id, reader.label))
    return experiments


def _frame(rows: list[Row], names: Sequence[str], metrics: Collection[str]) -> pd.DataFrame:
    """Convert rows to a frame of fixed dtypes; params are text, metrics are numbers or None."""
    columns = list(zip(*rows, strict=True)) if rows else [()] * len(names)
    run_ids = columns[names.index("run_id")]
    typed: dict[str, Any] = {}
    for name, values in zip(names, columns, strict=True):
        if name in metrics:
            typed[name] = np.array(values, dtype=float)
        elif name in TIMES:
            typed[name] = pd.array(np.array(values, dtype="datetime64[ms]"), dtype="datetime64[ms, UTC]")
        elif name in FLAGS:
            typed[name] = pd.array([None if text is None else text == "True" for text in values], dtype="boolean")
        elif name in INTEGERS or name in FLOATS:
            typed[name] = _numbers(name, values, run_ids)
        else:
            typed[name] = pd.array(values, dtype="str")
    return pd.DataFrame(typed)


def _numbers(key: str, texts: Sequence[Any], run_ids: Sequence[str]) -> "pd.Series[Any]":
    kind, dtype, parse = ("float", "float64", float) if key in FLOATS else ("int", "Int64", np.int64)
    numbers: dict[Any, Any] = {None: None}
    for text, run_id in zip(texts, run_ids, strict=True):
        if text not in numbers:
            try:
                numbers[text] = parse(text)
            except (ValueError, OverflowError):
                problem = f"run {run_id} has {key} = {text!r}, which is no {kind}; delete the run in the MLflow UI"
                raise StoreError(problem) from None
    return pd.Series([numbers[text] for text in texts], dtype=dtype)


def _artifact_uri(run_id: str, tracking_uri: str | None) -> str:
    with open_reader(tracking_uri) as reader:
        found = reader.artifacts(run_id)
        if found is None:
            raise StoreError(f"there is no run {run_id} in {reader.label}")
        uri, experiment = found
        return _current(uri, _moves([experiment], reader.database))


def _moves(experiments: Sequence[Experiment], database: Path | None) -> dict[Path, Path]:
    return moves({experiment.name: experiment.location for experiment in experiments}, database)


def _current(uri: str, moved: Mapping[Path, Path]) -> str:
    folder = folder_with_files(uri, moved) if moved else None
    return uri if folder is None else folder.as_uri()


def _missing(run_id: str, name: str) -> StoreError:
    return StoreError(f"run {run_id} has no {name}; run its task again with --fresh to have it written")


def _behind_the_server(uri: str) -> str:
    """The location of a server's files, for reading its database directly; the server reads the same variable."""
    destination = os.environ.get("MLFLOW_ARTIFACTS_DESTINATION")
    if not destination:
        raise StoreError(
            "files of these runs are kept by a tracking server; name its http:// address in --tracking-uri, or the "
            "place in MLFLOW_ARTIFACTS_DESTINATION"
        )
    return destination.rstrip("/") + uri.removeprefix(PROXIED)


@functools.cache
def _download(run_id: str, uri: str, name: str, tracking_uri: str | None) -> Path:
    store = open_store(tracking_uri)
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    files: Any = get_artifact_repository(uri, tracking_uri=store.uri)
    if name not in [file.path for file in files.list_artifacts(posixpath.dirname(name) or None)]:
        raise _missing(run_id, name)
    folder = tempfile.mkdtemp(prefix=f"{run_id}-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(files.download_artifacts(name, folder))
