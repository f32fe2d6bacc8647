"""Comparison groups, tables and tests of differences, on stores written through the real tracker."""

import contextlib
import csv
import dataclasses
import io
import itertools
import json
import os
import re
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.cells import cell_len
from scipy import stats
from sklearn.metrics import f1_score, roc_auc_score

import analysis
import tracking
from analysis import comparison, figures, query, statistics
from analysis.comparison import compare
from analysis.figures import draw_figures
from analysis.formats import render
from analysis.groups import ComparisonError, group_id, is_complete, list_groups, what_is_wrong
from analysis.tables import (
    ResultTable,
    _sentence,
    baselines_not_beaten,
    difference_table,
    number,
    score_table,
    verdict_sentences,
)
from tests.conftest import ROOT, new_store
from tracking import keys, scores
from tracking.commands import script_tasks
from tracking.predictions import Predictions, of_classes

SETTINGS = {
    "dataset": "d", "n_splits": 4, "leak_free": False, "lr": 1e-3, "weight_decay": 0.01, "batch_size": 8, "epochs": 2,
    "patience": 7, "augment": False, "precision": "fp32", "device": "cpu", "threads": 1, "seed": 0,
    "split_seed": 0, "train_seed": 0, "parameters": 10, "macs": 20,
}  # fmt: skip
TAGS = {"task": "task3", "question": "Which?", "dataset_digest": "0" * 64, "source_digest": "s-a",
        "git_commit": "0123-dirty"}  # fmt: skip
PROTOCOLS = {  # images to train on, to validate, to test
    "repeated holdout 3:2": (12, 8, 10),
    "stratified k-fold": (15, 5, 10),
    "repeated holdout 2:49:49": (2, 49, 49),
}


def split_images(protocol: str, number: int) -> dict[str, np.ndarray]:
    """Validation and test images of a split: test fixed, behind the pool, but in the last protocol."""
    n_train, n_val, n_test = PROTOCOLS[protocol]
    order = np.random.default_rng(number).permutation(sum(PROTOCOLS[protocol]))
    if protocol.endswith("49:49"):
        return {"val": np.sort(order[:n_val]), "test": np.sort(order[n_val : n_val + n_test])}
    pool = n_train + n_val
    if protocol.endswith("fold"):
        return {"val": np.arange(number * n_val, (number + 1) * n_val), "test": np.arange(pool, pool + n_test)}
    return {"val": np.sort(order[order < pool][:n_val]), "test": np.arange(pool, pool + n_test)}


def log_model(
    uri: str, model: str, skill: float, protocol: str = "repeated holdout 3:2", splits: int = 4, *,
    predictions: bool = True, tmp: Path, task: str = "task3", replicates: int = 0, **other: object,
) -> None:  # fmt: skip
    """Log the runs of a model that is right with probability `skill`, three classes.

    With `replicates` they are as of this version: so many trainings a split, and probabilities of all classes.
    """
    store = tracking.open_store(uri)
    n_train, n_val, n_test = PROTOCOLS[protocol]
    name = "".join(f"{key}{value}" for key, value in other.items())
    shared = SETTINGS | {"model": model, "protocol": protocol} | other
    own = TAGS | {"task": task}
    with tracking.parent_run(store, task, model, shared, own | {"fingerprint": f"{model}{name}"}) as parent:
        for number, replicate in itertools.product(range(splits), range(max(1, replicates))):
            rng = np.random.default_rng([number, *model.encode()] + [replicate] * (replicate > 0))
            arrays, scores = {}, {"best_epoch": 1.0, "epochs_run": 2.0, "train_seconds": 3.0}
            for part, index in split_images(protocol, number).items():
                true = index % 3
                pred = np.where(rng.random(len(index)) < skill, true, (true + 1) % 3)
                arrays |= {f"{part}_index": index, f"{part}_true": true, f"{part}_pred": pred}
                arrays[f"{part}_prob"] = np.full(len(index), 0.5, np.float32)
                prefix = "test" if part == "test" else "best_val"
                scores |= {f"{prefix}/accuracy": np.mean(true == pred), f"{prefix}/f1_micro": np.mean(true == pred)}
                scores |= {f"{prefix}/f1_macro": f1_score(true, pred, average="macro"), f"{prefix}/loss": 1 - skill}
            if replicates:
                stored = with_probabilities(arrays, rng)
                arrays, cross_val = stored.arrays(), stored.cross_val
                assert cross_val is not None
                scores["cross_val/accuracy"] = np.mean(cross_val.true == cross_val.predicted)
                scores["cross_val/f1_macro"] = f1_score(cross_val.true, cross_val.predicted, average="macro")
                scores |= {"cross_val/f1_micro": scores["cross_val/accuracy"], "cross_val/loss": cross_val.loss}
                scores |= {"best_val/loss": stored.val.loss, "test/loss": stored.test.loss}
            sizes = {"split": number, "n_train": n_train, "n_val": n_val, "n_test": n_test}
            sizes |= {"replicate": replicate} if replicates > 1 else {}
            tags = own | {"split_hash": f"h{number}", "fingerprint": f"{model}{number}{name}{replicate or ''}"}
            tracking.begin_again(store, task, tags)
            claimed = tracking.claim(parent, f"{model} {number}", shared | sizes, tags)
            with tracking.child_run(store, claimed) as child:
                if predictions:
                    folder = tmp / f"{task}{model}{number}{replicate}{len(other)}"
                    folder.mkdir(exist_ok=True)
                    np.savez(folder / keys.PREDICTIONS, **arrays)
                    child.log_files(folder)
                child.log_metrics({key: float(value) for key, value in scores.items()})


def with_probabilities(arrays: dict[str, np.ndarray], rng: np.random.Generator) -> Predictions:
    """Add probabilities of three classes to predictions, and some other ones for a half of the validation part."""
    parts = {}
    for part in ("val", "test"):
        predicted = arrays[f"{part}_pred"]
        logits = rng.normal(0, 1, (len(predicted), 3))
        logits[np.arange(len(predicted)), predicted] += 5
        log_probs = (logits - np.log(np.exp(logits).sum(1, keepdims=True))).astype(np.float32)
        parts[part] = of_classes(arrays[f"{part}_index"], arrays[f"{part}_true"], log_probs)
    val = parts["val"]
    half = (np.arange(len(val)) % 2).astype(np.uint8)
    other = np.where(half[:, None] == 1, np.roll(val.log_probs, 1, 1), val.log_probs)
    crossed = of_classes(val.index, val.true, other)
    return Predictions(val, parts["test"], crossed, half, np.array([False, True]))


def copy_of(uri: str, folder: Path) -> Path:
    """Copy of a database, with what is still in its write-ahead log."""
    path = folder / "mlflow.db"
    with contextlib.closing(sqlite3.connect(uri.removeprefix("sqlite:///"))) as source:
        with contextlib.closing(sqlite3.connect(path)) as copy:
            source.backup(copy)
    return path


def image_values(runs: pd.DataFrame, model: str, part: str, macro: bool = False) -> pd.DataFrame:
    """Correctness, or what macro-F1 is the mean of; images in rows, splits in columns."""
    columns = {}
    for _, run in runs[runs["model"] == model].iterrows():
        predictions = analysis.load_predictions(run).query("part == @part").set_index("index")
        true, predicted = predictions["true"], predictions["pred"]
        values = scores.macro_f1_values(true, predicted) if macro else (true == predicted).astype(float)
        columns[run["split"]] = pd.Series(values, predictions.index)
    return pd.DataFrame(columns)


OTHERS = {"split_seed": 1, "train_seed": 1, "lr": 1.0, "precision": "fp16", "epochs": 9,
          "augment": True, "leak_free": True}  # fmt: skip


@pytest.fixture(scope="module")
def store_of_four(empty_database: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The URI of a store whose newest complete group has four models; it is not changed.

    An unfinished run of LeNet-5 differs in lr. The same store has, as other tasks, the material of `runs_of`.
    """
    folder = tmp_path_factory.mktemp("comparison") / "four"
    uri = new_store(empty_database, folder)
    for model, skill in (("lenet5", 0.35), ("vggnet", 0.95), ("linear", 0.6), ("majority", 0.3)):
        log_model(uri, model, skill, tmp=folder)
    log_model(uri, "lenet5", 0.5, splits=1, tmp=folder, lr=1.0)
    for model, skill in (("lenet5", 0.4), ("vggnet", 0.7), ("resnetcnn", 0.9), ("linear", 0.6), ("majority", 0.3)):
        log_model(uri, model, skill, "stratified k-fold", tmp=folder, task="task2")
    for model, skill in (("lenet5", 0.4), ("vggnet", 0.7)):
        log_model(uri, model, skill, "repeated holdout 2:49:49", tmp=folder, task="task2")
    for key in [key for key in OTHERS if key != "lr"]:
        log_model(uri, "lenet5", 0.5, splits=1, tmp=folder, **{key: OTHERS[key]})
    return uri


@pytest.fixture
def runs_of(store_of_four: str) -> Callable[..., pd.DataFrame]:
    """The runs of a protocol and of some models (default: all), without those that differ in a setting."""

    def select(protocol: str, *models: str) -> pd.DataFrame:
        runs = analysis.load_runs(["task2", "task3"], store_of_four)
        runs = runs[runs["protocol"].eq(protocol) & runs["fingerprint"].str.fullmatch(r"[a-z]+5?\d")]
        return (runs[runs["model"].isin(models)] if models else runs).reset_index(drop=True)

    return select


HOLDOUT, FOLDS, SMALL_TRAIN = PROTOCOLS


def without_files(runs: pd.DataFrame, *models: str) -> pd.DataFrame:
    """The same runs where the artifacts of some models (default: all) cannot be found."""
    lost = runs["model"].isin(models or set(runs["model"]))
    return runs.assign(artifact_uri=runs["artifact_uri"].mask(lost, "file:///nowhere"))


def test_mean_sd_and_a_missing_split(runs_of: Callable[..., pd.DataFrame]) -> None:
    runs = runs_of(HOLDOUT, "lenet5", "vggnet")
    runs = runs[runs["model"].ne("vggnet") | runs["split"].ne(3)]
    table = analysis.comparison_table(runs)
    assert table.index.tolist() == ["vggnet", "lenet5"]
    scores = runs.groupby("model")["test/accuracy"]
    assert table["mean"].to_dict() == pytest.approx(scores.mean().to_dict())
    assert table["sd"].to_dict() == pytest.approx(scores.std().to_dict())
    assert table[["n", "n_expected", "parameters", "macs"]].to_numpy().tolist() == [[3, 4, 10, 20], [4, 4, 10, 20]]
    assert what_is_wrong(runs) == ["vggnet has 3 of 4 splits; not done yet: 3."]
    pair = analysis.pairwise_tests(runs).iloc[0]
    assert pair["n"] == 3  # only the splits that both have
    common = runs[runs["split"] < 3].pivot(index="split", columns="model", values="test/accuracy")
    assert pair["difference"] == pytest.approx((common["vggnet"] - common["lenet5"]).mean())


@pytest.mark.parametrize("metric", ["test/accuracy", "best_val/accuracy", "best_val/f1_macro"])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_all_scored_images_make_one_estimate(protocol: str, metric: str, runs_of: Callable[..., pd.DataFrame]) -> None:
    runs = runs_of(protocol, "lenet5", "vggnet")
    pair = analysis.pairwise_tests(runs, metric, rope=0.02).iloc[0]
    assert (pair["model_a"], pair["model_b"]) == ("vggnet", "lenet5")  # the better first
    part, score = metric.split("/")
    values = {
        model: image_values(runs, model, part.removeprefix("best_"), score == "f1_macro")
        for model in ("vggnet", "lenet5")
    }
    n_train, n_val, n_test = PROTOCOLS[protocol]
    pool = n_train + n_val + (n_test if protocol == SMALL_TRAIN else 0)
    difference = values["vggnet"] - values["lenet5"]
    long = difference.stack().dropna()  # index: image, split
    images, splits = long.index.get_level_values(0), long.index.get_level_values(1)
    expected = statistics.score_estimate(long, splits, images, n_train, pool)
    for field, found in (("mean", "difference"), ("se", "se"), ("low", "low"), ("high", "high"), ("p", "p")):
        assert pair[found] == pytest.approx(getattr(expected, field), rel=1e-9), field
    belief = expected.posterior(0.02)
    assert pair["p_equivalent"] == pytest.approx(belief.p_equivalent, rel=1e-9)
    assert pair["p_better"] == pytest.approx(belief.p_better, rel=1e-9)
    row = analysis.comparison_table(runs, metric).loc["lenet5"]
    own = values["lenet5"].stack().dropna()
    expected = statistics.score_estimate(
        own, own.index.get_level_values(1), own.index.get_level_values(0), n_train, pool
    )
    low, high = max(0, expected.low), min(1, expected.high)  # no score is above 1
    assert (row["mean"], row["low"], row["high"]) == pytest.approx((expected.mean, low, high), rel=1e-9)


def test_the_last_epoch_has_no_interval(runs_of: Callable[..., pd.DataFrame]) -> None:
    runs = runs_of(HOLDOUT, "lenet5", "vggnet")
    runs["last_val/accuracy"] = runs["best_val/accuracy"]
    pair = analysis.pairwise_tests(runs, "last_val/accuracy").iloc[0]
    assert np.isnan(pair["p"]) and "needs scores of single images, which are not stored" in pair["problem"]
    old = analysis.pairwise_tests(runs, "best_val/loss").iloc[0]
    assert np.isnan(old["p"]) and "probabilities of all classes" in old["problem"] and old["verdict"] == "no test"


@pytest.mark.parametrize("n", [1, 2, 3])
def test_too_few_splits_have_scores_and_no_verdict(n: int, runs_of: Callable[..., pd.DataFrame]) -> None:
    runs = runs_of(HOLDOUT)
    evidence = analysis.Evidence(analysis.choose_group(runs[runs["split"] < n]))
    table = score_table(evidence, "test/accuracy")
    assert set(table.cells["95 % interval"]) == {""} and not table.cells["model"].str.contains("†").any()
    takes = f"{'1 split is' if n == 1 else f'{n} splits are'} finished, and an interval or a verdict takes 4"
    assert f"Where there is no interval: {takes}." in table.notes
    assert table.data["mean"].notna().all() and table.data["sd"].notna().all() == (n > 1)
    pairs = difference_table(evidence, "test/accuracy", 0.01)
    assert set(pairs.data["verdict"]) == {"no test"} and f"No test: {takes}." in pairs.notes
    assert pairs.data[["p", "p_holm", "low", "high", "p_better"]].isna().all(axis=None)
    (sentence,) = verdict_sentences(evidence, "test/accuracy", 0.01)
    assert sentence.endswith(f"and there is no test: {takes}.")


def test_holm_within_each_family_and_baselines_apart(runs_of: Callable[..., pd.DataFrame]) -> None:
    tests = analysis.pairwise_tests(runs_of(FOLDS))
    assert tests["family"].value_counts().to_dict() == {"networks against baselines": 6, "pairs of networks": 3}
    for _, family in tests.groupby("family"):
        assert family["p_holm"].to_numpy() == pytest.approx(statistics.holm(family["p"].to_numpy()))
    assert not set(tests["model_a"]) & {"linear", "majority"}


def test_mcnemar_pools_the_folds(runs_of: Callable[..., pd.DataFrame]) -> None:
    runs = runs_of(FOLDS, "lenet5", "vggnet")
    a, b = (image_values(runs, model, "val").sum(axis=1).astype(bool) for model in ("vggnet", "lenet5"))
    expected = stats.binomtest(int((a & ~b).sum()), int((a ^ b).sum())).pvalue
    assert analysis.pairwise_tests(runs, "best_val/accuracy").iloc[0]["mcnemar_p"] == pytest.approx(expected)
    assert np.isnan(analysis.pairwise_tests(runs).iloc[0]["mcnemar_p"])  # the test part is no out-of-fold prediction
    other = runs.assign(split=runs["split"].replace({3: 7}), repetitions=2)  # not each image once
    assert np.isnan(analysis.pairwise_tests(other, "best_val/accuracy").iloc[0]["mcnemar_p"])


def test_all_repetitions_of_folds_are_expected(runs_of: Callable[..., pd.DataFrame]) -> None:
    runs = runs_of(FOLDS, "lenet5", "vggnet")
    later = runs[runs["split"] < 3].assign(split=runs["split"] + 4, repetitions=2)
    extended = pd.concat([runs, later.assign(run_id=later["run_id"] + "x")], ignore_index=True)
    (group,) = analysis.comparison_groups(extended)  # the same group
    assert group_id(group) == group_id(runs) and not is_complete(group)
    assert analysis.comparison_table(extended)[["n", "n_expected"]].to_numpy().tolist() == [[7, 8], [7, 8]]
    assert "vggnet has 7 of 8 splits; not done yet: 7." in what_is_wrong(group)


@pytest.mark.parametrize("key", ["protocol", *OTHERS])
def test_groups_never_mix(key: str, store_of_four: str, runs_of: Callable[..., pd.DataFrame]) -> None:
    base = runs_of(HOLDOUT, "lenet5", "vggnet")
    everything = analysis.load_runs(["task3"], store_of_four)
    if key == "protocol":
        odd = runs_of(FOLDS, "lenet5").head(1).assign(task="task3")
    else:
        odd = everything[everything["fingerprint"] == f"lenet50{key}{OTHERS[key]}"]
    runs = pd.concat([base, odd])
    groups = analysis.comparison_groups(runs)
    assert [sorted(set(group["model"])) for group in groups] == [["lenet5", "vggnet"], ["lenet5"]]
    assert [len(group) for group in groups] == [8, 1]
    assert analysis.comparison_table(runs)["n"].tolist() == [4, 4]
    assert group_id(groups[0]) != group_id(groups[1])
    assert group_id(analysis.choose_group(runs, group_id(groups[1]))) == group_id(groups[1])
    (line,) = list_groups(runs, groups[0])
    assert group_id(groups[1]) in line and key in line
    assert not any(missing in line for missing in ("nan", "<NA>"))


def test_the_number_of_a_gpu_is_no_group_of_its_own(store_uri: str, tmp_path: Path) -> None:
    for model, device in (("lenet5", "cuda:0"), ("vggnet", "cuda:1"), ("vggnet", "cpu")):
        log_model(store_uri, model, 0.5, splits=1, tmp=tmp_path, device=device)
    groups = analysis.comparison_groups(analysis.load_runs(["task3"], store_uri))
    assert sorted(group["model"].nunique() for group in groups) == [1, 2]


def test_what_a_reader_must_know_is_said(runs_of: Callable[..., pd.DataFrame]) -> None:
    runs = runs_of(HOLDOUT, "lenet5", "vggnet")
    assert what_is_wrong(runs) == []
    assert "generated images" in what_is_wrong(runs.assign(dataset="sample/X"))[0]
    assert what_is_wrong(runs.assign(dataset="my-sample")) == []
    first = runs["run_id"] == runs["run_id"].iloc[0]
    unpaired = runs.assign(split_hash=runs["split_hash"].mask(first, "other"))
    assert "split 0; they cannot be compared" in what_is_wrong(unpaired)[0]
    pair = analysis.pairwise_tests(unpaired).iloc[0]
    assert np.isnan(pair["p"]) and "not trained and scored on the same images" in pair["problem"]
    # models have code of their own; what all share must be the same
    assert what_is_wrong(runs.assign(source_digest=np.where(runs["model"] == "vggnet", "s-a", "s-b"))) == []
    for changed in ("t-a", "s-b"):
        other = runs.assign(source_digest=runs["source_digest"].mask(first, changed))
        assert "version of the code" in what_is_wrong(other)[0]


def test_a_table_warns_of_scored_images_whose_duplicates_were_trained_on(runs_of: Callable[..., pd.DataFrame]) -> None:
    runs = runs_of(HOLDOUT, "lenet5")
    assert what_is_wrong(runs.assign(leaking_images=0.0, leaking_test=0.0)) == []
    (test_only,) = what_is_wrong(runs.assign(leaking_images=3.0, leaking_test=3.0))
    assert "a near duplicate of 3 of 10 test images (mean over splits) was trained on; --leak-free" in test_only
    (both,) = what_is_wrong(runs.assign(leaking_images=[4.0, 4, 4, 5], leaking_test=3.0))
    assert "of 3 of 10 test images and 1.25 of 8 validation images (mean over splits)" in both


def test_a_repeated_split_counts_once_and_a_failed_one_not(store_uri: str, tmp_path: Path) -> None:
    log_model(store_uri, "lenet5", 0.1, tmp=tmp_path)
    log_model(store_uri, "lenet5", 0.9, splits=1, tmp=tmp_path)
    runs = analysis.load_runs(["task3"], store_uri)
    assert len(runs) == 5
    table = analysis.comparison_table(runs)
    newest = runs[runs["superseded_by"].isna()]
    assert table.loc["lenet5", "n"] == 4 and table.loc["lenet5", "mean"] == pytest.approx(
        newest["test/accuracy"].mean()
    )
    failed = runs.assign(status=runs["status"].mask(runs["split"] == 2, "FAILED"))
    assert analysis.comparison_table(failed).loc["lenet5", "n"] == 3


def test_missing_values_are_not_dropped(runs_of: Callable[..., pd.DataFrame]) -> None:
    runs = runs_of(HOLDOUT, "lenet5", "vggnet")
    runs.loc[runs["model"].eq("lenet5") & runs["split"].eq(1), "test/accuracy"] = np.nan
    assert np.isnan(analysis.comparison_table(runs).loc["lenet5", "mean"])
    pair = analysis.pairwise_tests(runs).iloc[0]
    assert np.isnan(pair["difference"]) and "missing or not finite" in pair["problem"]


def test_an_unfinished_group_does_not_hide_a_complete_one(store_of_four: str) -> None:
    runs = analysis.load_runs(["task3"], store_of_four)  # of lr 1.0 one split, which is newer
    assert analysis.choose_group(runs)["lr"].unique().tolist() == [1e-3]
    assert analysis.choose_group(runs[runs["lr"] == 1.0])["lr"].unique().tolist() == [1.0]


def test_what_cannot_be_said_is_refused(runs_of: Callable[..., pd.DataFrame]) -> None:
    runs = runs_of(HOLDOUT, "lenet5")
    with pytest.raises(ValueError, match="no split has finished"):
        analysis.comparison_table(runs.assign(status="RUNNING"))
    with pytest.raises(ValueError, match="unknown metric 'test/acc'; did you mean test/accuracy"):
        analysis.comparison_table(runs, "test/acc")
    with pytest.raises(ValueError, match="has last_val/accuracy"):
        analysis.comparison_table(runs, "last_val/accuracy")
    with pytest.raises(ValueError, match="only lenet5 has finished splits"):
        analysis.pairwise_tests(runs)
    with pytest.raises(ValueError, match="no comparison group 'x'"):
        analysis.choose_group(runs, "x")
    alone = analysis.comparison_table(runs[runs["split"] == 0]).loc["lenet5"]
    assert np.isfinite(alone["mean"]) and np.isnan([alone["sd"], alone["low"], alone["high"]]).all()


def test_old_runs_without_predictions_are_said(store_uri: str, tmp_path: Path, run_analysis) -> None:
    log_model(store_uri, "lenet5", 0.4, tmp=tmp_path)
    log_model(store_uri, "vggnet", 0.7, predictions=False, tmp=tmp_path)
    result = run_analysis("compare", "task3", "--tracking-uri", store_uri)
    assert result.exit_code == 0 and "predictions.npz" in result.stdout and "No test:" in result.stdout
    result = run_analysis("table", "task3", "--tracking-uri", store_uri)
    assert result.exit_code == 0 and "Where there is no interval" in result.stdout


def test_a_pair_that_cannot_be_tested_still_counts_in_its_family(runs_of: Callable[..., pd.DataFrame]) -> None:
    runs = without_files(runs_of(FOLDS, "lenet5", "vggnet", "resnetcnn"), "resnetcnn")
    tests = analysis.pairwise_tests(runs)
    (tested,) = tests[tests["p"].notna()].itertuples()
    assert tested.p_holm == pytest.approx(min(1, 3 * tested.p))


def test_more_splits_are_only_asked_for_where_these_were_too_few(runs_of: Callable[..., pd.DataFrame]) -> None:
    tests = analysis.pairwise_tests(runs_of(FOLDS), "best_val/accuracy", rope=0.0)
    unclear = tests[tests["verdict"] == "not distinguishable"]
    assert len(unclear) and (unclear["splits_needed"].fillna(99) > 4).all()


def a_pair(**other: Any) -> pd.Series:
    known = {
        "model_a": "a", "model_b": "b", "difference": 0.02, "low": 0.01, "high": 0.03, "p_holm": 0.01, "level": 0.05,
        "problem": "", "p_equivalent": 0.1, "verdict": "better", "splits_needed": pd.NA, "limit": "images",
    }  # fmt: skip
    return pd.Series(known | other)


@pytest.mark.parametrize(("pair", "metric", "sentence"), [
    ({}, "test/accuracy", "a is better than b: its accuracy is higher by 2.0 points, 95 % interval 1.0 to 3.0, Holm p "
     "0.010."),
    ({"verdict": "worse", "difference": -0.02, "low": -0.03, "high": -0.01}, "test/f1_macro",
     "a is worse than b: its macro-F1 is lower by 2.0 points, 95 % interval 1.0 to 3.0, Holm p 0.010."),
    ({"difference": -0.2, "low": -0.3, "high": -0.1, "p_holm": 0.0}, "test/loss",
     "a is better than b: its loss is lower by 0.200 nats, 95 % interval 0.100 to 0.300, Holm p < 0.001."),
    ({"verdict": "practically the same", "p_equivalent": 0.97, "p_holm": 0.2, "difference": 0.001, "low": -0.004},
     "test/accuracy", "a and b are practically the same: they differ by 0.1 points, 95 % interval -0.4 to 3.0, and "
     "with probability 0.97 by no more than 1.0 points."),
    ({"verdict": "not distinguishable", "p_holm": 0.2, "low": -0.004, "splits_needed": 12}, "test/accuracy",
     "a and b are not distinguishable: they differ by 2.0 points, 95 % interval -0.4 to 3.0, Holm p 0.200; to find "
     "such a difference with 80 % power would take about 12 splits of this kind."),
    ({"verdict": "not distinguishable", "p_holm": 0.2}, "test/accuracy", "a and b are not distinguishable: they differ "
     "by 2.0 points, 95 % interval 1.0 to 3.0 (of this pair alone: of many, some exclude 0 by chance), Holm p 0.200; "
     "to find such a difference with 80 % power would take more images to score, not more splits."),
    ({"verdict": "not distinguishable", "p_holm": 0.2, "low": -0.004, "limit": "training"}, "test/accuracy", "a and b "
     "are not distinguishable: they differ by 2.0 points, 95 % interval -0.4 to 3.0, Holm p 0.200; to find such a "
     "difference with 80 % power would take other training images: those that all splits share set the limit."),
    ({"verdict": "no test", "problem": "one split"}, "test/accuracy", "a and b differ by 2.0 points of accuracy, and "
     "there is no test: one split."),
])  # fmt: skip
def test_sentences(pair: dict[str, Any], metric: str, sentence: str) -> None:
    assert _sentence(a_pair(**pair), metric, 0.01) == sentence


def test_a_small_but_clear_lead_over_a_baseline_beats_it(runs_of: Callable[..., pd.DataFrame]) -> None:
    runs = runs_of(HOLDOUT, "vggnet", "linear")
    evidence = analysis.Evidence(analysis.choose_group(runs))
    (test,) = compare(evidence, "test/accuracy", rope=0.9).itertuples()
    assert test.verdict == "practically the same" and test.p_holm < 0.05
    assert baselines_not_beaten(evidence, "test/accuracy") == {}
    swapped = runs.assign(model=runs["model"].map({"vggnet": "linear", "linear": "vggnet"}))
    evidence = analysis.Evidence(analysis.choose_group(swapped))
    assert "vggnet is worse than linear (-" in baselines_not_beaten(evidence, "test/accuracy")["vggnet"]


def test_a_model_that_was_just_begun_does_not_hide_the_rest(runs_of: Callable[..., pd.DataFrame]) -> None:
    runs = runs_of(HOLDOUT, "lenet5", "vggnet", "linear")
    runs = runs[runs["model"].ne("linear") | runs["split"].eq(0)]
    before = runs["start_time"].min() - pd.Timedelta(days=1)
    older = runs[runs["model"] == "lenet5"].assign(lr=1.0, start_time=before)  # complete, too
    begun = runs[runs["model"] == "linear"].assign(model="seresnet", run_id="s")
    group = analysis.choose_group(pd.concat([older, runs, begun]))
    assert set(group["model"]) == {"lenet5", "vggnet", "seresnet", "linear"}


def test_a_run_that_says_nothing_is_left_out(store_of_four: str, run_analysis, tmp_path: Path) -> None:
    database = copy_of(store_of_four, tmp_path)
    store = tracking.open_store(f"sqlite:///{database}")
    experiment = store.experiment_id("task3")
    store.client.create_run(experiment, tags={"mlflow.parentRunId": "0" * 32, "task": "task3", "fingerprint": "f"})
    runs = analysis.load_runs(["task3"], store.uri)
    assert len(analysis.comparison_table(runs)) == 4
    result = run_analysis("table", "task3", "--tracking-uri", store.uri)
    assert result.exit_code == 0 and "1 runs lack model, split" in result.stderr


def test_baselines_without_a_finished_network(store_uri: str, tmp_path: Path, run_analysis) -> None:
    for model in ("linear", "majority"):
        log_model(store_uri, model, 0.5, splits=2, tmp=tmp_path)
    store = tracking.open_store(store_uri)
    for run_id in analysis.load_runs(["task3"], store_uri)["parent_id"].unique():
        tracking.Run(store, run_id).log_dataset("d", "0" * 64, "{}")
    uri = ("--tracking-uri", store_uri)
    result = run_analysis("table", "task3", *uri)
    assert result.exit_code == 0 and "majority" in result.stdout and "†" not in result.stdout
    result = run_analysis("compare", "task3", *uri)
    assert result.exit_code == 1 and "a comparison takes two models, one a network" in result.stderr
    result = run_analysis("report", "task3", "--out", str(tmp_path / "r.html"), *uri)
    assert result.exit_code == 0, result.stderr
    assert run_analysis("figures", "task3", "--out", str(tmp_path / "f"), *uri).exit_code == 0
    written = {path.name for path in (tmp_path / "f").iterdir()}
    assert written == {f"scores_by_split.{form}" for form in ("png", "svg", "pdf")}


def test_numbers_that_json_does_not_know_are_null(store_uri: str, tmp_path: Path, run_analysis) -> None:
    for model in ("lenet5", "vggnet"):
        log_model(store_uri, model, 1.0 if model == "vggnet" else 0.0, tmp=tmp_path)
    result = run_analysis("compare", "task3", "--format", "json", "--tracking-uri", store_uri)
    (row,) = json.loads(result.stdout, parse_constant=lambda name: pytest.fail(name))[0]["rows"]
    assert row["p"] is None and row["difference"] == 1 and "all single scores are equal" in row["problem"]


def test_csv_has_the_same_columns_without_a_test_part(store_of_four: str, run_analysis, tmp_path: Path) -> None:
    options = ("--metric", "best_val/accuracy", "--format", "csv", "--tracking-uri")
    full = run_analysis("table", "task3", *options, store_of_four).stdout.splitlines()[0]
    runs = analysis.load_runs(["task3"], store_of_four).assign(**{"test/accuracy": np.nan})
    table = analysis.comparison_table(runs, "best_val/accuracy")
    assert full.split(",") == ["task", "group", "metric", "model", *table.columns]


def test_another_schema_is_one_sentence(store_of_four: str, run_analysis, tmp_path: Path) -> None:
    database = copy_of(store_of_four, tmp_path)
    with contextlib.closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = 'zzzz'")
    result = run_analysis("table", "task3", "--tracking-uri", f"sqlite:///{database}")
    assert result.exit_code == 1
    assert re.fullmatch(r"Error: a newer version of MLflow than \S+ made sqlite:.*\(schema zzzz\); .*\n", result.stderr)


def test_formats_hold_the_same_numbers(
    store_of_four: str, runs_of: Callable[..., pd.DataFrame], run_analysis, tmp_path: Path
) -> None:
    runs = analysis.load_runs(["task3"], store_of_four)
    table = analysis.comparison_table(runs)
    printed = {}
    for form in ("text", "markdown", "latex", "csv", "json"):
        result = run_analysis("table", "task3", "--format", form, "--tracking-uri", store_of_four)
        assert result.exit_code == 0, result.stderr
        printed[form] = result.stdout
        target = tmp_path / f"table.{form}"
        run_analysis("table", "task3", "--format", form, "--out", str(target),
                    "--tracking-uri", store_of_four)  # fmt: skip
        assert target.read_text(encoding="utf-8") == result.stdout
    rows = list(csv.DictReader(io.StringIO(printed["csv"])))
    (document,) = json.loads(printed["json"])
    for row, record, (model, expected) in zip(rows, document["rows"], table.iterrows(), strict=True):
        assert row["model"] == record["model"] == model and row["task"] == record["task"] == "task3"
        assert float(row["mean"]) == record["mean"] == expected["mean"]  # to the last bit
        for form in ("text", "markdown", "latex"):
            assert f"{100 * expected['mean']:.1f}" in printed[form]
    assert {run["run_id"] for run in document["runs"]} <= set(runs["run_id"])
    assert len(runs_of(HOLDOUT)) == 16 and all(run_id in printed["markdown"] for run_id in runs_of(HOLDOUT)["run_id"])
    assert "\\toprule" in printed["latex"] and "lenet5$\\dagger$" in printed["latex"]
    assert "lenet5 is not shown to beat linear (" in printed["text"]
    assert all(len(line) <= 80 for line in printed["text"].splitlines() if "0.95" in line or "vggnet " in line[:8])


def test_another_group_is_listed_and_can_be_chosen(store_of_four: str, run_analysis) -> None:
    result = run_analysis("table", "task3", "--tracking-uri", store_of_four)
    assert "others in the store" in result.stderr and "lr 1.0" in result.stderr
    other = next(line.split()[0] for line in result.stderr.splitlines() if "lr 1.0" in line)
    result = run_analysis("table", "task3", "--group", other, "--tracking-uri", store_of_four)
    assert "1/4" in result.stdout and "vggnet" not in result.stdout


def test_verdicts_in_words(store_of_four: str, run_analysis) -> None:
    options = ("--metric", "best_val/accuracy", "--tracking-uri", store_of_four)
    result = run_analysis("compare", "task3", "--format", "json", *options)
    (document,) = json.loads(result.stdout)
    tests = analysis.pairwise_tests(analysis.load_runs(["task3"], store_of_four), "best_val/accuracy")
    assert [row["p_holm"] for row in document["rows"]] == tests["p_holm"].tolist()
    assert set(tests["verdict"]) <= {"better", "worse", "not distinguishable", "practically the same"}
    for _, row in tests.iterrows():
        clear = row["p_holm"] < 0.05 and row["p_equivalent"] <= 0.95
        assert (row["verdict"] in ("better", "worse")) == clear
    wide = run_analysis("compare", "task3", "--rope", "100", *options)
    assert "practically the same" in " ".join(wide.stdout.split())
    assert all(len(line) <= 80 for line in wide.stdout.splitlines() if line.startswith("vggnet"))


@pytest.mark.parametrize(("arguments", "code", "sentence"), [
    (("table", "task9"), 2, "'task9' is not one of task1, task2, task3; did you mean task"),
    (("table",), 2, "Missing argument"),
    (("nothing",), 2, "No such command"),
    (("table", "task3", "--metric", "test/acuracy"), 2, "did you mean test/accuracy"),
    (("compare", "task3", "--rope", "-1"), 2, "'--rope'"),
    (("compare", "task3", "--rope", "inf"), 2, "'--rope'"),
    (("table", "task3", "--format", "word"), 2, "'--format'"),
    (("table", "task1"), 1, "task1 in the result database"),
    (("compare", "task3", "--group", "ffffffff"), 1, "no comparison group 'ffffffff'; there are "),
    (("table", "task3", "--metric", "last_val/accuracy"), 1, "no run of this comparison group has last_val/accuracy"),
    (("table", "task3", "--out", "/dev/null/x.md"), 1, "/dev/null"),
    (("figures", "task3", "--out", "/dev/null/x"), 1, "/dev/null"),
])  # fmt: skip
def test_bad_input_is_one_sentence(
    arguments: tuple[str, ...], code: int, sentence: str, store_of_four: str, run_analysis
) -> None:
    result = run_analysis(*arguments, MLFLOW_TRACKING_URI=store_of_four)
    assert result.exit_code == code, result.stderr
    assert sentence in " ".join(result.stderr.split()) and "Traceback" not in result.stderr


@pytest.mark.parametrize("command", ["table", "compare", "figures", "report", "export"])
def test_an_unknown_task_is_one_sentence_and_code_2(
    command: str, store_of_four: str, store_uri: str, run_analysis, tmp_path: Path
) -> None:
    for uri in (store_of_four, store_uri, f"sqlite:///{tmp_path}/none.db"):  # without a store the scripts decide
        for tasks in (("task9",), ("task3", "task9")):
            if len(tasks) == 2 and uri != store_of_four:
                continue
            result = run_analysis(command, *tasks, "--out", str(tmp_path / "out"), "--tracking-uri", uri)
            assert result.exit_code == 2 and result.stdout == ""
            assert result.stderr.startswith(f"Error: 'task9' is not one of {', '.join(script_tasks())}; did you mean ")
            assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists() and not (tmp_path / "none.db").exists()


# The registry of scores


@pytest.fixture
def error_rate(monkeypatch: pytest.MonkeyPatch) -> scores.Score:
    """A further score, in the registry for the time of a test: the complement of accuracy, lower is better."""
    score = scores.Score("error_rate", "error rate", "%", False, lambda true, pred: 1 - scores.correct(true, pred))
    metrics = ("best_val/error_rate", "test/error_rate")
    monkeypatch.setitem(scores.SCORES, score.name, score)
    for module in (scores, comparison):
        monkeypatch.setattr(module, "METRICS", (*scores.METRICS, *metrics))
    monkeypatch.setattr(query, "RUN_COLUMNS", (*query.RUN_COLUMNS, *metrics))
    for metric in metrics:
        monkeypatch.setitem(keys.FINAL_METRICS, metric, "share of images whose class was not predicted")
    return score


def with_error_rate(runs: pd.DataFrame) -> pd.DataFrame:
    return runs.assign(**{f"{part}/error_rate": 1 - runs[f"{part}/accuracy"] for part in ("best_val", "test")})


@pytest.mark.parametrize("protocol", [HOLDOUT, SMALL_TRAIN])
def test_direction_unit_and_variance_of_a_further_score_come_from_the_registry(
    protocol: str, error_rate: scores.Score, store_of_four: str, runs_of: Callable[..., pd.DataFrame]
) -> None:
    runs = with_error_rate(runs_of(protocol))
    table, by_accuracy = analysis.comparison_table(runs, "test/error_rate"), analysis.comparison_table(runs)
    assert table.index.tolist() == by_accuracy.index.tolist()  # the lowest error rate first
    for key, mirrored in (("mean", "mean"), ("low", "high"), ("high", "low")):
        assert table[key].to_numpy() == pytest.approx(1 - by_accuracy[mirrored].to_numpy(), abs=1e-12)
    tests, by_accuracy = analysis.pairwise_tests(runs, "test/error_rate"), analysis.pairwise_tests(runs)
    for key in ("model_a", "model_b", "verdict"):
        assert tests[key].tolist() == by_accuracy[key].tolist()
    assert tests["p"].notna().all()  # which takes values of single images
    for key in ("se", "p", "p_worse", "p_equivalent", "p_better"):
        assert tests[key].to_numpy() == pytest.approx(by_accuracy[key].to_numpy(), rel=1e-9)
    assert tests["difference"].to_numpy() == pytest.approx(-by_accuracy["difference"].to_numpy())
    evidence = analysis.Evidence(analysis.choose_group(runs), store_of_four)
    shown = score_table(evidence, "test/error_rate")
    assert shown.cells["error rate"][0].startswith(f"{100 * table['mean'].iloc[0]:.1f}±")
    assert "error rate as mean±sd" in shown.caption and shown.caption.endswith("in %")
    assert "paired differences of error rate in points" in difference_table(evidence, "test/error_rate", 0.01).caption
    for (_, row), sentence in zip(tests.iterrows(), verdict_sentences(evidence, "test/error_rate", 0.01), strict=False):
        assert f"{number(abs(row['difference']), 'test/error_rate')} points" in sentence
        assert row["verdict"] != "better" or "its error rate is lower by" in sentence
    axes = {name: figure.axes[0] for name, _, figure in draw_figures(evidence, "test/error_rate", thumbnails=False)}
    assert axes["scores_by_split"].figure.get_supxlabel().startswith("test error rate (%)\n")
    assert axes["paired_differences"].figure.get_supxlabel().startswith("difference of test error rate (points)\n")
    assert axes["accuracy_against_cost"].figure.get_supylabel() == "test error rate (%)"


def test_figures_of_many_models_show_the_best_and_say_so(store_of_four: str, runs_of, monkeypatch) -> None:
    monkeypatch.setattr(figures, "SHOWN_ROWS", 2)
    evidence = analysis.Evidence(analysis.choose_group(runs_of(FOLDS)), store_of_four)
    table = comparison.tabulate(evidence, "test/accuracy")
    axes = figures.scores_figure(evidence, table, "test/accuracy").axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == list(table.index[:2])
    assert axes.figure.get_supxlabel().endswith(f"the best 2 of {len(table)} models")
    networks = [model for model in table.index if model not in keys.BASELINES]
    axes = figures.differences_figure(evidence, "test/accuracy", 0.01).axes[0]
    pairs = len(networks) * (len(networks) - 1) // 2
    shown = [label.get_text() for label in axes.get_yticklabels()]
    assert shown == [f"{networks[0]} − {other}" for other in networks[1:3]]
    assert axes.figure.get_supxlabel().endswith(f"the best network and others: {len(shown)} of {pairs} pairs")


@pytest.mark.parametrize(
    ("protocol", "metric"),
    [(HOLDOUT, "test/error_rate"), (SMALL_TRAIN, "test/error_rate"), (SMALL_TRAIN, "best_val/error_rate")],
)
def test_a_score_without_values_of_images_gets_no_interval_and_a_sentence(
    protocol: str, metric: str, error_rate: scores.Score, runs_of: Callable[..., pd.DataFrame], monkeypatch
) -> None:
    monkeypatch.setitem(scores.SCORES, "error_rate", dataclasses.replace(error_rate, per_image=None))
    runs = with_error_rate(runs_of(protocol, "lenet5", "vggnet"))
    sentence = f"the interval of {metric} needs scores of single images, which are not stored"
    table, (pair,) = analysis.comparison_table(runs, metric), analysis.pairwise_tests(runs, metric).itertuples()
    assert table[["low", "high"]].isna().all(axis=None) and table[["mean", "sd"]].notna().all(axis=None)
    assert np.isnan([pair.se, pair.low, pair.high, pair.p, pair.p_holm]).all() and np.isfinite(pair.difference)
    assert (pair.verdict, pair.problem) == ("no test", sentence)
    evidence = analysis.Evidence(analysis.choose_group(runs))
    shown = score_table(evidence, metric)
    assert f"Where there is no interval: {sentence}." in shown.notes and set(shown.cells["95 % interval"]) == {""}
    assert f"No test: {sentence}." in difference_table(evidence, metric, 0.01).notes


def test_an_unknown_score_is_refused_everywhere(
    store_of_four: str, runs_of: Callable[..., pd.DataFrame], run_analysis, tmp_path: Path
) -> None:
    runs = runs_of(HOLDOUT)
    evidence = analysis.Evidence(analysis.choose_group(runs), store_of_four)
    sentence = r"unknown metric 'test/acuracy'; did you mean test/accuracy( or [a-z0-9_]+/[a-z0-9_]+)*\?$"
    for refuse in (
        lambda metric: analysis.comparison_table(runs, metric),
        lambda metric: analysis.pairwise_tests(runs, metric),
        lambda metric: score_table(evidence, metric),
        lambda metric: difference_table(evidence, metric, 0.01),
        lambda metric: next(draw_figures(evidence, metric)),
    ):
        with pytest.raises(ComparisonError, match=sentence):
            refuse("test/acuracy")
    for refuse in (scores.score_of, lambda metric: number(0.5, metric)):
        with pytest.raises(scores.UnknownScoreError, match=sentence):
            refuse("test/acuracy")
    with pytest.raises(
        scores.UnknownScoreError, match="unknown metric 'zzz'; there are best_val/accuracy, best_val/f1"
    ):
        scores.score_of("zzz")
    with pytest.raises(scores.UnknownScoreError, match="did you mean .*test/loss"):
        scores.score_of("tests/loss")  # the part must be known, too
    for command in ("table", "compare", "figures", "report", "export"):
        result = run_analysis(command, "task3", "--metric", "test/acuracy", "--out", str(tmp_path / "out"),
                              "--tracking-uri", store_of_four)  # fmt: skip
        assert result.exit_code == 2 and not (tmp_path / "out").exists()
        assert "--metric: unknown metric 'test/acuracy'; did you mean test/accuracy" in " ".join(result.stderr.split())


def test_no_store_and_an_empty_one(run_analysis, tmp_path: Path, store_uri: str) -> None:
    for command in (("table", "task1"), ("report", "task1", "--out", str(tmp_path / "r.html"))):
        result = run_analysis(*command, "--tracking-uri", f"sqlite:///{tmp_path}/none.db")
        assert result.exit_code == 1 and result.stderr.startswith("Error: there is no result database")
        result = run_analysis(*command, "--tracking-uri", store_uri)
        assert result.exit_code == 1 and "no split has finished yet" in result.stderr
        assert result.stderr.count("\n") == 1
    assert not (tmp_path / "none.db").exists() and not (tmp_path / "r.html").exists()


def test_reading_and_tables_do_not_load_mlflow_or_torch(store_of_four: str) -> None:
    code = (
        "import sys, analysis\n"
        f"table = analysis.comparison_table(analysis.load_runs(['task3'], {store_of_four!r}))\n"
        "print(len(table), {'torch', 'mlflow'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "4 set()\n"


@pytest.mark.parametrize("width", [30, 45, 60, 80, 120])
@pytest.mark.parametrize("kind", ["scores", "pairs", "classes"])
def test_no_number_is_cut_however_narrow_the_terminal(width: int, kind: str) -> None:
    rng = np.random.default_rng(width)
    names = ["모델" * 18, "a_model_with_a_name_of_thirty_eight_chr", "a_model_with_a_name_of_thirty_nine_chrs"]
    numbers = {
        "splits": [f"{n}/10" for n in (3, 9, 10)], "accuracy": ["85.6±0.3", "84.9±10.3", "7,850"],
        "95 % interval": ["84.6–85.2", "-100 to 77.1", ""], "micro-F1": ["85.6", "7.1", "100"],
        "macro-F1": ["85.6", "7.1", "100"], "best epoch": ["30", "5", ""], "parameters": ["7,850", "61,706", "5.29M"],
        "MACs": ["0.42M", "231M", "5,288,548"], "s per split": ["0.4", "1,234", "10"],
    }  # fmt: skip
    cells = pd.DataFrame({"model": rng.permutation(names), **numbers})
    if kind == "pairs":
        cells.insert(1, "against", cells["model"].iloc[::-1].to_numpy())
        cells["verdict"] = ["not distinguishable", "better", "practically the same"]
    if kind == "classes":
        cells.insert(1, "class", ["x" * 200, "cat", "dog"])
    table = ResultTable("t", "c", cells, cells, [], cells)
    text = render([table], "text", width)
    lines = text.splitlines()
    note = next((line for line in lines if line.startswith("! no room")), "")
    left_out = {column for column in cells if f" {column}" in note}
    words = set(text.replace("−", " ").split())
    for column in set(numbers) - left_out - ({"splits"} if kind != "scores" else set()):
        assert {word for cell in numbers[column] for word in cell.split()} <= words, column
    drawn = lines[2 : next((i for i, line in enumerate(lines) if line.startswith("!")), None)]
    assert len({tuple(line.split()[:1]) for line in drawn if line}) >= 3
    if width >= 60:
        assert max(map(cell_len, drawn)) <= width


def test_latex_has_minus_signs_dashes_and_the_hyphens_of_options() -> None:
    cells = pd.DataFrame({"model": ["a_b"], "accuracy": ["62.4±1.0"]})
    data = pd.DataFrame({"task": ["task1"], "model": ["a_b"]})
    notes = ["-3.8 of 60–68, 5 %; --leak-free keeps them apart"]
    text = render([ResultTable("t", "c", cells, data, notes, data)], "latex")
    assert r"\par $-$3.8 of 60--68, 5 \%; {-}{-}leak-free keeps them apart" in text  # two hyphens would be a dash
    assert r"a\_b & 62.4$\pm$1.0" in text


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "ascii", "utf-8"])
def test_any_encoding_of_the_output(encoding: str, store_of_four: str) -> None:
    command = [sys.executable, "-m", "analysis", "table", "task3", "--tracking-uri", store_of_four]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONIOENCODING": encoding}, capture_output=True)
    text = done.stdout.decode(encoding)
    assert done.returncode == 0 and ("±" if encoding != "ascii" else "+-") in text and "UnicodeEncodeError" not in text


# Cross-fitted validation, probabilities, and several trainings a split


@pytest.fixture(scope="module")
def store_of_now(empty_database: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The URI of a store of this version's runs, two trainings of a network a split; it is not changed."""
    folder = tmp_path_factory.mktemp("comparison") / "now"
    uri = new_store(empty_database, folder)
    for model, skill, replicates in (("lenet5", 0.5, 2), ("vggnet", 0.9, 2), ("linear", 0.6, 1)):
        log_model(uri, model, skill, tmp=folder, replicates=replicates)
    return uri


def long_values(runs: pd.DataFrame, model: str, per_image: Callable[..., np.ndarray]) -> pd.DataFrame:
    """What a score is the mean of, over cross-fitted validation and test: a row a scored image."""
    frames = []
    for _, run in runs[runs["model"] == model].iterrows():
        stored = query.read_predictions(run)
        for part in (stored.cross_val, stored.test):
            values = per_image(part.true, part.predicted, part.probs)
            place = {"split": run["split"], "replicate": run["replicate"]}
            frames.append(pd.DataFrame({"value": values, "image": part.index, **place}))
    return pd.concat(frames).set_index(["split", "replicate", "image"]).sort_index()["value"]


def test_a_baseline_that_is_trained_once_is_compared_with_every_seed_of_a_network(store_of_now: str) -> None:
    runs = analysis.load_runs(["task3"], store_of_now)
    tests = analysis.pairwise_tests(runs, "all/accuracy")
    row = tests[(tests["model_a"] == "lenet5") & (tests["model_b"] == "linear")].iloc[0]
    ours, theirs = (long_values(runs, name, lambda t, p, _: (t == p).astype(float)) for name in ("lenet5", "linear"))
    once = theirs.xs(0, level="replicate").reindex(ours.index.droplevel("replicate")).to_numpy()
    split, replicate, image = (ours.index.get_level_values(level) for level in ours.index.names)
    expected = statistics.score_estimate(ours - once, split, image, 12, 20, replicate)
    assert row["difference"] == pytest.approx(expected.mean)
    assert (row["low"], row["high"], row["p"]) == pytest.approx((expected.low, expected.high, expected.p))


def test_a_score_of_0_for_all_images_has_no_interval(store_of_now: str) -> None:
    evidence = analysis.Evidence(analysis.choose_group(analysis.load_runs(["task3"], store_of_now)))
    evidence.need("test/recall:7")
    assert evidence.estimate("test/recall:7", "lenet5").problem
    never = scores.Score("never", "never", "%", True, lambda true, predicted: np.zeros(len(true)))
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(scores.SCORES, "never", never)
        evidence.need("test/never")
        estimate = evidence.estimate("test/never", "lenet5")
    assert estimate.mean == 0 and np.isnan(estimate.low) and "all images score 0" in estimate.problem


@pytest.mark.parametrize(("metric", "per_image"), [
    ("all/accuracy", lambda true, predicted, probs: (true == predicted).astype(float)),
    ("all/f1_macro", lambda true, predicted, probs: scores.macro_f1_values(true, predicted)),
    ("all/loss", lambda true, predicted, probs: -np.log(probs[np.arange(len(true)), true])),
    ("all/brier", lambda true, predicted, probs: ((probs - np.eye(3)[true]) ** 2).sum(1)),
])  # fmt: skip
def test_validation_and_test_images_and_all_seeds_make_one_estimate(
    metric: str, per_image: Callable[..., np.ndarray], store_of_now: str
) -> None:
    runs = analysis.load_runs(["task3"], store_of_now)
    tests = analysis.pairwise_tests(runs, metric).set_index(["model_a", "model_b"])
    pair = tests.loc["vggnet", "lenet5"]
    difference = long_values(runs, "vggnet", per_image) - long_values(runs, "lenet5", per_image)
    split, replicate, image = (difference.index.get_level_values(level) for level in range(3))
    expected = statistics.score_estimate(difference, split, image, 12, 20, replicate)
    names = ["se", "low", "high", "p", "of_images", "of_training", "of_seeds"]
    found = [pair["difference"], *pair[names]]
    assert found == pytest.approx([expected.mean, *(getattr(expected, name) for name in names)], rel=1e-6)
    table = analysis.comparison_table(runs, metric)
    assert table.loc["vggnet", "n"] == 4  # splits, not trainings
    own = long_values(runs, "vggnet", per_image)
    assert table.loc["vggnet", "mean"] == pytest.approx(own.groupby(level=0).mean().mean(), rel=1e-6)


def test_all_images_are_the_default_where_every_run_has_them(
    store_of_now: str, store_of_four: str, run_analysis
) -> None:
    runs, old = analysis.load_runs(["task3"], store_of_now), analysis.load_runs(["task3"], store_of_four)
    assert analysis.default_metric(analysis.choose_group(runs)) == "all/accuracy"
    assert analysis.default_metric(analysis.choose_group(old)) == "test/accuracy"
    assert analysis.default_metric(runs.assign(**{"test/accuracy": np.nan})) == "cross_val/accuracy"
    mixed = runs.assign(**{"cross_val/accuracy": runs["cross_val/accuracy"].mask(runs["model"] == "linear")})
    assert analysis.default_metric(mixed) == "test/accuracy"
    shown = run_analysis("table", "task3", "--tracking-uri", store_of_now)
    assert shown.exit_code == 0, shown.stderr
    assert "cross-fitted validation and test images together" in shown.stdout
    assert "earlier version" not in shown.stdout
    pairs = run_analysis("compare", "task3", "--tracking-uri", store_of_now)
    assert re.search(r"variance of one training's difference \d+ % is due to the choice of the scored images, \d+ % to "
                     r"the training images, \d+ % to seeds", pairs.stdout)  # fmt: skip
    shown = run_analysis("table", "task3", "--tracking-uri", store_of_four)
    assert "Runs of an earlier version (lenet5, linear, majority, vggnet) kept no cross-fitted" in shown.stdout
    refused = run_analysis("compare", "task3", "--metric", "test/auc", "--tracking-uri", store_of_four)
    assert refused.exit_code == 1 and "test/auc cannot be derived" in refused.stderr


def test_what_is_the_same_is_adjusted_like_what_is_better(store_of_now: str) -> None:
    runs = analysis.load_runs(["task3"], store_of_now)
    names = ["lenet5", "vggnet", "seresnet"]
    lenet = runs[runs["model"] == "lenet5"]
    three = pd.concat([lenet.assign(model=name, run_id=lenet["run_id"] + name) for name in names])
    evidence = analysis.Evidence(analysis.choose_group(three))
    tests = compare(evidence, "test/accuracy", rope=0.01)
    assert (tests["p"] == 1).all() and (tests["verdict"] == "not distinguishable").all()  # few equal predictions
    assert (compare(evidence, "test/accuracy", rope=0.5)["verdict"] == "practically the same").all()
    wide = compare(analysis.Evidence(analysis.choose_group(runs)), "all/accuracy", rope=0.5)
    for _, family in wide.groupby("family"):
        assert family["p_same_holm"].to_numpy() == pytest.approx(statistics.holm(1 - family["p_equivalent"].to_numpy()))
    assert ((wide["verdict"] == "practically the same") == (wide["p_same_holm"] < 0.05)).all()


def test_a_score_that_training_does_not_log_is_derived(store_of_now: str, run_analysis) -> None:
    uri = ("--tracking-uri", store_of_now)
    runs = analysis.load_runs(["task3"], store_of_now)
    table = analysis.comparison_table(runs, "test/auc")
    expected = {}
    for _, run in runs.iterrows():
        part = query.read_predictions(run).test
        auc = roc_auc_score(part.true, part.probs, multi_class="ovr", average="macro", labels=[0, 1, 2])
        expected.setdefault((run["model"], run["split"]), []).append(auc)
    means = pd.Series({key: np.mean(values) for key, values in expected.items()}).groupby(level=0).mean()
    assert table["mean"].to_dict() == pytest.approx(means.to_dict(), abs=1e-9)
    result = run_analysis("compare", "task3", "--metric", "test/auc", "--format", "json", *uri)
    assert result.exit_code == 0, result.stderr
    assert {row["metric"] for row in json.loads(result.stdout)[0]["rows"]} == {"test/auc"}
    assert run_analysis("table", "task3", "--metric", "all/calibration_error", *uri).exit_code == 0
