"""`python -m datasets info|download|audit|arrange`: describe, download, audit and arrange images."""

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from datasets import DatasetError, Source, find, load
from datasets.account import account, count_classes, notes
from datasets.arrange import arrange as by_class
from datasets.audit import audit as examine
from datasets.audit import count_table, draw_contact_sheet, to_text
from datasets.folder import some
from datasets.images import one_sentence
from datasets.names import readable_name
from tracking.commands import print_in_any_encoding, script_tasks

TEXTS = (".txt", ".md", ".json", "")  # suffixes of an audit's text
app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


def _check(tasks: list[str], neither: str = "not") -> None:
    known = script_tasks()
    for task in tasks:
        if task not in known:
            raise typer.BadParameter(f"{readable_name(task)!r} is {neither} one of {', '.join(known)}")


def _check_tasks(tasks: list[str]) -> list[str]:
    _check(tasks)
    return tasks


def _check_or_folders(tasks: list[str]) -> list[str]:
    _check([task for task in tasks if not Path(task).is_dir()], "neither a folder nor")
    return tasks


def _check_task_or_folder(task: str) -> str:
    return _check_or_folders([task])[0]


def _source(task: str) -> Source:
    from experiments import task as tasks  # late: the scripts of the tasks import this package
    from experiments.folder import make_task

    return make_task(Path(task)).data if Path(task).is_dir() else tasks.find(task).data


TasksOrFolders = Annotated[
    list[str],
    typer.Argument(metavar="TASK|DIR...", help="such as task1, or a folder", callback=_check_or_folders),
]
Tasks = Annotated[list[str], typer.Argument(metavar="TASK...", help="such as task1", callback=_check_tasks)]
DataDir = Annotated[Path | None, typer.Option(envvar="DATA_DIR", help="see the task scripts; only read")]
Sample = Annotated[bool, typer.Option("--sample", help="generated images instead of real data")]


@app.command()
def info(tasks: TasksOrFolders, data_dir: DataDir = None, sample: Sample = False) -> None:
    """Print classes, counts, digest and account of the images of a task, or of a folder: each file is used or named."""
    console = Console(highlight=False)
    for task in tasks:
        data = load(_source(task), None if Path(task).is_dir() else data_dir, sample)
        _, height, width, channels = data.images.shape
        console.print(f"{task}: {data.name}, {height}x{width}x{channels}", markup=False, soft_wrap=True)
        console.print(count_table(count_classes(data)))
        for line in [*account(data, examples=sys.maxsize), *notes(data)]:
            console.print(line, markup=False, soft_wrap=True)
        console.print(f"digest {data.digest}\n", soft_wrap=True)


@app.command()
def arrange(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", exists=True, file_okay=False, help="it is only read")],
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="a new folder for the copies")],
    labels: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="a CSV file of pictures and classes; default: by names"),
    ] = None,
) -> None:
    """Copy pictures that lie in one folder into a folder for each class, for `experiments/folder.py TARGET`."""
    with one_sentence():
        counts, left, missing = by_class(folder, target, labels)
    for label, count in counts.items():
        print(f"{count:7,} {readable_name(label)}")
    if left:
        print(f"not copied: {', '.join(readable_name(path.name) for path in left)}")
    if missing:
        print(f"{len(missing):,} in the table and not in the folder: {some([*map(readable_name, missing)])}")
    print(f"python experiments/folder.py {shlex.quote(readable_name(str(target)))}")


@app.command()
def download(tasks: Tasks) -> None:
    """Download a task's published images into data/, unless they exist."""
    for task in tasks:
        print(f"{task}: {find(_source(task))}")


@app.command()
def audit(
    task: Annotated[
        str, typer.Argument(metavar="TASK|DIR", help="such as task1, or a folder", callback=_check_task_or_folder)
    ],
    data_dir: DataDir = None,
    sample: Sample = False,
    form: Annotated[
        Literal["text", "json"] | None, typer.Option("--format", help="default: by the suffix of --out, else text")
    ] = None,
    out: Annotated[Path | None, typer.Option(dir_okay=False, help="write to this file")] = None,
    contact_sheet: Annotated[
        Path | None, typer.Option(dir_okay=False, help="draw near duplicates side by side into this PNG file")
    ] = None,
) -> None:
    """Report broken files, duplicate pictures, pictures with two labels, and test images that are in training."""
    folder = Path(task) if Path(task).is_dir() else data_dir
    for path, suffixes in ((out, TEXTS), (contact_sheet, (".png",))):
        if path and path.suffix.lower() not in suffixes:
            raise typer.BadParameter(f"{path.name!r} ends in none of {', '.join(filter(None, suffixes))}")
        if path and folder and path.resolve().is_relative_to(folder.resolve()):
            raise typer.BadParameter(f"{path} lies in the folder of the data, which is only read; name another place")
    report, data = examine(task, _source(task), None if Path(task).is_dir() else data_dir, sample)
    as_json = form == "json" or (form is None and out is not None and out.suffix.lower() == ".json")
    text = json.dumps(report, indent=2) + "\n" if as_json else to_text(report)
    if out is None:
        print(text, end="")
    with one_sentence():
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(text, encoding="utf-8")
            print(out)
        if contact_sheet is not None:
            draw_contact_sheet(report, data, contact_sheet)
            print(f"contact sheet: {contact_sheet}", file=sys.stderr)


if __name__ == "__main__":
    print_in_any_encoding()
    try:
        app()
    except DatasetError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(1)
