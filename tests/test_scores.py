"""Scores from stored probabilities: against scikit-learn, and their intervals' variance against brute force."""

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from sklearn import metrics

import analysis
from analysis.comparison import compare
from analysis.groups import ComparisonError
from analysis.query import local_artifact
from analysis.scores import calibrated, reliability
from tests.test_comparison import store_of_now  # noqa: F401 - a fixture
from tracking.keys import PREDICTIONS
from tracking.scores import DERIVED, SCORES, UnknownScoreError, score_of


def predictions(n: int = 300, classes: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Labels and probabilities that know something of them; with ties."""
    rng = np.random.default_rng(seed)
    true = rng.choice(classes, n, p=np.arange(1, classes + 1) / np.arange(1, classes + 1).sum())
    logits = np.round(rng.normal(0, 1, (n, classes)) + 1.5 * np.eye(classes)[true], 1)
    probs = np.exp(logits)
    return true, probs / probs.sum(1, keepdims=True)


def test_derived_scores_are_scikit_learns() -> None:
    true, probs = predictions(classes=8)
    expected = {
        "auc": metrics.roc_auc_score(true, probs, multi_class="ovr", average="macro"),
        "brier": metrics.brier_score_loss(true, probs, labels=range(8), scale_by_half=False),
        "top_5": metrics.top_k_accuracy_score(true, probs + 1e-9 * np.arange(8, 0, -1), k=5),  # ties: the first count
    }
    for name, value in expected.items():
        assert np.mean(DERIVED[name].of_probabilities(true, probs)) == pytest.approx(value, abs=1e-12), name
    loss = SCORES["loss"].of_probabilities(true, probs)
    assert np.mean(loss) == pytest.approx(metrics.log_loss(true, probs), abs=1e-12)
    impossible = SCORES["loss"].of_probabilities(np.array([1]), np.array([[1.0, 0.0]]))
    assert impossible == pytest.approx(-np.log(1e-15))


def test_calibration_error_is_the_plain_one() -> None:
    true, probs = predictions(500)
    certainty, right = probs.max(1), probs.argmax(1) == true
    error = 0.0
    for low in np.arange(15) / 15:
        inside = (certainty > low) & (certainty <= low + 1 / 15)
        if inside.any():
            error += inside.mean() * abs(right[inside].mean() - certainty[inside].mean())
    values = DERIVED["calibration_error"].of_probabilities(true, probs)
    assert np.mean(values) == pytest.approx(error, abs=1e-9)


def test_auc_values_have_delongs_variance() -> None:
    true, probs = predictions(200, 2)
    values = DERIVED["auc"].of_probabilities(true, probs)
    score = probs[:, 1]
    positive, negative = score[true == 1], score[true == 0]
    wins = (positive[:, None] > negative) + 0.5 * (positive[:, None] == negative)
    delong = np.var(wins.mean(1), ddof=1) / len(positive) + np.var(wins.mean(0), ddof=1) / len(negative)
    assert np.var(values) / len(values) == pytest.approx(delong, rel=0.05)  # which divides by m - 1
    alone = DERIVED["auc"].of_probabilities(np.ones(9, int), probs[:9])
    assert np.isnan(alone).all()  # there is nothing to rank
    absent = np.where(true == 0, 0, 2)  # class 1 does not occur
    three = np.column_stack([probs, np.zeros(len(probs))])
    assert np.isfinite(DERIVED["auc"].of_probabilities(absent, three)).all()


@pytest.mark.parametrize("kind", ["precision", "recall", "f1"])
def test_scores_of_a_class(kind: str) -> None:
    true, probs = predictions()
    predicted = probs.argmax(1)
    of_classes = metrics.precision_recall_fscore_support(true, predicted)[:3]
    expected = dict(zip(("precision", "recall", "f1"), of_classes, strict=True))
    for label in range(4):
        values = score_of(f"test/{kind}:{label}").per_image(true, predicted)
        assert np.mean(values) == pytest.approx(expected[kind][label], abs=1e-12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isnan(score_of(f"test/{kind}:9").per_image(true, predicted)).all()
    rng = np.random.default_rng(1)
    draws = rng.integers(len(true), size=(2000, len(true)))
    f = getattr(metrics, f"{kind}_score")
    resampled = [f(true[row] == 3, predicted[row] == 3) for row in draws[:400]]
    values = score_of(f"test/{kind}:3").per_image(true, predicted)
    assert np.std(values) / np.sqrt(len(values)) == pytest.approx(np.std(resampled), rel=0.15)
    for metric in (f"test/{kind}:", f"test/{kind}:x", f"last_val/{kind}:1", f"tests/{kind}:1"):
        with pytest.raises(UnknownScoreError):
            score_of(metric)


def test_the_command_prints_what_the_estimate_says(store_of_now: str, run_analysis) -> None:  # noqa: F811
    uri = ("--tracking-uri", store_of_now)
    result = run_analysis("scores", "task3", "--format", "json", *uri)
    assert result.exit_code == 0, result.stderr
    rows = json.loads(result.stdout)[0]["rows"]
    evidence = analysis.Evidence(analysis.choose_group(analysis.load_runs(["task3"], store_of_now)))
    assert {row["metric"].split("/")[1] for row in rows} == {
        "accuracy", "f1_macro", "auc", "loss", "brier", "calibration_error",
    }  # fmt: skip
    for row in rows:
        evidence.need(row["metric"])
        estimate = evidence.estimate(row["metric"], row["model"])
        assert (row["mean"], row["n"]) == (pytest.approx(estimate.mean), 4)
        assert row["low"] == (pytest.approx(estimate.low) if np.isfinite(estimate.low) else None)
        assert (row["if_calibrated"] is not None) == row["metric"].endswith("calibration_error")
    text = run_analysis("scores", "task3", "--part", "test", *uri).stdout
    assert "macro AUC" in text and "perfectly calibrated" in text and "top-5" not in text
    text = run_analysis("scores", "task3", "--classes", *uri).stdout
    assert "precision" in text and "Intervals of rare classes are too short" in text
    assert run_analysis("scores", "task3", "--part", "none", *uri).exit_code == 2


def test_settings_are_compared_by_scores_that_training_does_not_log(store_of_now: str) -> None:  # noqa: F811
    evidence = analysis.Evidence(analysis.choose_group(analysis.load_runs(["task3"], store_of_now)))
    pairs = [("networks", "lenet5", "vggnet")]
    (test,) = compare(evidence, "test/auc", pairs=pairs).itertuples()
    assert np.isfinite(test.difference) and np.isfinite(test.p)
    with pytest.raises(ComparisonError, match="with 3 classes: it takes more than 5"):
        compare(evidence, "test/top_5")
    evidence.need("test/brier")
    assert evidence.estimate("test/brier", "vggnet").low >= 0


def test_a_run_without_its_file_is_left_out(store_of_now: str, tmp_path: Path, run_analysis) -> None:  # noqa: F811
    shutil.copytree(Path(store_of_now.removeprefix("sqlite:///")).parent, tmp_path / "copy")
    uri = f"sqlite:///{tmp_path}/copy/mlflow.db"
    run = analysis.load_runs(["task3"], uri).query("model == 'vggnet'").iloc[0]
    local_artifact(run["run_id"], PREDICTIONS, uri).unlink()
    for command, *options in (("scores",), ("scores", "--classes"), ("report", "--out", f"{tmp_path}/r")):
        result = run_analysis(command, "task3", *options, "--tracking-uri", uri)
        assert result.exit_code == 0, result.stderr
    evidence = analysis.Evidence(analysis.choose_group(analysis.load_runs(["task3"], uri)), uri)
    assert 0 < calibrated(evidence, "test", "vggnet") < 0.3


def test_calibrated_probabilities_show_the_error_that_stands_beside(store_of_now: str) -> None:  # noqa: F811
    evidence = analysis.Evidence(analysis.choose_group(analysis.load_runs(["task3"], store_of_now)))
    assert 0.005 < calibrated(evidence, "test", "vggnet") < 0.3
    curve = reliability(evidence, "test", "vggnet")
    assert curve is not None and curve["images"].sum() == 4 * 10 and curve["accuracy"].between(0, 1).all()
