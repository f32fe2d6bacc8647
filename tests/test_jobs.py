"""Jobs done one after the other and in several processes: all are done, each once, with one result."""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import psutil
import pytest
from rich.console import Console

import analysis
import models
from datasets import Split
from experiments.jobs import engine as engines
from experiments.jobs import progress, schedule
from experiments.jobs.engine import ATTEMPTS, Engine, run_jobs
from experiments.jobs.job import Job, Result
from experiments.jobs.local import Local
from experiments.jobs.schedule import Load
from experiments.jobs.sequential import Sequential
from tests.conftest import HANGS, ROOT, THREE_SPLITS, Gate, disturbed
from tests.test_resume import start
from tracking import StoreError, TrainingConfig, persist
from tracking.errors import StoreAwayError

SPLITS = ("--sample", *THREE_SPLITS)
TIMES = ["start_time", "end_time", "train_seconds", "images_per_second", "heartbeat", "owner", "command"]
PLACES = ["run_id", "parent_id", "artifact_uri", "file_digests"]  # history.json has times


def make_jobs(*cards: models.ModelCard) -> list[Job]:
    split = Split(*(np.array([number]) for number in range(3)))
    return [
        Job(card, TrainingConfig(), number, split, np.zeros(1, np.uint8), {}, {}) for number, card in enumerate(cards)
    ]


def lenets(count: int) -> list[Job]:
    return make_jobs(*[models.describe("lenet5", 1, 10, 28)] * count)


class Worker:
    """Trains and records by two functions of a test."""

    def __init__(self, train: Callable[[Job], object], record: Callable[[Job], Result]) -> None:
        self._train, self._record = train, record

    def train(self, job: Job) -> Job:
        self._train(job)
        return job

    def record(self, job: Job) -> Result:
        return self._record(job)


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


def test_results_are_written_beside_the_next_training_and_in_order() -> None:
    done: list[object] = []
    go_on = threading.Event()

    def train(job: Job) -> None:
        done.append(f"train {job.number}")
        if job.number == 1:
            go_on.set()

    def record(job: Job) -> Result:
        done.append(go_on.wait(HANGS) and f"write {job.number}")
        return Result("trained")

    with Sequential(Worker(train, record)) as engine:
        results = list(run_jobs(iter(lenets(3)), engine))
    assert [job.number for job, _ in results] == [0, 1, 2]
    assert done.index("write 0") > done.index("train 1")
    assert [entry for entry in done if str(entry).startswith("write")] == ["write 0", "write 1", "write 2"]


def test_what_failed_to_be_written_is_raised_and_the_next_is_written_all_the_same() -> None:
    done, begun = [], threading.Event()

    def train(job: Job) -> None:
        if job.number == 1:
            begun.set()

    def record(job: Job) -> Result:
        if job.number == 1:
            done.append("next")
            return Result("trained")
        assert begun.wait(HANGS)
        raise StoreError("no room")

    with pytest.raises(StoreError, match="no room"), Sequential(Worker(train, record)) as engine:
        list(run_jobs(iter(lenets(2)), engine))
    assert done == ["next"]
    with pytest.raises(StoreError, match="no room"), Sequential(Worker(train, record)) as engine:
        list(run_jobs(iter(lenets(1)), engine))


def interrupted(record: Callable[[threading.Event], object]) -> None:
    """Interrupt the training of a second job while the first is recorded."""
    recording, interrupt = threading.Event(), threading.Event()

    def train(job: Job) -> None:
        if job.number == 1:
            assert recording.wait(HANGS)
            interrupt.set()
            raise KeyboardInterrupt

    def write(job: Job) -> Result:
        recording.set()
        record(interrupt)
        return Result("trained")

    with pytest.raises(KeyboardInterrupt), Sequential(Worker(train, write)) as engine:
        list(run_jobs(iter(lenets(2)), engine))


def test_an_interrupt_lets_the_last_split_be_written() -> None:
    done = []

    def record(interrupt: threading.Event) -> None:
        assert interrupt.wait(HANGS)
        time.sleep(0.1)  # the interrupt is on its way out
        done.append("written")

    interrupted(record)
    assert done == ["written"]


def test_an_interrupt_does_not_wait_for_a_store_that_is_away_and_afterwards_one_waits_again() -> None:
    def away() -> None:
        raise StoreAwayError("nobody answers")

    started = time.monotonic()
    interrupted(lambda interrupt: persist(away))
    assert time.monotonic() - started < 60  # of 300 seconds
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
        results = {job.number: result for job, result in run_jobs(iter(lenets(6)), engine)}
    assert [number for number in range(6) if results[number].outcome == "trained"] == [0, 1, 4, 5]
    assert results[2].text == "for now" and "its worker was lost" in results[3].text
    assert engine.attempts[:6] == [0, 1, 2, 3, 4, 5]
    assert [engine.attempts.count(number) for number in range(6)] == [2, 3, ATTEMPTS, ATTEMPTS, 1, 1]


def work(shared: tuple[np.ndarray, str], job: Job) -> Result:
    """Say what a worker sees; the first attempt at job 1 is killed while another process works."""
    array, folder = shared
    Path(folder, str(os.getpid())).touch()
    os.kill(os.getpid(), signal.SIGINT)  # as the terminal does, which the command answers
    while len(list(Path(folder).iterdir())) < 2:  # both processes have a job
        time.sleep(0.02)
    if job.number == 1 and not job.attempt:
        os.kill(os.getpid(), signal.SIGKILL)
    import torch

    return Result("trained", f"{array.sum()} {type(array).__name__} {torch.get_num_threads()} {os.getpid()}")


@pytest.mark.slow
def test_processes_share_arrays_and_a_killed_one_takes_no_other_along(tmp_path: Path) -> None:
    array = np.arange(2_000_000)
    shared, seen = tmp_path / "shared", tmp_path / "seen"
    shared.mkdir()
    seen.mkdir()
    with Local((array, str(seen)), 2, shared, work) as engine:
        results = {job.number: result.text.split() for job, result in run_jobs(iter(lenets(4)), engine)}
    assert sorted(results) == [0, 1, 2, 3]
    assert {tuple(text[:3]) for text in results.values()} == {(str(array.sum()), "memmap", "1")}
    answered, begun = {text[3] for text in results.values()}, {path.name for path in seen.iterdir()}
    assert answered < begun and len(begun - answered) == 1  # the killed one
    assert len(list(shared.iterdir())) == 1  # the array, once


@pytest.mark.slow
def test_several_jobs_at_once_give_the_numbers_of_one_and_a_rerun_does_nothing(
    three_splits: str, tmp_path: Path, run_command, run_here
) -> None:
    uri = f"sqlite:///{tmp_path / 'two.db'}"
    done = run_command("experiments/task3.py", *SPLITS, "--jobs", "2", "--tracking-uri", uri)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert "3 of 3 done, 0 running, 0 failed" in done.stdout
    assert same_numbers(three_splits, uri)
    before = analysis.load_runs(["task3"], uri)
    again = run_here("experiments/task3.py", *SPLITS, "--jobs", "2", "--tracking-uri", uri)
    assert "finished before and kept: 3 splits" in again.stdout
    assert analysis.load_runs(["task3"], uri).equals(before)
    assert [path.name for path in (tmp_path / "two.state").iterdir()] == ["store.lock"]


@pytest.mark.slow
def test_a_killed_worker_costs_nothing_but_time(three_splits: str, store_uri: str, gate: Gate) -> None:
    process = start("task3", store_uri, *SPLITS, "--jobs", "2", **gate.environment)
    os.kill(gate.wait_for(2, process)[0], signal.SIGKILL)
    gate.open()
    printed, errors = process.communicate(HANGS)
    assert (process.returncode, errors) == (0, "")
    assert "3 of 3 done" in printed
    assert analysis.load_runs(["task3"], store_uri)["status"].tolist() == ["FINISHED"] * 3
    assert same_numbers(three_splits, store_uri)


@pytest.mark.slow
def test_the_workers_end_with_their_command_and_it_goes_on(
    three_splits: str, store_uri: str, gate: Gate, run_here
) -> None:
    for signum in (signal.SIGINT, signal.SIGKILL):
        gate.close()
        process = start("task3", store_uri, *SPLITS, "--jobs", "2", **gate.environment)
        workers = [psutil.Process(pid) for pid in gate.wait_for(2, process)]
        process.send_signal(signum)
        _, errors = process.communicate(HANGS)
        _, alive = psutil.wait_procs(workers, timeout=HANGS)
        assert not alive
        if signum == signal.SIGINT:
            assert process.returncode == 130
            assert errors == "Error: interrupted; the same command goes on where this one stopped\n"
            assert analysis.load_runs(["task3"], store_uri)["status"].tolist() == ["KILLED"] * 2
    ids = set(analysis.load_runs(["task3"], store_uri)["run_id"])
    done = run_here("experiments/task3.py", *SPLITS, "--jobs", "2", "--tracking-uri", store_uri)
    assert (done.returncode, done.stderr) == (0, "")
    runs = analysis.load_runs(["task3"], store_uri)
    assert ids <= set(runs["run_id"])  # they went on
    assert runs["status"].tolist() == ["FINISHED"] * 3
    assert same_numbers(three_splits, store_uri)  # each epoch once


@pytest.mark.slow
def test_a_split_that_fails_does_not_stop_the_others(store_uri: str, run_here) -> None:
    options = ("--sample", "--no-baselines", "-m", "lenet5", "-m", "vggnet", "--n-splits", "2", "--epochs", "2")
    done = run_here("experiments/task3.py", *options, "--lr", "1e9", "--jobs", "2", "--tracking-uri", store_uri)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    failed = re.findall(r"Error: (\w+ split \d): ", done.stderr)
    runs = analysis.load_runs(["task3"], store_uri)
    assert len(failed) == (runs["status"] == "FAILED").sum() > 0
    assert len(runs) == 4 and not (runs["status"] == "RUNNING").any()


@pytest.mark.slow
def test_a_worker_that_dies_of_a_signal_is_named_with_it_and_the_others_go_on(
    store_uri: str, tmp_path: Path, run_here, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "ATTEMPTS", 2)
    attempts = []
    monkeypatch.setattr(Job, "again", lambda job, again=Job.again: attempts.append(job.number) or again(job))
    deaths = {"0": "SIGFPE", "1": "SIGSEGV", "2": "SIGKILL"}
    forkserver._forkserver._stop()  # a new one has the environment that disturbs
    options = ("--sample", "--no-baselines", "-m", "lenet5", "--n-splits", "4", "--epochs", "1", "--jobs", "2")
    done = run_here(
        "experiments/task3.py", *options, "--tracking-uri", store_uri, **disturbed(tmp_path, die=deaths)
    )  # fmt: skip
    forkserver._forkserver._stop()
    assert done.returncode == 1
    assert sorted(done.stderr.splitlines()) == [
        f"Error: lenet5 split {number}: its process was ended by {name}" for number, name in deaths.items()
    ]
    assert sorted(attempts) == [0, 1, 2]  # a second one each
    runs = analysis.load_runs(["task3"], store_uri).sort_values("split")
    assert dict(zip(runs["split"], runs["status"], strict=True)) == {**dict.fromkeys(range(3), "KILLED"), 3: "FINISHED"}


@pytest.mark.slow
def test_source_that_is_edited_after_the_start_is_not_trained_under_the_old_digest(
    store_uri: str, tmp_path: Path
) -> None:
    tree = copy_of_the_tree(tmp_path / "tree")
    command = [sys.executable, str(tree / "experiments" / "task3.py"), "--sample", "--no-baselines", "-m", "lenet5",
               "--n-splits", "2", "--epochs", "1", "--tracking-uri", store_uri]  # fmt: skip
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [*command, "--jobs", "2"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline().startswith("task3")
    source = tree / "models" / "lenet.py"
    source.write_text(source.read_text().replace("84", "85"))
    printed, errors = process.communicate(HANGS)
    old = analysis.load_runs(["task3"], store_uri)
    if process.returncode:  # the workers were started after the edit
        assert process.returncode == 1
        assert set(errors.splitlines()) == {
            f"Error: lenet5 split {number}: models/lenet.py was edited after the command began; run it again"
            for number in range(2)
        }, printed
        assert not old["status"].isin(["FINISHED", "RUNNING"]).any()

    # what is finished now was trained from the source of its digest, or it would not be derived again
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANGS)
    assert again.returncode == 0, again.stderr
    runs = analysis.load_runs(["task3"], store_uri).query("status == 'FINISHED'")
    new = runs[~runs["run_id"].isin(old["run_id"])]
    assert len(new) == 2 and not new["source_digest"].isin(old["source_digest"]).any()
    assert new["parameters"].gt(61_706).all() and old["parameters"].eq(61_706).all()
    verified = subprocess.run(
        [sys.executable, "-m", "experiments", "verify", "task3", "--tracking-uri", store_uri],
        cwd=tree, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert verified.returncode == 0, verified.stdout + verified.stderr
    assert f"{len(new)} runs" in verified.stdout and " 0 differences" in verified.stdout


def copy_of_the_tree(target: Path) -> Path:
    """Copy the files of the repository, with the drawn samples, which are the same in each checkout."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.split("\0"):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)
    if (ROOT / "data" / "sample").is_dir():
        shutil.copytree(ROOT / "data" / "sample", target / "data" / "sample")
    return target


# --- the rule of --jobs auto


def plan_for(*names: str, n_splits: int = 10, cores: int = 2, memory: float = 16e9, jobs: int | None = None, **more):
    cards = [
        models.describe(name, 3, 2, 128) if name[-2:] == "b0" else models.describe(name, 1, 10, 28) for name in names
    ]
    loads = [Load(card, 256) for card in cards for _ in range(n_splits)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule, "cpu_count", lambda: cores)
        patch.setattr(schedule.torch, "get_num_threads", lambda: more.pop("all_threads", cores))
        patch.setattr(schedule.hardware, "memory_of", lambda device: memory)
        patch.setenv("OMP_NUM_THREADS", more.pop("omp", ""))
        return schedule.decide(jobs, more.pop("threads", None), "cpu", loads)


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
    seconds = {"efficientnet_lite": 900, "lenet5": 110, "majority": 1}  # about as measured
    names = ["efficientnet_lite", *(name for name in seconds for _ in range(4))]
    jobs = make_jobs(*(models.describe(name, 3, 2, 128) for name in names))
    ends, free = [], [0] * room
    for job in jobs[1:]:  # whoever is free takes the next
        free.sort()
        free[0] += seconds[job.card.name]
        ends.append((free[0], job))
    now = 0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    monkeypatch.setattr(progress, "console", Console(force_terminal=False))
    bar = progress.JobBar(jobs, lambda: room)
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
def test_wrong_options_name_themselves(options: tuple[str, ...], sentence: str, run_here) -> None:
    done = run_here("experiments/task3.py", "--sample", *options)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert sentence in " ".join(done.stderr.replace("│", " ").split())


def test_without_ray_one_sentence_says_what_to_install(run_here, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # its import fails
    done = run_here("experiments/task3.py", "--sample", "--backend", "ray")
    assert done.returncode == 1
    assert done.stderr == (
        "Error: --backend ray needs Ray, which is not installed; pip install -r requirements-cluster.txt\n"
    )
