"""`python -m tracking prune`: what it removes, and what it never does."""

import shutil
import sqlite3
from pathlib import Path

import pytest

import analysis
from tests.conftest import new_store
from tracking import journal, keys, open_store, owners, pruning


@pytest.fixture
def store(finished_task3: str, tmp_path: Path):
    """A copy of a store on the sample, with one run that was repeated and one that failed."""
    origin = Path(finished_task3.removeprefix("sqlite:///")).parent
    shutil.copytree(origin, tmp_path / "copy")
    store = open_store(f"sqlite:///{tmp_path / 'copy' / 'mlflow.db'}")
    runs = analysis.load_runs(["task3"], store.uri)
    champion = store.client.get_model_version_by_alias("task3", keys.CHAMPION).run_id
    old = runs[(runs["model"] == "linear")].iloc[0]
    new = runs[(runs["model"] == "linear")].iloc[1]
    store.client.set_tag(old["run_id"], "superseded_by", new["run_id"])
    failed = runs[runs["model"] == "majority"].iloc[0]["run_id"]
    store.client.set_terminated(failed, "FAILED")
    return store, champion, old["run_id"], failed


def test_it_says_first_and_removes_runs_with_their_files_for_good(store, finished_task3: str, run_here) -> None:
    opened, champion, old, failed = store
    uri = ("--tracking-uri", opened.uri)
    before = analysis.load_runs(["task3"], opened.uri)
    said = run_here("-m", "tracking", "prune", *uri)
    assert said.returncode == 0 and "nothing was removed" in said.stdout, said.stderr
    assert len(analysis.load_runs(["task3"], opened.uri)) == len(before)
    found = pruning.find(opened, ["task3"], ["superseded", "abandoned"])
    assert {(each.kind, each.name) for each in found} == {("superseded", old), ("abandoned", failed)}
    folders = [each.folder for each in found]
    assert all(
        folder.is_relative_to(opened.database.parent) and each.size > 0
        for folder, each in zip(folders, found, strict=True)
    )
    kinds = ("--kind", "superseded", "--kind", "abandoned")
    done = run_here("-m", "tracking", "prune", "--yes", *kinds, *uri)
    assert done.returncode == 0 and "removed: 2 runs" in done.stdout, done.stderr
    assert not any(folder.exists() for folder in folders)
    with sqlite3.connect(opened.database) as connection:
        left = {run_id for (run_id,) in connection.execute("SELECT run_uuid FROM runs")}
    assert not {old, failed} & left and champion in left
    origin = analysis.load_runs(["task3"], finished_task3)  # the files of the store that was copied are another's
    assert all(Path(analysis.local_artifact(run, keys.SPLIT)).exists() for _, run in origin.iterrows())


def test_the_champion_keeps_its_model_and_strangers_their_runs(store, run_here) -> None:
    opened, champion, _, _ = store
    stranger = opened.client.create_run(opened.experiment_id("task3")).info.run_id
    opened.client.set_terminated(stranger, "FAILED")
    assert run_here("-m", "tracking", "prune", "--yes", "--tracking-uri", opened.uri).returncode == 0
    runs = analysis.load_runs(["task3"], opened.uri)
    assert champion in set(runs["run_id"]) and runs["model"].nunique() == 1
    assert len(runs) == 2  # its parent's summary is of both splits
    assert opened.client.get_run(stranger).info.lifecycle_stage == "active"
    assert len(analysis.comparison_table(runs)) == 1


def test_a_run_that_somebody_works_on_stays(store_uri: str, tmp_path: Path) -> None:
    opened = open_store(store_uri)
    experiment = opened.make_experiment("task3")
    tags = {"fingerprint": "f", "task": "task3", keys.PARENT: "p"}
    living = opened.client.create_run(experiment, tags=tags | owners.signs_of_life(opened.command)).info.run_id
    dead = opened.client.create_run(experiment, tags=tags | {"fingerprint": "g"}).info.run_id
    assert [each.name for each in pruning.find(opened, ["task3"])] == [dead]
    opened.client.set_terminated(dead, "FINISHED")
    opened.state.mkdir(exist_ok=True)
    for name in ("f", "g"):
        (opened.state / f"{name}.resume").write_bytes(b"1234")
    found = pruning.find(opened, ["task3"])
    assert [(each.kind, each.name, each.size) for each in found] == [("state", "g.resume", 4)]
    assert pruning.remove(opened, found, ["task3"]) == found
    assert [path.name for path in opened.state.glob("*.resume")] == ["f.resume"] and living


def test_a_damaged_entry_of_the_journal_is_named(store, run_here) -> None:
    opened, *_ = store
    record = opened.state / f"0{journal.ENTRY}" / journal.RECORD
    record.parent.mkdir(parents=True)
    record.write_text('{"run_id": ')
    done = run_here("-m", "tracking", "prune", "--tracking-uri", opened.uri)
    assert done.returncode == 1 and f"{record} is damaged; repair it, or remove" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_prefix_keeps_people_apart(empty_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = new_store(empty_database, tmp_path / "shared")
    ids = {}
    for prefix in ("", "anna", "ben"):
        monkeypatch.setenv("EXPERIMENT_PREFIX", prefix)
        opened = open_store(uri)
        assert opened.tasks() == [] and opened.experiment("task3") is None
        ids[prefix] = opened.make_experiment("task3")
        assert opened.tasks() == ["task3"] and opened.make_experiment("task3") == ids[prefix]
        tags = {"fingerprint": "f", "task": "task3", keys.PARENT: "p"}
        run_id = opened.client.create_run(ids[prefix], tags=tags).info.run_id
        assert list(analysis.load_runs(["task3"], uri)["run_id"]) == [run_id]
    assert len(set(ids.values())) == 3
    assert opened.client.get_experiment(ids["ben"]).name.startswith("ben-")
    monkeypatch.setenv("EXPERIMENT_PREFIX", "a-b")
    with pytest.raises(Exception, match="EXPERIMENT_PREFIX is 'a-b'"):
        opened.tasks()
