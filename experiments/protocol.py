"""The protocol loop: every model of a task on every split, each tracked as a run. The one place where all meet."""

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch

import analysis
import datasets
import models
import tracking
from datasets import ImageData, Split
from experiments import display, fingerprint, hardware, records
from experiments.baselines import fit_baseline
from experiments.config import DEVICE_MEMORY, Task, TrainingConfig
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
from tracking import Claim, Parent, Run, Store
from tracking.checkpoints import Checkpoint

SAVE_EVERY = 1.0  # seconds, at least, from one save of a training to the next
SAVE_SHARE = 0.02  # of the time that training takes, which saves may take at most, but for the first and the last


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
    device_memory : float
        Share of the device's memory that the images may take; more are streamed from the host's.
    """

    chosen: list[int]
    leak_free: bool = False
    fresh: bool = False
    device_memory: float = DEVICE_MEMORY


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


@dataclasses.dataclass(frozen=True)
class Job:
    """One model on one split, with all params and tags of its run."""

    card: models.ModelCard
    number: int
    params: Mapping[str, Any]
    tags: Mapping[str, str]

    @property
    def title(self) -> str:
        """What its run is called."""
        return f"{self.card.name} split {self.number}"


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
    hardware.prepare()
    uri = tracking.check_uri(tracking_uri)  # a wrong one is noticed before the download
    data = datasets.load(task.name, data_dir, sample)
    groups = datasets.duplicate_groups(data)
    splits = make_splits(task, data, config.seed, groups if options.leak_free else None)
    store = tracking.open_store(uri, create=True)
    tracking.persist(lambda: tracking.close_dead_runs(store, task.name))
    display.announce(task, config, data, splits, options.chosen, store)
    try:
        images = DeviceImages.load(data, config.device, options.device_memory)
    except torch.OutOfMemoryError:
        raise datasets.DatasetError(f"{data.name} does not fit into the GPU's memory; lower --device-memory") from None
    protocol = Protocol(task, config, options, data, groups, images, splits, store)
    names = task.baselines + task.models  # seconds first: what the networks have to beat
    cards = [models.describe(name, **protocol.model_arguments) for name in names]
    # all of them now, from the source that is running: files may be edited while it runs
    shared = [shared_record(protocol, card) for card in cards]
    jobs = [
        [make_job(protocol, card, number, *record) for number in options.chosen]
        for card, record in zip(cards, shared, strict=True)
    ]
    if options.fresh:
        begin_again(protocol, [job for of_model in jobs for job in of_model])
    outcomes = [run_model(protocol, of_model, *record) for of_model, record in zip(jobs, shared, strict=True)]
    display.left_alone(sum(outcome.skipped for outcome in outcomes), [line for o in outcomes for line in o.elsewhere])
    conclude(protocol, outcomes)
    return [failure for outcome in outcomes for failure in outcome.failures]


def begin_again(protocol: Protocol, jobs: Sequence[Job]) -> None:
    """Let all these splits be done again; at once, so that an interrupted command need not be told so again."""
    for job in jobs:
        tracking.persist(functools.partial(tracking.begin_again, protocol.store, protocol.task.name, job.tags))


@dataclasses.dataclass
class Outcome:
    """What became of a model's splits: how many were finished before, who else is at work, and what failed."""

    parent_id: str
    skipped: int = 0
    elsewhere: list[str] = dataclasses.field(default_factory=list)
    failures: list[str] = dataclasses.field(default_factory=list)
    evidence: analysis.Evidence | None = None  # that the summary so far was made of
    state: TrainingState | None = None  # of the last split: what it recorded on a GPU serves the next one


class Writer:
    """A thread that writes what a split has left while the next one trains.

    One split at most waits for it. What goes wrong there is raised once the next one is handed over, which is written
    all the same, or at the end. Where the command ends early, it waits no longer for a store that is away.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.ExitStack() as ending:
            ending.callback(self._thread.shutdown)
            if kind:
                ending.enter_context(tracking.impatient())
                ending.enter_context(contextlib.suppress(Exception))  # one error is enough
            self.wait()

    def submit(self, job: Callable[[], None]) -> None:
        """Hand a job over, once the last one is done."""
        error = self._pending.exception() if self._pending is not None else None
        self._pending = self._thread.submit(job)
        if error is not None:
            raise error

    def wait(self) -> None:
        """Wait until nothing is left to write."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None


def conclude(protocol: Protocol, outcomes: Sequence[Outcome]) -> None:
    """Print the table of the comparison group that these runs belong to, and log its figures where they are older."""
    store = protocol.store
    runs = tracking.persist(lambda: analysis.load_runs([protocol.task.name], store.uri))
    parents = [outcome.parent_id for outcome in outcomes]
    groups = [group for group in analysis.comparison_groups(runs) if group["parent_id"].isin(parents).any()]
    if not groups or analysis.finished(groups[0]).empty:
        return  # every split failed, and is named with its reason
    evidence = analysis.Evidence(groups[0], store.uri)
    analysis.print_scores(store, runs, evidence)
    shown = fingerprint.digest(sorted(analysis.finished(groups[0])["run_id"]))
    owners = [Run(store, run_id) for run_id in parents]
    if any(owner.tag("figures_of") != shown for owner in owners):
        tracking.persist(lambda: records.log_figures(store, evidence))
        for owner in owners:
            owner.set_tag("figures_of", shown)


def run_model(protocol: Protocol, jobs: Sequence[Job], params: Mapping[str, Any], tags: Mapping[str, str]) -> Outcome:
    """Train one model on its splits, but for those that are finished or in other hands."""
    name = jobs[0].card.name
    with (
        tracking.parent_run(protocol.store, protocol.task.name, name, params, tags) as parent,
        Writer() as writer,
    ):
        outcome = Outcome(parent.id)
        left: list[tuple[Job, Claim]] = []  # to other machines, which may have died
        for job in jobs:
            claimed = tracking.claim(parent, job.title, job.params, job.tags)
            if claimed.elsewhere:
                left.append((job, claimed))
            else:
                do_or_leave(protocol, parent, job, claimed, outcome, writer)
        for job, theirs in left:
            claimed = tracking.wait_and_claim(parent, job.title, job.params, job.tags, theirs)
            do_or_leave(protocol, parent, job, claimed, outcome, writer)
        writer.wait()
        if not parent.begun:
            log_summary(protocol, parent, name, outcome)  # whoever did the last split may not have come to it
        parent.failure = "; ".join(outcome.failures)
    outcome.evidence = outcome.state = None  # the predictions of all splits; a model and its recordings
    return outcome


def do_or_leave(protocol: Protocol, parent: Parent, job: Job, claimed: Claim, outcome: Outcome, writer: Writer) -> None:
    """Do a split that is ours; note what became of it."""
    if not claimed.is_ours:
        if claimed.owner:
            outcome.elsewhere.append(f"{job.title} ({claimed.owner})")
        else:
            outcome.skipped += 1
        return
    try:
        run_split(protocol, parent, job, claimed, outcome, writer)
        return
    except TrainingDivergedError as error:
        outcome.failures.append(f"{job.title}: {error}")
    except RuntimeError as error:
        if not hardware.is_out_of_memory(error):
            raise
        device = protocol.config.device
        outcome.failures.append(
            f"{job.title} does not fit into {device}'s memory; lower --batch-size or --device-memory"
        )
        outcome.state = None  # recordings take room
    writer.submit(lambda: log_summary(protocol, parent, job.card.name, outcome))


def log_summary(protocol: Protocol, parent: Parent, name: str, outcome: Outcome) -> None:
    """Write what the comparison table says of a model's splits so far to its parent, unless it stands there."""

    def summarise() -> dict[str, float]:
        runs = analysis.load_runs([protocol.task.name], protocol.store.uri, parent.id)
        outcome.evidence = analysis.Evidence(runs, protocol.store.uri, outcome.evidence)
        return analysis.summarise(outcome.evidence, name)

    summary = {key: value for key, value in tracking.persist(summarise).items() if math.isfinite(value)}
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


def make_job(
    protocol: Protocol, card: models.ModelCard, number: int, params: Mapping[str, Any], tags: Mapping[str, str]
) -> Job:
    """Add what is a split's own to the params and tags that it shares with its parent."""
    split = protocol.splits[number]
    hashed = fingerprint.split_hash(split)
    sizes = {"n_train": len(split.train), "n_val": len(split.val), "n_test": len(split.test)}
    own_fingerprint = fingerprint.digest([tags["fingerprint"], number, hashed])
    own_tags = {**tags, "split_hash": hashed, "fingerprint": own_fingerprint}
    return Job(card, number, {**params, "split": number, **sizes}, own_tags)


def run_split(protocol: Protocol, parent: Parent, job: Job, claimed: Claim, outcome: Outcome, writer: Writer) -> None:
    """Train and evaluate one model on one split, from where it was interrupted if it was, and have its results written.

    Raises
    ------
    TrainingDivergedError
        The run is FAILED then.
    """
    card, name = job.card, job.card.name
    with contextlib.ExitStack() as open_run:
        child = open_run.enter_context(tracking.child_run(protocol.store, claimed))
        if not parent.begun:
            parent.begin()
            records.log_model_card(parent, card, protocol.data)
            records.log_dataset(parent, protocol.data)
        records.log_dataset(child, protocol.data)
        images, split = protocol.images, protocol.splits[job.number]
        seed = split_seed(protocol.config.seed, job.number)
        model = initialise(lambda: models.build(name, **protocol.model_arguments), seed, protocol.config.device)
        with display.SplitBar(job.title, protocol.config.epochs) as bar:
            if name in models.BASELINES:
                history, best = fit_and_log_baseline(protocol, child, name, model, split, bar)
            else:
                if outcome.state is not None and outcome.state.recordable:
                    outcome.state.restart(model, seed)
                else:
                    outcome.state = TrainingState(model, protocol.config, seed)
                model = outcome.state.model
                keep = functools.partial(tracking.save_progress, claimed, job.tags)
                history, best = train_and_log(protocol, child, outcome.state, split, claimed.saved, keep, bar)
            mean, std = images.normalisation(split.train)
            test = None
            if len(split.test):
                test = evaluate(model, images, split.test, mean, std, protocol.config.precision).on_host()
            best_epoch = records.best_entry(history)["epoch"]
            bar.finish(best_epoch, best, test)
        weights = {key: value.cpu() for key, value in model.state_dict().items()}
        checkpoint = Checkpoint(name, protocol.model_arguments, best_epoch, best.loss, mean.cpu(), std.cpu(), weights)
        results = {"val": best.on_host(), "test": test}
        leaks = records.count_leaks(protocol.groups, split)

        def write() -> None:
            with still_open:
                records.log_artifacts(child, protocol.data, split, checkpoint, history, results)
                # last, so that a run with final scores has the files they follow from; at the last epoch's time, so
                # that a second attempt changes nothing
                metrics = records.final_metrics(history, test, split, leaks)
                child.log_metrics(metrics, timestamp=history[-1]["time"])
            log_summary(protocol, parent, name, outcome)

        still_open = open_run.pop_all()
        writer.submit(write)


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
    protocol: Protocol,
    child: Run,
    state: TrainingState,
    split: Split,
    saved: Mapping[str, Any] | None,
    keep: Callable[[Sequence[Any], Mapping[str, Any]], None],
    bar: display.SplitBar,
) -> tuple[list[dict[str, Any]], Evaluation]:
    """Train a network to its end; return history and best validation.

    What makes it go on after a kill is kept, and its epochs are logged, as they end or, where they are short, several
    at once: what is trained since then is trained again.
    """
    history: list[dict[str, Any]] = []
    if saved:
        history = list(saved["history"])
        state.load_state_dict(saved["state"])
        bar.update(history)
    due = time.monotonic()
    for record in fit(state, protocol.images, split):
        history.append(records.epoch_entry(record))
        if state.is_done or time.monotonic() >= due:
            # first to the disk: the store may be away, and what it has must never be more than can go on
            started = time.monotonic()
            keep(history, state.state_dict())
            due = time.monotonic() + max(SAVE_EVERY, (time.monotonic() - started) / SAVE_SHARE)
            child.log_epochs(history)
        bar.update(history)
    child.log_epochs(history, wait=True)
    assert state.best is not None  # the first finite loss is the best so far, and fit raises on any other
    return history, state.best
