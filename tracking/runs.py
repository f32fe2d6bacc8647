"""Writing runs: a parent for a model under one configuration, and a child for each of its splits."""

import contextlib
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tracking import keys, owners
from tracking.artifacts import Artifacts
from tracking.errors import StoreError, in_one_line
from tracking.outages import impatient, passes, persist
from tracking.process import host
from tracking.settings import LATER, kind_of
from tracking.store import SCRATCH, Store

if TYPE_CHECKING:
    from mlflow.entities import Run as MlflowRun

T = TypeVar("T")
EPOCHS_A_CALL = 100  # MLflow takes at most 1,000 metrics in one call
NEXT_ATTEMPT = 10.0  # seconds, at least, between two calls to a store that is away during training


class Run:
    """An open run. Keys that are not in `tracking.keys` are refused."""

    def __init__(self, store: Store, run_id: str, patience: float | None = None) -> None:
        self.store = store
        self.id = run_id  # empty for a run that was begun while the store was away
        self.patience = patience  # seconds to wait for a store that is away (`persist`)
        self.in_journal = False  # whether the journal has the results, and therefore ends the run
        self.pauses = False  # whether it is a trial that waits for the others at its rung
        self._sent = 0  # epochs of `log_epochs`
        self._away_until = 0.0

    def _persist(self, action: Callable[[], T]) -> T:
        return persist(action, self.patience)

    def log_metrics(self, values: Mapping[str, float], timestamp: int | None = None) -> None:
        """Log metrics in one call. Repeating it with the same timestamp (ms) changes nothing."""
        from mlflow.entities import Metric

        _check_keys(values, keys.FINAL_METRICS | keys.SUMMARY_METRICS)
        now = timestamp or time.time_ns() // 1_000_000
        metrics = [Metric(key, value, now, 0) for key, value in values.items()]
        self._persist(lambda: self.store.client.log_batch(self.id, metrics))

    def log_epochs(self, history: Sequence[Mapping[str, Any]], wait: bool = False) -> None:
        """Log the new epochs of a history of all epochs: `epoch` from 1, `time` in ms, and `metrics`.

        Sending an epoch twice adds no points, since the time is part of MLflow's primary key. Unless `wait` is true, a
        store that is away gets the epochs with a later one.
        """
        if wait:
            self._persist(lambda: self._send(history))
        elif self.id and (started := time.monotonic()) >= self._away_until:
            try:
                self._send(history)
            except Exception as error:  # MLflow's, those of requests
                if not passes(error):
                    raise
                if not self._away_until:
                    print("the result database is away; training goes on, epochs are kept for it", file=sys.stderr)
                now = time.monotonic()
                self._away_until = now + max(NEXT_ATTEMPT, 5 * (now - started))  # failing may take long

    def _send(self, history: Sequence[Mapping[str, Any]]) -> None:
        from mlflow.entities import Metric

        while unsent := history[self._sent :][:EPOCHS_A_CALL]:
            points = [(key, value, entry) for entry in unsent for key, value in entry["metrics"].items()]
            _check_keys((key for key, _, _ in points), keys.EPOCH_METRICS)
            # the epoch as step: of equal steps and times the largest is "latest" (findings/mlflow_latest_metric.sh)
            metrics = [Metric(key, value, entry["time"], entry["epoch"]) for key, value, entry in points]
            self.store.client.log_batch(self.id, metrics)
            self._sent += len(unsent)

    def log_files(self, folder: Path, into: str = "") -> None:
        """Copy the files of a folder to the run's artifacts, or to a folder in them."""

        def upload() -> None:
            run = self.store.client.get_run(self.id)
            experiment = self.store.client.get_experiment(run.info.experiment_id)
            Artifacts(self.store, experiment).upload(run, folder, into)

        self._persist(upload)

    def tag(self, key: str) -> str | None:
        """Read a tag; None if it is missing."""
        value: str | None = self._persist(lambda: self.store.client.get_run(self.id)).data.tags.get(key)
        return value

    def set_tag(self, key: str, value: str) -> None:
        """Set a tag."""
        _check_keys([key], keys.TAGS)
        self._persist(lambda: self.store.client.set_tag(self.id, key, value))

    def log_dataset(self, name: str, digest: str, profile: str) -> None:
        """Enter the run's data set under our own digest, of which MLflow keeps 36 characters."""
        from mlflow.entities import Dataset, DatasetInput

        dataset = Dataset(name, digest[:36], source_type="local", source="{}", profile=profile)
        self._persist(lambda: self.store.client.log_inputs(self.id, [DatasetInput(dataset, tags=[])]))

    def finish(self) -> None:
        """End the run, and mark older runs of its split in its comparison group as superseded."""
        self._persist(lambda: supersede_others(self.store, self.store.client.get_run(self.id)))
        self._persist(lambda: end_run(self.store, self.id, "FINISHED"))


class Parent(Run):
    """A model under one configuration; several processes may work on it."""

    def __init__(
        self, store: Store, run_id: str, experiment: str, status: str = "", metrics: Mapping[str, float] | None = None
    ) -> None:
        super().__init__(store, run_id)
        self.experiment = experiment
        self.status = status
        self.metrics = dict(metrics or {})  # the latest
        self.begun = self.ended = False

    def begin(self) -> None:
        """Make this command its owner."""
        if not self.begun:
            persist(lambda: reopen(self.store, self.id, {}))
            self.begun = True

    def end(self, status: str, reason: str = "") -> None:
        """End the run, unless another command still works on one of its splits."""
        query = f"tags.`{keys.PARENT}` = '{self.id}' and status = 'RUNNING'"

        def end_unless_shared() -> None:
            children = self.store.client.search_runs([self.experiment], query)
            shared = any(owners.is_others(child.data.tags, self.store.command) for child in children)
            if not shared and (self.begun or self.status != "FINISHED"):  # else another command ended it
                end_run(self.store, self.id, status, reason)

        self._persist(end_unless_shared)
        self.ended = True


@contextlib.contextmanager
def parent_run(
    store: Store, task: str, name: str, params: Mapping[str, Any], tags: Mapping[str, str]
) -> Iterator[Parent]:
    """Open the run of a model, or make it; it ends as the body of the `with` does.

    Parameters
    ----------
    store : Store
    task, name : str
        The experiment, and the name of a new run.
    params, tags : mapping
        What is logged to it. The tag `fingerprint` tells the run.

    Yields
    ------
    Parent
    """
    experiment = persist(lambda: store.make_experiment(task))

    def find_or_make() -> "MlflowRun":
        with store.lock():
            alike = with_fingerprint(store, experiment, tags["fingerprint"])
            found = next((run for run in alike if keys.PARENT not in run.data.tags), None)
            run = found or store.client.get_run(create_run(store, experiment, name, tags))
            log_missing_params(store, run, params)
            return run

    found = persist(find_or_make)
    parent = Parent(store, found.info.run_id, experiment, found.info.status, found.data.metrics)
    try:
        yield parent
        if not parent.ended:
            parent.end("FINISHED")
    except BaseException as error:
        if not parent.ended:
            with contextlib.suppress(Exception), impatient():  # the store itself may have failed
                parent.end(*status_and_reason(error))
        raise


def with_fingerprint(store: Store, experiment: str, fingerprint: str, condition: str = "") -> "list[MlflowRun]":
    """All runs of a split, or of a parent, newest first."""
    return list(store.client.search_runs([experiment], f"tags.fingerprint = '{fingerprint}'{condition}"))


def is_trial(tags: Mapping[str, str]) -> bool:
    """Whether a run is a trial."""
    return tags.get("task", "").endswith(keys.TRIALS)


def close_dead_runs(
    store: Store, task: str, reason: str = "its process ended without a word", mine: bool = False
) -> None:
    """End the runs of a task whose process is gone, and remove the scratch folders of such processes.

    Runs of living processes, here or on another machine, are left alone. With `mine`, no process of this command works
    on a split any more.
    """

    def is_at_work(run: "MlflowRun") -> bool:
        ended = mine and keys.PARENT in run.data.tags and run.data.tags.get("command") == store.command
        return owners.is_alive(run.data.tags) and not ended

    found_experiments = [store.experiment_id(name) for name in (task, keys.trials_of(task))]
    experiments = [experiment for experiment in found_experiments if experiment is not None]
    if not experiments:
        return
    with store.lock():
        found = store.client.search_runs(experiments, "status = 'RUNNING'")
        running = [run for run in found if "fingerprint" in run.data.tags]
        parents = {run.info.run_id: run.data.tags.get(keys.PARENT) for run in running}
        needed: set[str | None] = set()
        for run in filter(is_at_work, running):  # and the runs that it is a part of
            run_id: str | None = run.info.run_id
            while run_id is not None:
                needed.add(run_id)
                run_id = parents.get(run_id)
        for run in running:
            if run.info.run_id not in needed:
                end_run(store, run.info.run_id, "KILLED", reason)
        for folder in store.state.glob(f"{SCRATCH}*"):
            pid, machine, _ = folder.name.removeprefix(SCRATCH).split("@")
            if machine == host() and not owners.is_running(int(pid)):
                shutil.rmtree(folder, ignore_errors=True)


def create_run(store: Store, experiment: str, name: str, tags: Mapping[str, str]) -> str:
    """Create a run that this process owns, and return its id."""
    _check_keys((tag for tag in tags if not tag.startswith("mlflow.")), keys.TAGS)
    tags = {keys.USER: owners.user(store.uri.startswith("http")), **tags, **owners.signs_of_life(store.command)}
    run = store.client.create_run(experiment, tags=tags, run_name=name)
    return str(run.info.run_id)


def log_missing_params(store: Store, run: "MlflowRun", params: Mapping[str, Any]) -> None:
    """Log the params that a run lacks, because it is new or was killed as it began."""
    from mlflow.entities import Param

    _check_keys(params, keys.PARAMS)
    if missing := [Param(key, str(value)) for key, value in params.items() if key not in run.data.params]:
        store.client.log_batch(run.info.run_id, params=missing)


def reopen(store: Store, run_id: str, tags: Mapping[str, str]) -> None:
    """Reopen a run that had ended, with this process as its owner."""
    from mlflow.entities import RunTag

    fresh = {**tags, **owners.signs_of_life(store.command)}
    store.client.log_batch(run_id, tags=[RunTag(key, value) for key, value in fresh.items()])
    store.client.update_run(run_id, status="RUNNING")
    _explain(store, run_id, "")


def end_run(store: Store, run_id: str, status: str, reason: str = "") -> None:
    """End a run, with the reason why it has no result."""
    _explain(store, run_id, reason)
    store.client.set_terminated(run_id, status)


def _explain(store: Store, run_id: str, reason: str) -> None:
    """Set or remove the reason why a run has no result."""
    if reason:
        store.client.set_tag(run_id, "failure", reason[:500])
    elif "failure" in store.client.get_run(run_id).data.tags:
        store.client.delete_tag(run_id, "failure")


def status_and_reason(error: BaseException) -> tuple[str, str]:
    """Status and reason of a run that an error ended."""
    return ("KILLED", "interrupted") if isinstance(error, KeyboardInterrupt) else ("FAILED", in_one_line(error))


def supersede_others(store: Store, run: "MlflowRun") -> None:
    """Mark the other finished runs of the same model and split in the same comparison group, and unmark this one."""
    params, tags = run.data.params, run.data.tags
    if is_trial(tags):
        return
    # not those that may be missing: earlier versions logged the seeds as one param
    optional = {"n_splits", "replicate", *keys.SEEDS, *LATER, *keys.tuned_settings(params)}
    common = [key for key in (*keys.IDENTITY, *keys.GROUP_PARAMS) if key in params and key not in optional]
    same = " and ".join(f"params.{key} = '{params[key]}'" for key in common)
    query = f"{same} and tags.dataset_digest = '{tags['dataset_digest']}' and status = 'FINISHED'"
    for other in store.client.search_runs([run.info.experiment_id], query):
        counts = other.data.tags.get("superseded_by") in (None, keys.AGAIN)
        if other.info.run_id != run.info.run_id and _place(other.data.params) == _place(params) and counts:
            store.client.set_tag(other.info.run_id, "superseded_by", run.info.run_id)
    if "superseded_by" in tags:
        store.client.delete_tag(run.info.run_id, "superseded_by")


def _place(params: Mapping[str, str]) -> list[str | None]:
    """A run's place in the store: the values of its IDENTITY and GROUP_PARAMS, and the kind of device."""
    usual = {"replicate": "0", **dict.fromkeys(keys.SEEDS, params.get("seed"))}
    values = {key: params.get(key, usual.get(key)) for key in (*keys.IDENTITY, *keys.GROUP_PARAMS)}
    values |= {key: kind_of(params.get(key, LATER[key])) for key in LATER}
    values |= dict.fromkeys(keys.tuned_settings(params))
    if keys.has_open_end(params.get("protocol", "")):
        values["n_splits"] = None
    return [*values.values(), kind_of(params["device"])]


def _check_keys(given: Iterable[str], known: Mapping[str, str]) -> None:
    if unknown := set(given) - set(known):
        raise StoreError(f"{', '.join(sorted(unknown))} not in tracking.keys; enter them there with their meaning")
