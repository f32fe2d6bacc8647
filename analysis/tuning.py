"""Tuned models: the choice on each split, and the expected score of the best of k configurations."""

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from analysis.evidence import Evidence
from analysis.groups import ComparisonError
from analysis.query import load_runs
from tracking import UnknownTaskError
from tracking.keys import BASELINES, IDENTITY, STOPPED, is_divergence, trials_of, tuned_settings
from tracking.settings import COMPARED, TUNABLE, TYPES

METRIC = "best_val/accuracy"  # a trial has no test score: no test image may choose
CHOSEN_BY = "best_val/loss"


def is_tuned(group: pd.DataFrame) -> bool:
    """Whether the networks of a comparison group were tuned."""
    return bool(group["tune"].notna().any())


def space_of(group: pd.DataFrame) -> str:
    """The space of a tuned group, such as `lr=0.0001..0.01 augment=true,false`."""
    return _space(_text_of_space(group))


def start_of(group: pd.DataFrame) -> dict[str, Any]:
    """The values that the tuned settings of a group have in trial 0."""
    start = _text_of_space(group).partition(" from ")[2]
    pairs = (part.partition("=") for part in start.split())
    return {key: text == "true" if TYPES[key] is bool else TYPES[key](text) for key, _, text in pairs}


def _text_of_space(group: pd.DataFrame) -> str:
    if not is_tuned(group):
        raise ComparisonError("no model of this comparison group was tuned; train with --tune N, or name a --group")
    return str(group["space"].dropna().iloc[0])


def _space(text: str) -> str:
    return text.partition(" from ")[0]


def settings_of(group: pd.DataFrame) -> list[str]:
    """The settings that were tuned in a group, in the order of `TrainingConfig`."""
    tuned = tuned_settings({"space": space_of(group)})
    return [key for key in TUNABLE if key in tuned]


def chosen_configurations(evidence: Evidence) -> pd.DataFrame:
    """Count how often each configuration was chosen.

    Returns
    -------
    pandas.DataFrame
        A row a model and configuration, the most frequent first: `model`, `chosen_trial` (its number), the tuned
        settings, and `splits`, the number of splits (and seeds) that chose it.
    """
    runs = evidence.runs[evidence.runs["chosen_trial"].notna()]
    keys = ["model", "chosen_trial", *settings_of(evidence.group)]
    counts = runs.groupby(keys, dropna=False, observed=True).size().rename("splits").reset_index()
    return counts.sort_values(["model", "splits", "chosen_trial"], ascending=[True, False, True], ignore_index=True)


def how_tuned(group: pd.DataFrame) -> str:
    """Describe the tuning of a group in a clause: number of trials, space, and the trials that stopped early."""
    stops = ", the worse ones stopped early" if group["halving"].eq(True).any() else ""
    return f"{group['tune'].max()} configurations of {space_of(group)}{stops}"


def chosen_sentence(evidence: Evidence) -> str:
    """Say in one line that a group was tuned, and which numbers were chosen how often."""
    chosen = chosen_configurations(evidence)
    models = []
    for model, rows in chosen.groupby("model"):
        counts = [f"{number} on {count}" for number, count in zip(rows["chosen_trial"], rows["splits"], strict=True)]
        models.append(f"{model} number {', '.join(counts)}")
    return f"Tuned on each split: {how_tuned(evidence.group)}. Chosen, and on how many splits: {'; '.join(models)}."


def load_trials(evidence: Evidence) -> tuple[pd.DataFrame, list[str]]:
    """Read the trials of the tuned splits in a comparison group.

    Returns
    -------
    trials : pandas.DataFrame
        A row a trial, ordered by model, split, replicate and trial, with the columns of `load_runs` and: `loss` that it
        was judged by (infinite if it diverged), `score` (accuracy on the validation part, 0 in that case), `chosen`,
        and `spent`, the multiply-accumulates of its epochs.
    problems : list of str
        A sentence for each split without all of its trials, which is left out.

    Raises
    ------
    ComparisonError
        If the models of the group were not tuned, or no split has all of its trials.

    Notes
    -----
    A trial belongs to a split by its settings, data and source. The run that it was made for does not tell: more trials
    of the same space take over those that are there, and trial 0 is the same in every space that starts with it.
    """
    tuned = settings_of(evidence.group)
    runs = evidence.runs[~evidence.runs["model"].isin(BASELINES)]
    try:
        stored = load_runs([trials_of(evidence.task)], evidence.tracking_uri)
    except UnknownTaskError:
        raise ComparisonError(f"the trials of {evidence.task} are not in this result database") from None
    same = [*IDENTITY, "split_hash", "dataset_digest", "source_digest", "threads"]
    same += [key for key in COMPARED if key not in tuned]
    of_split = runs[[*same, "run_id", "tune", "chosen_trial"]]
    found = of_split.merge(stored[stored["status"] == "FINISHED"], on=same, suffixes=("_of_split", ""))
    tasks_runs = load_runs([evidence.task], evidence.tracking_uri).set_index("run_id")
    spaces = tasks_runs["space"]
    start = start_of(evidence.group)
    in_space = found["parent_id"].map(spaces).dropna().map(_space).eq(space_of(evidence.group)).reindex(found.index)
    starts = (found[list(start)] == pd.Series(start)).all(axis=1)
    found = found[np.where(found["trial"] == 0, starts, in_space.eq(True)) & found["trial"].lt(found["tune_of_split"])]
    found = found.assign(own=found["parent_id"].eq(found["run_id_of_split"]))
    found = found.sort_values(["own", "start_time"], kind="stable")
    found = found.drop_duplicates([*IDENTITY, "trial"], keep="last").sort_values([*IDENTITY, "trial"])
    counts = found.groupby(list(IDENTITY)).size()
    there = np.array([counts.get(tuple(identity), 0) for identity in runs[list(IDENTITY)].to_numpy().tolist()], int)
    problems = [
        f"Left out: {row['model']} on split {row['split']} has {count} of {row['tune']} trials."
        for (_, row), count in zip(runs.iterrows(), there, strict=True)
        if count < row["tune"]
    ]
    alike = tasks_runs["space"].isin(runs["space"]) & tasks_runs["model"].isin(runs["model"])
    if runs["halving"].eq(True).any() and (alike & tasks_runs["halving"].eq(False)).any():
        problems.append("A run with --no-halving trained some of these trials on: they count as trained in full.")
    complete = found.groupby(list(IDENTITY))["trial"].transform("size").eq(found["tune_of_split"])
    found = found[complete].reset_index(drop=True)
    if found.empty:
        raise ComparisonError("no split of this comparison group has all of its trials in the result database")
    # forward and backward of a training image cost three times a forward pass
    passes = (3 * found["n_train"] + found["n_val"]) * found["epochs_run"].fillna(0)
    diverged = found[STOPPED].fillna("").map(is_divergence)
    trials = found.assign(
        loss=found[CHOSEN_BY].mask(diverged, math.inf).fillna(math.inf),
        score=found[METRIC].mask(diverged, 0.0).fillna(0.0),
        chosen=found["trial"].eq(found["chosen_trial_of_split"]).fillna(False).astype(bool),
        spent=(passes * found["macs"]).astype(float),
    )
    return trials.drop(columns=[column for column in trials if str(column).endswith("_of_split")]), problems


@functools.cache
def _chances(n: int) -> np.ndarray:
    """Probability that the trial of rank r is the best of k out of n, shape (n, n): k - 1 in rows, r in columns."""
    # without replacement; with it the best of k is too low (findings/opda_average_tuning_curve.sh)
    rows = [[math.comb(n - 1 - rank, k - 1) / math.comb(n, k) for rank in range(n)] for k in range(1, n + 1)]
    return np.array(rows)


def expected_best(losses: ArrayLike, scores: ArrayLike) -> np.ndarray:
    """Expected score of the best of k trials, drawn from n without replacement.

    The best one is that with the lowest loss, of equal ones the first. It is number r by loss, from 0, with the
    probability C(n-1-r, k-1) / C(n, k): it is drawn, and the k - 1 others are all among those behind it. The result is
    the mean over all subsets of k trials, which estimates the expectation without bias.

    Parameters
    ----------
    losses, scores : array_like of float, shape (n,)
        By which a trial is chosen, and which it gets then; the loss may be infinite.

    Returns
    -------
    numpy.ndarray of float64, shape (n,)
        For k = 1 to n.

    References
    ----------
    Tang, Lee, Li, Xin, Lin (2020). Showing Your Work Doesn't Always Work. ACL 2020, 2766-2772.
    """
    loss, score = np.asarray(losses, np.float64), np.asarray(scores, np.float64)
    if loss.ndim != 1 or loss.shape != score.shape or not len(loss):
        raise ValueError("losses and scores must be two equally long arrays, not empty")
    if np.isnan(loss).any() or not np.isfinite(score).all():
        raise ValueError("a loss is not a number, or a score is not finite")
    expected: np.ndarray = _chances(len(loss)) @ score[np.argsort(loss, kind="stable")]
    return expected


@dataclass(frozen=True)
class TuningCurve:
    """The expected score of a model after k configurations, by split."""

    model: str
    scores: pd.DataFrame  # splits in rows, k = 1, 2, ... in columns; the mean over the replicates of a split
    own: float  # mean score of number 0, the task's own settings
    spent: float  # multiply-accumulates of one configuration, mean over trials and splits

    @property
    def mean(self) -> np.ndarray:
        """Mean over the splits, for k = 1, 2, ..."""
        return np.asarray(self.scores.mean(axis=0))

    @property
    def sd(self) -> np.ndarray:
        """Standard deviation over the splits (ddof 1), NaN for one split."""
        return self.scores.std(axis=0).to_numpy()

    @property
    def numbers(self) -> np.ndarray:
        """The k, from 1."""
        return np.arange(1, self.scores.shape[1] + 1)


def tuning_curves(trials: pd.DataFrame) -> list[TuningCurve]:
    """Return the curve of each model in the `trials` of `load_trials`, the best at the end first."""
    curves = []
    for model, of_model in trials.groupby("model"):
        by_training = {
            key: expected_best(each["loss"], each["score"]) for key, each in of_model.groupby(["split", "replicate"])
        }
        scores = pd.DataFrame.from_dict(by_training, orient="index")
        scores.index = pd.MultiIndex.from_tuples(by_training, names=["split", "replicate"])
        scores = scores.groupby(level="split").mean().set_axis(range(1, scores.shape[1] + 1), axis=1)
        own = of_model[of_model["trial"] == 0].groupby("split")["score"].mean().mean()
        curves.append(TuningCurve(str(model), scores, float(own), float(of_model["spent"].mean())))
    return sorted(curves, key=lambda curve: -curve.mean[-1])


def budgets(curve: TuningCurve, by_compute: bool) -> np.ndarray:
    """Return the cost of k = 1, 2, ... configurations of a model: their number, or their multiply-accumulates."""
    return curve.numbers * curve.spent if by_compute else curve.numbers.astype(float)


@dataclass(frozen=True)
class Order:
    """Which of two models is ahead, by budget."""

    first: str  # ahead at the smallest budget that both have
    last: str  # ahead at the largest
    other: str  # of `first`
    changes: list[float]  # budgets at which the other one takes the lead, ascending
    ends: tuple[float, float]  # the smallest and the largest budget
    leads: tuple[float, float]  # of `first` and `last` there, in units of the score
    in_splits: tuple[int, int]  # in which they lead there
    n_splits: int  # that both have


def orders(curves: Sequence[TuningCurve], by_compute: bool = False) -> Iterator[Order]:
    """Compare the models of each pair at the budgets that both have; one in between buys what it is enough for.

    A lead that is not above its standard deviation over the splits is none: else two models that are alike would change
    places by chance. Pairs without a common budget, or without a lead at any of them, are left out.
    """
    for a, b in itertools.combinations(curves, 2):
        splits = a.scores.index.intersection(b.scores.index)
        x = [budgets(curve, by_compute) for curve in (a, b)]
        grid = np.unique(np.concatenate(x))
        grid = grid[(grid >= max(x[0][0], x[1][0])) & (grid <= min(x[0][-1], x[1][-1]))]
        if not len(grid) or splits.empty:
            continue
        bought = [np.searchsorted(each, grid, side="right") - 1 for each in x]
        ours, theirs = (c.scores.loc[splits].to_numpy()[:, at] for c, at in zip((a, b), bought, strict=True))
        by_split = ours - theirs  # (splits, budgets)
        ahead = by_split.mean(axis=0)
        spread = by_split.std(axis=0, ddof=1) if len(splits) > 1 else 0.0
        apart = np.flatnonzero(np.abs(ahead) > np.maximum(spread, 1e-12))  # 1e-12: equal but for rounding
        changes = [int(j) for i, j in itertools.pairwise(apart) if ahead[i] * ahead[j] < 0]
        if not len(apart):
            continue
        start, end = int(apart[0]), int(apart[-1])
        signs = np.sign(ahead[[start, end]])
        names = [a.model if sign > 0 else b.model for sign in signs]
        counts = [int(np.sum(by_split[:, at] * sign > 0)) for at, sign in zip((start, end), signs, strict=True)]
        yield Order(
            first=names[0],
            last=names[1],
            other=b.model if names[0] == a.model else a.model,
            changes=[float(grid[at]) for at in changes],
            ends=(float(grid[start]), float(grid[end])),
            leads=(float(abs(ahead[start])), float(abs(ahead[end]))),
            in_splits=(counts[0], counts[1]),
            n_splits=len(splits),
        )
