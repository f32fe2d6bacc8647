"""Repetitions of folds, from the command to the table: they extend what is there."""

import subprocess
from collections.abc import Callable

import pytest

import analysis
from analysis.report import reproduce

Run = Callable[..., subprocess.CompletedProcess[str]]
COMMAND = ("experiments/task2.py", "--sample", "-m", "lenet5", "--epochs", "1", "--batch-size", "8", "--threads", "1")


def test_repetitions_extend_the_table_of_the_folds(store_uri: str, run_here: Run) -> None:
    store = ("--tracking-uri", store_uri)
    done = run_here(*COMMAND, *store)
    assert done.returncode == 0, done.stderr
    first = analysis.load_runs(["task2"], store_uri)
    assert first["repetitions"].isna().all() and set(first["n_splits"]) == {5}

    done = run_here(*COMMAND, "--repetitions", "2", "--split", "7", *store)
    assert done.returncode == 0 and "lenet5 has 6 of 10 splits" in done.stdout, done.stderr
    planned = run_here(*COMMAND, "--looks", "5,10", "--dry-run", *store)
    assert "10 of 10 splits (2 repetitions of 5 folds), looks after 5, 10" in planned.stdout
    done = run_here(*COMMAND, "--repetitions", "2", *store)
    assert done.returncode == 0 and "lenet5 split 9" in done.stdout and "lenet5 split 4" not in done.stdout

    runs = analysis.load_runs(["task2"], store_uri)
    assert set(first["run_id"]) < set(runs["run_id"])  # none was trained again
    assert runs.groupby("model")["split"].apply(sorted).tolist() == [list(range(10))] * 3
    assert runs["split_hash"].nunique() == 10 and runs["parent_id"].nunique() == 3
    assert set(runs["n_splits"]) == {5} and set(runs.loc[runs["split"] >= 5, "repetitions"]) == {2}
    assert set(analysis.comparison_table(runs)["n"]) == {10}
    assert "--n-splits 5 " in reproduce(runs) and "--repetitions 2 " in reproduce(runs)

    verified = run_here("-m", "experiments", "verify", "task2", "--device", "cpu", *store)
    assert verified.returncode == 0 and "30 runs" in verified.stdout, verified.stdout
    looked = run_here("-m", "analysis", "compare", "task2", "--looks", "5,10", *store)
    assert "Of the planned looks (5, 10 splits) the last was at" in " ".join(looked.stdout.split()), looked.stderr


@pytest.mark.parametrize(
    ("task", "options", "reason"),
    [
        ("task3", ("--repetitions", "2"), "more holdouts are --n-splits N, or --looks N,N,..."),
        ("task2", ("--repetitions", "0"), "0 is not in the range"),
        ("task2", ("--split", "5"), "5 is not one of 0 to 4"),
        ("task2", ("--split", "10", "--repetitions", "2"), "10 is not one of 0 to 9"),
    ],
)
def test_repetitions_that_cannot_be(task: str, options: tuple[str, ...], reason: str, run_here: Run) -> None:
    refused = run_here(f"experiments/{task}.py", "--sample", *options)
    assert refused.returncode == 2 and reason in " ".join(refused.stderr.split()), refused.stderr
