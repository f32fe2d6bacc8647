"""MLflow's model registry: one model for each task, whose alias `champion` points to the best network so far."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tracking.artifacts import Artifacts
from tracking.commands import script_of
from tracking.errors import StoreError
from tracking.keys import CHAMPION, REASON, TASK
from tracking.store import Store, prefixed

if TYPE_CHECKING:
    from mlflow.entities import Experiment

ABOUT = "The best network of {} so far; each version says which."  # ends the description of a registered model


class Champion(NamedTuple):
    """A registered version."""

    version: str
    run_id: str  # of the split that trained the weights
    reason: str  # why it replaced the version before
    has_files: bool


class NewVersion(NamedTuple):
    """A version to register."""

    run_id: str  # of the split that trained the weights
    name: str  # of the logged model, in the UI
    folder: Path  # that MLflow saved
    question: str  # begins the description of a new registered model; Markdown, like the next
    description: str
    reason: str


def read_champion(store: Store, task: str) -> Champion | None:
    """Look up the champion of a task; None if there is none.

    Raises
    ------
    StoreError
        The registered model of this name is somebody else's.
    """
    from mlflow.exceptions import MlflowException

    try:
        if not is_ours(store, task):
            raise StoreError(
                f"the registered model {prefixed(task)!r} of {store.label} is not of this program; rename it there, or "
                "give the task another name"
            )
        found = store.client.get_model_version_by_alias(prefixed(task), CHAMPION)
    except MlflowException as error:
        # no such model, no such alias; with passwords a server denies what is not there
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "PERMISSION_DENIED"):
            return None
        raise
    version = str(found.version)
    return Champion(version, found.run_id or "", found.tags.get(REASON, ""), _has_files(store, task, version))


def is_ours(store: Store, task: str) -> bool:
    """Whether the registered model of a task's name is this program's, or there is none.

    Ours have the tag of their task. Those of versions that set none have our description, or a reason at each version;
    they get the tag when the champion is next registered or described.
    """
    name = prefixed(task)
    found = store.client.search_registered_models(f"name = '{name}'")
    if not found or found[0].tags.get(TASK) == task or (found[0].description or "").endswith(ABOUT.format(task)):
        return True
    versions = store.client.search_model_versions(f"name = '{name}'")
    return bool(versions) and all(REASON in version.tags for version in versions)


def register_champion(store: Store, task: str, new: NewVersion) -> str:
    """Log and register a model under the task's name, point the alias to it, and return the version.

    A version of the same run, left by a command that was killed, is used instead.
    """
    from mlflow.entities import LoggedModelOutput

    client, called = store.client, prefixed(task)
    if not client.search_registered_models(f"name = '{called}'"):
        client.create_registered_model(called, {TASK: task}, description=f"{new.question} {ABOUT.format(task)}")
    client.set_registered_model_tag(called, TASK, task)
    of_run = client.search_model_versions(f"name = '{called}' and run_id = '{new.run_id}'")
    there = [str(found.version) for found in of_run if _has_files(store, task, str(found.version))]
    if there:
        version = max(there, key=int)
        client.update_model_version(called, version, new.description)
        client.set_model_version_tag(called, version, REASON, new.reason)
    else:
        experiment = _experiment(store, task)
        name = re.sub(r"[^\w-]+", "-", new.name)  # MLflow allows no other signs
        model = client.create_logged_model(experiment.experiment_id, name, source_run_id=new.run_id)
        Artifacts(store, experiment).upload_model(model, new.folder)
        client.finalize_logged_model(model.model_id, "READY")
        client.log_outputs(new.run_id, [LoggedModelOutput(model.model_id, step=0)])
        # a database would resolve the id against MLflow's global tracking URI; a server wants it
        source = f"models:/{model.model_id}" if store.uri.startswith("http") else model.artifact_location
        made = client.create_model_version(
            called, source, new.run_id, {REASON: new.reason}, description=new.description, model_id=model.model_id
        )
        version = str(made.version)
    client.set_registered_model_alias(called, CHAMPION, version)
    return version


def describe_champion(store: Store, task: str, champion: Champion, description: str) -> None:
    """Set the description of a version, and the tag by which its model is ours."""
    store.client.set_registered_model_tag(prefixed(task), TASK, task)
    if store.client.get_model_version(prefixed(task), champion.version).description != description:
        store.client.update_model_version(prefixed(task), champion.version, description)


def fetch_champion(store: Store, task: str, champion: Champion, scratch: Path) -> Path:
    """Return the folder of a version's files, downloading them from a server to `scratch`; if missing, `StoreError`."""
    if not champion.has_files:
        which = f"the champion of {task}, version {champion.version}"
        raise StoreError(f"the files of {which}, are gone; the next {script_of(task)} registers another")
    location = store.client.get_model_version_download_uri(prefixed(task), champion.version)
    artifacts = Artifacts(store, _experiment(store, task))
    return artifacts.folder(location) or artifacts.fetch_model(f"models:/{prefixed(task)}/{champion.version}", scratch)


def _has_files(store: Store, task: str, version: str) -> bool:
    """Whether a version's files exist; assumed for a server's."""
    if (experiment := store.experiment(task)) is None:  # `mlflow gc` removed it with its files
        return False
    location = store.client.get_model_version_download_uri(prefixed(task), version)
    folder = Artifacts(store, experiment).folder(location)
    return folder is None or (folder / "MLmodel").is_file()


def _experiment(store: Store, task: str) -> "Experiment":
    experiment = store.experiment(task)
    assert experiment is not None  # the champion's run is in it
    return experiment
