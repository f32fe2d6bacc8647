"""A store that goes away: a real MLflow server behind a connection that the tests cut, and a locked database."""

import contextlib
import dataclasses
import json
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest

import analysis
import tracking
from experiments.jobs import worker
from experiments.request import Request
from experiments.run import run
from experiments.task3 import TASK
from experiments.training import hardware
from experiments.training.fit import EpochRecord, fit
from tests.conftest import new_store
from tests.servers import answers, clean_environment, free_port, running, wait_until
from tests.test_tracking import HISTORY, TAGS, claim, do, open_parent, scores
from tracking import StoreError, TrainingConfig, journal, keys, outages
from tracking.process import host

pytestmark = pytest.mark.slow


class Line:
    """A TCP connection to a server, which can be cut and mended."""

    def __init__(self, server: int) -> None:
        self.server = server
        self.listener: socket.socket | None = None
        self.port = free_port()
        self.ends: list[socket.socket] = []

    def mend(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", self.port), reuse_port=False)
        threading.Thread(target=self._accept, args=(self.listener,), daemon=True).start()

    def cut(self) -> None:
        assert self.listener is not None
        self.listener.shutdown(socket.SHUT_RDWR)
        for end in (self.listener, *self.ends):
            end.close()
        self.ends.clear()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                server = socket.create_connection(("127.0.0.1", self.server))
                self.ends += [client, server]
                for source, target in ((client, server), (server, client)):
                    threading.Thread(target=self._pass_on, args=(source, target), daemon=True).start()

    @staticmethod
    def _pass_on(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)


@pytest.fixture(scope="module")
def server(empty_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    folder = tmp_path_factory.mktemp("outages") / "server"
    uri, port = new_store(empty_database, folder), free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri,
               "--artifacts-destination", str(folder / "artifacts"), "--workers", "1", "--port", str(port)]  # fmt: skip
    # without jobs the server starts no processes but its own worker
    environment = clean_environment() | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with running(command, log := folder / "server.log", cwd=folder, env=environment) as process:
        wait_until(lambda: answers(f"http://127.0.0.1:{port}/health"), process, log)
        yield port


@pytest.fixture
def line(server: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Line]:
    monkeypatch.setattr("tracking.store.MLRUNS", tmp_path / "mlruns")
    monkeypatch.setattr(outages, "PATIENCE", 100.0)
    monkeypatch.setattr(outages, "FIRST_WAIT", 0.05)
    monkeypatch.setattr(outages, "LONGEST_WAIT", 0.5)
    monkeypatch.setattr("tracking.runs.NEXT_ATTEMPT", 0.0)
    line = Line(server)
    line.mend()
    yield line
    line.cut()


@contextlib.contextmanager
def once_noticed(action: Callable[[], None]) -> Iterator[None]:
    """Do something as soon as somebody waits for the store."""
    waiting, hurry = threading.Event(), outages._hurry

    class Noticed(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waiting.set()
            return super().wait(timeout)

    def act() -> None:
        if waiting.wait(100):
            action()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outages, "_hurry", Noticed())
        thread = threading.Thread(target=act)
        thread.start()
        yield
        thread.join()
    assert waiting.is_set() and outages._hurry is hurry


def test_epochs_are_kept_while_the_server_is_away_and_sent_in_order(line: Line, capfd, tmp_path: Path) -> None:
    store = tracking.open_store(f"http://127.0.0.1:{line.port}")
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / keys.HISTORY).write_text("[]")
    with open_parent(store) as parent:
        with tracking.child_run(store, claim(parent, 0)) as run:
            run.log_epochs(HISTORY[:1])
            line.cut()
            run.log_epochs(HISTORY[:2])  # training goes on
            run.log_epochs(HISTORY)
            assert capfd.readouterr().err.count("training goes on") == 1
            with once_noticed(line.mend):
                run.log_epochs(HISTORY, wait=True)
            line.cut()
            with once_noticed(line.mend):
                run.log_files(tmp_path / "files")
            run.log_metrics(scores(0.5), timestamp=1003)
    history = store.client.get_metric_history(run.id, "val/loss")
    assert [(point.step, point.timestamp, point.value) for point in history] == [
        (entry["epoch"], entry["time"], entry["metrics"]["val/loss"]) for entry in HISTORY
    ]
    runs = analysis.load_runs(["task3"], store.uri)
    assert runs.loc[runs["run_id"] == run.id, ["status", "test/accuracy"]].to_numpy().tolist() == [["FINISHED", 0.5]]
    assert [file.path for file in store.client.list_artifacts(run.id)] == [keys.HISTORY]


def test_a_server_that_stays_away_leaves_what_the_next_start_goes_on_from(line: Line, monkeypatch) -> None:
    monkeypatch.setattr(outages, "PATIENCE", 2.0)
    store = tracking.open_store(f"http://127.0.0.1:{line.port}")
    tags = TAGS | {"fingerprint": "away"}
    with pytest.raises(Exception, match="Max retries|refused|reset|aborted") as raised:
        with open_parent(store, tags=tags) as parent:
            claimed = claim(parent, 0, tags=tags)
            with tracking.child_run(store, claimed) as run:
                line.cut()
                tracking.save_progress(claimed, tags, HISTORY, {})
                run.log_epochs(HISTORY, wait=True)
    assert outages.passes(raised.value)
    line.mend()
    with open_parent(store, tags=tags) as parent:
        again = claim(parent, 0, tags=tags)
        assert again.is_ours and again.run_id == run.id and again.saved["history"] == HISTORY
        with tracking.child_run(store, again) as run:
            run.log_epochs(again.saved["history"], wait=True)
    assert len(store.client.get_metric_history(run.id, "val/loss")) == 3
    assert store.client.get_run(parent.id).info.status == "FINISHED"
    assert not again.resume_file.exists()


# --- a whole protocol, and the journal


def run_protocol(uri: str, n_splits: int) -> list[str]:
    task = dataclasses.replace(TASK, models=("lenet5",), baselines=())
    config = hardware.resolve(
        TrainingConfig(epochs=3, device="cpu", train_seed=n_splits)
    )  # other runs than those of other tests
    return [
        *run(
            Request(
                task=task,
                training={"lenet5": config},
                n_splits=n_splits,
                splits=range(n_splits),
                sample=True,
                tracking_uri=uri,
            )
        )
    ]


def at_epochs(monkeypatch: pytest.MonkeyPatch, **actions: Callable[[], None]) -> list[int]:
    """Do something when so many epochs have been trained, over all splits; return a list that grows with them."""
    trained: list[int] = []

    def acting(*arguments: Any) -> Iterator[EpochRecord]:
        for record in fit(*arguments):
            trained.append(record.epoch)
            actions.get(f"after_{len(trained)}", lambda: None)()
            yield record

    monkeypatch.setattr(worker, "fit", acting)
    monkeypatch.setattr(tracking, "SHORT", 0.5)
    return trained


def runs_of(uri: str, n_splits: int) -> pd.DataFrame:
    """The runs of one test; all share the server."""
    runs = analysis.load_runs(["task3"], uri)
    return runs[runs["train_seed"] == n_splits]


def epochs_by_split(uri: str, n_splits: int) -> dict[int, list[int]]:
    curves = analysis.load_curves(["task3"], uri)
    curves = curves[curves["run_id"].isin(runs_of(uri, n_splits)["run_id"])]
    assert not curves.isna().to_numpy().any()
    return {int(split): list(of_split["epoch"]) for split, of_split in curves.groupby("split")}


def test_a_protocol_goes_on_without_its_server_and_everything_is_sent_when_that_is_back(
    line: Line, monkeypatch, capfd
) -> None:
    uri = f"http://127.0.0.1:{line.port}"
    trained = at_epochs(monkeypatch, after_2=line.cut, after_8=line.mend)  # back in the third split
    assert run_protocol(uri, 4) == []
    assert trained == [1, 2, 3] * 4
    assert "results are kept for it, and training goes on" in capfd.readouterr().err
    assert epochs_by_split(uri, 4) == {split: [1, 2, 3] for split in range(4)}
    runs = runs_of(uri, 4)
    assert runs["status"].tolist() == ["FINISHED"] * 4 and runs["test/accuracy"].notna().all()
    store = tracking.open_store(uri)
    parent = store.client.get_run(runs["parent_id"].iloc[0])
    assert parent.info.status == "FINISHED" and parent.data.metrics["n_splits"] == 4
    assert keys.MODEL_CARD in [file.path for file in store.client.list_artifacts(parent.info.run_id)]
    assert [path.name for path in store.state.iterdir()] == ["store.lock"]


def test_what_a_server_that_stays_away_lacks_is_sent_by_the_same_command_later(line: Line, monkeypatch, capfd) -> None:
    monkeypatch.setattr(outages, "PATIENCE", 1.0)
    uri = f"http://127.0.0.1:{line.port}"
    trained = at_epochs(monkeypatch, after_1=line.cut)
    with pytest.raises(
        StoreError, match=r"is away; the results of lenet5 split 0, .*lenet5 split 4 are kept in .*; the same command"
    ):
        run_protocol(uri, 5)
    assert trained == [1, 2, 3] * 5
    line.mend()
    assert run_protocol(uri, 5) == []
    assert len(trained) == 15  # nothing was trained again
    printed = capfd.readouterr().out
    assert "sent to the result database what was kept for it: 5 splits" in printed
    assert "finished before and kept: 5 splits" in printed
    assert epochs_by_split(uri, 5) == {split: [1, 2, 3] for split in range(5)}
    runs = runs_of(uri, 5)
    assert runs["status"].tolist() == ["FINISHED"] * 5 and runs["parent_id"].nunique() == 1
    store = tracking.open_store(uri)
    assert store.client.get_run(runs["parent_id"].iloc[0]).info.status == "FINISHED"
    assert [path.name for path in store.state.iterdir()] == ["store.lock"]


RESULTS = journal.Results(("d", "0" * 64, "{}"), HISTORY, scores(0.5), {"file_digests": "{}"})


def write_entry(store: tracking.Store, claimed: tracking.Claim) -> Path:
    with store.scratch() as scratch:
        folder = Path(scratch) / "entry"
        (folder / journal.FILES).mkdir(parents=True)
        (folder / journal.FILES / keys.HISTORY).write_text("[]")
        return journal.write(store, claimed, RESULTS, folder)


def test_an_entry_of_a_process_that_was_killed_is_sent_once_and_one_of_a_living_process_is_left(store_uri: str) -> None:
    store = tracking.open_store(store_uri)
    with open_parent(store) as parent:
        claimed = claim(parent, 0)
        entry = write_entry(store, claimed)
        record = json.loads((entry / journal.RECORD).read_text())
        for owner, sent in (("1", 0), ("999999999", 1)):  # process 1 lives, the other one never did
            signs = {"owner": f"{host()} {owner} {psutil.Process(1).create_time():.0f}", "command": "another"}
            (entry / journal.RECORD).write_text(json.dumps(record | {"signs": record["signs"] | signs}))
            assert journal.send_all(store) == (sent, {})
        assert not entry.exists() and journal.send_all(store) == (0, {})
    assert len(store.client.get_metric_history(claimed.run_id, "val/loss")) == 3
    assert store.client.get_run(claimed.run_id).info.status == "FINISHED"


def test_an_entry_is_sent_again_after_a_kill_at_any_moment(store_uri: str, monkeypatch) -> None:
    store = tracking.open_store(store_uri)
    steps = ("log_dataset", "log_epochs", "log_files", "set_tag", "log_metrics", "finish")
    with open_parent(store) as parent:
        claimed = claim(parent, 0)
        entry = write_entry(store, claimed)
        for step in steps:
            with monkeypatch.context() as killed:
                killed.setattr(tracking.Run, step, lambda *arguments, **options: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    journal.send(store, entry)
        journal.send(store, entry)
        entry.mkdir()  # of a process that was killed as it removed it
        assert journal.send_all(store) == (0, {}) and not entry.exists()
    (run,) = analysis.load_runs(["task3"], store_uri).itertuples()
    assert (run.run_id, run.status) == (claimed.run_id, "FINISHED")
    for key, n in (("val/loss", 3), ("test/accuracy", 1)):
        assert len(store.client.get_metric_history(run.run_id, key)) == n
    assert [file.path for file in store.client.list_artifacts(run.run_id)] == [keys.HISTORY]


def test_an_entry_that_is_damaged_or_refused_is_named_and_stops_nothing(store_uri: str) -> None:
    store = tracking.open_store(store_uri)
    with open_parent(store) as parent:
        damaged, good, refused = (write_entry(store, claim(parent, split)) for split in range(3))
        (damaged / journal.RECORD).write_text("{")
        record = (refused / journal.RECORD).read_text()
        (refused / journal.RECORD).write_text(record.replace('"val/loss"', '"val/los"'))
        sent, sentences = journal.send_all(store)
        assert sent == 1 and not good.exists() and damaged.exists() and refused.exists()
        assert [str(entry) in " ".join(sentences.values()) for entry in (damaged, good, refused)] == [True, False, True]
        assert "val/los not in tracking.keys" in " ".join(sentences.values())


def test_an_entry_whose_split_another_process_has_finished_is_dropped(store_uri: str) -> None:
    store = tracking.open_store(store_uri)
    with open_parent(store) as parent:
        entry = write_entry(store, dataclasses.replace(claim(parent, 0), run_id=""))
        assert do(parent, 0, 0.7) is not None
        assert journal.send_all(store) == (1, {}) and not entry.exists()
    assert analysis.load_runs(["task3"], store_uri)["test/accuracy"].tolist() == [0.7]


@pytest.mark.parametrize(("reason", "may_pass"), [
    ("database is locked", True),
    ("attempt to write a readonly database", False),
    ("database or disk is full", False),
    ("unable to open database file", False),
])  # fmt: skip
def test_a_locked_database_may_pass_and_a_full_disk_does_not(reason: str, may_pass: bool) -> None:
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import TEMPORARILY_UNAVAILABLE

    assert outages.passes(MlflowException(f"(sqlite3.OperationalError) {reason}", TEMPORARILY_UNAVAILABLE)) == may_pass


def test_two_processes_that_enter_the_same_data_set_in_the_same_moment_both_do(store_uri: str, monkeypatch) -> None:
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    store = tracking.open_store(store_uri)
    log_inputs, meeting = SqlAlchemyStore.log_inputs, threading.Barrier(2)

    def meet(*arguments: object, **options: object) -> None:
        with contextlib.suppress(threading.BrokenBarrierError):
            meeting.wait(1)
        log_inputs(*arguments, **options)

    monkeypatch.setattr(SqlAlchemyStore, "log_inputs", meet)
    with open_parent(store) as parent:
        for number in range(20):  # most of them collide
            entering = [
                threading.Thread(target=tracking.Run(store, parent.id).log_dataset, args=("d", f"{number:064d}", "{}"))
                for _ in range(2)
            ]
            with raising_in_threads() as errors:
                for thread in entering:
                    thread.start()
                for thread in entering:
                    thread.join()
            assert errors == []


@contextlib.contextmanager
def raising_in_threads() -> Iterator[list[BaseException]]:
    errors: list[BaseException] = []
    hook = threading.excepthook
    threading.excepthook = lambda what: errors.append(what.exc_value)
    try:
        yield errors
    finally:
        threading.excepthook = hook


def test_what_is_wrong_with_a_request_or_a_file_does_not_pass(store_uri: str) -> None:
    store = tracking.open_store(store_uri)
    with open_parent(store) as parent, pytest.raises(Exception, match="param") as raised:
        store.client.log_param(parent.id, "model", "another")
    assert not outages.passes(raised.value)
    assert not outages.passes(OSError(28, "No space left on device"))
