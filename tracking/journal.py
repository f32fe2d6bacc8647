"""The journal keeps the results of a finished split on this machine's disk until the store has them.

An entry is a folder in the store's state folder, named by the split's fingerprint. It appears atomically and is removed
once the store has everything. Sending is idempotent: an entry that an outage or a killed process left behind is sent
again at the end of the command or by the next command that opens the store. (Epochs of unfinished splits are likewise
kept in the resume file before they are sent.)
"""

import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tracking import owners
from tracking.claims import Claim, NewRun, finished_among, forget_progress, stopped_before, take_or_make
from tracking.errors import in_one_line
from tracking.outages import attempt, passes, persist
from tracking.runs import Run, with_fingerprint
from tracking.store import Store

ENTRY, RECORD, FILES = ".journal", "record.json", "files"


class Results(NamedTuple):
    """The results of a finished split, except its files."""

    dataset: tuple[str, str, str]  # name, digest and profile, as in `Run.log_dataset`
    history: Sequence[Mapping[str, Any]]  # as in `Run.log_epochs`
    metrics: Mapping[str, float]  # final ones, logged at the last epoch's time so that sending them twice is harmless
    tags: Mapping[str, str]  # set at the end, beside those of the claim


def write(store: Store, claimed: Claim, results: Results, folder: Path) -> Path:
    """Make a folder of the store's state folder an entry and return its path.

    The folder is moved. The files in its subfolder FILES become the run's artifacts.
    """
    signs = owners.signs_of_life(store.command)
    record = {"run": claimed.run._asdict(), "run_id": claimed.run_id, "results": results._asdict(), "signs": signs}
    (folder / RECORD).write_text(json.dumps(record), encoding="utf-8")
    entry = entry_path(store, claimed.run.tags["fingerprint"])
    with store.lock():
        if entry.exists() and owners.is_others(read_record(entry)["signs"], store.command):
            entry = entry.with_name(f"{entry.stem}-{os.getpid()}{ENTRY}")  # both trained it while the store was away
        shutil.rmtree(entry, ignore_errors=True)
        folder.rename(entry)
    return entry


def entry_path(store: Store, fingerprint: str) -> Path:
    """Return the path of a split's entry."""
    return store.state / f"{fingerprint}{ENTRY}"


def send(store: Store, entry: Path, patience: float | None = None, known: Run | None = None) -> None:
    """Send an entry to the store, end its run, and remove the entry; on an error the entry stays.

    A store that is away is waited for as in `persist`. `known` is the entry's run if it is open: it has sent epochs.
    """
    try:
        record = read_record(entry)
    except FileNotFoundError:
        return  # already sent
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
        # last, so that a run with final scores has its files
        if results.history:  # not of a trial that diverged at once
            run.log_metrics(results.metrics, timestamp=results.history[-1]["time"])
        run.finish()
    forget_progress(store, claimed.tags)
    (entry / RECORD).unlink(missing_ok=True)  # first: a folder without a record is no entry
    shutil.rmtree(entry, ignore_errors=True)


def _find_or_make(store: Store, run: NewRun, run_id: str, history: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the run that an entry goes into; None if the split has its result, which may be this one."""
    run = run._replace(experiment=store.make_experiment(run.tags["task"]))  # the id belongs to one database
    with store.lock():
        # runs of living processes of other commands are left to them: both results are kept, and the later one counts
        alike = with_fingerprint(store, run.experiment, run.tags["fingerprint"])
        found = [o for o in alike if o.info.status != "RUNNING" or not owners.is_others(o.data.tags, store.command)]
        statuses = {other.info.run_id: other.info.status for other in found}
        done = finished_among(found)
        goes_on = done is not None and stopped_before(done, len(history))
        if (done is not None or statuses.get(run_id) == "FINISHED") and not goes_on:
            return None
        if run_id in statuses:
            return run_id
        return take_or_make(store, run, found, {(entry["epoch"], entry["time"]) for entry in history}, [], done)


def send_all(store: Store) -> tuple[int, dict[str, str]]:
    """Send the entries of this command and of dead processes, oldest first. A store that is away raises its error.

    Returns the number of entries sent, and a sentence for each unreadable or refused one by its split's fingerprint.
    """
    sent, refused = 0, {}
    for entry in sorted(store.state.glob(f"*{ENTRY}"), key=lambda path: path.stat().st_mtime if path.exists() else 0.0):
        try:
            if take(store, entry):
                send(store, entry)
                sent += 1
        except Exception as error:  # MLflow's, those of requests, OSError, those of reading a damaged file
            if passes(error):
                raise
            sentence = f"the results in {entry} cannot be sent ({in_one_line(error)}); repair or remove them"
            refused[entry.stem.partition("-")[0]] = sentence
    return sent, refused


def read_results(entry: Path) -> Results:
    """Read the results of an entry."""
    return Results(**read_record(entry)["results"])


def read_record(entry: Path) -> dict[str, Any]:
    """Read the record of an entry; a damaged one raises a `ValueError`, or lacks keys."""
    record: dict[str, Any] = json.loads((entry / RECORD).read_text(encoding="utf-8"))
    return record


def try_to_send(store: Store, entry: Path, patience: float | None, known: Run | None = None) -> bool:
    """Send an entry; return False, with a message, if the store is away."""
    sent = attempt(lambda: send(store, entry, patience, known))
    if not sent:
        print("the result database is away; results are kept for it, and training goes on", file=sys.stderr)
    return sent


def take(store: Store, entry: Path) -> bool:
    """Make this process the owner of an entry; return False if it is gone or belongs to a living process."""
    path = entry / RECORD
    with store.lock():  # two commands may come here at once
        try:
            record = read_record(entry)
        except FileNotFoundError:
            shutil.rmtree(entry, ignore_errors=True)  # of a process that was killed while removing it
            return False
        if owners.is_others(record["signs"], store.command):
            return False
        record["signs"] = owners.signs_of_life(store.command)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(record), encoding="utf-8")
        partial.replace(path)
        return True
