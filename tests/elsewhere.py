"""Shows this program another system, as far as it asks: Windows or macOS, on Linux.

As `sitecustomize` in a folder of PYTHONPATH it is loaded by each process, also by those that others start. In the
packages of this program `sys.platform` is then PLATFORM, and names of `os` and `signal` that are missing there are
missing. Other packages see the real system, which they are made for.
"""

import builtins
import os
import signal
import sys
import types
from typing import Any

OURS = {"__main__", "analysis", "datasets", "experiments", "models", "tracking"}
PLATFORM = os.environ.get("PLATFORM", "")
ON_LINUX = ("sched_getaffinity", "sched_setaffinity", "posix_fadvise", "posix_fallocate", "memfd_create", "sendfile")
ON_POSIX = ("fork", "forkpty", "setsid", "getpgid", "killpg", "getuid", "geteuid", "mkfifo", "getloadavg", "nice")
SIGNALS = ("SIGHUP", "SIGKILL", "SIGUSR1", "SIGCHLD", "SIGALRM", "alarm", "pthread_sigmask", "setitimer", "pause")
MISSING = {
    "darwin": {os: ON_LINUX, signal: ("sigtimedwait",)},
    "win32": {os: (*ON_LINUX, *ON_POSIX, "sysconf", "statvfs"), signal: SIGNALS},
}


class Elsewhere(types.ModuleType):
    """A module of another system."""

    def __init__(self, real: types.ModuleType, missing: tuple[str, ...]) -> None:
        super().__init__(real.__name__)
        self._real, self._missing = real, missing

    def __getattr__(self, name: str) -> Any:
        if name in self._missing:
            raise AttributeError(f"module {self.__name__!r} of {PLATFORM} has no attribute {name!r}")
        return getattr(self._real, name)


if PLATFORM:
    there = {module.__name__: Elsewhere(module, missing) for module, missing in MISSING[PLATFORM].items()}
    there["sys"] = Elsewhere(sys, ())
    vars(there["sys"])["platform"] = PLATFORM
    import_any = builtins.__import__

    def import_one(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
        """Import a module, ours one of another system."""
        asks = str((globals or {}).get("__name__")).partition(".")[0]
        if name in there and asks in OURS:
            return there[name]
        return import_any(name, globals, locals, fromlist, level)

    builtins.__import__ = import_one
