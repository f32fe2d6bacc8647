"""A folder of one's own as a task: run, table, verification and prediction, and what keeps two folders apart."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import analysis
import tracking
from datasets import PublishedValidation, RepeatedHoldout, StratifiedKFold
from experiments.folder import make_task, parse, task_name

Run = Callable[..., subprocess.CompletedProcess[str]]
QUICK = ("-m", "lenet5", "--epochs", "2")


@pytest.fixture
def with_validation(image_folder: Path) -> Path:
    """The folder with a published validation part, a Korean name with a space, and a class that few fonts can write."""
    shutil.copytree(image_folder / "test", image_folder / "val")
    for part in ("train", "val", "test"):
        (image_folder / part / "light").rename(image_folder / part / "𓃠")
    return image_folder.rename(image_folder.parent / "내 사진")


def test_a_folder_is_run_shown_verified_and_used(with_validation: Path, store_uri: str, run_here: Run) -> None:
    store = ("--tracking-uri", store_uri)
    done = run_here("experiments/folder.py", str(with_validation), *QUICK, *store, DATA_DIR="/nonexistent")
    assert done.returncode == 0, done.stderr
    assert "found 64 = used 64 + set aside 0" in done.stdout and "Which class of 내-사진?" in done.stdout
    assert "Warning" not in done.stderr
    smaller = ("--folds", "2", "--image-size", "28", "--channels", "1")
    again = run_here("experiments/folder.py", str(with_validation), *smaller, *QUICK, *store)
    assert again.returncode == 0, again.stderr
    runs = analysis.load_runs(["내-사진"], store_uri)
    assert set(runs["protocol"]) == {PublishedValidation.name, StratifiedKFold.name}
    first = runs[(runs["protocol"] == PublishedValidation.name) & (runs["model"] == "lenet5")].iloc[0]
    assert (first["n_train"], first["n_val"], first["n_test"]) == (40, 12, 12)
    verified = run_here("-m", "experiments", "verify", "내-사진", "--data-dir", str(with_validation), *store)
    assert verified.returncode == 0 and " 0 differences (" in verified.stdout, verified.stdout + verified.stderr
    photo = with_validation / "test" / "dark" / "00.png"
    predicted = run_here("-m", "experiments", "predict", "내-사진", str(photo), *store)
    assert predicted.returncode == 0 and predicted.stdout.splitlines()[-1].split()[-1] in ("dark", "𓃠")
    assert run_here("-m", "analysis", "table", "내-사진", *store).returncode == 0
    without = run_here("-m", "experiments", "verify", "내-사진", *store)
    assert without.returncode == 1 and "is a folder of yours; name it in --data-dir" in without.stderr


@pytest.mark.slow
def test_two_folders_of_one_name_stay_apart(image_folder: Path, store_uri: str, run_here: Run, tmp_path: Path) -> None:
    other = shutil.copytree(image_folder, tmp_path / "elsewhere" / "photos")
    command = ("--no-baselines", *QUICK, "--n-splits", "1", "--tracking-uri", store_uri)
    assert run_here("experiments/folder.py", str(image_folder), *command).returncode == 0
    refused = run_here("experiments/folder.py", str(other), *command)
    assert refused.returncode == 1 and "Traceback" not in refused.stderr
    assert f"photos is the folder {image_folder}" in refused.stderr and "--name" in refused.stderr
    assert run_here("experiments/folder.py", str(other), "--name", "others", *command).returncode == 0
    assert tracking.open_store(store_uri).tasks() == ["others", "photos"]
    shutil.move(image_folder, tmp_path / "moved" / "photos")
    assert run_here("experiments/folder.py", str(tmp_path / "moved" / "photos"), *command).returncode == 0


def test_the_protocol_follows_from_the_folder_unless_it_is_given(image_folder: Path) -> None:
    assert make_task(image_folder).protocol == RepeatedHoldout(5, (3, 2))
    shutil.copytree(image_folder / "test", image_folder / "valid")
    assert make_task(image_folder).protocol == PublishedValidation()
    assert make_task(image_folder, holdout=(3, 2)).protocol == RepeatedHoldout(5, (3, 2))
    shutil.rmtree(image_folder / "valid")
    shutil.rmtree(image_folder / "test")
    task, left = parse([str(image_folder), "--folds", "4", "--channels", "1", "--epochs", "3"])
    assert (task.protocol, task.data.channels, task.data.image_size) == (StratifiedKFold(4), 1, 28)
    assert left == ["--epochs", "3"]
    assert make_task(image_folder).protocol == RepeatedHoldout(5, (3, 1, 1))


@pytest.mark.parametrize(("arguments", "sentence"), [
    (("--epochs", "3", "DIR"), "name the folder first"),
    (("DIR", "--holdout", "3"), "is not like 3:2 or 3:1:1"),
    (("DIR", "--holdout", "3:2", "--folds", "2"), "exclude each other"),
    (("DIR", "--data-dir", "DIR"), "the folder is named already"),
    (("DIR", "--folds", "1"), "k-fold takes at least 2 splits"),
    (("DIR", "--image-size", "4"), "is not from 8 to 1024"),
])  # fmt: skip
def test_wrong_options_are_one_sentence(
    arguments: tuple[str, ...], sentence: str, image_folder: Path, run_here: Run
) -> None:
    done = run_here("experiments/folder.py", *(str(image_folder) if each == "DIR" else each for each in arguments))
    assert done.returncode == 2 and sentence in done.stderr and "Traceback" not in done.stderr


def test_a_folder_that_is_not_there(image_folder: Path, run_here: Run) -> None:
    missing = run_here("experiments/folder.py", str(image_folder / "nowhere"))
    assert missing.returncode == 1 and "is no folder; name one that holds your pictures" in missing.stderr


def test_a_name_becomes_that_of_a_task() -> None:
    names = {"cats & dogs": "cats-dogs", "task1": "folder-task1", "고양이": "고양이", "&&": "folder", "a.b": "a-b"}
    assert {name: task_name(name) for name in names} == names
