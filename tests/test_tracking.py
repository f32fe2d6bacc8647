"""The result database written and read back: real MLflow on a real SQLite file."""

import contextlib
import http.server
import multiprocessing
import multiprocessing.connection
import multiprocessing.synchronize
import os
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

import analysis
import tracking
from tests.conftest import ROOT
from tracking import StoreError, claims, keys, owners
from tracking.errors import StoreAwayError, in_one_line

PARAMS = {"model": "lenet5", "dataset": "d", "device": "cpu", "seed": 1, **dict.fromkeys(keys.GROUP_PARAMS, 1)}
TAGS = {"task": "task3", "fingerprint": "f" * 64, "dataset_digest": "0" * 64, "source_digest": "s", "git_commit": "c"}


def scores(value: float) -> dict[str, float]:
    return {"test/accuracy": value, "best_val/accuracy": value, "best_epoch": 1, "train_seconds": 2.0}


def do(parent: tracking.Parent, split: int, value: float, params=PARAMS, tags=TAGS) -> str | None:
    """Do a split's run, and return its id; None where there was nothing to do."""
    claimed = claim(parent, split, params, tags)
    if not claimed.is_ours:
        return None
    with tracking.child_run(parent.store, claimed) as run:
        run.log_metrics(scores(value))
    return run.id


def claim(parent: tracking.Parent, split: int, params=PARAMS, tags=TAGS) -> tracking.Claim:
    return tracking.claim(parent, f"split {split}", params | {"split": split}, own_tags(split, tags))


def own_tags(split: int, tags=TAGS) -> dict[str, str]:
    return tags | {"fingerprint": f"{tags['fingerprint']}{split}"}


def open_parent(store: tracking.Store, params=PARAMS, tags=TAGS) -> contextlib.AbstractContextManager[tracking.Parent]:
    return tracking.parent_run(store, "task3", "lenet5", params, tags)


def test_a_parent_is_found_again_and_finished_splits_are_left(store_uri: str) -> None:
    store = tracking.open_store(store_uri)
    with open_parent(store) as parent:
        first = do(parent, 0, 0.1)
        do(parent, 1, 0.5)
    with open_parent(store) as again:
        assert again.id == parent.id  # the same configuration is the same parent
        assert do(again, 0, 0.7) is None
        broken = claim(again, 2)
        with pytest.raises(RuntimeError), tracking.child_run(store, broken):
            raise RuntimeError("out of order")
        again.log_metrics({"mean/test/accuracy": 0.6, "low/test/accuracy": 0.5, "n_splits": 2})
    with open_parent(store, tags=TAGS | {"fingerprint": "g"}) as other:
        assert other.id != parent.id

    metrics = store.client.get_run(parent.id).data.metrics
    assert metrics == {"mean/test/accuracy": 0.6, "low/test/accuracy": 0.5, "n_splits": 2}
    assert "superseded_by" not in store.client.get_run(first).data.tags
    runs = analysis.load_runs(["task3", "task1"], store_uri)
    assert runs["status"].tolist() == ["FINISHED", "FINISHED", "FAILED"]
    assert runs["failure"].iloc[-1] == "out of order"
    with open_parent(store) as once_more:
        assert do(once_more, 2, 0.9) == broken.run_id  # what failed is tried again, in its run
    assert analysis.load_runs(["task3"], store_uri)["status"].eq("FINISHED").all()
    assert "failure" not in store.client.get_run(broken.run_id).data.tags


def test_what_is_to_be_done_again_counts_until_it_has_been(store_uri: str) -> None:
    store = tracking.open_store(store_uri)
    with open_parent(store) as parent:
        old = do(parent, 0, 0.1)
        tracking.begin_again(store, "task3", own_tags(0))
        with pytest.raises(KeyboardInterrupt), tracking.child_run(store, claim(parent, 0)) as interrupted:
            raise KeyboardInterrupt
        runs = analysis.load_runs(["task3"], store_uri)
        assert analysis.finished(runs)["run_id"].tolist() == [old]  # still the result
        assert do(parent, 0, 0.2) == interrupted.id  # what was begun goes on
        assert do(parent, 0, 0.3) is None
    assert superseded(store, [old, interrupted.id]) == [interrupted.id, None]
    runs = analysis.load_runs(["task3"], store_uri)
    assert analysis.finished(runs)["test/accuracy"].tolist() == [0.2]


def test_a_split_run_again_by_other_code_supersedes_the_older_run_until_that_comes_back(store_uri: str) -> None:
    store = tracking.open_store(store_uri)
    settings = [(PARAMS | {"lr": lr}, TAGS | {"fingerprint": mark}) for mark, lr in (("f", 1), ("g", 1), ("h", 2))]
    ids = []
    for params, tags in settings:  # the third is another comparison group
        with open_parent(store, params, tags) as parent:
            ids.append(do(parent, 0, 0.5, params, tags))
    assert superseded(store, ids) == [ids[1], None, None]
    with open_parent(store, *settings[0]) as parent:
        assert do(parent, 0, 0.5, *settings[0]) is None
    assert superseded(store, ids) == [None, ids[0], None]
    tracking.begin_again(store, "task3", own_tags(0, settings[1][1]))  # what others superseded can be done again, too
    with open_parent(store, *settings[1]) as parent:
        newest = do(parent, 0, 0.5, *settings[1])
    assert newest is not None and superseded(store, ids) == [newest, newest, None]


def superseded(store: tracking.Store, ids: list[str]) -> list[str | None]:
    return [store.client.get_run(run_id).data.tags.get("superseded_by") for run_id in ids]


def test_interrupted_runs_are_killed_and_go_on(store_uri: str) -> None:
    store = tracking.open_store(store_uri)
    with pytest.raises(KeyboardInterrupt), open_parent(store) as parent:
        parent.begin()
        with tracking.child_run(store, claim(parent, 0)):
            raise KeyboardInterrupt
    assert store.client.get_run(parent.id).info.status == "KILLED"
    assert analysis.load_runs(["task3"], store_uri)["status"].tolist() == ["KILLED"]
    with open_parent(store) as parent:
        do(parent, 0, 0.5)
    assert store.client.get_run(parent.id).info.status == "FINISHED"
    assert analysis.load_runs(["task3"], store_uri)["status"].tolist() == ["FINISHED"]


HISTORY = [{"epoch": epoch, "time": 1000 + epoch, "metrics": {"val/loss": 1 / epoch, "lr": 0.1}} for epoch in (1, 2, 3)]


def test_an_epoch_is_never_logged_twice(store_uri: str) -> None:
    store = tracking.open_store(store_uri)
    with open_parent(store) as parent:
        claimed = claim(parent, 0)
        with pytest.raises(KeyboardInterrupt), tracking.child_run(store, claimed) as run:
            run.log_epochs(HISTORY[:1])
            tracking.save_progress(claimed, TAGS, HISTORY[:2], {})  # killed before the second was logged
            raise KeyboardInterrupt
        again = claim(parent, 0)
        assert (again.run_id, again.saved["history"]) == (run.id, HISTORY[:2])
        with tracking.child_run(store, again) as run:
            run.log_epochs(HISTORY)
            run.log_metrics(scores(0.5), timestamp=1003)
            run.log_metrics(scores(0.5), timestamp=1003)
        assert not claimed.resume_file.exists()
    for key, n in (("val/loss", 3), ("lr", 3), ("test/accuracy", 1)):
        assert [point.step for point in store.client.get_metric_history(run.id, key)] == [[0], [1, 2, 3]][n == 3]


def test_a_run_with_more_epochs_than_its_resume_file_is_left_and_begun_anew(store_uri: str) -> None:
    store = tracking.open_store(store_uri)
    with open_parent(store) as parent:
        claimed = claim(parent, 0)
        with pytest.raises(KeyboardInterrupt), tracking.child_run(store, claimed) as run:
            run.log_epochs(HISTORY)
            raise KeyboardInterrupt
        for saved in (None, HISTORY[:2]):  # it was lost; it is of before
            if saved:
                tracking.save_progress(claimed, TAGS, saved, {})
            again = claim(parent, 0)
            assert again.run_id != run.id
            assert (again.saved and again.saved["history"]) == saved
            with contextlib.suppress(KeyboardInterrupt), tracking.child_run(store, again):
                raise KeyboardInterrupt


OTHER_PROCESS = """
import sys
import tracking
uri, params, tags, split_params, split_tags = {arguments!r}
store = tracking.open_store(uri)
with tracking.parent_run(store, "task3", "lenet5", params, tags) as parent:
    parent.begin()
    claimed = tracking.claim(parent, "split 0", split_params, split_tags)
    with tracking.child_run(store, claimed), store.scratch():
        print("at work", flush=True)
        sys.stdin.read()
"""


def test_a_live_process_is_left_alone_and_a_killed_one_is_taken_over(store_uri: str) -> None:
    store = tracking.open_store(store_uri)
    code = OTHER_PROCESS.format(arguments=(store_uri, PARAMS, TAGS, PARAMS | {"split": 0}, own_tags(0)))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    other = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **pipes)
    assert other.stdout is not None and other.stdout.readline() == "at work\n"
    tracking.close_dead_runs(store, "task3")
    with open_parent(store) as parent:
        claimed = claim(parent, 0)
        assert not claimed.is_ours and claimed.owner == f"process {other.pid}"
        assert do(parent, 1, 0.5) is not None
    assert store.client.get_run(parent.id).info.status == "RUNNING"  # since the other still is
    statuses = analysis.load_runs(["task3"], store_uri).set_index("split")["status"]
    assert statuses.to_dict() == {0: "RUNNING", 1: "FINISHED"}
    other.kill()  # and not waited for: a zombie is dead, too
    while not (dead := psutil.Process(other.pid).status() == psutil.STATUS_ZOMBIE):
        time.sleep(0.01)
    assert dead and len(list(store.state.glob("scratch-*"))) == 1
    tracking.close_dead_runs(store, "task3")
    assert list(store.state.glob("scratch-*")) == []
    runs = analysis.load_runs(["task3"], store_uri).set_index("split")
    assert runs.loc[0, "status"] == "KILLED" and "without a word" in runs.loc[0, "failure"]
    assert store.client.get_run(parent.id).info.status == "KILLED"
    with open_parent(store) as parent:
        assert do(parent, 0, 0.5) == runs.loc[0, "run_id"]
    assert store.client.get_run(parent.id).info.status == "FINISHED"
    other.communicate()


class Clock:
    """A clock that runs while a process sleeps; the first sleeps do something on another machine."""

    def __init__(self, *actions: Callable[[], object]) -> None:
        self.now = time.time()
        self.actions = list(actions)

    def time(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        if self.actions:
            self.actions.pop(0)()


def test_runs_on_other_machines_are_told_by_their_heartbeat(store_uri: str, monkeypatch) -> None:
    store = tracking.open_store(store_uri)
    with open_parent(store) as parent:
        run_id = claim(parent, 0).run_id
        store.client.set_tag(run_id, "owner", "elsewhere 17 1700000000")
        assert claim(parent, 0).is_ours  # an earlier attempt of this command, on a machine that is gone
        store.client.set_tag(run_id, "command", "elsewhere 16 1700000000")
        store.client.set_tag(run_id, "owner", "elsewhere 17 1700000000")
        theirs = claim(parent, 0)
        assert (theirs.is_ours, theirs.owner, theirs.elsewhere) == (False, "process 17 on elsewhere", True)
        tracking.close_dead_runs(store, "task3")
        assert store.client.get_run(run_id).info.status == "RUNNING"
        # it gives a sign of life while it is waited for; then it gives none
        beats = f"{time.time() + 5:.0f}"
        clock = Clock(lambda: None, lambda: store.client.set_tag(run_id, "heartbeat", beats))
        monkeypatch.setattr(owners, "time", clock)
        assert not tracking.wait_and_claim(parent, "split 0", {**PARAMS, "split": 0}, own_tags(0), theirs).is_ours
        assert clock.actions == []
        monkeypatch.setattr(owners, "SILENCE", 8.0)
        mine = tracking.wait_and_claim(parent, "split 0", {**PARAMS, "split": 0}, own_tags(0), theirs)
        assert (mine.is_ours, mine.run_id) == (True, run_id) and clock.now >= float(beats) + owners.SILENCE
        store.client.set_tag(run_id, "command", "elsewhere 16 1700000000")
        store.client.set_tag(run_id, "owner", "elsewhere 17 1700000000")
        store.client.set_tag(run_id, "heartbeat", f"{clock.now - 9:.0f}")
        tracking.close_dead_runs(store, "task3")
        assert store.client.get_run(run_id).info.status == "KILLED"
        assert do(parent, 0, 0.5) == run_id


def test_what_other_versions_or_hardware_began_is_begun_anew(store_uri: str) -> None:
    store = tracking.open_store(store_uri)
    with open_parent(store) as parent:
        old = TAGS | {"versions": "torch 1", "hardware": "chip"}
        claimed = claim(parent, 0, tags=old)
        with pytest.raises(KeyboardInterrupt), tracking.child_run(store, claimed) as run:
            tracking.save_progress(claimed, old, HISTORY, {})
            run.log_epochs(HISTORY)
            raise KeyboardInterrupt
        again = claim(parent, 0, tags=old | {"versions": "torch 2"})
        assert again.is_ours and again.run_id != run.id and again.saved is None


def test_a_claim_that_is_interrupted_or_repeated_leaves_one_run(store_uri: str, monkeypatch) -> None:
    store = tracking.open_store(store_uri)
    complete, errors = claims.log_missing_params, [StoreAwayError("for a moment"), KeyboardInterrupt()]

    def fail_first(*arguments: object) -> None:
        if arguments[2].get("split") == 0 and errors:
            raise errors.pop(0)
        complete(*arguments)

    monkeypatch.setattr(claims, "log_missing_params", fail_first)
    with open_parent(store) as parent:
        with pytest.raises(KeyboardInterrupt):
            claim(parent, 0)
        assert analysis.load_runs(["task3"], store_uri)["status"].tolist() == ["KILLED"]
        do(parent, 0, 0.5)
    assert analysis.load_runs(["task3"], store_uri)["status"].tolist() == ["FINISHED"]
    assert store.client.get_run(parent.id).info.status == "FINISHED"


def test_finished_splits_of_a_deleted_parent_are_kept(store_uri: str) -> None:
    store = tracking.open_store(store_uri)
    with open_parent(store) as deleted:
        do(deleted, 0, 0.5)
    store.client.delete_run(deleted.id)
    with open_parent(store) as parent:
        assert parent.id != deleted.id and do(parent, 0, 0.6) is None
    assert analysis.load_runs(["task3"], store_uri, parent.id)["test/accuracy"].tolist() == [0.5]


def test_passwords_are_hidden_wherever_a_store_is_named() -> None:
    text = "API request to http://user:secret@host:5000/api failed; postgresql://h/db?user=u&password=secret&x=1"
    assert in_one_line(ValueError("http://anna:se@cret@host:5000/ fails")) == "http://anna:***@host:5000/ fails"
    hidden = in_one_line(ValueError(text))
    assert "secret" not in hidden and "http://user:***@host:5000/api" in hidden and "password=***&x=1" in hidden


def test_a_process_number_given_again_is_another_process() -> None:
    mine = owners.signs_of_life("a command")
    assert owners.is_alive(mine)
    host, pid, started = mine["owner"].split()
    assert not owners.is_alive(mine | {"owner": f"{host} {pid} {started}0"})
    assert not owners.is_alive({"owner": "nonsense"}) and not owners.is_alive({})


def test_every_key_is_known_and_explained(store_uri: str) -> None:
    store = tracking.open_store(store_uri)
    with tracking.parent_run(store, "task3", "lenet5", PARAMS, TAGS) as run:
        with pytest.raises(StoreError, match="acuracy not in tracking.keys"):
            run.log_metrics({"acuracy": 1.0})
        with pytest.raises(StoreError, match="val/los not in tracking.keys"):
            run.log_epochs([{"epoch": 1, "time": 1, "metrics": {"val/los": 1.0}}])
        run.log_epochs(HISTORY)
        run.log_dataset("d", "a" * 64, "{}")
    history = store.client.get_metric_history(run.id, "val/loss")
    assert [(point.step, point.value) for point in history] == [(1, 1.0), (2, 1 / 2), (3, 1 / 3)]
    inputs = store.client.get_run(run.id).inputs.dataset_inputs
    assert [(entry.dataset.name, entry.dataset.digest) for entry in inputs] == [("d", "a" * 36)]
    for group in (keys.PARAMS, keys.EPOCH_METRICS, keys.FINAL_METRICS, keys.TAGS):
        assert all(len(meaning) > 10 for meaning in group.values())
    assert set(keys.UNTAGGED_EXPERIMENTS.values()) == {"task1", "task2", "task3"}


def test_store_is_made_whole_in_wal_mode_with_absolute_artifacts(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = tracking.open_store("sqlite:///relative/mlflow.db", create=True)
    database = tmp_path / "relative" / "mlflow.db"
    assert store.uri == f"sqlite:///{database}"
    with sqlite3.connect(database) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    experiment = store.client.get_experiment(store.make_experiment("task3"))
    assert experiment.artifact_location == (database.parent / "artifacts" / "task3-fashion-mnist").as_uri()
    assert {path.name for path in tmp_path.iterdir()} == {"relative"}
    assert store.runs_link("task3").endswith(
        f"/#/experiments/{experiment.experiment_id}/runs?workflowType=machine_learning"
    )


def at_once(count: int, action: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call a function in several new processes at the same moment; return what each returned."""
    context = multiprocessing.get_context("forkserver")  # one process imports MLflow for all
    context.set_forkserver_preload(["mlflow", action.__module__])
    barrier = context.Barrier(count)
    pipes = [context.Pipe(duplex=False) for _ in range(count)]
    processes = [
        context.Process(target=answer, args=(writer, barrier, action, arguments), daemon=True) for _, writer in pipes
    ]
    for process in processes:
        process.start()
    for _, writer in pipes:
        writer.close()  # else the end of a process that failed would not be seen
    results = [reader.recv() for reader, _ in pipes]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * count
    return results


def answer(
    writer: multiprocessing.connection.Connection, barrier: multiprocessing.synchronize.Barrier,
    action: Callable[..., Any], arguments: tuple[Any, ...],
) -> None:  # fmt: skip
    barrier.wait(timeout=200)
    writer.send(action(*arguments))


def make_experiment(uri: str, *task_and_name: str) -> str:
    return tracking.open_store(uri, create=True).make_experiment(*task_and_name)


def test_processes_that_start_at_once_on_a_fresh_store(tmp_path: Path) -> None:
    answers = at_once(3, make_experiment, f"sqlite:///{tmp_path / 'mlflow.db'}", "task2")
    assert len(set(answers)) == 1 and "" not in answers


def test_processes_that_make_an_experiment_at_once_make_one(store_uri: str) -> None:
    answers = at_once(2, make_experiment, store_uri, "photos", "my photos")
    experiments = tracking.open_store(store_uri).client.search_experiments(filter_string="tags.task = 'photos'")
    assert [experiment.experiment_id for experiment in experiments] == answers[:1] == answers[1:]
    assert [experiment.name for experiment in experiments] == ["my photos"]


def test_an_experiment_that_another_process_makes_in_between_is_used(store_uri: str, monkeypatch) -> None:
    # As between two machines, which share no lock.
    store = tracking.open_store(store_uri)
    create = store.client.create_experiment

    def second(*arguments: object, **options: object) -> str:
        create(*arguments, **options)
        return create(*arguments, **options)

    monkeypatch.setattr(store.client, "create_experiment", second)
    made = store.make_experiment("photos", "my photos")
    assert store.client.get_experiment(made).tags == {keys.TASK: "photos"}
    assert store.tasks() == ["photos"] and store.make_experiment("photos") == made


@pytest.mark.parametrize(("task", "name", "tags"), [
    ("photos", "my photos", {}),
    ("photos", "my photos", {"task": "other"}),
    ("photos", "", {"team": "theirs"}),  # called as the task
    ("task3", "", {"task": "other"}),
])  # fmt: skip
def test_a_foreign_experiment_of_the_same_name_is_one_sentence(
    task: str, name: str, tags: dict[str, str], store_uri: str
) -> None:
    store = tracking.open_store(store_uri)
    theirs = name or {"task3": "task3-fashion-mnist"}.get(task, task)
    foreign = store.client.create_experiment(theirs, tags=tags)
    with pytest.raises(StoreError, match=f"has an experiment '{theirs}' that does not belong to {task}; ") as error:
        store.make_experiment(task, name)
    assert "\n" not in str(error.value)
    assert store.experiment_id(task) is None and task not in store.tasks()
    assert store.client.get_experiment(foreign).tags == tags
    made = store.make_experiment(task, "another name")
    assert store.experiment_id(task) == made != foreign


EARLIER = {"task1": "task1-cats-vs-dogs", "task2": "task2-chihuahua-vs-muffin", "task3": "task3-fashion-mnist"}
EARLIER_PARAMS = {key: value for key, value in PARAMS.items() if key not in keys.SEEDS}


def earlier_store(uri: str) -> tuple[dict[str, str], str]:
    """Fill a store as earlier versions did: experiments without tags, one seed. Return their ids and a run's."""
    client = tracking.open_store(uri).client
    folder = Path(uri.removeprefix("sqlite:///")).parent / "artifacts"
    ids = {task: client.create_experiment(name, (folder / name).as_uri()) for task, name in EARLIER.items()}
    tags = TAGS | {"fingerprint": "earlier", "owner": "elsewhere 17 1700000000", "heartbeat": "1700000000"}
    parent = client.create_run(ids["task3"], 1000, tags, "lenet5")
    child = client.create_run(
        ids["task3"], 1001, tags | {"fingerprint": "earlier0", keys.PARENT: parent.info.run_id}, "lenet5 split 0"
    )
    for run, params in ((parent, EARLIER_PARAMS), (child, EARLIER_PARAMS | {"split": 0, "n_train": 2, "n_val": 2})):
        for key, value in params.items():
            client.log_param(run.info.run_id, key, value)
        client.log_metric(run.info.run_id, "mean/test/accuracy" if run is parent else "test/accuracy", 0.5)
        client.log_text(run.info.run_id, "weights", keys.CHECKPOINT)
        client.set_terminated(run.info.run_id, "FINISHED", 2000)
    return ids, child.info.run_id


def test_a_store_of_an_earlier_version_is_read_and_written_as_before(store_uri: str) -> None:
    ids, old = earlier_store(store_uri)
    store = tracking.open_store(store_uri)
    assert store.tasks() == sorted(EARLIER)
    assert {task: store.experiment_id(task) for task in EARLIER} == ids
    before = analysis.load_runs(["task3"], store_uri)
    assert before["run_id"].tolist() == [old] and before[["split_seed", "train_seed"]].eq(1).all(axis=None)
    with open_parent(store) as parent:
        assert parent.experiment == ids["task3"]  # the runs of both versions are in one experiment
        claimed = claim(parent, 0, PARAMS | {"n_train": 2, "n_val": 2})
        with tracking.child_run(store, claimed) as run:
            run.log_metrics(scores(0.7))
        other = do(parent, 1, 0.6, PARAMS | {"train_seed": 2})
    store.describe_experiment("task3", "explained")
    assert store.client.get_experiment(ids["task3"]).tags[keys.TASK] == "task3"  # from now on it has the tag
    assert store.experiment_id("task3") == ids["task3"] and len(store.client.search_experiments()) == 4
    assert superseded(store, [old, run.id, other]) == [run.id, None, None]  # by the new run of its group
    after = analysis.load_runs(["task3"], store_uri)
    groups = analysis.comparison_groups(after)
    assert [group["run_id"].tolist() for group in groups] == [[old, run.id]]  # the third lacks n_train
    with open_parent(store, EARLIER_PARAMS, TAGS | {"fingerprint": "earlier"}) as parent:
        assert not claim(parent, 0, EARLIER_PARAMS, TAGS | {"fingerprint": "earlier"}).is_ours  # it comes back
    assert superseded(store, [old, run.id, other]) == [None, old, None]


def test_seeds_of_earlier_runs_divide_groups(store_uri: str) -> None:
    _, old = earlier_store(store_uri)
    store = tracking.open_store(store_uri)
    for split_seed, train_seed in ((1, 2), (2, 1), (2, 2)):
        params = PARAMS | {"split_seed": split_seed, "train_seed": train_seed, "n_train": 2, "n_val": 2}
        tags = TAGS | {"fingerprint": f"{split_seed}{train_seed}"}
        with open_parent(store, params, tags) as parent:
            do(parent, 0, 0.5, params, tags)
    groups = analysis.comparison_groups(analysis.load_runs(["task3"], store_uri))
    assert [len(group) for group in groups] == [1] * 4 and superseded(store, [old]) == [None]


def test_stores_that_cannot_be_used_say_so_in_one_sentence(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        for uri, sentence in {
            f"http://127.0.0.1:{port}": "does not answer",
            f"sqlite:///{tmp_path / 'nowhere.db'}": "there is no result database",
            str(tmp_path): "plain folder",
            "nosuch://host/db": "cannot open",
            "http://localhost:abc": "does not answer",
            "sqlite://": "names no file",
            f"sqlite:///{tmp_path}": "cannot open the result database .*: it is a folder",
            "postgresql://user:secret@127.0.0.1:9/db": "cannot open",
        }.items():
            with pytest.raises(StoreError, match=sentence) as error:
                tracking.open_store(uri)
            assert "\n" not in str(error.value) and "secret" not in str(error.value)
    (tmp_path / "text.db").write_text("this is no database, " * 100)
    with pytest.raises(StoreError, match="not a database; name another file, or put a backup in its place"):
        tracking.open_store(f"sqlite:///{tmp_path / 'text.db'}")


def test_server_that_refuses_is_reported(tmp_path: Path) -> None:
    class Refusing(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(401)

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(StoreError, match="401"):
            tracking.open_store(f"http://127.0.0.1:{server.server_port}")
        server.shutdown()


def test_checkpoint_rebuilds_its_model(tmp_path: Path) -> None:
    import torch

    import models
    from tracking.checkpoints import Checkpoint

    arguments = {"in_channels": 1, "num_classes": 3, "image_size": 28}
    model = models.build("resnetcnn", **arguments).to(memory_format=torch.channels_last)
    saved = Checkpoint("resnetcnn", arguments, 4, 0.5, torch.tensor([1.0]), torch.tensor([2.0]), model.state_dict())
    saved.save(tmp_path / "checkpoint" / "best.pt")
    loaded = Checkpoint.load(tmp_path / "checkpoint" / "best.pt")
    again = models.build(loaded.model, **loaded.arguments).to(memory_format=torch.channels_last)
    again.load_state_dict(loaded.state_dict)
    images = torch.randn(2, 1, 28, 28)
    assert torch.equal(again.eval()(images), model.eval()(images))
    assert (loaded.epoch, loaded.score, loaded.mean.item(), loaded.std.item()) == (4, 0.5, 1.0, 2.0)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_full_disk_is_an_oserror_with_its_reason() -> None:
    import torch

    from tracking.checkpoints import Checkpoint

    checkpoint = Checkpoint("lenet5", {}, 1, 0.0, torch.zeros(1), torch.ones(1), {"w": torch.zeros(100_000)})
    with pytest.raises(OSError, match=os.strerror(28)):
        checkpoint.save(Path("/dev/full"))
