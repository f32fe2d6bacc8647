"""Jobs on a Ray cluster of two nodes, which are on this machine; one of them dies."""

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import analysis
from tests.conftest import HANGS, Gate
from tests.servers import free_port
from tests.test_jobs import SPLITS, same_numbers
from tests.test_resume import start

pytestmark = pytest.mark.slow

pytest.importorskip("ray", reason="Ray is not installed (requirements-cluster.txt)")
HEAD, OTHER = "127.0.0.2", "127.0.0.3"


def ray_command(*arguments: str) -> None:
    command = [sys.executable, "-m", "ray.scripts.scripts", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == 0, done.stdout + done.stderr


def raylets(address: str) -> list[psutil.Process]:
    """The process of each node at an address of this cluster."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.name() == "raylet" and f"--node_ip_address={address}" in process.cmdline():
                found.append(process)
    return found


def join(address: str) -> None:
    ray_command("start", f"--address={HEAD}:{os.environ['RAY_ADDRESS'].split(':')[1]}", f"--node-ip-address={address}",
                "--num-cpus=1", "--disable-usage-stats")  # fmt: skip


@pytest.fixture(scope="module")
def cluster_gate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gate]:
    """A cluster of two nodes, and the gate of all its workers."""
    port = free_port(HEAD)
    gate = Gate(tmp_path_factory.mktemp("gate"), {})
    folder = Path("/tmp") / f"ray-{secrets.token_hex(3)}"  # sockets' names must be short
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        patch.setenv("RAY_ADDRESS", f"{HEAD}:{port}")
        patch.setenv("__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR", "tests.disturb.install")  # nodes pass it to workers
        patch.setenv("DISTURB", json.dumps({"gate": str(gate.folder), "after": 2}))
        ray_command("start", "--head", f"--node-ip-address={HEAD}", f"--port={port}", "--num-cpus=1",
                    "--include-dashboard=false", f"--temp-dir={folder}", "--disable-usage-stats")  # fmt: skip
        try:
            join(OTHER)
            yield gate
        finally:
            ours = [process for process in psutil.process_iter() if str(folder) in " ".join(cmdline(process))]
            for process in ours:
                process.kill()
            psutil.wait_procs(ours, timeout=10)
            subprocess.run(["rm", "-rf", str(folder)], check=False)


@pytest.fixture
def gate(cluster_gate: Gate) -> Gate:
    """The gate, closed again."""
    cluster_gate.close()
    return cluster_gate


def cmdline(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.Error):
        return process.cmdline()
    return []


def test_a_cluster_gives_the_numbers_of_one_process(gate: Gate, three_splits: str, tmp_path: Path) -> None:
    many = f"sqlite:///{tmp_path / 'many.db'}"
    process = start("task3", many, *SPLITS, "--backend", "ray")
    gate.wait_for(2, process)  # a worker on each node
    gate.open()
    printed, errors = process.communicate(HANGS)
    assert process.returncode == 0 and "Traceback" not in errors, errors  # on a busy machine Ray itself says something
    assert "3 of 3 done, 0 running, 0 failed" in printed
    assert same_numbers(three_splits, many)
    runs = analysis.load_runs(["task3"], many)
    assert runs["owner"].nunique() >= 2
    assert runs["command"].nunique() == 1 and not runs["owner"].isin(runs["command"]).any()
    assert [path.name for path in (tmp_path / "many.state").iterdir()] == ["store.lock"]


def test_a_node_that_dies_costs_nothing_but_time(gate: Gate, three_splits: str, store_uri: str) -> None:
    process = start("task3", store_uri, *SPLITS, "--backend", "ray")
    gate.wait_for(2, process)
    (node,) = raylets(OTHER)
    node.kill()
    gate.open()
    printed, errors = process.communicate(HANGS)
    assert process.returncode == 0, errors
    assert "3 of 3 done, 0 running, 0 failed" in printed
    assert analysis.load_runs(["task3"], store_uri)["status"].tolist() == ["FINISHED"] * 3
    assert same_numbers(three_splits, store_uri)
    join(OTHER)


def test_an_interrupt_ends_the_runs_of_all_nodes(gate: Gate, store_uri: str) -> None:
    process = start("task3", store_uri, *SPLITS, "--backend", "ray")
    gate.wait_for(2, process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(HANGS)
    assert process.returncode == 130
    assert "Error: interrupted; the same command goes on where this one stopped\n" in errors
    deadline = time.monotonic() + HANGS
    while (runs := analysis.load_runs(["task3"], store_uri))["status"].eq("RUNNING").any():
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert runs["status"].tolist() == ["KILLED"] * 2


def test_a_cluster_that_does_not_answer_is_one_sentence(store_uri: str, run_here) -> None:
    command = ("experiments/task3.py", *SPLITS, "--backend", "ray", "--tracking-uri", store_uri)
    done = run_here(*command, RAY_ADDRESS=f"{HEAD}:1")
    assert done.returncode == 1
    assert done.stderr.startswith(f"Error: no Ray cluster can be used at {HEAD}:1 (") and done.stderr.count("\n") == 1
