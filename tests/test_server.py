"""The deployment of deploy/: the server that it starts, on real PostgreSQL and S3, and what compose.yaml promises."""

import importlib.metadata
import itertools
import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
import yaml
from PIL import Image

import analysis
from tests.conftest import HANGS, ROOT, call_command
from tests.servers import BUCKET, TrackingServer, clean_environment, make_bucket, tracking_server
from tests.test_security import answers

pytestmark = pytest.mark.slow

DEPLOY = ROOT / "deploy"
TASK = ("experiments/task3.py", "--sample", "--epochs", "1", "--n-splits", "2", "-m", "lenet5")
RUNS = 6  # lenet5 and two baselines, on two splits


@pytest.fixture(scope="module")
def server() -> Iterator[TrackingServer]:
    with tracking_server() as server:
        yield server


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working directory of the commands, where none of them should leave anything."""
    return tmp_path_factory.mktemp("elsewhere")


@pytest.fixture(scope="module")
def finished(server: TrackingServer, folder: Path) -> str:
    """A task that was run on the server, with nothing but its address: what it printed."""
    command = [sys.executable, str(ROOT / TASK[0]), *TASK[1:]]
    environment = clean_environment() | {"COLUMNS": "120", "MLFLOW_TRACKING_URI": server.uri}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=HANGS)
    assert result.returncode == 0, result.stderr
    return result.stdout


def run(*arguments: str, folder: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command that needs no process of its own; that is only what `finished` shows."""
    return call_command(arguments, folder, clean_environment() | {"COLUMNS": "120"} | environment)


def ask(url: str, body: Any = None, **headers: str) -> tuple[int, str]:
    """Status and text of an answer, be it an error."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, headers | ({"Content-Type": "application/json"} if data else {}))
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def family(server: TrackingServer) -> list[psutil.Process]:
    """Every process of the three servers."""
    parents = [psutil.Process(part.process.pid) for part in (server, server.database, server.artifacts)]
    return [*parents, *itertools.chain(*(parent.children(recursive=True) for parent in parents))]


def test_a_task_runs_on_the_server_from_its_address_alone(server: TrackingServer, finished: str) -> None:
    runs = analysis.load_runs(["task3"], server.uri)
    assert len(runs) == RUNS and runs["status"].eq("FINISHED").all()
    assert re.search(r"^ *lenet5†? +2/2 ", finished, re.MULTILINE)
    assert f"{server.uri}/#/experiments/" in finished


def test_started_again_it_keeps_all(server: TrackingServer, finished: str, folder: Path) -> None:
    before = server.artifacts.keys()
    again = run(*TASK, folder=folder, MLFLOW_TRACKING_URI=server.uri)
    assert again.returncode == 0, again.stderr
    assert f"finished before and kept: {RUNS} splits" in again.stdout and "━" not in again.stdout.split("\n\n")[0]
    assert len(analysis.load_runs(["task3"], server.uri)) == RUNS
    assert server.artifacts.keys() == before


@pytest.mark.usefixtures("finished")
def test_files_are_in_the_bucket_and_nowhere_else(server: TrackingServer, folder: Path) -> None:
    runs = analysis.load_runs(["task3"], server.uri)
    stored = server.artifacts.keys()
    for uri in runs["artifact_uri"]:
        path = uri.removeprefix("mlflow-artifacts:/")
        assert {f"{path}/predictions.npz", f"{path}/checkpoint/best.pt"} <= set(stored)
    assert [path.name for path in server.folder.iterdir()] == ["server.log"]
    assert list(folder.iterdir()) == []


def test_the_champion_is_registered_and_used_through_the_server(
    server: TrackingServer, finished: str, tmp_path: Path
) -> None:
    assert "champion   lenet5, split " in finished
    Image.new("RGB", (50, 40), "white").save(tmp_path / "photo.png")
    result = run("-m", "experiments", "predict", "task3", str(tmp_path / "photo.png"), MLFLOW_TRACKING_URI=server.uri)
    assert result.returncode == 0, result.stderr
    assert "version 1 of models:/task3" in result.stdout
    assert re.search(r"^\S+photo.png +\d+\.\d%  \w", result.stdout, re.MULTILINE)
    stored = server.artifacts.keys()
    assert any("/models/" in key and key.endswith("MLmodel") for key in stored)


@pytest.mark.usefixtures("finished")
def test_the_database_says_itself_what_the_server_says(server: TrackingServer) -> None:
    for load in (analysis.load_runs, analysis.load_curves):
        pd.testing.assert_frame_equal(load(["task3"], server.uri), load(["task3"], server.database.uri()))


def test_the_table_comes_from_the_server_or_the_database(server: TrackingServer, finished: str) -> None:
    administrator = server.artifacts.environment | {"MLFLOW_ARTIFACTS_DESTINATION": server.artifacts.uri}
    for uri, environment in ((server.uri, {}), (server.database.uri(), administrator)):
        result = run("-m", "analysis", "table", "task3", MLFLOW_TRACKING_URI=uri, **environment)
        assert result.returncode == 0, result.stderr
        assert result.stdout.strip() in finished


@pytest.mark.usefixtures("finished")
def test_of_files_behind_a_server_the_database_alone_says_so(server: TrackingServer) -> None:
    result = run("-m", "experiments", "verify", "task3", MLFLOW_TRACKING_URI=server.database.uri())
    assert result.returncode == 1
    assert "are kept by a tracking server; name its http:// address" in result.stdout + result.stderr


@pytest.mark.usefixtures("finished")
def test_no_client_is_sent_to_the_bucket(server: TrackingServer) -> None:
    # In compose.yaml nobody but the server reaches it.
    for command in (("analysis", "table"), ("experiments", "verify")):
        assert run("-m", *command, "task3", MLFLOW_TRACKING_URI=server.uri).returncode == 0
    assert "GET /api/2.0/mlflow-artifacts/artifacts/" in server.log
    assert "/mlflow-artifacts/presigned/" not in server.log


@pytest.mark.usefixtures("finished")
def test_every_number_is_derived_again_through_the_server(server: TrackingServer) -> None:
    result = run("-m", "experiments", "verify", "task3", MLFLOW_TRACKING_URI=server.uri)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{RUNS} runs" in result.stdout and " 0 differences" in result.stdout


@pytest.mark.parametrize(
    "command", [("-m", "analysis", "table", "task3"), ("-m", "experiments", "verify", "task3"), TASK], ids=" ".join
)
@pytest.mark.parametrize("uri", ["mlflow:{password}@{host}/mlflow", "mlflow@{host}/mlflow?password={password}"])
def test_a_password_that_is_refused_is_not_shown(uri: str, command: tuple[str, ...], server: TrackingServer) -> None:
    host = f"127.0.0.1:{server.database.port}"
    uri = f"postgresql+psycopg://{uri.format(password='0pen/sesame', host=host)}"
    result = run(*command, "--tracking-uri", uri)
    assert result.returncode == 1 and result.stdout == ""
    assert re.fullmatch(r"Error: .*password authentication failed.*\n", result.stderr)
    assert "sesame" not in result.stderr and host in result.stderr


def test_only_names_that_are_known_are_answered(server: TrackingServer) -> None:
    experiments = f"{server.uri}/api/2.0/mlflow/experiments/search?max_results=1"
    port = server.uri.rpartition(":")[2]
    assert ask(experiments)[0] == 200
    assert ask(experiments, Host=f"localhost:{port}")[0] == 200
    for stranger in ("tracking.example.org", f"tracking.example.org:{port}", "10.example.org", "127.0.0.1.example.org"):
        status, text = ask(experiments, Host=stranger)
        assert status == 403 and "Default" not in text


def test_what_a_page_from_elsewhere_sends_is_refused(server: TrackingServer) -> None:
    create = f"{server.uri}/ajax-api/2.0/mlflow/experiments/create"
    assert ask(create, {"name": "theirs"}, Origin="https://elsewhere.example.org")[0] == 403
    assert "theirs" not in ask(f"{server.uri}/api/2.0/mlflow/experiments/search?max_results=99")[1]


def test_no_job_is_executed(server: TrackingServer) -> None:
    status, text = ask(f"{server.uri}/ajax-api/3.0/jobs/", {"job_name": "invoke_scorer", "params": {}})
    assert status >= 400 and "job execution feature is not enabled" in text


@pytest.mark.skipif(sys.platform != "linux", reason="needs a second address of this machine, which Linux has")
def test_all_three_listen_on_loopback_alone(server: TrackingServer) -> None:
    listening = [
        connection.laddr
        for process in family(server)
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert {address.ip for address in listening} == {"127.0.0.1"}
    ports = {address.port for address in listening}
    assert len(ports) == 3
    assert all(answers("127.0.0.1", port) and not answers("127.0.0.2", port) for port in ports)


def test_no_password_is_in_a_command_line_or_the_log(server: TrackingServer) -> None:
    password = server.database.password
    assert password in server.database.uri()
    assert not any(password in argument for process in family(server) for argument in process.cmdline())
    assert password not in server.log


def test_a_bucket_that_is_there_is_left_as_it_is(server: TrackingServer, finished: str) -> None:
    before = server.artifacts.keys()
    make_bucket(server.artifacts.environment)
    assert server.artifacts.keys() == before != []


@pytest.mark.parametrize(("missing", "given"), [
    ("MLFLOW_BACKEND_STORE_URI", {"MLFLOW_ARTIFACTS_DESTINATION": "/nowhere"}),
    ("MLFLOW_ARTIFACTS_DESTINATION", {"MLFLOW_BACKEND_STORE_URI": "postgresql+psycopg://127.0.0.1:9/mlflow"}),
])  # fmt: skip
def test_the_server_says_what_it_lacks(missing: str, given: dict[str, str]) -> None:
    environment = clean_environment() | given
    result = subprocess.run([str(DEPLOY / "server.sh")], env=environment, capture_output=True, text=True, timeout=HANGS)
    assert result.returncode != 0 and result.stdout == ""
    assert re.search(rf"{missing}.*deploy/README\.md", result.stderr) and result.stderr.count("\n") == 1


@pytest.fixture(scope="module")
def services() -> dict[str, dict[str, Any]]:
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]


def test_compose_publishes_the_server_alone_and_on_loopback(services: dict[str, dict[str, Any]]) -> None:
    assert {name: service["ports"] for name, service in services.items() if "ports" in service} == {
        "server": ["127.0.0.1:${MLFLOW_PORT:-5000}:5000"]
    }
    networks = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["networks"]
    assert networks["inside"] == {"internal": True}
    assert all(services[name]["networks"] == ["inside"] for name in services if name != "server")


def test_compose_starts_nothing_without_passwords(services: dict[str, dict[str, Any]]) -> None:
    used = re.findall(r"\$\{(\w+)(:[-?])(.*?)\}", json.dumps(services))
    for name, kind, message in used:
        if re.search("PASSWORD|SECRET", name):
            assert kind == ":?" and "POSTGRES_PASSWORD and S3_SECRET_KEY into deploy/.env" in message
    secrets = {
        ("server", "PGPASSWORD"), ("server", "AWS_SECRET_ACCESS_KEY"), ("bucket", "AWS_SECRET_ACCESS_KEY"),
        ("database", "POSTGRES_PASSWORD"), ("s3", "ROOT_SECRET_KEY"),
    }  # fmt: skip
    for service, variable in secrets:
        assert re.fullmatch(r"\$\{\w+:\?[^}]+\}", services[service]["environment"][variable])
    assert ".env" in (DEPLOY / ".gitignore").read_text().split()


def test_the_container_runs_what_the_tests_run(services: dict[str, dict[str, Any]]) -> None:
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    assert 'ENTRYPOINT ["/opt/server/server.sh"]' in dockerfile and os.access(DEPLOY / "server.sh", os.X_OK)
    assert re.findall("^USER (.*)", dockerfile, re.MULTILINE) == ["mlflow"]
    assert "entrypoint" not in services["server"] and "command" not in services["server"]
    assert services["bucket"]["entrypoint"] == ["python", "/opt/server/bucket.py", "artifacts"]
    assert services["server"]["environment"]["MLFLOW_ARTIFACTS_DESTINATION"] == f"s3://{BUCKET}"
    assert "make server" in (DEPLOY / "README.md").read_text()
    assert re.search(r"^server:.*\n\t.*deploy/server\.sh$", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_the_container_has_the_versions_that_are_tested() -> None:
    [pattern] = re.findall("grep -hE '(.*?)'", (DEPLOY / "Dockerfile").read_text())
    lines = [line for name in ("", "-cluster") for line in (ROOT / f"requirements{name}.txt").read_text().splitlines()]
    pins = dict(line.split("==") for line in lines if re.match(pattern, line))
    assert set(pins) == {"mlflow", "psycopg[binary]", "boto3"}
    for name, version in pins.items():
        assert importlib.metadata.version(name.split("[")[0]) == version


def test_every_variable_that_is_named_is_one_of_mlflows() -> None:
    from mlflow import cli, environment_variables

    known = {option.envvar for option in cli.cli.commands["server"].params} | set(vars(environment_variables))
    for name in ("server.sh", "compose.yaml", "README.md"):
        assert set(re.findall(r"\bMLFLOW_[A-Z0-9_]+", (DEPLOY / name).read_text())) <= known
