"""What the commands of several packages share: naming tasks and the result database, showing differences."""

import difflib
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated

import typer

SCRIPTS = Path(__file__).resolve().parent.parent / "experiments"
SHOWN = 50  # differences that are printed


def script_tasks() -> list[str]:
    """Names of the scripts in `experiments/` that define a TASK, sorted. They are read, not imported."""
    found = (path for path in SCRIPTS.glob("*.py") if re.search(r"^TASK\b", path.read_text("utf-8"), re.MULTILINE))
    return sorted(path.stem for path in found)


def not_one_of(name: str, known: Collection[str]) -> str:
    """Say that a name is not among those known, and which one was probably meant."""
    near = difflib.get_close_matches(name, known, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{name!r} is not one of {', '.join(known)}{hint}"


def scripted_task(name: str) -> str:
    """Return the name of a task that has a script; a `typer.BadParameter` names those that have."""
    if name not in (known := script_tasks()):
        raise typer.BadParameter(not_one_of(name, known))
    return name


def each_once(tasks: Sequence[str] | None) -> list[str]:
    """Return the tasks that were named, each once."""
    return list(dict.fromkeys(tasks or ()))


def scripted_tasks(tasks: Sequence[str]) -> list[str]:
    """Return the tasks that were named, each once and each with a script."""
    return [scripted_task(task) for task in each_once(tasks)]


def print_differences(lines: Sequence[str]) -> None:
    """Print the first of them, and how many more there are."""
    for line in lines[:SHOWN]:
        print(line)
    if (more := len(lines) - SHOWN) > 0:
        print(f"and {more:,} more")


# tasks are named by scripts in experiments/, and those of a result database from elsewhere by their runs
Tasks = Annotated[list[str], typer.Argument(metavar="TASK...", help="such as task1", callback=each_once)]
ScriptedTasks = Annotated[list[str], typer.Argument(metavar="TASK...", help="such as task1", callback=scripted_tasks)]
ScriptedTask = Annotated[str, typer.Argument(metavar="TASK", help="such as task1", callback=scripted_task)]
Uri = Annotated[str | None, typer.Option(envvar="MLFLOW_TRACKING_URI", help="of the result database; default: mlruns/")]
