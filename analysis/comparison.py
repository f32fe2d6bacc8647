"""Comparing the models of a group: means with intervals, and tests of differences that suit the protocol."""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from analysis import statistics
from analysis.groups import ComparisonError, choose_group, finished
from analysis.query import load_classes, predictions_frame, read_predictions
from analysis.statistics import TTest
from tracking import StoreError
from tracking.keys import BASELINES, FINAL_METRICS, HIGH, LOW, MEAN, SD
from tracking.predictions import PARTS
from tracking.scores import METRICS, UnknownScoreError, correct, score_of
from tracking.store import StoreAwayError

if TYPE_CHECKING:
    from tracking.scores import PerImage

BETTER, WORSE = "better", "worse"
SAME, OPEN = "practically the same", "not distinguishable"
ALPHA = 0.05  # adjusted p below this: a real difference; P(equivalent) above 1 - ALPHA: the same
NETWORKS, AGAINST_BASELINES = "pairs of networks", "networks against baselines"  # families of Holm's adjustment


def check_metric(metric: str) -> None:
    """Raise a `ComparisonError` that names the nearest metrics if this one is unknown."""
    try:
        score_of(metric)
    except UnknownScoreError as error:
        raise ComparisonError(str(error)) from None


def default_metric(runs: pd.DataFrame) -> str:
    """Accuracy on the test part or, if the runs have none, on the validation part."""
    return "test/accuracy" if runs["test/accuracy"].notna().any() else "best_val/accuracy"


def predicted_part(metric: str) -> str:
    """Return the part of the predictions, `val`, `cross_val` or `test`, that a metric scores."""
    part = metric.partition("/")[0]
    return part if part in PARTS else "val"


@dataclass(frozen=True)
class Estimate:
    """A mean over splits and its uncertainty."""

    test: TTest  # without a valid standard error, NaN except for the mean
    n: int  # splits
    split_variance: float  # over splits, ddof 1
    method: str = ""  # of the standard error
    problem: str = ""  # the reason if there is no standard error


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
        self.runs = finished(group)
        self.tracking_uri = tracking_uri
        self.problems: dict[str, str] = {}  # a sentence for each model with unreadable predictions
        self._predictions: dict[tuple[str, str], pd.DataFrame] = earlier._predictions if earlier else {}
        self._estimates: dict[tuple[str, str, str | None], Estimate] = {}

    @property
    def task(self) -> str:
        """Name of the task."""
        return str(self.group["task"].iloc[0])

    def of(self, model: str) -> pd.DataFrame:
        """Return the runs of a model, indexed by split: of several replicates the first, with their mean metrics."""
        runs = self.runs[self.runs["model"] == model].sort_values(["split", "replicate"]).set_index("split")
        first = runs[~runs.index.duplicated()]
        if len(first) < len(runs):
            first = first.assign(**runs[list(FINAL_METRICS)].groupby(level=0).mean(skipna=False))
        return first

    def predictions(self, run: pd.Series, part: str) -> pd.DataFrame:
        """Return the predictions of a run for `val`, `cross_val` or `test`."""
        run_id = run["run_id"]
        if (run_id, part) not in self._predictions:
            stored = read_predictions(run, self.tracking_uri)
            for name in PARTS:
                if (of_part := stored.part(name)) is not None:
                    self._predictions[run_id, name] = predictions_frame(of_part)
        if (run_id, part) not in self._predictions:
            raise StoreError(f"run {run_id} is of an earlier version, which kept no {part} predictions")
        return self._predictions[run_id, part]

    def pooled(self, model: str, part: str) -> pd.DataFrame | None:
        """Return the predictions of all splits of a model; None, with an entry in `problems`, if one is unreadable."""
        try:
            return pd.concat([self.predictions(run, part) for _, run in self.of(model).iterrows()])
        except StoreAwayError:
            raise
        except StoreError as error:
            self.problems[model] = f"Left out where predictions are needed: {model}, since {error}."
            return None

    @functools.cached_property
    def classes(self) -> list[str]:
        """Class names in the order of labels; numbers if the parent has no names, or fewer than there are labels."""
        pooled = [self.pooled(model, part) for model in set(self.runs["model"]) for part in ("val", "test")]
        highest = [frame[["true", "pred"]].to_numpy().max() for frame in pooled if frame is not None and len(frame)]
        labels = 1 + int(max(highest, default=-1))
        names: list[str] = []
        with contextlib.suppress(StoreError):
            names = load_classes(self.runs["parent_id"].iloc[-1], self.tracking_uri)
        return names if len(names) >= labels else [str(label) for label in range(labels)]

    def differences(self, metric: str, model: str, other: str) -> pd.Series:
        """Return the score of `model` minus that of `other`, on the splits that both have."""
        ours, theirs = self.of(model), self.of(other)
        common = ours.index.intersection(theirs.index)
        difference: pd.Series = ours.loc[common, metric] - theirs.loc[common, metric]
        return difference

    def estimate(self, metric: str, model: str, other: str | None = None) -> Estimate:
        """Estimate a model's mean score, or its mean difference to another model on the splits that both have.

        The standard error depends on how the scored images were chosen (see docs/statistics.md): the corrected
        resampled t if each split draws its own and they are no more than the training images; components of variance
        if they are more, or the same in every split.
        """
        key = (metric, model, other)
        if key not in self._estimates:
            self._estimates[key] = self._estimate(metric, model, other)
        return self._estimates[key]

    def _estimate(self, metric: str, model: str, other: str | None) -> Estimate:
        runs = self.of(model)
        sides = [runs]
        values = runs[metric]
        if other is not None:
            theirs, values = self.of(other), self.differences(metric, model, other)
            sides = [runs.loc[values.index], theirs.loc[values.index]]
        scores = values.to_numpy(float)
        n = len(scores)
        mean = float(np.mean(scores)) if n else np.nan
        variance = float(np.var(scores, ddof=1)) if n > 1 and np.isfinite(scores).all() else np.nan
        try:
            se, df, method = self._standard_error(metric, scores, sides)
        except StoreAwayError:
            raise  # temporary, and then there is a standard error
        except (ValueError, StoreError) as error:
            return Estimate(TTest(mean, *[np.nan] * 6), n, variance, problem=str(error))
        test = statistics.ttest(mean, se, df)
        if other is None and score_of(metric).is_share:  # clip the interval to possible scores
            test = dataclasses.replace(test, low=max(0.0, test.low), high=min(1.0, test.high))
        return Estimate(test, n, variance, method)

    def _standard_error(self, metric: str, scores: np.ndarray, sides: list[pd.DataFrame]) -> tuple[float, float, str]:
        """Return a mean's standard error, its degrees of freedom and the method; a `ValueError` if there is none."""
        if len(scores) < 2:
            raise ValueError(f"{len(scores) or 'no'} finished split, and an interval takes two")
        if not np.isfinite(scores).all():
            raise ValueError(f"{metric} is missing or not finite in a split")
        hashes = [side["split_hash"].astype("str") for side in sides]
        if any((other != hashes[0]).any() for other in hashes[1:]):
            raise ValueError("the models were not trained and scored on the same images")
        part, score = metric.split("/")[0], score_of(metric)
        n_train, n_val, n_test = (float(sides[0][key].fillna(0).mean()) for key in ("n_train", "n_val", "n_test"))
        fixed = part == "test" and self._scored_on_the_same_images(sides[0])
        n_scored = n_test if part == "test" else n_val
        if not fixed and n_scored <= n_train:
            se = statistics.corrected_resampled_ttest(scores, n_train, n_scored).se
            return se, len(scores) - 1, "corrected resampled t"
        if part == "last_val" or score.per_image is None:
            raise ValueError(f"the interval of {metric} under this protocol needs scores of single images, not stored")
        images = self._image_scores(predicted_part(metric), score.per_image, sides)
        image_variance = statistics.image_variance(images)
        if fixed:
            n_images, method = n_test, "components of variance, one test part"
            se = statistics.fixed_test_standard_error(scores, image_variance, n_train, n_val, n_test)
        else:
            n_images, method = n_train + n_val + n_test, "components of variance, overlapping parts"
            se = statistics.component_standard_error(scores, image_variance, n_train, n_images)
        return se, statistics.satterthwaite_df(se, image_variance, n_images, len(scores)), method

    def _scored_on_the_same_images(self, runs: pd.DataFrame) -> bool:
        """Whether all splits have the same test part."""
        parts = [self.predictions(run, "test")["index"].to_numpy() for _, run in runs.iterrows()]
        return all(np.array_equal(part, parts[0]) for part in parts)

    def _image_scores(self, part: str, per_image: "PerImage", sides: list[pd.DataFrame]) -> np.ndarray:
        """Each image's part in a score (or difference of two), shape (splits, images), NaN where not scored."""
        rows = []
        for runs in zip(*(side.iterrows() for side in sides), strict=True):
            frames = [self.predictions(run, part) for _, run in runs]
            ours, *theirs = [per_image(frame["true"].to_numpy(), frame["pred"].to_numpy()) for frame in frames]
            rows.append((frames[0]["index"].to_numpy(), ours - theirs[0] if theirs else ours))
        times_scored = np.bincount(np.concatenate([images for images, _ in rows]))
        values = np.full((len(rows), len(times_scored)), np.nan)
        for own, (images, scores) in zip(values, rows, strict=True):
            own[images] = scores
        return values[:, times_scored > 0]


def summarise(evidence: Evidence, model: str) -> dict[str, float]:
    """Return mean, sd and interval of every final metric over a model's finished splits, and the number of splits.

    The keys are those of `tracking.keys.SUMMARY_METRICS`. A missing score makes its mean missing.
    """
    runs = evidence.of(model)
    summary: dict[str, float] = {"n_splits": len(runs)}
    for key in FINAL_METRICS:
        summary |= {MEAN + key: runs[key].mean(skipna=False), SD + key: runs[key].std(skipna=False)}
        if key in METRICS:
            estimate = evidence.estimate(key, model).test
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
        One of `METRICS`, for the columns `mean`, `sd`, `low` and `high` and the order of rows.
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


def tabulate(evidence: Evidence, metric: str) -> pd.DataFrame:
    """Return the `comparison_table` of evidence."""
    check_metric(metric)
    if evidence.runs[metric].isna().all():
        raise ComparisonError(f"no run of this comparison group has {metric}; try best_val/accuracy")
    rows = {}
    for model, splits in evidence.runs.groupby("model"):
        summary = summarise(evidence, str(model))
        chosen = {name.rstrip("/"): summary[name + metric] for name in (MEAN, SD, LOW, HIGH)}
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
    runs: pd.DataFrame, metric: str = "test/accuracy", rope: float = 0.01, tracking_uri: str | None = None
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
        and `high`, `t`, `df`, two-sided `p`, `p_holm` adjusted within the family; probabilities that a is `p_worse`,
        `p_equivalent` (within the region) and `p_better`; `verdict` on a; `splits_needed` to detect a difference of
        this size with this test in this family at 80 % power (missing: no number is enough); `mcnemar_p` for k-fold
        validation accuracy, over the pooled out-of-fold predictions; `method`, or the `problem` if there is no test.

    Raises
    ------
    ComparisonError
        As for `comparison_table`, or if there are no two models.
    """
    return compare(Evidence(choose_group(runs), tracking_uri), metric, rope)


def pairs_of_models(evidence: Evidence, metric: str) -> list[tuple[str, str, str]]:
    """Return family and names of each pair to test; of two networks the better on their common splits comes first."""
    means = evidence.runs.groupby("model")[metric].mean().sort_values(ascending=not score_of(metric).higher_is_better)
    networks = [str(name) for name in means.index if name not in BASELINES]
    pairs = []
    for pair in itertools.combinations(networks, 2):
        swap = is_better(-evidence.differences(metric, *pair).mean(), metric)
        pairs.append((NETWORKS, *(reversed(pair) if swap else pair)))
    against = [(AGAINST_BASELINES, name, str(base)) for name in networks for base in means.index if base in BASELINES]
    return pairs + against


def compare(
    evidence: Evidence, metric: str, rope: float = 0.01, pairs: Sequence[tuple[str, str, str]] | None = None
) -> pd.DataFrame:
    """Return the `pairwise_tests` of evidence, or of `pairs` (family and two names) instead of those of models."""
    check_metric(metric)
    pairs = pairs_of_models(evidence, metric) if pairs is None else pairs
    if not pairs:
        models = ", ".join(sorted(set(evidence.runs["model"])))
        raise ComparisonError(f"only {models} has finished splits, and a comparison takes two models, one a network")
    sizes = {family: sum(pair[0] == family for pair in pairs) for family, _, _ in pairs}
    tests = pd.DataFrame(
        [{"family": family, **_compare(evidence, metric, a, b, rope, sizes[family])} for family, a, b in pairs]
    )
    # a pair without a test still counts: a missing file does not shrink the family
    adjusted = tests.groupby("family")["p"].transform(lambda p: statistics.holm(p.fillna(1.0).to_numpy()))
    tests["p_holm"] = adjusted.where(tests["p"].notna())
    tests["verdict"] = [_verdict(row, is_better(row["difference"], metric)) for _, row in tests.iterrows()]
    return tests


def is_better(difference: float, metric: str) -> bool:
    """Whether a difference favours the first of two models."""
    return score_of(metric).sign * difference > 0


def _compare(evidence: Evidence, metric: str, a: str, b: str, rope: float, family_size: int) -> dict[str, Any]:
    estimate = evidence.estimate(metric, a, b)
    test = estimate.test
    sign = score_of(metric).sign
    belief = dict.fromkeys(("p_worse", "p_equivalent", "p_better"), np.nan)
    needed = None
    if not estimate.problem:
        belief = dataclasses.asdict(statistics.posterior(sign * test.mean, test.se, test.df, rope))
        constant = max(0.0, test.se**2 - estimate.split_variance / estimate.n)  # not reduced by more splits
        confidence = 1 - ALPHA / family_size  # the strictest step of Holm's adjustment: never too few splits
        needed = statistics.splits_needed(test.mean, estimate.split_variance, constant, confidence)
    return {
        "model_a": a, "model_b": b, "n": estimate.n, "difference": test.mean, "se": test.se,
        "low": test.low, "high": test.high, "t": test.t, "df": test.df, "p": test.p, "p_holm": np.nan,
        **belief, "verdict": "", "splits_needed": needed or pd.NA, "mcnemar_p": _mcnemar(evidence, metric, a, b),
        "method": estimate.method, "problem": estimate.problem,
    }  # fmt: skip


def _mcnemar(evidence: Evidence, metric: str, a: str, b: str) -> float:
    """P-value of McNemar's test on complete k folds, which validate every image once; else NaN."""
    sides = [evidence.of(a), evidence.of(b)]
    folds = sides[0]["protocol"].str.contains("k-fold").all()
    complete = all(len(side) == side["n_splits"].iloc[0] for side in sides)
    if not (folds and complete and metric.startswith("best_val/") and score_of(metric).per_image is correct):
        return np.nan
    ours, theirs = evidence.pooled(a, "val"), evidence.pooled(b, "val")
    if ours is None or theirs is None or not np.array_equal(ours["index"], theirs["index"]):
        return np.nan
    return statistics.mcnemar(*((frame["true"] == frame["pred"]).to_numpy() for frame in (ours, theirs))).p


def _verdict(row: pd.Series, better: bool) -> str:
    """Put the result for model a into words; equivalence takes precedence over significance."""
    if np.isnan(row["p_holm"]):
        return "no test"
    if row["p_equivalent"] > 1 - ALPHA:
        return SAME
    if row["p_holm"] >= ALPHA:
        return OPEN
    return BETTER if better else WORSE
