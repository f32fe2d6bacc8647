"""Engines do jobs: one after the other (sequential), in processes of this machine (local), or on a Ray cluster (ray).

An engine takes a job and returns a future. `run_jobs` keeps it busy; no scheduler of our own is needed.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Self

from experiments.jobs.job import Job, Result

ATTEMPTS = 3  # at a job, if it fails for a reason that may pass


class EngineError(Exception):
    """Jobs cannot be done there; the message is one sentence for the user."""


class Engine(ABC):
    """Where jobs are done. Exiting the context on an error cancels running jobs."""

    slots: int  # jobs that are handed over at once
    lost: tuple[type[Exception], ...] = ()  # raised by the future of a job whose worker is gone
    tries_again = False  # whether the engine itself tries again before it raises that

    @abstractmethod
    def submit(self, job: Job) -> "Future[Result]":
        """Hand a job over."""

    def room(self) -> int:
        """How many jobs are done at a time."""
        return self.slots

    def __enter__(self) -> Self:
        return self

    def why_lost(self, future: "Future[Result]", error: BaseException) -> str:
        """Say why the worker of a job was lost."""
        return f"its worker was lost ({type(error).__name__})"

    @abstractmethod
    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait for running jobs or, on an error, cancel them."""


def run_jobs(
    jobs: Iterator[Job], engine: Engine, begun: Callable[[Job], None] = lambda job: None
) -> Iterator[tuple[Job, Result]]:
    """Do jobs, and yield each with its result as it comes.

    A failure that may pass is tried again when all other jobs have begun, `ATTEMPTS` times in all. `begun` is called
    with each job that is handed over. An exception of a job is raised if the engine is this process.
    """
    again: deque[Job] = deque()
    pending: dict[Future[Result], Job] = {}
    exhausted = False
    while True:
        may_submit = len(pending) < engine.slots and not (exhausted and not again)
        done, _ = wait(pending, timeout=0 if may_submit else None, return_when=FIRST_COMPLETED)
        for future in [future for future in pending if future in done]:  # in the order in which they were begun
            job = pending.pop(future)
            try:
                result = future.result()
            except engine.lost as error:
                reason = f"{job.title}: {engine.why_lost(future, error)}"
                result = Result("failed", reason, again=not engine.tries_again)
            if result.again and job.attempt + 1 < ATTEMPTS:
                again.append(job.again())
            else:
                yield job, result
        if len(pending) < engine.slots:
            next_job = None if exhausted else next(jobs, None)
            exhausted |= next_job is None
            if next_job is None and again:
                next_job = again.popleft()
            if next_job is not None:
                begun(next_job)
                pending[engine.submit(next_job)] = next_job
            elif not pending:
                return
