"""Planned looks: where they stop, and that their levels bound the error."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import analysis
from analysis import comparison, looks
from analysis.groups import ComparisonError
from analysis.looks import compare_as_planned, levels, look_by_look, parse_looks
from analysis.statistics import MIN_SPLITS
from tests.conftest import new_store
from tests.test_comparison import log_model
from tracking.keys import LOOKS


@pytest.fixture(scope="module")
def eight_splits(empty_database, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The URI of a store with two very different networks, and a third like the second, on 8 splits."""
    folder = tmp_path_factory.mktemp("looks") / "store"
    uri = new_store(empty_database, folder)
    for model, skill in (("lenet5", 0.1), ("vggnet", 0.8), ("seresnet", 0.8)):
        log_model(uri, model, skill, splits=8, tmp=folder, replicates=1, n_splits=8)
    return uri


def test_levels_add_up() -> None:
    assert levels((5, 10, 20)) == pytest.approx([0.0125, 0.0125, 0.025])
    assert sum(levels((4, 7, 11, 40))) == pytest.approx(0.05)
    assert parse_looks("5, 10,20") == (5, 10, 20)
    for text in ("", "5,", "10,5", "5,5", "a", "-5", "5;10"):
        with pytest.raises(ValueError, match="increasing numbers"):
            parse_looks(text)
    with pytest.raises(ValueError, match=f"a verdict takes {MIN_SPLITS}"):
        parse_looks("2,10")


def test_each_pair_keeps_the_look_that_decided_it(eight_splits: str) -> None:
    group = analysis.choose_group(analysis.load_runs(["task3"], eight_splits))
    outcome = look_by_look(analysis.Evidence(group), "test/accuracy", 0.01, (4, 8))
    tests = outcome.tests.set_index(["model_a", "model_b"])
    assert outcome.next_look is None and set(tests["looks"]) == {4, 8}
    for (a, b), row in tests.iterrows():
        n = row["looks"]
        first = analysis.Evidence(group[group["split"] < n])
        assert row["n"] == n and row["level"] == 0.025
        assert row["p"] == pytest.approx(first.estimate("test/accuracy", a, b).p)
        assert ("lenet5" in (a, b)) == (row["verdict"] == "better") == (n == 4)
    assert "every pair" not in outcome.sentence((4, 8)) and "1 of 3 pairs stay undecided" in outcome.sentence((4, 8))


def test_looks_stop_where_all_is_decided_and_wait_where_splits_lack(eight_splits: str) -> None:
    runs = analysis.load_runs(["task3"], eight_splits)
    group = analysis.choose_group(runs[runs["model"] != "seresnet"])
    stopped = look_by_look(analysis.Evidence(group), "test/accuracy", 0.01, (4, 8))
    assert stopped.tests["looks"].tolist() == [4] and stopped.next_look is None
    assert "the last was at 4: every pair is decided" in stopped.sentence((4, 8))
    short = analysis.choose_group(runs[~(runs["model"].eq("vggnet") & runs["split"].eq(2))])
    waiting = look_by_look(analysis.Evidence(short), "test/accuracy", 0.01, (4, 8))
    assert waiting.tests.empty and waiting.next_look == 4
    fewer = analysis.choose_group(runs[runs["split"] < 7])
    waiting = look_by_look(analysis.Evidence(fewer), "test/accuracy", 0.01, (4, 8))
    assert set(waiting.tests["looks"]) == {4} and waiting.next_look == 8


def test_a_plan_does_not_change_after_a_look(eight_splits: str) -> None:
    group = analysis.choose_group(analysis.load_runs(["task3"], eight_splits)).assign(**{LOOKS: "4,6,8"})
    tests, _ = compare_as_planned(analysis.Evidence(group), "test/accuracy", looks=(4, 6, 8))
    assert tests["level"].tolist() == [0.05 * 2 / 8, 0.025, 0.025]  # decided at the second look, and at the first
    with pytest.raises(ComparisonError, match="planned as 4,6,8 and as 4,8, and a plan that changes"):
        compare_as_planned(analysis.Evidence(group), "test/accuracy", looks=(4, 8))


def test_a_look_waits_for_every_seed(empty_database: Path, tmp_path: Path) -> None:
    uri = new_store(empty_database, tmp_path / "store")
    for model, skill in (("lenet5", 0.1), ("vggnet", 0.8)):
        log_model(uri, model, skill, splits=4, tmp=tmp_path, replicates=2, n_splits=4)
    runs = analysis.load_runs(["task3"], uri)
    whole = look_by_look(analysis.Evidence(analysis.choose_group(runs)), "test/accuracy", 0.01, (4, 8))
    assert whole.tests["looks"].tolist() == [4]
    one_less = analysis.choose_group(
        runs[~(runs["model"].eq("vggnet") & runs["split"].eq(1) & runs["replicate"].eq(1))]
    )
    assert look_by_look(analysis.Evidence(one_less), "test/accuracy", 0.01, (4, 8)).next_look == 4


def test_looks_at_folds_are_after_whole_repetitions(eight_splits: str) -> None:
    group = analysis.choose_group(analysis.load_runs(["task3"], eight_splits))
    folds = group.assign(protocol="stratified k-fold", n_splits=4, repetitions=2)
    outcome = look_by_look(analysis.Evidence(folds), "test/accuracy", 0.01, (4, 8))
    assert set(outcome.tests["looks"]) == {4, 8}
    with pytest.raises(ComparisonError, match="after whole repetitions of 4 folds, such as 4,8,16"):
        look_by_look(analysis.Evidence(folds), "test/accuracy", 0.01, (4, 6))
    with pytest.raises(ComparisonError, match="has no more splits"):
        look_by_look(analysis.Evidence(folds.assign(protocol="published validation part")), "test/accuracy", 0.01, (4,))


@pytest.mark.slow
def test_a_run_stops_at_the_look_where_all_is_decided(store_uri: str, run_here, run_analysis) -> None:
    command = ("experiments/task3.py", "--sample", "-m", "lenet5", "-m", "vggnet", "--no-baselines", "--epochs", "2",
               "--batch-size", "8", "--tracking-uri", store_uri)  # fmt: skip
    done = run_here(*command, "--looks", "4,8")
    assert done.returncode == 0 and "the last was at 4: every pair is decided" in done.stdout, done.stderr
    runs = analysis.load_runs(["task3"], store_uri)
    assert runs.groupby("model")["split"].apply(sorted).tolist() == [[0, 1, 2, 3]] * 2
    assert set(runs["looks"]) == {"4,8"} and set(runs["n_splits"]) == {4}  # so the table is complete
    again = run_here(*command, "--looks", "4,8")
    assert again.returncode == 0 and set(analysis.load_runs(["task3"], store_uri)["run_id"]) == set(runs["run_id"])
    shown = run_analysis("compare", "task3", "--tracking-uri", store_uri)
    assert "Of the planned looks (4, 8 splits) the last was at 4" in shown.stdout  # as planned, without the option
    other = run_here(*command, "--looks", "4,6,8")
    assert other.returncode == 1 and "planned as 4,6,8 and as 4,8" in other.stderr


@pytest.mark.parametrize(
    ("script", "options", "reason"),
    [
        ("task3", ("--looks", "4,8", "--n-splits", "8"), "leave out --n-splits and --split"),
        ("task3", ("--looks", "4,8", "--split", "0"), "leave out --n-splits and --split"),
        ("task3", ("--looks", "2,8"), f"a verdict takes {MIN_SPLITS}"),
        ("task3", ("--looks", "8,4"), "increasing numbers"),
        ("task3", ("--looks", "4 8"), "such as 5,10,20, not 4 8"),
        ("task3", ("--looks", "4,2000000000"), "is not in the range 1<=x<=10000"),
        ("task3", ("--looks", "4,8", "-m", "lenet5", "--no-baselines"), "one model has no pair to decide"),
        ("task2", ("--looks", "4,8"), "after whole repetitions of 5 folds, such as 5,10,20"),
        ("task2", ("--looks", "5,10", "--repetitions", "2"), "leave out --repetitions and --split"),
    ],
)
def test_looks_that_cannot_be(script: str, options: tuple[str, ...], reason: str, run_here) -> None:
    refused = run_here(f"experiments/{script}.py", "--sample", *options)
    assert refused.returncode == 2 and reason in " ".join(refused.stderr.split()), refused.stderr


def test_the_command_looks(eight_splits: str, run_analysis) -> None:
    uri = ("--tracking-uri", eight_splits)
    result = run_analysis("compare", "task3", "--metric", "test/accuracy", "--looks", "4,8", *uri)
    assert result.exit_code == 0, result.stderr
    assert "Of the planned looks (4, 8 splits) the last was at 8" in " ".join(result.stdout.split())
    result = run_analysis("compare", "task3", "--by", "lr", "--looks", "4,8", *uri)
    assert result.exit_code == 2 and "not --by a setting" in result.stderr
    result = run_analysis("compare", "task3", "--looks", "8,4", *uri)
    assert result.exit_code == 2 and "--looks" in result.stderr
    result = run_analysis("compare", "task3", "--looks", "20,40", *uri)
    assert result.exit_code == 1 and "the first look is at 20 splits" in result.stderr


@pytest.mark.slow
def test_no_more_false_findings_than_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a fresh uniform p at each look, the most that several looks can find by chance, the error is 5 %."""
    rng = np.random.default_rng(0)
    monkeypatch.setattr(looks, "compare", lambda *arguments: uniform_p(rng, arguments[3]))
    monkeypatch.setattr(looks, "_finished", lambda _: 20)
    group = pd.DataFrame({"split": [0], "model": ["a"], "protocol": ["repeated holdout 3:2"], "n_splits": [20]})
    monkeypatch.setattr(looks, "Evidence", lambda *_: None)
    evidence = type("Group", (), {"group": group, "tracking_uri": None})()
    found = 0
    for _ in range(2000):
        outcome = look_by_look(evidence, "test/accuracy", 0.01, (5, 10, 20))
        found += outcome.tests["verdict"].iloc[0] != comparison.OPEN
    assert 0.03 < found / 2000 < 0.065


def uniform_p(rng: np.random.Generator, level: float) -> pd.DataFrame:
    verdict = comparison.BETTER if rng.random() < level else comparison.OPEN
    return pd.DataFrame([{"model_a": "a", "model_b": "b", "verdict": verdict}])
