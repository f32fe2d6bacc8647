"""The protocol loop: every model of a task on every split, each tracked as a run. The one place where all meet."""

import dataclasses
import json
import platform
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision

import analysis
import datasets
import models
import tracking
from datasets import ImageData, Split
from experiments import display, fingerprint, hardware
from experiments.config import Task, TrainingConfig
from experiments.training import (
    DeviceImages,
    EpochRecord,
    Evaluation,
    TrainingDivergedError,
    evaluate,
    fit,
    initialise,
    split_seed,
)
from tracking import Run, Store, keys
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
    cards = [models.describe(name, **protocol.model_arguments) for name in task.models]
    # all of them now, from the source that is running: files may be edited while it runs
    records = [shared_record(protocol, card) for card in cards]
    remaining = [(name, number) for name in task.models for number in chosen]
    failures: list[str] = []
    for card, (params, tags) in zip(cards, records, strict=True):
        try:
            run_model(protocol, card, params, tags, remaining)
        except SplitsFailedError as error:
            failures.append(str(error))
        except KeyboardInterrupt:
            raise KeyboardInterrupt(display.how_to_go_on(remaining)) from None
    analysis.print_table(store, task.name)
    return failures


def run_model(
    protocol: Protocol,
    card: models.ModelCard,
    params: Mapping[str, Any],
    tags: Mapping[str, str],
    remaining: list[tuple[str, int]],
) -> None:
    """Train one model under its parent run on the splits it has in `remaining`, which lose what is done.

    Raises
    ------
    SplitsFailedError
        After the other splits are done.
    """
    failures = []
    with tracking.parent_run(protocol.store, protocol.task.name, card.name, params, tags) as parent:
        log_model_card(parent, card, protocol.data)
        log_dataset(parent, protocol.data)
        for name, number in [job for job in remaining if job[0] == card.name]:
            try:
                run_split(protocol, parent, name, number, params, tags)
            except TrainingDivergedError as error:
                failures.append(f"{name} split {number}: {error}")
            except torch.OutOfMemoryError:
                failures.append(f"{name} split {number} does not fit into the GPU's memory; lower --batch-size")
            finally:
                tracking.summarise(protocol.store, parent)
            remaining.remove((name, number))
        if failures:
            raise SplitsFailedError("; ".join(failures))


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
        "fingerprint": fingerprint.configuration_fingerprint(params, protocol.data.digest, source),
        "dataset_digest": protocol.data.digest,
        "source_digest": source,
        "git_commit": fingerprint.git_commit(),
        "hardware": hardware.describe_device(protocol.config.device),
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"torchvision {torchvision.__version__}",
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
        log_dataset(child, protocol.data)
        train_and_log(protocol, child, name, number, bar)


def train_and_log(protocol: Protocol, child: Run, name: str, number: int, bar: display.SplitBar) -> None:
    """Fit one model on one split, log each epoch as it ends, and at the end the scores and files."""
    split, config, images = protocol.splits[number], protocol.config, protocol.images
    seed = split_seed(config.seed, number)
    model = initialise(lambda: models.build(name, **protocol.model_arguments), seed, config.device)
    records: list[EpochRecord] = []
    best: EpochRecord | None = None
    for record in fit(model, images, split, config, seed):
        records.append(record)
        best = record if record.improved else best
        child.log_metrics(epoch_metrics(record), step=record.epoch)
        bar.update(record)
    assert best is not None  # the first finite loss improves on infinity, and fit raises on any other
    mean, std = images.normalisation(split.train)
    test = evaluate(model, images, split.test, mean, std, config.precision) if len(split.test) else None
    state = {key: value.cpu() for key, value in model.state_dict().items()}
    checkpoint = Checkpoint(name, protocol.model_arguments, best.epoch, best.val.loss, mean.cpu(), std.cpu(), state)
    log_artifacts(child, protocol.data, split, checkpoint, {"val": best.val, "test": test})
    # last, so that a run with final scores has the files they follow from
    child.log_metrics(final_metrics(records, best, test, len(split.train) + len(split.val)))
    bar.finish(best, test)


def epoch_metrics(record: EpochRecord) -> dict[str, float]:
    """The metrics of an epoch under their keys."""
    return {
        "train/loss": record.train_loss,
        "train/accuracy": record.train_accuracy,
        **{f"val/{score}": value for score, value in record.val.scores().items()},
        "lr": record.lr,
        "epoch_seconds": record.seconds,
    }


def final_metrics(
    records: list[EpochRecord], best: EpochRecord, test: Evaluation | None, images_an_epoch: int
) -> dict[str, float]:
    """The metrics of a finished split under their keys."""
    parts = {"best_val": best.val, "last_val": records[-1].val} | ({"test": test} if test else {})
    seconds = sum(record.seconds for record in records)
    return {
        **{f"{part}/{score}": value for part, result in parts.items() for score, value in result.scores().items()},
        "best_epoch": best.epoch,
        "epochs_run": len(records),
        "train_seconds": seconds,
        "images_per_second": images_an_epoch * len(records) / seconds,
    }


def log_dataset(run: Run, data: ImageData) -> None:
    """Enter the images under their digest."""
    profile = {"images": len(data.labels), "classes": len(data.classes), "shape": data.images.shape[1:]}
    run.log_dataset(data.name, data.digest, json.dumps(profile))


def log_model_card(parent: Run, card: models.ModelCard, data: ImageData) -> None:
    """Log what a report needs to explain the model and name the classes."""
    text = (
        f"# {card.name}\n\n{card.parameters:,} parameters, {card.macs:,} multiply-accumulates an image\n\n"
        f"`{card.layers}`\n\n```text\n{card.description}\n```\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / keys.MODEL_CARD).write_text(text, encoding="utf-8")
        (Path(folder) / keys.CLASSES).write_text(json.dumps(data.classes), encoding="utf-8")
        parent.log_files(Path(folder))


def log_artifacts(
    child: Run, data: ImageData, split: Split, checkpoint: Checkpoint, results: Mapping[str, Evaluation | None]
) -> None:
    """Log checkpoint, split, predictions and confusion matrices; `results` has the parts `val` and `test`."""
    predictions: dict[str, np.ndarray] = {}
    confusions: dict[str, np.ndarray] = {}
    for part, indices in (("val", split.val), ("test", split.test)):
        result = results[part]
        predictions[f"{part}_index"] = indices
        predictions[f"{part}_true"] = data.labels[indices]
        predictions[f"{part}_pred"] = result.predicted.cpu().numpy() if result else np.empty(0, np.int64)
        predictions[f"{part}_prob"] = result.probability.cpu().numpy() if result else np.empty(0, np.float32)
        if result:
            confusions[part] = result.confusion
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint.save(folder / keys.CHECKPOINT)
        np.savez_compressed(folder / keys.PREDICTIONS, **predictions)  # type: ignore[arg-type]
        np.savez_compressed(folder / keys.SPLIT, train=split.train, val=split.val, test=split.test)
        numbers = {"classes": data.classes, **{part: counts.tolist() for part, counts in confusions.items()}}
        (folder / keys.CONFUSION).write_text(json.dumps(numbers), encoding="utf-8")
        part = "test" if "test" in confusions else "val"
        title = f"{checkpoint.model}, {'test' if part == 'test' else 'validation'} part, epoch {checkpoint.epoch}"
        figure = analysis.confusion_figure(confusions[part], data.classes, title)
        figure.savefig(folder / keys.CONFUSION_FIGURE)
        child.log_files(folder)
