"""Which process does a run, and whether it is still alive."""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping

import psutil

from tracking.store import Store, host, this_process

HEARTBEAT = 30.0  # seconds between two signs of life
SILENCE = 300.0  # seconds without one after which a process on another machine is taken for dead
SAME_START = 60.0  # seconds by which the start of one process may seem to move when the clock is set


def signs_of_life(command: str) -> dict[str, str]:
    """The tags of a run that this process begins or takes over, for a command."""
    return {"owner": this_process(), "command": command, "heartbeat": f"{time.time():.0f}"}


def is_alive(tags: Mapping[str, str]) -> bool:
    """Whether the process that a run's tags name is at work: on this machine it is looked up, elsewhere it says so."""
    try:
        machine, pid, started = tags["owner"].split()
        heard = float(tags["heartbeat"])
    except (KeyError, ValueError):
        return False  # killed before runs had owners, or made by hand
    if machine != host():
        return time.time() - heard < SILENCE
    with contextlib.suppress(psutil.NoSuchProcess, ValueError):
        moved = abs(psutil.Process(int(pid)).create_time() - float(started))
        return moved < SAME_START and is_running(int(pid))  # else its number was given to another
    return False


def is_others(tags: Mapping[str, str], command: str) -> bool:
    """Whether a process is at work on a run, and it is neither this one nor one of the same command.

    A command gives a split to one of its processes at a time, so another one that has it is gone, even if its machine
    cannot be asked any more.
    """
    return is_alive(tags) and tags["owner"].split()[:2] != [host(), str(os.getpid())] and tags.get("command") != command


def is_running(pid: int) -> bool:
    """Whether this machine has a process of that number that still does something."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    return False


def describe(tags: Mapping[str, str]) -> str:
    """The owner in words."""
    machine, pid, _ = tags["owner"].split()
    return f"process {pid}" if machine == host() else f"process {pid} on {machine}"


def is_elsewhere(tags: Mapping[str, str]) -> bool:
    """Whether a run that is alive is said to be on another machine: only its heartbeat can tell."""
    return tags["owner"].split()[0] != host()


def wait_for_sign(store: Store, run_id: str) -> None:
    """Wait until a run on another machine has said that it is alive, or has been silent for too long."""
    tags = first = store.client.get_run(run_id).data.tags
    print(f"waiting for a sign of life of {describe(first)}, for {SILENCE:.0f} s at most", file=sys.stderr)
    while is_alive(tags) and tags["heartbeat"] == first["heartbeat"]:
        time.sleep(1)
        tags = store.client.get_run(run_id).data.tags


@contextlib.contextmanager
def heartbeat(store: Store, run_id: str) -> Iterator[None]:
    """Let a run say every 30 s that its process is alive, while the body works."""
    done = threading.Event()

    def beat() -> None:
        while not done.wait(HEARTBEAT):
            with contextlib.suppress(Exception):  # a store that is away hears the next one
                store.client.set_tag(run_id, "heartbeat", f"{time.time():.0f}")

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(timeout=5)
