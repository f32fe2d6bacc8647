"""Running jobs: one after the other here, several at once on this machine, or on a Ray cluster.

A job is a model on a split. It is idempotent and goes on where an earlier attempt stopped, so a lost worker costs a
retry and nothing else, and no scheduler of our own is needed. An engine takes a job and returns a future; `run_jobs`
keeps an engine busy.
"""

import contextlib
import dataclasses
import functools
import logging
import os
import signal
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ThreadPoolExecutor, wait
from pathlib import Path
from socket import create_connection, gethostname
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

import numpy as np

import tracking
from datasets import Split

if TYPE_CHECKING:
    from models import ModelCard  # brings torch, which --help need not wait for

T = TypeVar("T")
ROOT = Path(__file__).resolve().parent.parent
ATTEMPTS = 3  # at a job, where it fails for a reason that may pass
PATIENCE = 300.0  # seconds for a node that has what a job takes
LARGE_ARRAY = 2**20  # bytes: from here on an array is not copied to each worker
STAYS_HERE = [  # on the way to a cluster; patterns as in .gitignore
    "/data", "/mlruns", "/docs", "/deploy", "/tests", "/benchmarks", ".git", ".venv", ".*_cache", ".hypothesis",
    "__pycache__", "*.npy", "*.npz", "*.pt", "*.db", "*.ipynb", "*.state", "*.whl", "*.zip",
]  # fmt: skip
HERE = {"runtime_env": {"env_vars": {"PYTHONPATH": str(ROOT)}}}  # where all nodes are on this machine

Outcome = Literal["trained", "kept", "found", "left", "failed"]


class EngineError(Exception):
    """Jobs cannot be done there; the message is one sentence for the user."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One model on one split, with all params and tags of its run."""

    card: "ModelCard"
    number: int
    split: Split
    params: dict[str, Any]
    tags: dict[str, str]
    parent_id: str
    experiment: str
    attempt: int = 0

    @property
    def title(self) -> str:
        """What its run is called."""
        return f"{self.card.name} split {self.number}"


@dataclasses.dataclass(frozen=True)
class Result:
    """What became of a job.

    Attributes
    ----------
    outcome : str
        It was trained; or trained, and its results are kept for a store that is away; or it was found finished; or it
        was left to another process; or it failed.
    text : str
        Its scores, or who, or why.
    again : bool
        Whether another attempt, later, may end otherwise.
    """

    outcome: Outcome
    text: str = ""
    again: bool = False


class Engine(ABC):
    """Where jobs are done; a context whose end, if an error brings it, stops what is at work.

    Attributes
    ----------
    slots : int
        Jobs that are handed over at once.
    lost : tuple of exception types
        What a future raises whose worker is gone.
    tries_again : bool
        Whether that is raised only after the engine itself has tried again.
    """

    slots: int
    lost: tuple[type[Exception], ...] = ()
    tries_again = False

    @abstractmethod
    def submit(self, job: Job) -> "Future[Result]":
        """Hand a job over."""

    def __enter__(self) -> Self:
        return self

    @abstractmethod
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for what is at work, or stop it."""


def run_jobs(
    jobs: Iterator[Job], engine: Engine, begun: Callable[[Job], None] = lambda job: None
) -> Iterator[tuple[Job, Result]]:
    """Do jobs, and yield each with its result as it comes.

    Parameters
    ----------
    jobs : iterator of Job
        Asked for the next one when there is room for it.
    engine : Engine
    begun : callable
        Told of each job that is handed over.

    Yields
    ------
    tuple of Job and Result

    Raises
    ------
    Exception
        What a job raised, where the engine is this process.

    Notes
    -----
    What may end otherwise is tried again when all others have been begun, `ATTEMPTS` times in all.
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
                reason = f"{job.title}: its worker was lost ({type(error).__name__})"
                result = Result("failed", reason, again=not engine.tries_again)
            if result.again and job.attempt + 1 < ATTEMPTS:
                again.append(dataclasses.replace(job, attempt=job.attempt + 1))
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


class Sequential(Engine):
    """In this process: the results of one job are written while the next one is trained.

    Parameters
    ----------
    train : callable
        Trains a job, and returns what writes its results and says what became of it.
    """

    slots = 2  # one is trained, one written

    def __init__(self, train: Callable[[Job], Callable[[], Result]]) -> None:
        self._train = train
        self._writer = ThreadPoolExecutor(1)

    def submit(self, job: Job) -> "Future[Result]":
        """Train a job, and have its results written."""
        return self._writer.submit(self._train(job))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # where the command ends early, what is written is finished, but a store that is away is not waited for
        with tracking.impatient() if kind else contextlib.nullcontext():
            self._writer.shutdown()


class Local(Engine):
    """Processes of this machine, started by loky, joblib's engine.

    Each is an executor of its own: where one is killed, the others work on. (joblib's own loop, `Parallel`, ends all
    jobs with the first worker that is lost.)

    Parameters
    ----------
    function : callable
        Does a job: `function(shared, job)`, in the other process.
    shared : object
        What all jobs need. Large arrays in it are written to `folder` once and mapped by every process.
    slots : int
        Processes.
    threads : int
        Of each.
    folder : pathlib.Path
        Removed by the caller.
    """

    lost = (BrokenExecutor,)

    def __init__(
        self, function: Callable[[Any, Job], Result], shared: object, slots: int, threads: int, folder: Path
    ) -> None:
        from joblib.externals.loky.backend.reduction import dumps

        self.slots = slots
        self._work = functools.partial(function, shared)
        self._threads = threads
        self._reducers = {np.ndarray: functools.partial(_reduce_array, folder)}
        # large arrays are written here, where a full disk is an error like others
        dumps(shared, reducers=self._reducers)
        self._idle: list[Any] = []
        self._busy: dict[Future[Result], Any] = {}

    def submit(self, job: Job) -> "Future[Result]":
        """Give a job to an idle process, or to a new one."""
        for future in [future for future in self._busy if future.done()]:
            executor = self._busy.pop(future)
            if not isinstance(future.exception(), self.lost):
                self._idle.append(executor)
        executor = self._idle.pop() if self._idle else self._start()
        with _without_ctrl_c():
            future = executor.submit(self._work, job)
        self._busy[future] = executor
        return future  # type: ignore[no-any-return]

    def _start(self) -> Any:
        from joblib.externals.loky import ProcessPoolExecutor

        return ProcessPoolExecutor(
            1,
            initializer=_serve,
            initargs=(os.getpid(),),
            env={"OMP_NUM_THREADS": str(self._threads)},
            job_reducers=self._reducers,
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for executor in [*self._idle, *self._busy.values()]:
            executor.shutdown(wait=True, kill_workers=kind is not None)


@contextlib.contextmanager
def _without_ctrl_c() -> Iterator[None]:
    """Let a process that is started here not hear of Ctrl-C, which reaches all of a terminal; it inherits the mask."""
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
    """How an array travels to another process of this machine: a large one as the name of a file."""
    if array.nbytes < LARGE_ARRAY:
        return array.__reduce__()  # type: ignore[return-value]
    path = folder / f"{id(array)}.npy"  # what is shared, and a job, live until the end
    with _saving:
        if not path.exists():
            with (partial := path.with_suffix(".partial")).open("wb") as file:
                np.save(file, array)
            partial.replace(path)
    return _map_array, (str(path),)


def _map_array(path: str) -> np.ndarray:
    return np.load(path, mmap_mode="c", allow_pickle=False)  # type: ignore[no-any-return]  # shared until written to


def _serve(driver: int) -> None:
    """Let a worker process end with its driver, however that ends, and not before it."""
    from joblib.externals.loky import process_executor

    # loky replaces a worker whose memory grew by 300 MB, and warns: it takes what the allocator keeps for the next job
    # for a leak. It has no option for that; should this name change, workers are replaced now and then, no more.
    process_executor._MAX_MEMORY_LEAK_SIZE = sys.maxsize

    def watch() -> None:
        while os.getppid() == driver:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class Ray(Engine):
    """A Ray cluster, as plain tasks: one whose node dies is done again on another.

    (joblib's Ray backend loses all jobs with the first node.) The cluster is the one that RAY_ADDRESS names, else the
    one that runs on this machine; where there is none, one is started on this machine for this command. The source
    travels to its nodes; data, results and what else a checkout holds stay here.

    Parameters
    ----------
    threads : int
        CPUs that a job takes.
    gpus : float or None
        GPUs that a job takes; None for one, where the cluster has any.

    Raises
    ------
    EngineError
        Ray is not installed, or the cluster does not answer.
    """

    tries_again = True

    def __init__(self, threads: int, gpus: float | None) -> None:
        # Ray listens on all interfaces, so who may use it is asked for; the mode has to be the same everywhere
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
            from ray.exceptions import RayError
        except ImportError:
            raise EngineError(
                "--backend ray needs Ray, which is not installed; pip install -r requirements-cluster.txt"
            ) from None
        self.threads = threads
        self.lost = (RayError,)
        self._ray: Any = ray
        self._work: Callable[[Job], Any] | None = None
        self._refs: dict[Future[Result], Any] = {}
        handler = signal.getsignal(signal.SIGTERM)  # which Ray takes for itself
        try:
            self._options: dict[str, Any] = self._connect()
        except (OSError, RuntimeError, ValueError, RayError) as error:
            where = os.environ.get("RAY_ADDRESS", "this machine")
            raise EngineError(
                f"no Ray cluster can be used at {where} ({tracking.in_one_line(error)}); see that it runs, and that "
                "RAY_ADDRESS, RAY_AUTH_MODE and the token are its own"
            ) from None
        finally:
            signal.signal(signal.SIGTERM, handler)
        if gpus is None:
            gpus = float("GPU" in self._ray.cluster_resources())
        self._options |= {"num_cpus": threads, "num_gpus": gpus}

    def _connect(self) -> dict[str, Any]:
        """Connect to the cluster, or start one; return the options of a task that make it find the source."""
        address = os.environ.get("RAY_ADDRESS")
        if address and ":" in address:  # Ray itself would try for minutes
            host, port = address.removeprefix("ray://").rsplit(":", 1)
            create_connection((host, int(port)), timeout=10).close()
        settings = {"logging_level": logging.ERROR}
        try:
            self._ray.init(address=address or "auto", **settings)
        except ConnectionError:
            if address is not None:
                raise
            self._ray.init(address="local", include_dashboard=False, **settings)
            return HERE
        if len(self._ray.nodes()) > 1 and not self.machines_elsewhere():
            return HERE  # nodes that share a machine may share the folder that Ray unpacks into, and empty it
        self._ray.shutdown()  # only now it is known, and only as one connects it can be said, that the source travels
        travels = {"working_dir": str(ROOT), "excludes": STAYS_HERE}
        self._ray.init(address=address or "auto", runtime_env=travels, **settings)
        return {}

    @property
    def room(self) -> int:
        """How many jobs the cluster can do at a time, as it is now."""
        needs = {"CPU": self._options["num_cpus"], "GPU": self._options["num_gpus"]}
        return sum(
            min(int(node["Resources"].get(kind, 0) / need) for kind, need in needs.items() if need)
            for node in self._ray.nodes()
            if node["Alive"]
        )

    def machines_elsewhere(self) -> set[str]:
        """Names of the machines of the cluster, but for this one."""
        return {node["NodeManagerHostname"] for node in self._ray.nodes() if node["Alive"]} - {gethostname()}

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call a function where jobs are done.

        Raises
        ------
        EngineError
            No node has what a job takes.
        """
        needs = f"{self._options['num_cpus']} CPUs and {self._options['num_gpus']:g} GPUs"
        if not self.room:
            print(f"no node of the Ray cluster has {needs} yet; waiting for one, {PATIENCE:.0f} s", file=sys.stderr)
        deadline = time.monotonic() + PATIENCE  # a cluster may grow on demand
        work = self._ray.remote(function).options(**self._options).remote(*arguments)
        while not self._ray.wait([work], timeout=1)[0]:
            if not self.room and time.monotonic() > deadline:
                raise EngineError(f"no node of the Ray cluster has {needs}; lower --threads or --gpus-per-job")
        try:
            return self._ray.get(work)  # type: ignore[no-any-return]
        except self.lost as error:
            cause = getattr(error, "cause", None) or error  # what the function raised there
            if isinstance(cause, ValueError):
                raise cause from None
            raise EngineError(f"the Ray cluster cannot do jobs ({tracking.in_one_line(cause)})") from None

    def share(self, function: Callable[[Any, Job], Result], shared: object, slots: int) -> None:
        """Set what does a job, `function(shared, job)`; `shared` goes to each node once.

        At most `slots` jobs are handed over at once; Ray does as many of them at a time as it has room for.
        """
        self.slots = slots
        task = self._ray.remote(max_retries=ATTEMPTS)(function).options(**self._options)
        try:
            reference = self._ray.put(shared)
        except self.lost as error:
            raise EngineError(f"the Ray cluster cannot hold the images ({tracking.in_one_line(error)})") from None
        self._work = lambda job: task.remote(reference, job)

    def submit(self, job: Job) -> "Future[Result]":
        """Give a job to the cluster, which does it when it has room."""
        assert self._work is not None
        reference = self._work(job)
        future: Future[Result] = reference.future()
        self._refs[future] = reference
        return future

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            left = {future: reference for future, reference in self._refs.items() if not future.done()}
            for reference in left.values():
                self._ray.cancel(reference, force=False)  # its run ends in order
            wait(left, timeout=10)
        self._ray.shutdown()
