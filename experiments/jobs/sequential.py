"""Jobs one after the other, in this process."""

import contextlib
from concurrent.futures import Future, ThreadPoolExecutor

import tracking
from experiments.jobs.engine import Engine
from experiments.jobs.job import Job, Result
from experiments.jobs.worker import Worker


class Sequential(Engine):
    """In this process: the results of one job are recorded while the next one is trained."""

    slots = 2  # one is trained, one recorded

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._recording = ThreadPoolExecutor(1)

    def submit(self, job: Job) -> "Future[Result]":
        """Train a job, and have its results recorded."""
        return self._recording.submit(self._worker.record, self._worker.train(job))

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # if the command ends early, recording is finished, but a store that is away is not waited for
        with tracking.impatient() if kind else contextlib.nullcontext():
            self._recording.shutdown()
