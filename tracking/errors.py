"""Errors of the result database, and how they are told: in one line, without passwords."""

import re


class StoreError(Exception):
    """The result database cannot be used; the message is one sentence for the user."""


class UnknownTaskError(StoreError):
    """A task has neither a script nor an experiment; the message lists those that have."""


class StoreAwayError(StoreError):
    """The server does not answer or the database is locked; both may be temporary."""


def without_password(text: str) -> str:
    """Hide the passwords of URIs in a text."""
    return re.sub(
        r"(://[^:/@\s]*):\S*@|([?&]password=)[^&\s]*", lambda m: f"{m[1]}:***@" if m[1] else f"{m[2]}***", text
    )


def in_one_line(error: BaseException) -> str:
    """Return the text of an error without line breaks and passwords, at most 300 characters."""
    return without_password(" ".join(str(error).split()))[:300] or error.__class__.__name__


def is_mlflow_error(error: BaseException) -> bool:
    """Whether MLflow raised it, told by its module: importing MLflow takes seconds."""
    return type(error).__module__.startswith("mlflow")


def sqlite_error(error: Exception) -> type[StoreError]:
    """Return the class for an error of SQLite; a lock is temporary."""
    return StoreAwayError if "locked" in str(error) else StoreError


def root_cause(error: BaseException) -> str:
    """Return the text of the error that caused an error of requests, without the objects that urllib3 names."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return in_one_line(error)
