"""Commands in processes of their own, which are forked from one that has imported torch and MLflow for seconds."""

import atexit
import contextlib
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from multiprocessing import forkserver
from pathlib import Path

from experiments.jobs import processes

ROOT = Path(__file__).resolve().parent.parent
processes.PRELOADED += [
    "torch.export",
    "torch._dynamo",
    "mlflow.pytorch",
    "mlflow.store.db.utils",
    "sklearn.linear_model",
]
OURS = {"analysis", "benchmarks", "datasets", "experiments", "models", "tracking"}


class StartedCommand:
    """A script of the repository, or a module after `-m`, in a process; its interface is that of `subprocess.Popen`."""

    def __init__(
        self, arguments: tuple[str, ...], cwd: Path, environment: Mapping[str, str], start_new_session: bool = False
    ) -> None:
        self.arguments = arguments
        self._folder = tempfile.TemporaryDirectory()
        self._streams = [Path(self._folder.name) / name for name in ("out", "err")]
        settings = (arguments, str(cwd), dict(environment), [str(path) for path in self._streams], start_new_session)
        process = processes.METHOD.Process(target=_execute, args=settings)
        processes.start_server()
        with processes.without_script():
            process.start()
        self._process = process
        assert process.pid is not None
        self.pid: int = process.pid

    @property
    def returncode(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """Return the exit code; None while it runs."""
        return self.returncode

    def send_signal(self, signum: int) -> None:
        """Send a signal."""
        os.kill(self.pid, signum)

    def kill(self) -> None:
        """Send SIGKILL."""
        self._process.kill()

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; return the exit code."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self.arguments, timeout or 0)
        return self._process.exitcode

    def communicate(self, timeout: float) -> tuple[str, str]:
        """Wait for its end; return what it wrote to standard output and standard error."""
        self.wait(timeout)
        out, err = (path.read_text() for path in self._streams)
        return out, err


def _execute(
    arguments: tuple[str, ...], cwd: str, environment: dict[str, str], streams: list[str], new_session: bool
) -> None:
    """Execute a command as `__main__` in this new process."""
    if new_session:
        os.setsid()
    for number, name in enumerate(streams, 1):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    for name in [name for name in sys.modules if name.partition(".")[0] in OURS]:
        del sys.modules[name]  # a command imports its own, perhaps from a copy of the repository
    if "DISTURB" in environment:
        forkserver._forkserver.__init__()  # type: ignore[misc]  # its workers come from a server that is disturbed, too
        from tests import disturb

        disturb.install()
    try:
        if arguments[0] == "-m":
            sys.argv = list(arguments[1:])
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = list(arguments)
            sys.path[:] = [str(Path(arguments[0]).parent), *(path for path in sys.path if path != str(ROOT))]
            runpy.run_path(arguments[0], run_name="__main__")
    finally:
        with contextlib.suppress(Exception):
            atexit._run_exitfuncs()  # a forked process ends without
