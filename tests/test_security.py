"""Nothing that came with data or a checkpoint is executed, the UI is served to this machine only, keys stay secret."""

import ast
import itertools
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import analysis
import tracking
from tests.conftest import ROOT
from tests.servers import free_port
from tracking import StoreError, keys
from tracking.checkpoints import Checkpoint

PACKAGES = ("experiments", "datasets", "models", "tracking", "analysis", "benchmarks")
UNPACKS = "datasets/kaggle.py"  # the one file that opens archives from elsewhere, after looking at their members
UNSAFE_MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "tarfile"}
SAFE_MODULES = {"joblib.externals.loky"}  # to count cores
FORBIDDEN = {
    "eval", "exec", "__import__", "os.system", "os.popen", "shutil.unpack_archive", "pandas.read_pickle",
    "torch.hub.load", "yaml.full_load", "yaml.unsafe_load", "yaml.load_all",
}  # fmt: skip
KEYWORD_NEEDED = {"torch.load": ("weights_only", True), "numpy.load": ("allow_pickle", False)}


def full_names(tree: ast.AST) -> dict[str, str]:
    """What each imported name stands for: `np` for `numpy`, `load` for `torch.load`."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def dangers_of_call(call: ast.Call, names: dict[str, str]) -> Iterator[str]:
    first, dot, rest = ast.unparse(call.func).partition(".")
    name = names.get(first, first) + dot + rest
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    if name in FORBIDDEN:
        yield name
    if name in KEYWORD_NEEDED:
        keyword, value = KEYWORD_NEEDED[name]
        if not (isinstance(given := keywords.get(keyword), ast.Constant) and given.value is value):
            yield f"{name} without {keyword}={value}"
    if name == "yaml.load" and not any(
        "SafeLoader" in ast.unparse(value) for value in [*call.args, *keywords.values()]
    ):
        yield "yaml.load without SafeLoader"
    if "shell" in keywords and not (isinstance(shell := keywords["shell"], ast.Constant) and shell.value is False):
        yield "shell"
    if name.split(".")[-1] in ("extract", "extractall"):
        yield "extraction"


def dangers(source: str) -> list[str]:
    """What in a Python source could execute what it reads, or write where an archive says."""
    tree = ast.parse(source)
    names = full_names(tree)
    modules, calls = [], []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules.append(node.module or "")
        elif isinstance(node, ast.Call):
            calls += dangers_of_call(node, names)
    unsafe = [module for module in modules if module.split(".")[0] in UNSAFE_MODULES]
    return calls + [module for module in unsafe if module not in SAFE_MODULES]


@pytest.mark.parametrize("package", PACKAGES)
def test_no_source_executes_what_it_reads(package: str) -> None:
    for path in (ROOT / package).rglob("*.py"):
        allowed = ["extraction"] if path == ROOT / UNPACKS else []
        assert dangers(path.read_text(encoding="utf-8")) == allowed, path


@pytest.mark.parametrize("source", [
    "import torch\ntorch.load(path)",
    "import torch\ntorch.load(path, weights_only=False)",
    "import torch\ntorch.load(path, weights_only=trusted)",
    "import torch as t\nt.load(path, map_location='cpu')",
    "from torch import load\nload(path)",
    "import torch\ntorch.hub.load(repository, model)",
    "import numpy as np\nnp.load(path)",
    "import numpy as np\nnp.load(path, allow_pickle=True)",
    "from numpy import load as read\nread(path)",
    "import pickle",
    "from pickle import loads",
    "def late():\n    import marshal",
    "import shelve",
    "import dill as d",
    "import cloudpickle",
    "from joblib import load",
    "import pandas as pd\npd.read_pickle(path)",
    "import yaml\nyaml.load(text)",
    "import yaml\nyaml.load(text, Loader=yaml.Loader)",
    "import yaml\nyaml.unsafe_load(text)",
    "eval(text)",
    "exec(text)",
    "__import__(name)",
    "import os\nos.system(command)",
    "import subprocess\nsubprocess.run(command, shell=True)",
    "from subprocess import run\nrun(command, shell=shell)",
    "import zipfile\nzipfile.ZipFile(path).extractall(folder)",
    "archive.extract(member)",
    "import tarfile",
    "import shutil\nshutil.unpack_archive(path)",
])  # fmt: skip
def test_the_search_finds_each_danger(source: str) -> None:
    assert len(dangers(source)) == 1


@pytest.mark.parametrize("source", [
    "import torch\ntorch.load(path, map_location='cpu', weights_only=True)",
    "import numpy as np\nnp.load(path, allow_pickle=False)\nnp.loadtxt(path)",
    "import yaml\nyaml.load(text, Loader=yaml.SafeLoader)\nyaml.safe_load(text)",
    "model.eval()\nsubprocess.run([program, option])\njson.loads(text)",
])  # fmt: skip
def test_the_search_lets_safe_reading_pass(source: str) -> None:
    assert dangers(source) == []


class Evil:
    """Touches a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.mark,)


def test_a_checkpoint_that_would_execute_something_is_refused(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    torch.save({"model": "lenet5", "state_dict": Evil(mark)}, tmp_path / "best.pt")
    with pytest.raises(Exception, match="[Ww]eights_only|[Ww]eights only"):
        Checkpoint.load(tmp_path / "best.pt")
    assert not mark.exists()
    torch.load(tmp_path / "best.pt", weights_only=False)
    assert mark.exists()  # it would have


def test_predictions_that_would_execute_something_are_refused(store_uri: str, tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    (tmp_path / "files").mkdir()
    evil = np.array([Evil(mark)], dtype=object)
    np.savez(tmp_path / "files" / keys.PREDICTIONS, **dict.fromkeys(("val_index", "val_true", "test_index"), evil))
    client = tracking.open_store(store_uri).client
    run_id = client.create_run(tracking.open_store(store_uri).make_experiment("task1")).info.run_id
    client.log_artifacts(run_id, str(tmp_path / "files"))
    with pytest.raises(StoreError, match="is damaged"):
        analysis.load_predictions(run_id, store_uri)
    assert not mark.exists()
    np.load(tmp_path / "files" / keys.PREDICTIONS, allow_pickle=True)["val_index"]
    assert mark.exists()  # it would have


def answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError:
        return False
    return True


@pytest.mark.skipif(sys.platform != "linux", reason="needs a second address of this machine, which Linux has")
@pytest.mark.slow
def test_the_ui_is_served_on_loopback_alone(store_uri: str) -> None:
    # A server on all addresses would answer on 127.0.0.2, too.
    with socket.create_server(("", 0)) as everywhere:
        assert answers("127.0.0.2", everywhere.getsockname()[1])
    port = free_port()
    tracking.open_store(store_uri).make_experiment("task1")
    command = [sys.executable, "-m", "tracking", "ui", "--port", str(port), "--tracking-uri", store_uri]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        printed = "".join(itertools.takewhile(lambda line: not line.startswith("Ctrl-C"), process.stdout))
        assert f"http://127.0.0.1:{port}/" in printed
        assert answers("127.0.0.1", port) and not answers("127.0.0.2", port)
    finally:
        os.killpg(process.pid, signal.SIGTERM)  # the server, too, wherever in its start the command is
        process.communicate(timeout=200)


SECRETS = {
    "KAGGLE_USERNAME": "n0b0dy-in-particular",
    "KAGGLE_KEY": "1st-5ecret",
    "KAGGLE_API_TOKEN": "2nd-5ecret",
    "AWS_SECRET_ACCESS_KEY": "3rd-5ecret",
    "MLFLOW_TRACKING_USERNAME": "n0b0dy-in-particular",
    "MLFLOW_TRACKING_PASSWORD": "4th-5ecret",
    "MLFLOW_TRACKING_TOKEN": "5th-5ecret",
}


def files_that_hold(text: str, folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


@pytest.mark.slow
def test_no_credential_gets_into_the_store(run_command, store_uri: str, tmp_path: Path) -> None:
    options = ("--sample", "--epochs", "1", "--n-splits", "2", "-m", "lenet5", "--no-baselines")
    result = run_command("experiments/task1.py", *options, "--tracking-uri", store_uri, **SECRETS)
    assert result.returncode == 0, result.stderr
    store = tmp_path / "store"
    assert files_that_hold("lenet5", store)  # a text that is stored is found
    for secret in SECRETS.values():
        assert not files_that_hold(secret, tmp_path)
        assert secret not in result.stdout + result.stderr
