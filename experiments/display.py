"""What a run prints: the resolved settings, a bar per split, and what was left alone."""

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import models
from datasets import ImageData, Split
from experiments.config import Task, TrainingConfig
from experiments.training import Evaluation
from tracking import Store

console = Console(highlight=False)


def announce(
    task: Task, config: TrainingConfig, data: ImageData, splits: Sequence[Split], chosen: Sequence[int], store: Store
) -> None:
    """Print what will be done, on what, and how much work it is."""
    first = splits[chosen[0]]
    _, _, size, channels = data.images.shape
    macs = sum(models.describe(name, channels, len(data.classes), size).macs for name in task.models)
    # forward and backward of a training image cost three times a forward pass
    passes = (3 * len(first.train) + len(first.val)) * config.epochs * len(chosen)
    console.print(f"[bold]{task.name}[/bold]  {task.question}")
    lines = {
        "data": f"{data.name}: {len(data.labels):,} images of {len(data.classes)} classes, {size}x{size}x{channels}",
        "protocol": f"{task.protocol.name}, {len(chosen)} of {task.protocol.n_splits} splits; "
        f"train {len(first.train):,}, validation {len(first.val):,}, test {len(first.test):,}",
        "models": ", ".join(task.models)
        + (f"; baselines {', '.join(task.baselines)}, in seconds" if task.baselines else ""),
        "training": f"AdamW lr {config.lr:g}, weight decay {config.weight_decay:g}, batch {config.batch_size}, "
        f"up to {config.epochs} epochs, patience {config.patience}, "
        f"{'augmented' if config.augment else 'not augmented'}, seed {config.seed}",
        "hardware": f"{config.device}, {config.precision}, {torch.get_num_threads()} threads",
        "work": f"{len(task.models)} models x {len(chosen)} splits x up to {config.epochs} epochs, "
        f"at most {macs * passes / 1e12:,.3g} T multiply-accumulates",
        "store": store.label,
    }
    for label, text in lines.items():
        console.print(f"  {label:9s} {text}", markup=False, soft_wrap=True)
    if data.skipped:
        shown = "; ".join(data.skipped[:5]) + ("; ..." if len(data.skipped) > 5 else "")
        total = len(data.labels) + len(data.skipped)
        console.print(f"  left out  {len(data.skipped)} of {total:,} files do not decode: {shown}", markup=False)


class SplitBar:
    """The progress of one split: epochs, scores, time left. It stays as one line when the split is done."""

    def __init__(self, title: str, epochs: int) -> None:
        self._progress = Progress(
            TextColumn("{task.description:26s}"),  # "efficientnet_lite split 10"
            BarColumn(bar_width=8),
            MofNCompleteColumn(),
            TextColumn("{task.fields[scores]}"),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            console=console,
        )
        self._row = self._progress.add_task(title, total=epochs, scores="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._progress.update(self._row, scores=f"[red]{kind.__name__ if kind else ''}")
        self._progress.stop()

    def update(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Show the scores of the last epoch."""
        metrics = history[-1]["metrics"]
        scores = f"val {metrics['val/accuracy']:.1%}, loss {metrics['val/loss']:.3f}"
        self._progress.update(self._row, completed=history[-1]["epoch"], scores=scores)

    def finish(self, best_epoch: int, best: Evaluation, test: Evaluation | None) -> None:
        """Show the scores of the best epoch."""
        scores = f"best {best_epoch}: val {_percent(best)}" + (f", test {_percent(test)}" if test else "")
        row = self._progress.tasks[0]
        self._progress.update(self._row, total=row.completed, scores=scores)  # an early stop is an end, too


def _percent(result: Evaluation) -> str:
    return f"{result.scores()['accuracy']:.1%}"


def left_alone(finished: int, elsewhere: Sequence[str]) -> None:
    """Say what was not run: splits that were finished before, and those that another process does."""
    if finished:
        console.print(f"finished before and kept: {finished} split{'s' * (finished > 1)}; --fresh trains again")
    if elsewhere:
        console.print(f"left to others: {', '.join(elsewhere)}", markup=False, soft_wrap=True)
