"""`python -m analysis`: tables, tests, figures, the report and the published folder, from the result database alone."""

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from tracking import StoreError, UnknownTaskError, check_uri
from tracking.commands import Tasks, Uri, print_in_any_encoding
from tracking.store import without_password

if TYPE_CHECKING:
    import pandas as pd

    from analysis.comparison import Evidence
    from analysis.formats import Format
    from analysis.tables import ResultTable

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)

Metric = Annotated[
    str | None, typer.Option(help="test/accuracy unless given; also test/f1_macro, best_val/accuracy, ...")
]
Group = Annotated[str | None, typer.Option(help="comparison group; the newest complete one unless given")]
Rope = Annotated[float, typer.Option(min=0, help="points (of loss: hundredths of a nat) that make no difference")]
FormatOption = Annotated[
    Literal["text", "markdown", "latex", "csv", "json"] | None,
    typer.Option("--format", help="text, or by the suffix of --out, unless given"),
]
Out = Annotated[Path | None, typer.Option(dir_okay=False, help="write to this file")]


@app.callback()
def analysis() -> None:
    """Compare the models of a task by the runs in the result database."""


@app.command()
def table(
    tasks: Tasks, metric: Metric = None, group: Group = None, form: FormatOption = None, out: Out = None,
    tracking_uri: Uri = None,
) -> None:  # fmt: skip
    """One row a model: splits done, scores with interval, cost; and the baselines."""
    from analysis.tables import score_table

    _write(tasks, metric, group, form, out, tracking_uri, score_table)


@app.command()
def compare(
    tasks: Tasks, metric: Metric = None, group: Group = None, rope: Rope = 1.0, form: FormatOption = None,
    out: Out = None, tracking_uri: Uri = None,
) -> None:  # fmt: skip
    """One row a pair of models: difference with interval, tests, and the verdict."""
    from analysis.tables import difference_table

    def build(evidence: "Evidence", chosen: str) -> "ResultTable":
        return difference_table(evidence, chosen, rope / 100)

    _write(tasks, metric, group, form, out, tracking_uri, build)


@app.command()
def figures(
    tasks: Tasks, out: Annotated[Path, typer.Option(file_okay=False, help="folder for the files")] = Path("figures"),
    metric: Metric = None, group: Group = None, rope: Rope = 1.0, tracking_uri: Uri = None,
) -> None:  # fmt: skip
    """Draw the figures of a task, each as PNG and SVG."""
    from analysis.figures import draw_figures, save

    with _one_sentence():
        for evidence, chosen, _ in [_evidence(task, metric, group, tracking_uri) for task in tasks]:
            folder = out / evidence.task if len(tasks) > 1 else out
            for name, _, figure in draw_figures(evidence, chosen, rope / 100):
                for path in save(figure, folder, name):
                    print(path)
            _print_problems(evidence)


@app.command()
def report(
    tasks: Tasks, out: Annotated[Path, typer.Option(dir_okay=False, help="the page")] = Path("report.html"),
    metric: Metric = None, group: Group = None, rope: Rope = 1.0,
    thumbnails: Annotated[bool, typer.Option(help="whether to show pictures of the data")] = True,
    tracking_uri: Uri = None,
) -> None:  # fmt: skip
    """Write one self-contained page about some tasks, for people who do not have the program."""
    from analysis.report import write_report
    from tracking import open_store

    if out.suffix.lower() not in (".html", ".htm", ""):
        raise typer.BadParameter(f"{out.name!r} is no page; end the name in .html", param_hint="--out")
    with _one_sentence():
        chosen = [_evidence(task, metric, group, tracking_uri)[:2] for task in tasks]
        write_report(out, chosen, open_store(tracking_uri), rope / 100, thumbnails)
        print(out)


@app.command()
def export(
    tasks: Tasks, out: Annotated[Path, typer.Option(file_okay=False, help="folder for the files")],
    metric: Metric = None, group: Group = None, rope: Rope = 1.0, tracking_uri: Uri = None,
) -> None:  # fmt: skip
    """Write a folder to publish: README, tables, verdicts, figures and the report, without pictures of the data."""
    from analysis.export import for_others, make_files, write_files
    from tracking import open_store

    with _one_sentence():
        found = [_evidence(task, metric, group, tracking_uri)[:2] for task in tasks]
        chosen = [(for_others(evidence), score) for evidence, score in found]
        store = open_store(tracking_uri)
        made = [make_files(evidence, score, store, rope / 100) for evidence, score in chosen]
        for files, (evidence, _) in zip(made, chosen, strict=True):
            folder = out / evidence.task if len(tasks) > 1 else out
            write_files(folder, files)
            print(folder)
            _print_problems(evidence)


def _write(
    tasks: list[str], metric: str | None, group: str | None, form: "Format | None", out: Path | None,
    tracking_uri: str | None, build: "Callable[[Evidence, str], ResultTable]",
) -> None:  # fmt: skip
    from analysis.formats import SUFFIXES, print_groups, render, terminal_width

    if out and not form and out.suffix and out.suffix.lower() not in SUFFIXES:
        known = ", ".join(SUFFIXES)
        raise typer.BadParameter(f"{out.name!r} ends in none of {known}; name a --format as well", param_hint="--out")
    if out and out.exists() and out.suffix and out.suffix.lower() not in SUFFIXES:
        raise typer.BadParameter(f"{out.name!r} is there and no table; name another file", param_hint="--out")
    form = form or (SUFFIXES.get(out.suffix.lower(), "markdown") if out else "text")
    with _one_sentence():
        found = [_evidence(task, metric, group, tracking_uri) for task in tasks]
        tables = [build(evidence, chosen) for evidence, chosen, _ in found]
        if out:
            out.write_text(render(tables, form), encoding="utf-8")
            print(out)
        else:
            print(render(tables, form, terminal_width()), end="")
        if form in ("text", "csv"):  # the other formats contain the notes
            for (evidence, _, runs), result in zip(found, tables, strict=True):
                print_groups(runs, evidence.group, result.notes if form == "csv" else [])


def _evidence(
    task: str, metric: str | None, group: str | None, tracking_uri: str | None
) -> "tuple[Evidence, str, pd.DataFrame]":
    """Read the group to be shown, its metric, and all runs of the task."""
    from analysis.comparison import Evidence, check_metric, default_metric
    from analysis.groups import ComparisonError, choose_group
    from analysis.query import load_runs

    uri = check_uri(tracking_uri)
    if metric is not None:
        try:
            check_metric(metric)
        except ComparisonError as error:
            raise typer.BadParameter(str(error), param_hint="--metric") from None
    runs = load_runs([task], uri)
    try:
        chosen = choose_group(runs, group)
    except ComparisonError as error:
        raise StoreError(f"{task} in the result database {without_password(uri)}: {error}") from None
    return Evidence(chosen, uri), metric or default_metric(chosen), runs


def _print_problems(evidence: "Evidence") -> None:
    for problem in evidence.problems.values():
        print(f"! {problem}", file=sys.stderr)


@contextlib.contextmanager
def _one_sentence() -> Iterator[None]:
    """Print an expected error as one sentence; the exit code is 2 for an unknown task, else 1."""
    from analysis.groups import ComparisonError

    # show a warning as a sentence as well, without a line of source code
    warnings.showwarning = lambda message, *_: print(f"! {message}", file=sys.stderr)
    try:
        yield
    except OSError as error:
        print(f"Error: cannot use {error.filename} ({error.strerror}); name another place", file=sys.stderr)
        raise typer.Exit(1) from None
    except (StoreError, ComparisonError) as error:
        print(f"Error: {error}", file=sys.stderr)
        raise typer.Exit(2 if isinstance(error, UnknownTaskError) else 1) from None
    except Exception as error:
        if not type(error).__module__.startswith("mlflow"):  # comparing names avoids importing mlflow
            raise
        print(f"Error: {' '.join(str(error).split())[:300]}", file=sys.stderr)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    print_in_any_encoding()
    app()
