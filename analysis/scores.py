"""Scores that people ask for beside accuracy: per class, ROC AUC, log loss, Brier score, calibration, top 5.

All have intervals from the same estimate (`statistics.score_estimate`), since each is, to first order, the mean of a
value of each image (`tracking.scores`). A score that a split leaves undefined, such as the recall of a class without
images, has no interval, and its mean is over the splits that define it.
"""

from typing import Any

import numpy as np
import pandas as pd

from analysis.comparison import tabulate
from analysis.evidence import Evidence, predicted_parts
from analysis.groups import ComparisonError, group_id, what_is_wrong
from analysis.tables import PART_NAMES, ResultTable, earlier_version, interval, number, title, trace, with_sd
from tracking import StoreError
from tracking.errors import StoreAwayError
from tracking.scores import BINS, OF_CLASSES, calibration_bins, excess_values, score_of

WHOLE = ("accuracy", "f1_macro", "auc", "top_5", "loss", "brier", "calibration_error")
DRAWS = 20  # of hits that perfectly calibrated probabilities would have
CALIBRATED = "if calibrated"


def whole_table(evidence: Evidence, part: str) -> ResultTable:
    """Make the table of the scores of all classes together: a row a score and model, the most accurate model first.

    Runs of earlier versions have accuracy and F1 only. Errors are those of `comparison_table`.
    """
    models = [str(model) for model in tabulate(evidence, f"{part}/accuracy", intervals=False).index]
    cells, data, notes = [], [], []
    for name in WHOLE:
        metric = f"{part}/{name}"
        score = score_of(metric)
        if len(evidence.classes) <= score.above:
            continue
        try:
            evidence.need(metric)
        except ComparisonError as error:
            notes.append(f"{error}.")
            continue
        for model in models:
            own = _of(evidence, metric, model)
            baseline = calibrated(evidence, part, model) if name == "calibration_error" else np.nan
            data.append(own | {"if_calibrated": baseline})
            cells.append({
                "score": f"{score.label} {score.unit}", "model": model,
                "mean±sd": with_sd(own["mean"], own["sd"], metric),
                "95 % interval": interval(own["low"], own["high"], metric, "–"), CALIBRATED: number(baseline, metric),
            })  # fmt: skip
    if any(own["metric"] == f"{part}/auc" for own in data):
        notes += [
            "Macro AUC ranks each class against the rest, and is the mean over the classes that occur.",
            f"The calibration error ({BINS} bins, of the predicted class) of perfectly calibrated probabilities is not "
            f"0 on so few images either, but what stands under {CALIBRATED!r}.",
        ]
    return _table(evidence, part, "± is the sd over splits", cells, data, notes)


def class_table(evidence: Evidence, part: str) -> ResultTable:
    """Make the table of precision, recall and F1, a row a model and class; errors are those of `whole_table`."""
    cells, data = [], []
    for model in tabulate(evidence, f"{part}/accuracy", intervals=False).index:
        for label, name in enumerate(evidence.classes):
            row = {"model": str(model), "class": name}
            for kind, shown in OF_CLASSES.items():
                metric = f"{part}/{kind}:{label}"
                evidence.need(metric)
                own = _of(evidence, metric, str(model))
                ends = interval(own["low"], own["high"], metric, "–")
                row[shown] = number(own["mean"], metric) + (f" ({ends})" if ends else "")
                data.append(own | {"class": name})
            cells.append(row)
    notes = ["Intervals of rare classes are too short: with 3 % of 140 images those of F1 cover about 87 %, not 95 %."]
    if any(np.isnan(own["mean"]) for own in data):
        notes.insert(0, "Empty: no split has an image of the class or, for precision, a prediction of it.")
    return _table(evidence, part, "mean over splits and 95 % interval, in %", cells, data, notes)


def _of(evidence: Evidence, metric: str, model: str) -> dict[str, Any]:
    scores, estimate = evidence.of(model)[metric], evidence.estimate(metric, model)
    mean = float(scores.dropna().mean())  # NaN if no split defines it
    ends = {"low": estimate.low, "high": estimate.high}
    return {"model": model, "metric": metric, "n": estimate.n, "mean": mean, "sd": scores.std(skipna=False), **ends}


def _table(
    evidence: Evidence,
    part: str,
    what: str,
    cells: list[dict[str, str]],
    data: list[dict[str, Any]],
    notes: list[str],
) -> ResultTable:
    frame = pd.DataFrame(data).assign(task=evidence.task, group=group_id(evidence.group))
    metric = f"{part}/accuracy"
    problem = evidence.estimate(metric, str(frame["model"].iloc[0])).problem
    notes = [*what_is_wrong(evidence.group), *earlier_version(evidence), *notes]
    if problem:
        notes.append(f"No intervals: {problem}.")
    elif (frame["mean"].notna() & frame["low"].isna()).any():
        notes.append(
            "A mean without an interval: a split leaves the score undefined, and the mean is over the others; or all "
            "images have the same value, which tells nothing of their spread."
        )
    shown = pd.DataFrame(cells)
    return ResultTable(title(evidence), f"{PART_NAMES[part]}, {what}", shown, frame, notes, trace(evidence, metric))


def calibrated(evidence: Evidence, part: str, model: str) -> float:
    """Calibration error that this model's probabilities would show on so many images if they were exactly right.

    NaN if no split's predictions can be read.
    """
    # which is not 0: on 140 images 7.6 points (findings/relplot_calibrated_model.sh)
    rng = np.random.default_rng(0)
    errors = []
    for _, run in evidence.of(model).iterrows():
        try:
            of_parts = [evidence.predictions(run, name) for name in predicted_parts(f"{part}/accuracy")]
        except StoreAwayError:
            raise
        except StoreError:
            continue  # the error itself is the mean over the other splits, too
        values = []
        for predictions in filter(len, of_parts):
            certainty = predictions.probability.astype(np.float64)
            draws = [excess_values(rng.random(len(certainty)) < certainty, certainty) for _ in range(DRAWS)]
            values.append(np.mean(draws, axis=0))
        errors.append(np.mean(np.concatenate(values)))
    return float(np.mean(errors)) if errors else np.nan


def reliability(evidence: Evidence, part: str, model: str) -> pd.DataFrame | None:
    """Count hits by certainty over all splits, for a reliability diagram; None without probabilities.

    Returns
    -------
    pandas.DataFrame
        One row a bin of the predicted class's probability that has images: `certainty` (mean), `accuracy`, `images`.
    """
    predictions = evidence.pooled(model, predicted_parts(f"{part}/accuracy"))
    if predictions is None:
        return None
    frame = pd.DataFrame({
        "bin": calibration_bins(predictions["prob"].to_numpy(np.float64)),
        "certainty": predictions["prob"].astype(float),
        "accuracy": (predictions["true"] == predictions["pred"]).astype(float),
    })  # fmt: skip
    groups = frame.groupby("bin")
    return groups.mean().assign(images=groups.size())
