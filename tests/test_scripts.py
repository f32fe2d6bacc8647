"""The scripts as a user runs them: from another folder, on the sample, good and bad input."""

import dataclasses
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
from rich.console import Console
from sklearn.metrics import confusion_matrix, f1_score
from typer.testing import CliRunner

import analysis
import datasets
import models
import tracking
from analysis.__main__ import app
from analysis.figures import draw_figures
from experiments import TrainingConfig, task1, task3
from experiments.jobs import progress, worker
from experiments.request import Request
from experiments.run import Plan, execute, make_plan, run
from experiments.run.execute import open_store
from experiments.task import find
from experiments.training.fit import EpochRecord, fit
from experiments.training.state import TrainingState
from experiments.verification import verify
from tests.commands import StartedCommand
from tests.conftest import HANGS, ROOT, help_and_modules, new_store, snapshot
from tracking import keys
from tracking.checkpoints import Checkpoint
from tracking.settings import LATER

SCRIPTS = {
    "task1": ("lenet5", "vggnet", "resnetcnn", "seresnet"),
    "task2": ("lenet5", "vggnet", "resnetcnn", "efficientnet_lite", "efficientnet_b0"),
    "task3": ("lenet5", "vggnet", "resnetcnn", "seresnet"),
}
TWO_MODELS = {"task1": ("lenet5", "vggnet"), "task2": ("lenet5", "resnetcnn"), "task3": ("lenet5", "seresnet")}
SMALL = ("--sample", "--epochs", "1", "--n-splits", "2", "--threads", "1", "-m", "lenet5")
Run = Callable[..., subprocess.CompletedProcess[str]]


class Finished(NamedTuple):
    """The store after the three scripts, their output, and the models of each."""

    uri: str
    printed: dict[str, str]
    models: Mapping[str, tuple[str, ...]]


def run_scripts(database: Path, folder: Path, chosen: Mapping[str, tuple[str, ...]]) -> Finished:
    """Run the three scripts on the sample as processes, each from a folder elsewhere."""
    uri = new_store(database, folder)
    printed = {}
    for task, names in chosen.items():
        options = ["--sample", "--epochs", "1", "--n-splits", "2", "--tracking-uri", uri]
        if names != SCRIPTS[task]:
            options += [part for name in names for part in ("-m", name)]
        started = StartedCommand((str(ROOT / "experiments" / f"{task}.py"), *options), folder, os.environ)
        printed[task], errors = started.communicate(HANGS)
        assert started.returncode == 0, errors
    assert {path.name for path in folder.iterdir()} <= {
        "mlflow.db", "mlflow.db-shm", "mlflow.db-wal", "mlflow.state", "artifacts"
    }  # fmt: skip
    return Finished(uri, printed, chosen)


@pytest.fixture(scope="module")
def finished(empty_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The three scripts with two models each."""
    return run_scripts(empty_database, tmp_path_factory.mktemp("scripts") / "finished", TWO_MODELS)


@pytest.fixture
def scores_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave figures and champion out of the end of a command, for tests of other things."""
    monkeypatch.setattr(sys.modules["experiments.run.conclude"], "log_figures", lambda *_: None)
    monkeypatch.setattr("experiments.champion.crown", lambda *_: "")


@pytest.fixture
def requested(run_here: Run, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Request]:
    """Return the request that the options of task 3 make, without running it."""

    def parse(*options: str) -> Request:
        requests: list[Request] = []
        with monkeypatch.context() as patched:
            patched.setattr("experiments.run.run", lambda request: requests.append(request) or [])
            assert run_here("experiments/task3.py", *options).returncode == 0
        return requests[0]

    return parse


@pytest.mark.parametrize("task", SCRIPTS)
def test_every_model_has_every_split(task: str, finished: Finished) -> None:
    uri, printed, chosen = finished
    models = keys.BASELINES + chosen[task]
    runs = analysis.load_runs([task], uri)
    assert runs["status"].eq("FINISHED").all()
    assert runs["lr"].eq(1e-3).all() and runs["epochs"].eq(1).all() and runs["augment"].eq(task != "task3").all()
    assert sorted(zip(runs["model"], runs["split"], strict=True)) == sorted((m, s) for m in models for s in (0, 1))
    assert runs.groupby("split")["split_hash"].nunique().eq(1).all()  # every model saw the same images
    assert runs["split_hash"].nunique() == 2 and runs["fingerprint"].nunique() == len(runs)
    for model in models:
        assert printed[task].count(f"{model} split") == 2
        assert re.search(rf"^ *{model}†? +2/2 ", printed[task], re.MULTILINE)
    assert "generated images" in printed[task] and "workflowType=machine_learning" in printed[task]


def test_analysis_prints_the_same_table_from_the_store_alone(finished: Finished) -> None:
    result = CliRunner().invoke(app, ["table", "task3", "--tracking-uri", finished.uri], env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.stderr
    printed = finished.printed["task3"]
    at_the_end = printed[printed.index("task3:") : printed.index("numbers ")]
    assert result.stdout.split() == at_the_end.split()


@pytest.mark.parametrize("task", SCRIPTS)
def test_parents_hold_what_the_table_says(task: str, finished: Finished) -> None:
    uri = finished.uri
    runs = analysis.load_runs([task], uri)
    table = analysis.comparison_table(runs, tracking_uri=uri)
    client = tracking.open_store(uri).client
    for model, parent_id in runs.groupby("model")["parent_id"].first().items():
        metrics = client.get_run(parent_id).data.metrics
        assert metrics.pop("n_splits") == 2
        assert set(metrics) <= set(keys.SUMMARY_METRICS) and "test/accuracy" not in metrics
        assert {"mean/test/f1_macro", "sd/test/accuracy", "mean/cross_val/loss"} <= set(metrics)
        assert not any(key.startswith((keys.LOW, keys.HIGH)) for key in metrics)  # two splits allow no interval
        row = table.loc[model]
        assert metrics == {key: row[key] for key in metrics}
        assert np.isnan(row["low"]) and np.isnan(row["high"])
        files = [file.path.split("/")[1] for file in client.list_artifacts(parent_id, keys.FIGURES)]
        names = {"scores_by_split", "paired_differences", "accuracy_against_cost", "learning_curves", "reliability"}
        if model not in keys.BASELINES:
            names.add(f"confusion_{model}")
            if row["mean"] < 1:  # no mistake, no sheet of mistakes
                names.add(f"most_confused_{model}")
        assert set(files) == {f"{name}.{suffix}" for name in names for suffix in ("png", "svg")}


@pytest.mark.parametrize("task", SCRIPTS)
def test_the_sheet_of_mistakes_shows_the_worst_test_images(task: str, finished: Finished) -> None:
    evidence = analysis.Evidence(analysis.choose_group(analysis.load_runs([task], finished.uri)), finished.uri)
    figures = {(name, model): figure for name, model, figure in draw_figures(evidence, "all/accuracy")}
    for model in finished.models[task]:
        tested = evidence.pooled(model, ("test",))
        wrong = tested.loc[tested["true"] != tested["pred"], "index"].nunique()
        sheet = figures.get((f"most_confused_{model}", model))
        assert (sum(bool(axes.images) for axes in sheet.axes) if sheet else 0) == min(20, wrong)


@pytest.mark.parametrize("task", SCRIPTS)
def test_all_keys_of_a_child_are_there(task: str, finished: Finished) -> None:
    uri = finished.uri
    store = tracking.open_store(uri)
    run_id = analysis.load_runs([task], uri).iloc[-1]["run_id"]
    run = store.client.get_run(run_id)
    optional = {*keys.TUNING, "trial", "chosen_trial", "replicate", "repetitions", "normalisation", *LATER}
    assert set(run.data.params) == set(keys.PARAMS) - optional
    assert "auto" not in run.data.params.values()
    assert set(run.data.metrics) == set(keys.EPOCH_METRICS) | set(keys.FINAL_METRICS)
    assert set(keys.TAGS) - {"superseded_by", "failure", "figures_of", keys.LOOKS, keys.STOPPED} <= set(run.data.tags)
    data = datasets.load(find(task).data, sample=True)
    assert run.data.tags["dataset_digest"] == data.digest
    assert run.inputs.dataset_inputs[0].dataset.digest == data.digest[:36]
    parent = store.client.get_run(run.data.tags["mlflow.parentRunId"])
    assert parent.inputs.dataset_inputs[0].dataset.digest == data.digest[:36]
    shared = set(keys.PARAMS) - set(keys.CHILD_PARAMS) - optional
    assert parent.data.params == {key: run.data.params[key] for key in shared}
    assert "figures_of" in parent.data.tags
    files = {file.path for file in store.client.list_artifacts(parent.info.run_id)}
    assert files == {keys.CLASSES, keys.MODEL_CARD, keys.FIGURES}


@pytest.mark.parametrize("task", SCRIPTS)
def test_numbers_follow_from_the_files_beside_them(task: str, finished: Finished, tmp_path: Path) -> None:
    uri = finished.uri
    store = tracking.open_store(uri)
    data = datasets.load(find(task).data, sample=True)
    runs = analysis.load_runs([task], uri)
    for model, run_id in runs.loc[runs["model"].isin(["lenet5", *keys.BASELINES]), ["model", "run_id"]].to_numpy():
        folder = Path(store.client.download_artifacts(run_id, "", str(tmp_path)))
        metrics = store.client.get_run(run_id).data.metrics
        predictions = np.load(folder / keys.PREDICTIONS, allow_pickle=False)
        split = np.load(folder / keys.SPLIT, allow_pickle=False)
        confusions = json.loads((folder / keys.CONFUSION).read_text(encoding="utf-8"))
        together = np.sort(np.concatenate([split["train"], split["val"], split["test"]]))
        assert np.array_equal(together, np.arange(len(data.labels)))
        for part, name in (("val", "best_val"), ("test", "test")):
            true, predicted = predictions[f"{part}_true"], predictions[f"{part}_pred"]
            assert np.array_equal(predictions[f"{part}_index"], split[part])
            assert np.array_equal(true, data.labels[split[part]])
            assert metrics[f"{name}/accuracy"] == np.mean(true == predicted)
            assert metrics[f"{name}/f1_macro"] == pytest.approx(f1_score(true, predicted, average="macro"), abs=1e-12)
            assert np.array_equal(confusions[part], confusion_matrix(true, predicted, labels=range(len(data.classes))))
            assert np.all((predictions[f"{part}_prob"] > 0) & (predictions[f"{part}_prob"] <= 1))
        checkpoint = Checkpoint.load(folder / keys.CHECKPOINT)
        assert (checkpoint.model, checkpoint.epoch, checkpoint.score) == (model, 1, metrics["best_val/loss"])
        thumbnails = np.load(folder / keys.THUMBNAILS, allow_pickle=False)
        wrong = predictions["test_index"][predictions["test_true"] != predictions["test_pred"]]
        assert set(thumbnails["index"]) <= set(wrong) and len(thumbnails["index"]) == min(20, len(wrong))
        side = min(64, data.images.shape[1])
        assert thumbnails["pixels"].shape == (len(thumbnails["index"]), side, side, data.images.shape[3])
        for score in keys.SCORES:
            assert metrics[f"best_val/{score}"] == metrics[f"last_val/{score}"] == metrics[f"val/{score}"]
        assert (folder / keys.CONFUSION_FIGURE).stat().st_size > 5_000


@pytest.mark.slow
def test_every_script_trains_all_its_models(empty_database: Path, tmp_path: Path) -> None:
    finished = run_scripts(empty_database, tmp_path / "finished", SCRIPTS)
    for task in SCRIPTS:
        test_every_model_has_every_split(task, finished)
        test_parents_hold_what_the_table_says(task, finished)
        test_the_sheet_of_mistakes_shows_the_worst_test_images(task, finished)
        test_all_keys_of_a_child_are_there(task, finished)
        test_numbers_follow_from_the_files_beside_them(task, finished, tmp_path)
    test_analysis_prints_the_same_table_from_the_store_alone(finished)


@pytest.mark.usefixtures("scores_only")
@pytest.mark.slow
def test_a_diverging_split_fails_and_the_protocol_goes_on(store_uri: str, run_here: Run) -> None:
    options = (*SMALL[:-2], "--lr", "1e30", "-m", "resnetcnn", "-m", "lenet5", "--no-baselines")
    result = run_here("experiments/task3.py", *options, "--tracking-uri", store_uri)
    assert result.returncode == 1
    assert "resnetcnn split 1: the validation loss is nan in epoch 1" in result.stderr
    runs = analysis.load_runs(["task3"], store_uri)
    # tanh keeps LeNet-5 finite, whatever its weights
    assert runs["model"].tolist() == ["resnetcnn"] * 2 + ["lenet5"] * 2
    assert runs["status"].tolist() == ["FAILED"] * 2 + ["FINISHED"] * 2
    assert runs["failure"].iloc[:2].str.contains("in epoch 1").all()
    assert "resnetcnn has 0 of 2 splits; split 0 failed: the validation loss is nan in epoch 1; " in result.stdout


@pytest.mark.usefixtures("scores_only")
def test_a_split_that_does_not_fit_says_so_and_the_protocol_goes_on(store_uri: str, monkeypatch) -> None:
    def fit_greedily(state: TrainingState, *where: object) -> Iterator[EpochRecord]:
        if isinstance(state.model, models.MODELS["vggnet"]):
            torch.empty(2**60)  # more than a process can address
        yield from fit(state, *where)

    monkeypatch.setattr(worker, "fit", fit_greedily)
    config = dataclasses.replace(task3.TASK.training, epochs=1, device="cpu")
    training = dict.fromkeys(("vggnet", "lenet5"), config)
    failures = run(
        Request(
            task=task3.TASK, training=training, n_splits=1, splits=(0,), sample=True, threads=1, tracking_uri=store_uri
        )
    )
    assert failures == ["vggnet split 0 does not fit into cpu's memory; lower --batch-size or --device-memory"]
    runs = analysis.load_runs(["task3"], store_uri)
    assert runs["status"].tolist() == ["FAILED", "FINISHED"]
    assert "allocate" in runs["failure"].iloc[0]


@pytest.mark.usefixtures("scores_only")
def test_a_model_that_cannot_be_built_is_named_and_the_others_are_trained(
    store_uri: str, run_here: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refuses(torch.nn.Module):
        def __init__(self, in_channels: int, num_classes: int, image_size: int) -> None:
            raise ValueError("it needs 224 pixels")

    monkeypatch.setitem(models.MODELS, "refuses", Refuses)
    options = (*SMALL, "--n-splits", "1", "-m", "refuses", "--no-baselines", "--tracking-uri", store_uri)
    result = run_here("experiments/task3.py", *options)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    reason = "cannot be built for 28x28 images of 1 channel and 10 classes (ValueError: it needs 224 pixels)"
    assert [line for line in result.stderr.splitlines() if line.startswith("Error: ")] == [f"Error: refuses {reason}"]
    runs = analysis.load_runs(["task3"], store_uri)
    assert runs["model"].tolist() == ["lenet5"] and runs["status"].tolist() == ["FINISHED"]


@pytest.mark.slow
def test_seeds_of_splits_and_of_trainings(store_uri: str, requested: Callable[..., Request]) -> None:
    def plan(*options: str) -> Plan:
        one_split = ("--sample", "--epochs", "1", "--n-splits", "1", "--no-baselines", "-m", "lenet5", "--threads", "1")
        return make_plan(requested(*one_split, *options, "--tracking-uri", store_uri))

    def train(planned: Plan) -> None:
        assert execute(planned, open_store(planned)).failures == []

    both, apart = plan("--seed", "3"), plan("--split-seed", "3", "--train-seed", "3")
    assert both.jobs[0].params == apart.jobs[0].params and both.jobs[0].tags == apart.jobs[0].tags
    assert both.jobs[0].params["seed"] == 3
    pairs = [(3, 1), (3, 2), (4, 1), (3, 3)]
    for split_seed, train_seed in pairs:
        train(plan("--split-seed", str(split_seed), "--train-seed", str(train_seed)))
    train(both)  # which is there
    runs = analysis.load_runs(["task3"], store_uri)
    assert sorted(zip(runs["split_seed"], runs["train_seed"], strict=True)) == sorted(pairs)
    run_of = {(run["split_seed"], run["train_seed"]): run for _, run in runs.iterrows()}
    hashes = {pair: run["split_hash"] for pair, run in run_of.items()}
    assert hashes[3, 1] == hashes[3, 2] == hashes[3, 3] != hashes[4, 1]
    weights = [
        Checkpoint.load(analysis.local_artifact(run_of[pair], keys.CHECKPOINT, store_uri)).state_dict["layers.0.weight"]
        for pair in ((3, 1), (3, 2), (3, 3))
    ]
    assert len({tuple(each.flatten().tolist()) for each in weights}) == 3
    assert runs["fingerprint"].nunique() == len(pairs)
    report = verify(task3.TASK, "cpu", tracking_uri=store_uri)
    assert (report.runs, report.differences) == (len(pairs), [])


def test_every_setting_of_a_training_is_an_option(requested: Callable[..., Request]) -> None:
    usual, changed, options = task3.TASK.training, {"device": "cpu"}, ["--device", "cpu"]
    for field in dataclasses.fields(TrainingConfig):
        if field.name in changed:
            continue
        value, option = getattr(usual, field.name), field.name.replace("_", "-")
        if field.name == "pretrained":  # a flag: its value follows from the library
            changed[field.name] = "library"
            options.append("--pretrained")
        elif isinstance(value, bool):
            changed[field.name] = not value
            options.append(f"--no-{option}" if value else f"--{option}")
        else:
            choices = [choice for choice in field.metadata["choices"] if choice != value]
            changed[field.name] = choices[0] if choices else value + 1
            options += [f"--{option}", str(changed[field.name])]
    request = requested(*options)
    assert request.training == dict.fromkeys(SCRIPTS["task3"], TrainingConfig(**changed))


@pytest.mark.slow
def test_a_folder_of_ones_own_without_test_part_and_read_only(
    image_folder: Path, store_uri: str, run_here: Run
) -> None:
    shutil.rmtree(image_folder / "test")
    (image_folder / "train" / "dark").rename(image_folder / "train" / "어두움")
    (image_folder / "train" / "light" / "broken.jpg").write_bytes(b"nothing")
    for path in [*image_folder.rglob("*"), image_folder]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = snapshot(image_folder)
    options = (*SMALL[1:], "--no-baselines", "--tracking-uri", store_uri)
    result = run_here("experiments/task1.py", *options, DATA_DIR=str(image_folder))
    assert result.returncode == 0, result.stderr
    assert snapshot(image_folder) == before
    assert "found 41 = used 40 + set aside 1" in result.stdout
    assert "1 does not decode: train/light/broken.jpg" in result.stdout
    runs = analysis.load_runs(["task1"], store_uri)
    assert runs["dataset"].tolist() == ["photos"] * 2 and runs["n_test"].tolist() == [0, 0]
    assert runs["test/accuracy"].isna().all() and runs["best_val/accuracy"].notna().all()
    assert pd.api.types.is_float_dtype(runs["test/accuracy"])
    assert "validation part, each half at the epoch that the other half chose" in " ".join(result.stdout.split())


@pytest.mark.parametrize(("options", "sentence"), [
    (("-m", "lenet"), "'lenet' is not one of lenet5, vggnet, resnetcnn, seresnet, efficientnet_lite, efficientnet_b0"),
    (("--split", "2"), "2 is not one of 0 to 1"),
    (("--split", "-1"), "-1 is not one of 0 to 1"),
    (("--epochs", "-1"), "'--epochs'"),
    (("--epochs", "0"), "'--epochs'"),
    (("--split-seed", "-1"), "'--split-seed'"),
    (("--train-seed", "4294967296"), "'--train-seed'"),
    (("--batch-size", "x"), "'--batch-size'"),
    (("--device", "gpu"), "'gpu' is not a device that can be used here; there are auto, cpu"),
    (("--precision", "int8"), "'auto', 'fp32', 'bf16', 'fp16'"),
    (("--no-such-option",), "--no-such-option"),
    (("--data-dir", "nowhere"), "'--data-dir'"),
    (("--n-splits", "0"), "'--n-splits'"),
    (("--no-halving",), "only --tune N has configurations to stop early"),
    (("--n-splits", "2000000000"), "is not in the range 1<=x<=10000"),
])  # fmt: skip
def test_wrong_options_name_themselves(options: tuple[str, ...], sentence: str, run_here: Run, tmp_path: Path) -> None:
    result = run_here("experiments/task3.py", *SMALL, *options, "--tracking-uri", f"sqlite:///{tmp_path}/new.db")
    assert result.returncode == 2, result.stderr
    assert sentence in " ".join(result.stderr.split())
    assert not (tmp_path / "new.db").exists()


def test_a_wrong_option_ends_the_process_with_a_sentence(run_command, tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/new.db"
    result = run_command("experiments/task3.py", *SMALL, "--lr", "nan", "--tracking-uri", uri)
    assert result.returncode == 2, result.stderr
    assert "--lr" in " ".join(result.stderr.split()) and "Traceback" not in result.stderr
    assert not (tmp_path / "new.db").exists()


IMPOSSIBLE = [
    ("one", (), "holds only the class 'dark'"),
    ("few", ("--n-splits", "30"), "class 'dark' has 20 images for 30 folds; lower --n-splits to 20"),
    ("few", ("--tracking-uri", "http://127.0.0.1:9"), "does not answer"),
    ("few", ("--tracking-uri", "somewhere"), "plain folder"),
]


@pytest.mark.parametrize(("folder", "options", "sentence"), IMPOSSIBLE)
def test_what_cannot_be_done_is_one_sentence(
    folder: str, options: tuple[str, ...], sentence: str, image_folder: Path, run_here: Run, tmp_path: Path
) -> None:
    if folder == "one":
        shutil.rmtree(image_folder / "train" / "light")
    uri = ("--tracking-uri", f"sqlite:///{tmp_path}/new.db")
    result = run_here("experiments/task2.py", "--data-dir", str(image_folder), "-m", "lenet5", *uri, *options)
    assert result.returncode == 1, result.stderr
    message = result.stderr[result.stderr.index("Error: ") :]
    assert sentence in message and message.count("\n") == 1
    assert not (tmp_path / "new.db").exists()


def test_in_a_process_it_is_one_sentence_too(image_folder: Path, run_command, tmp_path: Path) -> None:
    _, options, sentence = IMPOSSIBLE[1]
    uri = ("--tracking-uri", f"sqlite:///{tmp_path}/new.db")
    result = run_command("experiments/task2.py", "--data-dir", str(image_folder), "-m", "lenet5", *uri, *options)
    assert result.returncode == 1, result.stderr
    assert result.stderr[result.stderr.index("Error: ") :] == f"Error: {sentence}\n"
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "new.db").exists()


def test_help_names_every_option_without_loading_torch_or_mlflow() -> None:
    printed, modules = help_and_modules("experiments/task1.py")
    settings = [f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(TrainingConfig)]
    for option in ("--model", "--n-splits", "--split", *settings, "--seed", "--no-augment", "--data-dir", "--sample",
                   "--tracking-uri", "--no-baselines", "--leak-free", "--fresh"):  # fmt: skip
        assert option in printed
    assert not {"torch", "mlflow"} & modules


def test_k_fold_takes_two_splits(run_here: Run) -> None:
    result = run_here("experiments/task2.py", "--sample", "--n-splits", "1")
    assert result.returncode == 2 and "k-fold takes at least 2 splits" in result.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on the size of files")
@pytest.mark.slow
def test_full_disk_is_one_sentence_and_the_run_has_failed(store_uri: str, tmp_path: Path) -> None:
    # A limit on file sizes stands in for the full disk: the checkpoint is the first file that exceeds it.
    script = f"{sys.executable} {ROOT / 'experiments' / 'task1.py'} --sample --epochs 1 --n-splits 1 --no-baselines"
    command = f"ulimit -f 3000; trap '' XFSZ; exec {script} -m lenet5 --tracking-uri {store_uri}"
    datasets.load(task1.TASK.data, sample=True)  # drawn and cached before the limit
    result = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=HANGS)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "the results cannot be written" in result.stderr and "Traceback" not in result.stderr
    runs = analysis.load_runs(["task1"], store_uri)
    assert runs["status"].tolist() == ["FAILED"]
    assert runs["test/accuracy"].isna().all()


@pytest.mark.parametrize("width", [50, 60, 70, 80, 120])
def test_the_line_of_a_split_is_whole_at_any_width(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    monkeypatch.setattr(progress, "console", console)
    with progress.SplitBar("efficientnet_lite split 10", 30) as bar:
        bar.update([{"epoch": 10, "metrics": {"val/accuracy": 0.8, "val/loss": 0.5}}])
        bar.finish("best 10: val 63.3%, test 63.1%")
    line = console.file.getvalue().splitlines()[-1].rstrip()
    assert "10/10" in line and re.search(r"\d:\d\d$", line) and len(line) <= width
    assert ("best 10: val 63.3%, test 63.1%" in line) == (width >= 53)
