"""`python -m experiments verify`: whether the numbers of the result database follow from the files beside it."""

import importlib
import sys
from pathlib import Path
from typing import Annotated

import typer

from datasets import DatasetError
from experiments.config import Task, TrainingConfig
from tracking import StoreError
from tracking.commands import Tasks, Uri, print_differences
from tracking.store import in_one_line

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


DataDir = Annotated[
    Path | None,
    typer.Option(envvar="DATA_DIR", exists=True, file_okay=False, help="see the task scripts; only read"),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...; auto takes a GPU where there is one")]


@app.callback()
def experiments() -> None:
    """Use what the task scripts left in the result database."""


@app.command()
def verify(
    tasks: Tasks,
    sample_splits: Annotated[
        int | None, typer.Option(min=1, metavar="K", help="a quick look: only K runs of a task, spread over its models")
    ] = None,
    data_dir: DataDir = None,
    device: Device = "auto",
    tracking_uri: Uri = None,
) -> None:
    """Derive every number of the finished runs again, from checkpoints, data and files, and print what differs.

    The exit code is 1 where anything does.
    """
    device = _usable(device)
    from mlflow.exceptions import MlflowException

    from experiments.verify import verify as verify_task

    failed = False
    for name in tasks:
        task: Task = importlib.import_module(f"experiments.{name}").TASK
        try:
            report = verify_task(task, device, data_dir, tracking_uri, sample_splits)
        except (StoreError, DatasetError, OSError, MlflowException) as error:
            print(f"Error: {in_one_line(error)}", file=sys.stderr)
            failed = True
            continue
        print_differences(report.differences)
        print(report.summary())
        failed |= bool(report.differences)
    raise typer.Exit(1 if failed else 0)


def _usable(device: str) -> str:
    from experiments import hardware  # it brings torch, which --help need not wait for

    try:
        return hardware.resolve(TrainingConfig(device=device)).device
    except hardware.UnusableDeviceError as error:
        raise typer.BadParameter(str(error), param_hint="--device") from None


if __name__ == "__main__":
    app()
