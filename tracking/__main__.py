"""`python -m tracking`: the MLflow UI on a store, and copying, upgrading and pruning stores."""

import contextlib
import http.client
import os
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tracking import Store, StoreError, check_uri, open_store, schema
from tracking.commands import (
    Uri,
    each_once,
    not_one_of,
    print_differences,
    print_in_any_encoding,
    script_of,
    script_tasks,
)
from tracking.errors import in_one_line, is_mlflow_error
from tracking.keys import TRIALS
from tracking.sqlite import readable, sqlite_path

if TYPE_CHECKING:
    from tracking.pruning import Removable

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.callback()
def tracking() -> None:
    """Manage the result database."""


@app.command()
def ui(
    port: Annotated[int, typer.Option(min=1, max=65535, help="on 127.0.0.1")] = 5000,
    tracking_uri: Uri = None,
) -> None:
    """Serve the MLflow UI on loopback until Ctrl-C, and print the links that open the runs."""
    try:
        store = open_store(tracking_uri)
    except StoreError as error:
        print(f"Error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C, so that the server ends as well
    if store.uri.startswith("http"):
        _print_links(store, store.uri)
        return
    base = f"http://127.0.0.1:{port}"
    uri = f"sqlite:///{readable(store.database)}" if store.database else store.uri
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, "--workers", "1"]
    environment = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **os.environ}
    server = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port)],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        if not _answers(server, f"{base}/health"):
            print(f"Error: no server on {base}; if the port is taken, name another with --port", file=sys.stderr)
            raise typer.Exit(1)
        _print_links(store, base)
        print("Ctrl-C ends the server", flush=True)
        server.wait()
    except KeyboardInterrupt:
        pass
    finally:
        server.terminate()
        server.wait()


def _print_links(store: Store, address: str) -> None:
    for task in store.tasks():  # of experiments that are not deleted
        print(f"{task}  {store.runs_link(task, address)}", flush=True)


def _answers(server: "subprocess.Popen[bytes]", address: str) -> bool:
    """Wait until the server answers; return False if it has ended or 300 s have passed."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and server.poll() is None:
        try:
            urllib.request.urlopen(address, timeout=2).close()
        except (OSError, http.client.HTTPException):
            time.sleep(0.3)
        else:
            return server.poll() is None  # else another program has the port
    return False


@app.command()
def upgrade(
    source: Annotated[str, typer.Argument(metavar="URI", help="a SQLite database that an earlier MLflow made")],
    target: Annotated[Path | None, typer.Argument(metavar="FILE", dir_okay=False, help="upgrade a copy there")] = None,
    in_place: Annotated[bool, typer.Option("--in-place", help="upgrade the database itself, after a backup")] = False,
) -> None:
    """Upgrade a copy of a result database to the version of MLflow that is installed here, or the database itself.

    A copy in the folder of the database finds the files of its runs, also if that folder is moved.
    """
    path = sqlite_path(source)
    if path is None or not path.is_file():
        raise typer.BadParameter(f"{source} names no SQLite file; write sqlite:///path/to/mlflow.db")
    if (target is None) != in_place:
        raise typer.BadParameter("name a FILE for the upgraded copy, or say --in-place")
    try:
        written = schema.upgrade(path, target)
    except (OSError, RuntimeError, sqlite3.Error) as error:
        print(f"Error: {in_one_line(error)}", file=sys.stderr)
        raise typer.Exit(1) from None
    print(f"{path} is upgraded; it is as it was in {written}" if in_place else f"{written} is the upgraded copy")


@app.command()
def copy(
    source: Annotated[str, typer.Option("--from", metavar="URI", help="the result database to read")],
    destination: Annotated[str, typer.Option("--to", metavar="URI", help="the result database to add to")],
    tasks: Annotated[
        list[str] | None,
        typer.Argument(metavar="TASK", help="such as task1; default: all", callback=each_once),
    ] = None,
) -> None:
    """Copy the runs of tasks into another result database with everything they logged, and verify the copies.

    Runs that exist there are skipped, so an interrupted copy can be resumed and the results of several machines merged.
    URI is sqlite:///path/to/mlflow.db, http://host:port or postgresql+psycopg://user:password@host/db.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C
    with _in_one_sentence("the copy is incomplete"):
        differs = _copy(source, destination, tasks or [])
    raise typer.Exit(1 if differs else 0)


def _copy(source: str, destination: str, tasks: list[str]) -> bool:
    """Copy the tasks, and return whether any copy differs from its source."""
    with _option("--from"):
        origin = open_store(source)
    with _option("--to"):
        if check_uri(destination).rstrip("/") == origin.uri.rstrip("/"):
            raise StoreError(f"--from and --to are both {origin.label}")
    there, scripts = origin.tasks(), script_tasks()
    known = sorted({*there, *scripts})
    if unknown := [task for task in tasks if task not in known]:
        raise typer.BadParameter(not_one_of(unknown[0], known))
    chosen = tasks or there or scripts
    if missing := [task for task in chosen if task not in there and origin.experiment_id(task) is None]:
        raise StoreError(f"there are no runs of {', '.join(missing)} in {origin.label}")
    with _option("--to"):
        target = open_store(destination, create=True)
    differences = [line for task in chosen for line in _copy_task(origin, target, task)]
    print_differences(differences)
    return bool(differences)


def _copy_task(source: Store, destination: Store, task: str) -> list[str]:
    """Copy a task with a progress bar, print a summary, and return the differences."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from tracking.copying import copy_task

    time_left = TimeRemainingColumn(compact=True, elapsed_when_finished=True)
    with Progress(TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(), time_left) as bar:
        row = bar.add_task(task, total=None)
        report = copy_task(source, destination, task, lambda done, total: bar.update(row, completed=done, total=total))
    print(f"{task}: {report.summary()}")
    if report.outdated:
        names = "; ".join(report.outdated)
        print(f"{task}: {names} had other splits; run {script_of(task)} to update the summary")
    return report.differences


@app.command()
def prune(
    tasks: Annotated[
        list[str] | None,
        typer.Argument(metavar="TASK", help="such as task1; default: all", callback=each_once),
    ] = None,
    kind: Annotated[
        list[str] | None,
        typer.Option(help="superseded, sample, abandoned or state; repeatable; default: all", callback=each_once),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="remove it without asking")] = False,
    tracking_uri: Uri = None,
) -> None:
    """List the runs that a result database need not keep, then remove them and their files for good.

    Superseded runs, runs on the sample, runs that failed or were interrupted, and state files of finished splits. The
    runs of registered models, those that somebody works on, and everything without a fingerprint of this program stay.
    """
    with _in_one_sentence("not all was removed"):
        _prune(open_store(tracking_uri), tasks or [], kind, yes)


def _prune(store: Store, tasks: list[str], kinds: Sequence[str] | None, yes: bool) -> None:
    from tracking import pruning

    if wrong := [kind for kind in kinds or () if kind not in pruning.KINDS]:
        raise typer.BadParameter(not_one_of(wrong[0], pruning.KINDS), param_hint="--kind")
    there = store.tasks()
    own = [task for task in there if not task.endswith(TRIALS)]  # trials go with their splits
    if unknown := [task for task in tasks if task not in own]:
        raise StoreError(f"there are no runs to prune: {not_one_of(unknown[0], own)}" if own else
                         f"there are no runs of {unknown[0]} in {store.label}")  # fmt: skip
    found = pruning.find(store, tasks or own, kinds or list(pruning.KINDS))
    if not found:
        print(f"there is nothing to remove from {store.label}")
        return
    _print_removable("can be removed", found, pruning.KINDS)
    if not yes and not sys.stdin.isatty():
        print("nothing was removed; --yes removes it")
    elif yes or typer.confirm("Remove all this for good?"):
        removed = pruning.remove(store, found, tasks or own)
        _print_removable("removed", removed, pruning.KINDS)
        if store.uri.startswith("http"):
            print("their rows stay, marked as deleted, until `mlflow gc` is run on the server")
    else:
        print("nothing was removed")


def _print_removable(what: str, found: "Sequence[Removable]", kinds: Mapping[str, str]) -> None:
    """Print the number and size of the runs found, by kind and in total."""
    for kind, meaning in kinds.items():
        if of_kind := [each for each in found if each.kind == kind]:
            print(f"{kind:10}  {_amount(of_kind)}  {meaning}")
    print(f"{what}: {' '.join(_amount(found).split())}")


def _amount(found: "Sequence[Removable]") -> str:
    runs = sum(each.run is not None for each in found)
    size = sum(each.size for each in found)
    return f"{runs:6,} runs  {len(found) - runs:6,} state files  {size:15,} bytes"


@contextlib.contextmanager
def _in_one_sentence(incomplete: str) -> Iterator[None]:
    """Exit with one sentence on Ctrl-C, an error of the store, a full disk, or a server that goes away.

    `incomplete` says how the last two leave the work, which repeating the command finishes.
    """
    try:
        yield
    except KeyboardInterrupt:
        print("Error: interrupted; repeat the command to go on", file=sys.stderr)
        raise typer.Exit(130) from None
    except StoreError as error:
        print(f"Error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    except Exception as error:
        if not isinstance(error, OSError) and not is_mlflow_error(error):
            raise
        reason = in_one_line(error)
        print(f"Error: {incomplete} ({reason}); fix this and repeat the command to go on", file=sys.stderr)
        raise typer.Exit(1) from None


@contextlib.contextmanager
def _option(name: str) -> Iterator[None]:
    """Name this option instead of --tracking-uri in errors."""
    try:
        yield
    except StoreError as error:
        raise StoreError(str(error).replace("--tracking-uri", name)) from None


if __name__ == "__main__":
    print_in_any_encoding()
    app()
