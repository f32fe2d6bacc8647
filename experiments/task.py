"""A task: a question, the data and the protocol that answer it, and the models that are compared."""

import importlib
import re
from dataclasses import dataclass, field

from datasets import Protocol, Source
from experiments.tuning.space import DEFAULT_SPACE, Space, check_space
from tracking.keys import BASELINES
from tracking.settings import TrainingConfig


class TaskError(Exception):
    """A task cannot be found or done; the message is one sentence for the user."""


@dataclass(frozen=True)
class Task:
    """All that a script in `experiments/` states; see `experiments/task1.py`.

    Parameters
    ----------
    name : str
        That of the script: letters, digits, `_` and `-`. Commands, tags and the registered champion use it.
    question : str
        For people: the question that the classes answer.
    data : Source
        `Kaggle("owner/name")`, `FashionMNIST()` or `ImageFolder("path")`, with image size and channels.
    protocol : RepeatedHoldout or StratifiedKFold
    models, baselines : tuple of str
        Names in `models.MODELS` and `models.BASELINES`.
    training : TrainingConfig
    space : mapping of str to Between or OneOf
        What `--tune` may change (experiments/tuning/space.py). A model's class may narrow or widen ranges by an
        attribute `space`, such as `("lr=1e-5..1e-3",)`.
    experiment : str, optional
        Name of the MLflow experiment when it is made; the task's name unless given.

    Raises
    ------
    ValueError
        The name has other characters, or there are no models.
    """

    name: str
    question: str
    data: Source
    protocol: Protocol
    models: tuple[str, ...]
    training: TrainingConfig = field(default_factory=TrainingConfig)
    experiment: str = ""
    baselines: tuple[str, ...] = BASELINES
    space: Space = field(default_factory=lambda: dict(DEFAULT_SPACE))

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w-]+", self.name):
            raise ValueError(f"a task's name has letters, digits, _ and - only, unlike {self.name!r}")
        if not self.models:
            raise ValueError(f"{self.name} names no model")
        check_space(self.space)
        object.__setattr__(self, "experiment", self.experiment or self.name)


def find(name: str) -> Task:
    """Import a task's script, and return its TASK; a `TaskError` says so if that fails, or if it has another name."""
    try:
        task: Task = importlib.import_module(f"experiments.{name}").TASK
    except Exception as error:  # noqa: BLE001 - a user's script may raise anything
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise TaskError(f"experiments/{name}.py cannot be imported ({reason})") from None
    check_name(task, name)
    return task


def check_name(task: Task, script: str) -> None:
    """Refuse a task that is not named like its script: other commands would not find it."""
    if task.name != script:
        raise TaskError(f"experiments/{script}.py defines the task {task.name!r}; give it the name {script!r}")
