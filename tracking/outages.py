"""Riding out a store that is away for a while: which failures pass, and waiting for them to."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from tracking.store import StoreAwayError, in_one_line

T = TypeVar("T")
PATIENCE = 300.0  # seconds that a store may be away when there is nothing else to do but wait for it
SHORT = 15.0  # seconds, where there is: as long as another process may hold a database, and a server may restart
FIRST_WAIT, LONGEST_WAIT = 0.5, 15.0  # seconds between attempts, doubled after each
LASTING = ("readonly", "read-only", "is full", "unable to open", "malformed", "no such table")  # SQLite's words

# What SQLite and PostgreSQL say where two processes enter the same data set, say, in the same moment: MLflow looks
# whether it is there, and enters it if it is not. A second attempt finds it
COLLISION = ("UNIQUE constraint failed", "duplicate key value")
COLLISIONS = 5  # that are tried again

_hurry = threading.Event()  # set while nobody is to wait


@contextlib.contextmanager
def impatient() -> Iterator[None]:
    """Let `persist`, in whatever thread, raise what went wrong at once."""
    _hurry.set()
    try:
        yield
    finally:
        _hurry.clear()


def passes(error: BaseException) -> bool:
    """Whether what went wrong may be right again by itself: a server that is away or too busy, a locked database."""
    if isinstance(error, StoreAwayError):
        return True
    from mlflow.exceptions import MlflowException
    from requests import RequestException

    if isinstance(error, RequestException):  # of an upload of files
        status = error.response.status_code if error.response is not None else 503
    elif isinstance(error, MlflowException):
        status = error.get_http_status_code()  # type: ignore[no-untyped-call]  # MLflow gives every error one, be it from a server or not
    else:
        return False
    return (status >= 500 or status == 429) and not any(word in str(error) for word in LASTING)


def persist(action: Callable[[], T], patience: float | None = None) -> T:
    """Do what can be done twice without harm, again and again while the store is away.

    Parameters
    ----------
    action : callable
    patience : float, optional
        Seconds to try; `PATIENCE` unless given.

    Raises
    ------
    Exception
        The action's own, where it does not pass, or when patience is at an end.
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
    """Do what can be done later as well; False where it could not be done now, because the store is away."""
    try:
        action()
    except Exception as error:  # MLflow's, those of requests, our own
        if not passes(error):
            raise
        return False
    return True
