"""Whether the fast paths train and score as plain fp32 does.

What      Each model is trained twice with each seed, from the same weights on the same batches: by the loop of the
          tasks in the precision of this machine, and by one of the plainest kind (fp32, contiguous memory, the own
          `forward` of the model). Fashion-MNIST, its first split with 5,000 of the validation images,
          and for EfficientNet-B0, which is made for photographs, 320 muffins and chihuahuas (256 to train)
Compared  the training loss of each epoch; the final validation loss and accuracy; and the predictions of the model that
          was trained fast, by `evaluate` in this precision and by its own `forward` in fp32
Fails     if the mean difference of the accuracies exceeds twice its standard error and half a point, or less than
          99.9 % of the predictions agree
Time      about 10 minutes on 2 CPU cores

    python benchmarks/equality.py --data-dir DATA
"""

import argparse
import dataclasses
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import datasets
import models
from datasets import ImageData, Split
from experiments import Task, TrainingConfig, task2, task3
from experiments.jobs.job import model_arguments
from experiments.training import hardware
from experiments.training.evaluation import evaluate
from experiments.training.fit import fit
from experiments.training.images import DeviceImages, plan_epoch, split_batches
from experiments.training.state import TrainingState, initialise, seed_of_split
from models.layers import LayerStack

ON_PHOTOS = ("efficientnet_b0",)
N_VAL = 5000
N_PHOTOS = 320  # of which a fifth validates
AGREEMENT = 0.999


class Curve(NamedTuple):
    """Training loss of each epoch, and the last epoch's validation loss and accuracy."""

    train: np.ndarray
    loss: float
    accuracy: float


class Subject(NamedTuple):
    """Data, split and settings of a training."""

    data: ImageData
    split: Split
    config: TrainingConfig


def garments(data_dir: Path | None, epochs: int) -> Subject:
    """Task 3's first split, with fewer validation images and no test part."""
    data = datasets.load(task3.TASK.data, data_dir)
    split = datasets.draw_splits(task3.TASK.protocol, data, 0)[0]
    return Subject(data, Split(split.train, split.val[:N_VAL], split.test[:0]), configure(task3.TASK, epochs))


def photos(data_dir: Path | None, epochs: int) -> Subject:
    """As many photographs of each class, a fifth of them to validate."""
    data = datasets.load(task2.TASK.data, data_dir)
    chosen = np.concatenate([np.flatnonzero(data.labels == label)[: N_PHOTOS // 2] for label in (0, 1)])
    validates = np.arange(N_PHOTOS) % 5 == 0
    split = Split(chosen[~validates], chosen[validates], chosen[:0])
    return Subject(data, split, configure(task2.TASK, epochs))


def configure(task: Task, epochs: int) -> TrainingConfig:
    """The task's own settings, without augmentation and early stopping."""
    settings = dataclasses.replace(task.training, device="cpu", augment=False, epochs=epochs, patience=epochs)
    return hardware.resolve(settings)


def train_fast(subject: Subject, name: str, seed: int) -> tuple[Curve, float]:
    """Train as the tasks do; also the share of predictions that are those of the model's own `forward` in fp32."""
    data, split, config = subject
    model = new_model(subject, name, seed)
    images = DeviceImages.load(data, "cpu")
    records = list(fit(TrainingState(model, config, seed), images, split))
    last = records[-1].val
    curve = Curve(np.array([record.train_loss for record in records]), last.loss, last.scores()["accuracy"])
    mean, std = images.normalisation(split.train)
    scored = evaluate(model, images, split.val, mean, std, config.precision).predicted
    plain = torch.cat([logits.argmax(1) for logits in forward(model.eval(), normalised(data, split.val, mean, std))])
    return curve, (scored == plain).float().mean().item()


def train_plainly(subject: Subject, name: str, seed: int) -> Curve:
    """Train on the same batches, in fp32 and without any fast path."""
    data, split, config = subject
    model = new_model(subject, name, seed).to(memory_format=torch.contiguous_format)
    mean, std = DeviceImages.load(data, "cpu").normalisation(split.train)
    x, y = normalised(data, split.train, mean, std), torch.from_numpy(data.labels)
    x_val, y_val = normalised(data, split.val, mean, std), y[torch.from_numpy(split.val)]
    y = y[torch.from_numpy(split.train)]
    optimizer = torch.optim.AdamW(model.parameters(), config.lr, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs)
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(config.epochs):
        model.train()
        total = 0.0
        plan = plan_epoch(len(x), x.shape[2], False, generator)[:, 0]
        for rows in split_batches(plan, config.batch_size):
            optimizer.zero_grad()
            loss = cross_entropy(model(x[rows]), y[rows])
            loss.backward()
            optimizer.step()
            total += loss.item() * len(rows)
        schedule.step()
        losses.append(total / len(x))
    logits = torch.cat(list(forward(model.eval(), x_val)))
    accuracy = (logits.argmax(1) == y_val).float().mean().item()
    return Curve(np.array(losses), cross_entropy(logits, y_val).item(), accuracy)


def new_model(subject: Subject, name: str, seed: int) -> LayerStack:
    """Weights that follow from the seed."""
    return initialise(lambda: models.build(name, **model_arguments(subject.data)), seed_of_split(seed, 0), "cpu")


def normalised(data: ImageData, indices: np.ndarray, mean: Tensor, std: Tensor) -> Tensor:
    """Images as float32, shape (n, C, H, W)."""
    return ((torch.from_numpy(data.images[indices]).float() - mean) / std).permute(0, 3, 1, 2).contiguous()


@torch.no_grad()
def forward(model: nn.Module, x: Tensor) -> Iterator[Tensor]:
    """Logits of some images after the other."""
    return iter([model(some) for some in torch.split(x, 256)])


def row(name: str, subject: Subject, seeds: Sequence[int]) -> tuple[str, bool]:
    """Train a model with all seeds; return a row of the table, and whether both ways agree."""
    fast, agreements = zip(*(train_fast(subject, name, seed) for seed in seeds), strict=True)
    plain = [train_plainly(subject, name, seed) for seed in seeds]
    curves = np.array([a.train - b.train for a, b in zip(fast, plain, strict=True)])  # (seeds, epochs)
    losses = np.array([a.loss - b.loss for a, b in zip(fast, plain, strict=True)])
    accuracies = 100 * np.array([[a.accuracy, b.accuracy] for a, b in zip(fast, plain, strict=True)])
    difference = accuracies[:, 0] - accuracies[:, 1]
    error = difference.std(ddof=1) / len(seeds) ** 0.5
    equal = abs(difference.mean()) <= max(2 * error, 0.5) and min(agreements) >= AGREEMENT
    cells = [
        name, f"{np.abs(curves).mean():.4f}", f"{np.abs(curves).max():.3f}", f"{losses.mean():+.4f}",
        *(f"{mean:.2f} ± {sd:.2f}" for mean, sd in zip(accuracies.mean(0), accuracies.std(0, ddof=1), strict=True)),
        f"{difference.mean():+.2f} ± {error:.2f}", f"{100 * min(agreements):.3f}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |", equal


def main() -> None:
    """Print the table; exit code 1 if a model does not agree."""
    parser = argparse.ArgumentParser(description="Compare fast training with plain training; see the docstring.")
    parser.add_argument("--data-dir", type=Path, default=os.environ.get("DATA_DIR"))
    parser.add_argument("--model", action="append", choices=models.MODELS)
    parser.add_argument("--seeds", type=int, default=5, help="at least 2")
    parser.add_argument("--epochs", type=int, default=8)
    arguments = parser.parse_args()
    hardware.prepare()
    columns = (
        "model", "train loss, mean diff", "max diff", "val loss, diff", "val accuracy fast", "plain",
        "diff ± standard error", "same predictions, %",
    )  # fmt: skip
    print(f"| {' | '.join(columns)} |\n|---{'|--:' * (len(columns) - 1)}|")
    failed = []
    for name in arguments.model or models.MODELS:
        subject = (photos if name in ON_PHOTOS else garments)(arguments.data_dir, arguments.epochs)
        text, equal = row(name, subject, range(arguments.seeds))
        print(text, flush=True)
        failed += [] if equal else [name]
    if failed:
        raise SystemExit(f"{', '.join(failed)}: fast and plain training do not agree")


if __name__ == "__main__":
    main()
