"""The protocol loop: every model of a task on every split, each tracked as a run. The one place where all meet."""

import dataclasses
import math
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import sklearn
import torch
import torchvision

import analysis
import datasets
import models
import tracking
from datasets import ImageData, Split
from experiments import display, fingerprint, hardware, records
from experiments.baselines import fit_baseline
from experiments.config import Task, TrainingConfig
from experiments.training import (
    DeviceImages,
    EpochRecord,
    TrainingDivergedError,
    evaluate,
    fit,
    initialise,
    split_seed,
)
from tracking import Run, Store
from tracking.checkpoints import Checkpoint


class SplitsFailedError(Exception):
    """Some splits of a model have no result; the message says which and why."""


@dataclasses.dataclass(frozen=True)
class Protocol:
    """What the runs of one command share."""

    task: Task
    config: TrainingConfig
    data: ImageData
    images: DeviceImages
    splits: list[Split]
    store: Store

    @property
    def model_arguments(self) -> dict[str, int]:
        """What `models.build` needs besides the name."""
        _, _, size, channels = self.data.images.shape
        return {"in_channels": channels, "num_classes": len(self.data.classes), "image_size": size}


def make_splits(task: Task, data: ImageData, seed: int) -> list[Split]:
    """Divide the images: a protocol with its own test part gets all of them, another one the published train part."""
    if task.protocol.has_test_part:
        return task.protocol.split(data.labels, seed)
    published_test = np.arange(data.n_pool, len(data.labels))
    splits = task.protocol.split(data.labels[: data.n_pool], seed)
    return [split._replace(test=published_test) for split in splits]


def run(
    task: Task,
    config: TrainingConfig,
    chosen: list[int],
    data_dir: Path | None = None,
    sample: bool = False,
    tracking_uri: str | None = None,
) -> list[str]:
    """Train the task's models on the chosen splits, track every run, and print the comparison table.

    Parameters
    ----------
    task : Task
        With the models and the number of splits that were asked for.
    config : TrainingConfig
        Resolved (`hardware.resolve`).
    chosen : list of int
        Splits to run, from 0.
    data_dir, sample : see `datasets.load`
    tracking_uri : see `tracking.open_store`

    Returns
    -------
    list of str
        One sentence for each split that failed.
    """
    hardware.prepare(config)
    uri = tracking.check_uri(tracking_uri)  # a wrong one is noticed before the download
    data = datasets.load(task.name, data_dir, sample)
    splits = make_splits(task, data, config.seed)
    store = tracking.open_store(uri, create=True)
    display.announce(task, config, data, splits, chosen, store)
    try:
        images = DeviceImages.load(data, config.device)
    except torch.OutOfMemoryError:
        raise datasets.DatasetError(f"{data.name} does not fit into the GPU's memory; use --device cpu") from None
    protocol = Protocol(task, config, data, images, splits, store)
    names = task.baselines + task.models  # seconds first: what the networks have to beat
    cards = [models.describe(name, **protocol.model_arguments) for name in names]
    # all of them now, from the source that is running: files may be edited while it runs
    shared = [shared_record(protocol, card) for card in cards]
    remaining = [(name, number) for name in names for number in chosen]
    failures: list[str] = []
    parents: list[str] = []
    for card, (params, tags) in zip(cards, shared, strict=True):
        try:
            run_model(protocol, card, params, tags, remaining, parents)
        except SplitsFailedError as error:
            failures.append(str(error))
        except KeyboardInterrupt:
            raise KeyboardInterrupt(display.how_to_go_on(remaining)) from None
    conclude(protocol, parents)
    return failures


def conclude(protocol: Protocol, parents: list[str]) -> None:
    """Print the table of the comparison group that these parent runs (ids) belong to, and log its figures."""
    runs = analysis.load_runs([protocol.task.name], protocol.store.uri)
    groups = [group for group in analysis.comparison_groups(runs) if group["parent_id"].isin(parents).any()]
    if not groups or analysis.finished(groups[0]).empty:
        return  # every split failed, and is named with its reason
    analysis.print_scores(protocol.store, runs, groups[0])
    records.log_figures(protocol.store, analysis.Evidence(groups[0], protocol.store.uri))


def run_model(
    protocol: Protocol,
    card: models.ModelCard,
    params: Mapping[str, Any],
    tags: Mapping[str, str],
    remaining: list[tuple[str, int]],
    parents: list[str],
) -> None:
    """Train one model on the splits it has in `remaining`, which lose what is done, and add its run to `parents`.

    Raises
    ------
    SplitsFailedError
        After the other splits are done.
    """
    failures = []
    with tracking.parent_run(protocol.store, protocol.task.name, card.name, params, tags) as parent:
        parents.append(parent.id)
        records.log_model_card(parent, card, protocol.data)
        records.log_dataset(parent, protocol.data)
        for name, number in [job for job in remaining if job[0] == card.name]:
            try:
                run_split(protocol, parent, name, number, params, tags)
            except TrainingDivergedError as error:
                failures.append(f"{name} split {number}: {error}")
            except torch.OutOfMemoryError:
                failures.append(f"{name} split {number} does not fit into the GPU's memory; lower --batch-size")
            remaining.remove((name, number))
            log_summary(protocol, parent, name)
        if failures:
            raise SplitsFailedError("; ".join(failures))


def log_summary(protocol: Protocol, parent: Run, name: str) -> None:
    """Write what the comparison table says of a model's splits so far to its parent."""
    children = analysis.load_runs([protocol.task.name], protocol.store.uri, parent.id)
    summary = analysis.summarise(analysis.Evidence(children, protocol.store.uri), name)
    parent.log_metrics({key: value for key, value in summary.items() if math.isfinite(value)})


def shared_record(protocol: Protocol, card: models.ModelCard) -> tuple[dict[str, Any], dict[str, str]]:
    """Params and tags that a parent and its children have in common."""
    params: dict[str, Any] = {
        **dataclasses.asdict(protocol.config),
        "model": card.name,
        "dataset": protocol.data.name,
        "protocol": protocol.task.protocol.name,
        "n_splits": protocol.task.protocol.n_splits,
        "leak_free": False,
        "parameters": card.parameters,
        "macs": card.macs,
        "threads": torch.get_num_threads(),
    }
    source = fingerprint.source_digest(models.build(card.name, **protocol.model_arguments))
    tags = {
        "task": protocol.task.name,
        "question": protocol.task.question,
        "fingerprint": fingerprint.configuration_fingerprint(params, protocol.data.digest, source),
        "dataset_digest": protocol.data.digest,
        "source_digest": source,
        "git_commit": fingerprint.git_commit(),
        "hardware": hardware.describe_device(protocol.config.device),
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"torchvision {torchvision.__version__}, scikit-learn {sklearn.__version__}",
    }
    return params, tags


def run_split(
    protocol: Protocol, parent: Run, name: str, number: int, params: Mapping[str, Any], tags: Mapping[str, str]
) -> None:
    """Train and evaluate one model on one split as a child run.

    Raises
    ------
    TrainingDivergedError
        The run is FAILED then.
    """
    split = protocol.splits[number]
    hashed = fingerprint.split_hash(split)
    sizes = {"n_train": len(split.train), "n_val": len(split.val), "n_test": len(split.test)}
    own_params = {**params, "split": number, **sizes}
    own_tags = {**tags, "split_hash": hashed, "fingerprint": fingerprint.digest([tags["fingerprint"], number, hashed])}
    title = f"{name} split {number}"
    with (
        tracking.child_run(protocol.store, parent, title, own_params, own_tags) as child,
        display.SplitBar(title, protocol.config.epochs) as bar,
    ):
        records.log_dataset(child, protocol.data)
        train_and_log(protocol, child, name, number, bar)


def train_and_log(protocol: Protocol, child: Run, name: str, number: int, bar: display.SplitBar) -> None:
    """Fit one model on one split, log each epoch as it ends, and at the end the scores and files."""
    split, config, images = protocol.splits[number], protocol.config, protocol.images
    seed = split_seed(config.seed, number)
    model = initialise(lambda: models.build(name, **protocol.model_arguments), seed, config.device)
    epochs: list[EpochRecord] = []
    best: EpochRecord | None = None
    fitting = (
        fit_baseline(name, model, images, split, config.precision)
        if name in models.BASELINES
        else fit(model, images, split, config, seed)
    )
    for record in fitting:
        epochs.append(record)
        best = record if record.improved else best
        child.log_metrics(records.epoch_metrics(record), step=record.epoch)
        bar.update(record)
    assert best is not None  # the first finite loss improves on infinity, and fit raises on any other
    mean, std = images.normalisation(split.train)
    test = evaluate(model, images, split.test, mean, std, config.precision) if len(split.test) else None
    state = {key: value.cpu() for key, value in model.state_dict().items()}
    checkpoint = Checkpoint(name, protocol.model_arguments, best.epoch, best.val.loss, mean.cpu(), std.cpu(), state)
    records.log_artifacts(child, protocol.data, split, checkpoint, {"val": best.val, "test": test})
    # last, so that a run with final scores has the files they follow from
    child.log_metrics(records.final_metrics(epochs, best, test, len(split.train) + len(split.val)))
    bar.finish(best, test)
