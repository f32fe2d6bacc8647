"""Retrying while the store is away: which errors are temporary, and how long to wait."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from tracking.errors import StoreAwayError, in_one_line

T = TypeVar("T")
PATIENCE = 300.0  # seconds to wait for a store if there is nothing else to do
SHORT = 15.0  # seconds otherwise: enough for a locked database or a server's restart
FIRST_WAIT, LONGEST_WAIT = 0.5, 15.0  # seconds between attempts, doubled after each
LASTING = ("readonly", "read-only", "is full", "unable to open", "malformed", "no such table")  # SQLite's words

# SQLite's and PostgreSQL's errors if two processes enter the same data set at once: MLflow first looks for it, then
# inserts it. A second attempt finds it.
COLLISION = ("UNIQUE constraint failed", "duplicate key value")
COLLISIONS = 5  # retries

_hurry = threading.Event()  # set while no thread may wait


@contextlib.contextmanager
def impatient() -> Iterator[None]:
    """Let `persist` raise errors at once, in every thread."""
    _hurry.set()
    try:
        yield
    finally:
        _hurry.clear()


def passes(error: BaseException) -> bool:
    """Whether an error is temporary: a server that is away or too busy, or a locked database."""
    if isinstance(error, StoreAwayError):
        return True
    from mlflow.exceptions import MlflowException
    from requests import RequestException

    if isinstance(error, RequestException):  # of an upload of files
        status = error.response.status_code if error.response is not None else 503
    elif isinstance(error, MlflowException):
        status = error.get_http_status_code()  # type: ignore[no-untyped-call]  # every MLflow error has one
    else:
        return False
    return (status >= 500 or status == 429) and not any(word in str(error) for word in LASTING)


def persist(action: Callable[[], T], patience: float | None = None) -> T:
    """Repeat an idempotent action while the store is away, for `patience` (default: `PATIENCE`) seconds.

    The action's error is raised if it is not temporary or patience has run out.
    """
    patience = PATIENCE if patience is None else patience
    deadline = time.monotonic() + patience
    wait = FIRST_WAIT
    collisions = 0
    while True:
        try:
            return action()
        except Exception as error:  # MLflow's, those of requests, our own
            if any(words in str(error) for words in COLLISION) and collisions < COLLISIONS:
                collisions += 1
                continue
            if not passes(error) or time.monotonic() + wait > deadline or _hurry.is_set():
                raise
            if wait == FIRST_WAIT:
                reason = in_one_line(error)
                print(f"the result database is away ({reason}); trying again for {patience:.0f} s", file=sys.stderr)
        _hurry.wait(wait)
        wait = min(2 * wait, LONGEST_WAIT)


def attempt(action: Callable[[], object]) -> bool:
    """Try an action once; return False if the store is away."""
    try:
        action()
    except Exception as error:  # MLflow's, those of requests, our own
        if not passes(error):
            raise
        return False
    return True
