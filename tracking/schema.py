"""The schema of a result database, looked at before MLflow opens it: MLflow changes an older one in place, for good."""

import functools
import importlib.metadata
import importlib.util
import re
import shlex
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

# last migration (alembic revision) of each schema -> the versions of MLflow that make it
MADE_BY = {
    "97727af70f4d": "1.30 to 2.2",
    "7f2a7d5fae7d": "2.4 to 2.6",
    "acf3f17fdcc7": "2.8 to 2.12",
    "5b0e9adcef9c": "2.14",
    "4465047574b1": "2.15 to 2.16",
    "f5a4f2784254": "2.17",
    "0584bdc529eb": "2.18 to 2.22",
    "6953534de441": "3.0 to 3.1",
    "770bee3ae1dd": "3.2",
    "1a0cddfcaa16": "3.3",
    "71994744cf8e": "3.4",
    "bf29a5ff90ea": "3.5 to 3.7",
    "1bd49d398cd23": "3.8",
    "d3e4f5a6b7c8": "3.9",
    "1b5f0d9ad7c1": "3.10",
    "c3d6457b6d8a": "3.11",
    "7d34483879f0": "3.12",
    "da6fb0208061": "3.13",
    "b7e4c1a90f23": "3.14",
    "6f8d9c3b2a1e": "3.15",
    "b7e2c1a4d9f3": "3.16",
    "dc11669786a5": "3.17",
}
TABLE = "alembic_version"


@functools.cache
def installed() -> tuple[str, frozenset[str]]:
    """Return the schema that the installed MLflow makes, and all that it knows, without the 2 s of importing it."""
    specification = importlib.util.find_spec("mlflow")
    assert specification is not None and specification.origin is not None
    known, former = set[str](), set[str]()
    for path in (Path(specification.origin).parent / "store" / "db_migrations" / "versions").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        known |= set(re.findall(r"""^revision = ["'](\w+)""", text, re.MULTILINE))
        for line in re.findall(r"^down_revision = (.*)$", text, re.MULTILINE):
            former |= set(re.findall(r"""["'](\w+)""", line))
    (head,) = known - former
    return head, frozenset(known)


def why_unusable(schema: str | None, place: str) -> str:
    """Describe the problem with a database of this schema, and the two ways on; empty if there is none."""
    head, known = installed()
    version = importlib.metadata.version("mlflow")
    if schema == head:
        return ""
    if schema is None:
        return f"{place} is no database of MLflow; name another one"
    if not schema:
        return f"{place} is an empty database; remove it, or name another one"
    if schema not in known:
        return f"a newer version of MLflow than {version} made {place} (schema {schema}); use that version"
    maker = MADE_BY.get(schema, f"of schema {schema}")
    way = f"an upgraded copy (python -m tracking upgrade {shlex.quote(place)} FILE)"
    if "://" in place and not place.startswith("sqlite:"):
        way = f"upgrade it for good, after a backup (python -m mlflow db upgrade {shlex.quote(place)})"
    return (
        f"MLflow {maker} made {place}, and could not read it any more once MLflow {version} opened it: use the former, "
        f"or {way}"
    )


def schema_of(path: Path) -> str | None:
    """Read the schema of a SQLite file without changing it; None if it is not of MLflow, "" if it is empty."""
    # read-only, so that the log of a killed writer is not folded into a file that is only looked at
    with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as connection:
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if TABLE not in tables:
            return None if tables else ""
        rows = connection.execute(f"SELECT version_num FROM {TABLE}").fetchall()
    return str(rows[0][0]) if rows else None


def back_up(database: Path, copy: Path) -> None:
    """Copy a SQLite database as it is at one moment, whoever writes meanwhile; the database is only read."""
    with (
        closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True)) as old,
        closing(sqlite3.connect(copy)) as new,
    ):
        old.backup(new)


def upgrade(source: Path, target: Path | None) -> Path:
    """Upgrade a copy of a SQLite database, or the database itself if `target` is None.

    Returns
    -------
    Path
        The upgraded copy, or the backup of the database as it was.

    Raises
    ------
    FileExistsError
        The copy or the backup is there.
    RuntimeError
        It needs no upgrade, is no database of MLflow, or MLflow failed; the database is as it was.
    """
    found = schema_of(source)
    if found == installed()[0]:
        raise RuntimeError(f"{source} is of the version that is installed; there is nothing to upgrade")
    if found not in installed()[1]:
        raise RuntimeError(why_unusable(found, str(source)))
    copy = target or source.with_name(f"{source.name}.before-{importlib.metadata.version('mlflow')}")
    if copy.exists():
        raise FileExistsError(f"{copy} is there already; name another file")
    work = copy.with_name(f"{copy.name}.partial")
    work.unlink(missing_ok=True)
    try:
        for path in (work,) if target else (work, copy):
            back_up(source, path)
        command = [sys.executable, "-m", "mlflow", "db", "upgrade", f"sqlite:///{work}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(" ".join(done.stderr.split())[-300:])
        work.replace(target or source)
        if not target:
            for log in ("-wal", "-shm"):  # of the database as it was; the backup holds what they did
                source.with_name(source.name + log).unlink(missing_ok=True)
    finally:
        work.unlink(missing_ok=True)
    return copy
