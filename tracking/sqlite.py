"""The SQLite file of a result database: its place, whether it can be used, and reading one that is write-protected."""

import atexit
import functools
import os
import shutil
import sqlite3
import tempfile
from pathlib import Path

from tracking import schema
from tracking.errors import StoreError, sqlite_error


def sqlite_path(uri: str) -> Path | None:
    """Return the file of a SQLite URI, else None."""
    name = uri.removeprefix("sqlite:///").partition("?")[0]  # options of the connection, such as ?timeout=60, follow
    return Path(name).resolve() if uri.startswith("sqlite:///") else None


def state_folder(database: Path) -> Path:
    """Return the folder of locks and other local state beside a SQLite database."""
    return database.parent / f"{database.stem}.state"


def check_sqlite(path: Path) -> None:
    """Look at an existing file before MLflow does, which would retry for minutes, or change another version's file."""
    if path.is_dir():
        raise StoreError(f"cannot open the result database {path}: it is a folder; write sqlite:///{path}/mlflow.db")
    try:
        problem = schema.why_unusable(schema.schema_of(readable(path)), f"sqlite:///{path}") if path.exists() else ""
    except (OSError, sqlite3.Error) as error:
        # that itself: no database at all, or a damaged one; its subclasses say what they lack
        remedy = "; name another file, or put a backup in its place" if type(error) is sqlite3.DatabaseError else ""
        raise sqlite_error(error)(f"cannot open the result database {path}: {error}{remedy}") from None
    if problem:
        raise StoreError(problem)


@functools.cache
def readable(database: Path) -> Path:
    """Return a SQLite file, or a copy of it if its folder is write-protected: MLflow needs files beside it to read.

    The copy is a consistent snapshot even while somebody else writes.
    """
    if os.access(database.parent, os.W_OK) or not database.exists():
        return database
    folder = Path(tempfile.mkdtemp(prefix="read-only-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    copy = folder / database.name
    try:
        schema.back_up(database, copy)
    except sqlite3.OperationalError as error:
        if "locked" in str(error):
            raise
        # SQLite would have to make the index of the log here, or roll an interrupted write back. Nobody has the file
        # open, since the index would be there, so a copy of the files is a snapshot, too
        copy.unlink(missing_ok=True)
        for path in (database, *(database.with_name(database.name + log) for log in ("-wal", "-journal"))):
            if path.exists():
                shutil.copyfile(path, folder / path.name)
    return copy


def check_exists(database: Path) -> None:
    """Raise a `StoreError` if the SQLite file is missing."""
    if not database.exists():
        raise StoreError(f"there is no result database at {database}; run a task first, or name one in --tracking-uri")
