"""Finding and removing runs that a result database need not keep.

Only this program's own runs are looked at, which have a fingerprint. Always kept are the runs that a registered model
points to, those that a living process works on with all that belongs to the same parent, and those whose results wait
in the journal.
"""

import shutil
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tracking import journal, keys, owners
from tracking.artifacts import moves, own_folder
from tracking.errors import StoreError
from tracking.store import Store, all_pages

if TYPE_CHECKING:
    from mlflow.entities import Run as MlflowRun

KINDS = {
    "superseded": "runs that were repeated, and whose later run has its result",
    "abandoned": "runs that failed or were interrupted, and that nobody works on",
    "sample": "runs on generated images",
    "state": "files by which finished splits and trials could have been resumed",
}
UNFINISHED = ("FAILED", "KILLED", "RUNNING", "SCHEDULED")


@dataclass(frozen=True)
class Removable:
    """A run with its files, or a file of the state folder."""

    kind: str  # of KINDS
    name: str  # id of the run, or name of the file
    size: int  # of its files, in bytes
    folder: Path | None  # that is removed with it; None if a server keeps the files
    run: "MlflowRun | None" = None


def find(store: Store, tasks: Sequence[str], kinds: Collection[str] = tuple(KINDS)) -> list[Removable]:
    """Find the runs of some tasks that can be removed; a run that is of several KINDS counts as the first."""
    protected = _registered(store) | _in_journal(store)
    return [found for task in tasks for found in _find_in_task(store, task, kinds, protected)]


def remove(store: Store, found: Sequence[Removable], tasks: Sequence[str]) -> list[Removable]:
    """Remove, for good, the found runs that are still removable, and return them.

    A tracking server removes the files, and marks runs as deleted until `mlflow gc` is run there.
    """
    with store.lock():  # nobody on this machine takes over an abandoned run in the meantime
        kinds = {each.kind for each in found}
        still = {(each.kind, each.name) for each in find(store, tasks, kinds)}
        removed = [each for each in found if (each.kind, each.name) in still]
        for each in removed:
            if each.run is None:
                assert each.folder is not None
                each.folder.unlink(missing_ok=True)
            else:
                _remove_run(store, each, each.run)
    return removed


def _remove_run(store: Store, each: Removable, run: "MlflowRun") -> None:
    """Delete a run, first for the tables and last in the database, so that a kill leaves none without its files."""
    store.client.delete_run(each.name)
    if each.folder is not None:
        shutil.rmtree(each.folder, ignore_errors=True)
    else:
        _files(store, run).delete_artifacts()
    if not store.uri.startswith("http"):
        # as `mlflow gc` does, which would also remove whatever else was deleted in the UI
        store.client._tracking_client.store._hard_delete_run(each.name)


def _files(store: Store, run: "MlflowRun") -> Any:
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    return get_artifact_repository(run.info.artifact_uri, tracking_uri=store.uri)


def _find_in_task(store: Store, task: str, kinds: Collection[str], protected: set[str]) -> Iterator[Removable]:
    experiments = [found for name in (task, keys.trials_of(task)) if (found := store.experiment(name)) is not None]
    everyones = {run.info.run_id: run for each in experiments for run in _runs(store, each.experiment_id)}
    ours = {run_id: run for run_id, run in everyones.items() if "fingerprint" in run.data.tags}
    below = defaultdict(list)
    for run_id, run in everyones.items():
        below[run.data.tags.get(keys.PARENT)].append(run_id)
    kept = protected | _at_work(everyones)
    whole = {everyones[run_id].data.tags.get(keys.PARENT) for run_id in protected & everyones.keys()}
    kind_of = dict(_splits_to_remove(ours, below, kinds, kept, whole))
    kind_of |= dict(_parents_to_remove(ours, below, kinds, kept, kind_of))
    moved = moves({each.name: each.artifact_location for each in experiments}, store.database)
    for run_id, kind in kind_of.items():
        run = ours[run_id]
        folder = own_folder(run.info.artifact_uri, moved)
        if folder is not None and folder.parent.name == run_id:
            folder = folder.parent
        size = _size(folder) if folder is not None else _size_there(store, run)
        yield Removable(kind, run_id, size, folder, run)
    if "state" in kinds:
        yield from _state(store, ours)


def _splits_to_remove(
    ours: "dict[str, MlflowRun]",
    below: Mapping[str | None, list[str]],
    kinds: Collection[str],
    kept: set[str],
    whole: Collection[str | None],
) -> Iterator[tuple[str, str]]:
    """Yield the splits to remove, each with its trials, and their kind; parents in `whole` keep their finished splits.

    Their summary is of a registered run, and of all the others.
    """
    for run_id, run in ours.items():
        if keys.PARENT not in run.data.tags or _is_trial(run, ours):
            continue
        kind, family = _kind(run, ours), [run_id, *below[run_id]]
        if kind == "sample" and run.info.status == "FINISHED" and run.data.tags[keys.PARENT] in whole:
            continue
        if kind in kinds and not kept.intersection(family) and set(family) <= ours.keys():
            yield from ((member, kind) for member in family)


def _parents_to_remove(
    ours: "dict[str, MlflowRun]",
    below: Mapping[str | None, list[str]],
    kinds: Collection[str],
    kept: set[str],
    kind_of: Mapping[str, str],
) -> Iterator[tuple[str, str]]:
    """Yield the parents of which no split stays, and their kind; `kind_of` has the splits to remove."""
    for run_id, run in ours.items():
        splits = below[run_id]
        if keys.PARENT in run.data.tags or run_id in kept or not all(split in kind_of for split in splits):
            continue
        kind = _kind(run, ours)
        if kind not in ("sample", "abandoned"):
            kind = kind_of[splits[0]] if splits else "superseded"
        if kind in kinds:
            yield run_id, kind


def _is_finished(run_id: str | None, ours: "dict[str, MlflowRun]") -> bool:
    return run_id in ours and ours[run_id].info.status == "FINISHED"


def _kind(run: "MlflowRun", ours: "dict[str, MlflowRun]") -> str:
    """Return the kind of a run that its own tags decide; empty if it is to stay."""
    if run.info.status in UNFINISHED and owners.is_alive(run.data.tags):
        return ""
    if run.info.status == "FINISHED" and _is_finished(run.data.tags.get("superseded_by"), ours):
        return "superseded"
    if run.info.status in UNFINISHED:
        return "abandoned"
    return "sample" if run.data.params.get("dataset", "").startswith(keys.SAMPLE) else ""


def _is_trial(run: "MlflowRun", ours: Collection[str]) -> bool:
    """Whether a run is a trial of a split that is there."""
    return run.data.tags.get("task", "").endswith(keys.TRIALS) and run.data.tags[keys.PARENT] in ours


def _at_work(runs: "dict[str, MlflowRun]") -> set[str]:
    """Return all runs of the parents under which a living process works on some run."""

    def top(run_id: str) -> str:
        while (above := runs[run_id].data.tags.get(keys.PARENT)) in runs:
            run_id = above
        return run_id

    working = {
        top(run_id)
        for run_id, run in runs.items()
        if run.info.status in ("RUNNING", "SCHEDULED") and owners.is_alive(run.data.tags)
    }
    return {run_id for run_id in runs if top(run_id) in working}


def _registered(store: Store) -> set[str]:
    """Return the runs that versions of registered models are of, with an alias or without."""
    versions = all_pages(lambda token: store.client.search_model_versions(max_results=1000, page_token=token))
    return {version.run_id for version in versions if version.run_id}


def _in_journal(store: Store) -> set[str]:
    """Return the runs whose results this machine is still to send, and their parents."""
    found = set[str]()
    for record in store.state.glob(f"*{journal.ENTRY}/{journal.RECORD}"):
        try:
            content = journal.read_record(record.parent)
            found |= {content["run_id"], content["run"]["parent_id"]}
        except (ValueError, KeyError, TypeError):
            raise StoreError(f"{record} is damaged; repair it, or remove {record.parent}") from None
    return found


def _state(store: Store, ours: "dict[str, MlflowRun]") -> Iterator[Removable]:
    """Find the resume files of splits that are finished, and of the trials of such splits."""
    for run in (run for run_id, run in ours.items() if _is_finished(run_id, ours)):
        is_over = not _is_trial(run, ours) or _is_finished(run.data.tags[keys.PARENT], ours)
        path = store.state / f"{run.data.tags['fingerprint']}.resume"
        if is_over and run.data.tags.get("superseded_by") != keys.AGAIN and path.is_file():
            yield Removable("state", path.name, path.stat().st_size, path)


def _runs(store: Store, experiment: str) -> "Iterator[MlflowRun]":
    return all_pages(lambda token: store.client.search_runs([experiment], max_results=1000, page_token=token))


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _size_there(store: Store, run: "MlflowRun") -> int:
    """Add up the sizes of the files that a server keeps of a run."""
    files = _files(store, run)

    def below(folder: str | None) -> int:
        return sum(below(each.path) if each.is_dir else each.file_size or 0 for each in files.list_artifacts(folder))

    return below(None)
