"""Comparing the models of a group: means with intervals, and tests of differences that suit the protocol."""

import contextlib
import functools
import itertools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from analysis import statistics
from analysis.groups import ComparisonError, choose_group, finished
from analysis.query import load_classes, predictions_frame, read_predictions
from analysis.statistics import ScoreEstimate
from tracking import StoreError
from tracking.errors import StoreAwayError
from tracking.keys import BASELINES, FINAL_METRICS, HIGH, LOW, MEAN, SD
from tracking.predictions import PARTS
from tracking.scores import ALL, METRICS, SCORES, UnknownScoreError, correct, score_of

if TYPE_CHECKING:
    from tracking.predictions import PartPredictions, Predictions

BETTER, WORSE = "better", "worse"
SAME, OPEN, NONE = "practically the same", "not distinguishable", "no test"
ROPE = 0.01  # a difference of shares within it does not matter, unless the user says otherwise
ALPHA = 0.05  # adjusted p below this: a real difference, or practically the same
NETWORKS, AGAINST_BASELINES = "pairs of networks", "networks against baselines"  # families of Holm's adjustment
BELIEF = ("p_worse", "p_equivalent", "p_better")
SPREAD = ("of_images", "of_training", "of_seeds")  # fields of a `ScoreEstimate`
CROSS_FITTED = "cross_val/accuracy"  # missing in runs of earlier versions


def check_metric(metric: str) -> None:
    """Raise a `ComparisonError` that names the nearest metrics if this one is unknown."""
    try:
        score_of(metric)
    except UnknownScoreError as error:
        raise ComparisonError(str(error)) from None


def default_metric(runs: pd.DataFrame) -> str:
    """Accuracy on all images that judge without having chosen; without cross-fitted validation, on the test part.

    Runs of earlier versions without a test part have accuracy on the validation part only.
    """
    has_test = runs["test/accuracy"].notna().any()
    if finished(runs)[CROSS_FITTED].notna().all():
        return f"{ALL}/accuracy" if has_test else CROSS_FITTED
    return "test/accuracy" if has_test else "best_val/accuracy"


def predicted_parts(metric: str) -> tuple[str, ...]:
    """Return the parts of the predictions that a metric scores."""
    part = metric.partition("/")[0]
    return ("cross_val", "test") if part == ALL else (part,) if part in PARTS else ("val",)


@dataclass(frozen=True)
class Estimate:
    """A mean over splits and its uncertainty."""

    mean: float
    n: int  # splits
    se: float = np.nan
    low: float = np.nan  # ends of the 95 % interval
    high: float = np.nan
    p: float = np.nan
    result: ScoreEstimate | None = None  # what these are from; None if there is no interval
    problem: str = ""  # the reason


class Evidence:
    """The finished runs of a comparison group, and their predictions, which are read lazily.

    Parameters
    ----------
    group : pandas.DataFrame
        From `choose_group`.
    tracking_uri : str, optional
        The store, if its files are not on this machine.
    earlier : Evidence, optional
        Evidence of the same group with fewer finished runs, whose predictions are reused.
    """

    def __init__(self, group: pd.DataFrame, tracking_uri: str | None = None, earlier: "Evidence | None" = None) -> None:
        self.group = group
        self._set_runs(_with_all_images(finished(group)))
        self.tracking_uri = tracking_uri
        self.problems: dict[str, str] = {}  # a sentence for each model with unreadable predictions
        # by run, and whether with the probabilities of all classes, which take most of the memory
        self._predictions: dict[tuple[str, bool], Predictions] = earlier._predictions if earlier else {}
        self._values: dict[tuple[str, str], np.ndarray] = {}
        self._estimates: dict[tuple[str, str, str | None], Estimate] = {}
        self._arrangements: dict[Hashable, statistics.Arrangement] = {}  # by splits, and parts of the predictions

    def _set_runs(self, runs: pd.DataFrame) -> None:
        self.runs = runs
        self._runs_of: dict[str, pd.DataFrame] = {}  # what the methods of these names have returned
        self._replicates: dict[str, pd.DataFrame] = {}
        self._rows_of: dict[str, dict[tuple[int, int], pd.Series]] = {}

    @property
    def task(self) -> str:
        """Name of the task."""
        return str(self.group["task"].iloc[0])

    def of(self, model: str) -> pd.DataFrame:
        """Return the runs of a model, indexed by split: of several replicates the first, with their mean metrics."""
        if model not in self._runs_of:
            runs = self.replicates(model).droplevel("replicate")
            first = runs[~runs.index.duplicated()]
            if len(first) < len(runs):
                metrics = [column for column in runs if column in FINAL_METRICS or str(column).partition("/")[2]]
                first = first.assign(**runs[metrics].groupby(level=0).mean(skipna=False))
            self._runs_of[model] = first
        return self._runs_of[model]

    def replicates(self, model: str) -> pd.DataFrame:
        """Return the runs of a model, indexed by split and replicate."""
        if model not in self._replicates:
            of_model = self.runs[self.runs["model"] == model]
            self._replicates[model] = of_model.set_index(["split", "replicate"]).sort_index()
        return self._replicates[model]

    def need(self, metric: str) -> None:
        """Make `runs` have this metric, which may be one that is derived from the predictions.

        Raises
        ------
        ComparisonError
            If it is unknown, or it can be derived for no run: the predictions lack the probabilities that it needs.
        """
        check_metric(metric)
        if metric in self.runs:
            return
        scores, problems = [], []
        for _, run in self.runs.iterrows():
            try:
                scores.append(float(np.mean(self._values_of(run, metric))))
            except StoreAwayError:
                raise
            except (ValueError, StoreError) as error:
                scores.append(np.nan)
                problems.append(str(error))
        if problems and len(problems) == len(scores):
            raise ComparisonError(f"{metric} cannot be derived: {problems[0]}")
        self._set_runs(self.runs.assign(**{metric: scores}))

    def predictions(self, run: pd.Series, part: str, probabilities: bool = False) -> "PartPredictions":
        """Return the predictions of a run for `val`, `cross_val` or `test`; a `StoreError` if there are none."""
        run_id = run["run_id"]
        key = (run_id, probabilities or (run_id, True) in self._predictions)
        if key not in self._predictions:
            self._predictions[key] = read_predictions(run, self.tracking_uri, probabilities)
        found = self._predictions[key].part(part)
        if found is None:
            raise StoreError(f"run {run_id} is of an earlier version, which kept no {part} predictions")
        return found

    def pooled(self, model: str, parts: Sequence[str]) -> pd.DataFrame | None:
        """Return the predictions of all splits of a model, one row an image, as in `load_predictions`.

        None, with an entry in `problems`, if one is unreadable.
        """
        runs = [run for _, run in self.of(model).iterrows()]
        try:
            return pd.concat([predictions_frame(self.predictions(run, part)) for run in runs for part in parts])
        except StoreAwayError:
            raise
        except StoreError as error:
            self.problems[model] = f"Left out where predictions are needed: {model}, since {error}."
            return None

    @functools.cached_property
    def classes(self) -> list[str]:
        """Class names in the order of labels; numbers if the parent has no names, or fewer than there are labels."""
        pooled = [self.pooled(model, ("val", "test")) for model in set(self.runs["model"])]
        highest = [frame[["true", "pred"]].to_numpy().max() for frame in pooled if frame is not None and len(frame)]
        labels = 1 + int(max(highest, default=-1))
        names: list[str] = []
        with contextlib.suppress(StoreError):
            names = load_classes(self.runs["parent_id"].iloc[-1], self.tracking_uri)
        return names if len(names) >= labels else [str(label) for label in range(labels)]

    def differences(self, metric: str, model: str, other: str) -> pd.Series:
        """Return the score of `model` minus that of `other`, on the splits that both have; the mean over replicates."""
        found: dict[int, list[float]] = {}
        for (split, _), (ours, theirs) in self._paired(model, other).items():
            found.setdefault(split, []).append(ours[metric] - theirs[metric])
        return pd.Series({split: np.mean(each) for split, each in found.items()}, dtype=float).rename_axis("split")

    def estimate(self, metric: str, model: str, other: str | None = None) -> Estimate:
        """Estimate a model's mean score, or its mean difference to another model on the splits that both have.

        See `statistics.score_estimate`, which takes the scores of single images.
        """
        key = (metric, model, other)
        if key not in self._estimates:
            self._estimates[key] = self._estimate(metric, model, other)
        return self._estimates[key]

    def _estimate(self, metric: str, model: str, other: str | None) -> Estimate:
        values = self.of(model)[metric] if other is None else self.differences(metric, model, other)
        runs = self._paired(*(name for name in (model, other) if name))
        mean, n = float(values.mean(skipna=False)), len(values)
        try:
            statistics.check_splits(n)
            if not np.isfinite(values).all():
                raise ValueError(f"{metric} is missing or not finite in a split")
            result = self._score_estimate(metric, [*runs], [*zip(*runs.values(), strict=True)])
            if other is None and result.se == 0:  # two models that never differ are alike, but no score is certain
                raise ValueError("all single scores are equal (0), which tells nothing of their spread")
        except StoreAwayError:
            raise  # temporary, and then there is an interval
        except (ValueError, StoreError) as error:
            return Estimate(mean, n, problem=str(error))
        low, high = result.low, result.high
        if other is None and score_of(metric).is_share:  # clip the interval to possible scores
            low, high = max(0.0, low), min(1.0, high)
        return Estimate(mean, n, result.se, low, high, result.p, result)

    def _paired(self, *models: str) -> dict[tuple[int, int], list[pd.Series]]:
        """Return the runs that all of these models have, by split and replicate.

        A baseline is trained once on a split, and is compared with each replicate of a network.
        """
        sides = [(self._rows(name), name in BASELINES) for name in models]
        paired = {}
        for key in sorted(set().union(*(side for side, _ in sides))):
            runs = [side.get(key, side.get((key[0], 0)) if is_baseline else None) for side, is_baseline in sides]
            found = [run for run in runs if run is not None]
            if len(found) == len(models):
                paired[key] = found
        return paired

    def _rows(self, model: str) -> dict[tuple[int, int], pd.Series]:
        """Return the runs of a model by split and replicate: making a row of a frame as wide takes long."""
        if model not in self._rows_of:
            self._rows_of[model] = dict(self.replicates(model).iterrows())  # type: ignore[arg-type]
        return self._rows_of[model]

    def _score_estimate(
        self, metric: str, numbers: Sequence[tuple[int, int]], sides: Sequence[Sequence[pd.Series]]
    ) -> ScoreEstimate:
        """Estimate from the scores of single images in runs of one model, or of two.

        `numbers` are split and replicate of each run of a side.
        """
        hashes = [[str(run["split_hash"]) for run in side] for side in sides]
        if any(other != hashes[0] for other in hashes[1:]):
            raise ValueError("the models were not trained and scored on the same images")
        scores = []
        for runs in zip(*sides, strict=True):
            ours, *theirs = [self._values_of(run, metric) for run in runs]
            scores.append(ours - theirs[0] if theirs else ours)
        first = sides[0]
        n_train, n_val, n_test = (
            float(np.mean([0 if pd.isna(run[key]) else run[key] for run in first]))
            for key in ("n_train", "n_val", "n_test")
        )
        pool = n_train + n_val + (0 if self._have_one_test_part(first) else n_test)
        key = (*zip(numbers, hashes[0], strict=True), predicted_parts(metric))
        if key not in self._arrangements:
            self._arrangements[key] = self._arrange(numbers, first, predicted_parts(metric))
        return statistics.estimate(np.concatenate(scores), self._arrangements[key], n_train, max(n_train, pool))

    def _arrange(
        self, numbers: Sequence[tuple[int, int]], runs: Sequence[pd.Series], parts: Sequence[str]
    ) -> statistics.Arrangement:
        """Arrange the scores of single images in these parts of runs, whose splits and replicates are `numbers`."""
        images = [np.concatenate([self.predictions(run, part).index for part in parts]) for run in runs]
        splits, replicates = (np.repeat(side, [*map(len, images)]) for side in np.array(numbers, np.int64).T)
        seeds = replicates if len({replicate for _, replicate in numbers}) > 1 else None
        return statistics.arrange(splits, np.concatenate(images), seeds)

    def _have_one_test_part(self, runs: Sequence[pd.Series]) -> bool:
        """Whether all splits have the same test part."""
        parts = [self.predictions(run, "test").index for run in runs]
        return all(np.array_equal(part, parts[0]) for part in parts)

    def _values_of(self, run: pd.Series, metric: str) -> np.ndarray:
        """Each image's part in a score of a run, shape (n,): their mean is the score."""
        key = (run["run_id"], metric)
        if key not in self._values:
            score = score_of(metric)
            if metric.startswith("last_val/"):
                raise ValueError(f"the interval of {metric} needs scores of single images, which are not stored")
            values = []
            needs_all = score.per_image is None
            for predictions in (self.predictions(run, part, needs_all) for part in predicted_parts(metric)):
                if not len(predictions):
                    continue
                if score.per_image is not None:
                    values.append(score.per_image(predictions.true, predictions.predicted))
                elif score.of_probabilities is None:
                    raise ValueError(f"the interval of {metric} needs scores of single images, which are not stored")
                elif predictions.probs is None:
                    raise ValueError(f"{metric} needs the probabilities of all classes, which runs of earlier versions "
                                     "do not keep; --fresh trains them again")  # fmt: skip
                else:
                    values.append(score.of_probabilities(predictions.true, predictions.probs))
            if not values:
                raise ValueError(f"there is no image that {metric} scores")
            self._values[key] = np.concatenate(values)
        return self._values[key]


def _with_all_images(runs: pd.DataFrame) -> pd.DataFrame:
    """Add the scores of cross-fitted validation and test images together: of both parts, weighted by their images."""
    test = runs["n_test"].astype(float).fillna(0) / (
        runs["n_val"].astype(float) + runs["n_test"].astype(float).fillna(0)
    )
    scores = {
        f"{ALL}/{name}": (1 - test) * runs[f"cross_val/{name}"] + test * runs[f"test/{name}"].where(test > 0, 0.0)
        for name in SCORES
        if {f"cross_val/{name}", f"test/{name}"} <= set(runs)
    }
    return runs.assign(**scores)


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
            "n_expected": int(evidence.group["n_splits"].max()),
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
        pooled out-of-fold predictions; the `problem` if there is no test.

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
    check_metric(metric)
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
    """P-value of McNemar's test on complete k folds, which validate every image once; else NaN."""
    sides = [evidence.of(a), evidence.of(b)]
    folds = sides[0]["protocol"].str.contains("k-fold").all()
    complete = all(len(side) == side["n_splits"].iloc[0] for side in sides)
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
