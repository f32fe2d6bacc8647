"""The published results of a task: a folder for git with results and provenance.

It contains no picture of the data, which belong to others, and nothing specific to the machine that made it.
"""

import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pandas as pd

from analysis.comparison import ROPE
from analysis.evidence import Evidence, default_metric
from analysis.figures import PAPER
from analysis.formats import markdown_table, markdown_text, render
from analysis.groups import ComparisonError, finished, group_id
from analysis.report import ABOUT_SCORES, CAPTIONS, NO_COMPARISON, Drawing, Section, describe, render_page
from analysis.scores import class_table
from tracking import Store, StoreError
from tracking.errors import StoreAwayError
from tracking.keys import FINAL_METRICS, IDENTITY, PARAMS

README, FIGURES = "README.md", "figures"
SHOWN_WITH_SCORES = ("scores_by_split",)
SHOWN_WITH_VERDICTS = ("paired_differences", "accuracy_against_cost")
SHOWN_WITH_TUNING = ("tuning_curves",)
ABOUT = {  # the files beside the figures
    "report.html": "all of this on one page, with learning curves, classes, models and every run",
    "table.md": "the score table, and each run behind it",
    "table.csv": "the same for programs, in full precision",
    "table.tex": "the same for a paper",
    "runs.csv": "a row a run: its params and metrics",
    "classes.csv": "precision, recall and F1 of each class, with intervals, in full precision",
    "verdicts.md": "the verdict on each pair of models, with intervals, p and probabilities",
    "verdicts.csv": "the same for programs, in full precision",
    "CITATION.cff": "how to cite these results",
}
MARK = "<!-- Made by `python -m analysis export`, which writes this folder's files anew. -->"
UNFINISHED = f"# Unfinished\n\nWriting these files was interrupted. The same command writes them again.\n\n{MARK}\n"
OWN_FILES = re.compile(
    rf"verdicts\.(md|csv)|classes\.csv|{FIGURES}/({'|'.join(CAPTIONS)})(_[\w.-]+)?\.({'|'.join(PAPER)})"
)


def for_others(evidence: Evidence) -> Evidence:
    """Remove the reasons of failed splits, which may name hosts, users and folders."""
    unnamed = pd.Series(pd.NA, evidence.group.index, dtype="str")
    return Evidence(evidence.group.assign(failure=unnamed), evidence.tracking_uri, evidence)


def make_files(evidence: Evidence, metric: str, store: Store, rope: float) -> dict[str, bytes]:
    """Return the files of a task by path below the folder; errors as for `comparison_table`.

    `evidence` is from `for_others`. The same store gives the same bytes, except for the date in report.html.
    """
    section = describe(evidence, metric, store, rope, thumbnails=False, public=True)
    texts = {"table.md": render([section.scores], "markdown"), "table.csv": render([section.scores], "csv")}
    texts["table.tex"] = render([section.scores], "latex")
    texts["runs.csv"] = _runs(evidence)
    if classes := _classes(evidence, metric):
        texts["classes.csv"] = classes
    if section.differences:
        table = render([section.differences], "markdown")
        texts["verdicts.md"] = "\n".join([*_title(section), *_bullets(section.verdicts), table])
        texts["verdicts.csv"] = render([section.differences], "csv")
    figures = {f"{FIGURES}/{each.name}.{form}": each.content(form) for each in section.figures for form in PAPER}
    texts["CITATION.cff"] = _citation(section, evidence)
    texts["report.html"] = render_page([section])
    texts[README] = _readme(section, texts, _command(section.task, evidence, metric, rope))
    return {name: text.encode() for name, text in texts.items()} | figures


def _runs(evidence: Evidence) -> str:
    """Return the group's finished runs as CSV: a row a run, with its params and metrics in full precision."""
    runs = finished(evidence.group).sort_values(list(IDENTITY), kind="stable")
    columns = ["run_id", "status", "start_time", "end_time", "task", *PARAMS, *FINAL_METRICS]
    columns += ["fingerprint", "split_hash", "dataset_digest", "source_digest", "git_commit", "hardware", "versions"]
    shown = runs[columns].dropna(axis="columns", how="all")
    return str(shown.to_csv(index=False, lineterminator="\n"))


def _classes(evidence: Evidence, metric: str) -> str:
    """Return the scores of each class as CSV; empty if the predictions cannot be read."""
    try:
        return render([class_table(evidence, metric.partition("/")[0])], "csv")
    except StoreAwayError:
        raise
    except (ComparisonError, StoreError):
        return ""  # the report and the verdicts name the file


def _citation(section: Section, evidence: Evidence) -> str:
    """Return a citation file (CFF 1.2.0) of the results; JSON strings are YAML, too."""
    newest = finished(evidence.group)["start_time"].max()
    lines = {
        "cff-version": "1.2.0",
        "message": "If you use these results, please cite them and the data. Put your own names under authors.",
        "type": "dataset",
        "title": f"{section.task}: {section.question} Results on {evidence.group['dataset'].iloc[0]}",
        "abstract": f"{section.scores.title}; {section.scores.caption}.",
        "date-released": f"{newest:%Y-%m-%d}",
        "version": f"comparison group {group_id(evidence.group)}",
    }
    written = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in lines.items()]
    authors = ["authors:", '  - name: "The authors of this comparison"']
    return "\n".join([*written, *authors, ""])


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write the files of `make_files`, replacing an earlier export; other files in the folder are kept.

    Raises
    ------
    ComparisonError
        If a file that no export made has one of the names.
    OSError
        If writing fails. The README says that the export is unfinished until all files are complete.
    """
    readme = folder / README
    earlier = readme.is_file() and MARK in readme.read_text(encoding="utf-8", errors="replace")
    if not earlier and (foreign := next((name for name in files if (folder / name).exists()), None)):
        raise ComparisonError(f"{folder / foreign} is there and was not made by an export; choose another --out")
    target = folder.resolve()  # the scratch folder must be on the same file system, which a link may not be
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as folder_beside:
        scratch = Path(folder_beside)
        (scratch / FIGURES).mkdir()
        for name, content in files.items():
            (scratch / name).write_bytes(content)
        (target / FIGURES).mkdir(parents=True, exist_ok=True)
        (target / README).write_text(UNFINISHED, encoding="utf-8")
        for stale in _stale(target, files):
            stale.unlink()
        for name in sorted(files, key=lambda name: name == README):  # last
            (scratch / name).replace(target / name)


def _stale(folder: Path, files: Mapping[str, bytes]) -> Iterator[Path]:
    """Find the files of an earlier export that this one lacks, by name."""
    for path in [*folder.glob("*"), *folder.glob(f"{FIGURES}/*")]:
        name = path.relative_to(folder).as_posix()
        if OWN_FILES.fullmatch(name) and name not in files:
            yield path


def _readme(section: Section, texts: Mapping[str, str], command: str) -> str:
    lines = _title(section)
    lines += _bullets([f"**{label}**: {markdown_text(text)}" for label, text in section.facts.items()])
    lines += ["## Scores", "", f"{section.scores.caption}.", "", markdown_table(section.scores.cells), ""]
    lines += [*_bullets([markdown_text(note) for note in section.scores.notes]), ABOUT_SCORES, ""]
    lines += _shown(section, SHOWN_WITH_SCORES)
    lines += ["## What was found", ""]
    if section.verdicts:
        lines += _bullets([markdown_text(sentence) for sentence in section.verdicts])
    elif section.differences:
        lines += ["There are no two networks; how one differs from the baselines is in [verdicts.md](verdicts.md).", ""]
    else:
        lines += [NO_COMPARISON, ""]
    lines += _shown(section, SHOWN_WITH_VERDICTS)
    if section.tuning:
        lines += ["## Tuning", ""]
        for table in section.tuning:
            lines += [f"{markdown_text(table.caption)}.", "", markdown_table(table.cells), ""]
            lines += _bullets([markdown_text(note) for note in table.notes])
        lines += _shown(section, SHOWN_WITH_TUNING)
    described = [f"[{name}]({name}): {about}" for name, about in ABOUT.items() if name in texts]
    described += [f"{_links(drawing)}: {markdown_text(drawing.caption)}" for drawing in section.figures]
    lines += ["## Files", "", *_bullets(described)]
    lines += _bullets([markdown_text(problem) for problem in section.problems])
    lines += ["## How it was made", "", "The runs:", "", *_code(section.command)]
    lines += ["These files, from the result database that the runs are in:", "", *_code(command)]
    provenance = {label: " ".join(f"`{value}`" for value in values) for label, values in section.provenance.items()}
    lines += _bullets([f"{label}: {values}" for label, values in provenance.items()])
    return "\n".join([*lines, MARK, ""])


def _title(section: Section) -> list[str]:
    return [f"# {section.task}: {markdown_text(section.question)}", ""]


def _bullets(sentences: list[str]) -> list[str]:
    return [*(f"- {sentence}" for sentence in sentences), ""] if sentences else []


def _code(commands: str) -> list[str]:
    return ["```sh", commands, "```", ""]


def _shown(section: Section, names: tuple[str, ...]) -> list[str]:
    lines = []
    for drawing in section.figures:
        if drawing.name in names:
            lines += [f"![{drawing.name}]({FIGURES}/{drawing.name}.png)", "", drawing.caption, ""]
    return lines


def _links(drawing: Drawing) -> str:
    png, svg, pdf = (f"{FIGURES}/{drawing.name}.{form}" for form in ("png", "svg", "pdf"))
    return f"[{png}]({png}) ([SVG]({svg}), [PDF]({pdf}))"


def _command(task: str, evidence: Evidence, metric: str, rope: float) -> str:
    """Return the command that makes these files."""
    options = f" --group {group_id(evidence.group)}"  # explicit: the store may gain newer groups
    options += f" --metric {metric}" if metric != default_metric(evidence.group) else ""
    options += f" --rope {100 * rope:g}" if rope != ROPE else ""
    return f".venv/bin/python -m analysis export {task}{options} --out DIR"
