"""The protocol loop: every model of a task on every split, each tracked as a run. The one place where all meet."""

import contextlib
import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mlflow.exceptions import MlflowException

import analysis
import datasets
import models
import tracking
from datasets import ImageData, Split
from experiments import champion, display, fingerprint, hardware, labels, records, schedule
from experiments.config import DEVICE_MEMORY, Task, TrainingConfig
from experiments.jobs import Engine, EngineError, Job, Local, Ray, Result, Sequential, run_jobs
from experiments.worker import Protocol, Worker, do, log_summary, model_arguments
from tracking import Parent, Run, Store, journal
from tracking.store import host

OF_THE_CLIENT = ("MLFLOW_", "AWS_", "PG")  # variables that tell the store's client how to get in


@dataclasses.dataclass(frozen=True)
class ProtocolOptions:
    """How the splits are made, which of them are run, and where.

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
    jobs : int or None
        Jobs at once; None chooses by the rule of `schedule`.
    threads : int or None
        CPU threads of a job; None shares the cores among the jobs.
    cluster : Ray or None
        Where jobs are done, unless on this machine.
    usual_splits : int or None
        The task's own number of splits, where another one was asked for.
    """

    chosen: list[int]
    leak_free: bool = False
    fresh: bool = False
    device_memory: float = DEVICE_MEMORY
    jobs: int | None = 1
    threads: int | None = None
    cluster: Ray | None = None
    usual_splits: int | None = None


@dataclasses.dataclass
class ModelRuns:
    """A model's parent run, and what has become of its splits.

    Attributes
    ----------
    card : ModelCard
    parent : Parent
    left : int
        Splits that have no result yet.
    described : bool
        Whether the parent has been told of the model and the images.
    concluded : bool
        Whether the parent has its summary and its end.
    kept : dict of str to str
        Titles of the splits whose results are kept for a store that is away, by fingerprint.
    failures : list of str
        A sentence for each split without a result.
    """

    card: models.ModelCard
    parent: Parent
    left: int
    described: bool = True
    concluded: bool = False
    kept: dict[str, str] = dataclasses.field(default_factory=dict)
    failures: list[str] = dataclasses.field(default_factory=list)


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
    names = task.baselines + task.models  # seconds first: what the networks have to beat
    cards = [models.describe(name, **model_arguments(data)) for name in names]
    plan = schedule.plan(options.jobs, options.threads, options.cluster, config, cards, splits, options.chosen)
    store = tracking.open_store(uri, create=True)
    if store.database and options.cluster is not None and (machines := options.cluster.machines_elsewhere()):
        raise EngineError(
            f"{', '.join(sorted(machines))} cannot write to the SQLite file {store.database}; name a tracking server "
            "in --tracking-uri (deploy/README.md)"
        )
    tracking.persist(lambda: tracking.close_dead_runs(store, task.name))
    sent, refused = journal.send_all(store)
    display.sent_later(sent, list(refused.values()))
    display.announce(task, config, data, splits, options.chosen, store, plan)
    protocol = Protocol(
        task, config, plan.threads, options.device_memory, data, groups,
        uri, store.command, store.state, host(),
        {key: value for key, value in os.environ.items() if key.startswith(OF_THE_CLIENT)},
    )  # fmt: skip
    usual_splits = options.usual_splits or task.protocol.n_splits
    labels.describe_experiment(store, task, usual_splits)
    with contextlib.ExitStack() as parents:
        of_model: dict[str, ModelRuns] = {}
        jobs: list[Job] = []
        for card in cards:
            # all of them now, from the source that is running: files may be edited while it runs
            params, tags = shared_record(data, task, config, options.leak_free, plan.threads, card)
            name = labels.parent_name(task, usual_splits, params)
            parent = parents.enter_context(tracking.parent_run(store, task.name, name, params, tags))
            of_model[card.name] = ModelRuns(card, parent, len(options.chosen))
            jobs += [make_job(card, parent, splits[number], number, params, tags) for number in options.chosen]
        if options.fresh:  # all at once, so that an interrupted command need not be told so again
            for job in jobs:
                tracking.persist(lambda tags=job.tags: tracking.begin_again(store, task.name, tags))  # type: ignore[misc]
        counts = do_jobs(protocol, plan, store, options.cluster, of_model, jobs)
        finish(protocol, store, of_model)
    display.left_alone(*counts)
    conclude(protocol, store, [runs.parent.id for runs in of_model.values()], usual_splits)
    return [failure for runs in of_model.values() for failure in runs.failures]


def do_jobs(
    protocol: Protocol,
    plan: schedule.Plan,
    store: Store,
    cluster: Ray | None,
    of_model: Mapping[str, ModelRuns],
    jobs: Sequence[Job],
) -> tuple[int, list[str]]:
    """Do the jobs that are not finished; return how many were, and which were left to others."""
    found, elsewhere = 0, []

    def note(job: Job, result: Result) -> None:
        nonlocal found
        runs = of_model[job.card.name]
        runs.left -= 1
        found += result.outcome == "found"
        if result.outcome == "left":
            elsewhere.append(result.text)
        elif result.outcome == "failed":
            runs.failures.append(result.text)
        elif result.outcome == "kept":
            runs.kept[job.tags["fingerprint"]] = job.title
        elif not runs.described:
            tracking.attempt(lambda: describe(protocol, runs))
        if not runs.left and not runs.kept:  # else `finish` does it, once the store is back
            tracking.attempt(lambda: conclude_model(protocol, store, runs))

    waiting = []
    finished = known_as_finished(store, protocol.task.name)
    for job in jobs:
        known = job.tags["fingerprint"] in finished
        if known and tracking.is_finished(of_model[job.card.name].parent, job.tags):
            note(job, Result("found"))
        else:
            waiting.append(job)
    if not waiting:
        return found, elsewhere
    for name in dict.fromkeys(job.card.name for job in waiting):
        runs = of_model[name]
        runs.parent.begin()
        runs.parent.patience = tracking.SHORT  # what cannot be done then is left to `finish`
        runs.described = False
    if plan.at_once > 1:  # the longest first: the last ones then leave no core idle for long
        waiting.sort(key=lambda job: schedule.cost(job.card), reverse=True)
    try:
        with contextlib.ExitStack() as working:
            engine = working.enter_context(make_engine(protocol, plan, store, cluster, working))
            several = cluster is not None or plan.at_once > 1
            room = (lambda: min(cluster.room, plan.at_once)) if cluster is not None else (lambda: plan.at_once)
            bar = working.enter_context(display.JobBar(waiting, room)) if several else None
            for job, result in run_jobs(iter(waiting), engine, bar.begin if bar else lambda job: None):
                if bar:
                    bar.end(job, result)
                note(job, result)
    except BaseException as error:
        reason = "interrupted" if isinstance(error, KeyboardInterrupt) else tracking.in_one_line(error)
        with contextlib.suppress(Exception):
            tracking.close_dead_runs(store, protocol.task.name, reason, mine=True)
        raise
    return found, elsewhere


def make_engine(
    protocol: Protocol, plan: schedule.Plan, store: Store, cluster: Ray | None, working: contextlib.ExitStack
) -> Engine:
    """Return what does the jobs; `working` ends after it."""
    if cluster is not None:
        cluster.share(do, protocol, plan.at_once)
        return cluster
    if plan.at_once > 1:
        folder = working.enter_context(store.scratch())
        return Local(do, protocol, plan.at_once, plan.threads, Path(folder))
    torch.set_num_threads(plan.threads)
    try:
        return Sequential(Worker(protocol, store).train)
    except torch.OutOfMemoryError:
        raise datasets.DatasetError(
            f"{protocol.data.name} does not fit into the GPU's memory; lower --device-memory"
        ) from None


def known_as_finished(store: Store, task: str) -> set[str]:
    """Fingerprints of the splits whose results are in the store."""
    runs = tracking.persist(lambda: analysis.load_runs([task], store.uri))
    return set(runs.loc[runs["status"] == "FINISHED", "fingerprint"])


def describe(protocol: Protocol, runs: ModelRuns) -> None:
    """Log to a parent what a report needs to explain the model and the images."""
    records.log_model_card(runs.parent, runs.card, protocol.data)
    runs.parent.log_dataset(*records.dataset_entry(protocol.data))
    runs.described = True


def conclude_model(protocol: Protocol, store: Store, runs: ModelRuns) -> None:
    """Give a parent its summary and its end."""
    if not runs.described:
        describe(protocol, runs)
    # also where nothing was done: whoever did the last split may not have come to it
    log_summary(store, protocol.task.name, runs.parent, runs.card.name)
    failure = "; ".join(runs.failures)
    runs.parent.end("FAILED" if failure else "FINISHED", failure)
    runs.concluded = True


def finish(protocol: Protocol, store: Store, of_model: Mapping[str, ModelRuns]) -> None:
    """Do what is left because the store was away, once it is back.

    Raises
    ------
    StoreError
        It stays away. The journal has what it lacks.
    """
    kept = {fingerprint: title for runs in of_model.values() for fingerprint, title in runs.kept.items()}

    def catch_up() -> None:
        refused = journal.send_all(store)[1]
        tracking.persist(lambda: tracking.close_dead_runs(store, protocol.task.name, "its worker was lost", mine=True))
        finished = known_as_finished(store, protocol.task.name) if kept else set()
        for runs in of_model.values():
            lost = {key: title for key, title in runs.kept.items() if key not in finished}
            gone = "its results are on another machine; the same command trains it again"
            runs.failures += [refused.get(key, f"{title}: {gone}") for key, title in lost.items()]
            runs.kept.clear()
            if not runs.concluded:
                runs.parent.patience = None
                conclude_model(protocol, store, runs)

    if not tracking.attempt(catch_up):
        what = f"; the results of {', '.join(kept.values())} are kept in {store.state}" if kept else ""
        raise tracking.StoreError(f"{store.label} is away{what}; the same command goes on when it is back")


def conclude(protocol: Protocol, store: Store, parents: Sequence[str], usual_splits: int) -> None:
    """Print the table of the comparison group that these runs belong to, log its figures, and register the best model.

    What is done already is not done again.
    """
    runs = tracking.persist(lambda: analysis.load_runs([protocol.task.name], store.uri))
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
    try:
        text = champion.crown(store, protocol.task, usual_splits, protocol.data, runs, evidence)
    except (tracking.StoreError, MlflowException, OSError) as error:  # a server may let us write runs only
        display.no_champion(protocol.task.name, tracking.in_one_line(error))
    else:
        display.champion(store, protocol.task.name, text)


def shared_record(
    data: ImageData, task: Task, config: TrainingConfig, leak_free: bool, threads: int, card: models.ModelCard
) -> tuple[dict[str, Any], dict[str, str]]:
    """Params and tags that a parent and its children have in common."""
    params: dict[str, Any] = {
        **dataclasses.asdict(config),
        "model": card.name,
        "dataset": data.name,
        "protocol": task.protocol.name,
        "n_splits": task.protocol.n_splits,
        "leak_free": leak_free,
        "parameters": card.parameters,
        "macs": card.macs,
        "threads": threads,
    }
    source = fingerprint.source_digest(models.build(card.name, **model_arguments(data)))
    tags = {
        "task": task.name,
        "question": task.question,
        "fingerprint": fingerprint.configuration_fingerprint(params, data.digest, source),
        "dataset_digest": data.digest,
        "source_digest": source,
        "git_commit": fingerprint.git_commit(),
        "versions": fingerprint.versions(),
    }
    return params, tags


def make_job(
    card: models.ModelCard,
    parent: Parent,
    split: Split,
    number: int,
    params: Mapping[str, Any],
    tags: Mapping[str, str],
) -> Job:
    """Add what is a split's own to the params and tags that it shares with its parent."""
    hashed = fingerprint.split_hash(split)
    sizes = {"n_train": len(split.train), "n_val": len(split.val), "n_test": len(split.test)}
    own_fingerprint = fingerprint.digest([tags["fingerprint"], number, hashed])
    own_tags = {**tags, "split_hash": hashed, "fingerprint": own_fingerprint}
    own_params = {**params, "split": number, **sizes}
    return Job(card, number, split, own_params, own_tags, parent.id, parent.experiment)
