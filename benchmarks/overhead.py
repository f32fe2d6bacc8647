"""Cost of a run besides training: the time to the first epoch, and the total time in MLflow.

What      start: wall seconds from a command to the end of `--help`, to its first epoch in the store (LeNet-5, task 3),
          and to its end after three epochs; in a new store and in one that is there. The cache of images is warm.
          share: a task's script, run in this process to its end, with the time that `import mlflow` and all calls of
          MLflow's client take, those in other threads included, also where they go on side by side
Time      start about 2 minutes on 2 CPU cores; share as long as the script

    python benchmarks/overhead.py start --data-dir DIR
    python benchmarks/overhead.py share experiments/task3.py --data-dir DIR
"""

import argparse
import contextlib
import functools
import runpy
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LENET = ("experiments/task3.py", "-m", "lenet5", "--split", "0", "--no-baselines", "--epochs", "3", "--fresh")


def epochs_stored(database: Path) -> int:
    """How many epochs a store holds; 0 while it is being made."""
    with (
        contextlib.suppress(sqlite3.Error),
        contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as c,
    ):
        return int(c.execute("SELECT count(*) FROM metrics WHERE key = 'val/accuracy'").fetchone()[0])
    return 0


def run(command: Sequence[str], database: Path | None = None) -> tuple[float, float]:
    """Run one of our scripts; return the seconds to its first epoch in the store (if one is given), and to its end."""
    before = epochs_stored(database) if database else 0
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.DEVNULL)
    first = 0.0
    while process.poll() is None:
        if database and not first and epochs_stored(database) > before:
            first = time.perf_counter() - started
        time.sleep(0.02)
    ended = time.perf_counter() - started
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    return first, ended


def start(data: Sequence[str], repeats: int = 5) -> None:
    """Print the table of start-up times."""
    helps = [run([LENET[0], "--help"])[1] for _ in range(repeats)]
    new, existing = [], []
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(repeats + 1):
            database = Path(folder) / f"{repeat}.db"
            command = [*LENET, *data, "--tracking-uri", f"sqlite:///{database}"]
            new.append(run(command, database))
            existing.append(run(command, database))
    print("| seconds, median of 5 | new store | existing store |\n|---|--:|--:|")
    print(f"| `--help` | {median(helps):.2f} | {median(helps):.2f} |")
    for row, place in (("first epoch stored", 0), ("end, after 3 epochs and the figures", 1)):
        # the first run fills the caches
        print(
            f"| {row} | " + " | ".join(f"{median(t[place] for t in times[1:]):.1f}" for times in (new, existing)) + " |"
        )


def watch_client(note: Callable[[str, float], None]) -> None:
    """Have each call of MLflow's client, in whatever thread, noted by its name and seconds, one call at a time."""
    from mlflow import MlflowClient

    lock = threading.Lock()
    inside = threading.local()  # calls of the client that others of its calls make are counted once

    def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if getattr(inside, "call", False):
                return function(*args, **kwargs)
            inside.call, began = True, time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                inside.call = False
                with lock:
                    note(name, time.perf_counter() - began)

        return wrapper

    for name, member in list(vars(MlflowClient).items()):
        if callable(member) and (name == "__init__" or not name.startswith("_")):
            setattr(MlflowClient, name, watched(name, member))


def share(script: str, options: Sequence[str]) -> None:
    """Run a script and print how much of its time MLflow took."""
    spent = 0.0

    def note(name: str, seconds: float) -> None:
        nonlocal spent
        spent += seconds

    started = time.perf_counter()
    watch_client(note)
    spent += time.perf_counter() - started  # the import
    sys.argv = [script, *options]
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    finally:
        whole = time.perf_counter() - started
        print(f"MLflow took {spent:.1f} of {whole:.0f} s, {spent / whole:.1%}")


def main() -> None:
    """Run the measurement that the command line names."""
    parser = argparse.ArgumentParser(description="Measure the overhead of a run; see the module's docstring.")
    modes = parser.add_subparsers(dest="mode", required=True)
    modes.add_parser("start").add_argument("--data-dir", help="as of the task scripts")
    modes.add_parser("share").add_argument("script", help="such as experiments/task3.py; its options follow")
    arguments, rest = parser.parse_known_args()
    if arguments.mode == "share":
        share(arguments.script, rest)
    else:
        start(["--data-dir", str(Path(arguments.data_dir).resolve())] if arguments.data_dir else [])


if __name__ == "__main__":
    main()
