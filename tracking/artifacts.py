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
        self._moves = moves({experiment.name: experiment.artifact_location}, store.database)

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
        if (folder := own_folder(run.info.artifact_uri, self._moves)) is None:
            self._client.log_artifacts(run.info.run_id, str(files), into or None)
        else:
            _copy(files, folder / into)

    def upload_model(self, model: "LoggedModel", files: Path) -> None:
        """Copy the files of a folder to a logged model's."""
        if (folder := own_folder(model.artifact_location, self._moves)) is None:
            self._client.log_model_artifacts(model.model_id, str(files))
        else:
            _copy(files, folder)

    def folder(self, uri: str) -> Path | None:
        """Return the local folder of an artifact URI for reading, or None if a server keeps the files."""
        return folder_with_files(uri, self._moves)


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


def moves(locations: Mapping[str, str], database: Path | None) -> dict[Path, Path]:
    """Return where this program's own stores have the files of experiments, if another place is recorded.

    The store was moved or copied, with its files in `artifacts/` beside the SQLite database (None for any other store).
    `locations` maps names of experiments to recorded artifact URIs; the result maps recorded folders to our own.
    """
    found: dict[Path, Path] = {}
    if database is None:
        return found
    for name, location in locations.items():
        recorded, own = local_path(location), database.parent / "artifacts" / name
        if recorded and recorded != own and recorded.parts[-2:] == own.parts[-2:]:
            found[recorded] = own
    return found


def own_folder(uri: str, moved: Mapping[Path, Path]) -> Path | None:
    """Return the folder of an artifact URI for writing, or None if a server keeps the files; `moved` is from `moves`.

    The files of a copied store are its own; those at the recorded place belong to the original.
    """
    recorded = local_path(uri)
    for old, new in moved.items():
        if recorded and recorded.is_relative_to(old):
            return new / recorded.relative_to(old)
    return recorded


def folder_with_files(uri: str, moved: Mapping[Path, Path]) -> Path | None:
    """Return the `own_folder` for reading, or the recorded one if only that exists, as of a database copied alone."""
    recorded = local_path(uri)
    own = own_folder(uri, {old: new for old, new in moved.items() if new.is_dir()})
    return recorded if own and recorded and recorded.exists() and not own.exists() else own


def local_path(uri: str) -> Path | None:
    """Return the local folder that a URI names, or None if a server keeps the files."""
    parts = urlsplit(uri)
    if parts.scheme == "file":
        return Path(url2pathname(parts.path))
    return Path(uri) if len(parts.scheme) < 2 else None  # one letter is a drive
