"""Claiming a split: who trains it, in which run, and from which epoch on.

A child is claimed before its training starts. Finished splits are skipped, splits of other processes are left to them,
and interrupted ones are resumed. The owner's tags name the process that works on a run, and the lock of the state
folder keeps two processes of one machine from claiming the same split. Two machines may claim a split within the same
second, since MLflow has no compare-and-set. While the store is away, splits that were not known as finished are trained
without a claim, and their runs are made once the store is back (`tracking.journal`).
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tracking import keys, owners
from tracking.outages import passes, persist
from tracking.runs import (
    Parent,
    Run,
    create_run,
    end_run,
    is_trial,
    log_missing_params,
    reopen,
    status_and_reason,
    supersede_others,
    with_fingerprint,
)  # fmt: skip
from tracking.store import Store

if TYPE_CHECKING:
    from mlflow.entities import Run as MlflowRun

PAUSED = "SCHEDULED"  # MLflow's status of a run that waits
MADE_WITH = ("hardware", "versions")  # tags that the last bits depend on


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
    """Claim a split, in its interrupted run or in a new one, so that no other process trains it.

    Parameters
    ----------
    parent : Parent
        The run of its model.
    name : str
        Name of a new run.
    params, tags : mapping
        The parent's and the split's own. The tag `fingerprint` tells the split.
    patience : float, optional
        Seconds to wait for a store that is away; for ever unless given.
    without_store : bool
        Claim it also if the store stays away, unless a living process owns the resume file: allowed for splits that
        the store did not know as finished when the command began.
    until : int, optional
        A trial that was stopped before this epoch is not finished.

    Returns
    -------
    Claim
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
                end_run(store, run_id, *status_and_reason(error))
        raise


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
            log_missing_params(store, other, run.params)
            reopen(store, other.info.run_id, tags)
            return taken[-1]
    taken.append(create_run(store, run.experiment, run.name, tags))
    log_missing_params(store, store.client.get_run(taken[-1]), run.params)
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
    """Claim a split that was left to a process on another machine, once that had time for a heartbeat.

    `left` is the earlier claim; the other parameters are those of `claim`.
    """
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
            end_run(store, run.id, *status_and_reason(error))
        raise
    forget_progress(store, claimed.run.tags)


def _use_finished(store: Store, parent: Parent, found: "Sequence[MlflowRun]") -> "MlflowRun | None":
    """Return the finished run of a split, and let it count again after a change of parent or code."""
    if (run := finished_among(found)) is not None:
        forget_progress(store, run.data.tags)
        if run.data.tags[keys.PARENT] != parent.id:
            store.client.set_tag(run.info.run_id, keys.PARENT, parent.id)
        if "superseded_by" in run.data.tags:
            supersede_others(store, run)
    return run


def _epochs(saved: Mapping[str, Any] | None) -> set[tuple[int, int]]:
    return {(entry["epoch"], entry["time"]) for entry in saved["history"]} if saved else set()


def _logged(store: Store, run_id: str) -> set[tuple[int, int]]:
    """Epochs that a run has logged, with their times; those of a foreign resume file differ."""
    return {(point.step, point.timestamp) for point in store.client.get_metric_history(run_id, "val/loss")}
