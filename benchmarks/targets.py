"""How many times as fast as an earlier commit: epochs of training, and whole commands, both commits in turn.

What      The earlier commit is cloned into a temporary folder. Each epoch is that of the commit's own `fit`, on random
          images, in a process of each commit; one waits while the other computes. The first two epochs do not count.
          The commands run from start to prompt, each time with a new store, after one that fills the caches of images.
          Ratios are of medians, of the processor's time (which other programs hardly change) and of minima
Time      about an hour on 2 CPU cores with AMX; `--work`, `--repeats` and `--share` shorten it

    python benchmarks/targets.py --data-dir DIR
"""

import argparse
import importlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
EARLIER = "6888448"  # before the kernels of models/kernels


class Epoch(NamedTuple):
    """A model, the size of its images, how many of them, and the goal for the ratio."""

    model: str
    channels: int
    classes: int
    pixels: int
    batch: int
    train: int
    val: int
    goal: float


WORKS = {
    **{
        f"{model}, 128 px": Epoch(model, 3, 2, 128, batch, 4 * batch, batch, goal)
        for model, batch, goal in (
            ("efficientnet_b0", 64, 2.0),
            ("efficientnet_lite", 128, 1.5),
            ("vggnet", 128, 1.6),
            ("resnetcnn", 128, 1.35),
            ("seresnet", 128, 1.2),
            ("lenet5", 128, 1.2),
        )
    },
    **{f"{model}, task 3": Epoch(model, 1, 10, 28, 256, 1400, 34_300, 1.25) for model in ("vggnet", "resnetcnn")},
}
COMMANDS = {  # options and goal; with --data-dir only
    "task3.py -m lenet5 --split 0 --epochs 3": 2.0,
    "task2.py -m efficientnet_b0 --split 0": 2.0,
}


def serve(source: str, work: str, threads: int, share: float) -> None:
    """Train with the code in a folder, an epoch for each line of input; answer as an `Answer`."""
    sys.path.insert(0, source)
    import numpy as np
    import torch

    import datasets
    import experiments
    import models

    torch.set_num_threads(threads)
    has_kernels = Path(source, "models/kernels").exists()  # the earlier commit has none
    if has_kernels and (reason := importlib.import_module("models.kernels").why_not()):
        raise SystemExit(f"the kernels of {source} are not used: {reason}")
    find = _finder(
        "experiments.training.fit", "experiments.training.images", "experiments.training.state",
        "experiments.training", "experiments",
    )  # fmt: skip  # the names' places, of today and of the earlier commit
    hardware = find("hardware")
    hardware.prepare()
    name, channels, classes, size, batch, *counts, _ = WORKS[work]
    train, val = (max(2, round(share * count)) for count in counts)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (train + val, size, size, channels)).astype(np.uint8)
    names = tuple(map(str, range(classes)))
    data = datasets.ImageData("noise", pixels, np.arange(train + val) % classes, names, train + val)
    config = hardware.resolve(experiments.TrainingConfig(batch_size=batch, epochs=999, patience=999, device="cpu"))
    model = find("initialise")(lambda: models.build(name, channels, classes, size), 0, "cpu")
    state = find("TrainingState")(model, config, 0)
    split = datasets.Split(np.arange(train), np.arange(train, train + val), np.arange(0))
    epochs = find("fit")(state, find("DeviceImages").load(data, "cpu"), split)
    for _ in sys.stdin:
        started, computed = time.perf_counter(), time.process_time()
        next(epochs)
        seconds, processor = time.perf_counter() - started, time.process_time() - computed
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps([seconds, processor, peak, config.precision]), flush=True)


def _finder(*modules: str) -> Callable[[str], Any]:
    def find(name: str) -> Any:
        for module in modules:
            try:
                return getattr(importlib.import_module(module), name)
            except (ImportError, AttributeError):
                continue
        raise LookupError(f"{name} is in none of {', '.join(modules)}")

    return find


class Answer(NamedTuple):
    """The cost of an epoch or a command."""

    seconds: float
    processor: float  # seconds of the processor, by all threads: what other programs on a busy machine do not add to
    peak: float  # memory of the process so far, GB
    precision: str


@contextmanager
def epochs_of(source: Path, work: str, threads: int, share: float) -> Iterator[Callable[[], Answer]]:
    """Start `serve`; give a function that has it train an epoch."""
    command = [sys.executable, __file__, "--serve", str(source), "--work", work]
    command += ["--threads", str(threads), "--share", str(share)]
    process = subprocess.Popen(
        command, cwd=source, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    requests, answers = process.stdin, process.stdout

    def epoch() -> Answer:
        requests.write("\n")
        requests.flush()
        answer = answers.readline()
        if not answer:
            raise SystemExit(f"{work} failed in {source} with exit code {process.wait()}")
        return Answer(*json.loads(answer))

    try:
        yield epoch
    finally:
        requests.close()
        process.wait()


def command(source: Path, line: str, data_dir: Path, threads: int) -> Answer:
    """Run one of the scripts from the command to the prompt, with a new store."""
    script, *options = line.split()
    with tempfile.TemporaryDirectory() as folder:
        options += ["--threads", str(threads), "--jobs", "1", "--no-baselines", "--data-dir", str(data_dir)]
        options += ["--tracking-uri", f"sqlite:///{folder}/store.db"]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, f"experiments/{script}", *options], cwd=source, capture_output=True, text=True
        )
        seconds = time.perf_counter() - started
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{line} failed in {source}: {done.stderr[-500:]}")
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Answer(seconds, processor, after.ru_maxrss / 2**20, "")


def in_turn(
    earlier: Callable[[], Answer], now: Callable[[], Answer], repeats: int, warm: int
) -> tuple[list[Answer], list[Answer]]:
    """Call both by turns, now the one first and now the other; the first `warm` times do not count."""
    both: tuple[list[Answer], list[Answer]] = ([], [])
    for repeat in range(warm + repeats):
        order = [(both[0], earlier), (both[1], now)]
        for answers, function in order if repeat % 2 else reversed(order):
            answers.append(function())
    return both[0][warm:], both[1][warm:]


def row(work: str, goal: float, before: list[Answer], now: list[Answer]) -> str:
    """One line of the table."""
    seconds, processor = ([[each[i] for each in answers] for answers in (before, now)] for i in (0, 1))
    cells = [f"{median(times):.3g}" for times in seconds]
    cells += [f"{median(old) / median(new):.2f}" for old, new in (seconds, processor)]
    cells += [f"{min(seconds[0]) / min(seconds[1]):.2f}", f"{before[-1].peak:.2f}, {now[-1].peak:.2f}"]
    return f"| {work} | {goal:g} | {' | '.join(cells)} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Compare with an earlier commit; see the module's docstring.")
    parser.add_argument("--data-dir", type=Path, help="as of the task scripts; without it no command is run")
    works = [*WORKS, *COMMANDS]
    parser.add_argument("--work", action="append", choices=works, metavar="WORK", help="repeatable; default: all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--share", type=float, default=1, help="of the images of an epoch")
    parser.add_argument("--commit", default=EARLIER, help=f"to compare with; default: {EARLIER}")
    parser.add_argument("--serve", help=argparse.SUPPRESS)  # folder of the code; see `serve`
    arguments = parser.parse_args()
    threads, share = arguments.threads, arguments.share
    if arguments.serve:
        serve(arguments.serve, arguments.work[0], threads, share)
        return
    with tempfile.TemporaryDirectory() as folder:
        earlier = Path(folder)
        for line in (["clone", "--quiet", "--no-checkout", str(ROOT), folder],
                     ["-C", folder, "checkout", "--quiet", "--detach", arguments.commit]):  # fmt: skip
            if subprocess.run(["git", *line]).returncode:
                raise SystemExit(f"the commit {arguments.commit} cannot be had from {ROOT}: fetch the whole history")
        print("| work | goal | before, s | now, s | ratio | of processor time | of minima | peak before, now, GB |")
        print("|---|--:|--:|--:|--:|--:|--:|--:|", flush=True)
        for work in arguments.work or works:
            if work in WORKS:
                with ExitStack() as stack:
                    start = [stack.enter_context(epochs_of(each, work, threads, share)) for each in (earlier, ROOT)]
                    before, now = in_turn(*start, arguments.repeats, warm=2)
                print(row(f"{work} ({now[0].precision})", WORKS[work].goal, before, now), flush=True)
            elif arguments.data_dir:
                data_dir = arguments.data_dir.resolve()
                run = [partial(command, each, work, data_dir, threads) for each in (earlier, ROOT)]
                print(row(f"`{work}`", COMMANDS[work], *in_turn(*run, arguments.repeats, warm=1)), flush=True)


if __name__ == "__main__":
    main()
