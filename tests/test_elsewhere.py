"""On Windows and macOS, as far as Linux can stand in for them (`tests/elsewhere.py`)."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tracking import open_store, store

pytestmark = pytest.mark.slow

ON_WINDOWS = {"PLATFORM": "win32", "PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0", "LC_ALL": "C"}


def test_two_jobs_on_windows(tmp_path: Path) -> None:
    """Processes are spawned and cannot be told by signals; the output has few signs, and the path has spaces."""
    (tmp_path / "site").mkdir()
    shutil.copyfile(Path(__file__).with_name("elsewhere.py"), tmp_path / "site" / "sitecustomize.py")
    uri = f"sqlite:///{tmp_path}/my results/mlflow.db"
    command = ["experiments/task3.py", "--sample", "--n-splits", "2", "--epochs", "1", "-m", "lenet5", "--no-baselines"]
    command += ["--jobs", "2", "--tracking-uri", uri]
    environment = os.environ | ON_WINDOWS | {"PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, timeout=900)
    said = done.stdout.decode("cp1252")
    assert (done.returncode, b"Traceback" in done.stderr) == (0, False), done.stderr.decode("cp1252")
    assert "torch's threads cannot be reached on this system (models/kernels)" in said
    assert "lenet5 2/2" in said and "±" in said
    assert f"experiments predict task3 PHOTO --tracking-uri '{uri}'" in said


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_new_database_is_not_open_when_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows refuses to."""
    renamed = []

    def rename(path: Path, target: Path) -> None:
        links = Path("/proc/self/fd").glob("*")
        renamed.append([each for each in map(os.path.realpath, links) if path.name in each])
        path.replace(target)

    monkeypatch.setattr(store.Path, "rename", rename)
    open_store(f"sqlite:///{tmp_path}/mlflow.db", create=True)
    assert renamed == [[]]
