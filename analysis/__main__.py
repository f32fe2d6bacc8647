"""`python -m analysis`: tables, tests, figures, the report and the published folder, from the result database alone."""

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from tracking import StoreError, UnknownTaskError, check_uri, in_one_line, is_mlflow_error
from tracking.commands import Tasks, Uri, print_in_any_encoding
from tracking.errors import without_password

if TYPE_CHECKING:
    import pandas as pd

    from analysis.evidence import Evidence
    from analysis.formats import Format
    from analysis.tables import ResultTable

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)

Metric = Annotated[
    str | None, typer.Option(help="test/accuracy unless given; also test/f1_macro, best_val/accuracy, ...")
]
Task = Annotated[str, typer.Argument(help="such as task1")]
Group = Annotated[str | None, typer.Option(help="comparison group; the newest complete one unless given")]
Rope = Annotated[
    float, typer.Option(min=0, max=100, help="points (of loss: hundredths of a nat) that make no difference")
]
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

    def build(evidence: "Evidence", chosen: str) -> "ResultTable":
        return score_table(evidence, chosen, intervals=_form(form, out) in ("csv", "json"))

    _write(tasks, metric, group, form, out, tracking_uri, build)


@app.command()
def compare(
    tasks: Tasks, metric: Metric = None, group: Group = None, rope: Rope = 1.0,
    by: Annotated[str | None, typer.Option(metavar="FIELD", help="compare values of a setting for each model, such as "
                                           "lr, augment, leak_free or tune, instead of the models")] = None,
    looks: Annotated[str | None, typer.Option(help="planned numbers of splits, such as 5,10,20: stop where decided")]
    = None,
    form: FormatOption = None, out: Out = None, tracking_uri: Uri = None,
) -> None:  # fmt: skip
    """One row a pair of models: difference with interval, tests, and the verdict."""
    from analysis.looks import parse_looks

    if by is not None:
        if looks is not None:
            raise typer.BadParameter("looks are at pairs of models, not --by a setting", param_hint="--looks")
        _compare_by(by, tasks, metric, group, rope / 100, _form(form, out), out, tracking_uri)
        return
    from analysis.tables import difference_table

    try:
        planned = () if looks is None else parse_looks(looks)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--looks") from None

    def build(evidence: "Evidence", chosen: str) -> "ResultTable":
        return difference_table(evidence, chosen, rope / 100, planned)

    _write(tasks, metric, group, form, out, tracking_uri, build)


@app.command()
def scores(
    tasks: Tasks,
    part: Annotated[
        Literal["all", "cross_val", "test", "best_val"] | None,
        typer.Option(help="images: all that judge (validation cross-fitted, and test) unless given"),
    ] = None,
    classes: Annotated[bool, typer.Option(help="precision, recall and F1 of each class instead")] = False,
    group: Group = None, form: FormatOption = None, out: Out = None, tracking_uri: Uri = None,
) -> None:  # fmt: skip
    """One row a model: ROC AUC, log loss, Brier score, calibration; with --classes one row a class."""
    from analysis.scores import class_table, whole_table

    def build(evidence: "Evidence", chosen: str) -> "ResultTable":
        return (class_table if classes else whole_table)(evidence, chosen.partition("/")[0])

    _write(tasks, part and f"{part}/accuracy", group, form, out, tracking_uri, build)


@app.command()
def figures(
    tasks: Tasks, out: Annotated[Path, typer.Option(file_okay=False, help="folder for the files")] = Path("figures"),
    metric: Metric = None, group: Group = None, rope: Rope = 1.0, tracking_uri: Uri = None,
) -> None:  # fmt: skip
    """Draw the figures of a task, each as PNG, SVG and PDF."""
    from analysis.figures import PAPER, draw_figures, save

    with _one_sentence():
        for evidence, chosen, _ in [_evidence(task, metric, group, tracking_uri) for task in tasks]:
            folder = out / evidence.task if len(tasks) > 1 else out
            for name, _, figure in draw_figures(evidence, chosen, rope / 100):
                for path in save(figure, folder, name, PAPER):
                    print(path)
            _print_problems(evidence)


@app.command()
def tuning(
    task: Task, group: Group = None,
    out: Annotated[Path | None, typer.Option(file_okay=False, help="folder for the figures and tables")] = None,
    tracking_uri: Uri = None,
) -> None:  # fmt: skip
    """Show the tuned models of a task: chosen values, and the expected score of the best of k configurations."""
    from analysis.formats import render, terminal_width
    from analysis.tuning import is_tuned, settings_of
    from analysis.tuning_tables import chosen_table, curve_table

    with _one_sentence():
        evidence, _, _ = _evidence(task, None, group, tracking_uri, is_tuned)
        tables = [chosen_table(evidence)]
        curve, curves, trials = curve_table(evidence)
        tables.append(curve)
        print(render(tables, "text", terminal_width()), end="")
        if out:
            from analysis.figures import PAPER, save
            from analysis.tuning_figures import curves_figure, values_figure

            paths = save(curves_figure(curves), out, "tuning_curves", PAPER)
            paths += save(values_figure(trials, settings_of(evidence.group)), out, "tuned_values", PAPER)
            for name, content in (("tuning.md", render(tables, "markdown")), ("tuning.csv", render([curve], "csv"))):
                (out / name).write_text(content, encoding="utf-8")
                paths.append(out / name)
            for path in paths:
                print(path)


@app.command()
def study(
    task: Task, model: Annotated[str, typer.Argument(help="such as lenet5")],
    out: Annotated[Path, typer.Option(dir_okay=False, help="SQLite file, which may hold other studies")],
    group: Group = None, tracking_uri: Uri = None,
) -> None:  # fmt: skip
    """Write the trials of a tuned model as a study that optuna-dashboard opens."""
    from analysis.study import write_study
    from analysis.tuning import is_tuned

    with _one_sentence():
        evidence, _, _ = _evidence(task, None, group, tracking_uri, is_tuned)
        name = write_study(evidence, model, out)
        print(f"{out}: {name}; to look at it: .venv/bin/optuna-dashboard sqlite:///{out}")


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
    from analysis.formats import print_groups

    form = _form(form, out)
    with _one_sentence():
        found = [_evidence(task, metric, group, tracking_uri) for task in tasks]
        tables = [build(evidence, chosen) for evidence, chosen, _ in found]
        _put(tables, form, out)
        if form in ("text", "csv"):  # the other formats contain the notes
            for (evidence, _, runs), result in zip(found, tables, strict=True):
                print_groups(runs, evidence.group, result.notes if form == "csv" else [])


def _compare_by(
    field: str, tasks: list[str], metric: str | None, group: str | None, rope: float, form: "Format", out: Path | None,
    tracking_uri: str | None,
) -> None:  # fmt: skip
    from analysis.by_setting import check_field, setting_table
    from analysis.groups import ComparisonError

    try:
        check_field(field)
    except ComparisonError as error:
        raise typer.BadParameter(str(error), param_hint="--by") from None
    _check_metric(metric)
    uri = check_uri(tracking_uri)
    with _one_sentence():
        tables = [setting_table(task, field, metric, rope, group, uri) for task in tasks]
        _put(tables, form, out)
        if form == "csv":
            for note in (note for table in tables for note in table.notes):
                print(f"! {note}", file=sys.stderr)


def _form(form: "Format | None", out: Path | None) -> "Format":
    """Return the format of a table, by the suffix of its file unless named."""
    from analysis.formats import SUFFIXES

    if out and not form and out.suffix and out.suffix.lower() not in SUFFIXES:
        known = ", ".join(SUFFIXES)
        raise typer.BadParameter(f"{out.name!r} ends in none of {known}; name a --format as well", param_hint="--out")
    if out and out.exists() and out.suffix and out.suffix.lower() not in SUFFIXES:
        raise typer.BadParameter(f"{out.name!r} is there and no table; name another file", param_hint="--out")
    return form or (SUFFIXES.get(out.suffix.lower(), "markdown") if out else "text")


def _put(tables: "list[ResultTable]", form: "Format", out: Path | None) -> None:
    """Write tables to a file, or print them."""
    from analysis.formats import render, terminal_width

    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(render(tables, form), encoding="utf-8")
        print(out)
    else:
        print(render(tables, form, terminal_width()), end="")


def _evidence(
    task: str, metric: str | None, group: str | None, tracking_uri: str | None,
    wanted: "Callable[[pd.DataFrame], bool] | None" = None,
) -> "tuple[Evidence, str, pd.DataFrame]":  # fmt: skip
    """Read the group to be shown, its metric, and all runs of the task; by default of those that are `wanted`."""
    from analysis.evidence import Evidence, default_metric
    from analysis.groups import ComparisonError, choose_group
    from analysis.query import load_runs

    uri = check_uri(tracking_uri)
    _check_metric(metric)
    runs = load_runs([task], uri)
    try:
        chosen = choose_group(runs, group, wanted)
    except ComparisonError as error:
        raise StoreError(f"{task} in the result database {without_password(uri)}: {error}") from None
    return Evidence(chosen, uri), metric or default_metric(chosen), runs


def _check_metric(metric: str | None) -> None:
    from analysis.evidence import check_metric
    from analysis.groups import ComparisonError

    try:
        if metric is not None:
            check_metric(metric)
    except ComparisonError as error:
        raise typer.BadParameter(str(error), param_hint="--metric") from None


def _print_problems(evidence: "Evidence") -> None:
    for problem in evidence.problems.values():
        print(f"! {problem}", file=sys.stderr)


def _warn(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
    """Show a warning as a sentence, without a line of source code; those for developers of libraries are no news."""
    if not issubclass(category, DeprecationWarning):
        print(f"! {message}", file=sys.stderr)


@contextlib.contextmanager
def _one_sentence() -> Iterator[None]:
    """Print an expected error as one sentence; the exit code is 2 for an unknown task, else 1."""
    from analysis.groups import ComparisonError

    warnings.showwarning = _warn
    try:
        yield
    except OSError as error:
        print(f"Error: cannot use {error.filename} ({error.strerror}); name another place", file=sys.stderr)
        raise typer.Exit(1) from None
    except (StoreError, ComparisonError) as error:
        print(f"Error: {error}", file=sys.stderr)
        raise typer.Exit(2 if isinstance(error, UnknownTaskError) else 1) from None
    except Exception as error:
        if not is_mlflow_error(error):
            raise
        print(f"Error: {in_one_line(error)}", file=sys.stderr)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    print_in_any_encoding()
    app()
