"""Writing runs: a parent for a model under one configuration, a child for each of its splits.

A child is claimed before it is done. What is finished is not done again, what another process does is left to it, and
what was interrupted goes on. The owner's tags tell who does a run, the lock of the store's state folder keeps two
processes of one machine from claiming the same split. Between machines nothing does that in the same second: MLflow has
no operation that compares and sets. While the store is away nothing can be claimed; what the store did not know as
finished is done without, and its run is made when the store is back (`tracking.journal`).
"""

import contextlib
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from tracking import owners
from tracking.artifacts import Artifacts
from tracking.keys import AGAIN, EPOCH_METRICS, FINAL_METRICS, GROUP_PARAMS, PARAMS, PARENT, SUMMARY_METRICS, TAGS
from tracking.outages import impatient, passes, persist
from tracking.store import SCRATCH, Store, StoreError, host, in_one_line

if TYPE_CHECKING:
    from mlflow.entities import Run as MlflowRun

T = TypeVar("T")
EPOCHS_A_CALL = 100  # MLflow takes at most 1,000 metrics in one call
NEXT_ATTEMPT = 10.0  # seconds, at least, after which a store that was away is asked again during training
MADE_WITH = ("hardware", "versions")  # tags that the last bits depend on


class Run:
    """An open run. Its keys are those of `tracking.keys`; others are refused.

    Parameters
    ----------
    store : Store
    run_id : str
        Empty for a run that was begun while the store is away.
    patience : float, optional
        Seconds to wait for a store that is away (`persist`).

    Attributes
    ----------
    in_journal : bool
        Whether its results are in the journal, from where the run also gets its end.
    """

    def __init__(self, store: Store, run_id: str, patience: float | None = None) -> None:
        self.store = store
        self.id = run_id
        self.patience = patience
        self.in_journal = False
        self._sent = 0  # epochs of `log_epochs`
        self._away_until = 0.0

    def _persist(self, action: Callable[[], T]) -> T:
        return persist(action, self.patience)

    def log_metrics(self, values: Mapping[str, float], timestamp: int | None = None) -> None:
        """Log metrics in one call. With the same timestamp (ms) a second time changes nothing."""
        from mlflow.entities import Metric

        _check_keys(values, FINAL_METRICS | SUMMARY_METRICS)
        now = timestamp or time.time_ns() // 1_000_000
        metrics = [Metric(key, value, now, 0) for key, value in values.items()]
        self._persist(lambda: self.store.client.log_batch(self.id, metrics))

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
                self._away_until = now + max(NEXT_ATTEMPT, 5 * (now - started))  # where it takes long to fail

    def _send(self, history: Sequence[Mapping[str, Any]]) -> None:
        from mlflow.entities import Metric

        while unsent := history[self._sent :][:EPOCHS_A_CALL]:
            points = [(key, value, entry) for entry in unsent for key, value in entry["metrics"].items()]
            _check_keys((key for key, _, _ in points), EPOCH_METRICS)
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
        """Read a tag; None where there is none."""
        value: str | None = self._persist(lambda: self.store.client.get_run(self.id)).data.tags.get(key)
        return value

    def set_tag(self, key: str, value: str) -> None:
        """Set a tag."""
        _check_keys([key], TAGS)
        self._persist(lambda: self.store.client.set_tag(self.id, key, value))

    def log_dataset(self, name: str, digest: str, profile: str) -> None:
        """Enter the data set that the run used, with our own digest (MLflow keeps 36 characters of it)."""
        from mlflow.entities import Dataset, DatasetInput

        dataset = Dataset(name, digest[:36], source_type="local", source="{}", profile=profile)
        self._persist(lambda: self.store.client.log_inputs(self.id, [DatasetInput(dataset, tags=[])]))

    def finish(self) -> None:
        """Give it its end; older runs of its split in its comparison group are marked as superseded."""
        self._persist(lambda: _supersede_others(self.store, self.store.client.get_run(self.id)))
        self._persist(lambda: _end(self.store, self.id, "FINISHED"))


class Parent(Run):
    """A model under one configuration, which may be worked on by several processes."""

    def __init__(
        self, store: Store, run_id: str, experiment: str, status: str = "", metrics: Mapping[str, float] | None = None
    ) -> None:
        super().__init__(store, run_id)
        self.experiment = experiment
        self.status = status
        self.metrics = dict(metrics or {})  # the latest
        self.begun = self.ended = False

    def begin(self) -> None:
        """Say that this command works on it."""
        if not self.begun:
            persist(lambda: _take(self.store, self.id, {}))
            self.begun = True

    def end(self, status: str, reason: str = "") -> None:
        """Give it an end, unless another process still does one of its splits."""
        self._persist(lambda: self._end_unless_shared(status, reason))
        self.ended = True

    def _end_unless_shared(self, status: str, reason: str) -> None:
        children = self.store.client.search_runs(
            [self.experiment], f"tags.`{PARENT}` = '{self.id}' and status = 'RUNNING'"
        )
        if any(owners.is_others(child.data.tags, self.store.command) for child in children):
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
        Name of the task.
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
                    break
            else:
                found = store.client.get_run(_create(store, experiment, name, tags))
            _complete(store, found, params)
            return found

    found = persist(find_or_make)
    parent = Parent(store, found.info.run_id, experiment, found.info.status, found.data.metrics)
    try:
        yield parent
        if not parent.ended:
            parent.end("FINISHED")
    except BaseException as error:
        if not parent.ended:
            with contextlib.suppress(Exception), impatient():  # the store itself may be what failed
                parent.end(*_what_ended_it(error))
        raise


class NewRun(NamedTuple):
    """What a split's run is made of."""

    experiment: str
    parent_id: str
    name: str  # in the UI
    params: Mapping[str, Any]
    tags: Mapping[str, str]
    command: str  # that does it


@dataclass(frozen=True)
class Claim:
    """Who does a split.

    Attributes
    ----------
    run : NewRun
    run_id : str
        Empty where the store is away: the run is made when it is back.
    is_ours : bool
        Whether it is ours to do; otherwise it is finished, or another process does it.
    resume_file : pathlib.Path
        Where the run's state is kept until it is finished.
    saved : dict or None
        What the resume file holds, for a run that goes on.
    owner : str
        The other process, in words.
    elsewhere : bool
        Whether that is on another machine.
    """

    run: NewRun
    run_id: str
    is_ours: bool
    resume_file: Path
    saved: dict[str, Any] | None = None
    owner: str = ""
    elsewhere: bool = False


def claim(
    parent: Parent,
    name: str,
    params: Mapping[str, Any],
    tags: Mapping[str, str],
    patience: float | None = None,
    without_store: bool = False,
) -> Claim:
    """Claim the split of a model with this fingerprint, in the run that was interrupted or in a new one.

    Parameters
    ----------
    parent : Parent
    name : str
        The run's name in the UI.
    params, tags : mapping
        The parent's, with the split's own.
    patience : float, optional
        Seconds to wait for a store that is away (`persist`).
    without_store : bool
        After that claim it nevertheless, unless the resume file is of a living process: the store did not know it as
        finished when the command began.

    Returns
    -------
    Claim
    """
    from tracking.checkpoints import load_resume_file  # imports torch

    store = parent.store
    run = NewRun(parent.experiment, parent.id, name, params, tags, store.command)
    resume_file = resume_path(store, tags)
    taken: list[str] = []  # by an attempt that failed after it

    def decide() -> Claim:
        with store.lock():
            found = same_split(store, run)
            for other in found:
                if other.info.status == "RUNNING" and owners.is_others(other.data.tags, store.command):
                    owner, elsewhere = owners.describe(other.data.tags), owners.is_elsewhere(other.data.tags)
                    return Claim(run, other.info.run_id, False, resume_file, owner=owner, elsewhere=elsewhere)
            if (done := finished_among(found)) is not None:
                resume_file.unlink(missing_ok=True)
                _keep(store, parent, done)
                return Claim(run, done.info.run_id, False, resume_file)
            saved = _load_saved(resume_file, tags)
            return Claim(run, take_or_make(store, run, found, _epochs(saved), taken), True, resume_file, saved)

    try:
        return persist(decide, patience)
    except BaseException as error:
        if without_store and isinstance(error, Exception) and passes(error):
            signs = (load_resume_file(resume_file) or {}).get("signs", {})
            if owners.is_others(signs, store.command):
                return Claim(run, "", False, resume_file, owner=owners.describe(signs))
            return Claim(run, "", True, resume_file, _load_saved(resume_file, tags))
        with contextlib.suppress(Exception):  # the store itself may be what failed
            for run_id in taken:
                _end(store, run_id, *_what_ended_it(error))
        raise


def same_split(store: Store, run: NewRun) -> "list[MlflowRun]":
    """All runs with the fingerprint of this one, newest first."""
    return list(store.client.search_runs([run.experiment], f"tags.fingerprint = '{run.tags['fingerprint']}'"))


def finished_among(found: "Sequence[MlflowRun]") -> "MlflowRun | None":
    """That one of the runs of a split that has its result; None where it is to be done."""
    redone = {AGAIN, *(run.info.run_id for run in found)}
    for run in found:
        if run.info.status == "FINISHED" and run.data.tags.get("superseded_by") not in redone:
            return run
    return None


def take_or_make(
    store: Store, run: NewRun, found: "Sequence[MlflowRun]", epochs: set[tuple[int, int]], taken: list[str]
) -> str:
    """Take over the unfinished run whose epochs are all among these (number and time), or make one; return its id.

    The id is in `taken`, too, before the run is complete.
    """
    tags = {**run.tags, PARENT: run.parent_id}
    for other in found:
        if other.info.status != "FINISHED" and _logged(store, other.info.run_id) <= epochs:
            taken.append(other.info.run_id)
            _complete(store, other, run.params)
            _take(store, other.info.run_id, tags)
            return taken[-1]
    taken.append(_create(store, run.experiment, run.name, tags))
    _complete(store, store.client.get_run(taken[-1]), run.params)
    return taken[-1]


def is_finished(parent: Parent, tags: Mapping[str, str]) -> bool:
    """Whether the split with this fingerprint has its result, which then counts below this parent."""
    store = parent.store

    def look() -> bool:
        with store.lock():
            done = finished_among(same_split(store, NewRun(parent.experiment, parent.id, "", {}, tags, store.command)))
            if done is not None:
                resume_path(store, tags).unlink(missing_ok=True)
                _keep(store, parent, done)
            return done is not None

    return persist(look)


def wait_and_claim(parent: Parent, name: str, params: Mapping[str, Any], tags: Mapping[str, str], left: Claim) -> Claim:
    """Claim a split again that was left to a process on another machine, if it gives no sign of life."""
    persist(lambda: owners.wait_for_sign(parent.store, left.run_id))
    return claim(parent, name, params, tags)


def begin_again(store: Store, task: str, tags: Mapping[str, str]) -> None:
    """Let the split with this fingerprint be done again. What is finished counts until the new run is."""
    experiment = store.make_experiment(task)
    with store.lock():
        resume_path(store, tags).unlink(missing_ok=True)
        same = f"tags.fingerprint = '{tags['fingerprint']}' and status = 'FINISHED'"
        runs = store.client.search_runs([experiment], same)
        ids = [run.info.run_id for run in runs]
        for run in runs:
            if run.data.tags.get("superseded_by") not in ids:
                store.client.set_tag(run.info.run_id, "superseded_by", AGAIN)


def resume_path(store: Store, tags: Mapping[str, str]) -> Path:
    """Where the state of the split with this fingerprint is kept until it is finished."""
    return store.state / f"{tags['fingerprint']}.resume"


def save_progress(claimed: Claim, tags: Mapping[str, str], history: Sequence[Any], state: Mapping[str, Any]) -> None:
    """Keep what a split needs to go on after its last epoch, and where it was made: only there it goes on."""
    from tracking.checkpoints import save_resume_file  # imports torch

    made = {key: tags.get(key) for key in MADE_WITH}
    signs = owners.signs_of_life(claimed.run.command)
    content = {"history": list(history), "state": dict(state), "made": made, "signs": signs}
    save_resume_file(claimed.resume_file, content)


def _load_saved(resume_file: Path, tags: Mapping[str, str]) -> dict[str, Any] | None:
    from tracking.checkpoints import load_resume_file  # imports torch

    saved = load_resume_file(resume_file)
    return saved if saved and saved["made"] == {key: tags.get(key) for key in MADE_WITH} else None


@contextlib.contextmanager
def child_run(store: Store, claimed: Claim) -> Iterator[Run]:
    """Do the run that was claimed, and finish it, unless the journal does that.

    Yields
    ------
    Run
    """
    run = Run(store, claimed.run_id)
    try:
        with owners.heartbeat(store, run.id):
            yield run
            if run.in_journal:
                return
            run.finish()
    except BaseException as error:
        with contextlib.suppress(Exception):  # the store itself may be what failed
            _end(store, run.id, *_what_ended_it(error))
        raise
    claimed.resume_file.unlink(missing_ok=True)


def close_dead_runs(
    store: Store, task: str, reason: str = "its process ended without a word", mine: bool = False
) -> None:
    """Give an end to the runs of a task whose process is gone, and remove what such processes left in scratch.

    Runs that a process is at work on, here or on another machine, are left alone.

    Parameters
    ----------
    store : Store
    task : str
    reason : str
        Why they have no result.
    mine : bool
        No process of this command is at work on a split any more.
    """

    def is_at_work(run: "MlflowRun") -> bool:
        ended = mine and PARENT in run.data.tags and run.data.tags.get("command") == store.command
        return owners.is_alive(run.data.tags) and not ended

    experiment = store.experiment_id(task)
    if experiment is None:
        return
    with store.lock():
        running = [
            run
            for run in store.client.search_runs([experiment], "status = 'RUNNING'")
            if "fingerprint" in run.data.tags
        ]
        alive = [run for run in running if is_at_work(run)]
        needed = {run.info.run_id for run in alive} | {run.data.tags.get(PARENT) for run in alive}
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
    """Epochs that a run has logged, with their times: more than the resume file has where that is not its own."""
    history = store.client.get_metric_history(run_id, "val/loss")
    return {(point.step, point.timestamp) for point in history}


def _create(store: Store, experiment: str, name: str, tags: Mapping[str, str]) -> str:
    _check_keys((tag for tag in tags if not tag.startswith("mlflow.")), TAGS)
    run = store.client.create_run(experiment, tags={**tags, **owners.signs_of_life(store.command)}, run_name=name)
    return str(run.info.run_id)


def _complete(store: Store, run: "MlflowRun", params: Mapping[str, Any]) -> None:
    """Log the params that a run lacks: all of a new one, none but of one that was killed as it began."""
    from mlflow.entities import Param

    _check_keys(params, PARAMS)
    if missing := [Param(key, str(value)) for key, value in params.items() if key not in run.data.params]:
        store.client.log_batch(run.info.run_id, params=missing)


def _take(store: Store, run_id: str, tags: Mapping[str, str]) -> None:
    """Make a run that had ended this process's, with the tags that it would have given it."""
    from mlflow.entities import RunTag

    fresh = {**tags, **owners.signs_of_life(store.command)}
    store.client.log_batch(run_id, tags=[RunTag(key, value) for key, value in fresh.items()])
    store.client.update_run(run_id, status="RUNNING")
    _explain(store, run_id, "")


def _keep(store: Store, parent: Parent, run: "MlflowRun") -> None:
    """Let a finished run count where it does not any more: its parent was deleted, or other code came after it."""
    if run.data.tags[PARENT] != parent.id:
        store.client.set_tag(run.info.run_id, PARENT, parent.id)
    if "superseded_by" in run.data.tags:
        _supersede_others(store, run)


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
    return ("KILLED", "interrupted") if isinstance(error, KeyboardInterrupt) else ("FAILED", in_one_line(error))


def _supersede_others(store: Store, run: "MlflowRun") -> None:
    """Mark the finished runs of the same split of the same model in the same comparison group, and unmark this one."""
    params, tags = run.data.params, run.data.tags
    same = " and ".join(f"params.{key} = '{params[key]}'" for key in ("model", "split", *GROUP_PARAMS))
    query = f"{same} and tags.dataset_digest = '{tags['dataset_digest']}' and status = 'FINISHED'"
    for other in store.client.search_runs([run.info.experiment_id], query):
        kind, own_kind = (each.data.params["device"].split(":")[0] for each in (other, run))
        counts = other.data.tags.get("superseded_by") in (None, AGAIN)
        if other.info.run_id != run.info.run_id and kind == own_kind and counts:
            store.client.set_tag(other.info.run_id, "superseded_by", run.info.run_id)
    if "superseded_by" in tags:
        store.client.delete_tag(run.info.run_id, "superseded_by")


def _check_keys(keys: Any, known: Mapping[str, str]) -> None:
    if unknown := set(keys) - set(known):
        raise StoreError(f"{', '.join(sorted(unknown))} not in tracking.keys; enter them there with their meaning")
