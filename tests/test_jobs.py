"""Jobs done one after the other and in several processes: all are done, each once, with one result."""

import contextlib
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
from experiments.config import TrainingConfig
from rich.console import Console

import analysis
import models
from datasets import Split
from experiments import display, schedule
from experiments.jobs import ATTEMPTS, Engine, Job, Local, Result, Sequential, run_jobs
from tests.conftest import THREE_SPLITS
from tests.test_resume import start
from tracking import StoreError, persist
from tracking.store import StoreAwayError

LONG = ("--sample", *THREE_SPLITS)  # long enough to be disturbed
TIMES = ["start_time", "end_time", "train_seconds", "images_per_second", "heartbeat", "owner", "command"]
PLACES = ["run_id", "parent_id", "artifact_uri", "file_digests"]  # history.json has times


def make_jobs(count: int) -> list[Job]:
    split = Split(*(np.array([number]) for number in range(3)))
    card = models.describe("lenet5", 1, 10, 28)
    return [Job(card, number, split, {}, {}, "parent", "experiment") for number in range(count)]


def numbers(uri: str) -> "object":
    runs = analysis.load_runs(["task3"], uri).query("status == 'FINISHED'").sort_values(["model", "split"])
    return runs.drop(columns=TIMES + PLACES).reset_index(drop=True)


def same_numbers(uri: str, other: str) -> bool:
    curves = [
        analysis.load_curves(["task3"], each).drop(columns=["run_id", "epoch_seconds"]).sort_values(
            ["model", "split", "epoch"]
        ).reset_index(drop=True)
        for each in (uri, other)
    ]  # fmt: skip
    return numbers(uri).equals(numbers(other)) and curves[0].equals(curves[1])


# --- one after the other


def fail() -> Result:
    raise StoreError("no room")


def test_results_are_written_beside_the_next_training_and_in_order() -> None:
    done: list[object] = []
    go_on = threading.Event()

    def train(job: Job) -> Callable[[], Result]:
        done.append(f"train {job.number}")
        if job.number == 1:
            go_on.set()

        def write() -> Result:
            done.append(go_on.wait(10) and f"write {job.number}")
            return Result("trained")

        return write

    with Sequential(train) as engine:
        results = list(run_jobs(iter(make_jobs(3)), engine))
    assert [job.number for job, _ in results] == [0, 1, 2]
    assert done.index("write 0") > done.index("train 1")
    assert [entry for entry in done if str(entry).startswith("write")] == ["write 0", "write 1", "write 2"]


def test_what_failed_to_be_written_is_raised_and_the_next_is_written_all_the_same() -> None:
    done, begun = [], threading.Event()

    def train(job: Job) -> Callable[[], object]:
        if job.number == 1:
            begun.set()
            return lambda: done.append("next") or Result("trained")
        return lambda: begun.wait(10) and fail()

    with pytest.raises(StoreError, match="no room"), Sequential(train) as engine:
        list(run_jobs(iter(make_jobs(2)), engine))
    assert done == ["next"]
    with pytest.raises(StoreError, match="no room"), Sequential(lambda job: fail) as engine:
        list(run_jobs(iter(make_jobs(1)), engine))


def interrupted(write: Callable[[], object]) -> None:
    def train(job: Job) -> Callable[[], object]:
        if job.number == 1:
            time.sleep(0.1)
            raise KeyboardInterrupt
        return write

    with pytest.raises(KeyboardInterrupt), Sequential(train) as engine:
        list(run_jobs(iter(make_jobs(2)), engine))


def test_an_interrupt_lets_the_last_split_be_written() -> None:
    done = []

    def write() -> None:
        time.sleep(0.3)
        done.append("written")

    interrupted(write)
    assert done == ["written"]


def test_an_interrupt_does_not_wait_for_a_store_that_is_away_and_afterwards_one_waits_again() -> None:
    def away() -> None:
        raise StoreAwayError("nobody answers")

    started = time.monotonic()
    interrupted(lambda: persist(away))
    assert time.monotonic() - started < 5  # of 300 seconds
    answers = [StoreAwayError("not yet"), None]

    def answer() -> str:
        if error := answers.pop(0):
            raise error
        return "there"

    assert persist(answer) == "there"


# --- several at once


class Flaky(Engine):
    """Does jobs at once in this thread; the first attempts at some of them fail, or their worker is lost."""

    slots = 3
    lost = (ZeroDivisionError,)

    def __init__(self, failing: dict[int, int]) -> None:
        self.failing = failing
        self.attempts: list[int] = []

    def submit(self, job: Job):
        from concurrent.futures import Future

        future: Future[Result] = Future()
        self.attempts.append(job.number)
        if job.attempt >= self.failing.get(job.number, 0):
            future.set_result(Result("trained"))
        elif job.number % 2:
            future.set_exception(ZeroDivisionError())
        else:
            future.set_result(Result("failed", "for now", again=True))
        return future

    def __exit__(self, *error: object) -> None:
        pass


def test_what_may_end_otherwise_is_tried_again_after_all_others() -> None:
    with Flaky({0: 1, 1: 2, 2: 99, 3: 99}) as engine:
        results = {job.number: result for job, result in run_jobs(iter(make_jobs(6)), engine)}
    assert [number for number in range(6) if results[number].outcome == "trained"] == [0, 1, 4, 5]
    assert results[2].text == "for now" and "its worker was lost" in results[3].text
    assert engine.attempts[:6] == [0, 1, 2, 3, 4, 5]
    assert [engine.attempts.count(number) for number in range(6)] == [2, 3, ATTEMPTS, ATTEMPTS, 1, 1]


def work(shared: tuple[np.ndarray, str], job: Job) -> Result:
    """Say what a worker sees; the first attempt at job 1 is killed."""
    array, _ = shared
    if job.number == 1 and not job.attempt:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.3)
    import torch

    return Result("trained", f"{array.sum()} {type(array).__name__} {torch.get_num_threads()} {os.getpid()}")


def test_processes_share_arrays_and_a_killed_one_takes_no_other_along(tmp_path: Path) -> None:
    array = np.arange(2_000_000)
    with Local(work, (array, "x"), 2, 1, tmp_path) as engine:
        results = {job.number: result.text.split() for job, result in run_jobs(iter(make_jobs(4)), engine)}
    assert sorted(results) == [0, 1, 2, 3]
    assert {tuple(text[:3]) for text in results.values()} == {(str(array.sum()), "memmap", "1")}
    assert len({text[3] for text in results.values()}) in (2, 3)  # one was replaced
    assert len(list(tmp_path.iterdir())) == 1  # the array, once


kept: list[np.ndarray] = []


def grow(shared: None, job: Job) -> Result:
    """Keep 400 MB, as an allocator does for the next job, for longer than loky takes between two looks."""
    kept.append(np.ones(50_000_000))
    time.sleep(1.1)
    return Result("trained", str(os.getpid()))


def test_a_process_that_keeps_memory_does_all_the_jobs(tmp_path: Path) -> None:
    with Local(grow, None, 1, 1, tmp_path) as engine:
        processes = {result.text for _, result in run_jobs(iter(make_jobs(3)), engine)}
    assert len(processes) == 1


def test_several_jobs_at_once_give_the_numbers_of_one_and_a_rerun_does_nothing(
    three_splits: str, tmp_path: Path, run_command
) -> None:
    uri = f"sqlite:///{tmp_path / 'two.db'}"
    done = run_command("experiments/task3.py", *LONG, "--jobs", "2", "--tracking-uri", uri)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert "3 of 3 done, 0 running, 0 failed" in done.stdout
    assert same_numbers(three_splits, uri)
    before = analysis.load_runs(["task3"], uri)
    again = run_command("experiments/task3.py", *LONG, "--jobs", "2", "--tracking-uri", uri)
    assert "finished before and kept: 3 splits" in again.stdout
    assert analysis.load_runs(["task3"], uri).equals(before)
    assert [path.name for path in (tmp_path / "two.state").iterdir()] == ["store.lock"]


def wait_for_epochs(process: "subprocess.Popen[str]", uri: str, known: int = 0) -> int:
    """Wait until two splits have epochs, and all have more than are known; return how many."""
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(StoreError):
            curves = analysis.load_curves(["task3"], uri)
            if curves["run_id"].nunique() >= 2 and len(curves) > known:
                return len(curves)
        time.sleep(0.1)
    raise AssertionError(process.communicate(timeout=10))


def workers(process: "subprocess.Popen[str]") -> list[psutil.Process]:
    return [child for child in psutil.Process(process.pid).children() if "popen_loky" in " ".join(child.cmdline())]


def test_a_killed_worker_costs_nothing_but_time(three_splits: str, tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'killed.db'}"
    process = start("task3", uri, *LONG, "--jobs", "2")
    wait_for_epochs(process, uri)
    workers(process)[0].kill()
    printed, errors = process.communicate(timeout=300)
    assert (process.returncode, errors) == (0, "")
    assert "3 of 3 done" in printed
    assert analysis.load_runs(["task3"], uri)["status"].tolist() == ["FINISHED"] * 3
    assert same_numbers(three_splits, uri)


def test_the_workers_end_with_their_command_and_it_goes_on(three_splits: str, tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'store.db'}"
    known = 0
    for signum in (signal.SIGINT, signal.SIGKILL):
        process = start("task3", uri, *LONG, "--jobs", "2")
        known = wait_for_epochs(process, uri, known)
        left = workers(process)
        process.send_signal(signum)
        _, errors = process.communicate(timeout=60)
        _, alive = psutil.wait_procs(left, timeout=10)
        assert len(left) == 2 and not alive
        if signum == signal.SIGINT:
            assert process.returncode == 130
            assert errors == "Error: interrupted; the same command goes on where this one stopped\n"
            statuses = set(analysis.load_runs(["task3"], uri)["status"])
            assert statuses <= {"KILLED", "FINISHED"} and "KILLED" in statuses
    ids = set(analysis.load_runs(["task3"], uri)["run_id"])
    process = start("task3", uri, *LONG, "--jobs", "2")
    _, errors = process.communicate(timeout=300)
    assert (process.returncode, errors) == (0, "")
    runs = analysis.load_runs(["task3"], uri)
    assert ids <= set(runs["run_id"])  # they went on
    assert runs["status"].tolist() == ["FINISHED"] * 3
    assert same_numbers(three_splits, uri)  # each epoch once


def test_a_split_that_fails_does_not_stop_the_others(tmp_path: Path, run_command) -> None:
    uri = f"sqlite:///{tmp_path / 'store.db'}"
    options = ("--sample", "--no-baselines", "-m", "lenet5", "-m", "vggnet", "--n-splits", "2", "--epochs", "2")
    done = run_command("experiments/task3.py", *options, "--lr", "1e9", "--jobs", "2", "--tracking-uri", uri)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    failed = re.findall(r"Error: (\w+ split \d): ", done.stderr)
    runs = analysis.load_runs(["task3"], uri)
    assert len(failed) == (runs["status"] == "FAILED").sum() > 0
    assert len(runs) == 4 and not (runs["status"] == "RUNNING").any()


# --- the rule of --jobs auto


def plan_for(*names: str, n_splits: int = 10, cores: int = 2, memory: float = 16e9, jobs: int | None = None, **more):
    cards = [
        models.describe(name, 3, 2, 128) if name[-2:] == "b0" else models.describe(name, 1, 10, 28) for name in names
    ]
    split = Split(np.arange(1400), np.arange(34300), np.arange(34300))
    config = TrainingConfig(device="cpu", precision="bf16", batch_size=256)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule, "cpu_count", lambda: cores)
        patch.setattr(schedule.torch, "get_num_threads", lambda: more.pop("all_threads", cores))
        patch.setattr(schedule.hardware, "memory_of", lambda device: memory)
        patch.setenv("OMP_NUM_THREADS", more.pop("omp", ""))
        return schedule.plan(jobs, more.pop("threads", None), None, config, cards, [split] * n_splits, range(n_splits))


def test_small_models_get_a_job_a_core_and_a_large_one_all_threads() -> None:
    small = plan_for("majority", "linear", "lenet5")
    assert (small.at_once, small.threads) == (2, 1) and "2 jobs at once" in small.why
    large = plan_for("efficientnet_b0", n_splits=5)  # the fifth would leave a core idle
    assert (large.at_once, large.threads) == (1, 2) and "all 2 threads" in large.why
    assert plan_for("efficientnet_b0", n_splits=10).at_once == 2
    assert plan_for("lenet5", cores=8).at_once == 8 and plan_for("lenet5", n_splits=3, cores=8).threads == 2
    assert plan_for("lenet5", cores=1).at_once == 1


def test_memory_and_threads_that_were_asked_for_limit_the_jobs() -> None:
    assert plan_for("lenet5", cores=8, memory=4e9).at_once == 2
    assert plan_for("lenet5", cores=8, memory=1e8).at_once == 1
    assert plan_for("lenet5", cores=8, threads=4).at_once == 2
    obeyed = plan_for("lenet5", cores=8, omp="2", all_threads=2)
    assert (obeyed.at_once, obeyed.threads) == (4, 2)


def test_a_number_of_jobs_shares_the_cores() -> None:
    assert [plan_for("lenet5", cores=8, jobs=jobs).threads for jobs in (1, 2, 3, 16)] == [8, 4, 2, 1]
    assert plan_for("lenet5", n_splits=3, cores=8, jobs=16).at_once == 3
    assert plan_for("lenet5", cores=8, jobs=4, threads=8).threads == 8


@pytest.mark.parametrize("room", [1, 2])
def test_the_time_that_is_left_counts_what_the_other_models_take(
    room: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    split = Split(*(np.array([number]) for number in range(3)))
    seconds = {"efficientnet_lite": 900, "lenet5": 110, "majority": 1}  # about as measured
    names = ["efficientnet_lite", *(name for name in seconds for _ in range(4))]
    cards = [models.describe(name, 3, 2, 128) for name in names]
    jobs = [Job(card, number, split, {}, {}, "parent", "task2") for number, card in enumerate(cards)]
    ends, free = [], [0] * room
    for job in jobs[1:]:  # whoever is free takes the next
        free.sort()
        free[0] += seconds[job.card.name]
        ends.append((free[0], job))
    now = 0
    monkeypatch.setattr(display.time, "monotonic", lambda: now)
    monkeypatch.setattr(display, "console", Console(force_terminal=False))
    bar = display.JobBar(jobs, lambda: room)
    bar.begin(jobs[0])
    bar.end(jobs[0], Result("found"))
    assert "about" not in capsys.readouterr().out  # nothing was learnt from it
    *ended, last = sorted(ends, key=lambda end: end[0])
    for now, job in ended:
        bar.begin(job)
        bar.end(job, Result("trained", "best 1"))
        clock = re.search(r"about ([\d:]+) left", capsys.readouterr().out)[1].split(":")
        estimate = sum(int(part) * 60**power for power, part in enumerate(reversed(clock)))
        left = last[0] - now
        assert 0.8 * left - 10 <= estimate <= 1.2 * left + (900 if room == 2 else 10)  # one may be nearly done


@pytest.mark.parametrize(("options", "sentence"), [
    (("--jobs", "0"), "'0' is neither auto nor a number from 1 to 1000"),
    (("--jobs", "many"), "'many' is neither auto nor a number"),
    (("--jobs", "-2"), "'-2' is neither auto nor a number"),
    (("--threads", "0"), "--threads"),
    (("--backend", "slurm"), "--backend"),
    (("--gpus-per-job", "0.5"), "--gpus-per-job"),
])  # fmt: skip
def test_wrong_options_name_themselves(options: tuple[str, ...], sentence: str, run_command) -> None:
    done = run_command("experiments/task3.py", "--sample", *options)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert sentence in " ".join(done.stderr.replace("│", " ").split())


def test_without_ray_one_sentence_says_what_to_install(run_command, tmp_path: Path) -> None:
    (tmp_path / "ray.py").write_text("raise ImportError('not there')")
    done = run_command("experiments/task3.py", "--sample", "--backend", "ray", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr == (
        "Error: --backend ray needs Ray, which is not installed; pip install -r requirements-cluster.txt\n"
    )
