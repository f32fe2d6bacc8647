"""The report: one self-contained HTML page that a person can read without the program."""

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markdown_it import MarkdownIt
from matplotlib.figure import Figure

from analysis.comparison import Evidence
from analysis.figures import class_names, confusion_counts, draw_figures
from analysis.query import local_artifact
from analysis.tables import ResultTable, difference_table, number, score_table, verdict_sentences
from tracking import Store, StoreError
from tracking.keys import BASELINES, MODEL_CARD

CAPTIONS = {
    "scores_by_split": "Every split's score (points), and the mean over splits with its 95 % interval.",
    "paired_differences": "Differences between networks split by split, their mean with its 95 % interval, and in gray "
    "the region in which a difference does not matter.",
    "accuracy_against_cost": "The score against what it costs. Nothing beats a model on the step line at its price.",
    "learning_curves": "Loss and accuracy by epoch: thin lines are splits, dots their best epochs; the thick line and "
    "band are mean ± sd as far as all splits were trained.",
    "confusion": "Confusion matrix over all splits.",
    "most_confused": "The images that were wrong with the most confidence.",
}
RASTER = ("most_confused",)  # photographs: PNG is smaller; all else is SVG
OPTIONS = ("n_splits", "lr", "weight_decay", "batch_size", "epochs", "patience", "precision", "seed")


@dataclass(frozen=True)
class Section:
    """What the page says of one task."""

    task: str
    question: str
    facts: dict[str, str]
    scores: ResultTable
    differences: ResultTable | None
    verdicts: list[str]
    figures: list[dict[str, str]]
    classes: pd.DataFrame
    cards: list[str]
    command: str
    provenance: dict[str, list[str]]
    links: dict[str, str]
    runs_link: str


def write_report(path: Path, chosen: Sequence[tuple[Evidence, str]], store: Store, rope: float) -> None:
    """Write the page.

    Parameters
    ----------
    path : Path
        The HTML file.
    chosen : sequence of (Evidence, str)
        The comparison groups to be shown, each with its metric.
    store : Store
        That they came from.
    rope : float
        Region of practical equivalence, in the metric's units.
    """
    folder = Path(__file__).parent
    environment = Environment(loader=FileSystemLoader(folder), autoescape=True, undefined=StrictUndefined)
    sections = [_section(evidence, metric, store, rope) for evidence, metric in chosen]
    page = environment.get_template("report.html.jinja").render(sections=sections, made=f"{datetime.now(UTC):%Y-%m-%d}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def _section(evidence: Evidence, metric: str, store: Store, rope: float) -> Section:
    runs = evidence.runs
    task = runs["task"].iloc[0]
    differences, verdicts = None, []
    if runs["model"].nunique() > 1:
        differences = difference_table(evidence, metric, rope)
        verdicts = verdict_sentences(evidence, metric, rope)
    scores = score_table(evidence, metric)
    return Section(
        task=task,
        question=_text(runs, "question"),
        facts=_facts(evidence, store),
        scores=scores,
        differences=differences,
        verdicts=verdicts,
        figures=[_embed(name, model, figure) for name, model, figure in draw_figures(evidence, metric, rope)],
        classes=_class_scores(evidence, metric, list(scores.data["model"])),
        cards=_cards(evidence, list(scores.data["model"])),
        command=reproduce(runs),
        provenance=_provenance(runs),
        links={run: store.run_link(task, run) for run in runs["run_id"]},
        runs_link=store.runs_link(task),
    )


def _text(runs: pd.DataFrame, key: str) -> str:
    return ", ".join(dict.fromkeys(str(value) for value in runs[key].dropna()))


def _facts(evidence: Evidence, store: Store) -> dict[str, str]:
    runs = evidence.runs
    sizes = [sorted(set(runs[key].dropna())) for key in ("n_train", "n_val", "n_test")]
    shown = ["–".join(f"{size:,}" for size in sorted({known[0], known[-1]})) if known else "?" for known in sizes]
    names = class_names(evidence)
    images: Any = json.loads(_profile(store, runs["parent_id"].iloc[-1]))
    shape = "×".join(map(str, images["shape"]))
    classes = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    return {
        "data": f"{_text(runs, 'dataset')}: {images['images']:,} images, {shape}, of {len(names)} classes ({classes})",
        "protocol": f"{_text(runs, 'protocol')}, {runs['n_splits'].iloc[0]} splits: {shown[0]} images to train on, "
        f"{shown[1]} to choose the best epoch, {shown[2]} for the test",
        "training": f"AdamW, learning rate {_text(runs, 'lr')}, weight decay {_text(runs, 'weight_decay')}, batches of "
        f"{_text(runs, 'batch_size')}, cosine schedule over at most {_text(runs, 'epochs')} epochs, early stopping "
        f"after {_text(runs, 'patience')} epochs without a lower validation loss, "
        f"{'flipped and shifted' if runs['augment'].iloc[0] else 'no augmentation'}, {_text(runs, 'precision')}",
        "hardware": f"{_text(runs, 'hardware')} ({_text(runs, 'device')}, {_text(runs, 'threads')} threads)",
    }


def _profile(store: Store, run_id: str) -> str:
    """What MLflow holds on a run's data set."""
    inputs = store.client.get_run(run_id).inputs
    return str(inputs.dataset_inputs[0].dataset.profile) if inputs else "{}"


def _embed(name: str, model: str | None, figure: Figure) -> dict[str, str]:
    """The figure as an address that holds the whole file."""
    kind = name.removesuffix(f"_{model}")
    form, mime = ("png", "image/png") if kind in RASTER else ("svg", "image/svg+xml")
    figure.savefig(buffer := io.BytesIO(), format=form, dpi=200)
    source = f"data:{mime};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    caption = f"{model}: {CAPTIONS[kind][0].lower()}{CAPTIONS[kind][1:]}" if model else CAPTIONS[kind]
    return {"source": source, "caption": caption, "kind": "model" if model else "comparison"}


def _class_scores(evidence: Evidence, metric: str, models: Sequence[str]) -> pd.DataFrame:
    """F1 of each class (rows) by model (columns), over the predictions of all splits pooled, in per cent."""
    part = "test" if metric.startswith("test") else "val"
    names = class_names(evidence)
    columns: dict[str, list[str]] = {}
    for model in models:
        try:
            pooled = pd.concat([evidence.predictions(run, part) for _, run in evidence.of(model).iterrows()])
        except StoreError:
            continue
        counts = confusion_counts(pooled["true"].to_numpy(), pooled["pred"].to_numpy(), len(names))
        occurrences = counts.sum(0) + counts.sum(1)
        scores = np.divide(2 * np.diag(counts), occurrences, out=np.full(len(names), np.nan), where=occurrences > 0)
        columns[model] = [number(score, "f1") for score in scores]
    return pd.DataFrame({"class": names, **columns})


def _cards(evidence: Evidence, models: Sequence[str]) -> list[str]:
    """Each model's card as HTML."""
    cards = []
    for model in models:
        parent = evidence.of(model)["parent_id"].iloc[-1]
        try:
            text = local_artifact(parent, MODEL_CARD, evidence.tracking_uri).read_text(encoding="utf-8")
        except StoreError:
            continue
        cards.append(MarkdownIt("commonmark", {"html": False}).render(text))
    return cards


def reproduce(runs: pd.DataFrame) -> str:
    """The command that does these runs again."""
    first = runs.iloc[0]
    models = [model for model in dict.fromkeys(runs["model"]) if model not in BASELINES]
    options = [f"-m {model}" for model in models]
    options += [f"--{key.replace('_', '-')} {first[key]}" for key in OPTIONS]
    options += ["--augment" if first["augment"] else "--no-augment", f"--device {str(first['device']).split(':')[0]}"]
    return " ".join([f"python experiments/{first['task']}.py", *options])


def _provenance(runs: pd.DataFrame) -> dict[str, list[str]]:
    labels = {
        "commit": "git_commit", "data digest (SHA-256)": "dataset_digest", "source digests": "source_digest",
        "versions": "versions", "split hashes": "split_hash",
    }  # fmt: skip
    times: Any = runs["start_time"].dt.strftime("%Y-%m-%d")
    return {"dates": sorted(set(times))} | {
        label: list(dict.fromkeys(runs[key].dropna().astype(str))) for label, key in labels.items()
    }
