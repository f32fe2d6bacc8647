"""Writing runs: a parent for a model under one configuration, and a child for each of its splits.

A child is claimed before its training starts. Finished splits are skipped, splits of other processes are left to them,
and interrupted ones are resumed. The owner's tags name the process that works on a run, and the lock of the state
folder keeps two processes of one machine from claiming the same split. Two machines may claim a split within the same
second, since MLflow has no compare-and-set. While the store is away, splits that were not known as finished are trained
without a claim, and their runs are made once the store is back (`tracking.journal`).
"""

import contextlib
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from tracking import keys, owners
from tracking.artifacts import Artifacts
from tracking.outages import impatient, passes, persist
from tracking.settings import LATER, kind_of
from tracking.store import SCRATCH, Store, StoreError, host, in_one_line

if TYPE_CHECKING:
    from mlflow.entities import Run as MlflowRun

T = TypeVar("T")
EPOCHS_A_CALL = 100  # MLflow takes at most 1,000 metrics in one call
NEXT_ATTEMPT = 10.0  # seconds, at least, between two calls to a store that is away during training
PAUSED = "SCHEDULED"  # MLflow's status of a run that waits
MADE_WITH = ("hardware", "versions")  # tags that the last bits depend on


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
        self._persist(lambda: _supersede_others(self.store, self.store.client.get_run(self.id)))
        self._persist(lambda: _end(self.store, self.id, "FINISHED"))


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
            persist(lambda: _take(self.store, self.id, {}))
            self.begun = True

    def end(self, status: str, reason: str = "") -> None:
        """End the run, unless another command still works on one of its splits."""
        query = f"tags.`{keys.PARENT}` = '{self.id}' and status = 'RUNNING'"

        def end_unless_shared() -> None:
            children = self.store.client.search_runs([self.experiment], query)
            shared = any(owners.is_others(child.data.tags, self.store.command) for child in children)
            if not shared and (self.begun or self.status != "FINISHED"):  # else another command ended it
                _end(self.store, self.id, status, reason)

        self._persist(end_unless_shared)
        self.ended = True


@contextlib.contextmanager
def parent_run(
    store: Store, task: str, name: str, params: Mapping[str, Any], tags: Mapping[str, str]
) -> Iterator[Parent]:
    """Open the parent with the fingerprint in `tags`, or make it; it ends as the body of the `with` does."""
    experiment = persist(lambda: store.make_experiment(task))

    def find_or_make() -> "MlflowRun":
        with store.lock():
            alike = with_fingerprint(store, experiment, tags["fingerprint"])
            found = next((run for run in alike if keys.PARENT not in run.data.tags), None)
            run = found or store.client.get_run(_create(store, experiment, name, tags))
            _complete(store, run, params)
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
                parent.end(*_outcome(error))
        raise


class NewRun(NamedTuple):
    """The content of a split's run."""

    experiment: str
    parent_id: str
    name: str  # in the UI
    params: Mapping[str, Any]
    tags: Mapping[str, str]
    command: str  # that trains it


@dataclass(frozen=True)
class Claim:
    """The decision who trains a split."""

    run: NewRun
    run_id: str  # empty while the store is away: the run is made once it is back
    is_ours: bool  # else the split is finished, or another process trains it
    resume_file: Path
    saved: dict[str, Any] | None = None  # content of the resume file of an interrupted run
    owner: str = ""  # the other process, in words
    elsewhere: bool = False  # whether that is on another machine


def claim(
    parent: Parent,
    name: str,
    params: Mapping[str, Any],
    tags: Mapping[str, str],
    patience: float | None = None,
    without_store: bool = False,
    until: int | None = None,
) -> Claim:
    """Claim the split with the fingerprint in `tags`, in its interrupted run or in a new one called `name`.

    `params` and `tags` are the parent's and the split's own. With `without_store`, a store that stays away for
    `patience` seconds does not prevent the claim, unless a living process owns the resume file. This is allowed for
    splits that the store did not know as finished when the command began. A trial that was stopped before epoch `until`
    is not finished.
    """
    store = parent.store
    run = NewRun(parent.experiment, parent.id, name, params, tags, store.command)
    resume_file = resume_path(store, tags)
    taken: list[str] = []  # runs of a failed attempt

    def decide() -> Claim:
        with store.lock():
            found = with_fingerprint(store, parent.experiment, tags["fingerprint"])
            for other in found:
                if other.info.status == "RUNNING" and owners.is_others(other.data.tags, store.command):
                    owner, elsewhere = owners.describe(other.data.tags), owners.is_elsewhere(other.data.tags)
                    return Claim(run, other.info.run_id, False, resume_file, owner=owner, elsewhere=elsewhere)
            done = _use_finished(store, parent, found)
            if done is not None and not stopped_before(done, until):
                return Claim(run, done.info.run_id, False, resume_file)
            saved = _usable(_load(resume_file), tags)
            run_id = take_or_make(store, run, found, _epochs(saved), taken, done)
            return Claim(run, run_id, True, resume_file, saved)

    try:
        return persist(decide, patience)
    except BaseException as error:
        if without_store and isinstance(error, Exception) and passes(error):
            saved = _load(resume_file)
            signs = saved.get("signs", {}) if saved else {}
            if owners.is_others(signs, store.command):
                return Claim(run, "", False, resume_file, owner=owners.describe(signs))
            return Claim(run, "", True, resume_file, _usable(saved, tags))
        with contextlib.suppress(Exception):  # the store itself may have failed
            for run_id in taken:
                _end(store, run_id, *_outcome(error))
        raise


def with_fingerprint(store: Store, experiment: str, fingerprint: str, condition: str = "") -> "list[MlflowRun]":
    """All runs of a split, or of a parent, newest first."""
    return list(store.client.search_runs([experiment], f"tags.fingerprint = '{fingerprint}'{condition}"))


def finished_among(found: "Sequence[MlflowRun]") -> "MlflowRun | None":
    """Return the run of a split that has its result; None if the split is to be trained."""
    redone = {keys.AGAIN, *(run.info.run_id for run in found)}
    for run in found:
        if run.info.status == "FINISHED" and run.data.tags.get("superseded_by") not in redone:
            return run
    return None


def stopped_before(run: "MlflowRun", until: int | None) -> bool:
    """Whether a finished run is a trial that was among the worse ones before epoch `until`."""
    stopped = run.data.tags.get(keys.STOPPED, "")
    return until is not None and stopped.isdecimal() and int(stopped) < until


def take_or_make(
    store: Store,
    run: NewRun,
    found: "Sequence[MlflowRun]",
    epochs: set[tuple[int, int]],
    taken: list[str],
    stopped: "MlflowRun | None" = None,
) -> str:
    """Take over the unfinished run whose epochs (number, time) are all in `epochs`, or make one.

    `stopped` is a finished trial that goes on. Returns the id, which is also appended to `taken` before the run is
    complete.
    """
    tags = {**run.tags, keys.PARENT: run.parent_id}
    for other in found:
        if (other.info.status != "FINISHED" or other is stopped) and _logged(store, other.info.run_id) <= epochs:
            taken.append(other.info.run_id)
            _complete(store, other, run.params)
            _take(store, other.info.run_id, tags)
            return taken[-1]
    taken.append(_create(store, run.experiment, run.name, tags))
    _complete(store, store.client.get_run(taken[-1]), run.params)
    return taken[-1]


def is_finished(parent: Parent, tags: Mapping[str, str]) -> bool:
    """Whether the split with this fingerprint has its result, which then counts for this parent."""
    store = parent.store

    def look() -> bool:
        with store.lock():
            found = with_fingerprint(store, parent.experiment, tags["fingerprint"])
            return _use_finished(store, parent, found) is not None

    return persist(look)


def wait_and_claim(
    parent: Parent,
    name: str,
    params: Mapping[str, Any],
    tags: Mapping[str, str],
    left: Claim,
    until: int | None = None,
) -> Claim:
    """Claim a split that was left to a process on another machine, once that had time for a heartbeat."""
    persist(lambda: owners.wait_for_sign(parent.store, left.run_id))
    return claim(parent, name, params, tags, until=until)


def begin_again(store: Store, task: str, tags: Mapping[str, str]) -> None:
    """Mark the split with this fingerprint to be trained again. Its result counts until the new run has one."""
    experiment = store.make_experiment(task)
    with store.lock():
        resume_path(store, tags).unlink(missing_ok=True)
        runs = with_fingerprint(store, experiment, tags["fingerprint"], " and status = 'FINISHED'")
        ids = [run.info.run_id for run in runs]
        for run in runs:
            if run.data.tags.get("superseded_by") not in ids:
                store.client.set_tag(run.info.run_id, "superseded_by", keys.AGAIN)


def load_progress(store: Store, tags: Mapping[str, str]) -> dict[str, Any] | None:
    """Read the progress that `save_progress` wrote, if this hardware and these versions can go on from it."""
    return _usable(_load(resume_path(store, tags)), tags)


def forget_progress(store: Store, tags: Mapping[str, str]) -> None:
    """Remove the resume file of a finished split. A trial keeps it: among more trials it may go on, or be chosen."""
    if not is_trial(tags):
        resume_path(store, tags).unlink(missing_ok=True)


def is_trial(tags: Mapping[str, str]) -> bool:
    """Whether a run is a trial."""
    return tags.get("task", "").endswith(keys.TRIALS)


def resume_path(store: Store, tags: Mapping[str, str]) -> Path:
    """Return the resume file of the split with this fingerprint."""
    return store.state / f"{tags['fingerprint']}.resume"


def save_progress(claimed: Claim, tags: Mapping[str, str], history: Sequence[Any], state: Mapping[str, Any]) -> None:
    """Write the resume file after an epoch. Only the same hardware and versions resume from it."""
    from tracking.checkpoints import save_resume_file  # imports torch

    made = {key: tags.get(key) for key in MADE_WITH}
    signs = owners.signs_of_life(claimed.run.command)
    content = {"history": list(history), "state": dict(state), "made": made, "signs": signs}
    save_resume_file(claimed.resume_file, content)


def _load(resume_file: Path) -> dict[str, Any] | None:
    if not resume_file.exists():
        return None
    from tracking.checkpoints import load_resume_file  # imports torch

    return load_resume_file(resume_file)


def _usable(saved: dict[str, Any] | None, tags: Mapping[str, str]) -> dict[str, Any] | None:
    return saved if saved and saved["made"] == {key: tags.get(key) for key in MADE_WITH} else None


@contextlib.contextmanager
def child_run(store: Store, claimed: Claim) -> Iterator[Run]:
    """Open the run that was claimed, and finish it unless the journal does or it is a trial that pauses."""
    run = Run(store, claimed.run_id)
    try:
        with owners.heartbeat(store, run.id):
            yield run
            if run.in_journal:
                return
            if run.pauses:
                with contextlib.suppress(Exception):  # while the store is away it stays as it is
                    store.client.update_run(run.id, status=PAUSED)
                return
            run.finish()
    except BaseException as error:
        with contextlib.suppress(Exception):  # the store itself may have failed
            _end(store, run.id, *_outcome(error))
        raise
    forget_progress(store, claimed.run.tags)


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
                _end(store, run.info.run_id, "KILLED", reason)
        for folder in store.state.glob(f"{SCRATCH}*"):
            pid, machine, _ = folder.name.removeprefix(SCRATCH).split("@")
            if machine == host() and not owners.is_running(int(pid)):
                shutil.rmtree(folder, ignore_errors=True)


def _epochs(saved: Mapping[str, Any] | None) -> set[tuple[int, int]]:
    return {(entry["epoch"], entry["time"]) for entry in saved["history"]} if saved else set()


def _logged(store: Store, run_id: str) -> set[tuple[int, int]]:
    """Epochs that a run has logged, with their times; those of a foreign resume file differ."""
    return {(point.step, point.timestamp) for point in store.client.get_metric_history(run_id, "val/loss")}


def _create(store: Store, experiment: str, name: str, tags: Mapping[str, str]) -> str:
    _check_keys((tag for tag in tags if not tag.startswith("mlflow.")), keys.TAGS)
    tags = {keys.USER: owners.user(store.uri.startswith("http")), **tags, **owners.signs_of_life(store.command)}
    run = store.client.create_run(experiment, tags=tags, run_name=name)
    return str(run.info.run_id)


def _complete(store: Store, run: "MlflowRun", params: Mapping[str, Any]) -> None:
    """Log the params that a run lacks, because it is new or was killed as it began."""
    from mlflow.entities import Param

    _check_keys(params, keys.PARAMS)
    if missing := [Param(key, str(value)) for key, value in params.items() if key not in run.data.params]:
        store.client.log_batch(run.info.run_id, params=missing)


def _take(store: Store, run_id: str, tags: Mapping[str, str]) -> None:
    """Reopen a run that had ended, with this process as its owner."""
    from mlflow.entities import RunTag

    fresh = {**tags, **owners.signs_of_life(store.command)}
    store.client.log_batch(run_id, tags=[RunTag(key, value) for key, value in fresh.items()])
    store.client.update_run(run_id, status="RUNNING")
    _explain(store, run_id, "")


def _use_finished(store: Store, parent: Parent, found: "Sequence[MlflowRun]") -> "MlflowRun | None":
    """Return the finished run of a split, and let it count again after a change of parent or code."""
    if (run := finished_among(found)) is not None:
        forget_progress(store, run.data.tags)
        if run.data.tags[keys.PARENT] != parent.id:
            store.client.set_tag(run.info.run_id, keys.PARENT, parent.id)
        if "superseded_by" in run.data.tags:
            _supersede_others(store, run)
    return run


def _end(store: Store, run_id: str, status: str, reason: str = "") -> None:
    _explain(store, run_id, reason)
    store.client.set_terminated(run_id, status)


def _explain(store: Store, run_id: str, reason: str) -> None:
    """Set or remove the reason why a run has no result."""
    if reason:
        store.client.set_tag(run_id, "failure", reason[:500])
    elif "failure" in store.client.get_run(run_id).data.tags:
        store.client.delete_tag(run_id, "failure")


def _outcome(error: BaseException) -> tuple[str, str]:
    """Status and reason of a run that an error ended."""
    return ("KILLED", "interrupted") if isinstance(error, KeyboardInterrupt) else ("FAILED", in_one_line(error))


def _supersede_others(store: Store, run: "MlflowRun") -> None:
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
