"""Two settings of one model: groups of runs that differ in one param only, compared on the same splits."""

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from analysis.evidence import Evidence, default_metric, predicted_parts
from analysis.groups import ComparisonError, alike_but_for, choose_group, comparison_groups, finished, group_id
from analysis.query import load_runs
from analysis.tables import ResultTable, difference_table
from analysis.tuning import is_tuned, start_of
from tracking import StoreError
from tracking.commands import not_one_of
from tracking.errors import StoreAwayError
from tracking.keys import BASELINES, GROUP_PARAMS, TUNING
from tracking.settings import kind_of

FIELDS = (*GROUP_PARAMS, "device")
NONE = "none"  # shown for a run that lacks the param, such as `tune` of one that is not tuned
NOTHING = "nothing"  # shown for an empty one, such as `pretrained` of fresh weights


def setting_table(
    task: str, field: str, metric: str | None, rope: float, group: str | None = None, tracking_uri: str | None = None
) -> ResultTable:
    """Make the table of pairs of values of a setting, for each network: paired tests on the splits that both have.

    Parameters
    ----------
    task : str
    field : str
        One of `FIELDS`. The runs agree in all others; of a tuned setting the values are results, and what tuning
        started from has to agree. With `tune`, the `space` and the rule of `halving` may differ, too.
    metric, rope
        As for `pairwise_tests`.
    group : str, optional
        The `group_id` of one of the groups; by default the newest complete one that has others to compare it with.
    tracking_uri : str, optional

    Raises
    ------
    ComparisonError
        If the field is unknown, or no network has finished splits under two of its values; and as for
        `pairwise_tests`.

    Notes
    -----
    The family of Holm's adjustment is all pairs of values of all networks. A pair is scored on the same images, split
    by split. Where the setting decides which images are trained on, as `leak_free` does, only a part that is the same
    for both can be compared, such as a published test part.
    """
    check_field(field)
    runs = load_runs([task], tracking_uri)
    groups = _groups(runs, field, group)
    labels = _labels(groups, field)
    named = []
    for each, label in zip(groups, labels, strict=True):
        networks = _networks(each)
        named.append(networks.assign(model=networks["model"] + f" {label}"))
    models = sorted({str(model) for each in groups for model in finished(_networks(each))["model"]})
    there = {str(model) for each in named for model in finished(each)["model"]}
    family = f"pairs of values of {field}"
    pairs = [
        (family, f"{model} {second}", f"{model} {first}")
        for model in models
        for first, second in itertools.combinations(labels, 2)
        if {f"{model} {first}", f"{model} {second}"} <= there
    ]
    if not pairs:
        raise ComparisonError(f"no network has finished splits under two values of {field}")
    compared = {name for _, *names in pairs for name in names}
    together = pd.concat(named, ignore_index=True)
    together = together[together["model"].isin(compared)].reset_index(drop=True)
    evidence = Evidence(together, tracking_uri)
    same_split = together.groupby("split")["split_hash"].nunique().le(1).all()
    if metric is None:
        has_test = together["test/accuracy"].notna().any()
        metric = "test/accuracy" if has_test and not same_split else default_metric(together)
    notes = []
    if not same_split:
        evidence = _paired_by_images(evidence, metric)
        notes.append(
            f"The splits do not hold the same images under all values of {field}; pairs are those whose scored images "
            "are the same, and the training images are part of the difference."
        )
    table = difference_table(evidence, metric, rope, pairs=pairs)
    data = table.data.assign(field=field, group=group_id(groups[0]))
    title = f"{table.title}, by {field}"
    return replace(table, title=title, data=data, notes=[*notes, *table.notes])


def check_field(field: str) -> None:
    """Raise a `ComparisonError` if runs cannot be compared by this."""
    if field not in FIELDS:
        raise ComparisonError(not_one_of(field, FIELDS))


def _networks(group: pd.DataFrame) -> pd.DataFrame:
    return group[~group["model"].isin(BASELINES)]


def _groups(runs: pd.DataFrame, field: str, chosen: str | None) -> list[pd.DataFrame]:
    """Return the groups that differ from one in a field only, that one included, in the order of their values."""
    by_tuning = field in TUNING
    keys = (field,) if not by_tuning else TUNING if field == "tune" else ("space", field)
    comparable = _as_started(runs) if by_tuning else runs
    candidates = [choose_group(runs, chosen)] if chosen else comparison_groups(runs)
    for candidate in candidates:
        alike = alike_but_for(keys, comparable.loc[candidate.index], comparable)
        found = [group for each in alike if not finished(_networks(group := runs.loc[each.index])).empty]
        if len(found) > 1:
            return sorted(found, key=lambda group: (_order(group[field].iloc[0]), group_id(group)))
    shown = f"group {chosen}" if chosen else "any other"
    values = ", ".join(dict.fromkeys(_text(value) for value in runs[field]))
    raise ComparisonError(
        f"no runs differ from {shown} in {field} only (values of {field} in the result database: {values or NONE}); "
        f"run the task again with another {field} and the same options otherwise"
    )


def _as_started(runs: pd.DataFrame) -> pd.DataFrame:
    """Give tuned runs the settings that tuning started from, in place of those that it chose."""
    started = runs.copy()
    for space, of_space in runs[runs["space"].notna()].groupby("space"):
        for key, value in start_of(of_space).items():
            started.loc[runs["space"] == space, key] = value
    return started


def _labels(groups: list[pd.DataFrame], field: str) -> list[str]:
    """Name each group by its value; by all about its tuning where that alone does not tell them apart."""
    values = [group[field].iloc[0] for group in groups]
    shown = [_text(value) for value in values]
    if len(set(shown)) < len(set(values)):  # numbers that six digits do not tell apart
        shown = [repr(float(value)) if isinstance(value, float) else _text(value) for value in values]
    labels = [f"{field}={text}" for text in shown]
    if len(set(labels)) == len(labels):
        return labels
    return [
        " ".join([label, *(f"{key}={_text(group[key].iloc[0])}" for key in TUNING if key != field and is_tuned(group))])
        for label, group in zip(labels, groups, strict=True)
    ]


def _text(value: Any) -> str:
    if pd.isna(value):
        return NONE
    return f"{value:g}" if isinstance(value, float) else kind_of(value) or NOTHING


def _order(value: Any) -> tuple[bool, float, str]:
    """Sort key: missing values, then numbers, then texts."""
    missing = bool(pd.isna(value))
    number = isinstance(value, int | float | np.number | np.bool_)
    return not missing, float(value) if number and not missing else 0.0, "" if number or missing else str(value)


def _paired_by_images(evidence: Evidence, metric: str) -> Evidence:
    """Let the images that a metric scores tell which splits are the same, instead of all images of a split."""
    parts = predicted_parts(metric)
    try:
        scored = [
            [image for part in parts for image in evidence.predictions(run, part).index.tolist()]
            for _, run in evidence.runs.iterrows()
        ]
    except StoreAwayError:
        raise
    except StoreError as error:
        raise ComparisonError(f"which images were scored is not known: {error}") from None
    digests = pd.Series([str(hash(tuple(images))) for images in scored], evidence.runs.index)
    together = evidence.group.assign(split_hash=evidence.group["split_hash"].astype(object))
    together.loc[digests.index, "split_hash"] = digests
    return Evidence(together, evidence.tracking_uri, evidence)
