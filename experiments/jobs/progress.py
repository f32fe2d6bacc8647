"""The progress of jobs on the screen: a bar per split, or one for all that are done at once."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from experiments.jobs.job import Job, Result
from experiments.jobs.schedule import cost
from experiments.training.evaluation import Evaluation

console = Console(highlight=False)


class _Bar:
    """Progress that is shown while the body of a `with` works."""

    _progress: Progress

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._progress.stop()


class SplitBar(_Bar):
    """The progress of one split: epochs, scores, time left. It stays as one line when the split is done."""

    def __init__(self, title: str, epochs: int) -> None:
        width, whole = console.width, Column(no_wrap=True)  # else Rich cuts digits off if there is no room
        # "efficientnet_lite split 10"; "best 10: val 63.3%, test 63.1%", epochs and time need 45 columns
        name = Column(no_wrap=True, overflow="ellipsis", width=min(26, max(8, width - 45)))
        self._progress = Progress(
            TextColumn("{task.description}", table_column=name),
            *([BarColumn(bar_width=8)] if width >= 80 else []),
            MofNCompleteColumn(table_column=whole),
            *([TextColumn("{task.fields[scores]}")] if width >= 53 else []),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True, table_column=whole),
            console=console,
        )
        self._row = self._progress.add_task(title, total=epochs, scores="")

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._progress.update(self._row, scores=f"[red]{kind.__name__}")
        super().__exit__(kind)

    def update(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Show the scores of the last epoch."""
        metrics = history[-1]["metrics"]
        scores = f"val {metrics['val/accuracy']:.1%}, loss {metrics['val/loss']:.3f}"
        self._progress.update(self._row, completed=history[-1]["epoch"], scores=scores)

    def finish(self, scores: str) -> None:
        """Show the scores of the best epoch."""
        row = self._progress.tasks[0]
        self._progress.update(self._row, total=row.completed, scores=scores)  # an early stop is an end, too


class JobBar(_Bar):
    """The progress of jobs that are done at once: a line for each that has ended, and one for all of them.

    If the output is no terminal, the line for all is added to each of the others. The time left follows from the jobs
    that were trained: their time, their cost, and the cost of the others. `room` returns how many can be done at once,
    now.
    """

    def __init__(self, jobs: Sequence[Job], room: Callable[[], int]) -> None:
        self._total = len(jobs)
        self._cost_left = sum(cost(job.card) for job in jobs)
        self._trained, self._cost_trained = 0, 0.0
        self._room = room
        self._running: dict[str, float] = {}  # when they began
        self._done = 0
        self._began = time.monotonic()
        self._failed = 0
        self._progress = Progress(
            TextColumn("[bold]jobs[/bold]"), BarColumn(bar_width=8), TextColumn("{task.fields[state]}"),
            console=console, disable=not console.is_terminal,
        )  # fmt: skip
        self._row = self._progress.add_task("jobs", total=len(jobs), state=self._state())

    def begin(self, job: Job) -> None:
        """Show that a job was handed over."""
        self._running[job.title] = time.monotonic()
        running = list(self._running) if len(self._running) <= self._room() else []  # else only the cluster knows
        names = f" ({', '.join(running[:3])}{', ...' if len(running) > 3 else ''})" if running else ""
        self._progress.update(self._row, state=self._state() + names)

    def end(self, job: Job, result: Result) -> None:
        """Show the result of a job."""
        seconds = time.monotonic() - self._running.pop(job.title)
        self._done += 1
        self._failed += result.outcome == "failed"
        self._cost_left -= cost(job.card)
        if result.outcome in ("trained", "paused", "kept"):  # the time of the others says nothing about the rest
            self._trained += 1
            self._cost_trained += cost(job.card)
        texts = {
            "trained": result.text,
            "paused": result.text,
            "kept": f"{result.text}, kept for the result database",
            "found": "finished before",
            "left": "left to another process",
            "failed": result.text.removeprefix(f"{job.title}: "),
        }
        line = f"{job.title:26s} {texts[result.outcome]}  {_clock(seconds)}"
        self._progress.update(self._row, completed=self._done, state=self._state())
        console.print(line if console.is_terminal else f"{line}  [{self._state()}]", markup=False, soft_wrap=True)

    def _state(self) -> str:
        done, room = self._done, max(1, self._room())
        parts = [f"{done} of {self._total} done", f"{min(room, self._total - done)} running", f"{self._failed} failed"]
        if self._trained and (left := self._total - done):
            worked = (time.monotonic() - self._began) * min(room, self._trained)  # seconds, of all workers together
            parts.append(f"about {_clock(worked / self._cost_trained * self._cost_left / min(room, left))} left")
        return ", ".join(parts)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def count(number: int, noun: str) -> str:
    """Write a number with its noun, in the plural if need be."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def scores(best_epoch: int, best: Evaluation, test: Evaluation | None) -> str:
    """Scores of a finished split, for the screen."""
    val, tested = (f"{result.scores()['accuracy']:.1%}" if result else "" for result in (best, test))
    return f"best {best_epoch}: val {val}" + (f", test {tested}" if test else "")
