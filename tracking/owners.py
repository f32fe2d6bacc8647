"""Ownership of runs: which process works on a run, and whether it is alive."""

import contextlib
import getpass
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping

import psutil

from tracking.process import host, start_of, this_process
from tracking.store import Store

HEARTBEAT = 30.0  # seconds between two heartbeats
SILENCE = 300.0  # seconds without one after which a process on another machine counts as dead
SAME_START = 60.0  # seconds by which a process's start may appear to move when the clock is set


def signs_of_life(command: str) -> dict[str, str]:
    """Tags of a run that this process begins or takes over for a command."""
    return {"owner": this_process(), "command": command, "heartbeat": f"{time.time():.0f}"}


def user(is_server: bool) -> str:
    """Name the person: the account at the tracking server, which knows it anyway, else the user of this machine."""
    if is_server and (name := os.environ.get("MLFLOW_TRACKING_USERNAME")):
        return name
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may run under a number without a name
        return "unknown"


def is_alive(tags: Mapping[str, str]) -> bool:
    """Whether the owner named in a run's tags is at work: looked up on this machine, else told by its heartbeat."""
    try:
        machine, pid, started = tags["owner"].split()
        heard = float(tags["heartbeat"])
    except (KeyError, ValueError):
        return False  # of a version before runs had owners, or made by hand
    if machine != host():
        return time.time() - heard < SILENCE
    with contextlib.suppress(psutil.NoSuchProcess, ValueError):
        if started.startswith("t"):
            is_same = start_of(int(pid)) == started
        else:  # Unix time, which a change of the clock seems to move
            is_same = abs(psutil.Process(int(pid)).create_time() - float(started)) < SAME_START
        return is_same and is_running(int(pid))  # else the number was reused
    return False


def is_others(tags: Mapping[str, str], command: str) -> bool:
    """Whether a living process of another command works on a run.

    A command gives a split to one of its processes at a time. If the owner is another process of this command, it is
    therefore gone, even if its machine cannot be asked any more.
    """
    return is_alive(tags) and tags["owner"].split()[:2] != [host(), str(os.getpid())] and tags.get("command") != command


def is_running(pid: int) -> bool:
    """Whether this machine has a process of that number which is not a zombie."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    return False


def describe(tags: Mapping[str, str]) -> str:
    """The owner in words."""
    machine, pid, _ = tags["owner"].split()
    return f"process {pid}" if machine == host() else f"process {pid} on {machine}"


def is_elsewhere(tags: Mapping[str, str]) -> bool:
    """Whether the owner is on another machine, so that only its heartbeat tells whether it is alive."""
    return tags["owner"].split()[0] != host()


def wait_for_sign(store: Store, run_id: str) -> None:
    """Wait until a run on another machine has a new heartbeat or has been silent for too long."""
    tags = first = store.client.get_run(run_id).data.tags
    print(f"waiting up to {SILENCE:.0f} s for a sign of life of {describe(first)}", file=sys.stderr)
    while is_alive(tags) and tags["heartbeat"] == first["heartbeat"]:
        time.sleep(1)
        tags = store.client.get_run(run_id).data.tags


@contextlib.contextmanager
def heartbeat(store: Store, run_id: str) -> Iterator[None]:
    """Update a run's heartbeat from a thread while the body works."""
    done = threading.Event()

    def beat() -> None:
        while not done.wait(HEARTBEAT):
            with contextlib.suppress(Exception):  # the store may be away
                store.client.set_tag(run_id, "heartbeat", f"{time.time():.0f}")

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(timeout=5)
