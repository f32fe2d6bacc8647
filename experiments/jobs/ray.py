"""Jobs on a Ray cluster."""

import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path
from socket import create_connection, gethostname
from typing import Any, TypeVar

import tracking
from experiments.jobs.engine import ATTEMPTS, Engine, EngineError
from experiments.jobs.job import Job, JobContext, Result
from experiments.jobs.worker import do_job

T = TypeVar("T")
ROOT = Path(__file__).resolve().parent.parent.parent
PATIENCE = 300.0  # seconds to wait for a node with the resources of a job
STAYS_HERE = [  # on the way to a cluster; patterns as in .gitignore
    "/data", "/mlruns", "/docs", "/deploy", "/tests", "/benchmarks", ".git", ".venv", ".*_cache", ".hypothesis",
    "__pycache__", "*.npy", "*.npz", "*.pt", "*.db", "*.ipynb", "*.state", "*.whl", "*.zip",
]  # fmt: skip
HERE = {"runtime_env": {"env_vars": {"PYTHONPATH": str(ROOT)}}}  # if all nodes are on this machine


class Ray(Engine):
    """A Ray cluster, as plain tasks: one whose node dies is done again on another.

    (joblib's Ray backend loses all jobs with the first node.) The cluster is the one that RAY_ADDRESS names, else the
    one that runs on this machine; if there is none, one is started here for this command. The source travels to its
    nodes; data and results stay here. A job takes `gpus`; 1 if the cluster has any, unless given.

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

    def room(self) -> int:
        """How many of the jobs that are handed over the cluster can do at a time, as it is now."""
        return min(self._room(), self.slots)

    def _room(self) -> int:
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
        """Call a function on a node of the cluster.

        Raises
        ------
        EngineError
            No node has the resources of a job.
        """
        needs = f"{self._options['num_cpus']} CPUs and {self._options['num_gpus']:g} GPUs"
        if not self._room():
            print(f"no node of the Ray cluster has {needs} yet; waiting for one, {PATIENCE:.0f} s", file=sys.stderr)
        deadline = time.monotonic() + PATIENCE  # a cluster may grow on demand
        work = self._ray.remote(function).options(**self._options).remote(*arguments)
        while not self._ray.wait([work], timeout=1)[0]:
            if not self._room() and time.monotonic() > deadline:
                raise EngineError(f"no node of the Ray cluster has {needs}; lower --threads or --gpus-per-job")
        try:
            return self._ray.get(work)  # type: ignore[no-any-return]
        except self.lost as error:
            cause = getattr(error, "cause", None) or error  # raised by the function there
            if isinstance(cause, ValueError):
                raise cause from None
            raise EngineError(f"the Ray cluster cannot do jobs ({tracking.in_one_line(cause)})") from None

    def share(self, context: JobContext, slots: int) -> None:
        """Send the context of all jobs to each node, once.

        At most `slots` jobs are handed over at once; Ray does as many of them at a time as it has room for.
        """
        self.slots = slots
        task = self._ray.remote(max_retries=ATTEMPTS)(do_job).options(**self._options)
        try:
            reference = self._ray.put(context)
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

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            left = {future: reference for future, reference in self._refs.items() if not future.done()}
            for reference in left.values():
                self._ray.cancel(reference, force=False)  # its run ends in order
            wait(left, timeout=10)
        self._ray.shutdown()
