"""Locating and copying the files of runs, also after a SQLite database was moved together with its artifacts."""

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from urllib.request import url2pathname

from tracking.outages import persist
from tracking.store import Store

if TYPE_CHECKING:
    from mlflow.entities import Experiment as MlflowExperiment
    from mlflow.entities import LoggedModel
    from mlflow.entities import Run as MlflowRun


class Artifacts:
    """The files of an experiment's runs, on this machine or on a server."""

    def __init__(self, store: Store, experiment: "MlflowExperiment") -> None:
        self._client = store.client
        self._uri = store.uri
        self._moved = moved_artifacts({experiment.name: experiment.artifact_location}, store.database)
        self._location = experiment.artifact_location
        # where this program's own stores have the files of an experiment
        self._beside = store.database and store.database.parent / "artifacts" / experiment.name

    def fetch(self, run: "MlflowRun", scratch: Path) -> Path:
        """Return the folder of a run's files, downloading them from a server. A run without files may have none."""
        if (folder := self.folder(run.info.artifact_uri)) is not None:
            return folder
        scratch.mkdir()
        return Path(persist(lambda: self._client.download_artifacts(run.info.run_id, "", str(scratch))))

    def fetch_model(self, model: str, scratch: Path) -> Path:
        """Download the files of a registered model, such as models:/task1/1."""
        from mlflow.artifacts import download_artifacts

        where = {"dst_path": str(scratch), "tracking_uri": self._uri, "registry_uri": self._uri}
        return Path(persist(lambda: download_artifacts(model, **where)))

    def upload(self, run: "MlflowRun", files: Path, into: str = "") -> None:
        """Copy the files of a folder to a run's artifacts, or to a folder in them."""
        if (folder := self._target(run.info.artifact_uri)) is None:
            self._client.log_artifacts(run.info.run_id, str(files), into or None)
        else:
            _copy(files, folder / into)

    def upload_model(self, model: "LoggedModel", files: Path) -> None:
        """Copy the files of a folder to a logged model's."""
        if (folder := self._target(model.artifact_location)) is None:
            self._client.log_model_artifacts(model.model_id, str(files))
        else:
            _copy(files, folder)

    def folder(self, uri: str) -> Path | None:
        """Return the local folder of an artifact URI for reading, or None if a server keeps the files."""
        beside = self._target(uri)
        return beside if beside and beside.exists() else local_path(relocated(uri, self._moved))

    def _target(self, uri: str) -> Path | None:
        """Return the folder that files are written to: beside a SQLite database, though another one be recorded.

        The files of a copied store are its own; those at the recorded place belong to the original.
        """
        recorded, location = local_path(uri), local_path(self._location)
        is_ours = self._beside and location and location.parts[-2:] == self._beside.parts[-2:]
        if self._beside and recorded and location and is_ours and recorded.is_relative_to(location):
            return self._beside / recorded.relative_to(location)
        return recorded


def _copy(files: Path, folder: Path) -> None:
    """Copy a folder's files; MLflow itself would write to the place that a moved store came from."""
    for path in filter(Path.is_file, files.rglob("*")):
        target = folder / path.relative_to(files)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


def file_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each file in a folder, by its path there; empty if the folder does not exist."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def moved_artifacts(locations: Mapping[str, str], database: Path | None) -> dict[str, str]:
    """Find the artifact folders beside a SQLite database (None for any other store) that are recorded elsewhere.

    The database was moved or copied together with them. `locations` maps names of experiments to recorded artifact
    URIs. The result maps recorded URIs to those beside the database.
    """
    if database is None:
        return {}
    moved = {}
    for name, location in locations.items():
        recorded, beside = local_path(location), database.parent / "artifacts" / name
        if recorded and beside.is_dir() and not (recorded.exists() and recorded.samefile(beside)):
            moved[location] = beside.as_uri()
    return moved


def relocated(uri: str, moved: Mapping[str, str]) -> str:
    """Translate a recorded artifact URI by the result of `moved_artifacts`; a folder beside the database is first."""
    for old, new in moved.items():
        if uri.startswith(f"{old}/"):
            beside, recorded = local_path(new + uri.removeprefix(old)), local_path(uri)
            if beside and (beside.exists() or not (recorded and recorded.exists())):
                return new + uri.removeprefix(old)
    return uri


def local_path(uri: str) -> Path | None:
    """Return the local folder that a URI names, or None if a server keeps the files."""
    parts = urlsplit(uri)
    if parts.scheme == "file":
        return Path(url2pathname(parts.path))
    return Path(uri) if len(parts.scheme) < 2 else None  # one letter is a drive
