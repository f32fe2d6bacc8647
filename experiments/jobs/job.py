"""A job: one model on one split. It is data that travels to a worker, and so is its result."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np

from datasets import ImageData, Split
from tracking.settings import TrainingConfig

if TYPE_CHECKING:
    from models import ModelCard  # brings torch, which --help need not wait for
    from models.weights import InitialWeights

Outcome = Literal["trained", "paused", "kept", "found", "left", "failed"]
# validation loss after each epoch so far: of the whole part, and of its halves; infinite after a divergence
Curve = tuple[tuple[float, float, float], ...]
DIVERGED = (math.inf, math.inf, math.inf)


@dataclass(frozen=True)
class Tuned:
    """The trials of a split that the validation part and its halves chose."""

    chosen: "Job"  # the trial whose model is the split's
    of_halves: tuple["Job", "Job"]  # the trials that score half 0 and half 1


@dataclass(frozen=True)
class Job:
    """One model on one split, with all params and tags of its run.

    A job is idempotent and goes on where an earlier attempt stopped, so a lost worker costs a retry and nothing else.
    """

    card: "ModelCard"
    config: TrainingConfig  # resolved: no `auto`
    number: int  # of the split, from 0
    split: Split
    half: np.ndarray  # uint8, shape (n_val,): half of the validation part that an image is in (`datasets.halve`)
    params: dict[str, Any]
    tags: dict[str, str]
    replicate: int | None = None  # number of the training on this split, from 0, where there are several
    parent_id: str = ""  # its parent run, as of execution
    experiment: str = ""  # the parent's experiment
    attempt: int = 0
    trial: int | None = None  # number of the configuration, of a job that is a trial of a tuned split
    until: int | None = None  # epochs after which a trial waits for the others
    of_split: str = ""  # fingerprint of the split that a trial belongs to
    ends: bool = False  # whether a trial stops there for good
    tuned: Tuned | None = None  # of a tuned split's own job, once its trials are done

    @property
    def title(self) -> str:
        """Name of its run."""
        numbers = {"split": self.number, "replicate": self.replicate, "trial": self.trial}
        return " ".join([self.card.name, *(f"{key} {n}" for key, n in numbers.items() if n is not None)])

    @property
    def fingerprint(self) -> str:
        """Digest of all that decides its result."""
        return self.tags["fingerprint"]

    def again(self) -> Self:
        """The next attempt at it."""
        return replace(self, attempt=self.attempt + 1)


@dataclass(frozen=True)
class Result:
    """The result of a job."""

    # paused: a trial that may go on; kept: trained, and the results wait for the store; found: finished before
    outcome: Outcome
    text: str = ""  # the scores, the other process, or the reason
    again: bool = False  # whether another attempt, later, may end otherwise
    curve: Curve = ()  # of a trial


@dataclass(frozen=True, kw_only=True)
class JobContext:
    """Everything that the jobs of one command share, wherever they are done."""

    task: str
    data: ImageData
    groups: np.ndarray  # int64, shape (N,): ids of near duplicates (`datasets.duplicate_groups`)
    device: str
    device_memory: float  # share of the device's memory that the images may take; more are streamed from the host's
    threads: int  # CPU threads of a job
    sources: Mapping[str, str]  # digests of the source files that the command started with
    uri: str  # this and the next two are of the store (`tracking.open_store`)
    command: str
    state: Path
    host: str  # machine of the command
    environment: Mapping[str, str]  # variables that tell the store's client how to get in
    weights: "Mapping[str, InitialWeights]" = field(default_factory=dict)  # of models that do not begin fresh


def model_arguments(data: ImageData, freeze: bool = False) -> dict[str, Any]:
    """The arguments of `models.build`, besides the name, for a data set."""
    _, _, size, channels = data.images.shape
    fixed = {"in_channels": channels, "num_classes": len(data.classes), "image_size": size}
    return fixed | ({"freeze": True} if freeze else {})
