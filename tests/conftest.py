"""Fixtures of all tests: a real SQLite store, folders of drawn images, and the commands run as a user runs them."""

import contextlib
import gc
import io
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.commands import StartedCommand  # noqa: E402

for name in ("DATA_DIR", "CACHE_DIR", "MLFLOW_TRACKING_URI"):  # a user's own settings are not the tests'
    os.environ.pop(name, None)
# tests run a process a core; in a network that uses several, too, threads would wait for each other
os.environ.setdefault("OMP_NUM_THREADS", "1")
# a server is on this machine, and one that is away stays away: MLflow waits for it before it says so
for name in ("MAX_RETRIES", "BACKOFF_FACTOR", "BACKOFF_JITTER"):
    os.environ[f"MLFLOW_HTTP_REQUEST_{name}"] = "0"
SLOWEST = ("test_jobs", "test_ray", "test_scripts", "test_champion", "test_copying", "test_resume", "test_outages",
           "test_verify", "test_server", "test_execution", "test_readme")  # fmt: skip
HANGS = 900  # seconds after which a process of a test is taken to hang; on a busy machine each may take minutes
REAL_DATA = ROOT.parent / "shared" / "data"
NETWORKS = ("-m", "lenet5", "-m", "vggnet", "--epochs", "3")
THREE_SPLITS = ("--no-baselines", "-m", "lenet5", "--n-splits", "3", "--epochs", "5", "--patience", "5")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files that take longest first, so that no process of the test run is idle at its end."""
    items.sort(key=lambda item: SLOWEST.index(item.path.stem) if item.path.stem in SLOWEST else len(SLOWEST))


@pytest.fixture(scope="session", autouse=True)
def shared_cache(shared_folder: Path) -> None:
    """Decode each data set once for all tests, and leave the cache of the checkout alone."""
    os.environ["CACHE_DIR"] = str(shared_folder / "cache")


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that all processes of a test run share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def empty_database(shared_folder: Path) -> Path:
    """A database made once: MLflow's migrations take seconds."""
    from tracking import open_store

    path = shared_folder / "empty" / "mlflow.db"
    path.parent.mkdir(exist_ok=True)
    with FileLock(f"{path.parent}.lock"):
        if not path.exists():
            open_store(f"sqlite:///{path}", create=True)
    return path


@pytest.fixture
def store_uri(empty_database: Path, tmp_path: Path) -> str:
    """The URI of an empty SQLite store of the test's own."""
    return new_store(empty_database, tmp_path / "store")


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Folder with train/ and test/ of two classes that differ in brightness: 20 and 6 images each."""
    rng = np.random.default_rng(0)
    root = tmp_path / "photos"
    for part, count in (("train", 20), ("test", 6)):
        for label, base in (("dark", 60), ("light", 180)):
            (root / part / label).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(base - 50, base + 50, (24, 32, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(root / part / label / f"{number:02d}.png")
    return root


@pytest.fixture
def run_command(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a script or module of the repository in a process, from another working directory, or from the root for `-m`.

    `run_here` gives the same output and needs no process.
    """

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        cwd = ROOT if arguments[0] == "-m" else tmp_path
        script = arguments if arguments[0] == "-m" else (str(ROOT / arguments[0]), *arguments[1:])
        started = StartedCommand(script, cwd, os.environ | {"COLUMNS": "120"} | environment)
        printed = started.communicate(HANGS)
        return subprocess.CompletedProcess(script, started.returncode, *printed)

    return run


@pytest.fixture
def run_here(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a command like `run_command`, but in this process: for tests of its output and of the store."""

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        cwd = ROOT if arguments[0] == "-m" else tmp_path
        return call_command(arguments, cwd, os.environ | {"COLUMNS": "120"} | environment)

    return run


def call_command(
    arguments: tuple[str, ...], cwd: Path, environment: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """Execute a script, or a module after -m, as `__main__` in this process, and undo its effects on the process."""
    out, err = io.StringIO(), io.StringIO()
    code: object = 0
    with undone(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        os.chdir(cwd)
        replace_environment(environment)
        try:
            if arguments[0] == "-m":
                sys.argv = list(arguments[1:])
                runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
            else:
                sys.argv = [str(ROOT / arguments[0]), *arguments[1:]]
                runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as error:
            code = error.code or 0
    return subprocess.CompletedProcess(list(arguments), code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def undone() -> Iterator[None]:
    """Restore the settings of this process that a command changes."""
    import torch

    environment, argv, path, cwd = dict(os.environ), sys.argv, [*sys.path], Path.cwd()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    collection, threads = gc.get_threshold(), torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        gc.set_threshold(*collection)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.chdir(cwd)
        sys.argv, sys.path[:] = argv, path
        replace_environment(environment)


def replace_environment(environment: Mapping[str, str]) -> None:
    """Set the variables of this process to these, and remove all others."""
    os.environ.update(environment)
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]


@pytest.fixture
def run_analysis(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`python -m analysis` in this process: starting a new one takes seconds."""

    from typer.testing import CliRunner

    from analysis.__main__ import app

    def run(*arguments: str, **environment: str) -> Any:
        for key, value in ({"COLUMNS": "80"} | environment).items():
            monkeypatch.setenv(key, value)
        result = CliRunner().invoke(app, arguments)
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result

    return run


@dataclass(frozen=True)
class Gate:
    """The place where trainings in other processes wait (`tests.disturb`); `environment` sends them there."""

    folder: Path
    environment: dict[str, str]

    def wait_for(self, count: int, process: StartedCommand) -> list[int]:
        """Wait until trainings of so many processes are at the closed gate; return the ids of the processes."""
        deadline = time.monotonic() + HANGS
        while process.poll() is None and time.monotonic() < deadline:
            waiting = [int(path.name) for path in self.folder.iterdir()]
            if len(waiting) >= count:
                return waiting
            time.sleep(0.05)
        process.kill()
        raise AssertionError(process.communicate(HANGS))

    def open(self) -> None:
        """Let all pass, now and later."""
        (self.folder / "open").touch()

    def close(self) -> None:
        """Let nobody pass, and forget who waited."""
        for path in self.folder.iterdir():
            path.unlink()


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    """A closed gate behind the second epoch of a training."""
    (tmp_path / "gate").mkdir()
    return Gate(tmp_path / "gate", disturbed(tmp_path, gate=str(tmp_path / "gate"), after=2))


def disturbed(folder: Path, **settings: object) -> dict[str, str]:
    """The environment of processes that `tests.disturb` disturbs."""
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text("from tests import disturb\n\ndisturb.install()\n")
    return {"PYTHONPATH": f"{folder / 'site'}{os.pathsep}{ROOT}", "DISTURB": json.dumps(settings)}


@pytest.fixture(scope="session")
def finished_task3(empty_database: Path, shared_folder: Path) -> str:
    """The URI of a store that `run_task3` filled with NETWORKS and the baselines. No test changes it."""
    return made_once(empty_database, shared_folder, "finished_task3", NETWORKS)


@pytest.fixture(scope="session")
def three_splits(empty_database: Path, shared_folder: Path) -> str:
    """The URI of a store where one process did THREE_SPLITS of task 3 one by one. No test changes it."""
    return made_once(empty_database, shared_folder, "three_splits", THREE_SPLITS)


def made_once(database: Path, shared: Path, name: str, options: tuple[str, ...]) -> str:
    """Run task 3 in a new store of the shared folder, once for all processes; return the store's URI."""
    folder = shared / name
    done = Path(f"{folder}.done")  # it stays where it was made: MLflow itself does not find a moved store's files
    with FileLock(f"{folder}.lock"):
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            new_store(database, folder)
            run_task3(folder, *options)
            done.touch()
    return f"sqlite:///{folder / 'mlflow.db'}"


def new_store(empty_database: Path, folder: Path) -> str:
    """Make a folder with an empty store; return its URI."""
    folder.mkdir()
    return f"sqlite:///{shutil.copy(empty_database, folder / 'mlflow.db')}"


def copy_checkout(copy: Path, *patterns: str) -> None:
    """Copy the files of the repository that fit a pattern; the copy shares `data/`, so the sample is drawn once."""
    command = ["git", "ls-files", "-co", "--exclude-standard", *patterns]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    for name in listed.stdout.splitlines():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((ROOT / name).read_bytes())
    (ROOT / "data").mkdir(exist_ok=True)
    (copy / "data").symlink_to(ROOT / "data")


def run_task3(folder: Path, *options: str, code: int = 0) -> None:
    """Run two splits of task 3 on the sample, with one thread, in the store of a folder and from there."""
    store = ("--tracking-uri", f"sqlite:///{folder / 'mlflow.db'}")
    arguments = (str(ROOT / "experiments" / "task3.py"), "--sample", "--n-splits", "2", *options, *store)
    started = StartedCommand(arguments, folder, os.environ | {"OMP_NUM_THREADS": "1"})
    _, errors = started.communicate(HANGS)
    assert started.returncode == code, errors


def help_and_modules(*command: str) -> tuple[str, set[str]]:
    """What a script, or a module after -m, prints with `--help`, and the modules that it imports for that."""
    result = subprocess.run(
        [sys.executable, "-X", "importtime", *command, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    modules = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "typer" in modules
    return result.stdout, modules


def snapshot(root: Path) -> dict[str, tuple[int, int]]:
    """Time of change and size of everything below a folder, to show that nothing was written there."""
    return {str(path): (path.lstat().st_mtime_ns, path.lstat().st_size) for path in [root, *root.rglob("*")]}
