"""The report: one self-contained HTML page, readable without the program."""

import base64
import dataclasses
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markdown_it import MarkdownIt
from matplotlib.figure import Figure

from analysis.comparison import pairs_of_models
from analysis.evidence import Evidence
from analysis.figures import draw_figures, encode
from analysis.groups import ComparisonError, expected_splits
from analysis.query import local_artifact
from analysis.scores import class_table, whole_table
from analysis.tables import ResultTable, difference_table, score_table, verdict_sentences
from analysis.tuning import how_tuned, is_tuned, settings_of, space_of, start_of
from analysis.tuning_figures import curves_figure, values_figure
from analysis.tuning_tables import chosen_table, curve_table
from tracking import Store, StoreError
from tracking.commands import script_of
from tracking.errors import StoreAwayError
from tracking.keys import BASELINES, MODEL_CARD, SAMPLE, SEEDS
from tracking.settings import LATER, TUNABLE, TYPES

CAPTIONS = {
    "scores_by_split": "Every split's score (points), and the mean over splits with its 95 % interval.",
    "paired_differences": "Differences between networks on each split, their mean with its 95 % interval, and in gray "
    "the region of practical equivalence.",
    "accuracy_against_cost": "The score against its cost. No other network beats one on the step line at its price.",
    "learning_curves": "Loss and accuracy by epoch: thin lines are splits, dots their best epochs; the thick line and "
    "band are mean ± sd as far as all splits were trained.",
    "tuning_curves": "Validation accuracy expected of the best of k configurations, mean ± sd over splits, by number "
    "of configurations and by compute; ×: the task's own configuration.",
    "tuned_values": "Every trial's validation accuracy against the values of its settings.",
    "reliability": "How often the predicted class is right, by its probability: on the dashed line the probabilities "
    "are as good as they say. Dots have the area of their number of images.",
    "confusion": "Confusion matrix over all splits.",
    "most_confused": "The images that were wrong with the most confidence.",
}
RASTER = ("most_confused", "confusion")  # as PNG, which is far smaller there; all others as SVG
METHOD = (
    "Intervals, p and P are from one estimate over the scores of all single images: their variance over images and "
    "within them is known well, that between splits, which share training images, is not, and is integrated out. How "
    "often this errs is in the program's docs/statistics.md."
)
ABOUT_SCORES = (
    "± is the standard deviation over splits, not the uncertainty of the mean, which the interval shows. Micro-F1 "
    "equals accuracy if each image has one label, so it is no second finding."
)
NO_COMPARISON = "A comparison takes two models, one of them a network, so there is none."
# path or address in a sentence, up to the file name
PLACE = re.compile(r"(?<![\w.<])(?:[a-z0-9+]+://[^\s/]*/*|/+(?=\S))(?:[^\s/]+/)*")


@dataclass(frozen=True)
class Drawing:
    """A figure with its caption and its encoded files."""

    name: str  # of its files, without suffix
    model: str | None  # None if it compares models
    figure: Figure
    contents: dict[str, bytes] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """The name without the model, whose own may be changed in that of a file."""
        return next(kind for kind in CAPTIONS if self.name == kind or self.name.startswith(f"{kind}_"))

    @property
    def caption(self) -> str:
        """The caption, with the model in front."""
        text = CAPTIONS[self.kind]
        return f"{self.model}: {text[0].lower()}{text[1:]}" if self.model else text

    @property
    def source(self) -> str:
        """The file as a data URL."""
        form, mime = ("png", "image/png") if self.kind in RASTER else ("svg", "image/svg+xml")
        return f"data:{mime};base64,{base64.b64encode(self.content(form)).decode()}"

    def content(self, form: str) -> bytes:
        """Return the bytes of the `png`, `svg` or `pdf` file, encoded once."""
        if form not in self.contents:
            self.contents[form] = encode(self.figure, form)
        return self.contents[form]


@dataclass(frozen=True)
class Section:
    """The content of the page about one task."""

    task: str
    question: str
    facts: dict[str, str]
    scores: ResultTable
    differences: ResultTable | None
    verdicts: list[str]
    tuning: list[ResultTable]  # choices and tuning curves; empty if nothing was tuned
    figures: list[Drawing]
    problems: list[str]
    further: list[ResultTable]
    cards: list[str]
    command: str
    provenance: dict[str, list[str]]
    links: dict[str, str]
    runs_link: str


def write_report(
    path: Path, chosen: Sequence[tuple[Evidence, str]], store: Store, rope: float, thumbnails: bool = True
) -> None:
    """Write the page about some comparison groups of a store, each with its metric, as an HTML file.

    `rope` is the half-width of the region of practical equivalence in the metric's units. `thumbnails` says whether to
    show pictures of the data.
    """
    page = render_page([describe(evidence, metric, store, rope, thumbnails) for evidence, metric in chosen])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def render_page(sections: Sequence[Section]) -> str:
    """Return the page as HTML, with today's date."""
    folder = Path(__file__).parent
    environment = Environment(loader=FileSystemLoader(folder), autoescape=True, undefined=StrictUndefined)
    values = {
        "made": f"{datetime.now(UTC):%Y-%m-%d}",
        "about_scores": ABOUT_SCORES,
        "method": METHOD,
        "no_comparison": NO_COMPARISON,
    }
    return environment.get_template("report.html.jinja").render(sections=sections, **values)


def describe(
    evidence: Evidence, metric: str, store: Store, rope: float, thumbnails: bool = True, public: bool = False
) -> Section:
    """Gather the content about a task; parameters as for `write_report`, errors as for `comparison_table`.

    With `public` there are no links to a UI and no paths of this machine.
    """
    runs, task = evidence.runs, evidence.task
    scores = score_table(evidence, metric, intervals=public)
    models = list(scores.data["model"])
    differences = None
    if pairs_of_models(evidence, metric):
        differences = difference_table(evidence, metric, rope)
    tuning, figures_of_tuning = _tuning(evidence)
    figures = [Drawing(*drawn) for drawn in draw_figures(evidence, metric, rope, thumbnails)] + figures_of_tuning
    section = Section(
        task=task,
        question=_text(runs, "question"),
        facts=state_facts(evidence, store),
        scores=scores,
        differences=differences,
        verdicts=verdict_sentences(evidence, metric, rope),
        tuning=tuning,
        figures=figures,
        further=_further(evidence, metric),
        problems=[evidence.problems[model] for model in models if model in evidence.problems],
        cards=_cards(evidence, models),
        command=reproduce(runs),
        provenance=_provenance(runs),
        links={} if public else store.run_links(task, runs["run_id"]),
        runs_link="" if public else store.runs_link(task),
    )
    return _without_places(section) if public else section


def _tuning(evidence: Evidence) -> tuple[list[ResultTable], list[Drawing]]:
    """Make tables and figures about tuning, as far as the trials are in the database."""
    if not is_tuned(evidence.group):
        return [], []
    tables = [chosen_table(evidence)]
    try:
        table, curves, trials = curve_table(evidence)
    except ComparisonError as error:
        return [dataclasses.replace(tables[0], notes=[f"No tuning curves: {error}."])], []
    values = values_figure(trials, settings_of(evidence.group))
    drawings = [Drawing("tuning_curves", None, curves_figure(curves)), Drawing("tuned_values", None, values)]
    return [*tables, table], drawings


def _without_places(section: Section) -> Section:
    """Shorten the paths in all sentences to file names."""

    def clean(sentences: Iterable[str]) -> list[str]:
        return [PLACE.sub("", sentence) for sentence in sentences]

    def clean_table(table: ResultTable) -> ResultTable:
        data = table.data
        if "problem" in data:
            data = data.assign(problem=clean(data["problem"]))
        return dataclasses.replace(table, notes=clean(table.notes), data=data)

    scores, differences = clean_table(section.scores), section.differences and clean_table(section.differences)
    return dataclasses.replace(
        section,
        scores=scores,
        differences=differences,
        further=[clean_table(table) for table in section.further],
        verdicts=clean(section.verdicts),
        problems=clean(section.problems),
    )


def _text(runs: pd.DataFrame, key: str) -> str:
    return ", ".join(dict.fromkeys(str(value) for value in runs[key].dropna()))


def state_facts(evidence: Evidence, store: Store) -> dict[str, str]:
    """State data, protocol, training and hardware of a group, one text each."""
    runs = evidence.runs
    names = evidence.classes
    classes = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    n_train, n_val, n_test = (_range(runs[key]) for key in ("n_train", "n_val", "n_test"))
    test = f"{n_test} for the test" if n_test not in ("", "0") else "no test part"
    leak_free = runs["leak_free"].eq(True).all()
    leaks = "; near duplicates stay together, and none of a test image is trained on" if leak_free else ""
    tuned = settings_of(evidence.group) if is_tuned(evidence.group) else []
    values = {key: "tuned" if key in tuned else _text(runs, key) for key in TUNABLE}
    augmented = "flipped and shifted at random" if runs["augment"].eq(True).all() else "not augmented"
    augmented = "augmented or not as tuned" if "augment" in tuned else augmented
    return {
        "data": f"{_text(runs, 'dataset')}: {_profile(store, runs)}{len(names)} classes ({classes})",
        "protocol": f"{_text(runs, 'protocol')}, {_splits(evidence.group)}: {n_train} images to train on, "
        f"{n_val} to choose the best epoch, {test}{leaks}",
        "training": f"AdamW, learning rate {values['lr']}, weight decay {values['weight_decay']}, batches of "
        f"{values['batch_size']}, {augmented}, cosine schedule over at most {_text(runs, 'epochs')} epochs, early "
        f"stopping after {_text(runs, 'patience')} epochs without a lower validation loss, {_text(runs, 'precision')}"
        f"{_beginning(runs)}",
        **({"tuning": f"on each split, the best of {how_tuned(evidence.group)}"} if tuned else {}),
        "hardware": f"{_text(runs, 'hardware')} ({_text(runs, 'device')}, threads: {_text(runs, 'threads')})",
    }


def _splits(group: pd.DataFrame) -> str:
    folds, total = int(group["n_splits"].max()), expected_splits(group)
    return f"{total // folds} × {folds} splits" if total > folds else f"{total} splits"  # only folds are repeated


def _beginning(runs: pd.DataFrame) -> str:
    pretrained = any(runs["pretrained"])
    return "; from pretrained weights" * pretrained + "; heads only" * bool(runs["freeze"].any())


def _range(sizes: pd.Series) -> str:
    known = sorted(set(sizes.dropna()))
    return "–".join(f"{size:,}" for size in dict.fromkeys(known[:1] + known[-1:]))


def _profile(store: Store, runs: pd.DataFrame) -> str:
    """Return number and shape of the images if the store has them."""
    inputs = store.client.get_run(runs["parent_id"].iloc[-1]).inputs
    datasets = inputs.dataset_inputs if inputs else []
    profile = json.loads(datasets[0].dataset.profile or "{}") if datasets else {}
    if not {"images", "shape"} <= set(profile):
        return ""
    return f"{profile['images']:,} images, {'×'.join(map(str, profile['shape']))}, of "


def _further(evidence: Evidence, metric: str) -> list[ResultTable]:
    """Make the tables of other scores, of all classes together and of each; none where no predictions are kept."""
    part = metric.partition("/")[0]
    try:
        return [whole_table(evidence, part), class_table(evidence, part)]
    except StoreAwayError:
        raise
    except (ComparisonError, StoreError):
        return []


def _cards(evidence: Evidence, models: Sequence[str]) -> list[str]:
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
    """Return the commands that repeat the runs; data from another folder also need its --data-dir."""
    first = runs.iloc[0]
    models = list(dict.fromkeys(runs["model"]))
    options = [f"-m {model}" for model in models if model not in BASELINES]
    hidden = {*SEEDS, *LATER}  # older commits lack the options that came later
    values = {**first, **(start_of(runs) if is_tuned(runs) else {})}
    options += [
        _option(key, values[key]) for key in ("n_splits", *TYPES) if key not in hidden and pd.notna(values[key])
    ]
    one_seed = first[SEEDS[0]] == first[SEEDS[1]]  # an option that older commits have, too
    options += [f"--seed {first[SEEDS[0]]}"] if one_seed else [_option(key, first[key]) for key in SEEDS]
    if first["pretrained"]:
        options += ["--pretrained" if first["pretrained"].startswith("library") else "--weights FILE"]
    options += [_option(key, True) for key in ("freeze", "cudnn_benchmark") if first[key]]
    if is_tuned(runs):
        options += [f"--tune {runs['tune'].max()}", *(f"--space {part}" for part in space_of(runs).split())]
        options += ["--no-halving"] if runs["halving"].eq(False).any() else []
    options += [f"--seeds {runs['replicate'].max() + 1}"] if runs["replicate"].max() > 0 else []
    options += [_option("repetitions", runs["repetitions"].max())] if runs["repetitions"].notna().any() else []
    options += ["--leak-free"] if runs["leak_free"].eq(True).all() else []
    options += ["--sample"] if str(first["dataset"]).startswith(SAMPLE) else []
    options += ["--no-baselines"] if not set(models) & set(BASELINES) else []
    threads = f"OMP_NUM_THREADS={first['threads']} " if pd.notna(first["threads"]) else ""
    command = " ".join([f"{threads}.venv/bin/python {script_of(first['task'])}", *options])
    commit = runs.sort_values("start_time")["git_commit"].iloc[-1]  # runs may have been extended by a later option
    return f"git checkout {str(commit).removesuffix('-dirty')}\nmake .venv/ready\n{command}"


def _option(key: str, value: Any) -> str:
    name = key.replace("_", "-")
    if TYPES.get(key) is bool:
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name} {str(value).split(':')[0] if key == 'device' else value}"


def _provenance(runs: pd.DataFrame) -> dict[str, list[str]]:
    labels = {
        "commit": "git_commit", "data digest (SHA-256)": "dataset_digest", "source digests": "source_digest",
        "versions": "versions", "split hashes": "split_hash",
    }  # fmt: skip
    times: Any = runs["start_time"].dt.strftime("%Y-%m-%d")
    return {"dates": sorted(set(times))} | {
        label: list(dict.fromkeys(runs[key].dropna().astype(str))) for label, key in labels.items()
    }
