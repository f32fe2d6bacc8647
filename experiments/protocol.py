"""The protocol loop: every model of a task on every split, each tracked as a run. The one place where all meet."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

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
    Evaluation,
    TrainingDivergedError,
    TrainingState,
    evaluate,
    fit,
    initialise,
    split_seed,
)
from models.layers import LayerStack
from tracking import Claim, Parent, Run, Store, keys
from tracking.checkpoints import Checkpoint, save_resume_file


@dataclasses.dataclass(frozen=True)
class ProtocolOptions:
    """How the splits are made, and which of them are run.

    Attributes
    ----------
    chosen : list of int
        Splits to run, from 0.
    leak_free : bool
        Keep near duplicates together, and train on none of a test image.
    fresh : bool
        Run again what is finished.
    """

    chosen: list[int]
    leak_free: bool = False
    fresh: bool = False


@dataclasses.dataclass(frozen=True)
class Protocol:
    """What the runs of one command share."""

    task: Task
    config: TrainingConfig
    options: ProtocolOptions
    data: ImageData
    groups: np.ndarray  # of near duplicates: datasets.duplicate_groups
    images: DeviceImages
    splits: list[Split]
    store: Store

    @property
    def model_arguments(self) -> dict[str, int]:
        """What `models.build` needs besides the name."""
        return model_arguments(self.data)


def model_arguments(data: ImageData) -> dict[str, int]:
    """What `models.build` needs besides the name, for a data set."""
    _, _, size, channels = data.images.shape
    return {"in_channels": channels, "num_classes": len(data.classes), "image_size": size}


def make_splits(task: Task, data: ImageData, seed: int, groups: np.ndarray | None = None) -> list[Split]:
    """Divide the images: a protocol with its own test part gets all of them, another one the published train part.

    With `groups` (see `datasets.duplicate_groups`) near duplicates stay together, and what also stands in the
    published test part is not trained on.
    """
    if task.protocol.has_test_part:
        return task.protocol.split(data.labels, seed, groups)
    published_test = np.arange(data.n_pool, len(data.labels))
    pool = slice(data.n_pool)
    splits = task.protocol.split(data.labels[pool], seed, None if groups is None else groups[pool])
    splits = [split._replace(test=published_test) for split in splits]
    if groups is None:
        return splits
    return [
        split._replace(train=np.setdiff1d(split.train, datasets.leaking(groups, published_test, split.train)))
        for split in splits
    ]


def run(
    task: Task,
    config: TrainingConfig,
    options: ProtocolOptions,
    data_dir: Path | None = None,
    sample: bool = False,
    tracking_uri: str | None = None,
) -> list[str]:
    """Do what is not done yet of the task's models and the chosen splits, track it, and print the comparison table.

    Parameters
    ----------
    task : Task
        With the models and the number of splits that were asked for.
    config : TrainingConfig
        Resolved (`hardware.resolve`).
    options : ProtocolOptions
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
    groups = datasets.duplicate_groups(data)
    splits = make_splits(task, data, config.seed, groups if options.leak_free else None)
    store = tracking.open_store(uri, create=True)
    tracking.persist(lambda: tracking.close_dead_runs(store, task.name))
    display.announce(task, config, data, splits, options.chosen, store)
    try:
        images = DeviceImages.load(data, config.device)
    except torch.OutOfMemoryError:
        raise datasets.DatasetError(f"{data.name} does not fit into the GPU's memory; use --device cpu") from None
    protocol = Protocol(task, config, options, data, groups, images, splits, store)
    names = task.baselines + task.models  # seconds first: what the networks have to beat
    cards = [models.describe(name, **protocol.model_arguments) for name in names]
    # all of them now, from the source that is running: files may be edited while it runs
    shared = [shared_record(protocol, card) for card in cards]
    outcomes = [run_model(protocol, card, params, tags) for card, (params, tags) in zip(cards, shared, strict=True)]
    display.left_alone(sum(outcome.skipped for outcome in outcomes), [line for o in outcomes for line in o.elsewhere])
    conclude(protocol, outcomes)
    return [failure for outcome in outcomes for failure in outcome.failures]


@dataclasses.dataclass
class Outcome:
    """What became of a model's splits: how many were done now and before, who else is at work, and what failed."""

    parent_id: str
    done: int = 0
    skipped: int = 0
    elsewhere: list[str] = dataclasses.field(default_factory=list)
    failures: list[str] = dataclasses.field(default_factory=list)


def conclude(protocol: Protocol, outcomes: Sequence[Outcome]) -> None:
    """Print the table of the comparison group that these runs belong to, and log its figures if they may be new."""
    runs, store = load_children(protocol), protocol.store
    parents = [outcome.parent_id for outcome in outcomes]
    groups = [group for group in analysis.comparison_groups(runs) if group["parent_id"].isin(parents).any()]
    if not groups or analysis.finished(groups[0]).empty:
        return  # every split failed, and is named with its reason
    analysis.print_scores(store, runs, groups[0])
    new = any(outcome.done for outcome in outcomes)
    if new or not all(Run(store, run_id).has_files(keys.FIGURES) for run_id in parents):
        tracking.persist(lambda: records.log_figures(store, analysis.Evidence(groups[0], store.uri)))


def load_children(protocol: Protocol, parent_id: str | None = None) -> pd.DataFrame:
    """Read the runs of the task's splits, or of one parent's, and wait for a store that is away."""
    task, uri = protocol.task.name, protocol.store.uri
    return tracking.persist(lambda: analysis.load_runs([task], uri, parent_id))


def run_model(
    protocol: Protocol, card: models.ModelCard, params: Mapping[str, Any], tags: Mapping[str, str]
) -> Outcome:
    """Train one model on the chosen splits, but for those that are finished or in other hands."""
    with tracking.parent_run(protocol.store, protocol.task.name, card.name, params, tags) as parent:
        outcome = Outcome(parent.id)
        for number in protocol.options.chosen:
            title = f"{card.name} split {number}"
            claimed = tracking.claim(
                parent, title, *split_record(protocol, number, params, tags), protocol.options.fresh
            )
            if claimed.run is None:
                if claimed.owner:
                    outcome.elsewhere.append(f"{title} ({claimed.owner})")
                outcome.skipped += not claimed.owner
                continue
            if not parent.begun:
                parent.begin()
                records.log_model_card(parent, card, protocol.data)
                records.log_dataset(parent, protocol.data)
            try:
                run_split(protocol, claimed, card.name, number)
                outcome.done += 1
            except TrainingDivergedError as error:
                outcome.failures.append(f"{title}: {error}")
            except torch.OutOfMemoryError:
                outcome.failures.append(f"{title} does not fit into the GPU's memory; lower --batch-size")
            log_summary(protocol, parent, card.name)
        if not parent.begun:
            log_summary(protocol, parent, card.name)  # whoever did the last split may not have come to it
        if outcome.failures:
            parent.failure = "; ".join(outcome.failures)
    return outcome


def log_summary(protocol: Protocol, parent: Parent, name: str) -> None:
    """Write what the comparison table says of a model's splits so far to its parent, unless it stands there."""
    evidence = analysis.Evidence(load_children(protocol, parent.id), protocol.store.uri)
    summary = {key: value for key, value in analysis.summarise(evidence, name).items() if math.isfinite(value)}
    if not summary.items() <= parent.metrics.items():
        parent.log_metrics(summary)
        parent.metrics |= summary


def shared_record(protocol: Protocol, card: models.ModelCard) -> tuple[dict[str, Any], dict[str, str]]:
    """Params and tags that a parent and its children have in common."""
    params: dict[str, Any] = {
        **dataclasses.asdict(protocol.config),
        "model": card.name,
        "dataset": protocol.data.name,
        "protocol": protocol.task.protocol.name,
        "n_splits": protocol.task.protocol.n_splits,
        "leak_free": protocol.options.leak_free,
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
        "versions": fingerprint.versions(),
    }
    return params, tags


def split_record(
    protocol: Protocol, number: int, params: Mapping[str, Any], tags: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Params and tags of one split's run, from those that it shares with its parent."""
    split = protocol.splits[number]
    hashed = fingerprint.split_hash(split)
    sizes = {"n_train": len(split.train), "n_val": len(split.val), "n_test": len(split.test)}
    own_fingerprint = fingerprint.digest([tags["fingerprint"], number, hashed])
    return {**params, "split": number, **sizes}, {**tags, "split_hash": hashed, "fingerprint": own_fingerprint}


def run_split(protocol: Protocol, claimed: Claim, name: str, number: int) -> None:
    """Train and evaluate one model on one split, from where it was interrupted if it was.

    Raises
    ------
    TrainingDivergedError
        The run is FAILED then.
    """
    with (
        tracking.child_run(claimed) as child,
        display.SplitBar(f"{name} split {number}", protocol.config.epochs) as bar,
    ):
        records.log_dataset(child, protocol.data)
        images, split = protocol.images, protocol.splits[number]
        seed = split_seed(protocol.config.seed, number)
        model = initialise(lambda: models.build(name, **protocol.model_arguments), seed, protocol.config.device)
        if name in models.BASELINES:
            history, best = fit_and_log_baseline(protocol, child, name, model, split, bar)
        else:
            state = TrainingState(model, protocol.config, seed)
            history, best = train_and_log(protocol, child, state, claimed, split, bar)
        mean, std = images.normalisation(split.train)
        test = evaluate(model, images, split.test, mean, std, protocol.config.precision) if len(split.test) else None
        weights = {key: value.cpu() for key, value in model.state_dict().items()}
        best_epoch = records.best_entry(history)["epoch"]
        checkpoint = Checkpoint(name, protocol.model_arguments, best_epoch, best.loss, mean.cpu(), std.cpu(), weights)
        records.log_artifacts(child, protocol.data, split, checkpoint, history, {"val": best, "test": test})
        # last, so that a run with final scores has the files they follow from; at the last epoch's time, so that a
        # second attempt changes nothing
        leaks = records.count_leaks(protocol.groups, split)
        child.log_metrics(records.final_metrics(history, test, split, leaks), timestamp=history[-1]["time"])
        bar.finish(best_epoch, best, test)


def fit_and_log_baseline(
    protocol: Protocol, child: Run, name: str, model: LayerStack, split: Split, bar: display.SplitBar
) -> tuple[list[dict[str, Any]], Evaluation]:
    """Fit a baseline; return its history of one epoch, and what it makes of the validation part."""
    record = fit_baseline(name, model, protocol.images, split, protocol.config.precision)
    history = [records.epoch_entry(record)]
    child.log_epochs(history, wait=True)
    bar.update(history)
    return history, record.val


def train_and_log(
    protocol: Protocol, child: Run, state: TrainingState, claimed: Claim, split: Split, bar: display.SplitBar
) -> tuple[list[dict[str, Any]], Evaluation]:
    """Train a network to its end, and keep and log each epoch as it ends; return the same."""
    history: list[dict[str, Any]] = []
    if claimed.saved:
        history = claimed.saved["history"]
        state.load_state_dict(claimed.saved["state"])
        bar.update(history)
    for record in fit(state, protocol.images, split):
        history.append(records.epoch_entry(record))
        # first to the disk: the store may be away, and what it has must never be more than can go on
        save_resume_file(claimed.resume_file, {"history": history, "state": state.state_dict()})
        child.log_epochs(history)
        bar.update(history)
    child.log_epochs(history, wait=True)
    assert state.best is not None  # the first finite loss is the best so far, and fit raises on any other
    return history, state.best
