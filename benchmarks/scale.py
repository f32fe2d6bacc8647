"""Cost of a split for the result database, and its consequences for many splits and many workers.

What      writes:   processes that log epochs to a store as fast as it takes them, one, two and four of them
          split:    one split of LeNet-5 on the sample, with the calls of MLflow's client that it makes and the seconds
                    that they take, the bytes that travel to a worker, and the bytes that the split leaves
          simulate: W workers that share N splits and one store, from the constants below: a queue with as many servers
                    as the store works on at a time. docs/scale.md has the tables and the conclusions
Time      a minute for each; `writes` takes URIs of stores that may be written to

    python benchmarks/scale.py writes sqlite:///x.db http://127.0.0.1:5000
    python benchmarks/scale.py split [URI]
    python benchmarks/scale.py simulate
"""

import argparse
import dataclasses
import heapq
import itertools
import multiprocessing
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tracking
from benchmarks.overhead import watch_client
from tracking.errors import without_password
from tracking.keys import EPOCH_METRICS

SECONDS = 10.0  # of each measurement of `writes`
WRITERS = (1, 2, 4)


@dataclasses.dataclass(frozen=True)
class Engine:
    """How fast a store is, measured: `writes` and `split`.

    Attributes
    ----------
    at_a_time : int
        Calls that it works on at once.
    call : float
        Seconds of one call, when it works on one.
    """

    name: str
    at_a_time: int
    call: float


@dataclasses.dataclass(frozen=True)
class Work:
    """The work of a split: `seconds` of the worker, and calls of the store, some of them in between."""

    name: str
    seconds: float
    calls_between: int  # epochs are sent together, at most once a second
    calls: int = 30  # claim, results, end, summary
    megabytes: float = 0.9  # files and rows that stay


ENGINES = (
    Engine("SQLite", 1, 0.005),
    Engine("PostgreSQL itself", 1, 0.0048),
    Engine("server on PostgreSQL, 2 processes", 3, 0.056),
)
WORKS = (
    Work("LeNet-5 on garments, 1 thread", 14.0, 12),
    Work("VGGNet on garments, 1 thread", 90.0, 60),
    Work("EfficientNet-B0 on photos, GPU", 600.0, 300),
)
SPLITS, WORKERS = (10, 1_000, 100_000), (2, 16, 256)
SIMULATED = 40  # splits of each worker, at most: then the queue has long settled


def log_epochs(uri: str, started: Any, counts: Any) -> None:
    """Log epochs to a run of its own until the time is over."""
    from mlflow.entities import Metric

    client = tracking.open_store(uri).client
    run_id = client.create_run(client.get_experiment_by_name("Default").experiment_id).info.run_id
    started.wait()
    begun, calls = time.monotonic(), 0
    while time.monotonic() - begun < SECONDS:
        calls += 1
        client.log_batch(run_id, [Metric(key, 0.5, calls, calls) for key in EPOCH_METRICS])
    counts.put(calls)


def writes(uris: list[str]) -> None:
    """Print how many epochs a second each store takes from several processes."""
    context = multiprocessing.get_context("spawn")
    print("| store | " + " | ".join(f"{n} processes" for n in WRITERS) + " |\n|---|" + "--:|" * len(WRITERS))
    for uri in uris:
        tracking.open_store(uri, create=True)
        cells = []
        for n in WRITERS:
            started, counts = context.Barrier(n), context.Queue()
            processes = [context.Process(target=log_epochs, args=(uri, started, counts)) for _ in range(n)]
            for process in processes:
                process.start()
            cells.append(sum(counts.get() for _ in processes) / SECONDS)
            for process in processes:
                process.join()
        print(f"| {without_password(uri)} | " + " | ".join(f"{cell:.0f} /s" for cell in cells) + " |")


def split(uri: str | None) -> None:
    """Print the cost of one split."""
    calls: Counter[str] = Counter()
    seconds: Counter[str] = Counter()

    def note(name: str, taken: float) -> None:
        calls[name] += 1
        seconds[name] += taken

    watch_client(note)

    from experiments import TrainingConfig
    from experiments.jobs.job import Job
    from experiments.jobs.worker import Worker
    from experiments.request import Request
    from experiments.run import run
    from experiments.task3 import TASK

    train = Worker.train

    def weigh(worker: Worker, job: Job) -> Any:
        data, groups = worker.context.data, worker.context.groups
        own = sum(array.nbytes for array in (*job.split, data.labels, groups)) / 1e6
        print(f"to a worker: {data.images.nbytes / 1e6:.1f} MB of images once a machine, {own:.2f} MB a job")
        calls.clear()
        seconds.clear()
        return train(worker, job)

    Worker.train = weigh  # type: ignore[method-assign]
    training = {"lenet5": TrainingConfig(batch_size=256, epochs=30, patience=30)}
    with tempfile.TemporaryDirectory() as folder:
        store = uri or f"sqlite:///{folder}/mlflow.db"
        run(
            Request(
                task=TASK,
                training=training,
                n_splits=TASK.protocol.n_splits,
                splits=(0,),
                sample=True,
                tracking_uri=store,
            )
        )
        print(f"calls of the split and of the command's end: {sum(calls.values())}, {sum(seconds.values()):.2f} s")
        for name, count in calls.most_common():
            print(f"  {name:24s} {count:4d}  {1000 * seconds[name] / count:6.1f} ms")
        if not uri:
            size = sum(path.stat().st_size for path in (Path(folder) / "artifacts").rglob("*") if path.is_file())
            print(f"files of a split and its parent: {size / 1e6:.2f} MB")


def simulated(engine: Engine, work: Work, splits: int, workers: int) -> tuple[float, float]:
    """Simulate a protocol; return its seconds, and the share of a worker's time that the store took.

    Each worker trains, with calls in between, and then makes its other calls one after the other. A call waits until
    one of the store's `at_a_time` servers is free; first come, first served.
    """
    each = min(-(-splits // workers), SIMULATED)
    workers = min(workers, splits)
    total = work.calls + work.calls_between
    pause = work.seconds / (work.calls_between + 1)
    servers = [0.0] * engine.at_a_time
    order = itertools.count()
    # (time, tie, calls made in this split, splits done); workers do not begin in the same second
    events = [(worker * min(1.0, work.seconds / workers), next(order), 0, 0) for worker in range(workers)]
    heapq.heapify(events)
    end = at_store = 0.0
    while events:
        now, _, made, done = heapq.heappop(events)
        begun = max(now, heapq.heappop(servers))
        heapq.heappush(servers, begun + engine.call)
        after = begun + engine.call
        at_store += after - now
        made += 1
        if made <= work.calls_between + 1:
            after += pause
        if made == total:
            made, done = 0, done + 1
        end = max(end, after)
        if done < each:
            heapq.heappush(events, (after, next(order), made, done))
    rounds = -(-splits // workers)
    return end * rounds / each, at_store / (end * workers)


def simulate() -> None:
    """Print the consequences of the constants."""
    for work in WORKS:
        print(f"\n{work.name}: {work.seconds:g} s, {work.calls + work.calls_between} calls a split\n")
        of_engines = " | ".join(f"{engine.name}: hours | at the store" for engine in ENGINES)
        print(f"| splits | workers | {of_engines} | files |")
        print("|--:|--:|" + "--:|" * (2 * len(ENGINES) + 1))
        for splits, workers in itertools.product(SPLITS, WORKERS):
            if workers > splits and workers > WORKERS[1]:
                continue
            cells = []
            for engine in ENGINES:
                seconds, share = simulated(engine, work, splits, workers)
                cells += [f"{seconds / 3600:.2f}", f"{share:.0%}"]
            print(f"| {splits:,} | {workers} | " + " | ".join(cells) + f" | {splits * work.megabytes / 1000:.2f} GB |")


def main() -> None:
    """Run the measurement that the command line names."""
    parser = argparse.ArgumentParser(description="Measure the cost of splits for the store; see the docstring.")
    modes = parser.add_subparsers(dest="mode", required=True)
    modes.add_parser("writes").add_argument("uri", nargs="+")
    modes.add_parser("split").add_argument("uri", nargs="?", default=os.environ.get("MLFLOW_TRACKING_URI"))
    modes.add_parser("simulate")
    arguments = parser.parse_args()
    if arguments.mode == "writes":
        writes(arguments.uri)
    elif arguments.mode == "split":
        split(arguments.uri)
    else:
        simulate()


if __name__ == "__main__":
    main()
