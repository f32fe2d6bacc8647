"""Opening the result database: SQLite beside its artifacts by default, or any MLflow tracking URI."""

import contextlib
import logging
import os
import re
import shlex
import sqlite3
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from filelock import FileLock

from tracking import schema
from tracking.errors import StoreAwayError, StoreError, in_one_line, root_cause, without_password
from tracking.keys import NOTE, PREFIX, TASK, UNTAGGED_EXPERIMENTS, VIEW, VIEWS
from tracking.process import host, this_process
from tracking.sqlite import check_exists, check_sqlite, readable, sqlite_path, state_folder
from tracking.view import shared_view

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment as MlflowExperiment
    from mlflow.store.entities import PagedList

T = TypeVar("T")
MLRUNS = Path(__file__).resolve().parent.parent / "mlruns"
SCRATCH = "scratch-"  # prefix of folders in a store's state folder; process id and host follow
UI_ADDRESS = "http://127.0.0.1:5000"  # of `make ui` on the default store
OF_TRAINING = "workflowType=machine_learning"  # in a link; without it the UI opens on a page of language models
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # tracking.outages retries and says so; MLflow is silent for four minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",  # seconds
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",  # with a server, it would print between our own lines
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # files go through the server: clients may have no access to its S3
    "MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD": "false",
    "MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD": "false",
}


def prepare_environment() -> None:
    """Set the variables of MLflow that the user has not set."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


prepare_environment()  # before anything imports MLflow, also in worker processes


def own_prefix() -> str:
    """Return EXPERIMENT_PREFIX: of all experiments and registered models, those that begin with it are used.

    It keeps people who share a store apart. Without it those without a prefix are used.
    """
    prefix = os.environ.get("EXPERIMENT_PREFIX", "")
    if not re.fullmatch(r"\w{0,40}", prefix):  # no hyphen, which ends it in names
        raise StoreError(f"EXPERIMENT_PREFIX is {prefix!r}; it has at most 40 letters, digits and _")
    return prefix


def prefixed(name: str) -> str:
    """Return the name of an experiment or of a registered model in the store."""
    return f"{prefix}-{name}" if (prefix := own_prefix()) else name


@dataclass(frozen=True)
class Store:
    """An open result database."""

    uri: str  # absolute MLflow tracking URI
    client: "MlflowClient"
    state: Path  # folder of locks, resume files, journal and scratch folders: beside a SQLite file, else in mlruns/
    command: str  # process (`this_process`) of the command that this process works for, maybe on another machine

    @property
    def label(self) -> str:
        """The URI without a password."""
        return without_password(self.uri)

    @property
    def database(self) -> Path | None:
        """The SQLite file, or None for a server."""
        return sqlite_path(self.uri)

    def lock(self) -> FileLock:
        """Lock the store for the other processes of this machine."""
        return _lock(self.state)

    def scratch(self) -> "tempfile.TemporaryDirectory[str]":
        """Make a temporary folder whose name tells its process, so that strays are recognised."""
        place: Path | None = self.state
        try:
            self.state.mkdir(parents=True, exist_ok=True)
        except OSError:
            place = None
        if place and not os.access(place, os.W_OK):
            place = None  # the store is write-protected
        return tempfile.TemporaryDirectory(prefix=f"{SCRATCH}{os.getpid()}@{host()}@", dir=place)

    @property
    def ui_command(self) -> str:
        """The command that serves the UI on this store; empty for a server."""
        if self.uri.startswith("http"):
            return ""
        return f"python -m tracking ui{self.option}" if self.option else "make ui"

    @property
    def option(self) -> str:
        """The option that names this store, with a leading space; empty for the default store."""
        return "" if self.database == MLRUNS / "mlflow.db" else f" --tracking-uri {shlex.quote(self.label)}"

    def experiment_id(self, task: str) -> str | None:
        """Return the id of a task's experiment; see `experiment`."""
        experiment = self.experiment(task)
        return None if experiment is None else str(experiment.experiment_id)

    def experiment(self, task: str) -> "MlflowExperiment | None":
        """Look up the experiment of a task; None if there is none. A deleted one raises a `StoreError`."""
        from mlflow.entities import ViewType

        prefix = own_prefix()
        tagged = self.client.search_experiments(ViewType.ALL, filter_string=f"tags.`{TASK}` = '{task}'")
        found = [experiment for experiment in tagged if experiment.tags.get(PREFIX, "") == prefix]
        untagged = [name for name, of in UNTAGGED_EXPERIMENTS.items() if of == task and not prefix]
        named = map(self.client.get_experiment_by_name, untagged)
        found += [experiment for experiment in named if experiment is not None and TASK not in experiment.tags]
        active = [experiment for experiment in found if experiment.lifecycle_stage == "active"]
        if found and not active:
            raise StoreError(deleted_sentence(found[0].name, found[0].experiment_id, self.label))
        return active[0] if active else None

    def tasks(self) -> list[str]:
        """Sorted names of the tasks that have an active experiment."""
        everyones = all_pages(lambda token: self.client.search_experiments(page_token=token))
        experiments = [e for e in everyones if e.tags.get(PREFIX, "") == own_prefix()]
        owners = (e.tags.get(TASK) or UNTAGGED_EXPERIMENTS.get(e.name) for e in experiments)
        return sorted({owner for owner in owners if owner})

    def make_experiment(self, task: str, name: str = "") -> str:
        """Return the id of a task's experiment, making it if it is missing. Its name defaults to the task's."""
        existing = self.experiment_id(task)
        if existing is not None:
            return existing
        name = name or next((name for name, owner in UNTAGGED_EXPERIMENTS.items() if owner == task), task)
        name = prefixed(name)
        if self.database is None:
            # a server chooses the place; for a bare database MLflow would use the working directory
            place = None if self.uri.startswith("http") else (MLRUNS / "artifacts" / name).as_uri()
            return self._create_experiment(task, name, place)
        with self.lock():  # two processes may come here at once
            # absolute, since a relative location is resolved against each reader's working directory
            place = (self.database.parent / "artifacts" / name).as_uri()
            return self.experiment_id(task) or self._create_experiment(task, name, place)

    def _create_experiment(self, task: str, name: str, place: str | None) -> str:
        from mlflow.exceptions import MlflowException

        tags = {TASK: task} | ({PREFIX: prefix} if (prefix := own_prefix()) else {})
        try:
            return str(self.client.create_experiment(name, artifact_location=place, tags=tags))
        except MlflowException:
            if made := self.experiment_id(task):  # by another process in the meantime
                return made
            if self.client.get_experiment_by_name(name) is None:
                raise
            raise StoreError(
                f"{self.label} has an experiment {name!r} that does not belong to {task}; give the task another "
                "experiment name"
            ) from None

    def describe_experiment(self, task: str, description: str) -> None:
        """Set a task's tag, the view that `runs_link` opens, and a description unless there is one."""
        experiment = self.client.get_experiment(self.make_experiment(task))
        tags = {TASK: task, NOTE: experiment.tags.get(NOTE, description), VIEWS + VIEW: shared_view()}
        for key, value in tags.items():
            if experiment.tags.get(key) != value:
                self.client.set_experiment_tag(experiment.experiment_id, key, value)

    def runs_link(self, task: str, address: str = UI_ADDRESS) -> str:
        """Return the link to a task's runs in the UI, which is served at `address` unless the store is a server."""
        experiment = self.experiment(task)
        # the UI opens another page if the view is missing
        has_view = experiment is not None and VIEWS + VIEW in experiment.tags
        view = f"&viewStateShareKey={VIEW}" if has_view else ""
        return f"{self._runs_page(experiment, address)}?{OF_TRAINING}{view}"

    def run_links(self, task: str, run_ids: Iterable[str], address: str = UI_ADDRESS) -> dict[str, str]:
        """Return the link to each run, by its id; see `runs_link`."""
        base = self._runs_page(self.experiment(task), address)
        return {run_id: f"{base}/{run_id}?{OF_TRAINING}" for run_id in run_ids}

    def _runs_page(self, experiment: "MlflowExperiment | None", address: str) -> str:
        base = self.label.rstrip("/") if self.uri.startswith("http") else address
        return f"{base}/#/experiments/{experiment and experiment.experiment_id}/runs"


def all_pages(search: "Callable[[str | None], PagedList[T]]") -> "Iterator[T]":
    """Yield all results of a paged search of MLflow; `search` returns the page of a token, None for the first."""
    token: str | None = None
    while token != "":
        page = search(token)
        yield from page
        token = page.token or ""


def deleted_sentence(name: str, experiment_id: object, label: str) -> str:
    """Say that an experiment was deleted, and how to get it back: the UI of MLflow restores runs only."""
    command = f"MLFLOW_TRACKING_URI={shlex.quote(label)} python -m mlflow experiments restore"
    password = " (with the password in place of ***)" if "***" in label else ""
    return (
        f"experiment {name} of {label} was deleted; to restore it{password}: {command} --experiment-id {experiment_id}"
    )


def check_uri(uri: str | None = None) -> str:
    """Return the absolute MLflow tracking URI; a `StoreError` says that it cannot be one, or that nothing answers.

    The default is MLFLOW_TRACKING_URI, or else SQLite in `mlruns/` of this repository.
    """
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{MLRUNS / 'mlflow.db'}"
    if uri.startswith("sqlite"):
        path = sqlite_path(uri)
        if path is None or not uri.removeprefix("sqlite:///").partition("?")[0]:
            raise StoreError(f"--tracking-uri {uri} names no file; write sqlite:///path/to/mlflow.db")
        check_sqlite(path)
        return f"sqlite:///{path}{''.join(uri.partition('?')[1:])}"
    if uri.startswith(("http://", "https://")):
        _check_server(uri)
    elif "://" not in uri or uri.startswith("file:"):
        example = f"sqlite:///{uri.removeprefix('file://')}/mlflow.db"
        raise StoreError(f"--tracking-uri {uri} is a plain folder, which MLflow no longer supports; use {example}")
    return uri


def open_store(
    uri: str | None = None,
    create: bool = False,
    command: str | None = None,
    state: Path | None = None,
    look: bool = True,
) -> Store:
    """Open the result database.

    Parameters
    ----------
    uri : str, optional
        See `check_uri`.
    create : bool
        Make a missing SQLite database.
    command : str, optional
        Of the `Store` of another process for which this one works; a new command unless given.
    state : Path, optional
        Its folder of resume files, likewise; one that this machine cannot use is replaced by its own.
    look : bool
        Check that a server or its database answers.

    Raises
    ------
    StoreError
        It is missing, unusable or, a `StoreAwayError`, away.
    """
    if look or uri is None or uri.startswith("sqlite"):
        uri = check_uri(uri)
    path = sqlite_path(uri)
    if path is not None and not create:
        check_exists(path)
    if (
        path is not None
        and create
        and path.exists()
        and not (os.access(path, os.W_OK) and os.access(path.parent, os.W_OK))
    ):
        raise StoreError(f"cannot write to the result database {path}: it is write-protected; name another one")
    try:
        if path is not None and not path.exists():
            _create_sqlite(path)
        found = _postgresql_schema(uri) if look and uri.startswith("postgresql") else ""
        if found and (problem := schema.why_unusable(found, without_password(uri))):
            raise StoreError(problem)
        client = _client(uri)
        if look:
            client.search_experiments(max_results=1)  # MLflow opens a store at its first use
    except StoreError:
        raise
    except Exception as error:  # noqa: BLE001 - MLflow's, SQLAlchemy's, a missing driver's, OSError
        reason = in_one_line(getattr(error, "orig", None) or error)
        if "out-of-date database schema" in reason:  # MLflow says so of newer schemas, too
            reason = "another version of MLflow made it; install that version, or let the newer one upgrade a copy"
        raise StoreError(f"cannot open the result database {without_password(uri)}: {reason}") from None
    return Store(uri, client, _usable_state(state, uri), command or this_process())


def _postgresql_schema(uri: str) -> str:
    """Return the schema of a PostgreSQL database; empty if it has none yet. MLflow would retry for two minutes."""
    from sqlalchemy import NullPool, create_engine, inspect, text

    with create_engine(uri, poolclass=NullPool).connect() as connection:
        if not inspect(connection).has_table(schema.TABLE):
            return ""
        return str(connection.execute(text(f"SELECT MAX(version_num) FROM {schema.TABLE}")).scalar() or "")


def _usable_state(state: Path | None, uri: str) -> Path:
    own = own_prefix()  # the resume files and the journal of one are not another's
    if state is not None:
        with contextlib.suppress(OSError):
            state.mkdir(parents=True, exist_ok=True)
            return state
    if (database := sqlite_path(uri)) is not None:
        return state_folder(database) / own
    return MLRUNS / f"{re.sub(r'[^A-Za-z0-9]+', '-', without_password(uri)).strip('-')[-80:]}.state" / own


def _client(uri: str) -> "MlflowClient":
    prepare_environment()
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):  # both announce each table
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # it prints the traceback of a raised error
    if (database := sqlite_path(uri)) is not None:
        uri = uri.replace(str(database), str(readable(database)))
    return MlflowClient(uri, registry_uri=uri)


def _lock(state: Path) -> FileLock:
    state.mkdir(parents=True, exist_ok=True)
    return FileLock(state / "store.lock")


def _create_sqlite(path: Path) -> None:
    """Make the database under another name and rename it, so that no process opens an incomplete one.

    WAL mode, which persists in the file, allows readers beside a writer and makes a write three times as fast.
    """
    from sqlalchemy import Engine, event

    opened: list[sqlite3.Connection] = []

    def do_not_sync(connection: sqlite3.Connection, _: object) -> None:
        connection.execute("PRAGMA synchronous=OFF")  # the migrations would sync a thousand times
        opened.append(connection)

    state = state_folder(path)
    with _lock(state):
        if path.exists():  # another process was first
            return
        for stray in state.glob("new.db*"):  # of a killed process
            stray.unlink()
        partial = state / "new.db"
        event.listen(Engine, "connect", do_not_sync)
        try:
            _client(f"sqlite:///{partial}").search_experiments(max_results=1)  # runs all migrations
        finally:
            event.remove(Engine, "connect", do_not_sync)
            for connection in opened:  # MLflow keeps them, and Windows renames no open file
                connection.close()
        connection = sqlite3.connect(partial)
        connection.execute("PRAGMA journal_mode=WAL")
        connection.close()
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.umask(mask := os.umask(0))
        partial.chmod(0o666 & ~mask)  # SQLite takes 0o644, which would lock out a group that works together
        partial.rename(path)


def _check_server(uri: str) -> None:
    """Ask the server once, as MLflow's client asks: with its certificates and its user. MLflow itself would retry."""
    import requests

    certificate, insecure = (os.environ.get(f"MLFLOW_TRACKING_{name}") for name in ("SERVER_CERT_PATH", "INSECURE_TLS"))
    verify: str | bool | None = certificate or (False if insecure and insecure.lower() in ("true", "1") else None)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # urllib3's, of a certificate that the user said not to look at
            client = os.environ.get("MLFLOW_TRACKING_CLIENT_CERT_PATH")
            requests.get(f"{uri.rstrip('/')}/health", timeout=10, verify=verify, cert=client)
    except OSError as error:  # requests'; with any status it answers, and the first call shows what is allowed
        why = f"the tracking server {without_password(uri)} does not answer ({root_cause(error)})"
        if isinstance(error, requests.exceptions.SSLError) or not isinstance(error, requests.RequestException):
            remedy = "name its certificate in MLFLOW_TRACKING_SERVER_CERT_PATH"  # or another file: this one is missing
            raise StoreError(f"{why}; {remedy}") from None
        raise StoreAwayError(f"{why}; start it or name another") from None
