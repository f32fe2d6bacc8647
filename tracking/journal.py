"""The journal: what a finished split leaves is on this machine's disk first, and is sent to the store from there.

An entry is a folder in the store's state folder, named by the split's fingerprint. It appears whole or not at all, and
goes when everything is in the store. All that is sent can be sent twice without harm, so a process that is killed, or a
store that goes away, in the middle leaves an entry that is sent again: by the process that wrote it, at the end of its
command, or by the next command that opens the store. (What a split that is not finished has logged so far is kept in
its resume file, likewise before it is sent.)
"""

import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tracking import owners
from tracking.outages import attempt, passes, persist
from tracking.runs import Claim, NewRun, Run, finished_among, resume_path, same_split, take_or_make
from tracking.store import Store, in_one_line

ENTRY, RECORD, FILES = ".journal", "record.json", "files"


class Results(NamedTuple):
    """What a finished split leaves beside its files.

    Attributes
    ----------
    dataset : tuple of str
        Name, digest and profile, as of `Run.log_dataset`.
    history : sequence of mapping
        As of `Run.log_epochs`.
    metrics : mapping of str to float
        The final ones. They are logged at the last epoch's time, so that a second attempt changes nothing.
    tags : mapping of str to str
        The run's own, beside those that it was claimed with.
    """

    dataset: tuple[str, str, str]
    history: Sequence[Mapping[str, Any]]
    metrics: Mapping[str, float]
    tags: Mapping[str, str]


def write(store: Store, claimed: Claim, results: Results, folder: Path) -> Path:
    """Write an entry.

    Parameters
    ----------
    store : Store
    claimed : Claim
        Of the split.
    results : Results
    folder : pathlib.Path
        In the store's state folder; what lies in its subfolder FILES becomes the run's artifacts. The folder is moved.

    Returns
    -------
    pathlib.Path
        The entry.
    """
    record = {
        "run": claimed.run._asdict(),
        "run_id": claimed.run_id,
        "results": results._asdict(),
        "signs": owners.signs_of_life(store.command),
    }
    (folder / RECORD).write_text(json.dumps(record), encoding="utf-8")
    entry = entry_path(store, claimed.run.tags["fingerprint"])
    with store.lock():
        if entry.exists() and owners.is_others(_read(entry)["signs"], store.command):
            entry = entry.with_name(f"{entry.stem}-{os.getpid()}{ENTRY}")  # done by both while the store was away
        shutil.rmtree(entry, ignore_errors=True)
        folder.rename(entry)
    return entry


def entry_path(store: Store, fingerprint: str) -> Path:
    """Where the entry of the split with this fingerprint is."""
    return store.state / f"{fingerprint}{ENTRY}"


def send(store: Store, entry: Path, patience: float | None = None, known: Run | None = None) -> None:
    """Send an entry to the store, give its run its end, and remove the entry.

    Parameters
    ----------
    store : Store
    entry : pathlib.Path
    patience : float, optional
        Seconds to wait for a store that is away (`persist`).
    known : Run, optional
        The entry's run where it is open: what it has sent already is not sent again.

    Raises
    ------
    Exception
        What the store says; the entry stays.
    """
    try:
        record = _read(entry)
    except FileNotFoundError:
        return  # it was sent
    claimed, results = NewRun(**record["run"]), Results(**record["results"])
    run_id: str | None = known.id if known else ""
    if run_id == "":
        run_id = persist(lambda: _find_or_make(store, claimed, record["run_id"], results.history), patience)
    if run_id is not None:
        run = known if known and known.id else Run(store, run_id)
        run.patience = patience
        run.log_dataset(*results.dataset)
        run.log_epochs(results.history, wait=True)
        run.log_files(entry / FILES)
        for key, value in results.tags.items():
            run.set_tag(key, value)
        # last, so that a run with final scores has the files that they follow from
        run.log_metrics(results.metrics, timestamp=results.history[-1]["time"])
        run.finish()
    resume_path(store, claimed.tags).unlink(missing_ok=True)
    (entry / RECORD).unlink(missing_ok=True)  # first, so that nobody takes what is left for an entry
    shutil.rmtree(entry, ignore_errors=True)


def _find_or_make(store: Store, run: NewRun, run_id: str, history: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the run that an entry goes into; None where the split has its result, be it from this entry."""
    run = run._replace(experiment=store.make_experiment(run.tags["task"]))  # ids are those of one database
    with store.lock():
        # what a living process of another command does is left to it: both results will be there, and the later counts
        found = [
            other
            for other in same_split(store, run)
            if other.info.status != "RUNNING" or not owners.is_others(other.data.tags, store.command)
        ]
        statuses = {other.info.run_id: other.info.status for other in found}
        if finished_among(found) is not None or statuses.get(run_id) == "FINISHED":
            return None
        if run_id in statuses:
            return run_id
        return take_or_make(store, run, found, {(entry["epoch"], entry["time"]) for entry in history}, [])


def send_all(store: Store) -> tuple[int, dict[str, str]]:
    """Send what processes of this command, or such as are gone, have left in the journal, oldest first.

    Returns
    -------
    tuple of int and dict of str to str
        How many entries were sent; and a sentence for each one that the store refused, or that cannot be read, by its
        split's fingerprint.

    Raises
    ------
    Exception
        The store is away; the entries that were not sent stay.
    """
    sent, refused = 0, {}
    for entry in sorted(store.state.glob(f"*{ENTRY}"), key=_age):
        try:
            if take(store, entry):
                send(store, entry)
                sent += 1
        except Exception as error:  # MLflow's, those of requests, OSError, what a damaged file makes its reader say
            if passes(error):
                raise
            reason = in_one_line(error)
            refused[entry.stem.partition("-")[0]] = (
                f"the results in {entry} cannot be sent ({reason}); repair that, or remove them"
            )
    return sent, refused


def _read(entry: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((entry / RECORD).read_text(encoding="utf-8"))
    return record


def try_to_send(store: Store, entry: Path, patience: float | None, known: Run | None = None) -> bool:
    """Send an entry, but for a store that is away: then it stays, and False is returned."""
    sent = attempt(lambda: send(store, entry, patience, known))
    if not sent:
        print("the result database is away; results are kept for it, and training goes on", file=sys.stderr)
    return sent


def _age(entry: Path) -> float:
    return entry.stat().st_mtime if entry.exists() else 0.0


def take(store: Store, entry: Path) -> bool:
    """Make an entry this process's to send; False where there is none, or another process is at it."""
    path = entry / RECORD
    with store.lock():  # two commands may come here at once
        try:
            record = _read(entry)
        except FileNotFoundError:
            shutil.rmtree(entry, ignore_errors=True)  # of a process that was killed as it removed it
            return False
        if owners.is_others(record["signs"], store.command):
            return False
        record["signs"] = owners.signs_of_life(store.command)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(record), encoding="utf-8")
        partial.replace(path)
        return True
