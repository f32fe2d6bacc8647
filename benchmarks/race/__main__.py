"""How fast is the suite, beside the loops people write? The same work, and the same scores at the end.

What      each contestant trains the same network on split 0 of a task's protocol, from the same initial weights, for
          the same epochs, with AdamW (lr 1e-3, weight decay 0.01) and the cosine schedule, validates after each
          epoch, logs loss, accuracy, macro and micro F1 to an MLflow store of its own on SQLite, and ends with the
          best epoch's weights as an artifact and its test scores, where there is a test part. No augmentation
Who       plain-0, plain-2: the loop of PyTorch's tutorials in fp32, with DataLoader in 0 and 2 processes; lightning,
          fastai, keras: as their documentation recommends; ours: the task's script as anyone would start it.
          On a GPU plain-8 (8 processes, pinned memory) and ours
Time      some minutes a work and repeat on 2 cores; photos-resnetcnn and -efficientnet_b0 most of it

    python -m benchmarks.race --data-dir DIR
    python -m benchmarks.race --data-dir DIR --work photos-lenet5 --repeats 1
    python -m benchmarks.race --data-dir DIR --device cuda --out gpu
    python -m benchmarks.race --draw

What is timed. Every run is a process of its own; contestants take turns, in another order each repeat, so that a slow
minute of the machine does not fall on one of them alone. The whole run is wall time from start to exit, imports
included. An epoch is training, validation and logging, and the median of all but the first, which warms up; peers
time it themselves, ours logs it as `epoch_seconds`. Nobody pays for making the database: each run gets a copy of an
empty one. Ours finds its cache filled: the peers decode in every epoch since that is how such loops work, and ours
decodes once for all runs of a data set. What that takes (with the search for near duplicates) stands below the table.
Peak memory is that of the largest process: the kernel does not add a loader's workers to it. Ours keeps its state on
disk and logs its epochs at most once a second, and after the last epoch; where epochs are shorter, not all of them have
a share in that, and what follows the last one is in the whole run alone. It also logs predictions, confusion matrix and
figures, which the others do not. How much of the machine other processes took meanwhile is measured, and said below the
table where it disturbs.

What is compared. The orders of batches differ between the contestants, so their final accuracies do too. The peers draw
another order in each run; ours has one, since its seed decides the weights as well. The best epoch's validation
accuracy of each contestant, the mean of its repeats, may differ from the plain loops' mean by 3 sqrt(2) sd: three
standard errors of the difference of two single runs, which is generous to means of several. sd is pooled over the
peers' own repeats, but not less than the binomial standard error of the validation part, which stands for what is
not known of sd after few repeats. So on garments (sd of LeNet-5 after 3 epochs: 1.1 points) a fault of five points is
seen, and on 128 photos only a gross one; more `--epochs` and `--repeats` make it sharper. With one repeat the
noise is unknown and nothing is judged. The exit code is 1 if an accuracy is off.
"""

import argparse
import contextlib
import datetime
import importlib.util
import json
import os
import platform
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from benchmarks.race import results
from benchmarks.race.works import CONTESTANTS, OURS, ROOT, WORKS, Contestant, Entry, Work

PACKAGES = ("torch", "lightning", "torchmetrics", "fastai", "keras", "mlflow")


def machine(device: str) -> str:
    """The hardware and the versions of this race."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    info = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = info.get("model name") or platform.processor()
    short = " (AVX512-BF16)" if "avx512_bf16" in info.get("flags", "") else ""
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES if importlib.util.find_spec(name))
    gpu = ""
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        gpu = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0] + ", "
    return f"{gpu}{os.cpu_count()} cores of {name}{short}; Python {platform.python_version()}, {versions}"


def busy_seconds() -> float:
    """CPU seconds that all processes have taken since the machine started."""
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system)


def run_process(command: list[str], folder: Path, cache: Path) -> dict[str, float]:
    """Run a process to its end; return its time and memory, or raise `SystemExit` if it fails.

    Returns
    -------
    dict of str to float
        Wall seconds, peak memory in GB, and how many cores other processes were using meanwhile.
    """
    output = folder / "output.txt"
    with output.open("wb") as file:
        started, busy = time.perf_counter(), busy_seconds()
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, "CACHE_DIR": str(cache)}, stdout=file, stderr=subprocess.STDOUT
        )
        _, status, usage = os.wait4(process.pid, 0)
        elapsed, busy = time.perf_counter() - started, busy_seconds() - busy
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        tail = "\n".join(output.read_text(errors="replace").splitlines()[-30:])
        raise SystemExit(f"{' '.join(command)} failed:\n{tail}")
    others = max(0.0, busy - usage.ru_utime - usage.ru_stime) / elapsed
    return {"whole_seconds": elapsed, "peak_gb": usage.ru_maxrss * 1024 / 1e9, "others": others}  # Linux counts in KiB


def our_command(work: Work, entry: Entry, data_root: str) -> list[str]:
    """The task's script for one split, with the settings of the race."""
    return [
        sys.executable, f"experiments/{work.task}.py", "--model", work.model, "--split", "0", "--no-baselines",
        "--no-augment", "--batch-size", str(work.batch_size), "--epochs", str(entry.epochs),
        "--patience", str(entry.epochs), "--data-dir", data_root, "--tracking-uri", entry.tracking_uri,
        "--device", entry.device,
    ]  # fmt: skip


def our_result(entry: Entry) -> dict[str, Any]:
    """The result in the form of a peer's, from the database of our run."""
    with contextlib.closing(sqlite3.connect(Path(entry.folder) / "mlflow.db")) as database:

        def values(key: str) -> list[float]:
            rows = database.execute("SELECT value FROM metrics WHERE key = ? ORDER BY step", (key,))
            return [value for (value,) in rows]

        [best_epoch], [accuracy] = values("best_epoch"), values("best_val/accuracy")
        test = values("test/accuracy")
        return {
            "epoch_seconds": values("epoch_seconds"),
            "val_accuracy": accuracy,
            "test_accuracy": test[0] if test else None,
            "best_epoch": int(best_epoch),
        }


def race(
    work: Work, contestants: list[Contestant], repeats: int, epochs: int, data_dir: Path | None, device: str
) -> dict[str, Any]:
    """Prepare a work and let all contestants run it; return the raw results."""
    with tempfile.TemporaryDirectory(prefix="race-") as scratch:
        folder, cache = Path(scratch), Path(scratch) / "prepared" / "cache"
        given = [str(data_dir)] if data_dir else []
        prepare = [sys.executable, "-m", "benchmarks.race.preparation", work.name, str(folder / "prepared"), *given]
        run_process(prepare, folder, cache)
        prepared = json.loads((folder / "prepared" / "prepared.json").read_text(encoding="utf-8"))
        runs = []
        for repeat in range(repeats):
            for place in range(len(contestants)):
                contestant = contestants[(place + repeat) % len(contestants)]
                own = folder / f"{contestant.name}-{repeat}"
                own.mkdir()
                shutil.copy(folder / "prepared" / "mlflow.db", own)
                # plain-0 and plain-2 with one seed would be one result twice
                seed = 1 + repeat * len(CONTESTANTS) + list(CONTESTANTS).index(contestant.name)
                entry = Entry(
                    contestant=contestant.name, model=work.model, prepared=str(folder / "prepared"), folder=str(own),
                    batch_size=work.batch_size, epochs=epochs, num_workers=contestant.num_workers, seed=seed,
                    device=device,
                )  # fmt: skip
                command = our_command(work, entry, prepared["data_root"])
                if contestant.module:
                    command = [sys.executable, "-m", contestant.module, str(entry.write())]
                run = {"contestant": contestant.name, "repeat": repeat, **run_process(command, own, cache)}
                result = our_result(entry) if contestant.name == OURS else json.loads(entry.result.read_text())
                if len(result["epoch_seconds"]) != epochs:
                    raise SystemExit(f"{contestant.name} ran {len(result['epoch_seconds'])} epochs, not {epochs}")
                runs.append(run | result)
                print(f"{work.name} {repeat + 1}/{repeats} {contestant.name}: {run['whole_seconds']:.0f} s", flush=True)
    return {
        "machine": machine(device),
        "device": device,
        "date": datetime.datetime.now().strftime("%Y-%m-%d"),
        "repeats": repeats,
        "epochs": epochs,
        "absent": [name for name, rival in CONTESTANTS.items() if device in rival.devices and not can_run(rival, work)],
        **{key: prepared[key] for key in ("sizes", "note", "once_seconds")},
        "runs": runs,
    }


def can_run(contestant: Contestant, work: Work) -> bool:
    """Whether a contestant is installed and has the work's model."""
    return contestant.is_installed and work.model not in contestant.lacks


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.race", description="Race the suite against other loops; see the module's docstring."
    )
    parser.add_argument("--data-dir", type=Path, default=os.environ.get("DATA_DIR"), help="as of the task scripts")
    parser.add_argument("--work", action="append", choices=WORKS, help="repeatable; all unless given")
    parser.add_argument("--contestant", action="append", choices=CONTESTANTS, help="repeatable; all unless given")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3, help="at least 2: the first is not timed")
    parser.add_argument("--out", type=Path, help="for race.json .md .svg .png; benchmarks/results/ unless given")
    parser.add_argument("--draw", action="store_true", help="only table and figure again, from race.json")
    arguments = parser.parse_args()
    if arguments.epochs < 2 or arguments.repeats < 1:
        parser.error("at least 2 epochs and 1 repeat are needed")
    for name in arguments.contestant or ():
        if arguments.device not in CONTESTANTS[name].devices:
            parser.error(f"{name} is not raced on {arguments.device}")
    if arguments.out is None:
        arguments.out = ROOT / "benchmarks" / ("results" if arguments.device == "cpu" else "results-cuda")
    if arguments.draw and not (arguments.out / "race.json").exists():
        parser.error(f"there is no race.json in {arguments.out} to draw")
    return arguments


def main() -> int:
    """Race, write the results, and return the exit code."""
    arguments = parse()
    arguments.out.mkdir(parents=True, exist_ok=True)
    raw_file = arguments.out / "race.json"
    raws = json.loads(raw_file.read_text(encoding="utf-8")) if raw_file.exists() else {}
    if not arguments.draw:
        rivals = [name for name, rival in CONTESTANTS.items() if arguments.device in rival.devices]
        asked = [CONTESTANTS[name] for name in arguments.contestant or rivals]
        for contestant in asked:
            if not contestant.is_installed:
                print(f"{contestant.name} is left out: {contestant.package} is not installed", file=sys.stderr)
        data_dir = arguments.data_dir.resolve() if arguments.data_dir else None
        for name in arguments.work or WORKS:
            able = [contestant for contestant in asked if can_run(contestant, WORKS[name])]
            raws[name] = race(WORKS[name], able, arguments.repeats, arguments.epochs, data_dir, arguments.device)
            raw_file.write_text(json.dumps(raws, indent=1), encoding="utf-8")  # now: the next work may be interrupted
    text = results.table(raws)
    (arguments.out / "race.md").write_text(text, encoding="utf-8")
    results.draw(raws, arguments.out)
    print(text)
    return 1 if any(results.disagreements({"name": name, **raw}) for name, raw in raws.items()) else 0


if __name__ == "__main__":
    sys.exit(main())
