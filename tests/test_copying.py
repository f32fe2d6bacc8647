"""`python -m tracking copy`: what arrives, what is left alone, and what happens when it is interrupted."""

import contextlib
import dataclasses
import itertools
import json
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import analysis
import tracking
from analysis.__main__ import app as analysis_app
from tests.conftest import help_and_modules, new_store, run_task3, snapshot
from tests.servers import tracking_server
from tests.test_tracking import EARLIER, HISTORY, TAGS, at_once, claim, do, earlier_store, open_parent, own_tags, scores
from tracking import keys, owners
from tracking.__main__ import app
from tracking.artifacts import file_digests
from tracking.copying import Report, copy_task

pytestmark = pytest.mark.slow

try:
    import resource
except ImportError:  # Windows
    resource = None


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)  # which the command sets


@pytest.fixture
def other_uri(empty_database: Path, tmp_path: Path) -> str:
    """The URI of a second empty store."""
    return new_store(empty_database, tmp_path / "other")


def copy(source: str, destination: str) -> Report:
    return copy_task(tracking.open_store(source), tracking.open_store(destination, create=True), "task3")


def counts(report: Report) -> tuple[int, int, int, int]:
    return report.copied, report.there, report.running, report.elsewhere


def contents(uri: str) -> dict[str, dict[str, Any]]:
    """All that a store has of each run that is not deleted, without the ids, which differ from store to store."""
    client = tracking.open_store(uri).client
    runs = client.search_runs([tracking.open_store(uri).experiment_id("task3")])
    names = {run.info.run_id: f"{run.data.tags.get('fingerprint')} {run.info.start_time}" for run in runs}
    files = analysis.query.local_path
    found = {}
    for run in runs:
        tags = {key: names.get(value, value) for key, value in run.data.tags.items() if key != "figures_of"}
        points = {
            key: sorted((p.step, p.timestamp, repr(p.value)) for p in client.get_metric_history(run.info.run_id, key))
            for key in run.data.metrics
        }
        latest = {key: repr(value) for key, value in run.data.metrics.items()}
        folder = files(analysis.query._artifact_uri(run.info.run_id, uri))
        info = run.info.run_name, run.info.status, run.info.start_time, run.info.end_time
        inputs = [entry.dataset.to_dictionary() for entry in run.inputs.dataset_inputs]
        found[names[run.info.run_id]] = {
            **{"info": info, "params": run.data.params, "tags": tags, "points": points, "latest": latest},
            **{"inputs": inputs, "files": file_digests(folder)},
        }
    assert len(found) == len(runs)  # none is there twice
    return found


def everything(uri: str) -> tuple[list[str], dict[str, tuple[int, int]]]:
    """Each row of a database, and time and size of each file beside it."""
    path = Path(uri.removeprefix("sqlite:///"))
    with sqlite3.connect(path) as connection:
        rows = list(connection.iterdump())
    return rows, snapshot(path.parent / "artifacts")


def make(uri: str, splits: tuple[int, ...] = (0, 1), value: float = 0.5) -> str:
    """Let a store have a model's splits with epochs, files and data set; return the parent's id."""
    store = tracking.open_store(uri)
    with open_parent(store) as parent:
        for split in splits:
            claimed = claim(parent, split)
            if not claimed.is_ours:
                continue
            with tracking.child_run(store, claimed) as run, store.scratch() as scratch:
                folder = Path(scratch)
                (folder / "checkpoint").mkdir()
                (folder / keys.CHECKPOINT).write_text(f"weights {split} {value}")
                (folder / keys.HISTORY).write_text(json.dumps(HISTORY))
                run.set_tag("file_digests", json.dumps(file_digests(folder)))
                run.log_files(folder)
                run.log_dataset("d", TAGS["dataset_digest"], "{}")
                run.log_epochs(HISTORY, wait=True)
                run.log_metrics(scores(value), timestamp=1003)
        parent.log_metrics({"mean/test/accuracy": value, "n_splits": len(splits)})
        return parent.id


@pytest.fixture(scope="module")
def finished(empty_database: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store as the scripts leave it, with a superseded run and a failed one; it was moved since."""
    folder = tmp_path_factory.mktemp("copying") / "made"
    new_store(empty_database, folder)
    options = ("--epochs", "1", "--no-baselines", "--lr", "1e30", "-m", "lenet5")
    run_task3(folder, *options, "-m", "resnetcnn", code=1)  # tanh keeps LeNet-5 finite, whatever its weights
    run_task3(folder, *options, "--split", "0", "--fresh")
    return f"sqlite:///{folder.rename(folder.with_name('moved')) / 'mlflow.db'}"


def test_a_copy_gives_the_same_table_and_verifies(finished: str, tmp_path: Path, run_command) -> None:
    before = everything(finished)
    destination = f"sqlite:///{tmp_path / 'new' / 'mlflow.db'}"
    result = run_command("-m", "tracking", "copy", "--from", finished, "--to", destination)
    assert result.returncode == 0 and result.stderr == "", result.stdout + result.stderr
    assert "task3: 7 copied, 0 already there, 0 left out (still running); verified: " in result.stdout
    assert everything(finished) == before
    assert contents(destination) == contents(finished)
    statuses = sorted(entry["info"][1] for entry in contents(destination).values())
    assert statuses == ["FAILED"] * 3 + ["FINISHED"] * 4  # parents among them
    superseded = [entry for entry in contents(destination).values() if "superseded_by" in entry["tags"]]
    assert [entry["tags"]["superseded_by"] in contents(destination) for entry in superseded] == [True]

    copied = everything(destination)
    result = command("--from", finished, "--to", destination, "task3")
    assert result.exit_code == 0 and result.stderr == ""
    assert "task3: 0 copied, 7 already there, 0 left out (still running); verified: nothing" in result.stdout
    assert everything(destination) == copied
    table = ("table", "task3", "--tracking-uri")
    tables = [CliRunner().invoke(analysis_app, [*table, uri]) for uri in (finished, destination)]
    assert [result.exit_code for result in tables] == [0, 0]
    assert tables[0].stdout == tables[1].stdout and "lenet5" in tables[0].stdout
    options = ("--tracking-uri", destination)
    result = run_command("-m", "experiments", "verify", "task3", *options, CACHE_DIR="", OMP_NUM_THREADS="1")
    assert result.returncode == 0 and ", 0 differences (exact" in result.stdout, result.stdout + result.stderr


def test_through_a_tracking_server(store_uri: str, other_uri: str) -> None:
    make(store_uri)
    log_what_is_odd(store_uri)
    with tracking_server() as server:
        assert counts(copy(store_uri, server.uri)) == (4, 0, 0, 0)
        assert counts(copy(store_uri, server.uri)) == (0, 4, 0, 0)
        report = copy(server.uri, other_uri)
    assert counts(report) == (4, 0, 0, 0) and report.verified["files"] == 4
    assert contents(other_uri) == contents(store_uri)


def log_what_is_odd(uri: str) -> None:
    """Add a run made by hand, with many points, and with some that are hard to copy."""
    store = tracking.open_store(uri)
    run_id = store.client.create_run(store.make_experiment("task3"), run_name="by hand").info.run_id
    for step, value in ((1, float("nan")), (1, 2.0), (2, float("inf")), (2, float("-inf")), (3, 5e-324), (3, -0.1)):
        store.client.log_metric(run_id, "val/loss", value, timestamp=1000, step=step)
    store.client.log_metric(run_id, "nothing but NaN", float("nan"), timestamp=1000)
    with sqlite3.connect(uri.removeprefix("sqlite:///")) as connection:
        row = "INSERT INTO metrics VALUES ('many', ?, ?, ?, ?, 0)"
        connection.executemany(row, ((step / 3, 1000 + step, run_id, step) for step in range(2500)))
        row = "INSERT INTO latest_metrics VALUES ('many', ?, ?, ?, 0, ?)"
        connection.execute(row, (2499 / 3, 3499, 2499, run_id))
        connection.executemany("INSERT INTO params VALUES (?, 'x', ?)", ((f"p{n}", run_id) for n in range(120)))
        connection.executemany("INSERT INTO tags VALUES (?, '\"é\"', ?)", ((f"t{n}", run_id) for n in range(120)))
    store.client.set_terminated(run_id, "KILLED")


def test_all_that_was_logged_arrives(store_uri: str, other_uri: str) -> None:
    make(store_uri)
    log_what_is_odd(store_uri)
    store = tracking.open_store(store_uri)
    with pytest.raises(RuntimeError), open_parent(store, tags=TAGS | {"fingerprint": "g"}) as parent:
        with tracking.child_run(store, claim(parent, 0, tags=TAGS | {"fingerprint": "g"})):
            raise RuntimeError("out of order")
    report = copy(store_uri, other_uri)
    assert counts(report) == (6, 0, 0, 0) and report.differences == []
    assert report.verified["metric points"] > 2500 and report.verified["params"] > 120
    assert contents(other_uri) == contents(store_uri)


def test_the_experiments_tags_arrive_where_there_are_none(store_uri: str, other_uri: str) -> None:
    make(store_uri, (0,))
    source, destination = (tracking.open_store(uri) for uri in (store_uri, other_uri))
    source.describe_experiment("task3", "explained")
    destination.client.set_experiment_tag(destination.make_experiment("task3"), keys.NOTE, "theirs")
    copy(store_uri, other_uri)
    tags = destination.client.get_experiment(destination.experiment_id("task3")).tags
    assert tags[keys.NOTE] == "theirs"
    assert tags.keys() == source.client.get_experiment(source.experiment_id("task3")).tags.keys()


def test_a_store_of_an_earlier_version_is_copied_as_before(store_uri: str, other_uri: str) -> None:
    earlier_store(store_uri)
    before = everything(store_uri)
    assert counts(copy(store_uri, other_uri)) == (2, 0, 0, 0)
    assert everything(store_uri) == before
    copied = tracking.open_store(other_uri)
    assert copied.client.get_experiment(copied.experiment_id("task3")).name == EARLIER["task3"]
    assert contents(other_uri) == contents(store_uri)
    assert counts(copy(store_uri, other_uri)) == (0, 2, 0, 0)


def test_a_copy_goes_into_an_earlier_store_beside_its_runs(store_uri: str, other_uri: str) -> None:
    make(store_uri)
    ids, _ = earlier_store(other_uri)
    before = contents(other_uri)
    assert counts(copy(store_uri, other_uri)) == (3, 0, 0, 0)
    after = contents(other_uri)
    assert {key: after[key] for key in before} == before and len(after) == 5
    assert tracking.open_store(other_uri).experiment_id("task3") == ids["task3"]


def test_the_experiment_keeps_its_name_and_a_foreign_one_is_left_alone(store_uri: str, other_uri: str) -> None:
    source, destination = (tracking.open_store(uri) for uri in (store_uri, other_uri))
    source.make_experiment("task3", "garments")
    make(store_uri)
    foreign = destination.client.create_experiment("garments", tags={"team": "theirs"})
    result = command("--from", store_uri, "--to", other_uri)
    assert result.exit_code == 1 and result.stderr.startswith("Error: sqlite:///") and result.stderr.count("\n") == 1
    assert "has an experiment 'garments' that does not belong to task3" in result.stderr
    assert destination.client.search_runs([foreign]) == []
    destination.client.set_experiment_tag(foreign, keys.TASK, "task3")  # now it does
    assert command("--from", store_uri, "--to", other_uri).exit_code == 0
    assert destination.experiment_id("task3") == foreign and len(destination.client.search_runs([foreign])) == 3


def test_running_and_deleted_runs_stay(store_uri: str, other_uri: str) -> None:
    store = tracking.open_store(store_uri)
    with open_parent(store) as deleted:
        do(deleted, 0, 0.5)
    store.client.delete_run(deleted.id)
    store.client.delete_run(analysis.load_runs(["task3"], store_uri)["run_id"].iloc[0])
    with open_parent(store) as parent:
        parent.begin()
        done = do(parent, 0, 0.5)
        with tracking.child_run(store, claim(parent, 1)) as running:
            running.log_epochs(HISTORY[:1])
            with open_parent(store, tags=TAGS | {"fingerprint": "g"}) as empty:
                empty.begin()
                assert counts(copy(store_uri, other_uri)) == (2, 0, 2, 0)  # a split needs its parent, which runs
            runs = analysis.load_runs(["task3"], other_uri)
            assert runs["start_time"].tolist() == analysis.load_runs(["task3"], store_uri)["start_time"].tolist()[:1]
            assert counts(copy(store_uri, other_uri)) == (1, 2, 1, 0)
    assert counts(copy(store_uri, other_uri)) == (2, 2, 0, 0)
    assert contents(other_uri) == contents(store_uri)
    assert done is not None


def test_splits_of_two_machines_come_together(store_uri: str, other_uri: str) -> None:
    make(store_uri, (0, 1, 2))
    kept = make(other_uri, (2, 3), value=0.7)
    before = contents(other_uri)
    report = copy(store_uri, other_uri)
    assert counts(report) == (2, 2, 0, 0)
    assert report.outdated == ["lenet5"]
    runs = analysis.load_runs(["task3"], other_uri, kept).set_index("split")
    assert runs["test/accuracy"].sort_index().to_dict() == {0: 0.5, 1: 0.5, 2: 0.7, 3: 0.7}
    after = contents(other_uri)
    assert {key: after[key] for key in before} == before  # the summary, too, until the next command makes another one
    assert copy(store_uri, other_uri).outdated == []
    copy(other_uri, store_uri)  # and back: only what is not there
    assert len(analysis.load_runs(["task3"], store_uri)) == 4


def test_what_was_done_again_after_a_copy_follows(store_uri: str, other_uri: str) -> None:
    store = tracking.open_store(store_uri)
    make(store_uri, (0,), value=0.1)
    copy(store_uri, other_uri)
    for value in (0.2, 0.3):
        tracking.begin_again(store, "task3", own_tags(0))
        with open_parent(store) as parent:
            parent.begin()
            do(parent, 0, value)
    assert counts(copy(store_uri, other_uri)) == (3, 1, 0, 0)
    assert contents(other_uri) == contents(store_uri)
    tracking.begin_again(tracking.open_store(other_uri), "task3", own_tags(0))
    before = everything(other_uri)
    copy(store_uri, other_uri)  # what was decided there stays
    assert everything(other_uri) == before


class Interrupted:
    """A client that is interrupted at one of its calls, before it or after it."""

    def __init__(self, client: Any, call: int, after: bool) -> None:
        self._client = client
        self._left = call
        self._after = after

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)

        def count(*arguments: Any, **options: Any) -> Any:
            self._left -= 1
            answer = method(*arguments, **options) if self._left or self._after else None
            if not self._left:
                raise KeyboardInterrupt
            return answer

        return count


@pytest.mark.parametrize("after", [False, True])
def test_an_interrupted_copy_goes_on(after: bool, store_uri: str, other_uri: str) -> None:
    make(store_uri)
    source = tracking.open_store(store_uri)
    interrupts = 0
    for call in itertools.count(1):
        destination = tracking.open_store(other_uri)
        interrupted = dataclasses.replace(destination, client=Interrupted(destination.client, call, after))
        with contextlib.suppress(KeyboardInterrupt):
            copy_task(source, interrupted, "task3")
            break
        interrupts += 1
        runs = destination.client.search_runs([destination.make_experiment("task3")])
        running = [run.info.run_id for run in runs if run.info.status == "RUNNING"]
        assert running == [] or after  # the id of one that was just made is not known
    assert interrupts > 10
    assert contents(other_uri) == contents(store_uri)


def test_copies_at_the_same_time_make_each_run_once(store_uri: str, other_uri: str) -> None:
    make(store_uri, (0, 1, 2, 3))
    ended = at_once(2, command_in_process, "--from", store_uri, "--to", other_uri)
    assert [code for code, _ in ended] == [0, 0], ended
    assert counts(copy(store_uri, other_uri))[2:] == (0, 0)
    assert contents(other_uri) == contents(store_uri)


def test_what_another_process_is_at_is_left_to_it(store_uri: str, other_uri: str) -> None:
    make(store_uri)
    store = tracking.open_store(other_uri)
    copy(store_uri, other_uri)
    run_id = analysis.load_runs(["task3"], other_uri)["run_id"].iloc[0]
    store.client.update_run(run_id, status="RUNNING")
    for key in ("owner", "command"):
        store.client.set_tag(run_id, key, "elsewhere 17 1700000000")
    store.client.set_tag(run_id, "heartbeat", f"{time.time():.0f}")
    assert counts(copy(store_uri, other_uri)) == (0, 2, 0, 1)
    store.client.set_tag(run_id, "heartbeat", f"{time.time() - 2 * owners.SILENCE:.0f}")
    assert counts(copy(store_uri, other_uri)) == (1, 2, 0, 0)
    assert contents(other_uri) == contents(store_uri)


def test_files_go_beside_a_database_that_was_moved(store_uri: str, other_uri: str, tmp_path: Path) -> None:
    make(other_uri, (5,))
    old = Path(other_uri.removeprefix("sqlite:///")).parent
    moved = f"sqlite:///{old.rename(tmp_path / 'moved') / 'mlflow.db'}"
    make(store_uri, (0,))
    assert counts(copy(store_uri, moved)) == (1, 1, 0, 0)
    assert not old.exists()
    assert [len(entry["files"]) for entry in contents(moved).values()].count(2) == 2


def test_what_differs_is_said_and_does_not_count(store_uri: str, other_uri: str) -> None:
    make(store_uri)
    row = analysis.load_runs(["task3"], store_uri).iloc[0]
    path = analysis.local_artifact(row, keys.CHECKPOINT, store_uri)
    weights = path.read_text()
    path.write_text("other weights")
    result = command("--from", store_uri, "--to", other_uri)
    assert result.exit_code == 1
    assert f"split 0 ({row['run_id']}): files differ from the source: checkpoint/best.pt" in result.stdout
    assert analysis.load_runs(["task3"], other_uri)["status"].tolist() == ["KILLED", "FINISHED"]
    path.write_text(weights)
    assert command("--from", store_uri, "--to", other_uri).exit_code == 0
    assert contents(other_uri) == contents(store_uri)


def test_what_does_not_arrive_is_noticed(store_uri: str, other_uri: str, monkeypatch) -> None:
    make(store_uri, (0,))
    monkeypatch.setattr("shutil.copyfile", lambda _, target: target.write_text("nothing of it"))
    result = command("--from", store_uri, "--to", other_uri)
    assert result.exit_code == 1
    assert "files differ from the source: checkpoint/best.pt, history.json" in result.stdout
    monkeypatch.undo()
    assert command("--from", store_uri, "--to", other_uri).exit_code == 0
    assert contents(other_uri) == contents(store_uri)


def command(*options: str) -> Any:
    return CliRunner().invoke(app, ["copy", *options])


def command_in_process(*options: str) -> tuple[int, str]:
    result = command(*options)
    return result.exit_code, result.output


@pytest.mark.parametrize(("source", "destination", "tasks", "code", "sentence"), [
    ("made", "made", (), 1, "--from and --to are both sqlite:///"),
    ("sqlite:///nowhere/mlflow.db", "other", (), 1, "there is no result database at"),
    ("nowhere", "other", (), 1, "--from nowhere is a plain folder"),
    ("made", "nowhere", (), 1, "--to nowhere is a plain folder"),
    ("made", "http://127.0.0.1:9", (), 1, "the tracking server http://127.0.0.1:9 does not answer"),
    ("made", "nosuch://me:secret@127.0.0.1:9/x", (), 1, "nosuch://me:***@127.0.0.1:9/x"),
    ("made", "new", ("task4",), 2, "'task4' is not one of task1, task2, task3; did you mean task3?"),
    ("made", "new", ("task3", "task2"), 1, "there are no runs of task2 in sqlite:///"),
    ("other", "new", (), 1, "there are no runs of task1, task2, task3 in sqlite:///"),
    ("made", "sqlite:////dev/null/mlflow.db", (), 1, "Not a directory"),
])  # fmt: skip
def test_what_cannot_be_done_is_one_sentence(
    source: str, destination: str, tasks: tuple[str, ...], code: int, sentence: str, store_uri: str, other_uri: str,
    tmp_path: Path,
) -> None:  # fmt: skip
    tracking.open_store(store_uri).make_experiment("task3")
    uris = {"made": store_uri, "other": other_uri, "new": f"sqlite:///{tmp_path / 'new.db'}"}
    result = command("--from", uris.get(source, source), "--to", uris.get(destination, destination), *tasks)
    assert result.exit_code == code
    assert sentence in " ".join(result.stderr.replace("│", " ").split())
    assert code == 2 or (result.stderr.count("\n") == 1 and result.stderr.startswith("Error: "))
    assert "secret" not in result.output and not (tmp_path / "new.db").exists()


@pytest.fixture
def four_megabytes() -> Iterator[Callable[[], contextlib.AbstractContextManager[None]]]:
    """Limit the size of files while a block runs, as a disk that is full would."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    @contextlib.contextmanager
    def limited() -> Iterator[None]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4_096_000, limits[1]))  # Python ignores SIGXFSZ
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    yield limited
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.skipif(resource is None, reason="needs a limit on the size of files")
def test_a_full_disk_is_one_sentence(store_uri: str, other_uri: str, four_megabytes) -> None:
    make(store_uri, (0,))
    row = analysis.load_runs(["task3"], store_uri).iloc[0]
    analysis.local_artifact(row, keys.CHECKPOINT, store_uri).with_name("large").write_bytes(bytes(5_000_000))
    with four_megabytes():
        result = command("--from", store_uri, "--to", other_uri)
    assert result.exit_code == 1
    assert "Error: the copy is incomplete ([Errno 27] File too large" in result.stderr
    assert result.stderr.count("\n") == 1
    assert analysis.load_runs(["task3"], other_uri)["status"].tolist() == ["KILLED"]
    assert counts(copy(store_uri, other_uri)) == (2, 0, 0, 0)


def test_an_interrupt_says_how_to_go_on(store_uri: str, other_uri: str, monkeypatch) -> None:
    make(store_uri)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.copyfile", interrupt)
    result = command("--from", store_uri, "--to", other_uri)
    assert result.exit_code == 130 and result.stderr == "Error: interrupted; repeat the command to go on\n"
    monkeypatch.undo()
    assert command("--from", store_uri, "--to", other_uri).exit_code == 0
    assert contents(other_uri) == contents(store_uri)


def test_help_loads_no_mlflow() -> None:
    printed, modules = help_and_modules("-m", "tracking", "copy")
    assert "--from" in printed and not {"torch", "mlflow", "pandas"} & modules
