"""How worker processes of this machine are started.

On Linux they are forked from a server that has imported torch and MLflow: a worker starts in 0.6 s instead of 10 s, and
two of them import once. The server ends with its command.
"""

import contextlib
import multiprocessing
import signal
import sys
import types
from collections.abc import Iterator
from multiprocessing import forkserver, resource_tracker

METHOD = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
# none of our own source, which a worker imports as it is when it starts
PRELOADED = ["torch", "mlflow.tracking", "mlflow.store.tracking.sqlalchemy_store", "scipy.stats", "matplotlib.figure"]


def start_server() -> None:
    """Start the server, unless it runs, and do not wait for its imports."""
    if sys.platform == "linux":
        METHOD.set_forkserver_preload(PRELOADED)
        resource_tracker.ensure_running()  # else the server starts it, which ends the shield
        with without_ctrl_c():
            forkserver.ensure_running()


@contextlib.contextmanager
def without_ctrl_c() -> Iterator[None]:
    """Shield processes that are started here from the terminal's Ctrl-C: they inherit the signal mask."""
    if sys.platform == "win32":  # which has no masks
        yield
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


@contextlib.contextmanager
def without_script() -> Iterator[None]:
    """Keep processes that are started here from running the script: it may have no `__main__` guard."""
    script = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script
