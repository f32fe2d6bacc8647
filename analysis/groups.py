"""Comparison groups: the runs that may be in one table, and the warnings that belong to it."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from tracking.keys import BASELINES, GROUP_PARAMS, IDENTITY, SAMPLE, TUNING, has_open_end, tuned_settings
from tracking.settings import LATER, TUNABLE, kind_of

NEEDED = ("model", "split", "n_splits", "n_train", "n_val")  # a run without one of these is ignored


class ComparisonError(ValueError):
    """The requested comparison is impossible; the message is one sentence for the user."""


def comparison_groups(runs: pd.DataFrame) -> list[pd.DataFrame]:
    """Divide runs into comparison groups: same task, data, protocol, seed, configuration, precision, kind of device.

    Parameters
    ----------
    runs : pandas.DataFrame
        From `load_runs`.

    Returns
    -------
    list of pandas.DataFrame
        Rows of `runs`, one frame a group: complete groups first, then those with a result, then the rest, each newest
        first. Runs without one of the `NEEDED` values, such as one killed at its start, are left out.
    """
    runs = runs.dropna(subset=list(NEEDED))
    if runs.empty:
        return []
    places: dict[tuple[str, ...], list[int]] = {}
    for place, key in enumerate(_keys(runs)):
        places.setdefault(key, []).append(place)
    groups = [runs.iloc[rows] for rows in places.values()]
    groups.sort(key=lambda group: group["start_time"].max(), reverse=True)
    return sorted(groups, key=lambda group: (not is_complete(group), finished(group).empty))  # stable


def expected_splits(group: pd.DataFrame) -> int:
    """Return the splits of each model that were asked for: all folds of all repetitions, or all holdouts."""
    return int((group["n_splits"] * group["repetitions"].fillna(1)).max())


def finished(group: pd.DataFrame) -> pd.DataFrame:
    """Return the runs with a result; of a replicate of a split that was trained again, the newest."""
    done = group[group["status"] == "FINISHED"].sort_values("start_time", kind="stable")
    done = done[~done["superseded_by"].isin(done["run_id"])]  # the newer one may have been deleted
    return done.drop_duplicates(list(IDENTITY), keep="last")


def is_complete(group: pd.DataFrame) -> bool:
    """Whether two networks, or the only one, have all their splits.

    Requiring it of every model would let one that has just started hide the results of the others.
    """
    networks = group[~group["model"].isin(BASELINES)]
    done = finished(networks).groupby("model")["split"].nunique()
    complete = int((done >= expected_splits(group)).sum())
    return complete > 0 and complete >= min(2, networks["model"].nunique())


def group_id(group: pd.DataFrame) -> str:
    """Return 8 hexadecimal digits that identify a group: a digest of the values its runs have in common."""
    return hashlib.sha256("\n".join(_keys(group.head(1))[0]).encode()).hexdigest()[:8]


def _keys(runs: pd.DataFrame) -> list[tuple[str, ...]]:
    """Return for each run, as text, the values that comparable runs have in common."""
    common = runs.assign(n_splits=runs["n_splits"].astype("str").mask(runs["protocol"].map(has_open_end), ""))
    common = common.assign(**_without_tuned(runs))
    columns = [runs["task"], runs["dataset_digest"], runs["device"].map(kind_of)]
    columns += [common[key] for key in GROUP_PARAMS if key not in (*LATER, *TUNING)]
    keys: list[tuple[str, ...]] = list(zip(*(map(str, column) for column in columns), strict=True))
    # at the end and only where they are set, so that a group keeps its id when a setting is added
    usual = {**LATER, **dict.fromkeys(TUNING)}
    later = [
        [f"{key} {kind_of(value)}" if pd.notna(value) and value != usual[key] else "" for value in common[key]]
        for key in usual
    ]
    return [(*key, *filter(None, own)) for key, own in zip(keys, zip(*later, strict=True), strict=True)]


def _without_tuned(runs: pd.DataFrame) -> dict[str, "pd.Series[Any]"]:
    """The settings that may be tuned, as text: `tuned` where they were, since their values are results there."""
    names = [tuned_settings({"space": space}) for space in runs["space"]]
    tuned = {key: np.array([key in each for each in names]) for key in TUNABLE}
    return {key: runs[key].astype("str").mask(tuned[key], "tuned") for key in TUNABLE}


def alike_but_for(key: str | Sequence[str], group: pd.DataFrame, runs: pd.DataFrame) -> list[pd.DataFrame]:
    """Return the comparison groups in `runs` that agree with `group`, itself included, in all params but `key`.

    `key` may be several params. A tuned setting has one value, unless `space` is among them.
    """
    left_out = dict.fromkeys([key] if isinstance(key, str) else key, "")
    wanted = _keys(group.head(1).assign(**left_out))
    return [other for other in comparison_groups(runs) if _keys(other.head(1).assign(**left_out)) == wanted]


def choose_group(
    runs: pd.DataFrame, chosen: str | None = None, wanted: Callable[[pd.DataFrame], bool] | None = None
) -> pd.DataFrame:
    """Return the comparison group with the `group_id` chosen, by default the newest complete one.

    The default is the first that is `wanted`, if there is one.

    Raises
    ------
    ComparisonError
        If there is no such group, or it has no finished run.
    """
    groups = comparison_groups(runs)
    if chosen is not None:
        names = {group_id(group): group for group in groups}
        if chosen not in names:
            raise ComparisonError(f"there is no comparison group {chosen!r}; there are {', '.join(names) or 'none'}")
        groups = [names[chosen]]
    elif wanted is not None:
        groups = [group for group in groups if wanted(group)] or groups
    if not groups or finished(groups[0]).empty:
        raise ComparisonError("no split has finished yet")
    return groups[0]


def list_groups(runs: pd.DataFrame, shown: pd.DataFrame) -> list[str]:
    """Describe the groups other than `shown`, one line each: id, date, differences from it, splits done."""
    lines = []
    reference = _setting(shown)
    for group in comparison_groups(runs):
        setting = _setting(group)
        if group_id(group) == group_id(shown):
            continue
        differs = [f"{key} {value}" for key, value in setting.items() if value != reference[key]]
        done = finished(group).drop_duplicates(["model", "split"])
        expected = group["model"].nunique() * expected_splits(group)
        date = group["start_time"].max().strftime("%Y-%m-%d %H:%M")
        lines.append(f"{group_id(group)}  {date}  {', '.join(differs)}; {len(done)} of {expected} splits done")
    return lines


def _setting(group: pd.DataFrame) -> dict[str, str]:
    """The values that define a group, for display."""
    first = group.iloc[0]
    short = {"dataset_digest": str(first["dataset_digest"])[:8], "device": kind_of(first["device"])}
    values = {key: str(first[key]) if pd.notna(first[key]) else "none" for key in GROUP_PARAMS} | {
        "n_splits": str(group["n_splits"].max())
    }
    values |= {key: text.iloc[0] for key, text in _without_tuned(group.head(1)).items()}
    return {"dataset": first["dataset"], **short, **values, "pretrained": kind_of(first["pretrained"]) or "nothing"}


def what_is_wrong(group: pd.DataFrame) -> list[str]:
    """Return the warnings that belong to a group's table, one sentence each."""
    done = finished(group)
    notes = []
    if str(group["dataset"].iloc[0]).startswith(SAMPLE):
        notes.append("These are generated images: the scores say nothing about the real task.")
    expected = expected_splits(group)
    for model, splits in group.groupby("model"):
        there = set(done.loc[done["model"] == model, "split"])
        if len(there) < expected:
            failures = splits[splits["failure"].notna() & ~splits["split"].isin(list(there))]
            reasons = failures.groupby("split")["failure"].last()
            left = [number for number in range(expected) if number not in there]
            unknown = ", ".join(str(number) for number in left if number not in reasons)
            why = [f"split {number} failed: {reasons[number]}" for number in left if number in reasons]
            why += [f"not done yet: {unknown}"] if unknown else []
            notes.append(f"{model} has {len(there)} of {expected} splits; {'; '.join(why)}.")
        trained = done[done["model"] == model].groupby("split").size()
        if trained.nunique() > 1:
            fewer = ", ".join(str(number) for number in trained.index[trained < trained.max()])
            notes.append(f"{model} was trained {trained.max()} times on a split, and less often on {fewer}.")
    for split, count in done.groupby("split")["split_hash"].nunique().items():
        if count > 1:
            notes.append(f"Models were not scored on the same images in split {split}; they cannot be compared.")
    notes += _leaks(done) + _pretrained(done)
    shared = done["source_digest"].astype("str").str.split("-").str[0]
    if shared.nunique() > 1 or done.groupby("model")["source_digest"].nunique().gt(1).any():
        notes.append("Not all of these runs were made by the same version of the code.")
    return notes


def _pretrained(done: pd.DataFrame) -> list[str]:
    """Say which networks have seen other images, and which learned with their heads alone."""
    networks = done[~done["model"].isin(BASELINES)]
    notes = []
    began = {
        str(model): sorted(set(weights)) for model, weights in networks.groupby("model")["pretrained"] if any(weights)
    }
    if began:
        names = "; ".join(f"{model} ({' and '.join(weights)})" for model, weights in began.items())
        notes.append(f"These networks have seen other images before: they began with pretrained weights: {names}.")
    mixed = [model for model, weights in began.items() if len(weights) > 1]
    notes += [f"Not all splits of {model} began with the same weights." for model in mixed]
    if networks["freeze"].any():
        notes.append("Only the heads of these networks were trained; all other layers kept their first weights.")
    return notes


def _leaks(done: pd.DataFrame) -> list[str]:
    """Warn of scored images with a near duplicate in the training part; counts are means over the splits."""
    splits = done.groupby("split")[["leaking_images", "leaking_test", "n_val", "n_test"]].max()
    leaking = {"test": splits["leaking_test"], "validation": splits["leaking_images"] - splits["leaking_test"]}
    sizes = {"test": splits["n_test"], "validation": splits["n_val"]}
    counts = {part: count for part, count in leaking.items() if count.max() > 0}
    found = [f"{count.mean():.3g} of {sizes[part].mean():,.0f} {part} images" for part, count in counts.items()]
    sentence = (
        f"Scores are a little too good: a near duplicate of {' and '.join(found)} (mean over splits) was trained on; "
        "--leak-free keeps them apart."
    )
    return [sentence] if found else []
