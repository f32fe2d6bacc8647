"""Texts for the MLflow UI: the description of a task's experiment, and the names of its parent runs."""

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow.exceptions import MlflowException

import tracking
from datasets import ImageFolder, PublishedValidation, StratifiedKFold
from datasets.names import readable_name
from experiments.task import Task
from tracking import Store
from tracking.commands import script_tasks
from tracking.keys import (
    BASELINES,
    EPOCH_METRICS,
    FINAL_METRICS,
    HIGH,
    LOW,
    MEAN,
    SAMPLE,
    SD,
    SEEDS,
    SUMMARY_METRICS,
    has_open_end,
    tuned_settings,
)
from tracking.settings import LATER

FOLDER = "folder"  # tag of the experiment of a folder that is a task of its own
OF_THE_MACHINE = ("device", "precision")  # settings that follow from it


def parent_name(task: Task, params: Mapping[str, Any]) -> str:
    """Name a parent run: its model, and which settings are not the task's own, such as "lenet5, sample, 2 splits"."""
    usual = {"epochs": task.training.epochs, **dataclasses.asdict(task.training)}
    if not has_open_end(task.protocol.name):  # else more splits may follow
        usual = {"n_splits": task.protocol.n_splits, **usual}
    if "seed" in params:  # one number for both
        usual = {key: value for key, value in usual.items() if key not in SEEDS} | {"seed": task.training.train_seed}
    dataset = params["dataset"]
    beside = "beside " * (params["model"] in BASELINES)
    parts = [params["model"]]
    if dataset.startswith(SAMPLE):
        parts.append(SAMPLE.strip("/"))
    elif dataset != task.data.name:
        parts.append(dataset)
    phrases = {
        "n_splits": f"{params['n_splits']} split{'s' * (params['n_splits'] != 1)}",
        "epochs": f"{params['epochs']} epoch{'s' * (params['epochs'] != 1)}",
        "augment": "augmented" if params["augment"] else "not augmented",
        "pretrained": f"{beside}pretrained" if "pretrained" in params else "not pretrained",
        "freeze": f"{beside}heads only" if "freeze" in params else "all layers",
        "cudnn_benchmark": "cuDNN chooses by timing" if "cudnn_benchmark" in params else "cuDNN chooses by rule",
    }
    if "tune" in params and params["model"] not in BASELINES:
        parts.append(f"tuned, {params['tune']} of {params['space']}" + ("" if params["halving"] else ", no halving"))
    for key, value in usual.items():
        own = params.get(key, LATER.get(key))
        if key not in tuned_settings(params) and own != value and key not in OF_THE_MACHINE:
            parts.append(phrases.get(key, f"{key.replace('_', ' ')} {params[key]}"))
    if params["leak_free"]:
        parts.append("leak-free")
    return ", ".join(parts)


def describe_experiment(store: Store, task: Task) -> None:
    """Give a task's experiment its description and columns in the UI, unless the store refuses."""
    text = description(task)
    experiment = tracking.persist(lambda: store.make_experiment(task.name, task.experiment))
    if isinstance(task.data, ImageFolder) and task.name not in script_tasks():
        tracking.persist(lambda: _refuse_another_folder(store, experiment, task.name, task.data.home))
    try:
        tracking.persist(lambda: store.describe_experiment(task.name, text), tracking.SHORT)
    except MlflowException as error:  # of a server that lets us write runs only, or has gone away, which is seen next
        reason = tracking.in_one_line(error)
        print(f"the experiment in the UI gets no description ({reason}); the runs do without", file=sys.stderr)


def _refuse_another_folder(store: Store, experiment: str, task: str, folder: Path) -> None:
    """Keep two folders of one name apart: their runs and champions would mix."""
    former = store.client.get_experiment(experiment).tags.get(FOLDER)
    if former not in (None, str(folder)) and Path(former).exists():
        raise tracking.StoreError(
            f"{task} is the folder {readable_name(former)} in {store.label}; give this one another name with --name"
        )
    if former != str(folder):
        store.client.set_experiment_tag(experiment, FOLDER, str(folder))


def description(task: Task) -> str:
    """Explain a task's experiment to readers of the UI, in Markdown; folded up, it shows its first line."""
    of_parents = {
        f"{MEAN}test/accuracy": f"**the honest score**, {SUMMARY_METRICS[f'{MEAN}test/accuracy']}",
        f"{SD}test/accuracy": f"{SUMMARY_METRICS[f'{SD}test/accuracy']}: how much one split differs from the next. "
        "It is no standard error of the mean",
        f"{LOW}test/accuracy": SUMMARY_METRICS[f"{LOW}test/accuracy"],
        f"{HIGH}test/accuracy": SUMMARY_METRICS[f"{HIGH}test/accuracy"],
        f"{MEAN}test/f1_macro": f"{SUMMARY_METRICS[f'{MEAN}test/f1_macro']}, the {EPOCH_METRICS['val/f1_macro']}: rare "
        "classes count as much as frequent ones. Micro-F1 is not shown, since it equals accuracy here",
        "n_splits": SUMMARY_METRICS["n_splits"],
    }
    of_splits = {
        "test/accuracy": FINAL_METRICS["test/accuracy"],
        "best_val/accuracy": FINAL_METRICS["best_val/accuracy"],
        "best_epoch": FINAL_METRICS["best_epoch"],
    }
    name = task.data.name
    blocks = [
        f"**{task.question}** Each row is a model under one configuration (a *parent* run); "
        "the + before its name opens its splits (its *child* runs).",
        f"**Data.** {name}, unless the param `dataset` says otherwise. If that begins with `{SAMPLE}`, the images "
        "are generated ones to try the program on, and the scores say nothing about the question.",
        f"**Protocol.** {_protocol(task)} The training part is learned from, the validation part chooses "
        "the best epoch, and the test part is looked at once, at the end.",
        f"**A parent's columns**\n\n{_bullets(of_parents)}",
        f"**A split's columns**\n\n{_bullets(of_splits)}",
        "A split's page has its curves under *Model metrics* (search there for `^train|^val`), and its confusion "
        "matrix, predictions and best weights under *Artifacts*; a parent's has the figures of the comparison there.",
        f"**Baselines.** {' and '.join(f'`{baseline}`' for baseline in BASELINES)} are the scores to beat.",
        f"**Is a difference real?** Sorting by `{MEAN}test/accuracy` does not tell: splits share images, and runs with "
        "other settings or data stand in the same list. These commands compare only runs that are comparable, and "
        "warn of unfinished splits and leaks:",
        f"    python -m analysis table {task.name}\n    python -m analysis compare {task.name}",
    ]
    return "\n\n".join(blocks)


def _bullets(meanings: Mapping[str, str]) -> str:
    return "\n".join(f"- `{key}`: {meaning}" for key, meaning in meanings.items())


def _protocol(task: Task) -> str:
    """Say how the images are divided; `n_splits` of a run may be another number."""
    usual_splits = task.protocol.n_splits
    name, times = task.protocol.name.capitalize(), f"{usual_splits} times unless `n_splits` says otherwise"
    if task.protocol.has_test_part:
        return f"{name}: all images are divided anew, {times}, into parts that hold each class in its share."
    if isinstance(task.protocol, PublishedValidation):
        how = "training and validation part are the published ones."
    elif isinstance(task.protocol, StratifiedKFold):
        how = f"the published training folder is divided into {usual_splits} folds with equal shares of the classes, "
        how += "and each of them is the validation part once; each repetition divides it anew."
    else:
        how = f"the published training folder is divided anew, {times}, into a training and a validation part."
    return f"{name}: {how} The published test folder, where there is one, is the test part of every split."
