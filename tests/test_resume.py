"""Protocols that are killed, interrupted, started twice or started all at once, as their user meets it."""

import os
import random
import signal
from pathlib import Path

import pytest

import analysis
import tracking
from benchmarks.faults import Campaign, run_campaign, strays, uri
from tests.commands import StartedCommand
from tests.conftest import HANGS, ROOT, Gate
from tracking import keys

QUICK = ("--sample", "--epochs", "2", "--n-splits", "2", "-m", "lenet5", "--no-baselines")


def start(task: str, uri: str, *options: str, **environment: str) -> StartedCommand:
    arguments = (str(ROOT / "experiments" / f"{task}.py"), *options, "--tracking-uri", uri)
    return StartedCommand(arguments, Path.cwd(), os.environ | environment)


@pytest.mark.slow
def test_kill_9_at_random_moments_changes_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(campaign: Campaign, store: Path) -> StartedCommand:
        script = (str(ROOT / "experiments" / "task3.py"), *campaign.options, "--tracking-uri", uri(store))
        environment = {**os.environ, "TMPDIR": str(campaign.scratch)}
        return StartedCommand(script, tmp_path, environment, start_new_session=True)

    monkeypatch.setattr(Campaign, "start", start)
    seed = random.randrange(2**32)
    print(f"the moments follow from seed={seed}")
    campaign = run_campaign("task3", QUICK, kills=5, seed=seed, folder=tmp_path)
    assert campaign.kills >= 5


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_ends_the_run_in_order_and_the_same_command_goes_on(
    signum: int, store_uri: str, image_folder: Path, gate: Gate, run_here
) -> None:
    options = ("--data-dir", str(image_folder), "--epochs", "6", "--patience", "6", "--n-splits", "1", "-m", "lenet5",
               "--no-baselines")  # fmt: skip
    process = start("task1", store_uri, *options, **gate.environment)
    gate.wait_for(1, process)
    process.send_signal(signum)
    _, errors = process.communicate(HANGS)
    assert process.returncode == 130
    assert errors.endswith("Error: interrupted; the same command goes on where this one stopped\n")
    assert "Traceback" not in errors
    (run,) = analysis.load_runs(["task1"], store_uri).itertuples()
    assert run.status == "KILLED"
    assert 0 < len(analysis.load_curves(["task1"], store_uri)) < 6

    again = run_here("experiments/task1.py", *options, "--tracking-uri", store_uri)
    assert "Traceback" not in again.stderr and "lenet5 1/1" in " ".join(again.stdout.split())
    (done,) = analysis.load_runs(["task1"], store_uri).itertuples()
    assert (done.run_id, done.status, done.epochs_run) == (run.run_id, "FINISHED", 6)
    assert analysis.load_curves(["task1"], store_uri)["epoch"].tolist() == list(range(1, 7))


@pytest.mark.slow
def test_the_same_command_again_does_nothing_and_fresh_does_all(store_uri: str, run_here) -> None:
    command = ("experiments/task3.py", *QUICK, "--tracking-uri", store_uri)
    first = run_here(*command)
    assert "kept" not in first.stdout and first.stderr == ""
    runs = analysis.load_runs(["task3"], store_uri)
    again = run_here(*command)
    assert "finished before and kept: 2 splits; --fresh trains again" in again.stdout
    assert again.stdout[again.stdout.index("task3:") :] == first.stdout[first.stdout.index("task3:") :]  # the table
    assert analysis.load_runs(["task3"], store_uri).equals(runs)
    run_here(*command, "--fresh")
    after = analysis.load_runs(["task3"], store_uri)
    assert len(after) == 4 and after["status"].eq("FINISHED").all()
    assert after["superseded_by"].tolist()[:2] == after["run_id"].tolist()[2:]
    assert after["test/loss"].tolist()[:2] == after["test/loss"].tolist()[2:]


def test_a_parent_gets_its_files_also_if_the_last_split_was_done_before_a_kill(store_uri: str, run_here) -> None:
    command = ("experiments/task3.py", *QUICK, "--n-splits", "1", "--tracking-uri", store_uri)
    run_here(*command)
    (run,) = analysis.load_runs(["task3"], store_uri).itertuples()
    store = tracking.open_store(store_uri)
    paths = [analysis.local_artifact(run.parent_id, name, store_uri) for name in (keys.CLASSES, keys.MODEL_CARD)]
    contents = [path.read_bytes() for path in paths]
    for path in paths:
        path.unlink()
    store.client.set_terminated(run.parent_id, "KILLED")
    run_here(*command)
    assert [path.read_bytes() for path in paths] == contents
    assert store.client.get_run(run.parent_id).info.status == "FINISHED"


@pytest.mark.slow
def test_two_processes_share_a_task_and_double_nothing(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    both = [start("task3", uri, *QUICK, "--n-splits", "4") for _ in range(2)]
    printed = [process.communicate(HANGS) for process in both]
    assert [process.returncode for process in both] == [0, 0], printed
    runs = analysis.load_runs(["task3"], uri)
    assert sorted(runs["split"]) == [0, 1, 2, 3] and runs["status"].eq("FINISHED").all()
    assert runs["parent_id"].nunique() == 1
    store = tracking.open_store(uri)
    parent = store.client.get_run(runs["parent_id"].iloc[0])
    assert (parent.info.status, parent.data.metrics["n_splits"]) == ("FINISHED", 4)
    assert strays(tmp_path / "mlflow.db") == []


@pytest.mark.parametrize("options", [("--epochs", "1"), ("--epochs", "3", "--tune", "2", "--no-baselines")])
def test_a_training_that_was_interrupted_before_its_test_score_stands_once(
    options: tuple[str, ...], store_uri: str, run_here, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    command = (
        "experiments/task3.py",
        "--sample",
        "--n-splits",
        "1",
        "-m",
        "lenet5",
        *options,
        "--tracking-uri",
        store_uri,
    )
    if "--tune" not in options:  # then it is a baseline that is interrupted
        assert run_here(*command, "--no-baselines").returncode == 0
    with monkeypatch.context() as patch:
        patch.setattr("experiments.jobs.worker.evaluate_test", interrupted)
        assert run_here(*command).returncode == 130
    assert (analysis.load_runs(["task3"], store_uri)["status"] == "KILLED").sum() == 1
    assert run_here(*command).returncode == 0
    runs = analysis.load_runs(["task3"], store_uri)
    assert not runs["model"].duplicated().any() and runs["status"].eq("FINISHED").all()
    curves = analysis.load_curves(["task3"], store_uri).groupby("run_id")["epoch"]
    assert curves.apply(list).to_dict() == {
        run.run_id: [*range(1, int(run.epochs_run) + 1)] for run in runs.itertuples()
    }


@pytest.mark.slow
def test_different_tasks_at_once_on_a_fresh_store(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    cache = tmp_path / "cache"  # all of them decode, too
    tasks = ("task1", "task2", "task3", "task1")
    started = [start(task, uri, *QUICK, "--epochs", "1", CACHE_DIR=str(cache)) for task in tasks]
    printed = [process.communicate(HANGS) for process in started]
    assert [process.returncode for process in started] == [0, 0, 0, 0], printed
    runs = analysis.load_runs(["task1", "task2", "task3"], uri)
    assert runs.groupby("task")["split"].apply(sorted).to_dict() == {task: [0, 1] for task in runs["task"].unique()}
    assert runs["status"].eq("FINISHED").all() and runs["task"].nunique() == 3
    assert not list(cache.glob(".partial*"))
