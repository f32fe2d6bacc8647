"""Frames from the result database: in SQL and through MLflow's client, from a real SQLite store."""

import os
import shutil
import sqlite3
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import tracking
from analysis import query, readers
from tests.conftest import ROOT, new_store
from tracking import StoreError, UnknownTaskError, keys

TASKS = list(keys.UNTAGGED_EXPERIMENTS.values())
PARAMS = {
    **{"model": "lenet5", "dataset": "d", "protocol": "holdout 3:2", "n_splits": 5, "leak_free": True},
    **{"seed": 0, "split_seed": 0, "train_seed": 0},
    **{"lr": 0.001, "weight_decay": 0.01, "batch_size": 8, "epochs": 3, "patience": 7, "augment": False},
    **{"precision": "fp32", "device": "cpu", "parameters": 61706, "macs": 416520},
}  # threads, n_train, n_val and n_test are missing
TAGS = {"task": "task3", "fingerprint": "f", "dataset_digest": "d", "source_digest": "s", "git_commit": "c"}
PREDICTIONS = {
    f"{part}_{key}": np.array(values, dtype)
    for part, count in (("val", 3), ("test", 2))
    for key, values, dtype in (
        ("index", range(count), np.int32),
        ("true", [1] * count, np.uint8),
        ("pred", [0] * count, np.int64),
        ("prob", [0.1] * count, np.float32),
    )
}


@pytest.fixture(scope="module")
def filled(empty_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store that has runs of every kind; tests that change it take a copy."""
    folder = tmp_path_factory.mktemp("query") / "filled"
    store = tracking.open_store(new_store(empty_database, folder))
    with tracking.parent_run(store, "task3", "lenet5", PARAMS, TAGS) as parent:
        with child(parent, 0) as run:  # a finished split
            values = {key: number / 10 for number, key in enumerate(keys.EPOCH_METRICS)}
            epochs = {epoch: {key: epoch + value for key, value in values.items()} for epoch in (1, 2)}
            run.log_epochs(
                [{"epoch": epoch, "time": 1000 * epoch, "metrics": metrics} for epoch, metrics in epochs.items()]
            )
            run.log_metrics({key: 1 / (3 + number) for number, key in enumerate(keys.FINAL_METRICS)})
            files = folder / "files"
            files.mkdir()
            np.savez(files / keys.PREDICTIONS, **PREDICTIONS)
            run.log_files(files)
        with child(parent, 1) as run:  # logged again, as by a run that was resumed, and with NaN
            for key, value, time, epoch in (
                ("val/loss", 9.0, 1000, 1),
                ("val/loss", 2.0, 2000, 1),  # newer
                ("val/loss", 3.0, 2000, 1),  # larger at the same time
                ("val/accuracy", 0.9, 3000, 1),
                ("val/accuracy", 0.1, 2000, 1),  # older, and written later
                ("val/f1_micro", 0.5, 1000, 1),
                ("val/f1_micro", np.nan, 2000, 1),
                ("val/f1_macro", np.nan, 1000, 1),
                ("val/f1_macro", 0.5, 2000, 1),
                ("train/loss", np.nan, 1000, 2),
                ("train/loss", 0.25, 1000, 2),
                ("train/accuracy", np.inf, 1000, 3),
                ("test/loss", np.nan, 1000, 0),
                ("best_val/loss", -np.inf, 1000, 0),
            ):
                store.client.log_metric(run.id, key, value, timestamp=time, step=epoch)
        with pytest.raises(RuntimeError), child(parent, 2):
            raise RuntimeError('it\'s "broken": 100 %')
        with child(parent, 3) as run:
            run.log_epochs([{"epoch": 1, "time": 1000, "metrics": {"val/loss": 1.0}}])
        store.client.delete_run(run.id)
        store.client.create_run(  # still running, with hardly anything
            store.client.get_run(parent.id).info.experiment_id, tags={keys.PARENT: parent.id, "fingerprint": "g"}
        )
    with tracking.parent_run(store, "task1", "lenet5", PARAMS, TAGS | {"task": "task1"}) as parent:
        with child(parent, 0, task="task1"):
            pass
    return folder


def child(parent: tracking.Parent, split: int, params: dict[str, object] = PARAMS, **tags: str):
    own = TAGS | {"fingerprint": f"f{split}"} | tags
    return tracking.child_run(parent.store, tracking.claim(parent, f"split {split}", params | {"split": split}, own))


@pytest.fixture
def copy_of(filled: Path, tmp_path: Path) -> Path:
    """Copy of the filled store at another place, while the original is still there."""
    return shutil.copytree(filled, tmp_path / "a copy of #1")


def uri(folder: Path) -> str:
    return f"sqlite:///{folder}/mlflow.db"


@pytest.fixture(params=["sql", "client"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the test in SQL and through the client."""
    if request.param == "client":
        monkeypatch.setattr(readers, "SCHEMA", "another")
        warnings.filterwarnings("ignore", "the result database")
    return request.param


@pytest.mark.parametrize("load", [query.load_runs, query.load_curves])
def test_both_paths_give_the_same_frame(
    filled: Path, monkeypatch: pytest.MonkeyPatch, load: Callable[..., pd.DataFrame]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frame = load(TASKS, uri(filled))
    monkeypatch.setattr(readers, "SCHEMA", "another")
    with pytest.warns(UserWarning, match=r"has schema dc11669786a5, which is not known here; it is read") as caught:
        slower = load(TASKS, uri(filled))
    assert [warning.filename for warning in caught] == [__file__]
    pd.testing.assert_frame_equal(frame, slower, check_exact=True)
    assert len(frame) == 5


def test_runs_of_every_kind(filled: Path) -> None:
    runs = query.load_runs(["task3", "task3"], uri(filled))
    assert runs["status"].tolist() == ["FINISHED", "FINISHED", "FAILED", "RUNNING"]
    assert runs["start_time"].is_monotonic_increasing
    assert runs["failure"].isna().tolist() == [True, True, False, True]
    assert runs["failure"][2] == 'it\'s "broken": 100 %'
    done, repeated, failed, running = (row for _, row in runs.iterrows())
    assert done["lr"] == 0.001 and done["leak_free"] and not done["augment"]
    assert [done[key] for key in keys.FINAL_METRICS] == [1 / (3 + number) for number in range(len(keys.FINAL_METRICS))]
    assert np.isnan(repeated["test/loss"]) and repeated["best_val/loss"] < -1e308
    assert failed["end_time"] >= failed["start_time"] and pd.isna(running["end_time"])
    assert running["parent_id"] == done["parent_id"] and pd.isna(running["split"]) and pd.isna(running["augment"])
    assert query.load_runs(["task1"], uri(filled))["task"].tolist() == ["task1"]


def test_newest_value_of_each_epoch(filled: Path) -> None:
    curves = query.load_curves(TASKS, uri(filled))
    runs = query.load_runs(TASKS, uri(filled))
    assert curves["run_id"].unique().tolist() == runs["run_id"].tolist()[:2]
    assert curves["epoch"].tolist() == [1, 2, 1, 2, 3]
    assert curves["split"].tolist() == [0, 0, 1, 1, 1]
    assert curves.loc[1, list(keys.EPOCH_METRICS)].tolist() == [2 + i / 10 for i in range(len(keys.EPOCH_METRICS))]
    first = curves.iloc[2]
    assert (first["val/loss"], first["val/accuracy"], first["val/f1_macro"]) == (3.0, 0.9, 0.5)
    assert first[["val/f1_micro", "lr", "train/loss"]].isna().all()
    assert curves["train/loss"].iloc[3] == 0.25
    assert curves["train/accuracy"].iloc[4] > 1e308


def test_types_do_not_depend_on_what_is_stored(filled: Path, store_uri: str, path: str) -> None:
    dtypes = query.load_runs(TASKS, uri(filled)).dtypes
    text = ["run_id", "parent_id", "status", "artifact_uri", *keys.TAGS]
    text += [
        "model",
        "dataset",
        "protocol",
        "precision",
        "device",
        "pretrained",
        "space",
        "normalisation",
    ]
    expected = {
        **dict.fromkeys(text, "str"),
        **dict.fromkeys(("start_time", "end_time"), "datetime64[ms, UTC]"),
        **dict.fromkeys(keys.PARAMS.keys() - set(text), "Int64"),
        **dict.fromkeys(("leak_free", "augment", "freeze", "cudnn_benchmark", "halving"), "boolean"),
        **dict.fromkeys(("lr", "weight_decay", *keys.FINAL_METRICS), "float64"),
    }
    assert {column: str(dtype) for column, dtype in dtypes.items()} == expected
    assert list(dtypes.index) == [
        *("run_id", "parent_id", "status", "start_time", "end_time", "artifact_uri"),
        *(*keys.TAGS, *keys.PARAMS, *keys.FINAL_METRICS),
    ]
    curve_dtypes = query.load_curves(TASKS, uri(filled)).dtypes
    assert list(curve_dtypes.index) == ["run_id", "task", "model", "split", "epoch", *keys.EPOCH_METRICS]
    assert [str(dtype) for dtype in curve_dtypes[:5]] == ["str", "str", "str", "Int64", "Int64"]
    tracking.open_store(store_uri).make_experiment("task1")  # task2 and task3 have not been run yet
    for load, full in ((query.load_runs, dtypes), (query.load_curves, curve_dtypes)):
        frame = load(TASKS, store_uri)
        assert len(frame) == 0 and frame.index.equals(pd.RangeIndex(0))
        pd.testing.assert_series_equal(frame.dtypes, full)


@pytest.mark.parametrize(
    ("key", "value", "kind"), [("lr", "abc", "float"), ("epochs", "2.5", "int"), ("macs", "9" * 30, "int")]
)
def test_a_param_that_does_not_parse(store_uri: str, path: str, key: str, value: str, kind: str) -> None:
    store = tracking.open_store(store_uri)
    with tracking.parent_run(store, "task3", "lenet5", PARAMS, TAGS) as parent:
        with child(parent, 0, PARAMS | {key: value}) as run:
            pass
    with pytest.raises(StoreError, match=f"run {run.id} has {key} = '{value}', which is no {kind}"):
        query.load_runs(["task3"], store_uri)


def test_what_cannot_be_read_is_said(filled: Path, copy_of: Path, tmp_path: Path, path: str) -> None:
    with pytest.raises(UnknownTaskError, match="'taks3' is not one of task1, task2, task3; did you mean task3"):
        query.load_runs(["task1", "taks3"], uri(filled))
    for folder in (filled, tmp_path / "none"):  # without a store the scripts decide
        with pytest.raises(UnknownTaskError, match="'taks3' is not one of task1, task2, task3"):
            query.load_curves(["taks3"], uri(folder))
    with pytest.raises(StoreError, match=r"there is no result database at .*/none/mlflow.db; run a task first, or"):
        query.load_curves(["task1", "photos"], uri(tmp_path / "none"))
    with pytest.raises(StoreError, match=f"there is no run {'0' * 32} in sqlite:///"):
        query.local_artifact("0" * 32, keys.PREDICTIONS, uri(filled))
    store = tracking.open_store(uri(copy_of))
    store.make_experiment("a task of another checkout")  # an experiment makes a task known, as a script does
    assert query.load_runs(["a task of another checkout"], uri(copy_of)).empty
    store.client.delete_experiment(store.experiment_id("task3"))
    with pytest.raises(StoreError, match=r"experiment task3-fashion-mnist of sqlite:///.* was deleted; to restore it"):
        query.load_runs(["task3"], uri(copy_of))
    assert len(query.load_runs(["task1"], uri(copy_of))) == 1


def test_a_database_that_is_none_of_mlflow(tmp_path: Path) -> None:
    sqlite3.connect(tmp_path / "mlflow.db").execute("CREATE TABLE cats (name)").connection.close()
    with pytest.raises(StoreError, match=r"mlflow.db is no database of MLflow; name another one"):
        query.load_runs(TASKS, uri(tmp_path))
    with pytest.raises(StoreError, match="cannot read the result database postgresql://me:[*]+@127.0.0.1:9/x: "):
        query.load_runs(TASKS, "postgresql://me:secret@127.0.0.1:9/x")


def test_artifacts_of_a_store_that_was_moved(filled: Path, copy_of: Path, path: str) -> None:
    here = query.load_runs(["task3"], uri(copy_of))["artifact_uri"]
    assert here.str.startswith(f"{copy_of.as_uri()}/artifacts/task3-fashion-mnist/").all()  # not the original's
    connection = sqlite3.connect(copy_of / "mlflow.db")
    for table, column in (("runs", "artifact_uri"), ("experiments", "artifact_location")):
        connection.execute(
            f"UPDATE {table} SET {column} = replace({column}, '{filled.as_uri()}', 'file:///gone/x%20y')"
        )
    connection.commit()
    connection.close()
    runs = query.load_runs(["task3"], uri(copy_of))
    base = (copy_of / "artifacts" / "task3-fashion-mnist").as_uri()
    assert runs["artifact_uri"].tolist() == [f"{base}/{run_id}/artifacts" for run_id in runs["run_id"]]
    assert str(runs["artifact_uri"].dtype) == "str"
    shutil.rmtree(copy_of / "artifacts" / "task1-cats-vs-dogs", ignore_errors=True)
    assert query.load_runs(["task1"], uri(copy_of))["artifact_uri"].str.startswith("file:///gone/x%20y/").all()
    found = query.local_artifact(runs["run_id"][0], keys.PREDICTIONS, uri(copy_of))
    assert found.is_relative_to(copy_of)
    assert query.local_artifact(runs.iloc[0], keys.PREDICTIONS) == found


def test_predictions(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = query.load_runs(["task3"], uri(filled)).iloc[0]
    frame = query.load_predictions(row)
    assert frame["part"].tolist() == ["val"] * 3 + ["test"] * 2
    assert frame.dtypes.astype(str).tolist() == ["str", "int64", "int64", "int64", "float32"]
    assert frame["index"].tolist() == [0, 1, 2, 0, 1] and frame["prob"].tolist() == [np.float32(0.1)] * 5
    pd.testing.assert_frame_equal(frame, query.load_predictions(row["run_id"], uri(filled)))
    monkeypatch.setattr(query, "local_path", lambda uri: None)  # as where artifacts lie behind a server
    downloaded = query.local_artifact(row, keys.PREDICTIONS, uri(filled))
    assert not downloaded.is_relative_to(filled)
    assert query.local_artifact(row, keys.PREDICTIONS, uri(filled)) == downloaded  # not again
    pd.testing.assert_frame_equal(frame, query.load_predictions(row["run_id"], uri(filled)))
    with pytest.raises(
        StoreError, match=f"run {row['run_id']} has no figures/a.png; run its task again with --fresh to"
    ):
        query.local_artifact(row, "figures/a.png", uri(filled))


def test_predictions_that_are_missing_or_damaged(filled: Path, tmp_path: Path) -> None:
    runs = query.load_runs(["task3"], uri(filled))
    with pytest.raises(
        StoreError, match=f"run {runs['run_id'][1]} has no predictions.npz; run its task again with --fresh to"
    ):
        query.load_predictions(runs.iloc[1])
    file = tmp_path / "artifacts" / keys.PREDICTIONS
    file.parent.mkdir()
    row = runs.iloc[0].copy()
    row["artifact_uri"] = file.parent.as_uri()
    np.savez(file, **PREDICTIONS)
    whole = file.read_bytes()
    np.save(tmp_path / "array.npy", np.zeros(3))
    flipped = bytearray(whole)
    flipped[200] ^= 1  # within the first array
    for damaged in (b"", b"no archive", whole[:-30], whole[: len(whole) // 2], bytes(flipped)):
        file.write_bytes(damaged)
        with pytest.raises(StoreError, match=f"^{file} is damaged; run its task again"):
            query.load_predictions(row)
    file.write_bytes((tmp_path / "array.npy").read_bytes())
    with pytest.raises(StoreError, match="damaged"):
        query.load_predictions(row)
    for arrays in (
        {key: value for key, value in PREDICTIONS.items() if key != "test_prob"},
        PREDICTIONS | {"val_true": np.zeros(7, int)},
        PREDICTIONS | {"val_true": np.array([None, {}, 1], object)},  # which only pickle reads
    ):
        np.savez(file, **arrays)
        with pytest.raises(StoreError, match="damaged"):
            query.load_predictions(row)


def test_nothing_is_written(copy_of: Path) -> None:
    database = copy_of / "mlflow.db"
    before = database.read_bytes(), database.stat().st_mtime_ns
    runs = query.load_runs(TASKS, uri(copy_of))
    query.load_curves(TASKS, uri(copy_of))
    query.load_predictions(runs["run_id"][0], uri(copy_of))
    assert (database.read_bytes(), database.stat().st_mtime_ns) == before
    with readers._sqlite(database) as execute, pytest.raises(sqlite3.OperationalError, match="readonly"):
        execute("DELETE FROM runs", {})


def test_reading_while_another_process_writes(copy_of: Path) -> None:
    writer = sqlite3.connect(copy_of / "mlflow.db")
    assert writer.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    writer.execute("UPDATE runs SET status = 'KILLED'")
    assert "KILLED" not in query.load_runs(TASKS, uri(copy_of))["status"].tolist()
    writer.commit()
    assert set(query.load_runs(TASKS, uri(copy_of))["status"]) == {"KILLED"}  # which is in the WAL only
    writer.close()


def test_mlflow_is_not_imported(filled: Path) -> None:
    code = (
        "import sys; from analysis.query import *\n"
        f"runs = load_runs(['task1', 'task3'], {uri(filled)!r}); load_curves(['task3'], {uri(filled)!r})\n"
        f"load_predictions(runs.iloc[0]); load_predictions(runs['run_id'][0], {uri(filled)!r})\n"
        "assert not {'mlflow', 'sqlalchemy', 'torch'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": ""})
