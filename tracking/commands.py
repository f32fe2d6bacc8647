"""What the commands of several packages have in common: naming tasks and the result database, showing differences."""

import difflib
from collections.abc import Collection, Sequence
from typing import Annotated

import typer

from tracking.keys import EXPERIMENTS

SHOWN = 50  # differences that are printed


def not_one_of(name: str, known: Collection[str]) -> str:
    """Say that a name is none of those known, and which one was probably meant."""
    near = difflib.get_close_matches(name, known, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{name!r} is not one of {', '.join(known)}{hint}"


def known_tasks(tasks: Sequence[str] | None) -> list[str]:
    """Return the tasks that were named, each once.

    Raises
    ------
    typer.BadParameter
        There is no such task.
    """
    for task in tasks or ():
        if task not in EXPERIMENTS:
            raise typer.BadParameter(not_one_of(task, EXPERIMENTS))
    return list(dict.fromkeys(tasks or ()))


def print_differences(lines: Sequence[str]) -> None:
    """Print the first of them, and how many more there are."""
    for line in lines[:SHOWN]:
        print(line)
    if (more := len(lines) - SHOWN) > 0:
        print(f"and {more:,} more")


Tasks = Annotated[list[str], typer.Argument(metavar="TASK...", help=", ".join(EXPERIMENTS), callback=known_tasks)]
Uri = Annotated[
    str | None, typer.Option(envvar="MLFLOW_TRACKING_URI", help="of the result database; mlruns/ unless given")
]
