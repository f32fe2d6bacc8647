"""Real servers for tests, each on a free port of loopback: PostgreSQL, S3 (moto's), and the tracking server on both.

Context managers, so that a module of tests makes of them what it needs, once:

    @pytest.fixture(scope="module")
    def server() -> Iterator[TrackingServer]:
        with tracking_server() as server:
            yield server

Where a program is missing they skip and say which. Ctrl-C reaches the servers, too: they stay in the tests' process
group.
"""

import contextlib
import dataclasses
import importlib.util
import itertools
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import psycopg
import pytest
from psycopg import sql

from tests.conftest import ROOT

ROLE = DATABASE = "mlflow"  # as in deploy/compose.yaml
BUCKET = "artifacts"
PATIENCE = 300  # seconds that a server may take to start on a busy machine


@dataclasses.dataclass(frozen=True)
class PostgreSQL:
    """A cluster of its own, with the role and the empty database that the tracking server is given."""

    process: "subprocess.Popen[bytes]"
    port: int
    password: str

    def uri(self, database: str = DATABASE, password: str | None = None) -> str:
        password = self.password if password is None else password
        return f"postgresql+psycopg://{ROLE}:{password}@127.0.0.1:{self.port}/{database}"

    def create(self, database: str) -> str:
        """Make an empty database, in which MLflow makes its tables at the first use; return its URI."""
        with psycopg.connect(self.administration, autocommit=True) as connection:
            query = sql.SQL("CREATE DATABASE {} OWNER {}")
            connection.execute(query.format(sql.Identifier(database), sql.Identifier(ROLE)))
        return self.uri(database)

    @property
    def administration(self) -> str:
        """The superuser's connection."""
        return f"postgresql://postgres:{self.password}@127.0.0.1:{self.port}/postgres"


@dataclasses.dataclass(frozen=True)
class ObjectStore:
    """An S3 server with an empty bucket; `environment` is what a client of it needs."""

    process: "subprocess.Popen[bytes]"
    environment: dict[str, str]

    @property
    def uri(self) -> str:
        return f"s3://{BUCKET}"

    def keys(self) -> list[str]:
        """List what is in the bucket."""
        import boto3

        client = boto3.client(
            "s3",
            endpoint_url=self.environment["MLFLOW_S3_ENDPOINT_URL"],
            aws_access_key_id=self.environment["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=self.environment["AWS_SECRET_ACCESS_KEY"],
            region_name=self.environment["AWS_DEFAULT_REGION"],
        )
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET)
        return [entry["Key"] for page in pages for entry in page.get("Contents", [])]


@dataclasses.dataclass(frozen=True)
class TrackingServer:
    """`deploy/server.sh` on a database and a place for files, both its own.

    Attributes
    ----------
    uri : str
        http://127.0.0.1:PORT.
    folder : pathlib.Path
        Its working directory, where nothing but its log should appear.
    database, artifacts
        What it stands on.
    """

    process: "subprocess.Popen[bytes]"
    uri: str
    folder: Path
    database: PostgreSQL
    artifacts: ObjectStore

    @property
    def log(self) -> str:
        return (self.folder / "server.log").read_text()


@contextlib.contextmanager
def tracking_server(workers: int = 1) -> Iterator[TrackingServer]:
    """Start PostgreSQL, S3 and the MLflow server that deploy/ describes."""
    with contextlib.ExitStack() as stack:
        database = stack.enter_context(postgresql())
        artifacts = stack.enter_context(object_store())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="server-")))
        port = free_port()
        uri = f"http://127.0.0.1:{port}"
        environment = clean_environment() | artifacts.environment | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "MLFLOW_BACKEND_STORE_URI": database.uri(),
            "MLFLOW_ARTIFACTS_DESTINATION": artifacts.uri,
            "MLFLOW_PORT": str(port),
            "MLFLOW_WORKERS": str(workers),
        }  # fmt: skip
        command = [str(ROOT / "deploy" / "server.sh")]
        process = stack.enter_context(running(command, folder / "server.log", cwd=folder, env=environment))
        stack.callback(forget, port)
        wait_until(lambda: answers(f"{uri}/health"), process, folder / "server.log")
        yield TrackingServer(process, uri, folder, database, artifacts)


@contextlib.contextmanager
def postgresql() -> Iterator[PostgreSQL]:
    """Start PostgreSQL in a temporary folder, as a user without rights, with passwords."""
    initdb, postgres = (postgresql_program(name) for name in ("initdb", "postgres"))
    user = unprivileged_user()
    password, port = secrets.token_hex(12), free_port()
    # not below pytest's own folder, which is closed to other users; the path of a socket may be 107 bytes long
    with tempfile.TemporaryDirectory(prefix="postgresql-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        (folder / "password").write_text(password)
        if user:
            for path in (folder, folder / "password"):
                shutil.chown(path, user)
        options = {"cwd": folder, "env": clean_environment(), **({"user": user, "extra_groups": []} if user else {})}
        made = subprocess.run(
            [initdb, "--pgdata=data", "--username=postgres", "--pwfile=password", "--auth=scram-sha-256",
             "--encoding=UTF8", "--locale=C", "--no-sync"],
            **options, capture_output=True, text=True,
        )  # fmt: skip
        assert made.returncode == 0, made.stderr
        settings = {
            "port": port, "listen_addresses": "127.0.0.1", "unix_socket_directories": folder,
            "fsync": "off", "synchronous_commit": "off", "full_page_writes": "off",  # nothing here outlives a power cut
        }  # fmt: skip
        command = [postgres, "-D", "data", *itertools.chain(*(("-c", f"{key}={settings[key]}") for key in settings))]
        log = folder / "postgresql.log"
        # SIGINT: at once, where SIGTERM would wait for clients that are still connected
        with running(command, log, end=signal.SIGINT, **options) as process, contextlib.ExitStack() as stack:
            stack.callback(forget, port)
            server = PostgreSQL(process, port, password)
            wait_until(lambda: connects(server.administration), process, log)
            with psycopg.connect(server.administration) as connection:
                query = sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}")
                connection.execute(query.format(sql.Identifier(ROLE), sql.Literal(password)))
            server.create(DATABASE)
            yield server


@contextlib.contextmanager
def object_store() -> Iterator[ObjectStore]:
    """Start moto's S3 server, which keeps everything in memory and takes any key, and make a bucket."""
    for module in ("moto", "flask_cors", "boto3"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"needs the Python package {module}, see requirements-dev.txt")
    port = free_port()
    environment = {
        "MLFLOW_S3_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "mlflow",
        "AWS_SECRET_ACCESS_KEY": secrets.token_hex(12),
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with tempfile.TemporaryDirectory(prefix="s3-") as folder:
        log = Path(folder) / "s3.log"
        command = [sys.executable, "-m", "moto.server", "--host", "127.0.0.1", "--port", str(port)]
        with running(command, log, cwd=folder, env=clean_environment()) as process:
            wait_until(lambda: answers(f"{environment['MLFLOW_S3_ENDPOINT_URL']}/moto-api/"), process, log)
            make_bucket(environment)
            yield ObjectStore(process, environment)


def make_bucket(environment: dict[str, str]) -> None:
    """Run what the one-shot service of deploy/compose.yaml runs."""
    command = [sys.executable, str(ROOT / "deploy" / "bucket.py"), BUCKET]
    subprocess.run(command, env=clean_environment() | environment, check=True)


@contextlib.contextmanager
def running(
    command: list[str], log: Path, end: signal.Signals = signal.SIGTERM, **options: object
) -> Iterator["subprocess.Popen[bytes]"]:
    """Run a program for as long as the block takes, whatever ends it."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, **options)
    try:
        yield process
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            family = psutil.Process(process.pid).children(recursive=True)
            process.send_signal(end)  # which one that is just starting may not pass on
            _, left = psutil.wait_procs([process, *family], timeout=30)
            for stray in left:
                stray.kill()
        process.wait()


def wait_until(ready: Callable[[], bool], process: "subprocess.Popen[bytes]", log: Path) -> None:
    """Wait for a server; one that ended, or takes too long, fails the test with what it wrote."""
    deadline = time.monotonic() + PATIENCE
    while not ready():
        if process.poll() is not None or time.monotonic() > deadline:
            pytest.fail(f"{process.args[0]} did not start:\n{log.read_text()}")
        time.sleep(0.1)


def forget(port: int) -> None:
    """Remove what commands keep in mlruns/ about a server that will not be there again."""
    for pattern in (f"*-127-0-0-1-{port}.state", f"*-127-0-0-1-{port}-*.state"):
        for folder in (ROOT / "mlruns").glob(pattern):
            shutil.rmtree(folder, ignore_errors=True)


def answers(address: str) -> bool:
    try:
        urllib.request.urlopen(address, timeout=5).close()
    except OSError:
        return False
    return True


def connects(uri: str) -> bool:
    try:
        psycopg.connect(uri, connect_timeout=5).close()
    except psycopg.OperationalError:
        return False
    return True


def free_port(host: str = "127.0.0.1") -> int:
    with socket.create_server((host, 0)) as free:
        return free.getsockname()[1]


def postgresql_program(name: str) -> str:
    """Find a program of PostgreSQL's server, which Debian keeps out of PATH."""
    if found := shutil.which(name):
        return found
    versions = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: float(path.parts[4]))
    if not versions:
        pytest.skip(f"needs PostgreSQL: no {name} in PATH or /usr/lib/postgresql (Debian's package postgresql)")
    return str(versions[-1])


def unprivileged_user() -> str | None:
    """Name whom PostgreSQL runs as, which refuses root; None for whoever runs the tests."""
    if os.geteuid() != 0:
        return None
    import pwd

    users = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in users else "nobody"


def clean_environment() -> dict[str, str]:
    """The environment without what a user's own settings would change in these servers."""
    prefixes = ("MLFLOW_", "AWS_", "PG", "MOTO_")
    return {key: value for key, value in os.environ.items() if not key.startswith(prefixes)}
