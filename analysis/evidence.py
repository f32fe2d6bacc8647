"""The evidence of a group: the runs of its models and their predictions, and the estimates that follow from them."""

import contextlib
import functools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from analysis import statistics
from analysis.groups import ComparisonError, finished
from analysis.query import load_classes, predictions_frame, read_predictions
from analysis.statistics import ScoreEstimate
from tracking import StoreError
from tracking.errors import StoreAwayError
from tracking.keys import BASELINES, FINAL_METRICS
from tracking.predictions import PARTS
from tracking.scores import ALL, SCORES, UnknownScoreError, score_of

if TYPE_CHECKING:
    from tracking.predictions import PartPredictions, Predictions

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
        if (above := score_of(metric).above) and (classes := len(self.classes)) <= above:
            raise ComparisonError(f"{metric} tells nothing with {classes} classes: it takes more than {above}")
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
            if result.is_tie and (other is None or ":" in metric):
                what = "0" if other is None else "the same"
                raise ValueError(f"all images score {what}, which says nothing of the spread")
        except StoreAwayError:
            raise  # temporary, and then there is an interval
        except (ValueError, StoreError) as error:
            return Estimate(mean, n, problem=str(error))
        low, high = result.low, result.high
        if other is None:  # clip the interval to possible scores
            low, high = max(0.0, low), min(1.0, high) if score_of(metric).is_share else high
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
