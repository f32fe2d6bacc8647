"""The report: one self-contained HTML page that a person can read without the program."""

import base64
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

from analysis.comparison import Evidence, pairs_of_models, predicted_part
from analysis.figures import confusion_counts, draw_figures, encode
from analysis.query import local_artifact
from analysis.tables import ResultTable, difference_table, number, score_table, verdict_sentences
from tracking import Store, StoreError
from tracking.keys import BASELINES, MODEL_CARD, SAMPLE

CAPTIONS = {
    "scores_by_split": "Every split's score (points), and the mean over splits with its 95 % interval.",
    "paired_differences": "Differences between networks split by split, their mean with its 95 % interval, and in gray "
    "the region in which a difference does not matter.",
    "accuracy_against_cost": "The score against what it costs. No other network beats one on the step line at its "
    "price.",
    "learning_curves": "Loss and accuracy by epoch: thin lines are splits, dots their best epochs; the thick line and "
    "band are mean ± sd as far as all splits were trained.",
    "confusion": "Confusion matrix over all splits.",
    "most_confused": "The images that were wrong with the most confidence.",
}
RASTER = ("most_confused",)  # photographs: PNG is smaller; all else is SVG
METHODS = {  # how a standard error was found, for readers who have nothing but the page
    "corrected resampled t": "Corrected resampled t (Nadeau and Bengio 2003): SE² = (1/J + scored/trained images) s², "
    "since the splits share training images; J - 1 degrees of freedom.",
    "components of variance, one test part": "One test part scores every split, so its images are a source of chance "
    "that no split shows: SE² = (1/J + validation/training images) s² + σ²/test images.",
    "components of variance, overlapping parts": "The scored parts are large and overlap: SE² = s²/J + σ²/N + "
    "(training images/N) s², with N images in all.",
}
LEGEND = (
    "s² is the variance of the differences over the J splits; σ² is that of single images in the mean difference, "
    "estimated from the stored predictions; degrees of freedom are Satterthwaite's. How often these tests err in a "
    "simulation is in the program's docs/statistics.md."
)
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
    methods: list[str]
    figures: list[dict[str, str]]
    problems: list[str]
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
    scores = score_table(evidence, metric)
    models = list(scores.data["model"])
    differences, methods = None, []
    if pairs_of_models(evidence, metric):
        differences = difference_table(evidence, metric, rope)
        used = [method for method in differences.data["method"].unique() if method]
        methods = [METHODS[method] for method in used] + ([LEGEND] if used else [])
    figures = [_embed(name, model, figure) for name, model, figure in draw_figures(evidence, metric, rope)]
    return Section(
        task=task,
        question=_text(runs, "question"),
        facts=_facts(evidence, store),
        scores=scores,
        differences=differences,
        verdicts=verdict_sentences(evidence, metric, rope),
        methods=methods,
        figures=figures,
        classes=_class_scores(evidence, metric, models),
        problems=list(evidence.problems.values()),
        cards=_cards(evidence, models),
        command=reproduce(runs),
        provenance=_provenance(runs),
        links=store.run_links(task, runs["run_id"]),
        runs_link=store.runs_link(task),
    )


def _text(runs: pd.DataFrame, key: str) -> str:
    return ", ".join(dict.fromkeys(str(value) for value in runs[key].dropna()))


def _facts(evidence: Evidence, store: Store) -> dict[str, str]:
    runs = evidence.runs
    names = evidence.classes
    classes = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    n_train, n_val, n_test = (_range(runs[key]) for key in ("n_train", "n_val", "n_test"))
    test = f"{n_test} for the test" if n_test not in ("", "0") else "no test part"
    augmented = "flipped and shifted at random" if runs["augment"].eq(True).all() else "not augmented"
    return {
        "data": f"{_text(runs, 'dataset')}: {_profile(store, runs)}{len(names)} classes ({classes})",
        "protocol": f"{_text(runs, 'protocol')}, {runs['n_splits'].iloc[0]} splits: {n_train} images to train on, "
        f"{n_val} to choose the best epoch, {test}",
        "training": f"AdamW, learning rate {_text(runs, 'lr')}, weight decay {_text(runs, 'weight_decay')}, batches of "
        f"{_text(runs, 'batch_size')}, {augmented}, cosine schedule over at most {_text(runs, 'epochs')} epochs, early "
        f"stopping after {_text(runs, 'patience')} epochs without a lower validation loss, {_text(runs, 'precision')}",
        "hardware": f"{_text(runs, 'hardware')} ({_text(runs, 'device')}, {_text(runs, 'threads')} threads)",
    }


def _range(sizes: pd.Series) -> str:
    """Such as 948, or 947–948 where folds differ."""
    known = sorted(set(sizes.dropna()))
    return "–".join(f"{size:,}" for size in dict.fromkeys(known[:1] + known[-1:]))


def _profile(store: Store, runs: pd.DataFrame) -> str:
    """Number and shape of the images, as far as MLflow holds them."""
    inputs = store.client.get_run(runs["parent_id"].iloc[-1]).inputs
    datasets = inputs.dataset_inputs if inputs else []
    profile = json.loads(datasets[0].dataset.profile or "{}") if datasets else {}
    if not {"images", "shape"} <= set(profile):
        return ""
    return f"{profile['images']:,} images, {'×'.join(map(str, profile['shape']))}, of "


def _embed(name: str, model: str | None, figure: Figure) -> dict[str, str]:
    """The figure as an address that holds the whole file."""
    kind = name.removesuffix(f"_{model}")
    form, mime = ("png", "image/png") if kind in RASTER else ("svg", "image/svg+xml")
    source = f"data:{mime};base64,{base64.b64encode(encode(figure, form)).decode()}"
    caption = f"{model}: {CAPTIONS[kind][0].lower()}{CAPTIONS[kind][1:]}" if model else CAPTIONS[kind]
    return {"name": name, "source": source, "caption": caption, "kind": "model" if model else "comparison"}


def _class_scores(evidence: Evidence, metric: str, models: Sequence[str]) -> pd.DataFrame:
    """F1 of each class (rows) by model (columns), over the predictions of all splits pooled, in per cent."""
    part = predicted_part(metric)
    names = evidence.classes
    columns: dict[str, list[str]] = {}
    for model in models:
        pooled = evidence.pooled(model, part)
        if pooled is None:
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
    """The commands that do these runs again; where a folder of one's own was used, it takes its --data-dir, too."""
    first = runs.iloc[0]
    models = list(dict.fromkeys(runs["model"]))
    options = [f"-m {model}" for model in models if model not in BASELINES]
    options += [f"--{key.replace('_', '-')} {first[key]}" for key in OPTIONS if pd.notna(first[key])]
    options += ["--augment" if runs["augment"].eq(True).all() else "--no-augment"]
    options += [f"--device {str(first['device']).split(':')[0]}"]
    options += ["--sample"] if str(first["dataset"]).startswith(SAMPLE) else []
    options += ["--no-baselines"] if not set(models) & set(BASELINES) else []
    threads = f"OMP_NUM_THREADS={first['threads']} " if pd.notna(first["threads"]) else ""
    command = " ".join([f"{threads}.venv/bin/python experiments/{first['task']}.py", *options])
    return f"git checkout {str(first['git_commit']).removesuffix('-dirty')}\nmake .venv/ready\n{command}"


def _provenance(runs: pd.DataFrame) -> dict[str, list[str]]:
    labels = {
        "commit": "git_commit", "data digest (SHA-256)": "dataset_digest", "source digests": "source_digest",
        "versions": "versions", "split hashes": "split_hash",
    }  # fmt: skip
    times: Any = runs["start_time"].dt.strftime("%Y-%m-%d")
    return {"dates": sorted(set(times))} | {
        label: list(dict.fromkeys(runs[key].dropna().astype(str))) for label, key in labels.items()
    }
