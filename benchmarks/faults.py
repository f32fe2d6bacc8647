"""Does a protocol survive kill -9 at any moment, and give the numbers that it gives when nothing happens?

What      one task script is run to its end, and again with SIGKILL at a random moment, the same command after each
          kill, until it is done; then once more on a new store, until there were enough kills. After each kill the
          database has to be whole. At the end of each round every split has to be FINISHED, with the same params, the
          same epochs (each once), final metrics and files, bit for bit, times excepted; and no other file may be left
Time      about 10 s a kill on 2 cores

    python benchmarks/faults.py --kills 60
    python benchmarks/faults.py --kills 30 --task task3 --data-dir DIR

"""

import argparse
import contextlib
import json
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

import analysis
from tracking import keys, open_store

ROOT = Path(__file__).resolve().parent.parent
PROTOCOL = ("--n-splits", "2", "--epochs", "4", "-m", "lenet5", "-m", "resnetcnn")
TIMES = ("epoch_seconds", "train_seconds", "images_per_second")
FILES_WITH_TIMES = (keys.HISTORY,)


@dataclass
class Campaign:
    """A task script that is killed again and again.

    Attributes
    ----------
    task : str
    options : sequence of str
        Of its script.
    folder : Path
        Of stores and of what the processes leave in TMPDIR.
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
        """What stands in for /tmp, to be empty at the end."""
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
        while True:
            process = self.start(store)
            with contextlib.suppress(subprocess.TimeoutExpired):
                if process.wait(timeout=self.rng.uniform(0.2, 1) * seconds) != 0:
                    raise SystemExit((self.folder / "output.txt").read_text())
                break
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            self.kills += 1
            self.moments[what_was_done(store, self.task)] += 1
        problems = differences(self.task, reference, store) + strays(store)
        problems += [f"{path} is left" for path in self.scratch.iterdir() if not path.name.startswith("torchinductor")]
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
    with contextlib.closing(sqlite3.connect(store)) as connection:
        [[whole]] = connection.execute("PRAGMA integrity_check")
        assert whole == "ok", whole
        epochs = connection.execute("SELECT COUNT(*) FROM metrics WHERE key = 'val/loss'").fetchone()[0]
    statuses = analysis.load_runs([task], uri(store))["status"].value_counts()
    at_work = "in a split" if statuses.get("RUNNING") else "between splits"
    return f"{at_work}, {statuses.get('FINISHED', 0)} splits done, {epochs} epochs logged"


def differences(task: str, reference: Path, store: Path) -> list[str]:
    """Compare all that two stores hold of a task, times excepted; one line a difference."""
    found = []
    ours, expected = (analysis.load_runs([task], uri(path)) for path in (store, reference))
    for run in ours.itertuples():
        if run.status == "RUNNING":
            found.append(f"{run.model} split {run.split} is still RUNNING")
    key = ["model", "split"]
    ours, expected = (runs[runs["status"] == "FINISHED"].sort_values(key).reset_index() for runs in (ours, expected))
    if ours[key].to_numpy().tolist() != expected[key].to_numpy().tolist():
        return [*found, f"splits done: {ours[key].to_numpy().tolist()}"]
    same = [*keys.PARAMS, *(name for name in keys.FINAL_METRICS if name not in TIMES), "fingerprint", "split_hash"]
    found += [f"{name} differs" for name in same if not ours[name].equals(expected[name])]
    digests = [runs["file_digests"].map(json.loads).tolist() for runs in (ours, expected)]
    for row, (mine, theirs) in enumerate(zip(*digests, strict=True)):
        for name in mine.keys() | theirs.keys() - set(FILES_WITH_TIMES):
            if mine.get(name) != theirs.get(name) and name not in FILES_WITH_TIMES:
                found.append(f"{name} of {ours['model'][row]} split {ours['split'][row]} differs")
    curves = [history(path, task, runs["run_id"].tolist()) for path, runs in ((store, ours), (reference, expected))]
    return found + (["the epochs differ, or one stands twice"] if curves[0] != curves[1] else [])


def history(store: Path, task: str, run_ids: Sequence[str]) -> list[list[tuple[str, int, float]]]:
    """Every point of every epoch metric of some runs as the database has it, times excepted, sorted."""
    client = open_store(uri(store)).client
    logged = [key for key in keys.EPOCH_METRICS if key not in TIMES]
    return [
        sorted((key, point.step, point.value) for key in logged for point in client.get_metric_history(run_id, key))
        for run_id in run_ids
    ]


def strays(store: Path) -> list[str]:
    """Files beside a store that no finished protocol leaves."""
    state = {path.name for path in (store.parent / "mlflow.state").iterdir()} - {"store.lock"}
    beside = {path.name for path in store.parent.iterdir()} - {
        "mlflow.db", "mlflow.db-shm", "mlflow.db-wal", "mlflow.state", "artifacts"
    }  # fmt: skip
    return [f"{name} is left" for name in sorted(state | beside)]


def run_campaign(task: str, options: Sequence[str], kills: int, seed: int, folder: Path) -> Campaign:
    """Kill a task's script at least so many times; `SystemExit` says what is wrong."""
    campaign = Campaign(task, options, folder, random.Random(seed))
    reference, seconds = campaign.reference()
    while campaign.kills < kills:
        campaign.round(reference, seconds)
    return campaign


def main() -> None:
    """Run a campaign as the command line says and print what happened."""
    parser = argparse.ArgumentParser(description="Kill a protocol at random moments; see the module's docstring.")
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--task", choices=keys.EXPERIMENTS, default="task3")
    parser.add_argument("--data-dir", help="real data instead of the sample")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    source = ("--data-dir", arguments.data_dir) if arguments.data_dir else ("--sample",)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        done = run_campaign(arguments.task, (*PROTOCOL, *source), arguments.kills, arguments.seed, Path(folder))
    print(f"{done.kills} kills in {done.rounds} rounds of {arguments.task}, {time.monotonic() - started:.0f} s:")
    print("numbers and files equal those of an undisturbed run, no epoch twice, no run RUNNING, no stray file")
    for moment, count in sorted(done.moments.items()):
        print(f"{count:4d}  {moment}")


if __name__ == "__main__":
    main()
