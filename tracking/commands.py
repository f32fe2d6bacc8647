"""Arguments and output that the commands of several packages share."""

import difflib
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated

import typer

SCRIPTS = Path(__file__).resolve().parent.parent / "experiments"
SHOWN = 50  # differences that are printed


def script_tasks() -> list[str]:
    """Sorted names of the scripts in `experiments/` that define a TASK. The files are read, not imported."""
    found = (
        path
        for path in SCRIPTS.glob("*.py")
        if re.search(r"^TASK\s*[:=]", path.read_text("utf-8", "replace"), re.MULTILINE)
    )
    return sorted(path.stem for path in found)


def not_one_of(name: str, known: Collection[str]) -> str:
    """Return a sentence for an unknown name that lists the known ones and suggests the nearest."""
    near = difflib.get_close_matches(name, known, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{name!r} is not one of {', '.join(known)}{hint}"


def scripted_task(name: str) -> str:
    """Return the name of a task that has a script, else raise a `typer.BadParameter`."""
    if name not in (known := script_tasks()):
        raise typer.BadParameter(not_one_of(name, known))
    return name


def each_once(tasks: Sequence[str] | None) -> list[str]:
    """Remove repeated names."""
    return list(dict.fromkeys(tasks or ()))


def scripted_tasks(tasks: Sequence[str]) -> list[str]:
    """Remove repeated names, and require a script for each."""
    return [scripted_task(task) for task in each_once(tasks)]


def print_differences(lines: Sequence[str]) -> None:
    """Print the first `SHOWN` lines and the number of the others."""
    for line in lines[:SHOWN]:
        print(line)
    if (more := len(lines) - SHOWN) > 0:
        print(f"and {more:,} more")


# Tasks are named by the scripts in experiments/, or by the runs of a result database that was made elsewhere
Tasks = Annotated[list[str], typer.Argument(metavar="TASK...", help="such as task1", callback=each_once)]
ScriptedTasks = Annotated[list[str], typer.Argument(metavar="TASK...", help="such as task1", callback=scripted_tasks)]
ScriptedTask = Annotated[str, typer.Argument(metavar="TASK", help="such as task1", callback=scripted_task)]
Uri = Annotated[str | None, typer.Option(envvar="MLFLOW_TRACKING_URI", help="of the result database; default: mlruns/")]
