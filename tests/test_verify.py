"""`python -m experiments verify`: nothing differs in what a run left, and every change to it is found and named."""

import contextlib
import json
import math
import os
import pickle
import shutil
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

import analysis
from datasets import Split
from experiments import __main__ as command
from experiments.provenance import fingerprint
from experiments.task3 import TASK
from experiments.training import hardware
from experiments.verification import Report, checks, verify
from experiments.verification.stored_run import SplitRecord
from tests.conftest import help_and_modules
from tests.test_comparison import copy_of
from tracking import StoreError, keys
from tracking.artifacts import file_digests
from tracking.checkpoints import Checkpoint


@dataclass(frozen=True)
class Victim:
    """A run in a store of a test's own, to be changed behind the program's back."""

    folder: Path
    model: str = "lenet5"
    split: int = 0

    @property
    def uri(self) -> str:
        return f"sqlite:///{self.folder / 'mlflow.db'}"

    @property
    def run(self) -> "pd.Series[Any]":
        runs = analysis.load_runs(["task3"], self.uri)
        return runs[(runs["model"] == self.model) & (runs["split"] == self.split)].iloc[0]

    @property
    def files(self) -> Path:
        return analysis.local_artifact(self.run, keys.SPLIT, self.uri).parent

    def execute(self, statement: str, **values: Any) -> None:
        """Change at least one row; `:run` is the run's id, `:parent` its parent's."""
        run = self.run
        connection = sqlite3.connect(self.folder / "mlflow.db")
        with connection:
            values = {"run": run["run_id"], "parent": run["parent_id"], **values}
            assert connection.execute(statement, values).rowcount
        connection.close()

    def set(self, table: str, key: str, value: Any) -> None:
        self.execute(f"UPDATE {table} SET value = :value WHERE run_uuid = :run AND key = :key", key=key, value=value)

    def edit_arrays(self, name: str, edit: Callable[[dict[str, np.ndarray]], None]) -> None:
        with np.load(self.files / name) as file:
            arrays = dict(file)
        edit(arrays)
        np.savez_compressed(self.files / name, **arrays)
        self.sign()

    def edit_json(self, name: str, edit: Callable[[Any], None]) -> None:
        content = json.loads((self.files / name).read_text(encoding="utf-8"))
        edit(content)
        (self.files / name).write_text(json.dumps(content), encoding="utf-8")
        self.sign()

    def edit_checkpoint(self, edit: Callable[[Checkpoint], Checkpoint]) -> None:
        path = self.files / keys.CHECKPOINT
        edit(Checkpoint.load(path)).save(path)
        self.sign()

    def sign(self) -> None:
        """Make the digests those of the files as they are now, so that another check has to find the change."""
        self.set("tags", "file_digests", json.dumps(file_digests(self.files)))

    def verify(self) -> Report:
        return verify(TASK, "cpu", tracking_uri=self.uri)


PATHS = (("experiments", "artifact_location"), ("runs", "artifact_uri"), ("logged_models", "artifact_location"),
         ("model_versions", "source"), ("model_versions", "storage_location"))  # fmt: skip


def copy_store(uri: str, folder: Path, home: Path) -> None:
    """Copy a store to a new folder; its database says that it was made in `home`."""
    made = Path(uri.removeprefix("sqlite:///")).parent
    shutil.copytree(made, folder, ignore=shutil.ignore_patterns("mlflow.*"))
    with contextlib.closing(sqlite3.connect(copy_of(uri, folder))) as connection, connection:
        for table, column in PATHS:
            connection.execute(f"UPDATE {table} SET {column} = replace({column}, ?, ?)", (str(made), str(home)))


@pytest.fixture(scope="module")
def finished(finished_task3: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with LeNet-5 and the baselines of the shared store; it was moved since, and is not changed."""
    folder = tmp_path_factory.mktemp("verify") / "moved"
    copy_store(finished_task3, folder, folder.with_name("made"))
    runs = analysis.load_runs(["task3"], f"sqlite:///{folder / 'mlflow.db'}")
    with contextlib.closing(sqlite3.connect(folder / "mlflow.db")) as connection, connection:
        of_vggnet = "SELECT run_uuid FROM params WHERE key = 'model' AND value = 'vggnet'"
        connection.execute(f"UPDATE runs SET lifecycle_stage = 'deleted' WHERE run_uuid IN ({of_vggnet})")
    for run_id in runs.loc[runs["model"] == "vggnet", "run_id"]:
        shutil.rmtree(next(folder.glob(f"artifacts/*/{run_id}")))
    return folder


@pytest.fixture
def victim(finished: Path, tmp_path: Path) -> Victim:
    return Victim(Path(shutil.copytree(finished, tmp_path / "store")))


def test_what_a_run_left_is_derived_again_without_a_difference(finished: Path, run_command) -> None:
    options = ("task3", "--tracking-uri", Victim(finished).uri)
    result = run_command("-m", "experiments", "verify", *options)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.startswith("task3: 6 runs, ") and result.stdout.count("\n") == 1
    assert "58,800 predictions derived again, 0 differences (exact: same kind of device and threads)" in result.stdout
    assert result.stderr == ""


def change_a_bit(victim: Victim) -> None:
    path = victim.files / keys.CHECKPOINT
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def change_a_weight(victim: Victim) -> None:
    def edit(old: Checkpoint) -> Checkpoint:
        name, values = list(old.state_dict.items())[-1]
        return replace(old, state_dict=old.state_dict | {name: values + torch.eye(len(values))[0]})

    victim.edit_checkpoint(edit)


def change_the_normalisation(victim: Victim) -> None:
    victim.edit_checkpoint(lambda old: replace(old, mean=torch.nextafter(old.mean, torch.zeros(1))))


def put_a_program_into_the_checkpoint(victim: Victim) -> None:
    class Program:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(victim.folder / "it ran"),)

    (victim.files / keys.CHECKPOINT).write_bytes(pickle.dumps(Program(), protocol=2))
    victim.sign()


def put_a_program_into_the_split(victim: Victim) -> None:
    def edit(arrays: dict[str, np.ndarray]) -> None:
        arrays["train"] = np.array([{}], dtype=object)

    victim.edit_arrays(keys.SPLIT, edit)


def change_a_prediction(victim: Victim) -> None:
    def edit(arrays: dict[str, np.ndarray]) -> None:
        right = np.flatnonzero(arrays["test_pred"] == arrays["test_true"])[0]
        arrays["test_pred"][right] = (arrays["test_pred"][right] + 1) % 10

    victim.edit_arrays(keys.PREDICTIONS, edit)


def change_a_probability(victim: Victim) -> None:
    def edit(arrays: dict[str, np.ndarray]) -> None:
        arrays["val_prob"][3] = np.nextafter(arrays["val_prob"][3], np.float32(0))

    victim.edit_arrays(keys.PREDICTIONS, edit)


def predict_no_class(victim: Victim) -> None:
    def edit(arrays: dict[str, np.ndarray]) -> None:
        arrays["test_pred"][7] = -1

    victim.edit_arrays(keys.PREDICTIONS, edit)


def train_on_a_validation_image(victim: Victim) -> None:
    """Forge all that depends on the split, too."""
    changed: dict[str, np.ndarray] = {}

    def edit(arrays: dict[str, np.ndarray]) -> None:
        arrays["train"] = np.sort(np.append(arrays["train"], arrays["val"][0]))
        changed.update(arrays)

    victim.edit_arrays(keys.SPLIT, edit)
    hashed = fingerprint.split_hash(Split(**changed))
    victim.set("params", "n_train", len(changed["train"]))
    victim.set("tags", "split_hash", hashed)
    [parent] = set(analysis.load_runs(["task3"], victim.uri).query(f"model == '{victim.model}'")["parent_id"])
    connection = sqlite3.connect(victim.folder / "mlflow.db")
    query = "SELECT value FROM tags WHERE run_uuid = ? AND key = 'fingerprint'"
    [[configuration]] = connection.execute(query, (parent,))
    connection.close()
    victim.set("tags", "fingerprint", fingerprint.digest([configuration, victim.split, hashed]))


def swap_indices(victim: Victim) -> None:
    def edit(arrays: dict[str, np.ndarray]) -> None:
        arrays["val"][0], arrays["test"][0] = arrays["test"][0], arrays["val"][0]

    victim.edit_arrays(keys.SPLIT, edit)


def name_no_image(victim: Victim) -> None:
    def edit(arrays: dict[str, np.ndarray]) -> None:
        arrays["test"][-1] = 10**9

    victim.edit_arrays(keys.SPLIT, edit)


def change_a_count(victim: Victim) -> None:
    def edit(numbers: dict[str, Any]) -> None:
        numbers["val"][2][3] += 1

    victim.edit_json(keys.CONFUSION, edit)


def rename_a_class(victim: Victim) -> None:
    def edit(numbers: dict[str, Any]) -> None:
        numbers["classes"][0] = "hat"

    victim.edit_json(keys.CONFUSION, edit)


def change_the_history(victim: Victim) -> None:
    def edit(history: list[dict[str, Any]]) -> None:
        history[0]["metrics"]["train/loss"] += 1e-9

    victim.edit_json(keys.HISTORY, edit)


def shorten_the_history(victim: Victim) -> None:
    victim.edit_json(keys.HISTORY, lambda history: history.pop())


def log_an_epoch_twice(victim: Victim) -> None:
    victim.execute(
        "INSERT INTO metrics SELECT key, value, timestamp - 5, run_uuid, step, is_nan FROM metrics"
        " WHERE run_uuid = :run AND key = 'val/f1_macro' AND step = 1"
    )


def drop_an_epoch(victim: Victim) -> None:
    victim.execute("DELETE FROM metrics WHERE run_uuid = :run AND key = 'lr' AND step = 1")


def change_the_latest_value(victim: Victim) -> None:
    victim.set("latest_metrics", "test/f1_micro", 0.5)


def change_a_param(victim: Victim) -> None:
    victim.set("params", "lr", "0.002")


def lack_a_param(victim: Victim) -> None:
    victim.execute("DELETE FROM params WHERE key = 'leak_free' AND run_uuid = :run")


def truncate(victim: Victim) -> None:
    path = victim.files / keys.PREDICTIONS
    path.write_bytes(path.read_bytes()[:-100])


def lose_a_file(victim: Victim) -> None:
    (victim.files / keys.THUMBNAILS).unlink()


def lose_the_folder(victim: Victim) -> None:
    shutil.rmtree(victim.files)


def come_from_an_older_version(victim: Victim) -> None:
    (victim.files / keys.HISTORY).unlink()
    victim.execute("DELETE FROM tags WHERE key = 'file_digests' AND run_uuid = :run")


def forget_a_file(victim: Victim) -> None:
    digests = json.loads(victim.run["file_digests"])
    del digests[keys.CONFUSION_FIGURE]
    victim.set("tags", "file_digests", json.dumps(digests))


CHANGES: list[tuple[Callable[[Victim], None], str, int, list[str]]] = [
    (change_a_bit, "lenet5", 0, ["checkpoint/best.pt is not the file that was logged: its SHA-256 is another"]),
    (change_a_weight, "lenet5", 1, [
        "test/loss is ", "from checkpoint/best.pt", "values of test_prob in predictions.npz are not those from"]),
    (change_a_weight, "linear", 0, ["best_val/loss is "]),
    (change_the_normalisation, "linear", 1, [
        "1 of 1 values of mean in checkpoint/best.pt are not those that follow from the training images"]),
    (put_a_program_into_the_checkpoint, "majority", 0, ["checkpoint/best.pt is damaged (UnpicklingError)"]),
    (put_a_program_into_the_split, "majority", 1, ["split.npz is damaged (ValueError)"]),
    (change_a_prediction, "lenet5", 0, [
        "1 of 4,900 values of test_pred in predictions.npz are not those from checkpoint/best.pt",
        "test/accuracy is ", "the counts of test in confusion.json are not those of predictions.npz"]),
    (change_a_probability, "lenet5", 1, [
        "1 of 4,900 values of val_prob in predictions.npz are not those from checkpoint/best.pt"]),
    (predict_no_class, "linear", 0, ["test in predictions.npz has labels that are no class"]),
    (train_on_a_validation_image, "lenet5", 0, [
        "split.npz has 1 image of val in train, too",
        "train in split.npz has another shape or type than the values that the protocol draws from the data"]),
    (swap_indices, "lenet5", 1, [
        "split.npz is not the split that split_hash was made of",
        "values of val in split.npz are not those that the protocol draws from the data"]),
    (name_no_image, "majority", 0, ["split.npz has indices that are no images"]),
    (change_a_count, "lenet5", 0, ["the counts of val in confusion.json are not those of predictions.npz"]),
    (rename_a_class, "linear", 1, ["the classes in confusion.json are not those of the data"]),
    (change_the_history, "linear", 0, ["train/loss of epoch 1 is "]),
    (shorten_the_history, "lenet5", 1, [
        "val/loss of epoch 3 is ", "missing in history.json",
        "epochs_run is 3.0 in the database, 2 from history.json"]),
    (log_an_epoch_twice, "majority", 1, ["val/f1_macro of epoch 1 was logged 2 times"]),
    (drop_an_epoch, "lenet5", 0, ["lr of epoch 1 is missing in the database, 0.001 in history.json"]),
    (change_the_latest_value, "lenet5", 1, ["test/f1_micro is 0.5 as the latest value, "]),
    (change_a_param, "majority", 0, [
        "lr is 0.002, in its parent run 0.001", "fingerprint does not follow from params, data, source and split"]),
    (lack_a_param, "majority", 1, ["it has no leak_free, without which nothing follows from its files"]),
    (truncate, "linear", 0, ["predictions.npz is damaged (BadZipFile)", "predictions.npz is not the file"]),
    (lose_a_file, "linear", 1, ["has no thumbnails.npz"]),
    (lose_the_folder, "lenet5", 0, ["has no checkpoint/best.pt", "has no split.npz", "has no history.json"]),
    (come_from_an_older_version, "lenet5", 1, [
        "it has no file_digests, so nothing proves its files", "has no history.json"]),
    (forget_a_file, "majority", 0, ["file_digests lacks confusion.png"]),
]  # fmt: skip


def test_a_change_is_found_and_named_and_nothing_else_is(finished: Path, tmp_path: Path) -> None:
    waiting = list(CHANGES)
    while waiting:  # one verification looks at one change to each run
        folder = Path(shutil.copytree(finished, tmp_path / f"{len(waiting)} left"))
        now: dict[str, Any] = {}
        for entry in waiting:
            now.setdefault(f"{entry[1]} split {entry[2]}", entry)
        waiting = [entry for entry in waiting if entry not in now.values()]
        for change, model, split, _ in now.values():
            change(Victim(folder, model, split))
        report = Victim(folder).verify()
        assert report.runs == 6
        found = {title: [line for line in report.differences if line.startswith(f"{title}: ")] for title in now}
        for title, (change, _, _, sentences) in now.items():
            for sentence in sentences:
                assert sentence in "\n".join(found[title]), change.__name__
        others = set(report.differences) - {line for lines in found.values() for line in lines}
        assert all(", all splits: " in line or "were not given the same images" in line for line in others)
    assert not list(tmp_path.rglob("it ran"))


def test_a_final_metric_that_is_off_by_one_bit_is_found(victim: Victim) -> None:
    run = victim.run
    changed = {key: float(np.nextafter(run[key], math.inf)) for key in keys.FINAL_METRICS}
    for key, value in changed.items():
        for table in ("metrics", "latest_metrics"):
            victim.set(table, key, value)
    differences = victim.verify().differences
    for key, value in changed.items():
        assert any(line.startswith(f"lenet5 split 0: {key} is {value!r} in the database, ") for line in differences)


def test_a_loss_that_is_off_by_one_bit_is_found_elsewhere_too(victim: Victim, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "describe_device", lambda device: "another processor")
    for table in ("metrics", "latest_metrics"):
        victim.set(table, "test/loss", float(np.nextafter(victim.run["test/loss"], math.inf)))
    assert any(f"from {keys.CONFUSION}" in line for line in victim.verify().differences)


def test_an_epoch_that_is_off_by_one_bit_is_found(victim: Victim) -> None:
    victim.execute(
        "UPDATE metrics SET value = value * (1 + 3e-16) WHERE run_uuid = :run AND key = 'val/loss' AND step = 1"
    )
    [line] = victim.verify().differences
    assert line.startswith("lenet5 split 0: val/loss of epoch 1 is ") and line.endswith(" in history.json")


def test_a_param_that_was_changed_in_the_parent_as_well_is_found(victim: Victim) -> None:
    victim.execute("UPDATE params SET value = '0.002' WHERE key = 'lr'")
    differences = victim.verify().differences
    assert len(differences) == 6 and all("fingerprint does not follow from params" in line for line in differences)


def test_a_summary_that_was_changed_is_found(victim: Victim) -> None:
    newest = "SELECT timestamp FROM latest_metrics WHERE run_uuid = :parent AND key = 'mean/test/loss'"
    for table in ("metrics", "latest_metrics"):
        change = f"UPDATE {table} SET value = value * (1 + 3e-16)"
        victim.execute(f"{change} WHERE run_uuid = :parent AND key = 'mean/test/loss' AND timestamp = ({newest})")
    [line] = victim.verify().differences
    assert line.startswith("lenet5, all splits: mean/test/loss is ") and line.endswith(" from its splits")


def test_models_that_were_not_given_the_same_images_are_found(victim: Victim) -> None:
    victim.set("tags", "split_hash", "0" * 64)
    assert "majority, linear, lenet5 were not given the same images" in "\n".join(victim.verify().differences)


def test_runs_that_did_not_finish_and_parents_at_work_are_left_alone(victim: Victim) -> None:
    shutil.rmtree(victim.files)
    victim.execute("UPDATE runs SET status = 'KILLED' WHERE run_uuid = :run")
    victim.execute("UPDATE runs SET status = 'RUNNING' WHERE run_uuid = :parent")
    report = victim.verify()
    assert (report.finished, report.runs, report.differences) == (5, 5, [])


def test_a_run_is_verified_unless_another_superseded_it(victim: Victim) -> None:
    victim.execute("INSERT INTO tags (run_uuid, key, value) VALUES (:run, 'superseded_by', 'a run that was deleted')")
    change_a_count(victim)
    report = victim.verify()
    assert report.runs == 6 and len(report.differences) == 1
    other = analysis.load_runs(["task3"], victim.uri)["run_id"].loc[lambda ids: ids != victim.run["run_id"]].iloc[0]
    victim.execute(f"UPDATE tags SET value = '{other}' WHERE run_uuid = :run AND key = 'superseded_by'")
    assert victim.verify().runs == 5


def test_elsewhere_a_model_may_differ_a_little(victim: Victim, monkeypatch: pytest.MonkeyPatch) -> None:
    change_a_probability(victim)
    monkeypatch.setattr(checks, "_has_threads", lambda count: False)
    report = victim.verify()
    assert report.differences == [] and (report.exact, report.near) == (0, 6)
    assert "(loss within 0.001 and 99.9% of predictions: other device, threads or versions)" in report.summary()
    monkeypatch.undo()
    monkeypatch.setattr(hardware, "describe_device", lambda device: "another processor")
    change_a_weight(victim)
    differences = victim.verify().differences
    assert any("test/loss is " in line for line in differences) and not any("_prob" in line for line in differences)


def test_of_data_that_are_not_there_all_else_is_checked(
    victim: Victim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim.set("tags", "dataset_digest", "0" * 64)
    replace(victim, model="linear").set("params", "dataset", "garments")
    replace(victim, model="majority").set("params", "dataset", "FashionMNIST")
    for model in ("lenet5", "linear"):
        change_a_count(replace(victim, model=model))
    (tmp_path / "empty").mkdir()
    differences = "\n".join(verify(TASK, "cpu", tmp_path / "empty", victim.uri).differences)
    assert "1 run could not be evaluated: the data are sample/FashionMNIST with the digest 000000000000" in differences
    assert "1 run could not be evaluated: the data are FashionMNIST with the digest " in differences
    assert "holds neither FashionMNIST/ nor train/<class>/" in differences
    for model in ("lenet5", "linear"):
        assert f"{model} split 0: the counts of val in confusion.json are not those of predictions.npz" in differences
    assert "name their folder in --data-dir" in "\n".join(victim.verify().differences)


def test_a_quick_look_takes_the_same_runs_of_all_models(victim: Victim, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at: list[str] = []

    def look(run: SplitRecord, *_: object) -> None:
        looked_at.append(run.findings.title)

    monkeypatch.setitem(verify.__globals__, "check_run", look)
    for _ in range(2):
        report = verify(TASK, "cpu", tracking_uri=victim.uri, sample_splits=4)
        assert report.summary().startswith("task3: 4 of 6 runs, ")
    assert looked_at[:4] == looked_at[4:] and len(set(looked_at)) == 4
    assert {title.split()[0] for title in looked_at} == {"lenet5", "linear", "majority"}


def test_the_command_prints_what_differs_and_fails(victim: Victim, monkeypatch: pytest.MonkeyPatch) -> None:
    lose_the_folder(victim)
    monkeypatch.setattr("tracking.commands.SHOWN", 2)
    result = CliRunner().invoke(command.app, ["verify", "task3", "--tracking-uri", victim.uri, "--device", "cpu"])
    assert result.exit_code == 1
    *shown, more, summary = result.stdout.splitlines()
    assert len(shown) == 2 and more.startswith("and ") and summary.startswith("task3: 6 runs, ")


@pytest.mark.parametrize(("arguments", "code", "sentence"), [
    (("task33",), 2, "'task33' is not one of task1, task2, task3; did you mean task3?"),
    (("task3", "--sample-splits", "0"), 2, "--sample-splits"),
    (("task3", "--device", "gpu"), 2, "'gpu' is not a device that can be used here; there are auto, cpu"),
    (("task3", "--data-dir", "nowhere"), 2, "--data-dir"),
    (("task1",), 1, "task1 has no finished run in sqlite:///"),
    (("task1", "--tracking-uri", "sqlite:////nowhere/mlflow.db"), 1, "there is no result database at /nowhere/"),
])  # fmt: skip
def test_what_cannot_be_done_is_one_sentence(
    arguments: tuple[str, ...], code: int, sentence: str, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", Victim(finished).uri)
    result = CliRunner().invoke(command.app, ["verify", *arguments])
    assert result.exit_code == code and sentence in " ".join(result.stderr.split())
    assert result.stdout == "" and not isinstance(result.exception, StoreError)


def test_help_needs_neither_torch_nor_mlflow() -> None:
    printed, modules = help_and_modules("-m", "experiments", "verify")
    for option in ("--sample-splits", "--data-dir", "--device", "--tracking-uri"):
        assert option in printed
    assert not {"torch", "mlflow", "pandas"} & modules
