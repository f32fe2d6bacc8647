"""Writing runs: a parent for a model under one configuration, a child for each of its splits."""

import contextlib
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tracking.keys import EPOCH_METRICS, FINAL_METRICS, GROUP_PARAMS, PARAMS, SUMMARY_METRICS, TAGS
from tracking.store import Store, StoreError


class Run:
    """An open run. Its keys are those of `tracking.keys`; others are refused."""

    def __init__(self, store: Store, run_id: str) -> None:
        self.store = store
        self.id = run_id

    def log_metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Log metrics in one call, which is what an epoch can afford."""
        from mlflow.entities import Metric

        _check_keys(values, EPOCH_METRICS | FINAL_METRICS | SUMMARY_METRICS)
        now = time.time_ns() // 1_000_000
        self.store.client.log_batch(self.id, [Metric(key, value, now, step) for key, value in values.items()])

    def log_files(self, folder: Path, into: str | None = None) -> None:
        """Copy the files of a folder to the run's artifacts, or to a folder in them."""
        self.store.client.log_artifacts(self.id, str(folder), into)

    def log_dataset(self, name: str, digest: str, profile: str) -> None:
        """Enter the data set that the run used, with our own digest (MLflow keeps 36 characters of it)."""
        from mlflow.entities import Dataset, DatasetInput

        dataset = Dataset(name, digest[:36], source_type="local", source="{}", profile=profile)
        self.store.client.log_inputs(self.id, [DatasetInput(dataset, tags=[])])


@contextlib.contextmanager
def parent_run(store: Store, task: str, name: str, params: Mapping[str, Any], tags: Mapping[str, str]) -> Iterator[Run]:
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
    Run
    """
    experiment = store.make_experiment(task)
    same = f"tags.fingerprint = '{tags['fingerprint']}'"
    found = store.client.search_runs([experiment], f"{same} and tags.`mlflow.parentRunId` IS NULL", max_results=1)
    if not found:
        with _new_run(store, experiment, name, params, tags) as run:
            yield run
        return
    run_id = found[0].info.run_id
    with _ending(store, run_id):
        store.client.update_run(run_id, status="RUNNING")
        if "failure" in found[0].data.tags:
            store.client.delete_tag(run_id, "failure")
        yield Run(store, run_id)


@contextlib.contextmanager
def child_run(
    store: Store, parent: Run, name: str, params: Mapping[str, Any], tags: Mapping[str, str]
) -> Iterator[Run]:
    """Make the run of one split; when it has finished, older runs of that split in its comparison group are marked.

    Parameters
    ----------
    store : Store
    parent : Run
    name : str
        The run's name in the UI.
    params, tags : mapping
        The parent's, with the split's own.

    Yields
    ------
    Run
    """
    experiment = store.client.get_run(parent.id).info.experiment_id
    with _new_run(store, experiment, name, params, {**tags, "mlflow.parentRunId": parent.id}) as run:
        yield run
    same = {key: str(params[key]) for key in ("model", "split", *GROUP_PARAMS)}
    query = " and ".join(f"params.{key} = '{value}'" for key, value in same.items())
    query += f" and tags.dataset_digest = '{tags['dataset_digest']}' and status = 'FINISHED'"
    for older in store.client.search_runs([experiment], query):
        kind, own_kind = (str(device).split(":")[0] for device in (older.data.params["device"], params["device"]))
        if older.info.run_id != run.id and kind == own_kind and "superseded_by" not in older.data.tags:
            store.client.set_tag(older.info.run_id, "superseded_by", run.id)


@contextlib.contextmanager
def _new_run(
    store: Store, experiment: str, name: str, params: Mapping[str, Any], tags: Mapping[str, str]
) -> Iterator[Run]:
    from mlflow.entities import Param

    _check_keys(params, PARAMS)
    _check_keys((tag for tag in tags if not tag.startswith("mlflow.")), TAGS)
    run_id = store.client.create_run(experiment, tags=dict(tags), run_name=name).info.run_id
    with _ending(store, run_id):
        store.client.log_batch(run_id, params=[Param(key, str(value)) for key, value in params.items()])
        yield Run(store, run_id)


@contextlib.contextmanager
def _ending(store: Store, run_id: str) -> Iterator[None]:
    """Give a run its end: FINISHED, KILLED on Ctrl-C, FAILED with the reason on anything else."""
    try:
        yield
        store.client.set_terminated(run_id, "FINISHED")
    except BaseException as error:
        killed = isinstance(error, KeyboardInterrupt)
        with contextlib.suppress(Exception):  # the store itself may be what failed
            if not killed:
                store.client.set_tag(run_id, "failure", (str(error) or repr(error))[:500])
            store.client.set_terminated(run_id, "KILLED" if killed else "FAILED")
        raise


def _check_keys(keys: Any, known: Mapping[str, str]) -> None:
    if unknown := set(keys) - set(known):
        raise StoreError(f"{', '.join(sorted(unknown))} not in tracking.keys; enter them there with their meaning")
