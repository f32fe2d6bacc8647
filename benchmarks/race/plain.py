"""The loop of the PyTorch tutorials, with the tracking that a careful author adds."""

import copy
from pathlib import Path
from typing import Any

import mlflow
import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader

from benchmarks.race.common import Prepared, Record, main, mlflow_run, scores
from benchmarks.race.works import LR, WEIGHT_DECAY, Entry


def train_epoch(model: nn.Module, loader: "DataLoader[Any]", optimizer: AdamW, device: str) -> float:
    """Train one epoch; return the mean loss."""
    criterion, total, count = nn.CrossEntropyLoss(), 0.0, 0
    model.train()
    for x, y in loader:
        x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
        total += loss.item() * len(y)
        count += len(y)
    return total / count


@torch.no_grad()
def evaluate(part: str, model: nn.Module, loader: "DataLoader[Any]", device: str) -> dict[str, float]:
    """Score the model on a part."""
    criterion, total = nn.CrossEntropyLoss(reduction="sum"), 0.0
    true, predicted = [], []
    model.eval()
    for x, y in loader:
        x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
        logits = model(x)
        total += criterion(logits, y).item()
        true.append(y)
        predicted.append(logits.argmax(1))
    y = torch.cat(true)
    return scores(part, y.cpu().numpy(), torch.cat(predicted).cpu().numpy(), total / len(y))


def loop(entry: Entry, prepared: Prepared) -> Record:
    """Train, validate and log each epoch, then score the best one."""
    loaders = {
        part: DataLoader(
            images,
            entry.batch_size,
            shuffle=part == "train",
            num_workers=entry.num_workers,
            pin_memory=entry.device == "cuda",
        )
        for part, images in prepared.parts().items()
    }
    model = prepared.network(entry.model).to(entry.device)
    optimizer = AdamW(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    schedule = CosineAnnealingLR(optimizer, entry.epochs)
    record = Record()
    with mlflow_run(entry):
        for epoch in range(1, entry.epochs + 1):
            record.start_epoch()
            train_loss = train_epoch(model, loaders["train"], optimizer, entry.device)
            metrics = evaluate("val", model, loaders["val"], entry.device)
            schedule.step()
            if record.improves(epoch, metrics):
                best_weights = copy.deepcopy(model.state_dict())
            mlflow.log_metrics({"train/loss": train_loss, **metrics}, step=epoch)
            record.end_epoch()
        model.load_state_dict(best_weights)
        if "test" in loaders:
            test = evaluate("test", model, loaders["test"], entry.device)
            mlflow.log_metrics(test)
            record.test_accuracy = test["test/accuracy"]
        path = Path(entry.folder) / "best.pt"
        torch.save(best_weights, path)
        mlflow.log_artifact(str(path))
    return record


if __name__ == "__main__":
    main(loop)
