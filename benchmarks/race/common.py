"""Shared by the peers: the images as torch datasets, the network with its initial weights, scores, and MLflow.

The peers differ in the loop alone. Each is a module that is run with the path of an `Entry`.
"""

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import torch
from PIL import Image
from sklearn.metrics import accuracy_score, f1_score
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset, Subset
from torchvision import transforms
from torchvision.datasets import FashionMNIST

import models
from benchmarks.race.works import LR, WEIGHT_DECAY, Entry

EXPERIMENT = "race"


class PhotoFiles(Dataset[tuple[Any, Any]]):
    """Photos that are opened at their full size each time they are asked for.

    Parameters
    ----------
    files : sequence of (str, int)
        Path and label.
    transform, target_transform : callable
        Of the image, and of the label.
    """

    def __init__(
        self,
        files: Sequence[tuple[str, int]],
        transform: Callable[[Image.Image], Tensor],
        target_transform: Callable[[int], Any] = int,
    ) -> None:
        self.files = files
        self.transform = transform
        self.target_transform = target_transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        path, label = self.files[index]
        with Image.open(path) as image:
            return self.transform(image.convert("RGB")), self.target_transform(label)


@dataclass(frozen=True)
class Prepared:
    """The common start of all contestants of a work, written by `preparation`.

    Attributes
    ----------
    folder : Path
    task : str
    data_root : str
        `--data-dir` of our script.
    model_arguments : dict
        Of `models.build`, besides the name.
    mean, std : list of float
        Of the training part's channels, in units of 0 to 255.
    files : list of (str, int), or None
        Path and label of each photo in the data set's order; None for Fashion-MNIST.
    once_seconds : float
        Time of ours, once for a data set: decoding, and the search for near duplicates.
    note : str
        Origin of the photos.
    sizes : dict of str to int
        Images of each part.
    """

    folder: Path
    task: str
    data_root: str
    model_arguments: dict[str, int]
    mean: list[float]
    std: list[float]
    files: list[tuple[str, int]] | None
    once_seconds: float
    note: str
    sizes: dict[str, int]

    @classmethod
    def read(cls, folder: str | Path) -> "Prepared":
        """Read the files of `preparation`."""
        folder = Path(folder)
        return cls(folder, **json.loads((folder / "prepared.json").read_text(encoding="utf-8")))

    @property
    def indices(self) -> dict[str, np.ndarray]:
        """Sorted indices of `train`, `val`, and `test`, which may be empty."""
        with np.load(self.folder / "split.npz", allow_pickle=False) as saved:
            return dict(saved)

    @property
    def initial_weights(self) -> dict[str, Tensor]:
        """The weights that every contestant starts from."""
        weights: dict[str, Tensor] = torch.load(self.folder / "initial.pt", weights_only=True)
        return weights

    def network(self, name: str) -> nn.Module:
        """Our model as it is written, in fp32 and torch's default layout, with the initial weights."""
        model = models.build(name, **self.model_arguments)
        model.load_state_dict(self.initial_weights)
        return model

    @property
    def transform(self) -> transforms.Compose:
        """From a PIL image to the input of the network."""
        steps: list[Callable[[Any], Any]] = [
            transforms.ToTensor(),
            transforms.Normalize([value / 255 for value in self.mean], [value / 255 for value in self.std]),
        ]
        if self.files is not None:
            size = self.model_arguments["image_size"]
            steps.insert(0, transforms.Resize((size, size)))
        return transforms.Compose(steps)

    def images(self, target_transform: Callable[[int], Any] = int) -> Dataset[tuple[Any, Any]]:
        """All images in the data set's order, decoded and transformed when they are asked for."""
        if self.files is not None:
            return PhotoFiles(self.files, self.transform, target_transform)
        parts = [FashionMNIST(str(self.folder), train, self.transform, target_transform) for train in (True, False)]
        return ConcatDataset(parts)

    def parts(self, target_transform: Callable[[int], Any] = int) -> dict[str, Subset[tuple[Any, Any]]]:
        """The images of `train`, `val` and, if there is one, `test`."""
        images = self.images(target_transform)
        return {part: Subset(images, rows.tolist()) for part, rows in self.indices.items() if len(rows)}


def scores(part: str, true: Any, predicted: Any, loss: float) -> dict[str, float]:
    """The scores of a part by metric name."""
    return {
        f"{part}/loss": loss,
        f"{part}/accuracy": float(accuracy_score(true, predicted)),
        f"{part}/f1_macro": float(f1_score(true, predicted, average="macro")),
        f"{part}/f1_micro": float(f1_score(true, predicted, average="micro")),
    }


def cosine(entry: Entry, epoch: int) -> float:
    """Learning rate of an epoch, from 1, for loops that do not take torch's CosineAnnealingLR."""
    return LR * (1 + math.cos(math.pi * (epoch - 1) / entry.epochs)) / 2


def params(entry: Entry) -> dict[str, Any]:
    """The params that are logged at the start of a run."""
    return {**asdict(entry), "lr": LR, "weight_decay": WEIGHT_DECAY}


def artifact_location(entry: Entry) -> str:
    """The folder of the store's artifacts."""
    return (Path(entry.folder) / "artifacts").as_uri()


@contextlib.contextmanager
def mlflow_run(entry: Entry) -> Iterator[None]:
    """Keep an MLflow run open, with its params logged."""
    mlflow.set_tracking_uri(entry.tracking_uri)
    experiment = mlflow.create_experiment(EXPERIMENT, artifact_location=artifact_location(entry))
    with mlflow.start_run(experiment_id=experiment, run_name=f"{entry.contestant} {entry.model}"):
        mlflow.log_params(params(entry))
        yield


@dataclass
class Record:
    """Measurements of a peer: wall time of each epoch, and the scores of the one with the lowest validation loss."""

    epoch_seconds: list[float] = field(default_factory=list)
    best: dict[str, float] = field(default_factory=dict)
    best_epoch: int = 0
    test_accuracy: float | None = None
    _started: float = 0.0

    def start_epoch(self) -> None:
        """Start the clock."""
        self._started = time.perf_counter()

    def end_epoch(self) -> None:
        """Stop the clock, after the epoch's logging."""
        self.epoch_seconds.append(time.perf_counter() - self._started)

    def improves(self, epoch: int, metrics: Mapping[str, float]) -> bool:
        """Note an epoch's validation scores if it is the best so far, and say whether it is."""
        if self.best and metrics["val/loss"] >= self.best["val/loss"]:
            return False
        self.best, self.best_epoch = dict(metrics), epoch
        return True

    def write(self, entry: Entry) -> None:
        """Leave it for the driver."""
        result = {
            "epoch_seconds": self.epoch_seconds,
            "val_accuracy": self.best["val/accuracy"],
            "test_accuracy": self.test_accuracy,
            "best_epoch": self.best_epoch,
        }
        entry.result.write_text(json.dumps(result), encoding="utf-8")


def main(loop: Callable[[Entry, Prepared], Record]) -> None:
    """Run a peer's loop on the entry that the command line names."""
    entry = Entry.read(sys.argv[1])
    torch.manual_seed(entry.seed)
    loop(entry, Prepared.read(entry.prepared)).write(entry)
