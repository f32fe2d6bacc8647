"""MLflow's model registry: under each task's name its best network so far, which the alias `champion` points to."""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tracking.artifacts import Artifacts
from tracking.keys import CHAMPION, EXPERIMENTS
from tracking.store import Store, StoreError

if TYPE_CHECKING:
    from mlflow.entities import Experiment


class Champion(NamedTuple):
    """A registered version."""

    version: str
    run_id: str  # of the split whose weights it has


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
    return Champion(str(found.version), found.run_id or "")


def register_champion(
    store: Store, task: str, run_id: str, name: str, folder: Path, about: str, description: str
) -> Champion:
    """Log a model, register it under the task's name, and let the alias point to it.

    Parameters
    ----------
    store : Store
    task : str
        Key of `EXPERIMENTS`.
    run_id : str
        The split whose weights it has.
    name : str
        Of the logged model, in the UI.
    folder : pathlib.Path
        What MLflow saved.
    about, description : str
        Of the task's registered model, where it is new, and of this version; Markdown.

    Returns
    -------
    Champion
    """
    from mlflow.entities import LoggedModelOutput
    from mlflow.exceptions import MlflowException

    client = store.client
    experiment = _experiment(store, task)
    model = client.create_logged_model(experiment.experiment_id, name, source_run_id=run_id)
    Artifacts(store, experiment).upload_model(model, folder)
    client.finalize_logged_model(model.model_id, "READY")
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
    try:
        client.create_registered_model(task, description=about)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    # with the id, a database would look for the model where MLflow's global tracking URI points to; a server wants it
    source = f"models:/{model.model_id}" if store.uri.startswith("http") else model.artifact_location
    made = client.create_model_version(task, source, run_id, description=description, model_id=model.model_id)
    client.set_registered_model_alias(task, CHAMPION, made.version)
    return Champion(str(made.version), run_id)


def fetch_champion(store: Store, task: str, champion: Champion, scratch: Path) -> Path:
    """Return the folder of a version's files; a server's are downloaded to `scratch`.

    Raises
    ------
    StoreError
        They are not there.
    """
    location = store.client.get_model_version_download_uri(task, champion.version)
    folder = Artifacts(store, _experiment(store, task)).fetch_model(
        f"models:/{task}/{champion.version}", location, scratch
    )
    if not (folder / "MLmodel").is_file():
        raise StoreError(f"the files of the champion of {task}, version {champion.version}, are not in {folder}")
    return folder


def _experiment(store: Store, task: str) -> "Experiment":
    experiment = store.client.get_experiment_by_name(EXPERIMENTS[task])
    assert experiment is not None  # it has the run that the champion comes from
    return experiment
