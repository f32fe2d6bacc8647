"""MLflow's model registry: under each task's name its best network so far, which the alias `champion` points to."""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tracking.artifacts import Artifacts
from tracking.keys import CHAMPION, REASON
from tracking.store import Store, StoreError

if TYPE_CHECKING:
    from mlflow.entities import Experiment


class Champion(NamedTuple):
    """A registered version."""

    version: str
    run_id: str  # of the split whose weights it has
    reason: str  # why it took the place of the one before
    has_files: bool


class NewVersion(NamedTuple):
    """What is to be registered."""

    run_id: str  # the split whose weights it has
    name: str  # of the logged model, in the UI
    folder: Path  # what MLflow saved
    about: str  # the task's registered model, where it is new; Markdown, as the next
    description: str
    reason: str


def read_champion(store: Store, task: str) -> Champion | None:
    """Look up the champion of a task; None where none is registered."""
    from mlflow.exceptions import MlflowException

    try:
        found = store.client.get_model_version_by_alias(task, CHAMPION)
    except MlflowException as error:
        # MLflow's codes for a model and for an alias that is not there
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise
    version = str(found.version)
    return Champion(version, found.run_id or "", found.tags.get(REASON, ""), _has_files(store, task, version))


def register_champion(store: Store, task: str, new: NewVersion) -> str:
    """Log a model, register it under the task's name, and let the alias point to it; return the version.

    A version of the same run that is there already, from a command that was killed, is taken instead.
    """
    from mlflow.entities import LoggedModelOutput

    client = store.client
    if not client.search_registered_models(f"name = '{task}'"):
        client.create_registered_model(task, description=new.about)
    of_run = client.search_model_versions(f"name = '{task}' and run_id = '{new.run_id}'")
    there = [str(found.version) for found in of_run if _has_files(store, task, str(found.version))]
    if there:
        version = max(there, key=int)
        client.update_model_version(task, version, new.description)
        client.set_model_version_tag(task, version, REASON, new.reason)
    else:
        experiment = _experiment(store, task)
        model = client.create_logged_model(experiment.experiment_id, new.name, source_run_id=new.run_id)
        Artifacts(store, experiment).upload_model(model, new.folder)
        client.finalize_logged_model(model.model_id, "READY")
        client.log_outputs(new.run_id, [LoggedModelOutput(model.model_id, step=0)])
        # with the id, a database would look for it where MLflow's global tracking URI points to; a server wants it
        source = f"models:/{model.model_id}" if store.uri.startswith("http") else model.artifact_location
        made = client.create_model_version(
            task, source, new.run_id, {REASON: new.reason}, description=new.description, model_id=model.model_id
        )
        version = str(made.version)
    client.set_registered_model_alias(task, CHAMPION, version)
    return version


def describe_champion(store: Store, task: str, champion: Champion, description: str) -> None:
    """Let a version say this of itself."""
    if store.client.get_model_version(task, champion.version).description != description:
        store.client.update_model_version(task, champion.version, description)


def fetch_champion(store: Store, task: str, champion: Champion, scratch: Path) -> Path:
    """Return the folder of a version's files; a server's are downloaded to `scratch`.

    Raises
    ------
    StoreError
        They are not there.
    """
    if not champion.has_files:
        raise StoreError(
            f"the files of the champion of {task}, version {champion.version}, are gone; the next "
            f"experiments/{task}.py registers another"
        )
    location = store.client.get_model_version_download_uri(task, champion.version)
    artifacts = Artifacts(store, _experiment(store, task))
    return artifacts.folder(location) or artifacts.fetch_model(f"models:/{task}/{champion.version}", scratch)


def _has_files(store: Store, task: str, version: str) -> bool:
    """Whether a version's files are where they should be; of a server's it is believed."""
    location = store.client.get_model_version_download_uri(task, version)
    folder = Artifacts(store, _experiment(store, task)).folder(location)
    return folder is None or (folder / "MLmodel").is_file()


def _experiment(store: Store, task: str) -> "Experiment":
    experiment = store.experiment(task)
    assert experiment is not None  # it has the run that the champion comes from
    return experiment
