"""`--tune`: trials as runs of their own, what is chosen, kills, more trials later, and what `verify` says of it."""

import dataclasses
import json
import math
import os
import shutil
import sqlite3
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import analysis
import tracking
from analysis.groups import ComparisonError
from analysis.report import reproduce
from analysis.tuning import load_trials
from analysis.tuning_tables import chosen_table
from experiments import task3
from experiments.jobs.worker import Worker
from experiments.request import Request
from experiments.run import make_plan
from experiments.run.execute import open_store
from experiments.run.forecast import in_words
from experiments.tuning import halving
from experiments.tuning.space import DEFAULT_SPACE, configurations
from tests.commands import StartedCommand
from tests.conftest import HANGS, ROOT, new_store
from tracking import TrainingConfig, keys
from tracking.keys import STOPPED, trials_of
from tracking.sqlite import sqlite_path

pytestmark = pytest.mark.slow

OPTIONS = ("--sample", "--n-splits", "2", "-m", "lenet5", "--epochs", "4", "--batch-size", "8")
TUNE = (*OPTIONS, "--tune", "4")


def command(uri: str, *options: str) -> tuple[str, ...]:
    return "experiments/task3.py", *options, "--tracking-uri", uri


def copy_of(uri: str, folder: Path) -> str:
    """Copy a store with its files; return the copy's URI."""
    database = sqlite_path(uri)
    assert database is not None
    shutil.copytree(database.parent, folder)
    return f"sqlite:///{folder / database.name}"


def trials_in(uri: str) -> pd.DataFrame:
    trials = analysis.load_runs([trials_of("task3")], uri)
    return trials.sort_values(["model", "split", "trial"]).reset_index(drop=True)


def curves_in(uri: str) -> dict[tuple[int, int], list[float]]:
    curves = analysis.load_curves([trials_of("task3")], uri)
    numbers = trials_in(uri).set_index("run_id")[["split", "trial"]]
    assert not curves.duplicated(["run_id", "epoch"]).any()
    return {
        tuple(numbers.loc[run_id]): list(curve.sort_values("epoch")["val/loss"])
        for run_id, curve in curves.groupby("run_id")
    }


@pytest.fixture(scope="module")
def tuned(empty_database: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The URI of a store with TUNE; no test changes it."""
    folder = tmp_path_factory.mktemp("tuned")
    uri = new_store(empty_database, folder / "store")
    arguments = (str(ROOT / "experiments/task3.py"), *TUNE, "--tracking-uri", uri)
    started = StartedCommand(arguments, folder, dict(os.environ))
    printed = started.communicate(HANGS)
    assert started.returncode == 0, printed
    return uri


def test_every_split_tries_the_same_configurations_and_the_best_on_validation_is_scored(tuned: str) -> None:
    trials, runs = trials_in(tuned), analysis.load_runs(["task3"], tuned)
    drawn = configurations(DEFAULT_SPACE, TrainingConfig(), 4, seed=0)
    for split in (0, 1):
        own = trials[trials["split"] == split]
        assert own["trial"].tolist() == [0, 1, 2, 3]
        assert own["lr"].tolist() == [each.lr for each in drawn]
        assert own["weight_decay"].tolist() == [each.weight_decay for each in drawn]
        run = runs[(runs["split"] == split) & (runs["model"] == "lenet5")].iloc[0]
        assert own["parent_id"].eq(run["run_id"]).all()
        best = own.loc[own["best_val/loss"].idxmin()]  # in this sample no trial that stopped has the lowest loss
        assert (run["chosen_trial"], run["lr"]) == (best["trial"], best["lr"])
        assert run["best_val/loss"] == best["best_val/loss"]
        assert 0 <= run["test/accuracy"] <= 1 and 0 <= run["cross_val/accuracy"] <= 1
    assert trials["status"].eq("FINISHED").all()
    assert trials[[f"test/{score}" for score in tracking.SCORES]].isna().all(axis=None)
    # 4 trials for an epoch, 2 for two, 1 for four
    assert trials.groupby("split")["epochs_run"].apply(sorted).tolist() == [[1, 1, 2, 4]] * 2
    parent = tracking.open_store(tuned).client.get_run(runs[runs["model"] == "lenet5"]["parent_id"].iloc[0])
    assert (parent.data.params["tune"], parent.data.params["lr"]) == ("4", "tuned: 0.001; 0.0001..0.01")
    assert "tuned, 4 of lr=0.0001..0.01 weight_decay=0.001..0.1" in parent.info.run_name


def test_the_worse_half_stops_at_each_rung(tuned: str) -> None:
    curves = curves_in(tuned)
    stopped = trials_in(tuned).set_index(["split", "trial"])[STOPPED]
    for split in (0, 1):
        of_split = {trial: curve for (own, trial), curve in curves.items() if own == split}
        alive = set(of_split)
        for rung in (1, 2):
            kept = set(halving.survivors({trial: min(of_split[trial][:rung]) for trial in alive}))
            assert {trial for trial in alive - kept if stopped[split, trial] == str(rung)} == alive - kept
            alive = kept
        assert all(stopped[split, trial] == "" for trial in alive)


def test_verify_derives_the_choice_again_and_notices_another(tuned: str, tmp_path: Path, run_here) -> None:
    good = run_here("-m", "experiments", "verify", "task3", "--tracking-uri", tuned)
    assert (good.returncode, good.stderr) == (0, ""), good.stdout
    changed = copy_of(tuned, tmp_path / "copy")
    store = tracking.open_store(changed)
    trials = trials_in(changed)
    winner = trials[trials["epochs_run"] == 4].iloc[0]
    path = analysis.local_artifact(winner, keys.HISTORY, changed)
    history = json.loads(path.read_text())
    history[-1]["metrics"]["val/loss"] += 1
    path.write_text(json.dumps(history))
    store.client.log_metric(trials.iloc[1]["run_id"], "test/accuracy", 0.5)
    bad = run_here("-m", "experiments", "verify", "task3", "--tracking-uri", changed)
    assert bad.returncode == 1
    assert "are not those of trial" in bad.stdout and "trial 1 was scored on the test part" in bad.stdout


def test_verify_notices_a_changed_trial_and_a_changed_setting(tuned: str, tmp_path: Path, run_here) -> None:
    uri = copy_of(tuned, tmp_path / "copy")
    trials, runs = trials_in(uri), analysis.load_runs(["task3"], uri)
    stopped = trials[trials[STOPPED] == "1"].iloc[0]
    won = trials[trials["epochs_run"] == 4].iloc[1]
    run = runs[(runs["split"] == won["split"]) & (runs["model"] == "lenet5")].iloc[0]
    database = sqlite3.connect(sqlite_path(uri))
    with database:
        for table in ("metrics", "latest_metrics"):
            for key in ("best_val/loss", "val/loss"):
                change = f"UPDATE {table} SET value = 0.1 WHERE run_uuid = ? AND key = ?"
                assert database.execute(change, (stopped["run_id"], key)).rowcount
        change = "UPDATE params SET value = '0.5' WHERE run_uuid = ? AND key = 'lr'"
        assert database.execute(change, (run["run_id"],)).rowcount
    database.close()
    tracking.open_store(uri).client.set_tag(won["run_id"], STOPPED, "2")
    bad = run_here("-m", "experiments", "verify", "task3", "--tracking-uri", uri)
    assert bad.returncode == 1
    title = f"lenet5 split {stopped['split']} trial {stopped['trial']}: "
    assert {line.partition(" is ")[0] for line in bad.stdout.splitlines()[:-1]} == {
        f"{title}best_val/loss",
        f"{title}val/loss of epoch 1",
        f"lenet5 split {won['split']}: lr",
        f"lenet5 split {won['split']} trial {won['trial']}: stopped",
    }


def test_a_trial_that_diverged_late_is_the_worst_in_the_analysis(tuned: str, tmp_path: Path) -> None:
    uri = copy_of(tuned, tmp_path / "copy")
    won = trials_in(uri).query("epochs_run == 4").iloc[0]
    tracking.open_store(uri).client.set_tag(won["run_id"], STOPPED, "the training loss is nan in epoch 5")
    group = analysis.choose_group(analysis.load_runs(["task3"], uri))
    found = load_trials(analysis.Evidence(group, uri))[0].set_index("run_id")
    assert (found.loc[won["run_id"], "loss"], found.loc[won["run_id"], "score"]) == (math.inf, 0.0)
    assert np.isfinite(found["loss"]).sum() == len(found) - 1


def test_the_same_command_again_trains_nothing_and_more_trials_go_on(tuned: str, tmp_path: Path, run_here) -> None:
    uri = copy_of(tuned, tmp_path / "copy")
    before = trials_in(uri)
    again = run_here(*command(uri, *TUNE))
    assert "finished before and kept: 6 splits" in again.stdout
    assert "trial" not in again.stdout.partition("files")[2].partition("task3:")[0]
    assert trials_in(uri).equals(before)

    more = run_here(*command(uri, *OPTIONS, "--tune", "6", "--no-baselines"))
    assert more.returncode == 0, more.stderr
    after, curves = trials_in(uri), curves_in(uri)
    assert after.groupby("split")["trial"].apply(list).tolist() == [[*range(6)]] * 2
    old = curves_in(tuned)
    for key, curve in old.items():
        assert curves[key][: len(curve)] == curve  # what was trained before was not trained again
    verified = run_here("-m", "experiments", "verify", "task3", "--tracking-uri", uri)
    assert verified.returncode == 0, verified.stdout
    shown = analysis.comparison_groups(analysis.load_runs(["task3"], uri))
    assert len(shown) == 2  # 4 and 6 trials are not compared
    for group in shown:  # each finds its own trials, of which the first belong to both
        found, problems = load_trials(analysis.Evidence(group, uri))
        assert not problems
        assert found.groupby("split")["trial"].apply(list).tolist() == [[*range(group["tune"].iloc[0])]] * 2
        assert found["chosen"].sum() == 2


def test_kill_9_and_two_jobs_at_once_change_no_bit(tuned: str, empty_database: Path, tmp_path: Path) -> None:
    uri = new_store(empty_database, tmp_path / "store")
    arguments = (str(ROOT / "experiments/task3.py"), *TUNE, "--no-baselines", "--threads", "1", "--tracking-uri", uri)
    for kill_after in (3, 7, None):
        started = StartedCommand((*arguments, "--jobs", "2"), tmp_path, dict(os.environ), start_new_session=True)
        while kill_after is not None and started.poll() is None:
            if _epochs_logged(uri) >= kill_after:
                os.killpg(started.pid, 9)
                break
        printed = started.communicate(HANGS)
    assert started.returncode == 0, printed
    assert curves_in(uri) == curves_in(tuned)
    key = ["model", "split"]
    ours, theirs = (
        runs[runs["status"].eq("FINISHED") & runs["model"].eq("lenet5")].set_index(key)[["test/loss", "cross_val/loss"]]
        for runs in (analysis.load_runs(["task3"], each) for each in (uri, tuned))
    )
    assert ours.sort_index().equals(theirs.sort_index())
    assert len(trials_in(uri)) == 8 and trials_in(uri)["status"].eq("FINISHED").all()


def _epochs_logged(uri: str) -> int:
    try:
        return len(analysis.load_curves([trials_of("task3")], uri))
    except tracking.StoreError:
        return 0


def sent_too_late(*_: object) -> None:
    raise SystemExit


def test_a_trial_whose_worker_was_lost_before_it_was_sent_keeps_its_losses(
    store_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(task3.TASK.training, epochs=4, device="cpu", batch_size=8)
    request = Request(
        task=task3.TASK,
        training={"lenet5": config},
        n_splits=1,
        splits=(0,),
        sample=True,
        threads=1,
        tune=2,
        tracking_uri=store_uri,
    )
    plan = make_plan(request)
    store = open_store(plan)
    parent = store.client.create_run(store.make_experiment("task3")).info.run_id
    job = dataclasses.replace(
        plan.models[0].trials[0][1],
        parent_id=parent,
        experiment=store.make_experiment(trials_of("task3")),
        until=1,
        ends=True,
    )
    lost = Worker(plan.context(store), store)
    with monkeypatch.context() as patched:
        patched.setattr(lost.recorder, "_send", sent_too_late)
        with pytest.raises(SystemExit):
            lost.record(lost.train(job))
    again = Worker(plan.context(store), store)
    result = again.record(again.train(job))
    assert result.outcome == "trained" and result.text == "trained by an earlier attempt"
    ((_, curve),) = curves_in(store_uri).items()
    assert [losses[0] for losses in result.curve] == curve


def test_a_trial_that_diverges_is_the_worst_and_not_missing(store_uri: str, run_here) -> None:
    options = (*OPTIONS, "--no-baselines", "--split", "0", "--tune", "3", "--space", "lr=1e9..1e12")
    result = run_here(*command(store_uri, *options))
    assert result.returncode == 0, result.stderr
    trials = trials_in(store_uri)
    (run,) = analysis.load_runs(["task3"], store_uri).itertuples()
    assert (run.status, run.chosen_trial, run.lr) == ("FINISHED", 0, 0.001)
    assert trials["status"].eq("FINISHED").all()
    diverged = trials[STOPPED].str.contains("loss is")
    assert diverged.tolist()[0] is False and diverged.any()


def test_dry_run_trains_and_writes_nothing(tmp_path: Path, run_here) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    result = run_here(*command(uri, *TUNE, "--dry-run"))
    assert result.returncode == 0, result.stderr
    assert "4 configurations of lr=0.0001..0.01 weight_decay=0.001..0.1; the worse half stops after epoch 1 and 2" in (
        result.stdout
    )
    assert "at most about" in result.stdout and "split 0" not in result.stdout
    assert not (tmp_path / "mlflow.db").exists()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--tune", "1"), "'--tune'"),
        (("--space", "lr=1e-4..1e-2"), "only --tune N has a space"),
        (("--tune", "4", "--space", "rate=1..2"), "'rate' is not one of"),
    ],
)
def test_what_cannot_be_is_refused(options: tuple[str, ...], reason: str, run_here) -> None:
    result = run_here("experiments/task3.py", "--sample", *options)
    assert result.returncode == 2
    assert reason in " ".join(result.stderr.split())


def test_the_task_says_what_is_tuned(tuned: str) -> None:
    runs = analysis.load_runs(["task3"], tuned)
    text = "lr=0.0001..0.01 weight_decay=0.001..0.1 from lr=0.001 weight_decay=0.01"
    assert runs["space"].eq(text).all()
    assert runs["tune"].eq(4).all() and runs["halving"].all()
    assert np.isfinite(runs["lr"]).all() and not math.isnan(runs["lr"].max())
    (group,) = analysis.comparison_groups(runs)  # whatever was chosen
    assert set(group["model"]) == {"majority", "linear", "lenet5"}


def test_the_analysis_says_what_was_chosen_and_what_the_best_of_k_scores(tuned: str, tmp_path: Path, run_here) -> None:
    runs, trials = analysis.load_runs(["task3"], tuned), trials_in(tuned)
    printed = run_here("-m", "analysis", "tuning", "task3", "--out", str(tmp_path), "--tracking-uri", tuned).stdout
    assert "takes 16 configurations on 5 splits, and here are 4 on 2" in printed
    names = ("tuning_curves.png", "tuning_curves.svg", "tuned_values.png", "tuned_values.svg", "tuning.md")
    assert all((tmp_path / name).stat().st_size for name in names)
    curve = pd.read_csv(tmp_path / "tuning.csv")
    by_split = trials.groupby("split")
    assert curve["mean"].iloc[0] == pytest.approx(trials["best_val/accuracy"].mean())
    best = trials.loc[by_split["best_val/loss"].idxmin(), "best_val/accuracy"]
    assert (curve["mean"].iloc[3], curve["sd"].iloc[3]) == pytest.approx((best.mean(), best.std()))
    first = trials.iloc[0]
    passes = (3 * first["n_train"] + first["n_val"]) * first["macs"] * (1 + 1 + 2 + 4)
    assert curve["macs"].iloc[3] == pytest.approx(passes)

    table = run_here("-m", "analysis", "table", "task3", "--tracking-uri", tuned).stdout
    networks = runs[runs["model"] == "lenet5"]
    numbers = [f"{number} on {count}" for number, count in networks["chosen_trial"].value_counts().items()]
    assert "Tuned on each split: 4 configurations of lr=0.0001..0.01 weight_decay=0.001..0.1" in table
    assert all(number in table for number in numbers)
    group = analysis.choose_group(runs)
    command = reproduce(analysis.finished(group))
    assert "--lr 0.001 --weight-decay 0.01" in command
    assert "--tune 4 --space lr=0.0001..0.01 --space weight_decay=0.001..0.1" in command
    with pytest.raises(ComparisonError, match="no model of this comparison group was tuned"):
        load_trials(analysis.Evidence(group.assign(tune=pd.NA), tuned))
    with pytest.raises(ComparisonError, match="no model of this comparison group was tuned"):
        chosen_table(analysis.Evidence(group.assign(tune=pd.NA), tuned))


def test_a_study_holds_the_trials_as_optuna_knows_them(tuned: str, tmp_path: Path, run_here) -> None:
    optuna = pytest.importorskip("optuna")
    out = tmp_path / "study.db"
    arguments = ("-m", "analysis", "study", "task3", "lenet5", "--out", str(out), "--tracking-uri", tuned)
    assert "optuna-dashboard sqlite:///" in run_here(*arguments).stdout
    (name,) = optuna.get_all_study_names(f"sqlite:///{out}")
    study = optuna.load_study(study_name=name, storage=f"sqlite:///{out}")
    trials, curves = trials_in(tuned), curves_in(tuned)
    assert len(study.trials) == 8
    for stored, (_, trial) in zip(study.trials, trials.iterrows(), strict=True):
        assert stored.state.name == ("PRUNED" if trial[STOPPED] else "COMPLETE")
        assert stored.value == trial["best_val/loss"]
        assert stored.params == {"lr": trial["lr"], "weight_decay": trial["weight_decay"]}
        assert list(stored.intermediate_values.values()) == curves[trial["split"], trial["trial"]]
        assert stored.user_attrs["run_id"] == trial["run_id"]
    assert study.trials[0].distributions["lr"] == optuna.distributions.FloatDistribution(1e-4, 1e-2, log=True)
    again = run_here(*arguments)
    assert (again.returncode, again.stderr.endswith("already; name another file\n")) == (1, True)
    out.write_text("mine")
    assert "no study of Optuna" in run_here(*arguments).stderr
    assert out.read_text() == "mine"


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.2, "1 seconds"), (89, "89 seconds"), (95, "1.6 minutes"), (9000, "2.5 hours"),
                           (360_000, "100 hours"), (7_200_000, "2,000 hours")],
)  # fmt: skip
def test_a_time_in_words(seconds: float, words: str) -> None:
    assert in_words(seconds) == words
