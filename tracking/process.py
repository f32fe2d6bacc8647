"""Names of machines and processes, by which the owner of a run is recognised."""

import contextlib
import os
import re
import socket
import sys
from pathlib import Path

import psutil


def host() -> str:
    """Name this machine; a container with process numbers of its own counts as a machine."""
    name = socket.gethostname()
    with contextlib.suppress(OSError):
        namespace = str(Path("/proc/self/ns/pid").readlink())  # Linux: "pid:[4026531836]" outside of containers
        return name if "4026531836" in namespace else f"{name}.{re.sub(r'[^0-9]', '', namespace)}"
    return name


def this_process() -> str:
    """Name this process by machine, number and start (`start_of`)."""
    return f"{host()} {os.getpid()} {start_of(os.getpid())}"


def start_of(pid: int) -> str:
    """Return when a process started: on Linux in ticks since the machine did, such as t123, else in Unix time.

    Ticks do not change if the clock is set. A `psutil.NoSuchProcess` says that the process has ended.
    """
    if sys.platform == "linux":
        try:
            return f"t{Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[19]}"
        except (FileNotFoundError, ProcessLookupError):
            raise psutil.NoSuchProcess(pid) from None
    return f"{psutil.Process(pid).create_time():.0f}"
