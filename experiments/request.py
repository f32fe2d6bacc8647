"""A request: everything that a user asked for in one command, as one frozen object that validates itself."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from datasets import Protocol, StratifiedKFold
from experiments.task import Task
from experiments.tuning import halving
from experiments.tuning.space import Space
from tracking.keys import has_folds, has_open_end
from tracking.settings import DEVICE_MEMORY, SettingError, TrainingConfig, check_range

MOST_JOBS = MOST_SEEDS = MOST_TRIALS = MOST_REPETITIONS = 1000
MOST_SPLITS = 10_000  # holdouts, or folds of a repetition


@dataclass(frozen=True, kw_only=True)
class Request:
    """A task, how each of its models is trained, on which splits, where, and where the results go.

    Raises
    ------
    SettingError
        An option has a value that it cannot have.
    """

    task: Task
    training: Mapping[str, TrainingConfig]  # settings of each model by name; device and seeds are the same for all
    n_splits: int  # holdouts of the whole protocol, or folds of a repetition
    splits: Sequence[int]  # those to be run, from 0
    baselines: tuple[str, ...] = ()  # names of those that run beside the models
    leak_free: bool = False  # keep near duplicates together, and train on none of a test image
    fresh: bool = False  # train finished splits again
    data_dir: Path | None = None  # see `datasets.load`
    sample: bool = False  # see `datasets.load`
    jobs: int | None = 1  # at once; None chooses by the rule of `schedule`
    backend: Literal["local", "ray"] = "local"
    threads: int | None = None  # CPU threads of a job; None shares the cores among the jobs
    gpus_per_job: float | None = None  # on a Ray cluster
    device_memory: float = DEVICE_MEMORY
    tracking_uri: str | None = None  # see `tracking.open_store`
    weights: Path | None = None  # a file for the only model, if its setting `pretrained` says so
    tune: int = 0  # configurations of each network on each split; 0 takes the task's own
    space: Space = field(default_factory=dict)  # what else is tuned than the task says, or between other values
    halving: bool = True  # whether the worse trials stop early
    seeds: int = 1  # trainings of each network on each split, which differ in weights, batches and augmentation
    dry_run: bool = False  # print the plan and the expected time, and do nothing
    yes: bool = False  # do not ask, however long it will take
    looks: tuple[int, ...] = ()  # numbers of splits, `all_splits` among them: it stops where every pair is decided
    repetitions: int = 1  # of the folds, each shuffled anew

    def __post_init__(self) -> None:
        if len({(config.device, config.split_seed, config.train_seed) for config in self.training.values()}) != 1:
            raise SettingError("model", "there must be a model, and all of them share the device and the seeds")
        if self.repetitions != 1 and not has_folds(name := self.task.protocol.name):
            way = "; more holdouts are --n-splits N, or --looks N,N,..." if has_open_end(name) else ""
            raise SettingError("repetitions", f"they are of folds, and there are none in {name!r}{way}")
        check_range("repetitions", self.repetitions, {"low": 1, "high": MOST_REPETITIONS})
        check_range("n_splits", self.n_splits, {"low": 1, "high": MOST_SPLITS})
        try:
            _ = self.protocol_task
        except ValueError as error:
            raise SettingError("n_splits", str(error)) from None
        if self.weights is not None and len(self.training) != 1:
            raise SettingError("weights", f"a file is for one model, not for {len(self.training)}; name it with -m")
        if self.looks:
            self._check_looks()
        for number in self.splits:
            if not 0 <= number < self.all_splits:
                raise SettingError("split", f"{number} is not one of 0 to {self.all_splits - 1}")
        if self.tune:
            check_range("tune", self.tune, {"low": 2, "high": MOST_TRIALS})
        elif self.space:
            raise SettingError("space", "only --tune N has a space")
        elif not self.halving:
            raise SettingError("halving", "only --tune N has configurations to stop early")
        check_range("seeds", self.seeds, {"low": 1, "high": MOST_SEEDS})
        check_range("device_memory", self.device_memory, {"low": 0, "high": 1})
        if self.jobs is not None:
            check_range("jobs", self.jobs, {"low": 1, "high": MOST_JOBS})
        if self.threads is not None:
            check_range("threads", self.threads, {"low": 1, "high": 1024})
        if self.gpus_per_job is not None:
            if self.backend != "ray":
                raise SettingError("gpus_per_job", "only a Ray cluster gives a job a number of GPUs")
            check_range("gpus_per_job", self.gpus_per_job, {"low": 0})
            if not (self.gpus_per_job == int(self.gpus_per_job) or 0.0001 <= self.gpus_per_job <= 1):
                reason = f"{self.gpus_per_job:g} is neither a share of a GPU nor a whole number"
                raise SettingError("gpus_per_job", reason)

    def _check_looks(self) -> None:
        from analysis.looks import check_looks, levels  # late: it brings pandas

        try:
            levels(self.looks)
            check_looks(self.looks, self.task.protocol.name, self.n_splits)
        except ValueError as error:
            raise SettingError("looks", str(error)) from None
        if self.all_splits not in self.looks:
            raise SettingError("looks", f"none is at {self.all_splits} splits")
        if len(self.models) + len(self.baselines) < 2:
            raise SettingError("looks", "one model has no pair to decide; name another, or keep the baselines")

    def of_look(self, before: int, look: int) -> "Request":
        """The request of the splits between two looks, of a protocol that ends with the later one."""
        splits = tuple(range(before, look))
        if has_folds(self.task.protocol.name):
            return dataclasses.replace(self, repetitions=look // self.n_splits, splits=splits)
        return dataclasses.replace(self, n_splits=look, splits=splits)

    @property
    def all_splits(self) -> int:
        """The number of splits of the whole protocol, all repetitions together."""
        return self.n_splits * self.repetitions

    @property
    def config(self) -> TrainingConfig:
        """The settings that all models share: device and seeds among them."""
        return next(iter(self.training.values()))

    def longest_epochs(self, config: TrainingConfig) -> int:
        """Epochs of a network on one split, all trials together, if no training stops by patience."""
        return halving.expected_epochs(self.tune, config.epochs, self.halving) if self.tune else config.epochs

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the models that were asked for."""
        return tuple(self.training)

    @property
    def protocol_task(self) -> Task:
        """The task with the number of splits that was asked for."""
        protocol: Protocol = self.task.protocol
        if isinstance(protocol, StratifiedKFold):
            protocol = StratifiedKFold(self.n_splits, self.repetitions)
        else:
            protocol = dataclasses.replace(protocol, n_splits=self.n_splits)
        return dataclasses.replace(self.task, protocol=protocol)

    def resolved(self, training: Mapping[str, TrainingConfig]) -> "Request":
        """The request with resolved settings: no `auto` is left."""
        return dataclasses.replace(self, training=training)
