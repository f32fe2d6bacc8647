"""The result database written and read back: real MLflow on a real SQLite file."""

import http.server
import os
import socket
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import analysis
import models
import tracking
from tests.conftest import ROOT
from tracking import StoreError, keys
from tracking.checkpoints import Checkpoint

PARAMS = {"model": "lenet5", "dataset": "d", "device": "cpu", **dict.fromkeys(keys.GROUP_PARAMS, 1)}
TAGS = {"task": "task3", "fingerprint": "f" * 64, "dataset_digest": "0" * 64, "source_digest": "s", "git_commit": "c"}


def scores(value: float) -> dict[str, float]:
    return {"test/accuracy": value, "best_val/accuracy": value, "best_epoch": 1, "train_seconds": 2.0}


def child(store: tracking.Store, parent: tracking.Run, split: int, value: float) -> str:
    with tracking.child_run(store, parent, f"split {split}", PARAMS | {"split": split}, TAGS) as run:
        run.log_metrics(scores(value))
    return run.id


def test_a_parent_is_found_again_and_an_older_split_marked(store_uri: str) -> None:
    store = tracking.open_store(store_uri)
    with tracking.parent_run(store, "task3", "lenet5", PARAMS, TAGS) as parent:
        first = child(store, parent, 0, 0.1)
        child(store, parent, 1, 0.5)
    with tracking.parent_run(store, "task3", "lenet5", PARAMS, TAGS) as again:
        assert again.id == parent.id  # the same configuration is the same parent
        newer = child(store, again, 0, 0.7)
        with pytest.raises(RuntimeError), tracking.child_run(store, again, "broken", PARAMS | {"split": 1}, TAGS):
            raise RuntimeError("out of order")
        again.log_metrics({"mean/test/accuracy": 0.6, "low/test/accuracy": 0.5, "n_splits": 2})
    with tracking.parent_run(store, "task3", "other", PARAMS, TAGS | {"fingerprint": "g"}) as other:
        assert other.id != parent.id

    metrics = store.client.get_run(parent.id).data.metrics
    assert metrics == {"mean/test/accuracy": 0.6, "low/test/accuracy": 0.5, "n_splits": 2}
    assert store.client.get_run(first).data.tags["superseded_by"] == newer
    runs = analysis.load_runs(["task3", "task1"], store_uri)
    assert runs["status"].tolist() == ["FINISHED", "FINISHED", "FINISHED", "FAILED"]
    assert runs["failure"].iloc[-1] == "out of order"


def test_a_split_run_again_by_other_code_supersedes_the_older_run(store_uri: str) -> None:
    store = tracking.open_store(store_uri)
    ids = []
    for fingerprint, lr in (("f", 1), ("g", 1), ("h", 2)):  # the third is another comparison group
        params, tags = PARAMS | {"lr": lr}, TAGS | {"fingerprint": fingerprint}
        with tracking.parent_run(store, "task3", "lenet5", params, tags) as parent:
            with tracking.child_run(store, parent, "split 0", params | {"split": 0}, tags) as run:
                run.log_metrics(scores(0.5))
        ids.append(run.id)
    found = [store.client.get_run(run_id).data.tags.get("superseded_by") for run_id in ids]
    assert found == [ids[1], None, None]


def test_interrupted_runs_are_killed(store_uri: str) -> None:
    store = tracking.open_store(store_uri)
    with pytest.raises(KeyboardInterrupt), tracking.parent_run(store, "task1", "lenet5", PARAMS, TAGS) as parent:
        with tracking.child_run(store, parent, "split 0", PARAMS | {"split": 0}, TAGS):
            raise KeyboardInterrupt
    assert store.client.get_run(parent.id).info.status == "KILLED"
    assert analysis.load_runs(["task1"], store_uri)["status"].tolist() == ["KILLED"]


def test_every_key_is_known_and_explained(store_uri: str) -> None:
    store = tracking.open_store(store_uri)
    with tracking.parent_run(store, "task3", "lenet5", PARAMS, TAGS) as run:
        with pytest.raises(StoreError, match="acuracy not in tracking.keys"):
            run.log_metrics({"acuracy": 1.0})
        run.log_metrics({"val/loss": 2.0, "lr": 0.5}, step=1)
        run.log_metrics({"val/loss": 1.0, "lr": 0.4}, step=2)
        run.log_dataset("d", "a" * 64, "{}")
    history = store.client.get_metric_history(run.id, "val/loss")
    assert [(point.step, point.value) for point in history] == [(1, 2.0), (2, 1.0)]
    inputs = store.client.get_run(run.id).inputs.dataset_inputs
    assert [(entry.dataset.name, entry.dataset.digest) for entry in inputs] == [("d", "a" * 36)]
    for group in (keys.PARAMS, keys.EPOCH_METRICS, keys.FINAL_METRICS, keys.TAGS):
        assert all(len(meaning) > 10 for meaning in group.values())
    assert set(keys.EXPERIMENTS) == {"task1", "task2", "task3"}


def test_store_is_made_whole_in_wal_mode_with_absolute_artifacts(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = tracking.open_store("sqlite:///relative/mlflow.db", create=True)
    database = tmp_path / "relative" / "mlflow.db"
    assert store.uri == f"sqlite:///{database}"
    with sqlite3.connect(database) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    experiment = store.client.get_experiment(store.make_experiment("task3"))
    assert experiment.artifact_location == (database.parent / "artifacts" / "task3-fashion-mnist").as_uri()
    assert {path.name for path in tmp_path.iterdir()} == {"relative"}
    assert store.runs_link("task3").endswith(
        f"/#/experiments/{experiment.experiment_id}/runs?workflowType=machine_learning"
    )


def test_processes_that_start_at_once_on_a_fresh_store(tmp_path: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, '.'); import tracking;"
        f"store = tracking.open_store('sqlite:///{tmp_path / 'mlflow.db'}', create=True);"
        "print(store.make_experiment('task2'))"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    answers = {process.communicate(timeout=200)[0].strip() for process in started}
    assert [process.returncode for process in started] == [0, 0, 0]
    assert len(answers) == 1 and answers != {""}


def test_stores_that_cannot_be_used_say_so_in_one_sentence(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        for uri, sentence in {
            f"http://127.0.0.1:{port}": "does not answer",
            f"sqlite:///{tmp_path / 'nowhere.db'}": "there is no result database",
            str(tmp_path): "plain folder",
            "nosuch://host/db": "cannot open",
            "http://localhost:abc": "does not answer",
            "sqlite://": "names no file",
            f"sqlite:///{tmp_path}": "cannot open the result database .*: it is a folder",
            "postgresql://user:secret@127.0.0.1:9/db": "cannot open",
        }.items():
            with pytest.raises(StoreError, match=sentence) as error:
                tracking.open_store(uri)
            assert "\n" not in str(error.value) and "secret" not in str(error.value)
    (tmp_path / "text.db").write_text("this is no database, " * 100)
    with pytest.raises(StoreError, match="cannot open"):
        tracking.open_store(f"sqlite:///{tmp_path / 'text.db'}")


def test_server_that_refuses_is_reported(tmp_path: Path) -> None:
    class Refusing(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(401)

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(StoreError, match="401"):
            tracking.open_store(f"http://127.0.0.1:{server.server_port}")
        server.shutdown()


def test_checkpoint_rebuilds_its_model(tmp_path: Path) -> None:
    arguments = {"in_channels": 1, "num_classes": 3, "image_size": 28}
    model = models.build("resnetcnn", **arguments).to(memory_format=torch.channels_last)
    saved = Checkpoint("resnetcnn", arguments, 4, 0.5, torch.tensor([1.0]), torch.tensor([2.0]), model.state_dict())
    saved.save(tmp_path / "checkpoint" / "best.pt")
    loaded = Checkpoint.load(tmp_path / "checkpoint" / "best.pt")
    again = models.build(loaded.model, **loaded.arguments).to(memory_format=torch.channels_last)
    again.load_state_dict(loaded.state_dict)
    images = torch.randn(2, 1, 28, 28)
    assert torch.equal(again.eval()(images), model.eval()(images))
    assert (loaded.epoch, loaded.score, loaded.mean.item(), loaded.std.item()) == (4, 0.5, 1.0, 2.0)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_full_disk_is_an_oserror_with_its_reason() -> None:
    checkpoint = Checkpoint("lenet5", {}, 1, 0.0, torch.zeros(1), torch.ones(1), {"w": torch.zeros(100_000)})
    with pytest.raises(OSError, match=os.strerror(28)):
        checkpoint.save(Path("/dev/full"))
