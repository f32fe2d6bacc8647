"""Rendering a `ResultTable` as text for a terminal, Markdown, LaTeX, CSV or JSON."""

import functools
import io
import json
import math
import os
import re
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd
from rich import box
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.table import Table

from analysis.evidence import Evidence, default_metric
from analysis.groups import NEEDED, group_id, list_groups
from analysis.tables import NOT_BEATEN, ResultTable, score_table
from tracking import persist

if TYPE_CHECKING:
    from tracking import Store

Format = Literal["text", "markdown", "latex", "csv", "json"]
SUFFIXES: dict[str, Format] = {".md": "markdown", ".tex": "latex", ".csv": "csv", ".json": "json", ".txt": "text"}
HEADERS = {  # short, so that a table fits 80 characters
    "splits": "n", "95 % interval": "95 %\ninterval", "micro-F1": "micro\nF1", "macro-F1": "macro\nF1",
    "best epoch": "best\nepoch", "parameters": "para-\nmeters", "s per split": "s per\nsplit",
    "difference": "diff.", "Holm p": "Holm\np", "P(same)": "P\nsame", "P(better)": "P\nbetter",
    "McNemar p": "McNe-\nmar p",
}  # fmt: skip
# characters that Markdown would interpret; it leaves an underscore within a word alone
MARKUP = re.compile(r"[\\`*\[\]]|<(?=[A-Za-z/!?])|&(?=[#\w])|\b_|_\b")
MINUS = re.compile(r"(?<![\w.)-])-(?=[\d.])")  # a hyphen that is the sign of a number
MOST = 10_000  # characters: a table is fitted by `_fitted`, and by nothing else
NAMES = ("class", "model")  # columns of names that are shortened, in this order
SHORTEST_NAME = 16
DISPENSABLE = (  # columns, in the order in which they are left out of a narrow table
    "s per split", "MACs", "parameters", "best epoch", "McNemar p", "if calibrated", "P(same)", "P(better)",
    "micro-F1", "macro-F1", "precision", "recall", "p",
    "Holm p", "95 % interval",
)  # fmt: skip
TEXT_COLUMNS = ("score", "class", "model", "against", "verdict", "run_id")  # left-aligned, the others right-aligned


def render(tables: Sequence[ResultTable], form: Format, width: int | None = None) -> str:
    """Render tables one after the other, with a newline at the end; `width` is the terminal's, in characters.

    CSV and JSON have all numbers in full precision: CSV has one row a model or pair; JSON is a list with an object for
    each table (`title`, `caption`, `notes`, `rows`, `runs`).
    """
    if form == "csv":
        frames = pd.concat([_identity_first(table.data) for table in tables])
        return str(frames.to_csv(index=False, lineterminator="\n"))
    if form == "json":
        return json.dumps([_as_json(table) for table in tables], indent=1, allow_nan=False) + "\n"
    writer = {"markdown": _markdown, "latex": _latex}.get(form) or functools.partial(_text, width=width)
    return "\n".join(writer(table) for table in tables)


def _identity_first(data: pd.DataFrame) -> pd.DataFrame:
    first = ["task", "group", "metric"]
    return data[[*first, *(column for column in data.columns if column not in first)]]


def _as_json(table: ResultTable) -> dict[str, Any]:
    def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
        missing = frame.isna()
        return [
            {str(key): None if missing.at[index, key] else _plain(row[key]) for key in frame.columns}
            for index, row in zip(frame.index, frame.astype(object).to_dict("records"), strict=True)
        ]

    rows = records(_identity_first(table.data).reset_index(drop=True))
    about = {"title": table.title, "caption": table.caption, "notes": table.notes}
    return about | {"rows": rows, "runs": records(table.runs)}


def _plain(value: Any) -> Any:
    """Convert a numpy scalar to Python, and infinity, which JSON lacks, to None."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _markdown(table: ResultTable) -> str:
    lines = [f"## {table.title}", "", f"{table.caption}.", "", markdown_table(table.cells), ""]
    lines += [f"- {note}" for note in table.notes]
    if table.notes:
        lines.append("")
    runs = table.runs.astype(object).map(lambda value: "" if pd.isna(value) else str(value))
    lines += ["Runs behind these numbers:", "", markdown_table(runs), ""]
    return "\n".join(lines)


def markdown_table(cells: pd.DataFrame) -> str:
    """Render cells as a Markdown table, without a newline at the end."""

    def line(values: Sequence[str]) -> str:
        return f"| {' | '.join(value.replace('|', chr(92) + '|') for value in values)} |"

    ruler = ["---" if column in TEXT_COLUMNS else "---:" for column in cells.columns]
    return "\n".join([line(list(cells.columns)), line(ruler), *(line(row) for row in cells.to_numpy().tolist())])


def markdown_text(text: str) -> str:
    """Escape text for Markdown."""
    return MARKUP.sub(r"\\\g<0>", text)


def _latex(table: ResultTable) -> str:
    cells = _narrow(table.cells, " − ")
    columns = "".join("l" if column in TEXT_COLUMNS else "r" for column in cells.columns)
    escaped = cells.map(_latex_text).rename(columns=_latex_header)
    caption = _latex_text(f"{table.title}: {table.caption}.")
    kinds = {"field": "by-setting", "model_a": "pairs", "class": "classes", "if_calibrated": "further-scores"}
    kind = next((kind for column, kind in kinds.items() if column in table.data), "scores")
    label = f"tab:{table.data['task'].iloc[0]}-{kind}"
    place: Any = {"caption": caption, "label": label, "position": "htbp"}
    body: str = escaped.to_latex(index=False, column_format=f"@{{}}{columns}@{{}}", **place)
    small = "\\footnotesize\n\\setlength{\\tabcolsep}{3pt}\n\\begin{tabular}"
    notes = "".join(f"\n\\par {_latex_text(note)}" for note in table.notes)
    body = body.replace("\\begin{tabular}", small).replace("\\end{tabular}", f"\\end{{tabular}}{notes}")
    return f"% needs \\usepackage{{booktabs}}, and xelatex or lualatex for names in other scripts\n{body}"


def _latex_header(name: str) -> str:
    lines = [_latex_text(line) for line in HEADERS.get(name, name).split("\n")]
    return lines[0] if len(lines) == 1 else r"\shortstack[r]{" + r" \\ ".join(lines) + "}"


def _latex_text(text: str) -> str:
    special = {
        "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
        "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "†": r"$\dagger$", "–": "--",
        "−": "$-$", "<": r"$<$", ">": r"$>$", "≤": r"$\leq$", "≥": r"$\geq$", "×": r"$\times$",
    }  # fmt: skip
    pieces = re.split(r"(--)", MINUS.sub("−", text))  # two hyphens of an option, which LaTeX would join to a dash
    return "".join("{-}{-}" if each == "--" else "".join(special.get(char, char) for char in each) for each in pieces)


def _text(table: ResultTable, width: int | None) -> str:
    cells, left_out = _fitted(_narrow(table.cells, "\n−"), width or MOST)
    console = Console(file=io.StringIO(), width=MOST, highlight=False, markup=False, force_terminal=False)
    drawn = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
    for column in cells.columns:
        justify: Any = "left" if column in TEXT_COLUMNS else "right"
        drawn.add_column(HEADERS.get(str(column), str(column)), justify=justify, no_wrap=True)
    for row in cells.to_numpy().tolist():
        drawn.add_row(*row)
    console.print(table.title, style="bold", soft_wrap=True)
    console.print(table.caption, soft_wrap=True)
    console.print(drawn)
    if left_out:
        console.print(f"! no room in {width} columns for: {', '.join(left_out)} (--format csv has all)", soft_wrap=True)
    for note in table.notes:
        console.print(note if note.startswith(NOT_BEATEN) else f"! {note}", soft_wrap=True)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def _fitted(cells: pd.DataFrame, width: int) -> tuple[pd.DataFrame, list[str]]:
    """Shorten names, and then leave columns out, until a table fits; no number is ever cut."""
    shown = cells.copy()
    if "verdict" in shown and _total(shown) > width:
        shown["verdict"] = shown["verdict"].str.replace(" ", "\n", n=1)
    for column in NAMES:
        longest = _width(shown[column]) if column in shown else 0
        while _total(shown) > width and longest > SHORTEST_NAME:
            longest -= 1
            parts = cells[column].str.split("\n")
            shorter = parts.map(lambda names, length=longest: "\n".join(shortened(name, length) for name in names))
            if shorter.nunique() < cells[column].nunique():
                break  # names must stay apart
            shown[column] = shorter
    left_out = []
    for column in DISPENSABLE:
        if _total(shown) > width and column in shown and len(shown.columns) > 2:
            shown = shown.drop(columns=column)
            left_out.append(column)
    return shown, left_out


def terminal_width() -> int | None:
    """Return the columns of the terminal; None if the output goes elsewhere and COLUMNS does not say."""
    return Console().width if sys.stdout.isatty() or "COLUMNS" in os.environ else None


def shortened(name: str, width: int) -> str:
    """Shorten a name to a width by an ellipsis in its middle: versions and sizes stand at the end.

    A character of Korean, Chinese or Japanese is two wide.
    """
    if cell_len(name) <= width:
        return name
    tail = (width - 1) // 3
    start, end = set_cell_size(name, width - 1 - tail), set_cell_size(name[::-1], tail)[::-1]
    return f"{start.rstrip()}…{end.lstrip()}"


def shortened_apart(names: Sequence[str], width: int) -> dict[str, str]:
    """Shorten names to a width, or to the least at which all of them still differ."""
    while len({shortened(name, width) for name in names}) < len(set(names)):
        width += 1
    return {name: shortened(name, width) for name in names}


def _total(cells: pd.DataFrame) -> int:
    return sum(_width([HEADERS.get(str(column), str(column)), *cells[column]]) + 1 for column in cells.columns) - 1


def _width(texts: Iterable[str]) -> int:
    return max((cell_len(line) for text in texts for line in text.split("\n")), default=0)


def _narrow(cells: pd.DataFrame, between: str) -> pd.DataFrame:
    """Put each pair of models into one cell, and drop redundant columns."""
    if "against" not in cells:
        return cells
    pairs = cells["model"] + between + cells["against"]
    kept = [column for column in cells.columns if column not in ("against", "splits", "P(worse)", "verdict")]
    return cells.assign(model=pairs)[[*kept, "verdict"]]


def print_scores(store: "Store", runs: pd.DataFrame, evidence: Evidence) -> None:
    """Print the table of a comparison group, the other groups in `runs` of its task, and the store's locations."""
    group = evidence.group
    console = Console(highlight=False, markup=False, soft_wrap=True)
    table = score_table(evidence, default_metric(group))
    console.print()
    console.out(render([table], "text", terminal_width()), end="")
    print_groups(runs, group)
    console.print(f"numbers    {store.label}")
    console.print(f"in the UI  {persist(lambda: store.runs_link(evidence.task))}")
    if store.ui_command:
        console.print(f"           once it is served: {store.ui_command}")


def print_groups(runs: pd.DataFrame, group: pd.DataFrame, notes: Sequence[str] = ()) -> None:
    """Print notes, and the other groups in the store, to stderr."""
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    for note in notes:
        console.print(f"! {note}")
    if left_out := len(runs) - len(runs.dropna(subset=list(NEEDED))):
        console.print(f"! {left_out} runs lack {', '.join(NEEDED)} and are left out.")
    if others := list_groups(runs, group):
        console.print(f"Shown is group {group_id(group)}; others in the store, for --group, never mixed with it:")
        for line in others:
            console.print(f"  {line}")
