"""`python -m datasets info|download TASK...`: what the images of a task are, and fetching them ahead of a run."""

import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from datasets import SOURCES, DatasetError, find, load

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


def _check(tasks: list[str]) -> list[str]:
    for task in tasks:
        if task not in SOURCES:
            raise typer.BadParameter(f"{task!r} is not one of {', '.join(SOURCES)}")
    return tasks


Tasks = Annotated[list[str], typer.Argument(metavar="TASK...", help=", ".join(SOURCES), callback=_check)]


@app.command()
def info(
    tasks: Tasks,
    data_dir: Annotated[Path | None, typer.Option(envvar="DATA_DIR", help="see the task scripts; only read")] = None,
    sample: Annotated[bool, typer.Option("--sample", help="generated images instead of real data")] = False,
) -> None:
    """Print classes, counts, sizes and digest of a task's images."""
    console = Console(highlight=False)
    for task in tasks:
        data = load(task, data_dir, sample)
        _, height, width, channels = data.images.shape
        console.print(f"{task}: {data.name}, {height}x{width}x{channels}", markup=False, soft_wrap=True)
        table = Table("class", box=box.SIMPLE_HEAD)
        parts = {"train": data.labels[: data.n_pool], "test": data.labels[data.n_pool :]}
        for part in parts:
            table.add_column(part, justify="right")
        for label, name in enumerate(data.classes):
            table.add_row(escape(name), *(f"{np.sum(labels == label):,}" for labels in parts.values()))
        table.add_section()
        table.add_row("all", *(f"{len(labels):,}" for labels in parts.values()))
        console.print(table)
        for reason in data.skipped:
            console.print(f"left out: {reason}", markup=False, soft_wrap=True)
        console.print(f"digest {data.digest}\n", soft_wrap=True)


@app.command()
def download(tasks: Tasks) -> None:
    """Fetch a task's published images into data/, unless they are there."""
    for task in tasks:
        print(f"{task}: {find(task)}")


if __name__ == "__main__":
    try:
        app()
    except DatasetError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(1)
