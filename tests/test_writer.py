"""Results are written while the next split trains: none is lost, and each failure is that of its own split."""

import threading
import time

import pytest

from experiments.protocol import Writer
from tracking import StoreError, persist
from tracking.store import StoreAwayError


def fail() -> None:
    raise StoreError("no room")


def test_jobs_are_done_in_order_beside_the_caller() -> None:
    done, go_on = [], threading.Event()
    with Writer() as writer:
        writer.submit(lambda: done.append(go_on.wait(10)))
        assert done == []  # the caller goes on
        go_on.set()
        writer.submit(lambda: done.append("second"))
    assert done == [True, "second"]


def test_what_failed_does_not_keep_the_next_from_being_written() -> None:
    done = []
    with pytest.raises(StoreError, match="no room"), Writer() as writer:
        writer.submit(fail)
        writer.submit(lambda: done.append("next"))
    assert done == ["next"]


def test_a_failure_at_the_end_is_raised() -> None:
    with pytest.raises(StoreError, match="no room"), Writer() as writer:
        writer.submit(fail)


def test_an_interrupt_lets_the_last_split_be_written_and_stays_what_is_raised() -> None:
    done = []

    def write() -> None:
        time.sleep(0.2)
        done.append("written")

    with pytest.raises(KeyboardInterrupt), Writer() as writer:
        writer.submit(write)
        raise KeyboardInterrupt
    assert done == ["written"]


def test_an_interrupt_does_not_wait_for_a_store_that_is_away() -> None:
    def away() -> None:
        raise StoreAwayError("nobody answers")

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt), Writer() as writer:
        writer.submit(lambda: persist(away))
        time.sleep(0.1)
        raise KeyboardInterrupt
    assert time.monotonic() - started < 5  # of 300 seconds


def test_afterwards_one_waits_again() -> None:
    answers = [StoreAwayError("not yet"), None]

    def answer() -> str:
        if error := answers.pop(0):
            raise error
        return "there"

    with pytest.raises(KeyboardInterrupt), Writer():
        raise KeyboardInterrupt
    assert persist(answer) == "there"
