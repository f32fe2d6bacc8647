"""Arguments and output that the commands of several packages share."""

import codecs
import difflib
import io
import re
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated

import typer

SCRIPTS = Path(__file__).resolve().parent.parent / "experiments"
PLAIN = str.maketrans({  # for terminals and pipes that cannot show these signs
    "±": "+-", "–": "-", "−": "-", "…": "...", "†": "+", "×": "x", "─": "-", "━": "-", "╸": "-", "╺": "-", "’": "'",
    "“": '"', "”": '"', "≥": ">=", "≤": "<=",
})  # fmt: skip
SHOWN = 50  # differences that are printed


def print_in_any_encoding() -> None:
    """Print plain signs in place of those that the encoding of the output lacks, as on Windows."""

    def plain(error: UnicodeError) -> tuple[str, int]:
        assert isinstance(error, UnicodeEncodeError)
        text = error.object[error.start : error.end].translate(PLAIN)
        return text.encode(error.encoding, "backslashreplace").decode(error.encoding), error.end

    codecs.register_error("plain", plain)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="plain")


def script_tasks() -> list[str]:
    """Sorted names of the scripts in `experiments/` that define a TASK. The files are read, not imported."""
    found = (
        path
        for path in SCRIPTS.glob("*.py")
        if re.search(r"^TASK\s*[:=]", path.read_text("utf-8", "replace"), re.MULTILINE)
    )
    return sorted(path.stem for path in found)


def script_of(task: str) -> str:
    """Return the command that runs a task: its own script, or that of folders with the folder."""
    return f"experiments/{task}.py" if task in script_tasks() else "experiments/folder.py DIR"


def not_one_of(name: str, known: Collection[str]) -> str:
    """Return a sentence for an unknown name that lists the known ones and suggests the nearest."""
    near = difflib.get_close_matches(name, known, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{name!r} is not one of {', '.join(known)}{hint}"


def each_once(tasks: Sequence[str] | None) -> list[str]:
    """Remove repeated names."""
    return list(dict.fromkeys(tasks or ()))


def print_differences(lines: Sequence[str]) -> None:
    """Print the first `SHOWN` lines and the number of the others."""
    for line in lines[:SHOWN]:
        print(line)
    if (more := len(lines) - SHOWN) > 0:
        print(f"and {more:,} more")


# Tasks are named by the scripts in experiments/, or by the runs of a result database that was made elsewhere
Tasks = Annotated[list[str], typer.Argument(metavar="TASK...", help="such as task1", callback=each_once)]
Uri = Annotated[str | None, typer.Option(envvar="MLFLOW_TRACKING_URI", help="of the result database; default: mlruns/")]
