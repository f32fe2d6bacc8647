"""`python -m experiments`: verify the numbers of the result database, and predict with the best model in it."""

import csv
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from datasets import DatasetError
from experiments.task import TaskError
from tracking import SettingError, StoreError, TrainingConfig, UnknownTaskError, in_one_line, open_store
from tracking.commands import Tasks, Uri, not_one_of, print_differences, print_in_any_encoding, script_tasks

if TYPE_CHECKING:
    from experiments.champion.predict import Predictor

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


DataDir = Annotated[
    Path | None,
    typer.Option(envvar="DATA_DIR", exists=True, file_okay=False, help="see the task scripts; only read"),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ... or mps; auto takes a GPU if there is one")]


@app.callback()
def experiments() -> None:
    """Use the results of the task scripts."""


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
    """Derive every number of the finished runs again, from checkpoints, data and files, and print the differences.

    The exit code is 1 if there are any.
    """
    device = _usable(device)
    from mlflow.exceptions import MlflowException

    from experiments.verification import verify as verify_task
    from experiments.verification.stored_task import find_stored

    failed = False
    for name in tasks:
        try:
            task = find_stored(name, data_dir, tracking_uri)
            report = verify_task(task, device, data_dir, tracking_uri, sample_splits)
        except UnknownTaskError as error:
            raise typer.BadParameter(str(error)) from None
        except (StoreError, DatasetError, TaskError, OSError, MlflowException) as error:
            print(f"Error: {in_one_line(error)}", file=sys.stderr)
            failed = True
            continue
        print_differences(report.differences)
        print(report.summary())
        failed |= bool(report.differences)
    raise typer.Exit(1 if failed else 0)


@app.command()
def predict(
    task: Annotated[str, typer.Argument(metavar="TASK", help="such as task1")],
    photos: Annotated[list[Path], typer.Argument(metavar="PHOTO...", help="of any format and size")],
    out: Annotated[Path | None, typer.Option(dir_okay=False, help="write a CSV file, too")] = None,
    explain: Annotated[
        Path | None,
        typer.Option(
            file_okay=False,
            metavar="DIR",
            help="write what speaks for the class: Grad-CAM overlays of the photos, for convolutional networks",
        ),
    ] = None,
    tracking_uri: Uri = None,
) -> None:
    """Classify photos by the best model of a task, and print its probabilities.

    The exit code is 1 if a photo cannot be read.
    """
    if out and out.suffix.lower() != ".csv":
        raise typer.BadParameter(f"{out.name!r} does not end in .csv", param_hint="--out")
    from mlflow.exceptions import MlflowException

    from experiments.champion.predict import Predictor

    try:
        store = open_store(tracking_uri)
        if task not in (known := sorted({*script_tasks(), *store.tasks()})):
            raise typer.BadParameter(not_one_of(task, known))
        predictor = Predictor.load(store, task)
        unreadable = _print_predictions(predictor, photos, out)
        if explain:
            _explain(predictor, photos, explain)
    except (StoreError, OSError, MlflowException) as error:
        print(f"Error: {in_one_line(error)}", file=sys.stderr)
        raise typer.Exit(1) from None
    raise typer.Exit(1 if unreadable else 0)


def _print_predictions(predictor: "Predictor", photos: list[Path], out: Path | None) -> int:
    """Print and write the predictions; return how many photos cannot be read."""
    rows, unreadable = [], 0
    print(predictor.origin)
    if predictor.is_of_sample:
        print("! it was trained on generated images and knows nothing of real ones", file=sys.stderr)
    from datasets.names import readable_name  # late, as it brings NumPy and Pillow

    width = max(len(str(path)) for path in photos)
    for path, name, probability in predictor.predict(photos):
        if math.isnan(probability):
            print(f"Error: {name}", file=sys.stderr)
            unreadable += 1
            continue
        photo = readable_name(str(path))
        rows.append((photo, name, probability, predictor.run_id))
        print(f"{photo:{width}}  {probability:6.1%}  {name}", flush=True)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("photo", "class", "probability", "run_id"))
            writer.writerows(rows)
    return unreadable


def _explain(predictor: "Predictor", photos: list[Path], folder: Path) -> None:
    from experiments.champion.explain import with_feature_map, write_overlays

    explained = with_feature_map(predictor.program)
    if explained is None:
        model = predictor.model or "the model"
        print(f"! {model} is left out of --explain: Grad-CAM is for convolutional networks", file=sys.stderr)
        return
    written = write_overlays(predictor, explained, photos, folder)
    print(f"Grad-CAM overlays of {written} {'photo' if written == 1 else 'photos'} in {folder}")


def _usable(device: str) -> str:
    from experiments.training import hardware  # it brings torch, which --help need not wait for

    try:
        return hardware.resolve(TrainingConfig(device=device)).device
    except SettingError as error:
        raise typer.BadParameter(error.reason, param_hint=error.option) from None


if __name__ == "__main__":
    print_in_any_encoding()
    app()
