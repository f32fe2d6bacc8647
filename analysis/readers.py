"""Two readers of a result database that give the same rows.

SQLite and PostgreSQL are read in SQL, which avoids the 2 s of importing mlflow. Tracking servers, and databases with
an unknown schema, are read through MLflow's client.
"""

import contextlib
import difflib
import math
import sqlite3
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tracking import Store, StoreError, UnknownTaskError, check_uri, open_store
from tracking.commands import not_one_of, script_tasks
from tracking.errors import StoreAwayError, in_one_line, sqlite_error, without_password
from tracking.keys import EPOCH_METRICS, FINAL_METRICS, PARAMS, PARENT, PREFIX, TAGS, TASK
from tracking.keys import UNTAGGED_EXPERIMENTS as UNTAGGED
from tracking.schema import why_unusable
from tracking.sqlite import check_exists, readable, sqlite_path
from tracking.store import all_pages

if TYPE_CHECKING:
    from mlflow.entities import Experiment as MlflowExperiment
    from mlflow.entities import Run as MlflowRun

SCHEMA = "dc11669786a5"  # alembic version of mlflow 3.17.2's databases, for which the SQL below is written
# fields of Experiment in SQL
EXPERIMENT = "e.experiment_id, e.name, e.lifecycle_stage, e.artifact_location, t.value, o.value"
_TAG = "LEFT JOIN experiment_tags {0} ON {0}.experiment_id = e.experiment_id AND {0}.key = '{1}'"
_EXPERIMENTS = f"experiments e {_TAG.format('t', TASK)} {_TAG.format('o', PREFIX)}"
RUN_COLUMNS = (
    "run_id", "parent_id", "status", "start_time", "end_time", "artifact_uri", *TAGS, *PARAMS, *FINAL_METRICS,
)  # fmt: skip
NAN = -math.inf  # stands for a logged NaN: SQL's MAX prefers any number to it, and MLflow never stores infinity

Row = tuple[Any, ...]
Execute = Callable[[str, dict[str, Any]], list[Row]]


class Experiment(NamedTuple):
    """An experiment of MLflow."""

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


class Database:
    """An SQLite or PostgreSQL database with a known schema, open for reading. Rows come in any order."""

    def __init__(self, execute: Execute, label: str, database: Path | None) -> None:
        self.execute = execute
        self.label = label
        self.database = database

    def experiments(self) -> list[Experiment]:
        """Read all experiments, including deleted ones."""
        rows = self.execute(f"SELECT {EXPERIMENT} FROM {_EXPERIMENTS} WHERE e.workspace = 'default'", {})
        return [Experiment(*row) for row in rows]

    def runs(self, experiments: Sequence[Experiment], parent_id: str | None) -> list[Row]:
        """Read the RUN_COLUMNS of active children, as stored."""
        columns = [
            *("r.run_uuid", "p.value", "r.status", "r.start_time", "r.end_time", "r.artifact_uri"),
            *(_value("tags", key) for key in TAGS),
            *(_value("params", key) for key in PARAMS),
            *(_value("latest_metrics", key, "AND NOT is_nan") for key in FINAL_METRICS),
        ]
        query = _children(experiments, columns)
        return self.execute(f"{query} AND p.value = :parent" if parent_id else query, {"parent": parent_id})

    def curves(self, experiments: Sequence[Experiment]) -> tuple[list[Row], list[Row]]:
        """Read start time, run, task, model and split of active children, and the EPOCH_METRICS of their epochs."""
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

    def artifacts(self, run_id: str) -> tuple[str, Experiment] | None:
        """Look up a run's artifact URI and its experiment."""
        query = f"""
            SELECT r.artifact_uri, {EXPERIMENT} FROM {_EXPERIMENTS} JOIN runs r ON e.experiment_id = r.experiment_id
            WHERE r.run_uuid = :run_id"""
        for uri, *experiment in self.execute(query, {"run_id": run_id}):
            return uri, Experiment(*experiment)
        return None


def _children(experiments: Sequence[Experiment], columns: Sequence[str]) -> str:
    ids = ", ".join(str(experiment.id) for experiment in experiments)
    return f"""
        SELECT {", ".join(columns)}
        FROM runs r JOIN tags p ON p.run_uuid = r.run_uuid AND p.key = '{PARENT}'
        JOIN tags f ON f.run_uuid = r.run_uuid AND f.key = 'fingerprint'  -- else it is a stranger's
        WHERE r.experiment_id IN ({ids}) AND r.lifecycle_stage = 'active'"""


def _value(table: str, key: str, condition: str = "") -> str:
    """SQL for one value of a run. A look-up by primary key is faster than fetching all rows and pivoting them."""
    return f"(SELECT value FROM {table} WHERE run_uuid = r.run_uuid AND key = '{key}' {condition}) AS \"{key}\""


class Client:
    """Any store, read through MLflow's client; the methods are those of `Database`."""

    def __init__(self, store: Store) -> None:
        self.client = store.client
        self.label = store.label
        self.database = store.database

    def experiments(self) -> list[Experiment]:
        """See `Database`."""
        from mlflow.entities import ViewType

        return [_experiment(experiment) for experiment in self.client.search_experiments(ViewType.ALL)]

    def runs(self, experiments: Sequence[Experiment], parent_id: str | None) -> list[Row]:
        """See `Database`."""
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

    def curves(self, experiments: Sequence[Experiment]) -> tuple[list[Row], list[Row]]:
        """See `Database`."""
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

    def artifacts(self, run_id: str) -> tuple[str, Experiment] | None:
        """See `Database`."""
        from mlflow.exceptions import MlflowException

        try:
            info = self.client.get_run(run_id).info
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        return info.artifact_uri, _experiment(self.client.get_experiment(info.experiment_id))

    def _children(self, experiments: Sequence[Experiment], condition: str = "") -> "Iterator[MlflowRun]":
        ids = [experiment.id for experiment in experiments]
        runs = all_pages(lambda token: self.client.search_runs(ids, condition, max_results=1000, page_token=token))
        return (run for run in runs if {PARENT, "fingerprint"} <= run.data.tags.keys())  # else a stranger's


def _experiment(entity: "MlflowExperiment") -> Experiment:
    tags = entity.tags.get(TASK), entity.tags.get(PREFIX)
    return Experiment(entity.experiment_id, entity.name, entity.lifecycle_stage, entity.artifact_location, *tags)


@contextlib.contextmanager
def open_reader(tracking_uri: str | None, tasks: Sequence[str] = ()) -> Iterator[Database | Client]:
    """Open the reader that suits a store; `tasks` are checked where there is no database yet."""
    uri = check_uri(tracking_uri)
    database = sqlite_path(uri)
    if database and not database.exists():  # of a misspelt script it is the lesser error; other names may be folders'
        check_tasks([task for task in tasks if difflib.get_close_matches(task, script_tasks(), 1)], [])
    if uri.startswith(("sqlite:", "postgresql")):
        with _sqlite(database) if database else _postgresql(uri) as execute:
            [[schema]] = execute("SELECT MAX(version_num) FROM alembic_version", {})
            if schema != SCHEMA and (problem := why_unusable(schema, without_password(uri))):
                raise StoreError(problem)
            if schema == SCHEMA:
                yield Database(execute, without_password(uri), database)
                return
        warnings.warn(
            f"the result database {without_password(uri)} has schema {schema}, which is not known here; it is read "
            "through MLflow, which takes longer",
            stacklevel=4,
        )
    yield Client(open_store(uri))


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


def check_tasks(tasks: Sequence[str], experiments: Sequence[Experiment]) -> None:
    """Raise an `UnknownTaskError` for a task that has neither a script nor an experiment."""
    known = sorted({*script_tasks(), *(experiment.owner for experiment in experiments if experiment.owner)})
    for task in tasks:
        if task not in known:
            raise UnknownTaskError(not_one_of(task, known))
