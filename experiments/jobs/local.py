"""Jobs in several processes of this machine."""

import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np

from experiments.jobs import processes
from experiments.jobs.engine import Engine
from experiments.jobs.job import Job, JobContext, Result
from experiments.jobs.worker import do_job

LARGE_ARRAY = 2**20  # bytes: from here on an array is not copied to each worker


class Local(Engine):
    """Processes of this machine, started by the standard library.

    Each is an executor of its own: if one is killed, the others go on. (joblib's `Parallel` ends all jobs with the
    first worker that is lost.) Large arrays in `context` are written to `folder` once and mapped by every process; the
    caller removes it.
    """

    lost = (BrokenExecutor,)

    def __init__(
        self,
        context: JobContext,
        slots: int,
        folder: Path,
        work: Callable[[JobContext, Job], Result] = do_job,
    ) -> None:
        self.slots = slots
        self._context = context
        self._work = work
        self._idle: list[ProcessPoolExecutor] = []
        self._busy: dict[Future[Result], ProcessPoolExecutor] = {}
        self._processes: dict[Future[Result], list[BaseProcess]] = {}  # of their executors
        processes.start_server()
        ForkingPickler.register(np.ndarray, functools.partial(_reduce_array, folder))
        # writes large arrays now, while a full disk is still an ordinary error
        ForkingPickler.dumps(context)

    def submit(self, job: Job) -> "Future[Result]":
        """Give a job to an idle process, or to a new one."""
        for future in [future for future in self._busy if future.done()]:
            executor = self._busy.pop(future)
            if not isinstance(future.exception(), self.lost):  # else `why_lost` asks for its process, maybe later
                self._processes.pop(future)
                self._idle.append(executor)
        executor = self._idle.pop() if self._idle else self._start()
        with processes.without_script(), processes.without_ctrl_c():
            try:
                future = executor.submit(_do, job)
            except BrokenExecutor:  # it died while it was idle
                executor = self._start()
                future = executor.submit(_do, job)
        self._busy[future] = executor
        self._processes[future] = list(executor._processes.values())
        return future

    def why_lost(self, future: "Future[Result]", error: BaseException) -> str:
        """Say which signal ended the worker of a job."""
        for process in self._processes.pop(future):
            process.join(5)  # the exit code may come after the error
            if process.exitcode and process.exitcode < 0:
                number = -process.exitcode
                known = {each.value: each.name for each in signal.Signals}
                return f"its process was ended by {known.get(number, f'signal {number}')}"
        return super().why_lost(future, error)

    def _start(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(1, processes.METHOD, _serve, (functools.partial(self._work, self._context),))

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        executors = [*self._idle, *self._busy.values()]
        if kind is not None:
            for process in [each for executor in executors for each in (executor._processes or {}).values()]:
                process.kill()
        for executor in executors:
            executor.shutdown(wait=True, cancel_futures=kind is not None)
        ForkingPickler.register(np.ndarray, np.ndarray.__reduce__)


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


_work: Callable[[Job], Result]  # of this worker


def _serve(work: Callable[[Job], Result]) -> None:
    """Prepare a worker process, which ends with its driver, however that ends."""
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C is for the command, which ends its workers
    driver = multiprocessing.parent_process()
    assert driver is not None

    def watch() -> None:
        driver.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _do(job: Job) -> Result:
    return _work(job)
