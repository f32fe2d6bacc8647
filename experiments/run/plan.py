"""The plan of a run: the jobs of a request, with all their params and tags. Planning writes nothing."""

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

import datasets
import models
import tracking
from datasets import ImageData, Split
from experiments.jobs.job import Job, JobContext, model_arguments
from experiments.jobs.ray import Ray
from experiments.jobs.schedule import Concurrency, Load, decide
from experiments.provenance import fingerprint, sources
from experiments.request import Request
from experiments.run.descriptions import parent_name
from experiments.task import TaskError
from experiments.training import hardware
from experiments.tuning.space import Space, configurations, parse_space, tuned_text, with_start
from models import BASELINES, ModelCard, ModelError
from models.weights import InitialWeights, from_file, from_library, why_unavailable
from tracking import Store, TrainingConfig
from tracking.keys import CHILD_PARAMS, LOOKS, trials_of
from tracking.process import host
from tracking.settings import kind_of, logged_settings

OF_THE_CLIENT = ("MLFLOW_", "AWS_", "PG", "EXPERIMENT_PREFIX")  # variables that tell the store's client how to get in


class Drawn(NamedTuple):
    """A split that is to be run."""

    number: int  # from 0
    split: Split
    half: np.ndarray  # from `datasets.halve`


class Described(NamedTuple):
    """A model that can be built for the data, and how it is trained."""

    card: ModelCard
    config: TrainingConfig
    source: str  # digest
    weights: InitialWeights | None  # that it begins with, if they are not fresh


@dataclasses.dataclass(frozen=True)
class ModelPlan:
    """A model under one configuration: its parent run, and its jobs."""

    card: ModelCard
    config: TrainingConfig
    name: str  # of the parent run
    params: dict[str, Any]  # of the parent run; its splits repeat them
    tags: dict[str, str]  # likewise
    jobs: tuple[Job, ...]
    trials: tuple[tuple[Job, ...], ...] = ()  # of each job, by number, if it is tuned


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that a run will do."""

    request: Request  # resolved: no `auto` is left
    data: ImageData
    groups: np.ndarray  # int64, shape (N,): ids of near duplicates
    splits: list[Split]  # of the whole protocol
    models: list[ModelPlan]  # baselines first
    unusable: list[str]  # a sentence for each model that cannot be built
    concurrency: Concurrency
    cluster: Ray | None
    uri: str  # of the store
    weights: Mapping[str, InitialWeights]  # of the models that do not begin fresh

    @property
    def jobs(self) -> list[Job]:
        """The jobs of all models."""
        return [job for model in self.models for job in model.jobs]

    def context(self, store: Store) -> JobContext:
        """The context of its jobs, once the store is open."""
        request = self.request
        environment = {key: value for key, value in os.environ.items() if key.startswith(OF_THE_CLIENT)}
        return JobContext(
            task=request.task.name,
            data=self.data,
            groups=self.groups,
            device=request.config.device,
            device_memory=request.device_memory,
            threads=self.concurrency.threads,
            sources=sources.digests(),
            uri=self.uri,
            command=store.command,
            state=store.state,
            host=host(),
            environment=environment,
            weights=self.weights,
        )


def make_plan(request: Request) -> Plan:
    """Load the data, draw the splits, and describe the models of a request.

    Raises
    ------
    SettingError, DatasetError, StoreError, EngineError
        It cannot be done; the message is one sentence for the user.
    """
    hardware.prepare()
    uri = tracking.check_uri(request.tracking_uri)  # a wrong one is noticed before the download
    if request.config.pretrained and request.weights is None:  # likewise
        reasons = [why_unavailable(name) for name in request.models]
        if all(reasons):
            raise TaskError("; ".join(reasons))
    request, cluster = _resolve(request)
    data = datasets.load(request.task.data, request.data_dir, request.sample)
    groups = datasets.duplicate_groups(data)
    protocol = request.protocol_task.protocol
    splits = datasets.draw_splits(protocol, data, request.config.split_seed, groups if request.leak_free else None)
    described, unusable = _describe(request, data)
    loads = [
        Load(each.card, min(each.config.batch_size, len(splits[number].train)))
        for each in described
        for number in request.splits
        for _ in range(1 if each.card.name in BASELINES else request.seeds * max(1, request.tune))
    ]
    if not loads or (request.config.pretrained and not any(each.weights for each in described)):
        raise TaskError("; ".join(unusable))
    concurrency = decide(request.jobs, request.threads, request.config.device, loads, on_cluster=cluster is not None)
    drawn = [
        Drawn(number, splits[number], datasets.halve(splits[number].val, data.labels, groups))
        for number in request.splits
    ]
    planned = [_plan_model(request, each, data, drawn, concurrency.threads) for each in described]
    if edited := sources.changed_on_disk(sources.TEXTS):
        raise TaskError(f"{', '.join(edited)} changed while the command was starting; run it again")
    weights = {each.card.name: each.weights for each in described if each.weights}
    return Plan(request, data, groups, splits, planned, unusable, concurrency, cluster, uri, weights)


def _resolve(request: Request) -> tuple[Request, Ray | None]:
    """Replace `auto` in the settings on the machine that does the jobs; return the cluster, too."""
    cluster = None
    resolve = hardware.resolve
    if request.backend == "ray":
        cluster = Ray(request.threads or 1, request.gpus_per_job if request.config.device.startswith("cuda") else 0)
    resolved: dict[TrainingConfig, TrainingConfig] = {}
    for config in request.training.values():
        if config not in resolved:
            resolved[config] = resolve(config) if cluster is None else cluster.call(resolve, config)
    return request.resolved({name: resolved[config] for name, config in request.training.items()}), cluster


def _describe(request: Request, data: ImageData) -> tuple[list[Described], list[str]]:
    """Describe the baselines and models that can be built for the data; a sentence for each of the others."""
    described, unusable = [], []
    for name in request.baselines + request.models:  # seconds first: the scores that the networks have to beat
        try:
            described.append(_describe_model(request, data, name))
        except ModelError as error:
            unusable.append(str(error))
        except LookupError as error:
            unusable.append(f"{name} has no fingerprint ({error.args[0]}); define its class in a file of models/")
    kinds = {kind_of(each.config.pretrained) for each in described if each.weights}
    for number, each in enumerate(described):
        if each.card.name in BASELINES and kinds:  # they stand beside the networks, in one group
            config = dataclasses.replace(each.config, pretrained=next(iter(kinds)))
            described[number] = each._replace(config=config)
    return described, unusable


def _describe_model(request: Request, data: ImageData, name: str) -> Described:
    config = request.training.get(name, request.config)
    is_network = name not in BASELINES
    arguments = model_arguments(data, config.freeze and is_network)
    card = models.describe(name, **arguments)
    with torch.random.fork_rng(devices=[]):
        source = fingerprint.source_of(models.build(name, **arguments)).digest
        weights = None
        if is_network and config.pretrained:
            shape = model_arguments(data)
            weights = from_file(request.weights, name, **shape) if request.weights else from_library(name, **shape)
            config = dataclasses.replace(config, pretrained=weights.label)
    return Described(card, config, source, weights)


def _plan_model(
    request: Request, described: Described, data: ImageData, drawn: Sequence[Drawn], threads: int
) -> ModelPlan:
    card, config, source, weights = described
    protocol = request.protocol_task.protocol
    seeds = {config.split_seed, config.train_seed}
    params: dict[str, Any] = {
        **logged_settings(config),
        **({"seed": config.train_seed} if len(seeds) == 1 else {}),
        "model": card.name,
        "dataset": data.name,
        "protocol": protocol.name,
        "n_splits": protocol.n_splits,
        "leak_free": request.leak_free,
        "parameters": card.parameters,
        "macs": card.macs,
        "threads": threads,
        **({"normalisation": weights.normalisation} if weights and weights.normalisation else {}),
    }
    space, untuned = space_of(request, card.name), params
    if request.tune:
        asked = {"tune": request.tune, "space": with_start(space_of(request), config), "halving": request.halving}
        params = {**params, **asked, **{key: tuned_text(params[key], values) for key, values in space.items()}}
    tags = {
        "task": request.task.name,
        "question": request.task.question,
        "fingerprint": fingerprint.configuration_fingerprint(params, data.digest, source),
        "dataset_digest": data.digest,
        "source_digest": source,
        "git_commit": fingerprint.git_commit(),
        "versions": fingerprint.versions(),
        **({LOOKS: ",".join(map(str, request.looks))} if request.looks else {}),
    }
    # a baseline draws no numbers; all splits once before any of them a second time
    replicates = range(request.seeds) if request.seeds > 1 and card.name not in BASELINES else [None]
    if card.name in BASELINES:
        fixed = {**params, **{key: untuned[key] for key in space}}
    else:  # the values that are chosen become params of the split's run once they are known
        fixed = {key: value for key, value in params.items() if key not in space}
    if request.repetitions > 1:  # of the splits alone, so that more of them extend what is there
        fixed["repetitions"] = request.repetitions
    jobs = tuple(_make_job(card, config, each, replicate, fixed, tags) for replicate in replicates for each in drawn)
    trials: tuple[tuple[Job, ...], ...] = ()
    if request.tune and card.name not in BASELINES:
        configs = configurations(space, config, request.tune, config.split_seed)
        trials = tuple(tuple(_make_trials(job, configs, untuned, data.digest)) for job in jobs)
    return ModelPlan(card, config, parent_name(request.task, params), params, tags, jobs, trials)


def space_of(request: Request, model: str = "") -> Space:
    """The search space of a task, or of a model: its class may have an attribute `space` with other ranges."""
    if not request.tune:
        return {}
    space = {**request.task.space, **request.space}
    own = parse_space(getattr(models.MODELS.get(model), "space", ()))
    return {key: request.space.get(key, own.get(key, values)) for key, values in space.items()}


def _make_trials(
    job: Job, configs: Sequence[TrainingConfig], untuned: Mapping[str, Any], dataset_digest: str
) -> Iterator[Job]:
    """The trials of a tuned split. How many there are, and which of them stop early, is not in their fingerprints."""
    tags = {**job.tags, "task": trials_of(job.tags["task"])}
    numbers = {key: job.params[key] for key in CHILD_PARAMS if key in job.params}
    for number, config in enumerate(configs):
        params = {**untuned, **logged_settings(config)}
        configuration = fingerprint.configuration_fingerprint(params, dataset_digest, tags["source_digest"])
        split = fingerprint.split_fingerprint(configuration, job.number, tags["split_hash"], job.replicate or 0)
        yield dataclasses.replace(
            job,
            config=config,
            params={**params, **numbers, "trial": number},
            tags={**tags, "fingerprint": fingerprint.trial_fingerprint(split, number)},
            trial=number,
        )


def _make_job(
    card: ModelCard,
    config: TrainingConfig,
    drawn: Drawn,
    replicate: int | None,
    params: Mapping[str, Any],
    tags: Mapping[str, str],
) -> Job:
    """Add a split's own params and tags to those that it shares with its parent; `replicate` is None if it is alone."""
    split = drawn.split
    hashed = fingerprint.split_hash(split)
    sizes = {"n_train": len(split.train), "n_val": len(split.val), "n_test": len(split.test)}
    numbers = {"split": drawn.number} | ({} if replicate is None else {"replicate": replicate})
    own_fingerprint = fingerprint.split_fingerprint(tags["fingerprint"], drawn.number, hashed, replicate or 0)
    own_tags = {**tags, "split_hash": hashed, "fingerprint": own_fingerprint}
    return Job(card, config, drawn.number, split, drawn.half, {**params, **numbers, **sizes}, own_tags, replicate)
