"""Comparing the models of a group: means with intervals, and tests of differences that suit the protocol."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from analysis import statistics
from analysis.evidence import Evidence, predicted_parts
from analysis.groups import ComparisonError, choose_group, expected_splits
from tracking.keys import BASELINES, FINAL_METRICS, HIGH, LOW, MEAN, SD, has_folds
from tracking.scores import METRICS, correct, score_of

BETTER, WORSE = "better", "worse"
SAME, OPEN, NONE = "practically the same", "not distinguishable", "no test"
ROPE = 0.01  # a difference of shares within it does not matter, unless the user says otherwise
ALPHA = 0.05  # adjusted p below this: a real difference, or practically the same
NETWORKS, AGAINST_BASELINES = "pairs of networks", "networks against baselines"  # families of Holm's adjustment
BELIEF = ("p_worse", "p_equivalent", "p_better")
SPREAD = ("of_images", "of_training", "of_seeds")  # fields of a `ScoreEstimate`


def summarise(evidence: Evidence, model: str, intervals: bool = True) -> dict[str, float]:
    """Return mean, sd and interval of every final metric over a model's finished splits, and the number of splits.

    The keys are those of `tracking.keys.SUMMARY_METRICS`. A missing score makes its mean missing. The intervals, which
    take much longer than the rest, are optional.
    """
    runs = evidence.of(model)
    summary: dict[str, float] = {"n_splits": len(runs)}
    for key in FINAL_METRICS:
        summary |= {MEAN + key: runs[key].mean(skipna=False), SD + key: runs[key].std(skipna=False)}
        if intervals and key in METRICS:
            estimate = evidence.estimate(key, model)
            summary |= {LOW + key: estimate.low, HIGH + key: estimate.high}
    return summary


def comparison_table(
    runs: pd.DataFrame, metric: str = "test/accuracy", tracking_uri: str | None = None
) -> pd.DataFrame:
    """Average the finished splits of each model, for the newest complete comparison group in `runs`.

    Parameters
    ----------
    runs : pandas.DataFrame
        From `load_runs`.
    metric : str
        Such as test/accuracy, all/f1_macro, test/auc (`tracking.scores.score_of`), for the columns `mean`, `sd`, `low`
        and `high` and the order of rows.
    tracking_uri : str, optional
        The store of `runs`, if it is a server.

    Returns
    -------
    pandas.DataFrame
        Indexed by `model`, best first: `n` finished splits of `n_expected`; `mean`, `sd` (ddof 1), and the ends `low`
        and `high` of the mean's 95 % interval, of the metric; whether it is a `baseline`; `mean/<key>`, `sd/<key>`,
        `low/<key>`, `high/<key>` of all scores, epochs and seconds; `parameters`, `macs`. Of a repeated split only the
        newest run counts.

    Raises
    ------
    ComparisonError
        If the metric is unknown, no run has finished, or none has the metric.
    """
    return tabulate(Evidence(choose_group(runs), tracking_uri), metric)


def tabulate(evidence: Evidence, metric: str, intervals: bool = True) -> pd.DataFrame:
    """Return the `comparison_table` of evidence; without `intervals`, only that of the metric is there."""
    evidence.need(metric)
    if evidence.runs[metric].isna().all():
        raise ComparisonError(f"no run of this comparison group has {metric}; try best_val/accuracy")
    rows = {}
    for model, splits in evidence.runs.groupby("model"):
        summary = summarise(evidence, str(model), intervals)
        scores, estimate = evidence.of(str(model))[metric], evidence.estimate(metric, str(model))
        chosen = {"mean": estimate.mean, "sd": scores.std(skipna=False), "low": estimate.low, "high": estimate.high}
        rows[model] = {
            "n": int(summary.pop("n_splits")),
            "n_expected": expected_splits(evidence.group),
            **chosen,
            "baseline": model in BASELINES,
            **summary,
            "parameters": splits["parameters"].iloc[0],
            "macs": splits["macs"].iloc[0],
        }
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("model")
    return table.sort_values("mean", ascending=not score_of(metric).higher_is_better)


def pairwise_tests(
    runs: pd.DataFrame, metric: str = "test/accuracy", rope: float = ROPE, tracking_uri: str | None = None
) -> pd.DataFrame:
    """Test the differences between models, for the newest complete comparison group in `runs`.

    Parameters
    ----------
    runs, metric, tracking_uri
        As for `comparison_table`.
    rope : float
        Half-width of the region of practical equivalence, in the metric's units.

    Returns
    -------
    pandas.DataFrame
        One row a pair, the better mean first: all pairs of networks, then each network against each baseline (column
        `family`). `model_a`, `model_b`, `n` common splits, mean `difference` a - b with its `se`, 95 % interval `low`
        and `high`, two-sided `p`, `p_holm` adjusted within the family; probabilities that a is `p_worse`,
        `p_equivalent` (within the region) and `p_better`; `p_same_holm`, 1 - `p_equivalent` adjusted likewise;
        `verdict` on a; `splits_needed` to detect a difference of this size in this family with 80 % power (missing: no
        number is enough), and the `limit` of more splits (`images` or `training`); `of_images`, `of_training`,
        `of_seeds`: parts of the variance of a split's difference; `mcnemar_p` for k-fold validation accuracy, over the
        pooled out-of-fold predictions of a single repetition; the `problem` if there is no test.

    Raises
    ------
    ComparisonError
        As for `comparison_table`, or if there are no two models.
    """
    return compare(Evidence(choose_group(runs), tracking_uri), metric, rope)


def pairs_of_models(evidence: Evidence, metric: str) -> list[tuple[str, str, str]]:
    """Return family and names of each pair to test; of two networks the better on their common splits comes first."""
    evidence.need(metric)
    means = evidence.runs.groupby("model")[metric].mean().sort_values(ascending=not score_of(metric).higher_is_better)
    networks = [str(name) for name in means.index if name not in BASELINES]
    scores = pd.DataFrame({name: evidence.of(name)[metric] for name in networks})  # by split
    pairs = []
    for pair in itertools.combinations(networks, 2):
        swap = is_better((scores[pair[1]] - scores[pair[0]]).mean(), metric)
        pairs.append((NETWORKS, *(reversed(pair) if swap else pair)))
    against = [(AGAINST_BASELINES, name, str(base)) for name in networks for base in means.index if base in BASELINES]
    return pairs + against


def compare(
    evidence: Evidence,
    metric: str,
    rope: float = ROPE,
    alpha: float = ALPHA,
    pairs: Sequence[tuple[str, str, str]] | None = None,
) -> pd.DataFrame:
    """Return the `pairwise_tests` of evidence, with verdicts at the level `alpha`.

    `pairs` (family and two names) are compared instead of those of models.
    """
    evidence.need(metric)
    pairs = pairs_of_models(evidence, metric) if pairs is None else pairs
    if not pairs:
        models = ", ".join(sorted(set(evidence.runs["model"])))
        raise ComparisonError(f"only {models} has finished splits, and a comparison takes two models, one a network")
    sizes = {family: sum(pair[0] == family for pair in pairs) for family, _, _ in pairs}
    tests = pd.DataFrame(
        [{"family": family, **_compare(evidence, metric, a, b, rope, sizes[family])} for family, a, b in pairs]
    )
    tests["p_holm"] = _adjusted(tests, tests["p"])
    tests["p_same_holm"] = _adjusted(tests, 1 - tests["p_equivalent"])
    tests["verdict"] = [_verdict(row, is_better(row["difference"], metric), alpha) for _, row in tests.iterrows()]
    return tests


def _adjusted(tests: pd.DataFrame, p: "pd.Series[float]") -> "pd.Series[float]":
    """Adjust within the families. A pair without a test still counts: a missing file does not shrink its family."""
    # no NaN into the adjustment: one may take all others with it (findings/statsmodels_fdr_nan.sh)
    adjusted = p.fillna(1.0).groupby(tests["family"]).transform(lambda family: statistics.holm(family.to_numpy()))
    return adjusted.where(p.notna())


def is_better(difference: float, metric: str) -> bool:
    """Whether a difference favours the first of two models."""
    return score_of(metric).sign * difference > 0


def _compare(evidence: Evidence, metric: str, a: str, b: str, rope: float, family_size: int) -> dict[str, Any]:
    estimate = evidence.estimate(metric, a, b)
    result = estimate.result
    found: dict[str, Any] = dict.fromkeys((*BELIEF, *SPREAD), np.nan) | {"splits_needed": pd.NA, "limit": ""}
    if result is not None:
        belief = result.posterior(rope)
        ends = (belief.p_worse, belief.p_equivalent, belief.p_better)
        found |= dict(zip(BELIEF, ends[:: score_of(metric).sign], strict=True))
        found |= {name: getattr(result, name) for name in SPREAD}
        confidence = 1 - ALPHA / family_size  # the strictest step of Holm's adjustment: never too few splits
        constant = result.constant_variance
        needed = statistics.splits_needed(estimate.mean, result.split_variance, constant, confidence)
        found["splits_needed"] = needed or pd.NA
        found["limit"] = "images" if result.constant_of_images > constant / 2 else "training"
    return {
        "model_a": a, "model_b": b, "n": estimate.n, "difference": estimate.mean, "se": estimate.se,
        "low": estimate.low, "high": estimate.high, "p": estimate.p, "p_holm": np.nan, "p_same_holm": np.nan,
        **found, "verdict": "", "mcnemar_p": _mcnemar(evidence, metric, a, b), "problem": estimate.problem,
    }  # fmt: skip


def _mcnemar(evidence: Evidence, metric: str, a: str, b: str) -> float:
    """P-value of McNemar's test on complete k folds, which validate every image once; else NaN, as for repetitions."""
    sides = [evidence.of(a), evidence.of(b)]
    folds = sides[0]["protocol"].map(has_folds).all()
    complete = all(list(side.index) == list(range(side["n_splits"].iloc[0])) for side in sides)
    validation = metric.startswith(("best_val/", "cross_val/"))
    if not (folds and complete and validation and score_of(metric).per_image is correct):
        return np.nan
    ours, theirs = (evidence.pooled(model, predicted_parts(metric)) for model in (a, b))
    if ours is None or theirs is None or not np.array_equal(ours["index"], theirs["index"]):
        return np.nan
    return statistics.mcnemar(*((frame["true"] == frame["pred"]).to_numpy() for frame in (ours, theirs))).p


def _verdict(row: pd.Series, better: bool, alpha: float) -> str:
    """Put the result for model a into words; equivalence takes precedence over significance."""
    if np.isnan(row["p_holm"]):
        return NONE
    if row["p_same_holm"] < alpha:
        return SAME
    if row["p_holm"] >= alpha:
        return OPEN
    return BETTER if better else WORSE
