"""Cross-fitted validation and several trainings a split, end to end on a folder of few pictures."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from sklearn.metrics import accuracy_score, f1_score, log_loss

import analysis
from analysis.query import read_predictions
from experiments.jobs.rebuilt import rebuild
from experiments.jobs.results import epochs_of_halves
from tracking import keys
from tracking.artifacts import file_digests
from tracking.checkpoints import Checkpoint
from tracking.store import open_store

Run = Callable[..., subprocess.CompletedProcess[str]]
OPTIONS = ("-m", "lenet5", "--epochs", "5", "--lr", "0.01", "--batch-size", "8")


@pytest.fixture
def hard_folder(image_folder: Path) -> Path:
    """The folder with every second picture in the other class: nothing can be learned, so halves choose by chance."""
    for part in ("train", "test"):
        for dark in sorted((image_folder / part / "dark").iterdir())[::2]:
            light = image_folder / part / "light" / dark.name
            pictures = dark.read_bytes(), light.read_bytes()
            dark.write_bytes(pictures[1])
            light.write_bytes(pictures[0])
    return image_folder


def scores_of(runs: pd.DataFrame) -> dict[tuple[str, int, int], tuple[str, float]]:
    """Id and loss of each run by model, split and replicate."""
    columns = ["model", "split", "replicate", "run_id", "test/loss"]
    return {row[:3]: row[3:] for row in runs[columns].itertuples(index=False, name=None)}


@pytest.mark.slow
def test_more_seeds_and_splits_extend_a_table_and_everything_can_be_derived(
    hard_folder: Path, store_uri: str, run_here: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["experiments.run.conclude"], "log_figures", lambda *_: None)  # of another test
    monkeypatch.setattr("experiments.champion.crown", lambda *_: "")
    store = ("--tracking-uri", store_uri)
    command = ("experiments/folder.py", str(hard_folder), *OPTIONS, *store)
    verify = ("-m", "experiments", "verify", "photos", "--data-dir", str(hard_folder), *store)
    assert run_here(*command, "--n-splits", "2").returncode == 0
    first = analysis.load_runs(["photos"], store_uri)
    done = run_here(*command, "--n-splits", "3", "--seeds", "2")
    assert done.returncode == 0, done.stderr
    assert "finished before and kept: 6 splits" in done.stdout

    runs = analysis.load_runs(["photos"], store_uri)
    scores, before = scores_of(runs), scores_of(first)
    assert before.items() <= scores.items()  # nothing was trained again
    networks = {("lenet5", split, replicate) for split in range(3) for replicate in range(2)}
    assert scores.keys() == networks | {(name, split, 0) for name in keys.BASELINES for split in range(3)}
    for split in range(3):
        assert scores["lenet5", split, 0][1] != scores["lenet5", split, 1][1]
    of_network = runs[runs["model"] == "lenet5"]
    assert of_network.groupby("split")["split_hash"].nunique().eq(1).all()
    assert len(analysis.comparison_groups(runs)) == 1 and of_network["parent_id"].nunique() == 1
    client = open_store(store_uri).client
    names = {client.get_run(run_id).info.run_name for run_id in of_network["run_id"]}
    assert {"lenet5 split 0", "lenet5 split 0 replicate 1", "lenet5 split 2 replicate 0"} <= names
    # the parent's mean is over splits, of the mean over their trainings
    parent = client.get_run(of_network["parent_id"].iloc[0]).data.metrics
    by_split = of_network.groupby("split")["test/accuracy"].mean()
    assert parent["mean/test/accuracy"] == pytest.approx(by_split.mean()) and parent["n_splits"] == 3
    assert parent["sd/test/accuracy"] == pytest.approx(by_split.std())

    elsewhere = 0
    for _, run in runs.iterrows():
        predictions = read_predictions(run)
        part, half = predictions.cross_val, predictions.half
        assert part is not None and part.probs is not None and half is not None and predictions.other is not None
        assert run["cross_val/accuracy"] == run["cross_val/f1_micro"] == accuracy_score(part.true, part.predicted)
        assert run["cross_val/f1_macro"] == pytest.approx(f1_score(part.true, part.predicted, average="macro"))
        assert run["cross_val/loss"] == pytest.approx(log_loss(part.true, part.probs, labels=[0, 1]), abs=1e-6)
        for name, stored in (("best_val", predictions.val), ("test", predictions.test)):
            assert run[f"{name}/accuracy"] == accuracy_score(stored.true, stored.predicted)
            assert run[f"{name}/loss"] == pytest.approx(stored.loss, abs=1e-6)
        for number in (0, 1):
            same = part.log_probs[half == number] == predictions.val.log_probs[half == number]
            assert same.all() or predictions.other[number]
        elsewhere += int(predictions.other.sum())
    assert elsewhere  # else nothing was tried

    verified = run_here(*verify)
    assert verified.returncode == 0 and " 0 differences (exact" in verified.stdout, verified.stdout
    found = change_the_weights_of_a_half(runs, store_uri)
    verified = run_here(*verify)
    assert f"{found}: cross_val/loss is " in verified.stdout + verified.stderr
    again = run_here(*command, "--n-splits", "3", "--seeds", "2")
    assert "finished before and kept: 12 splits" in again.stdout


def change_the_weights_of_a_half(runs: pd.DataFrame, store_uri: str) -> str:
    """Change one weight that only `cross_val` follows from, and sign the file; return the title of the run."""
    for _, run in runs[runs["model"] == "lenet5"].iterrows():
        path = analysis.local_artifact(run, keys.CHECKPOINT, store_uri)
        checkpoint = rebuild(path).checkpoint
        if (place := next((i for i, each in enumerate(checkpoint.of_halves) if each is not None), None)) is not None:
            epoch, weights = checkpoint.of_halves[place]  # type: ignore[misc]
            assert epoch != checkpoint.epoch
            changed = {key: value.clone() for key, value in weights.items()}
            next(iter(changed.values())).mul_(1.5)
            of_halves = [*checkpoint.of_halves]
            of_halves[place] = epoch, changed
            dataclasses.replace(checkpoint, of_halves=tuple(of_halves)).save(path)
            digests = json.dumps(file_digests(path.parent.parent))
            open_store(store_uri).client.set_tag(run["run_id"], "file_digests", digests)
            replicate = f" replicate {run['replicate']}" if run["replicate"] else ""
            return f"lenet5 split {run['split']}{replicate}"
    raise AssertionError("each half chose the best epoch")


def test_the_epochs_of_halves_are_those_with_the_lowest_loss_of_the_other() -> None:
    losses = [(0.9, 0.8), (0.5, 0.7), (0.6, 0.7), (0.7, 0.6)]
    history = [{"epoch": number, "half_losses": pair} for number, pair in enumerate(losses, 1)]
    assert epochs_of_halves(history) == (4, 2)
    assert epochs_of_halves(history[:3]) == (2, 2)  # of equal ones the first


def test_a_checkpoint_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    import torch

    old = {"model": "lenet5", "arguments": {}, "epoch": 1, "score": 0.5, "mean": torch.zeros(1), "std": torch.ones(1)}
    torch.save(old | {"state_dict": {}}, tmp_path / "best.pt")
    assert Checkpoint.load(tmp_path / "best.pt").of_halves == ()
