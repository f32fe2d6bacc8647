"""The task of a folder, as its runs describe it: it has no script that says so."""

from pathlib import Path

import analysis
import tracking
from datasets import ImageFolder, named_protocol
from experiments.jobs.results import rebuild
from experiments.task import Task, TaskError, find, names
from tracking.keys import CHECKPOINT


def find_stored(name: str, data_dir: Path | None, tracking_uri: str | None) -> Task:
    """Return a task by its script or, if there is none, by its runs in the store.

    Raises
    ------
    TaskError, StoreError
        It has neither, or the folder of its images is not given.
    """
    if name in names():
        return find(name)
    uri = tracking.open_store(tracking_uri).uri
    runs = analysis.load_runs([name], uri)
    done = runs[runs["status"] == "FINISHED"]
    if done.empty:
        raise TaskError(f"{name} has no finished run; run experiments/folder.py with its folder first")
    if data_dir is None:
        raise TaskError(f"{name} is a folder of yours; name it in --data-dir")
    first = done.iloc[-1]
    arguments = rebuild(analysis.local_artifact(first, CHECKPOINT, uri)).checkpoint.arguments
    return Task(
        name=name,
        question=str(first["question"]),
        data=ImageFolder(str(data_dir.resolve()), arguments["image_size"], arguments["in_channels"]),
        protocol=named_protocol(str(first["protocol"]), int(first["n_splits"])),
        models=(str(first["model"]),),
    )
