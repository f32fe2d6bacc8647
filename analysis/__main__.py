"""`python -m analysis table TASK...`: the comparison table from the result database alone."""

import sys
from typing import Annotated

import typer

from tracking import EXPERIMENTS, StoreError, open_store

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.callback()
def analysis() -> None:
    """Compare the models of a task by what the result database holds."""


@app.command()
def table(
    tasks: Annotated[list[str], typer.Argument(metavar="TASK...", help=", ".join(EXPERIMENTS))],
    tracking_uri: Annotated[
        str | None, typer.Option(envvar="MLFLOW_TRACKING_URI", help="of the result database; mlruns/ unless given")
    ] = None,
) -> None:
    """Print one row a model: splits done, scores, cost."""
    for task in tasks:
        if task not in EXPERIMENTS:
            raise typer.BadParameter(f"{task!r} is not one of {', '.join(EXPERIMENTS)}", param_hint="TASK")
    from mlflow.exceptions import MlflowException

    from analysis.tables import print_table

    try:
        store = open_store(tracking_uri)
        for task in tasks:
            print_table(store, task)
    except (StoreError, OSError, MlflowException) as error:
        print(f"Error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    app()
