"""What the tests share: a real SQLite store, folders of drawn images, and the scripts run as a user runs them."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
for name in ("DATA_DIR", "CACHE_DIR", "MLFLOW_TRACKING_URI"):  # a user's own settings are not the tests'
    os.environ.pop(name, None)
# tests run a process a core; in a network that uses several, too, threads would wait for each other
os.environ.setdefault("OMP_NUM_THREADS", "1")
REAL_DATA = ROOT.parent / "shared" / "data"
NETWORKS = ("-m", "lenet5", "-m", "vggnet", "--epochs", "3")
THREE_SPLITS = ("--no-baselines", "-m", "lenet5", "--n-splits", "3", "--epochs", "30", "--patience", "30")


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database made once: MLflow's migrations take seconds."""
    from tracking import open_store

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
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
    """Run a script or module of the repository from another working directory, or from the root for `-m`."""

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        cwd = ROOT if arguments[0] == "-m" else tmp_path
        script = arguments if arguments[0] == "-m" else (str(ROOT / arguments[0]), *arguments[1:])
        inherited = os.environ | {"CACHE_DIR": str(tmp_path / "cache"), "COLUMNS": "120"}
        return subprocess.run(
            [sys.executable, *script], cwd=cwd, env=inherited | environment, capture_output=True, text=True, timeout=400
        )

    return run


@pytest.fixture(scope="session")
def finished_task3(empty_database: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The URI of a store as `run_task3` leaves it, of NETWORKS and the baselines. It is not changed."""
    return made_once(empty_database, tmp_path_factory, "finished_task3", NETWORKS)


@pytest.fixture(scope="session")
def three_splits(empty_database: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The URI of a store where one process did THREE_SPLITS of task 3, one after the other. It is not changed."""
    return made_once(empty_database, tmp_path_factory, "three_splits", THREE_SPLITS)


def made_once(database: Path, factory: pytest.TempPathFactory, name: str, options: tuple[str, ...]) -> str:
    """Run task 3 in a new store, once for all the processes that share the tests; return the store's URI."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
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


def run_task3(folder: Path, *options: str, code: int = 0) -> None:
    """Run two splits of task 3 on the sample, with one thread, in the store of a folder and from there."""
    script = [sys.executable, str(ROOT / "experiments" / "task3.py"), "--sample", "--n-splits", "2", *options]
    result = subprocess.run(
        [*script, "--tracking-uri", f"sqlite:///{folder / 'mlflow.db'}"],
        cwd=folder, capture_output=True, text=True, timeout=400, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == code, result.stderr


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
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in [root, *root.rglob("*")]}
