"""The task of a folder, as its runs describe it: it has no script that says so."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

import analysis
import tracking
from datasets import DatasetError, ImageFolder, Source, named_protocol
from experiments.jobs.rebuilt import rebuild
from experiments.task import Task, TaskError, find
from tracking.commands import script_tasks
from tracking.keys import CHECKPOINT


def find_stored(name: str, data_dir: Path | None, tracking_uri: str | None) -> Task:
    """Return a task by its script or, if there is none, by its runs in the store.

    Raises
    ------
    TaskError, StoreError
        It has neither, or the folder of its images is not given.
    """
    if name in script_tasks():
        return find(name)
    runs = analysis.load_runs([name], tracking.open_store(tracking_uri).uri)
    done = runs[runs["status"] == "FINISHED"]
    if done.empty:
        raise TaskError(f"{name} has no finished run; run experiments/folder.py with its folder first")
    if data_dir is None:
        raise TaskError(f"{name} is a folder of yours; name it in --data-dir")
    first = done.iloc[-1]
    return Task(
        name=name,
        question=str(first["question"]),
        data=ImageFolder(str(data_dir.resolve())),  # `source_of` knows size and channels
        protocol=named_protocol(str(first["protocol"]), int(first["n_splits"])),
        models=(str(first["model"]),),
    )


def source_of(run: "pd.Series[Any]", task: Task, tracking_uri: str) -> Source:
    """Return the data of a run as its model saw them: the runs of a folder may have other sizes and channels.

    Raises
    ------
    DatasetError
        The checkpoint, which says so, is missing or damaged.
    """
    if task.name in script_tasks() or not isinstance(task.data, ImageFolder):
        return task.data
    try:
        arguments = rebuild(analysis.local_artifact(run, CHECKPOINT, tracking_uri)).checkpoint.arguments
        return replace(task.data, image_size=arguments["image_size"], channels=arguments["in_channels"])
    except Exception as error:  # noqa: BLE001 - readers raise whatever a damaged file makes them trip over
        raise DatasetError(
            f"{CHECKPOINT} of run {run['run_id']} does not tell ({tracking.in_one_line(error)})"
        ) from None
