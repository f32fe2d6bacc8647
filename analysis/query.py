"""Reading the result database into tidy pandas frames.

SQLite and PostgreSQL are read in SQL, which avoids the 2 s of importing mlflow. Tracking servers, and databases with
an unknown schema, are read through MLflow's client. Both give the same frames.
"""

import atexit
import contextlib
import difflib
import functools
import json
import math
import os
import posixpath
import shutil
import sqlite3
import tempfile
import warnings
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from tracking import Store, StoreError, UnknownTaskError, check_uri, open_store
from tracking.artifacts import folder_with_files, local_path, moves
from tracking.commands import not_one_of, script_tasks
from tracking.keys import (
    CLASSES,
    EPOCH_METRICS,
    FINAL_METRICS,
    PARAMS,
    PARENT,
    PREDICTIONS,
    PREFIX,
    SEEDS,
    TAGS,
    TASK,
    THUMBNAILS,
)
from tracking.keys import UNTAGGED_EXPERIMENTS as UNTAGGED
from tracking.predictions import PartPredictions, Predictions
from tracking.schema import why_unusable
from tracking.settings import LATER, TYPES
from tracking.store import (
    StoreAwayError,
    all_pages,
    check_exists,
    deleted_sentence,
    in_one_line,
    own_prefix,
    readable,
    sqlite_error,
    sqlite_path,
    without_password,
)

if TYPE_CHECKING:
    from mlflow.entities import Experiment as MlflowExperiment
    from mlflow.entities import Run as MlflowRun

SCHEMA = "dc11669786a5"  # alembic version of mlflow 3.17.2's databases, for which the SQL below is written
# fields of _Experiment in SQL
EXPERIMENT = "e.experiment_id, e.name, e.lifecycle_stage, e.artifact_location, t.value, o.value"


TIMES = ("start_time", "end_time")
FLAGS = ("leak_free", "halving", *(key for key, kind in TYPES.items() if kind is bool))
FLOATS = tuple(key for key, kind in TYPES.items() if kind is float)
INTEGERS = (
    "n_splits", "split", "replicate", "tune", "trial", "chosen_trial", "n_train", "n_val", "n_test", "parameters",
    "macs", "threads", "seed", "epoch",
    *(key for key, kind in TYPES.items() if kind is int),
)  # fmt: skip

RUN_COLUMNS = (
    "run_id", "parent_id", "status", "start_time", "end_time", "artifact_uri", *TAGS, *PARAMS, *FINAL_METRICS,
)  # fmt: skip
_TAG = "LEFT JOIN experiment_tags {0} ON {0}.experiment_id = e.experiment_id AND {0}.key = '{1}'"
_EXPERIMENTS = f"experiments e {_TAG.format('t', TASK)} {_TAG.format('o', PREFIX)}"
LABELS = ("run_id", "task", "model", "split")  # identify a run in `load_curves`
PREDICTED_PARTS = ("val", "test")

NAN = -math.inf  # stands for a logged NaN: SQL's MAX prefers any number to it, and MLflow never stores infinity
PROXIED = "mlflow-artifacts:"  # scheme of artifacts whose location only a tracking server knows

Row = tuple[Any, ...]
Execute = Callable[[str, dict[str, Any]], list[Row]]


class _Experiment(NamedTuple):
    id: Any  # a number in SQL, text in MLflow's client
    name: str
    stage: str
    location: str
    task: str | None = None  # its tags
    prefix: str | None = None

    @property
    def owner(self) -> str | None:
        """The task of the experiment."""
        return self.task or UNTAGGED.get(self.name)


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
    with _reader(tracking_uri, tasks) as reader:
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
    with _reader(tracking_uri, tasks) as reader:
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


class _Database:
    """An SQLite or PostgreSQL database with a known schema, open for reading. Rows come in any order."""

    def __init__(self, execute: Execute, label: str, database: Path | None) -> None:
        self.execute = execute
        self.label = label
        self.database = database

    def experiments(self) -> list[_Experiment]:
        """Read all experiments, including deleted ones."""
        rows = self.execute(f"SELECT {EXPERIMENT} FROM {_EXPERIMENTS} WHERE e.workspace = 'default'", {})
        return [_Experiment(*row) for row in rows]

    def runs(self, experiments: Sequence[_Experiment], parent_id: str | None) -> list[Row]:
        """Read the RUN_COLUMNS of active children, as stored."""
        columns = [
            *("r.run_uuid", "p.value", "r.status", "r.start_time", "r.end_time", "r.artifact_uri"),
            *(_value("tags", key) for key in TAGS),
            *(_value("params", key) for key in PARAMS),
            *(_value("latest_metrics", key, "AND NOT is_nan") for key in FINAL_METRICS),
        ]
        query = _children(experiments, columns)
        return self.execute(f"{query} AND p.value = :parent" if parent_id else query, {"parent": parent_id})

    def curves(self, experiments: Sequence[_Experiment]) -> tuple[list[Row], list[Row]]:
        """Read start time and LABELS of active children; and run, epoch, time of logging, EPOCH_METRICS of points."""
        labels = [_value("tags", "task"), _value("params", "model"), _value("params", "split")]
        value = "CASE WHEN is_nan THEN :nan ELSE value END"
        maxima = [f"MAX({value}) FILTER (WHERE key = '{key}')" for key in EPOCH_METRICS]
        keys = ", ".join(f"'{key}'" for key in EPOCH_METRICS)
        # An epoch's metrics share a timestamp, so there are hardly more rows than epochs. SQLite groups fastest with
        # the most distinct column first. Joining the labels to every point would take a fifth of the time.
        query = f"""
            SELECT run_uuid, step, timestamp, {", ".join(maxima)} FROM metrics
            WHERE run_uuid IN ({_children(experiments, ["r.run_uuid"])}) AND key IN ({keys})
            GROUP BY timestamp, step, run_uuid"""
        runs = self.execute(_children(experiments, ["r.start_time", "r.run_uuid", *labels]), {})
        return runs, self.execute(query, {"nan": NAN})

    def artifacts(self, run_id: str) -> tuple[str, _Experiment] | None:
        """Look up a run's artifact URI and its experiment."""
        query = f"""
            SELECT r.artifact_uri, {EXPERIMENT} FROM {_EXPERIMENTS} JOIN runs r ON e.experiment_id = r.experiment_id
            WHERE r.run_uuid = :run_id"""
        for uri, *experiment in self.execute(query, {"run_id": run_id}):
            return uri, _Experiment(*experiment)
        return None


def _children(experiments: Sequence[_Experiment], columns: Sequence[str]) -> str:
    ids = ", ".join(str(experiment.id) for experiment in experiments)
    return f"""
        SELECT {", ".join(columns)}
        FROM runs r JOIN tags p ON p.run_uuid = r.run_uuid AND p.key = '{PARENT}'
        JOIN tags f ON f.run_uuid = r.run_uuid AND f.key = 'fingerprint'  -- else it is a stranger's
        WHERE r.experiment_id IN ({ids}) AND r.lifecycle_stage = 'active'"""


def _value(table: str, key: str, condition: str = "") -> str:
    """SQL for one value of a run. A look-up by primary key is faster than fetching all rows and pivoting them."""
    return f"(SELECT value FROM {table} WHERE run_uuid = r.run_uuid AND key = '{key}' {condition}) AS \"{key}\""


class _Client:
    """Any store, read through MLflow's client; the methods are those of `_Database`."""

    def __init__(self, store: Store) -> None:
        self.client = store.client
        self.label = store.label
        self.database = store.database

    def experiments(self) -> list[_Experiment]:
        from mlflow.entities import ViewType

        return [_experiment(experiment) for experiment in self.client.search_experiments(ViewType.ALL)]

    def runs(self, experiments: Sequence[_Experiment], parent_id: str | None) -> list[Row]:
        condition = f"tags.`{PARENT}` = '{parent_id}'" if parent_id else ""
        return [
            (
                *(run.info.run_id, run.data.tags[PARENT], run.info.status),
                *(run.info.start_time, run.info.end_time, run.info.artifact_uri),
                *map(run.data.tags.get, TAGS), *map(run.data.params.get, PARAMS),
                *map(run.data.metrics.get, FINAL_METRICS),
            )
            for run in self._children(experiments, condition)
        ]  # fmt: skip

    def curves(self, experiments: Sequence[_Experiment]) -> tuple[list[Row], list[Row]]:
        runs, rows = list[Row](), list[Row]()
        for run in self._children(experiments):
            run_id, data = run.info.run_id, run.data
            labels = (data.tags.get("task"), data.params.get("model"), data.params.get("split"))
            runs.append((run.info.start_time, run_id, *labels))
            points: defaultdict[tuple[int, int], dict[str, float]] = defaultdict(dict)
            for key in EPOCH_METRICS:
                for point in self.client.get_metric_history(run_id, key) if key in data.metrics else ():
                    values = points[point.step, point.timestamp]
                    values[key] = max(values.get(key, NAN), NAN if math.isnan(point.value) else point.value)
            rows += [(run_id, *point, *map(values.get, EPOCH_METRICS)) for point, values in points.items()]
        return runs, rows

    def artifacts(self, run_id: str) -> tuple[str, _Experiment] | None:
        from mlflow.exceptions import MlflowException

        try:
            info = self.client.get_run(run_id).info
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        return info.artifact_uri, _experiment(self.client.get_experiment(info.experiment_id))

    def _children(self, experiments: Sequence[_Experiment], condition: str = "") -> "Iterator[MlflowRun]":
        ids = [experiment.id for experiment in experiments]
        runs = all_pages(lambda token: self.client.search_runs(ids, condition, max_results=1000, page_token=token))
        return (run for run in runs if {PARENT, "fingerprint"} <= run.data.tags.keys())  # else a stranger's


def _experiment(entity: "MlflowExperiment") -> _Experiment:
    tags = entity.tags.get(TASK), entity.tags.get(PREFIX)
    return _Experiment(entity.experiment_id, entity.name, entity.lifecycle_stage, entity.artifact_location, *tags)


@contextlib.contextmanager
def _reader(tracking_uri: str | None, tasks: Sequence[str] = ()) -> Iterator[_Database | _Client]:
    uri = check_uri(tracking_uri)
    database = sqlite_path(uri)
    if database and not database.exists():  # of a misspelt script it is the lesser error; other names may be folders'
        _check_tasks([task for task in tasks if difflib.get_close_matches(task, script_tasks(), 1)], [])
    if uri.startswith(("sqlite:", "postgresql")):
        with _sqlite(database) if database else _postgresql(uri) as execute:
            [[schema]] = execute("SELECT MAX(version_num) FROM alembic_version", {})
            if schema != SCHEMA and (problem := why_unusable(schema, without_password(uri))):
                raise StoreError(problem)
            if schema == SCHEMA:
                yield _Database(execute, without_password(uri), database)
                return
        warnings.warn(
            f"the result database {without_password(uri)} has schema {schema}, which is not known here; it is read "
            "through MLflow, which takes longer",
            stacklevel=4,
        )
    yield _Client(open_store(uri))


@contextlib.contextmanager
def _sqlite(path: Path) -> Iterator[Execute]:
    """Open an SQLite file read-only with the standard library: importing SQLAlchemy takes longer than a query."""
    check_exists(path)
    try:
        with contextlib.closing(sqlite3.connect(f"{readable(path).as_uri()}?mode=ro", uri=True)) as connection:
            connection.execute("PRAGMA cache_size = -64000")  # kB; with the default of 2 MB curves are sorted on disk
            connection.execute("BEGIN")  # all queries see the same state
            yield lambda query, values: connection.execute(query, values).fetchall()
    except sqlite3.Error as error:
        raise sqlite_error(error)(f"cannot read the result database {path}: {error}") from None


@contextlib.contextmanager
def _postgresql(uri: str) -> Iterator[Execute]:
    from sqlalchemy import NullPool, create_engine, text
    from sqlalchemy.exc import OperationalError, SQLAlchemyError

    try:
        engine = create_engine(uri, poolclass=NullPool)
        options = {"postgresql_readonly": True, "isolation_level": "REPEATABLE READ"}  # all queries see the same state
        with engine.connect().execution_options(**options) as connection:
            yield lambda query, values: list(connection.execute(text(query), values))
    except (SQLAlchemyError, ImportError) as error:  # ImportError: the driver is not installed
        reason = in_one_line(getattr(error, "orig", error))
        kind = StoreAwayError if isinstance(error, OperationalError) else StoreError
        raise kind(f"cannot read the result database {without_password(uri)}: {reason}") from None


def _check_tasks(tasks: Sequence[str], experiments: Sequence[_Experiment]) -> None:
    known = sorted({*script_tasks(), *(experiment.owner for experiment in experiments if experiment.owner)})
    for task in tasks:
        if task not in known:
            raise UnknownTaskError(not_one_of(task, known))


def _experiments(reader: _Database | _Client, tasks: Sequence[str]) -> list[_Experiment]:
    prefix = own_prefix()
    everyone = [experiment for experiment in reader.experiments() if (experiment.prefix or "") == prefix]
    _check_tasks(tasks, everyone)
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
    with _reader(tracking_uri) as reader:
        found = reader.artifacts(run_id)
        if found is None:
            raise StoreError(f"there is no run {run_id} in {reader.label}")
        uri, experiment = found
        return _current(uri, _moves([experiment], reader.database))


def _moves(experiments: Sequence[_Experiment], database: Path | None) -> dict[Path, Path]:
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
