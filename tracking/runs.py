"""Writing runs: a parent for a model under one configuration, a child for each of its splits.

A child is claimed before it is done. What is finished is not done again, what another process does is left to it, and
what was interrupted goes on. The owner's tags tell who does a run, the lock of the store's state folder keeps two
processes of one machine from claiming the same split. Between machines nothing does that in the same second: MLflow has
no operation that compares and sets.
"""

import contextlib
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tracking import owners
from tracking.keys import EPOCH_METRICS, FINAL_METRICS, GROUP_PARAMS, PARAMS, SUMMARY_METRICS, TAGS
from tracking.outages import passes, persist
from tracking.store import SCRATCH, Store, StoreError

if TYPE_CHECKING:
    from mlflow.entities import Run as MlflowRun

EPOCHS_A_CALL = 100  # MLflow takes at most 1,000 metrics in one call
NEXT_ATTEMPT = 10.0  # seconds after which a store that was away is asked again during training
PARENT = "mlflow.parentRunId"


class Run:
    """An open run. Its keys are those of `tracking.keys`; others are refused."""

    def __init__(self, store: Store, run_id: str) -> None:
        self.store = store
        self.id = run_id
        self._sent = 0  # epochs of `log_epochs`
        self._away_until = 0.0

    def log_metrics(self, values: Mapping[str, float], timestamp: int | None = None) -> None:
        """Log metrics in one call. With the same timestamp (ms) a second time changes nothing."""
        from mlflow.entities import Metric

        _check_keys(values, FINAL_METRICS | SUMMARY_METRICS)
        now = timestamp or time.time_ns() // 1_000_000
        metrics = [Metric(key, value, now, 0) for key, value in values.items()]
        persist(lambda: self.store.client.log_batch(self.id, metrics))

    def log_epochs(self, history: Sequence[Mapping[str, Any]], wait: bool = False) -> None:
        """Log the epochs that have not been logged yet, one call for all.

        Parameters
        ----------
        history : sequence of mapping
            All epochs so far: `epoch` from 1, `time` in ms, and `metrics`. A point that the store holds already with
            this time is not doubled (it is MLflow's primary key), so a whole history may be sent again.
        wait : bool
            Wait for a store that is away. Otherwise its epochs are sent with a later one.
        """
        if wait:
            persist(lambda: self._send(history))
        elif time.monotonic() >= self._away_until:
            try:
                self._send(history)
            except Exception as error:  # MLflow's, those of requests
                if not passes(error):
                    raise
                if not self._away_until:
                    print("the result database is away; training goes on, epochs are kept for it", file=sys.stderr)
                self._away_until = time.monotonic() + NEXT_ATTEMPT

    def _send(self, history: Sequence[Mapping[str, Any]]) -> None:
        from mlflow.entities import Metric

        while unsent := history[self._sent :][:EPOCHS_A_CALL]:
            points = [(key, value, entry) for entry in unsent for key, value in entry["metrics"].items()]
            _check_keys((key for key, _, _ in points), EPOCH_METRICS)
            metrics = [Metric(key, value, entry["time"], entry["epoch"]) for key, value, entry in points]
            self.store.client.log_batch(self.id, metrics)
            self._sent += len(unsent)

    def log_files(self, folder: Path, into: str | None = None) -> None:
        """Copy the files of a folder to the run's artifacts, or to a folder in them."""
        persist(lambda: self.store.client.log_artifacts(self.id, str(folder), into))

    def has_files(self, folder: str) -> bool:
        """Whether there are files in a folder of the run's artifacts."""
        return bool(persist(lambda: self.store.client.list_artifacts(self.id, folder)))

    def set_tag(self, key: str, value: str) -> None:
        """Set a tag."""
        _check_keys([key], TAGS)
        persist(lambda: self.store.client.set_tag(self.id, key, value))

    def log_dataset(self, name: str, digest: str, profile: str) -> None:
        """Enter the data set that the run used, with our own digest (MLflow keeps 36 characters of it)."""
        from mlflow.entities import Dataset, DatasetInput

        dataset = Dataset(name, digest[:36], source_type="local", source="{}", profile=profile)
        persist(lambda: self.store.client.log_inputs(self.id, [DatasetInput(dataset, tags=[])]))


class Parent(Run):
    """A model under one configuration, which may be worked on by several processes."""

    def __init__(self, store: Store, found: "MlflowRun") -> None:
        super().__init__(store, found.info.run_id)
        self.experiment: str = found.info.experiment_id
        self.status: str = found.info.status
        self.metrics: dict[str, float] = found.data.metrics
        self.begun = False
        self.failure = ""  # to be set where splits have no result

    def begin(self) -> None:
        """Say that this process works on it."""
        if not self.begun:
            persist(lambda: _take(self.store, self.id))
            self.begun = True

    def end(self, status: str, reason: str = "") -> None:
        """Give it an end, unless another process still does one of its splits."""
        children = self.store.client.search_runs(
            [self.experiment], f"tags.`{PARENT}` = '{self.id}' and status = 'RUNNING'"
        )
        if any(owners.is_alive(child.data.tags) for child in children):
            return
        if self.begun or self.status != "FINISHED":  # else it is as another command left it
            _end(self.store, self.id, status, reason)


@contextlib.contextmanager
def parent_run(
    store: Store, task: str, name: str, params: Mapping[str, Any], tags: Mapping[str, str]
) -> Iterator[Parent]:
    """Open the parent with this fingerprint, or make it; it ends as the body of the `with` does.

    Parameters
    ----------
    store : Store
    task : str
        Key of `EXPERIMENTS`.
    name : str
        The run's name in the UI.
    params, tags : mapping
        `tags` has the fingerprint.

    Yields
    ------
    Parent
    """
    experiment = persist(lambda: store.make_experiment(task))

    def find_or_make() -> "MlflowRun":
        with store.lock():
            same = f"tags.fingerprint = '{tags['fingerprint']}'"
            for found in store.client.search_runs([experiment], same):
                if PARENT not in found.data.tags:
                    _complete(store, found, params)
                    return found
            return _create(store, experiment, name, params, tags)

    parent = Parent(store, persist(find_or_make))
    try:
        yield parent
        persist(lambda: parent.end("FAILED" if parent.failure else "FINISHED", parent.failure))
    except BaseException as error:
        with contextlib.suppress(Exception):  # the store itself may be what failed
            parent.end(*_what_ended_it(error))
        raise


@dataclass(frozen=True)
class Claim:
    """Who does a split.

    Attributes
    ----------
    run : Run or None
        Ours to do; None where it is finished, or another process does it.
    owner : str
        That process, in words.
    resume_file : pathlib.Path
        Where the run's state is kept until it is finished.
    saved : dict or None
        What the resume file holds, for a run that goes on.
    """

    run: Run | None
    owner: str
    resume_file: Path
    saved: dict[str, Any] | None = None


def claim(parent: Parent, name: str, params: Mapping[str, Any], tags: Mapping[str, str], fresh: bool = False) -> Claim:
    """Claim the split of a model with this fingerprint, in the run that was interrupted or in a new one.

    Parameters
    ----------
    parent : Parent
    name : str
        The run's name in the UI.
    params, tags : mapping
        The parent's, with the split's own.
    fresh : bool
        Begin a new run even where one is finished or can go on. What is finished counts until the new one is.

    Returns
    -------
    Claim
    """
    from tracking.checkpoints import load_resume_file  # imports torch

    store = parent.store
    resume_file = store.state / f"{tags['fingerprint']}.resume"

    def decide() -> Claim:
        with store.lock():
            runs = store.client.search_runs([parent.experiment], f"tags.fingerprint = '{tags['fingerprint']}'")
            for run in runs:
                if (
                    run.info.status == "RUNNING"
                    and owners.is_alive(run.data.tags)
                    and not owners.is_mine(run.data.tags)
                ):
                    return Claim(None, owners.describe(run.data.tags), resume_file)
            ids = {run.info.run_id for run in runs}
            done = [run for run in runs if run.info.status == "FINISHED"]
            current = [run for run in done if run.data.tags.get("superseded_by") not in ids]
            if fresh or current:
                resume_file.unlink(missing_ok=True)
            if current and not fresh:
                if "superseded_by" in current[0].data.tags:  # by other code, before this came back
                    _supersede_others(store, current[0])
                return Claim(None, "", resume_file)
            saved = load_resume_file(resume_file)
            open_runs = [] if fresh else [run for run in runs if run not in done]  # newest first
            going_on = [run for run in open_runs if _logged(store, run.info.run_id) <= _epochs(saved)]
            if going_on:
                _complete(store, going_on[0], params)
                _take(store, going_on[0].info.run_id)
                return Claim(Run(store, going_on[0].info.run_id), "", resume_file, saved)
            run = _create(store, parent.experiment, name, params, {**tags, PARENT: parent.id})
            for older in done:
                store.client.set_tag(older.info.run_id, "superseded_by", run.info.run_id)
            return Claim(Run(store, run.info.run_id), "", resume_file, saved)

    return persist(decide)


@contextlib.contextmanager
def child_run(claimed: Claim) -> Iterator[Run]:
    """Do the run that was claimed; when it has finished, older runs of its split in its comparison group are marked.

    Yields
    ------
    Run
    """
    run = claimed.run
    if run is None:
        raise ValueError("only a run of one's own can be done")
    store = run.store
    try:
        with owners.heartbeat(store, run.id):
            yield run
            persist(lambda: _supersede_others(store, store.client.get_run(run.id)))
            persist(lambda: _end(store, run.id, "FINISHED"))
    except BaseException as error:
        with contextlib.suppress(Exception):  # the store itself may be what failed
            _end(store, run.id, *_what_ended_it(error))
        raise
    claimed.resume_file.unlink(missing_ok=True)


def close_dead_runs(store: Store, task: str) -> None:
    """Give an end to the runs of a task whose process is gone, and remove what such processes left in scratch.

    Runs that a process is at work on, here or on another machine, are left alone.
    """
    experiment = store.experiment_id(task)
    if experiment is None:
        return
    with store.lock():
        running = [
            run
            for run in store.client.search_runs([experiment], "status = 'RUNNING'")
            if "fingerprint" in run.data.tags
        ]
        alive = [run for run in running if owners.is_alive(run.data.tags)]
        needed = {run.info.run_id for run in alive} | {run.data.tags.get(PARENT) for run in alive}
        for run in running:
            if run.info.run_id not in needed:
                _end(store, run.info.run_id, "KILLED", "its process ended without a word")
        for folder in store.state.glob(f"{SCRATCH}*"):
            if not owners.is_running(int(folder.name.removeprefix(SCRATCH).split("-")[0])):
                shutil.rmtree(folder, ignore_errors=True)


def _epochs(saved: Mapping[str, Any] | None) -> set[tuple[int, int]]:
    return {(entry["epoch"], entry["time"]) for entry in saved["history"]} if saved else set()


def _logged(store: Store, run_id: str) -> set[tuple[int, int]]:
    """Epochs that a run has logged, with their times: more than the resume file has where that is not its own."""
    history = store.client.get_metric_history(run_id, "val/loss")
    return {(point.step, point.timestamp) for point in history}


def _create(
    store: Store, experiment: str, name: str, params: Mapping[str, Any], tags: Mapping[str, str]
) -> "MlflowRun":
    _check_keys(params, PARAMS)
    _check_keys((tag for tag in tags if not tag.startswith("mlflow.")), TAGS)
    run = store.client.create_run(experiment, tags={**tags, **owners.signs_of_life()}, run_name=name)
    _complete(store, run, params)
    return run


def _complete(store: Store, run: "MlflowRun", params: Mapping[str, Any]) -> None:
    """Log the params that a run lacks: all of a new one, none but of one that was killed as it began."""
    from mlflow.entities import Param

    if missing := [Param(key, str(value)) for key, value in params.items() if key not in run.data.params]:
        store.client.log_batch(run.info.run_id, params=missing)


def _take(store: Store, run_id: str) -> None:
    """Make a run that had ended this process's."""
    from mlflow.entities import RunTag

    tags = [RunTag(key, value) for key, value in owners.signs_of_life().items()]
    store.client.log_batch(run_id, tags=tags)
    store.client.update_run(run_id, status="RUNNING")
    _explain(store, run_id, "")


def _end(store: Store, run_id: str, status: str, reason: str = "") -> None:
    _explain(store, run_id, reason)
    store.client.set_terminated(run_id, status)


def _explain(store: Store, run_id: str, reason: str) -> None:
    """Say why a run has no result, or no longer."""
    if reason:
        store.client.set_tag(run_id, "failure", reason[:500])
    elif "failure" in store.client.get_run(run_id).data.tags:
        store.client.delete_tag(run_id, "failure")


def _what_ended_it(error: BaseException) -> tuple[str, str]:
    """Status and reason: KILLED on Ctrl-C, FAILED on anything else."""
    return ("KILLED", "interrupted") if isinstance(error, KeyboardInterrupt) else ("FAILED", str(error) or repr(error))


def _supersede_others(store: Store, run: "MlflowRun") -> None:
    """Mark the finished runs of the same split of the same model in the same comparison group, and unmark this one."""
    params, tags = run.data.params, run.data.tags
    same = " and ".join(f"params.{key} = '{params[key]}'" for key in ("model", "split", *GROUP_PARAMS))
    query = f"{same} and tags.dataset_digest = '{tags['dataset_digest']}' and status = 'FINISHED'"
    for other in store.client.search_runs([run.info.experiment_id], query):
        kind, own_kind = (each.data.params["device"].split(":")[0] for each in (other, run))
        if other.info.run_id != run.info.run_id and kind == own_kind and "superseded_by" not in other.data.tags:
            store.client.set_tag(other.info.run_id, "superseded_by", run.info.run_id)
    if "superseded_by" in tags:
        store.client.delete_tag(run.info.run_id, "superseded_by")


def _check_keys(keys: Any, known: Mapping[str, str]) -> None:
    if unknown := set(keys) - set(known):
        raise StoreError(f"{', '.join(sorted(unknown))} not in tracking.keys; enter them there with their meaning")
