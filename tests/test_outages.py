"""A store that goes away: a real MLflow server behind a connection that the tests cut, and a locked database."""

import contextlib
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import analysis
import tracking
from tests.test_tracking import HISTORY, TAGS, claim, open_parent, scores
from tracking import keys, outages


class Line:
    """A TCP connection to a server, which can be cut and mended."""

    def __init__(self, server: int) -> None:
        self.server = server
        self.listener: socket.socket | None = None
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
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
    folder = tmp_path_factory.mktemp("server")
    (folder / "mlflow.db").write_bytes(empty_database.read_bytes())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}",
               "--artifacts-destination", str(folder / "artifacts"), "--workers", "1", "--port", str(port)]  # fmt: skip
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
            break
        time.sleep(0.2)
    yield port
    process.terminate()
    process.wait()


@pytest.fixture
def line(server: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Line]:
    monkeypatch.setattr("tracking.store.MLRUNS", tmp_path / "mlruns")
    monkeypatch.setattr(outages, "PATIENCE", 20.0)
    monkeypatch.setattr("tracking.runs.NEXT_ATTEMPT", 0.0)
    line = Line(server)
    line.mend()
    yield line
    line.cut()


def after(seconds: float, action: Callable[[], None]) -> None:
    threading.Timer(seconds, action).start()


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
            after(3, line.mend)
            run.log_epochs(HISTORY, wait=True)
            line.cut()
            after(2, line.mend)
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


def test_what_is_wrong_with_a_request_or_a_file_does_not_pass(store_uri: str) -> None:
    store = tracking.open_store(store_uri)
    with open_parent(store) as parent, pytest.raises(Exception, match="param") as raised:
        store.client.log_param(parent.id, "model", "another")
    assert not outages.passes(raised.value)
    assert not outages.passes(OSError(28, "No space left on device"))
