"""The race: what its table says of raw results, and that all start from the same weights and images."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import datasets
import models
from benchmarks.race import results
from benchmarks.race.common import Prepared
from benchmarks.race.preparation import prepare
from benchmarks.race.works import CONTESTANTS, WORKS, Entry
from experiments.task2 import TASK
from experiments.training.state import initialise, seed_of_split


def raw(accuracies: dict[str, list[float]], seconds: dict[str, float]) -> dict[str, object]:
    runs = [
        {
            "contestant": name, "repeat": repeat, "epoch_seconds": [99.0, seconds[name], seconds[name] + 2 * repeat],
            "whole_seconds": 10 * seconds[name] + repeat, "val_accuracy": accuracy, "test_accuracy": None,
            "best_epoch": 3, "peak_gb": 1.25, "others": 0.01,
        }
        for name, values in accuracies.items()
        for repeat, accuracy in enumerate(values)
    ]  # fmt: skip
    return {
        "machine": "2 cores", "device": "cpu", "date": "2026-11-24", "repeats": 2, "epochs": 3, "absent": ["keras"],
        "note": "",
        "sizes": {"train": 1400, "val": 34300, "test": 34300}, "once_seconds": 8.7, "runs": runs,
    }  # fmt: skip


@pytest.fixture
def raws() -> dict[str, dict[str, object]]:
    accuracies = {"plain-0": [0.60, 0.62], "plain-2": [0.61, 0.63], "ours": [0.60, 0.60]}
    return {"garments-lenet5": raw(accuracies, {"plain-0": 4.0, "plain-2": 3.0, "ours": 0.25})}


def cells(text: str, *start: str) -> list[str]:
    [line] = [line for line in text.splitlines() if line.startswith("| " + " | ".join(start) + " |")]
    return line.strip("| ").split(" | ")


def test_table_has_medians_ranges_and_ratios(raws) -> None:
    text = results.table(raws)
    # the first epoch does not count: 4 in the first repeat, the median of 4 and 6 in the second
    plain, ours = (cells(text, "garments-lenet5", name)[2:] for name in ("plain-0", "ours"))
    assert plain == ["4.50 (4.00–5.00)", "6.0", "40.5 (40.0–41.0)", "13.5", "61.0", "1.25"]
    assert ours == ["0.750 (0.250–1.25)", "1.0", "3.00 (2.50–3.50)", "1.0", "60.0", "1.25"]
    assert cells(text, "garments-lenet5", "keras")[2:] == ["-"] * 6
    assert "| lightning |" not in text
    # the better plain loop is plain-2
    assert cells(text, "garments-lenet5", "4.7")[1:] == ["4.7", "10", "10.2"]
    assert "disturbed" not in text


def test_other_processes_are_said(raws) -> None:
    raws["garments-lenet5"]["runs"][1]["others"] = 1.4
    assert "disturbed: other processes used more than 0.2 cores during 1 of 6 runs, at most 1.4" in results.table(raws)


def test_accuracies_within_seed_noise_agree(raws) -> None:
    assert results.disagreements({"name": "garments-lenet5", **raws["garments-lenet5"]}) == []
    assert "All accuracies agree" in results.table(raws)  # sd is 1.41 points, so 6.0 are allowed


def test_a_fault_is_found(raws) -> None:
    for run in raws["garments-lenet5"]["runs"]:
        if run["contestant"] == "ours":
            run["val_accuracy"] = 0.55
    [line] = results.disagreements({"name": "garments-lenet5", **raws["garments-lenet5"]})
    assert line == "garments-lenet5: ours reaches 55.0%, plain 61.5%; by chance they may be 6.0 points apart"
    assert line in results.table(raws)


def test_one_repeat_is_not_judged() -> None:
    single = raw({"plain-0": [0.6], "ours": [0.1]}, {"plain-0": 4.0, "ours": 0.25})
    assert results.disagreements({"name": "garments-lenet5", **single}) == []
    assert "not judged without a plain loop and a second repeat: garments-lenet5" in results.table(
        {"garments-lenet5": single}
    )


def test_figure_is_drawn(raws, tmp_path: Path) -> None:
    results.draw(raws, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["race.png", "race.svg"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    folder = tmp_path_factory.mktemp("race") / "prepared"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CACHE_DIR", str(folder.parent / "cache"))
        # it also compares the images that peers load with ours
        return prepare(dataclasses.replace(WORKS["photos-lenet5"], photos=40), folder, None, sample=True)


def test_peers_start_from_our_weights(prepared: Prepared) -> None:
    ours = initialise(lambda: models.build("lenet5", **prepared.model_arguments), seed_of_split(0, 0), "cpu").eval()
    x = torch.randn(4, 3, 128, 128)
    torch.testing.assert_close(prepared.network("lenet5").eval()(x), ours(x))


def test_peers_have_our_split(prepared: Prepared) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CACHE_DIR", str(prepared.folder.parent / "cache"))
        data = datasets.load(TASK.data, prepared.data_root)
    split = datasets.draw_splits(TASK.protocol, data, 0)[0]
    for part, rows in split._asdict().items():
        np.testing.assert_array_equal(prepared.indices[part], rows)
    assert {part: len(images) for part, images in prepared.parts().items()} == {"train": 32, "val": 8}


def test_plain_loop_trains(prepared: Prepared, tmp_path: Path, empty_database: Path, run_command) -> None:
    (tmp_path / "mlflow.db").write_bytes(empty_database.read_bytes())
    entry = Entry("plain-0", "lenet5", str(prepared.folder), str(tmp_path), 16, 2, 0, seed=1)
    done = run_command("-m", "benchmarks.race.plain", str(entry.write()))
    assert done.returncode == 0, done.stderr
    result = json.loads(entry.result.read_text())
    assert len(result["epoch_seconds"]) == 2
    assert 0 <= result["val_accuracy"] <= 1
    assert len(list((tmp_path / "artifacts").glob("*/artifacts/best.pt"))) == 1


@pytest.mark.parametrize(("name", "channels", "size"), [("lenet5", 1, 28), ("vggnet", 1, 28), ("resnetcnn", 3, 64)])
def test_keras_network_is_ours(name: str, channels: int, size: int) -> None:
    if not CONTESTANTS["keras"].is_installed:  # to import it without its backend chosen is an error
        pytest.skip("keras is not installed")
    from benchmarks.race.keras_loop import keras_model

    network = models.build(name, channels, 10, size).eval()
    x = torch.randn(4, channels, size, size)
    with torch.no_grad():
        theirs = keras_model(network, channels, size)(x, training=False)
        torch.testing.assert_close(theirs, network(x), atol=1e-4, rtol=1e-4)
