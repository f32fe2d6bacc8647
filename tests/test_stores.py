"""Stores that are old, moved, copied, write-protected or shared: nothing of others is read or changed."""

import datetime
import hashlib
import http.server
import ipaddress
import os
import re
import shutil
import sqlite3
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import psutil
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from mlflow.entities import Metric
from PIL import Image

import analysis
import tracking
from tests.conftest import ROOT, new_store, snapshot
from tests.servers import free_port
from tracking import StoreError, owners, registry, schema
from tracking.artifacts import Artifacts
from tracking.keys import CHAMPION, PARENT, REASON
from tracking.sqlite import readable, sqlite_path
from tracking.store import deleted_sentence

Run = Callable[..., subprocess.CompletedProcess[str]]
READING = [
    ("analysis", "table", "task3"), ("analysis", "compare", "task3"), ("analysis", "figures", "task3", "--out", "OUT"),
    ("analysis", "report", "task3", "--out", "OUT.html"), ("analysis", "export", "task3", "--out", "OUT"),
    ("experiments", "verify", "task3"), ("experiments", "predict", "task3", "photo.jpg"), ("tracking", "ui"),
]  # fmt: skip


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def set_schema(path: Path, value: str) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("UPDATE alembic_version SET version_num = ?", [value])
        connection.commit()
        connection.execute("PRAGMA journal_mode=DELETE")


def run_of(store: tracking.Store, task: str, fingerprint: str = "", **params: str) -> str:
    experiment = store.make_experiment(task)
    parent = store.client.create_run(experiment, tags={"task": task})
    tags = {PARENT: parent.info.run_id, "task": task} | ({"fingerprint": fingerprint} if fingerprint else {})
    run_id = str(store.client.create_run(experiment, tags=tags).info.run_id)
    for key, value in params.items():
        store.client.log_param(run_id, key, value)
    store.client.log_batch(run_id, [Metric("test/accuracy", 0.5, 0, 0)])
    store.client.set_terminated(run_id)
    return run_id


@pytest.mark.parametrize("command", READING, ids=lambda command: " ".join(command[:2]))
def test_reading_leaves_a_store_of_another_version_as_it_is(
    command: tuple[str, ...], store_uri: str, tmp_path: Path, run_here: Run
) -> None:
    path = sqlite_path(store_uri)
    assert path is not None
    set_schema(path, "0584bdc529eb")
    before = digests(path.parent)
    arguments = [part.replace("OUT", str(tmp_path / "out")) for part in command]
    done = run_here("-m", *arguments, "--tracking-uri", store_uri)
    assert done.returncode == 1 and digests(path.parent) == before
    assert re.search(r"MLflow 2\.18 to 2\.22 made .*use the former, or an upgraded copy \(python -m", done.stderr)
    assert done.stderr.count("\n") == 1


def test_nothing_is_written_into_a_store_of_another_version_without_the_users_word(store_uri: str, run_here) -> None:
    path = sqlite_path(store_uri)
    assert path is not None
    set_schema(path, "0584bdc529eb")
    before = digests(path.parent)
    done = run_here("experiments/task3.py", "--sample", "--tracking-uri", store_uri)
    assert done.returncode == 1 and "MLflow 2.18 to 2.22 made" in done.stderr and digests(path.parent) == before
    for wrong in ((), ("a.db", "--in-place")):
        assert run_here("-m", "tracking", "upgrade", store_uri, *wrong).returncode == 2
    assert digests(path.parent) == before


def test_versions_are_told_by_their_schema(tmp_path: Path) -> None:
    head, known = schema.installed()
    assert schema.MADE_BY.keys() <= known and head in schema.MADE_BY
    assert schema.why_unusable(head, "x") == ""
    assert "a newer version of MLflow" in schema.why_unusable("ffffffffffff", "x")
    assert "no database of MLflow" in schema.why_unusable(None, "x")
    with closing(sqlite3.connect(tmp_path / "other.db")) as connection:
        connection.execute("CREATE TABLE mine (name TEXT)")
        connection.commit()
    before = digests(tmp_path)
    with pytest.raises(StoreError, match="no database of MLflow"):
        tracking.open_store(f"sqlite:///{tmp_path / 'other.db'}", create=True)
    assert digests(tmp_path) == before


def test_a_copy_reads_and_writes_its_own_files(store_uri: str, empty_database: Path, tmp_path: Path) -> None:
    store = tracking.open_store(store_uri)
    run_id = run_of(store, "task3", "a")
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "name.txt").write_text("original")

    def files(of: tracking.Store) -> Artifacts:
        experiment = of.experiment("task3")
        assert experiment is not None
        return Artifacts(of, experiment)

    files(store).upload(store.client.get_run(run_id), tmp_path / "files")
    original = Path(store_uri.removeprefix("sqlite:///")).parent
    shutil.copytree(original, tmp_path / "copy")
    before = digests(original)
    copy = tracking.open_store(f"sqlite:///{tmp_path / 'copy' / 'mlflow.db'}")
    run = copy.client.get_run(run_id)
    assert files(copy).fetch(run, tmp_path / "scratch").is_relative_to(tmp_path / "copy")
    (tmp_path / "files" / "name.txt").write_text("changed")
    files(copy).upload(copy.client.get_run(run_of(copy, "task3", "b")), tmp_path / "files")
    files(copy).upload(run, tmp_path / "files")
    assert {key: value for key, value in digests(original).items() if ".db" not in key} == {
        key: value for key, value in before.items() if ".db" not in key
    }
    # renamed, while a new store stands at the old place
    original.rename(tmp_path / "renamed")
    other = tracking.open_store(new_store(empty_database, original))
    other.make_experiment("task3")
    (original / "artifacts" / "task3-fashion-mnist").mkdir(parents=True)
    renamed = tracking.open_store(f"sqlite:///{tmp_path / 'renamed' / 'mlflow.db'}")
    found = files(renamed).fetch(renamed.client.get_run(run_id), tmp_path / "scratch")
    assert (found / "name.txt").read_text() == "original"


def test_runs_of_strangers_are_not_read(store_uri: str) -> None:
    store = tracking.open_store(store_uri)
    run_of(store, "task3", batch_size="auto", model="theirs")
    ours = run_of(store, "task3", "a", batch_size="32", model="lenet5")
    assert analysis.load_runs(["task3"], store_uri)["run_id"].tolist() == [ours]


def test_a_registered_model_of_others_is_left_alone(store_uri: str, tmp_path: Path) -> None:
    store = tracking.open_store(store_uri)
    store.client.create_registered_model("task3", description="of another team")
    theirs = store.client.create_model_version("task3", tmp_path.as_uri())
    store.client.set_registered_model_alias("task3", CHAMPION, theirs.version)
    with pytest.raises(StoreError, match="registered model 'task3' of .* is not of this program"):
        registry.read_champion(store, "task3")
    store.client.set_model_version_tag("task3", theirs.version, REASON, "of an earlier version")
    assert registry.is_ours(store, "task3")
    about = f"Cats or dogs? {registry.ABOUT.format('task1')}"  # of a version without tags, whose versions were deleted
    store.client.create_registered_model("task1", description=about)
    store.client.create_registered_model("task2", description=about)
    assert registry.is_ours(store, "task1") and not registry.is_ours(store, "task2")


def test_a_champion_whose_experiment_was_removed_has_no_files(store_uri: str, tmp_path: Path) -> None:
    store = tracking.open_store(store_uri)
    store.client.create_registered_model("task3", {"task": "task3"})
    version = store.client.create_model_version("task3", tmp_path.as_uri()).version
    store.client.set_registered_model_alias("task3", CHAMPION, version)
    held = registry.read_champion(store, "task3")
    assert held is not None and not held.has_files
    with pytest.raises(StoreError, match="the files of the champion of task3, version 1, are gone; the next"):
        registry.fetch_champion(store, "task3", held, tmp_path)


def test_a_deleted_experiment_comes_back_by_the_command_that_is_named(store_uri: str) -> None:
    store = tracking.open_store(store_uri)
    ours = run_of(store, "task3", "a")
    run_of(store, "task1", "b")
    experiment = store.experiment_id("task3")
    assert experiment is not None
    store.client.delete_experiment(experiment)
    with pytest.raises(StoreError, match="was deleted; to restore it: ") as error:
        analysis.load_runs(["task3"], store_uri)
    assert store.tasks() == ["task1"]
    variable, command = str(error.value).partition("to restore it: ")[2].split(" ", 1)
    environment = os.environ | dict([variable.split("=", 1)])
    command = command.replace("python", sys.executable, 1)
    subprocess.run(command.split(), env=environment, check=True, capture_output=True, cwd=ROOT)
    assert analysis.load_runs(["task3"], store_uri)["run_id"].tolist() == [ours]


def test_commands_in_sentences_can_be_pasted() -> None:
    found = deleted_sentence("photos", 3, "sqlite:////home/me/my results/mlflow.db")
    assert "MLFLOW_TRACKING_URI='sqlite:////home/me/my results/mlflow.db' python -m mlflow experiments restore" in found
    masked = deleted_sentence("photos", 3, "postgresql://me:***@host/db")
    assert "(with the password in place of ***): MLFLOW_TRACKING_URI='postgresql://me:***@host/db'" in masked
    old = schema.why_unusable("0584bdc529eb", "sqlite:////home/me/my results/mlflow.db")
    assert old.endswith("(python -m tracking upgrade 'sqlite:////home/me/my results/mlflow.db' FILE)")
    server = schema.why_unusable("0584bdc529eb", "postgresql://me:***@host/db")
    assert server.endswith("after a backup (python -m mlflow db upgrade 'postgresql://me:***@host/db')")


@pytest.fixture
def https_server(tmp_path: Path) -> Iterator[str]:
    """The address of a server whose certificate, in cert.pem, nobody signed."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (tmp_path / "cert.pem").write_bytes(signed.public_bytes(Encoding.PEM))
    (tmp_path / "key.pem").write_bytes(secret)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"https://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_certificate_of_ones_own_is_taken_as_by_the_client_of_mlflow(
    https_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        StoreError, match="does not answer .*certificate verify failed.*; name its certificate in MLFLOW"
    ):
        tracking.check_uri(https_server)
    for name, value in (
        ("MLFLOW_TRACKING_SERVER_CERT_PATH", str(tmp_path / "cert.pem")), ("MLFLOW_TRACKING_INSECURE_TLS", "true"),
        ("REQUESTS_CA_BUNDLE", str(tmp_path / "cert.pem")),
    ):  # fmt: skip
        with monkeypatch.context() as environment:
            environment.setenv(name, value)
            assert tracking.check_uri(https_server) == https_server
            with_user = https_server.replace("://", "://me:secret@")
            assert tracking.check_uri(with_user) == with_user
    monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", str(tmp_path / "nothing.pem"))
    with pytest.raises(StoreError, match="nothing.pem"):
        tracking.check_uri(https_server)


def test_a_clock_that_is_set_back_ends_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    signs = owners.signs_of_life("command")
    assert owners.is_alive(signs)
    created, now = psutil.Process.create_time, time.time
    monkeypatch.setattr(psutil.Process, "create_time", lambda process: created(process) - 3600)
    monkeypatch.setattr(time, "time", lambda: now() - 3600)
    assert owners.is_alive(signs)
    assert not owners.is_alive({**signs, "owner": re.sub(r"t\d+$", "t1", signs["owner"])})  # the number was reused


def test_options_of_the_connection_are_no_part_of_the_file_name(store_uri: str) -> None:
    uri = f"{store_uri}?timeout=60"
    run_of(tracking.open_store(uri), "task3", "a")
    assert len(analysis.load_runs(["task3"], uri)) == len(analysis.load_runs(["task3"], store_uri)) == 1


def test_a_group_that_works_together_can_write_a_new_database(tmp_path: Path) -> None:
    code = f"import os, tracking; os.umask(0o002); tracking.open_store('sqlite:///{tmp_path}/new.db', create=True)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    assert (tmp_path / "new.db").stat().st_mode & 0o777 == 0o664


AS_ORDINARY_USER = """
import contextlib, io, runpy, signal, subprocess, sys
store, photo, report, port = sys.argv[1:]
for command in (
    ["analysis", "table", "task3"], ["analysis", "report", "task3", "--out", report],
    ["experiments", "predict", "task3", photo],
):
    sys.argv = [*command, "--tracking-uri", store]
    code = 0
    try:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            runpy.run_module(command[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code or 0
    print(command[1], code, len(out.getvalue()) > 0)
ui = [sys.executable, "-m", "tracking", "ui", "--port", port, "--tracking-uri", store]
with subprocess.Popen(ui, stdout=subprocess.PIPE, text=True) as server:
    print(server.stdout.readline().split()[0])
    server.send_signal(signal.SIGTERM)
import tracking
tracking.open_store(store, create=True)
"""
# what makes root an ordinary user, whom write protection concerns
WITHOUT_RIGHTS = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []


@pytest.mark.skipif(bool(WITHOUT_RIGHTS) and not shutil.which("setpriv"), reason="root may write everywhere")
@pytest.mark.slow
def test_a_write_protected_store_is_readable(finished_task3: str, tmp_path: Path) -> None:
    original = sqlite_path(finished_task3)
    assert original is not None
    folder = shutil.copytree(original.parent, tmp_path / "read-only")
    for each in folder.rglob("*"):
        each.chmod(0o555 if each.is_dir() else 0o444)
    folder.chmod(0o555)
    Image.new("L", (28, 28)).save(tmp_path / "photo.png")
    before, contents = snapshot(folder), digests(folder)
    arguments = (f"sqlite:///{folder}/mlflow.db", tmp_path / "photo.png", tmp_path / "report.html", free_port())
    command = [*WITHOUT_RIGHTS, sys.executable, "-c", AS_ORDINARY_USER, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split("\n")[:4] == ["table 0 True", "report 0 True", "predict 0 True", "task3"], done.stderr
    assert "it is write-protected; name another one" in done.stderr
    folder.chmod(0o755)  # so that it can be removed
    assert snapshot(folder).keys() == before.keys() and digests(folder) == contents
    assert (tmp_path / "report.html").stat().st_size > 10_000


@pytest.mark.parametrize("closed", [False, True], ids=["while somebody writes", "after a killed writer"])
def test_what_is_read_of_a_write_protected_store_is_one_state(
    closed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mlflow.db"
    writer = sqlite3.connect(path)
    writer.execute("PRAGMA journal_mode=WAL")
    for name in ("one", "two"):
        writer.execute(f"CREATE TABLE {name} (value)")
        writer.execute(f"INSERT INTO {name} VALUES (1)")
    writer.commit()
    writer.execute("UPDATE one SET value = 2")  # the other half of a transaction is missing
    if closed:  # what is left of it
        shutil.copytree(tmp_path, tmp_path / "left")
        path = tmp_path / "left" / "mlflow.db"
        path.with_name("mlflow.db-shm").unlink()
        connect = sqlite3.connect

        def refuse(target: object, **options: bool) -> sqlite3.Connection:  # as SQLite does for an ordinary user
            if "mode=ro" in str(target):
                raise sqlite3.OperationalError("unable to open database file")
            return connect(target, **options)  # type: ignore[call-overload,no-any-return]

        monkeypatch.setattr(sqlite3, "connect", refuse)
    monkeypatch.setattr(os, "access", lambda *_: False)
    copy = readable(path)
    assert copy != path
    with closing(sqlite3.connect(copy)) as reader:
        assert [reader.execute(f"SELECT value FROM {name}").fetchall() for name in ("one", "two")] == [[(1,)], [(1,)]]
    writer.close()
