"""Choosing the champion of a task, its best network so far, and registering it."""

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

import analysis
import tracking
from analysis.comparison import ROPE
from analysis.formats import markdown_text
from analysis.groups import expected_splits, group_id, what_is_wrong
from analysis.report import state_facts
from analysis.tables import PART_NAMES, baselines_not_beaten, interval, number, verdict_sentences
from datasets import ImageData
from experiments.champion.export import export
from experiments.task import Task
from tracking import Store, registry, score_of
from tracking.keys import BASELINES, SAMPLE
from tracking.registry import Champion
from tracking.store import prefixed

SHOWN_CLASSES = 20  # in a description
CARD = "README.md"  # of the registered model: its model card, where hubs of models look for it
HEADER = "---\npipeline_tag: image-classification\nlibrary_name: pytorch\nmetrics: [accuracy, f1]\n---\n"
LONGEST_TEXT = 5000  # characters of one that the registry takes
REASONS = (  # of the places of `_rank`
    "real data before generated images",
    "a whole protocol before a reduced",
    "the published parts before leak-free ones",
)


def crown(store: Store, task: Task, data: ImageData, runs: pd.DataFrame, evidence: analysis.Evidence) -> str:
    """Register the best network of a comparison group as the task's champion, unless the present one stays.

    Of the networks with all their splits the one with the best mean test score is taken (validation score without a
    test part), with the weights of its best split, if it beats a baseline that ran beside it. Within a group the better
    replaces the worse; otherwise real data replace the sample, then a whole protocol a reduced one (fewer splits,
    epochs or patience than the task has), then the published parts those without near duplicates (`--leak-free`), and
    else the newer the older.

    Parameters
    ----------
    store, task, data, runs
        `runs` are all of the task, from `load_runs`.
    evidence : Evidence
        Of the group.

    Returns
    -------
    str
        The champion now and, if it is of another group, why it stays; empty if no network of this group has all its
        splits.

    Raises
    ------
    StoreError
        The model cannot be exported, or other source than this one gave its scores.
    """
    metric = "test/accuracy" if evidence.group["test/accuracy"].notna().any() else "best_val/accuracy"
    whole = {key: getattr(task.protocol, key) for key in ("n_splits", "repetitions")}
    whole |= {key: getattr(task.training, key) for key in ("epochs", "patience")}
    with store.scratch() as scratch:
        folder = Path(scratch)
        while (best := best_split(evidence, metric)) is not None:
            run_id = str(best["run_id"])
            held = tracking.persist(lambda: registry.read_champion(store, task.name))
            stays, reason = decide(whole, runs, evidence, metric, best, held)
            if held is not None and stays:
                if held.run_id == run_id:  # other models may have come since, and its description be out of date
                    text = describe(store, evidence, metric, best, data, held.reason)
                    tracking.persist(partial(registry.describe_champion, store, task.name, held, text))
                champion = _title(runs[runs["run_id"] == held.run_id].iloc[0])
                which = f"{champion}, version {held.version} of models:/{prefixed(task.name)}"
                return f"{which}; {reason}" if reason else which
            text = describe(store, evidence, metric, best, data, reason)
            if not (folder / run_id).exists():
                export(folder / run_id, store, best, data)
            (folder / run_id / CARD).write_text(f"{HEADER}\n{text}\n", encoding="utf-8")
            with store.lock():  # another command of the task may have ended since the runs were read
                now = tracking.persist(lambda: registry.read_champion(store, task.name))
                runs = tracking.persist(lambda: analysis.load_runs([task.name], store.uri))
                own = group_id(evidence.group)
                group = next(group for group in analysis.comparison_groups(runs) if group_id(group) == own)
                evidence = analysis.Evidence(group, store.uri, evidence)
                again = best_split(evidence, metric)
                if now == held and again is not None and again["run_id"] == run_id:
                    made = registry.NewVersion(run_id, str(best["model"]), folder / run_id, task.question, text, reason)
                    version = tracking.persist(partial(registry.register_champion, store, task.name, made))
                    return f"{_title(best)}, version {version} of models:/{prefixed(task.name)}"
    return ""


def best_split(evidence: analysis.Evidence, metric: str) -> "pd.Series[Any] | None":
    """The best run of the best network with all its splits; None if there is none, or it beats no baseline."""
    networks = evidence.runs[~evidence.runs["model"].isin(BASELINES)]
    scored = networks[networks[metric].notna()].groupby("model")
    scores = scored.agg(mean=(metric, "mean"), splits=("split", "nunique"))
    complete = scores[scores["splits"] >= expected_splits(evidence.group)]
    if complete.empty:
        return None
    sign = score_of(metric).sign
    baselines = evidence.runs[evidence.runs["model"].isin(BASELINES)].groupby("model")[metric].mean()
    if not baselines.empty and (sign * complete["mean"]).max() <= (sign * baselines).min():
        return None
    of_best = networks[networks["model"] == (sign * complete["mean"]).idxmax()].sort_values("split")
    row: pd.Series[Any] = of_best.iloc[int((sign * of_best[metric]).argmax())]
    return row


def decide(
    whole: Mapping[str, int],
    runs: pd.DataFrame,
    evidence: analysis.Evidence,
    metric: str,
    best: "pd.Series[Any]",
    held: Champion | None,
) -> tuple[bool, str]:
    """Decide whether the registered champion stays.

    Parameters
    ----------
    whole : mapping of str to int
        The least `n_splits`, `repetitions`, `epochs` and `patience` of a whole protocol.
    runs : pandas.DataFrame
        All runs of the task.
    evidence : Evidence
        Of the group that `best` is of.
    metric : str
        By which networks are ranked.
    best : pandas.Series
        The best run of the best network.
    held : Champion or None
        What is registered.

    Returns
    -------
    stays : bool
    reason : str
        Empty if the champion is the best of its group.
    """
    if held is None:
        return False, "there was none before"
    former = f"version {held.version}"
    if not held.has_files:
        return False, f"the files of {former} are gone"
    groups = analysis.comparison_groups(runs)
    group = next((group for group in groups if group["run_id"].eq(held.run_id).any()), None)
    if group is None:
        return False, f"the run of {former} was deleted"
    if group_id(group) == group_id(evidence.group):
        better = _better_than(evidence, metric, best, held)
        return not better, better
    ours, theirs = _rank(evidence.group, whole), _rank(group, whole)
    if ours != theirs:
        first = next(place for place, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
        return ours < theirs, REASONS[first]
    model = group.loc[group["run_id"] == held.run_id, "model"].iloc[0]
    newer = evidence.of(best["model"])["end_time"].max() > group.loc[group["model"] == model, "end_time"].max()
    return not newer, f"it is newer than {former}, and they differ in settings or data" if newer else "it is newer"


def _better_than(evidence: analysis.Evidence, metric: str, best: "pd.Series[Any]", held: Champion) -> str:
    """Why the best replaces a champion of the same comparison group; empty if it does not."""
    former = evidence.runs[evidence.runs["run_id"] == held.run_id]
    if former.empty:
        return f"the split of version {held.version} was trained again"
    row = former.iloc[0]
    score = score_of(metric).label
    if best["model"] == row["model"]:
        ours, theirs, what = best[metric], row[metric], f"{score} on its split"
    else:
        ours, theirs = (evidence.of(model)[metric].mean() for model in (best["model"], row["model"]))
        what = f"mean {score}"
    if score_of(metric).sign * (ours - theirs) <= 0:
        return ""
    against = f"that of {_title(row)} (version {held.version}) was {number(theirs, metric)} %"
    return f"its {what} is {number(ours, metric)} %, {against}"


def _rank(group: pd.DataFrame, whole: Mapping[str, int]) -> tuple[bool, bool, bool]:
    """Whether a group is of real data, is a whole protocol (no setting is smaller than there), and is not leak-free."""
    group = group.assign(repetitions=group["repetitions"].fillna(1))
    first = group.iloc[0]
    is_real = not str(first["dataset"]).startswith(SAMPLE)
    # a group may have been extended to more splits
    is_whole = all(pd.notna(first[key]) and group[key].max() >= value for key, value in whole.items())
    return is_real, is_whole, not first["leak_free"]


def _title(row: "pd.Series[Any]") -> str:
    return f"{row['model']}, split {row['split']}"


def _depth_lines(data: ImageData) -> list[str]:
    """Say how pictures of more than 8 bits a channel became the input: a server takes no others."""
    scale = "round(255 (x - {low:g}) / ({high:g} - {low:g})), cut off at 0 and 255"
    return [
        f"- {kind.capitalize()} of 16 or 32 bits a channel, x, became {scale.format(low=low, high=high)}; convert "
        "yours likewise."
        for kind, (low, high) in data.depth.items()
    ]


def describe(
    store: Store, evidence: analysis.Evidence, metric: str, best: "pd.Series[Any]", data: ImageData, reason: str
) -> str:
    """Describe the registered version to its users, in Markdown: a model card (Mitchell et al. 2019)."""
    model, part = str(best["model"]), metric.split("/")[0]
    what = f"{score_of(metric).label}, {PART_NAMES[part]}"
    estimate = evidence.estimate(metric, model)
    ends = interval(estimate.low, estimate.high, metric, " to ")
    networks = evidence.runs.loc[~evidence.runs["model"].isin(BASELINES), "model"].nunique()
    height, width, channels = data.images.shape[1:]
    classes = ", ".join(map(markdown_text, data.classes[:SHOWN_CLASSES]))
    verdicts = [text for text in verdict_sentences(evidence, metric, ROPE) if _names(text, model)]
    verdicts += [text for name, text in baselines_not_beaten(evidence, metric).items() if name == model]
    facts = [f"- {name.capitalize()}: {markdown_text(fact)}." for name, fact in state_facts(evidence, store).items()]
    lines = [
        f"**{_title(best)}** of {best['task']}: {best['question']} Why it is the champion: {reason}.",
        "### Use",
        f"- Input: images of uint8, shape (N, {height}, {width}, {channels}), 0 to 255. Output: probabilities of "
        f"{classes}{', ...' if len(data.classes) > SHOWN_CLASSES else ''}, in this order.",
        *_depth_lines(data),
        "### Data and training",
        *facts,
        f"- Run `{best['run_id']}`, comparison group `{group_id(evidence.group)}`, data `{best['dataset_digest']}`.",
        "### Scores",
        f"- {what}: {number(estimate.mean, metric)} % in the mean over {estimate.n} splits"
        f"{f' (95 % interval {ends} %)' if ends else ''}, {number(best[metric], metric)} % in this split. This very "
        f"score chose it, from all splits of {networks} network{'s' if networks != 1 else ''}: expect a little less on "
        "other images.",
        *(f"- {markdown_text(sentence)}" for sentence in verdicts),
        "### Limits",
        "- It knows only its classes, and answers with one of them whatever is on the picture.",
        *(f"- {markdown_text(sentence)}" for sentence in what_is_wrong(evidence.group)),
    ]
    return "\n\n".join(lines)[:LONGEST_TEXT]


def _names(sentence: str, model: str) -> bool:
    """Whether a sentence names the model, and not one whose name it is a part of."""
    return re.search(rf"(?<![\w.:/-]){re.escape(model)}(?![\w:/-]|\.\w)", sentence) is not None
