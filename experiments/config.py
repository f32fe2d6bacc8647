"""What a task is and which settings decide its results."""

from dataclasses import dataclass
from typing import Annotated, Literal

import typer

from datasets import RepeatedHoldout, StratifiedKFold
from tracking.keys import BASELINES

DEVICE_MEMORY = 0.5  # share of a device's memory that the images may take before they are streamed from the host
Precision = Literal["auto", "fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class TrainingConfig:
    """Everything about training that decides a result; each field is an option and a logged parameter."""

    lr: Annotated[float, typer.Option(min=1e-12, help="learning rate of AdamW at the start")] = 1e-3
    weight_decay: Annotated[float, typer.Option(min=0, help="decoupled weight decay of AdamW")] = 0.01
    batch_size: Annotated[int, typer.Option(min=2, help="training images a step, at most")] = 128
    epochs: Annotated[int, typer.Option(min=1, help="at most; the cosine schedule ends here")] = 30
    patience: Annotated[int, typer.Option(min=1, help="epochs without a lower validation loss before stopping")] = 7
    augment: Annotated[bool, typer.Option(help="flip and shift training images at random")] = False
    precision: Annotated[Precision, typer.Option(help="auto: bf16 where the hardware has it, fp16 on older GPUs")] = (
        "auto"
    )
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...; auto takes a GPU where there is one")] = (
        "auto"
    )
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="of splits, weights, batches and augmentation")] = 0


@dataclass(frozen=True)
class Task:
    """A question, the protocol that answers it, the models that are compared, and the baselines beside them.

    Its data set is entered under its name in `datasets.SOURCES`, its MLflow experiment in `tracking.EXPERIMENTS`.
    """

    name: str
    question: str
    protocol: RepeatedHoldout | StratifiedKFold
    models: tuple[str, ...]
    training: TrainingConfig
    baselines: tuple[str, ...] = BASELINES
