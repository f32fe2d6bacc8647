"""Does a protocol survive kill -9 at any moment, and give the numbers of an undisturbed run?

What      one task script is run to its end, and again with SIGKILL at a random moment, the same command after each
          kill, until it is done; then once more on a new store, until there were enough kills. After each kill the
          database has to be whole. At the end of each round all runs, parents too, have to be FINISHED, none twice,
          with the same params, epochs (each once), final metrics and files, bit for bit, times excepted; and no other
          file may be left. With --tune that holds for the trials, too
Time      about 20 s a kill on 2 cores

    python benchmarks/faults.py --kills 60
    python benchmarks/faults.py --kills 30 --task task3 --data-dir DIR -- --tune 4 --jobs 2
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mlflow.entities import Metric

from tracking import keys, open_store
from tracking.artifacts import file_digests
from tracking.commands import script_tasks

ROOT = Path(__file__).resolve().parent.parent
PROTOCOL = ("--n-splits", "2", "--epochs", "6", "-m", "lenet5")
KILLS_A_ROUND = 12  # at most
MOMENTS = (0.15, 0.6)  # of the time that the undisturbed run takes, a third of which is its start
# in /tmp: a cache of torch, and the folder of a socket, which Python's multiprocessing cannot remove when it is killed
LEFT = ("torchinductor", "pymp-")
TIMES = ("epoch_seconds", "train_seconds", "images_per_second")
FILES_WITH_TIMES = (keys.HISTORY, keys.FIGURES)


@dataclass
class Campaign:
    """A task script that is killed again and again.

    Attributes
    ----------
    task : str
    options : sequence of str
        Of its script.
    folder : Path
        Of the stores, and of TMPDIR of the processes.
    rng : random.Random
        Of the moments.
    """

    task: str
    options: Sequence[str]
    folder: Path
    rng: random.Random
    moments: Counter[str] = field(default_factory=Counter)
    kills: int = 0
    rounds: int = 0

    def start(self, store: Path) -> "subprocess.Popen[bytes]":
        """Start the script on a store, in a process group of its own."""
        script = [sys.executable, str(ROOT / "experiments" / f"{self.task}.py"), *self.options]
        with (self.folder / "output.txt").open("ab") as output:
            return subprocess.Popen(
                [*script, "--tracking-uri", uri(store)],
                env={**os.environ, "TMPDIR": str(self.scratch)}, stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip

    @property
    def scratch(self) -> Path:
        """The stand-in for /tmp, empty at the end."""
        (self.folder / "tmp").mkdir(exist_ok=True)
        return self.folder / "tmp"

    def reference(self) -> tuple[Path, float]:
        """Run the script undisturbed; return its store and how many seconds it took."""
        store = self.folder / "reference" / "mlflow.db"
        started = time.monotonic()
        if self.start(store).wait() != 0:
            raise SystemExit((self.folder / "output.txt").read_text())
        return store, time.monotonic() - started

    def round(self, reference: Path, seconds: float) -> None:
        """Kill and start again on a new store until the protocol is done, and compare it with the reference."""
        self.rounds += 1
        store = self.folder / f"round{self.rounds}" / "mlflow.db"
        for left in range(KILLS_A_ROUND, -1, -1):  # then undisturbed, or a slow machine would never come to its end
            process = self.start(store)
            with contextlib.suppress(subprocess.TimeoutExpired):
                if process.wait(timeout=self.rng.uniform(*MOMENTS) * seconds if left else None) != 0:
                    raise SystemExit((self.folder / "output.txt").read_text())
                break
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            self.kills += 1
            self.moments[what_was_done(store, self.task)] += 1
        kept = strays(reference)  # trials keep the files from which they can go on
        problems = differences(self.task, reference, store) + [each for each in strays(store) if each not in kept]
        problems += [f"{path} is left" for path in self.scratch.iterdir() if not path.name.startswith(LEFT)]
        if problems:
            raise SystemExit(f"round {self.rounds}, after {self.kills} kills:\n" + "\n".join(problems))
        shutil.rmtree(store.parent)


def uri(store: Path) -> str:
    """The tracking URI of a SQLite file."""
    return f"sqlite:///{store}"


def what_was_done(store: Path, task: str) -> str:
    """Say how far a killed protocol had come, after a look at whether its database is whole."""
    if not store.exists():
        return "no database yet"
    with tempfile.TemporaryDirectory() as folder:
        for path in store.parent.glob("mlflow.db*"):  # a copy: to open the database would fold its log into it
            shutil.copy(path, folder)
        with contextlib.closing(sqlite3.connect(Path(folder) / store.name)) as connection:
            [[whole]] = connection.execute("PRAGMA integrity_check")
            assert whole == "ok", whole
            epochs = connection.execute("SELECT COUNT(*) FROM metrics WHERE key = 'val/loss'").fetchone()[0]
            query = "SELECT status, COUNT(*) FROM runs JOIN params USING (run_uuid) WHERE key = 'split' GROUP BY status"
            statuses = dict(connection.execute(query).fetchall())
    at_work = "in a training" if statuses.get("RUNNING") else "between trainings"
    return f"{at_work}, {statuses.get('FINISHED', 0)} finished, {epochs} epochs logged"


def differences(task: str, reference: Path, store: Path) -> list[str]:
    """Compare all runs that two stores hold of a task, with their files, times excepted; one line a difference."""
    ours, expected = (contents(task, path) for path in (store, reference))
    found = [f"{name} is missing" for name in expected.keys() - ours.keys()]
    for name, mine in ours.items():
        theirs = expected.get(name, {})
        found += [f"{name}: {key} differs" for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key)]
    return found


def contents(task: str, store: Path) -> dict[str, dict[str, object]]:
    """The content of each run of a task, parents and trials included, that must not depend on the time or on kills.

    Of two runs with one name the second is counted, so that a run that stands twice is a difference.
    """
    opened = open_store(uri(store))
    experiments = [found for name in (task, keys.trials_of(task)) if (found := opened.experiment_id(name)) is not None]
    runs = opened.client.search_runs(experiments, max_results=1000)
    held: dict[str, dict[str, object]] = {}
    for run in sorted(runs, key=lambda run: run.info.start_time):
        name = f"{run.info.run_name} in {run.info.experiment_id}"
        while name in held:
            name += " again"
        points = {key: opened.client.get_metric_history(run.info.run_id, key) for key in run.data.metrics}
        parent = keys.PARENT not in run.data.tags  # its metrics are written after each split, by whoever came to it
        held[name] = {
            "status": run.info.status,
            **run.data.params,
            **{key: run.data.tags.get(key) for key in ("fingerprint", "split_hash", "failure", "superseded_by")},
            **{
                key: [run.data.metrics[key]] if parent else [(point.step, point.value) for point in sorted_(history)]
                for key, history in points.items()
                if not key.endswith(TIMES)
            },
            **files(Path(run.info.artifact_uri.removeprefix("file://"))),
        }
    return held


def sorted_(history: Sequence[Metric]) -> list[Metric]:
    """Points of a metric by step."""
    return sorted(history, key=lambda point: (point.step, point.value))


def files(folder: Path) -> dict[str, str]:
    """SHA-256 of the files of a run, but for those that hold times; figures of a comparison show some."""
    digests = file_digests(folder)
    return {name: digest for name, digest in digests.items() if not name.startswith(FILES_WITH_TIMES)}


def strays(store: Path) -> list[str]:
    """Files beside a store that no finished protocol leaves."""
    state = {path.name for path in (store.parent / "mlflow.state").iterdir()} - {"store.lock"}
    beside = {path.name for path in store.parent.iterdir()} - {
        "mlflow.db", "mlflow.db-shm", "mlflow.db-wal", "mlflow.state", "artifacts"
    }  # fmt: skip
    return [f"{name} is left" for name in sorted(state | beside)]


def run_campaign(task: str, options: Sequence[str], kills: int, seed: int, folder: Path) -> Campaign:
    """Kill a task's script at least so many times; `SystemExit` names the fault."""
    campaign = Campaign(task, options, folder, random.Random(seed))
    reference, seconds = campaign.reference()
    while campaign.kills < kills:
        campaign.round(reference, seconds)
    return campaign


def main() -> None:
    """Run a campaign as the command line says, and print its counts."""
    parser = argparse.ArgumentParser(description="Kill a protocol at random moments; see the module's docstring.")
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--task", choices=script_tasks(), default="task3")
    parser.add_argument("--data-dir", help="real data instead of the sample")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("options", nargs="*", help="more of the script, after --")
    arguments = parser.parse_args()
    source = ("--data-dir", arguments.data_dir) if arguments.data_dir else ("--sample",)
    started = time.monotonic()
    options = (*PROTOCOL, *source, *arguments.options)
    with tempfile.TemporaryDirectory() as folder:
        done = run_campaign(arguments.task, options, arguments.kills, arguments.seed, Path(folder))
    print(f"{done.kills} kills in {done.rounds} rounds of {arguments.task}, {time.monotonic() - started:.0f} s:")
    print("numbers and files equal those of an undisturbed run, no epoch twice, no run RUNNING, no stray file")
    for moment, count in sorted(done.moments.items()):
        print(f"{count:4d}  {moment}")


if __name__ == "__main__":
    main()
