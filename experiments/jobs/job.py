"""A job: one model on one split. It is data that travels to a worker, and so is its result."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np

from datasets import ImageData, Split
from tracking.settings import TrainingConfig

if TYPE_CHECKING:
    from models import ModelCard  # brings torch, which --help need not wait for

Outcome = Literal["trained", "kept", "found", "left", "failed"]


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

    @property
    def title(self) -> str:
        """Name of its run."""
        return f"{self.card.name} split {self.number}" + (
            "" if self.replicate is None else f" replicate {self.replicate}"
        )

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

    outcome: Outcome  # kept: trained, and the results wait for a store that is away; found: finished before
    text: str = ""  # the scores, the other process, or the reason
    again: bool = False  # whether another attempt, later, may end otherwise


@dataclass(frozen=True)
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


def model_arguments(data: ImageData) -> dict[str, int]:
    """The arguments of `models.build`, besides the name, for a data set."""
    _, _, size, channels = data.images.shape
    return {"in_channels": channels, "num_classes": len(data.classes), "image_size": size}
