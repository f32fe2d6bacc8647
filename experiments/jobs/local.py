"""Jobs in several processes of this machine."""

import contextlib
import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, Future
from pathlib import Path
from typing import Any

import numpy as np

from experiments.jobs.engine import Engine
from experiments.jobs.job import Job, JobContext, Result
from experiments.jobs.worker import do_job

LARGE_ARRAY = 2**20  # bytes: from here on an array is not copied to each worker


class Local(Engine):
    """Processes of this machine, started by loky, joblib's engine.

    Each is an executor of its own: if one is killed, the others go on. (joblib's own loop, `Parallel`, ends all jobs
    with the first worker that is lost.) Large arrays in `context` are written to `folder` once and mapped by every
    process; the caller removes it.
    """

    lost = (BrokenExecutor,)

    def __init__(
        self,
        context: JobContext,
        slots: int,
        threads: int,
        folder: Path,
        work: Callable[[JobContext, Job], Result] = do_job,
    ) -> None:
        from joblib.externals.loky.backend.reduction import dumps

        self.slots = slots
        self._work = functools.partial(work, context)
        self._threads = threads
        self._reducers = {np.ndarray: functools.partial(_reduce_array, folder)}
        # writes large arrays now, while a full disk is still an ordinary error
        dumps(context, reducers=self._reducers)
        self._idle: list[Any] = []
        self._busy: dict[Future[Result], Any] = {}
        self._processes: dict[Future[Result], list[Any]] = {}  # of their executors

    def submit(self, job: Job) -> "Future[Result]":
        """Give a job to an idle process, or to a new one."""
        for future in [future for future in self._busy if future.done()]:
            executor = self._busy.pop(future)
            if not isinstance(future.exception(), self.lost):
                self._idle.append(executor)
        executor = self._idle.pop() if self._idle else self._start()
        with _without_ctrl_c():
            try:
                future = executor.submit(self._work, job)
            except BrokenExecutor:  # it died while it was idle
                executor = self._start()
                future = executor.submit(self._work, job)
        self._busy[future] = executor
        self._processes[future] = list(executor._processes.values())
        return future  # type: ignore[no-any-return]

    def why_lost(self, future: "Future[Result]", error: BaseException) -> str:
        """Say which signal ended the worker of a job."""
        for process in self._processes.pop(future):
            process.join(5)  # loky's own message lacks the signal if it comes before the exit code
            if process.exitcode and process.exitcode < 0:
                number = -process.exitcode
                known = {each.value: each.name for each in signal.Signals}
                return f"its process was ended by {known.get(number, f'signal {number}')}"
        return super().why_lost(future, error)

    def _start(self) -> Any:
        from joblib.externals.loky import ProcessPoolExecutor

        environment = {
            "OMP_NUM_THREADS": str(self._threads),
            # else loky lets a worker that dies of a signal write pages on the screen; the command reports the signal
            "PYTHONFAULTHANDLER": os.environ.get("PYTHONFAULTHANDLER", ""),
        }
        reducers, driver = self._reducers, (os.getpid(),)
        return ProcessPoolExecutor(1, initializer=_serve, initargs=driver, env=environment, job_reducers=reducers)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for executor in [*self._idle, *self._busy.values()]:
            executor.shutdown(wait=True, kill_workers=kind is not None)


@contextlib.contextmanager
def _without_ctrl_c() -> Iterator[None]:
    """Shield a process that is started here from the terminal's Ctrl-C; it inherits the signal mask."""
    if sys.platform == "win32":  # which has no masks
        yield
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


_saving = threading.Lock()  # each executor has a thread of its own that does this


def _reduce_array(folder: Path, array: np.ndarray) -> tuple[Any, ...]:
    """Send an array to another process of this machine: a large one as the name of a file."""
    if array.nbytes < LARGE_ARRAY:
        return array.__reduce__()  # type: ignore[return-value]
    path = folder / f"{id(array)}.npy"  # the array lives until the end
    with _saving:
        if not path.exists():
            with (partial := path.with_suffix(".partial")).open("wb") as file:
                np.save(file, array)
            partial.replace(path)
    return _map_array, (str(path),)


def _map_array(path: str) -> np.ndarray:
    return np.load(path, mmap_mode="c", allow_pickle=False)  # type: ignore[no-any-return]  # shared until written to


def _serve(driver: int) -> None:
    """Make a worker process end with its driver, however that ends, and not before it."""
    from joblib.externals.loky import process_executor

    # loky takes memory that the allocator keeps for the next job for a leak: it replaces a worker that grew by 300 MB,
    # and warns. It has no option for that; should this name change, workers are replaced now and then, no more.
    process_executor._MAX_MEMORY_LEAK_SIZE = sys.maxsize

    def watch() -> None:
        while os.getppid() == driver:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
