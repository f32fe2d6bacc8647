"""The champion of a task: which model it is, that its program gives what the run did, and predicting photos with it."""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
import zipfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.protos.databricks_pb2 import PERMISSION_DENIED
from PIL import Image
from typer.testing import CliRunner

import analysis
import datasets
import tracking
from datasets.decoding import decode
from experiments import main
from experiments.__main__ import app
from experiments.champion import crown as crown_best
from experiments.champion import export, selection
from experiments.provenance import fingerprint
from experiments.task3 import TASK
from tests.conftest import NETWORKS
from tests.servers import answers, free_port, running, wait_until
from tests.test_comparison import TAGS, log_model
from tests.test_verify import copy_store
from tracking import keys, registry
from tracking.registry import Champion
from tracking.sqlite import sqlite_path

WHOLE = {"n_splits": 4, "epochs": 2, "patience": 7}  # as test_comparison's settings


@pytest.fixture(scope="module")
def store(finished_task3: str, tmp_path_factory: pytest.TempPathFactory) -> tracking.Store:
    """A copy of the shared store of two networks and the baselines, which the tests change."""
    folder = tmp_path_factory.mktemp("champion") / "store"
    copy_store(finished_task3, folder, folder)
    return tracking.open_store(f"sqlite:///{folder / 'mlflow.db'}")


@pytest.fixture(scope="module")
def registered(store: tracking.Store) -> Champion:
    held = registry.read_champion(store, "task3")
    assert held is not None
    return held


def predict(store: tracking.Store, *arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["predict", *map(str, arguments), "--tracking-uri", store.uri])
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.stdout, result.stderr


def test_the_best_split_of_the_best_network_is_registered(store: tracking.Store, registered: Champion) -> None:
    runs = analysis.load_runs(["task3"], store.uri)
    networks = runs[runs["model"].isin(["lenet5", "vggnet"])]  # a baseline that is better is no champion
    best = networks.groupby("model")["test/accuracy"].mean().idxmax()
    expected = networks[networks["model"] == best].sort_values(["test/accuracy", "split"], ascending=[False, True])
    assert registered.run_id == expected["run_id"].iloc[0]
    version = store.client.get_model_version("task3", registered.version)
    assert version.run_id == registered.run_id
    assert f"**{best}, split {expected['split'].iloc[0]}**" in version.description
    assert "there was none" in version.description
    assert "splits are finished, and an interval or a verdict takes" in version.description
    assert "generated images" in version.description
    logged = store.client.get_run(registered.run_id).outputs.model_outputs
    assert len(logged) == 1, "logged once"
    (card,) = (sqlite_path(store.uri).parent / "artifacts").rglob("models/*/artifacts/README.md")
    assert card.read_text(encoding="utf-8").endswith(f"\n---\n\n{version.description}\n")
    headings = re.findall("^### (.*)$", version.description, re.MULTILINE)
    assert headings == ["Use", "Data and training", "Scores", "Limits"]


@pytest.mark.slow
def test_the_program_needs_no_source_and_gives_what_the_run_predicted(
    store: tracking.Store, registered: Champion, tmp_path: Path
) -> None:
    folder = registry.fetch_champion(store, "task3", registered, tmp_path)
    runs = analysis.load_runs(["task3"], store.uri)
    run = runs[runs["run_id"] == registered.run_id].iloc[0]
    predicted = analysis.load_predictions(run).query("part == 'test'")
    images = datasets.load(TASK.data, sample=True).images[predicted["index"].to_numpy()]
    np.save(tmp_path / "images.npy", images)
    code = (
        "import sys, numpy, mlflow.pyfunc\n"
        f"model = mlflow.pyfunc.load_model({str(folder)!r})\n"
        f"numpy.save({str(tmp_path / 'out.npy')!r}, model.predict(numpy.load({str(tmp_path / 'images.npy')!r})))\n"
        "assert not [name for name in sys.modules if name.split('.')[0] == 'models']"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=300)
    probabilities = np.load(tmp_path / "out.npy")
    assert probabilities.dtype == np.float32
    assert probabilities.sum(1) == pytest.approx(1, abs=1e-5)
    assert np.mean(probabilities.argmax(1) == predicted["pred"]) > 0.99  # that was computed in another precision
    assert np.abs(probabilities.max(1) - predicted["prob"]).mean() < 0.01


def test_what_the_model_says_of_itself(store: tracking.Store, registered: Champion, tmp_path: Path) -> None:
    folder = registry.fetch_champion(store, "task3", registered, tmp_path)
    about = Model.load(str(folder))
    assert about.run_id == registered.run_id
    assert len(about.metadata["classes"]) == 10
    assert about.metadata["shape"] == [28, 28, 1]
    assert about.signature.inputs.inputs[0].type == np.dtype(object)  # MLflow would cut 0.5 to 0 for uint8
    assert about.signature.outputs.input_names() == about.metadata["classes"]
    required = (folder / "requirements.txt").read_text().split()
    assert {f"torch=={torch.__version__.partition('+')[0]}", f"pillow=={version('pillow')}"} <= set(required)
    assert (folder / "input_example.json").is_file()


def crown(store: tracking.Store) -> str:
    """Choose the champion once more, as the end of the store's command did."""
    runs = analysis.load_runs(["task3"], store.uri)
    evidence = analysis.Evidence(analysis.choose_group(runs), store.uri)
    return crown_best(store, TASK, datasets.load(TASK.data, sample=True), runs, evidence)


def command_line(store: tracking.Store) -> list[str]:
    """The command that made the store, for `main` in this process."""
    return ["task3.py", "--sample", "--n-splits", "2", *NETWORKS, "--threads", "1", "--tracking-uri", store.uri]


def versions(store: tracking.Store) -> list[str]:
    return sorted(str(version.version) for version in store.client.search_model_versions("name = 'task3'"))


def test_the_same_command_registers_once(
    store: tracking.Store, registered: Champion, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing the second time; and where a command was killed before it set the alias, that version is taken."""
    monkeypatch.setattr(sys, "argv", command_line(store))
    with pytest.raises(SystemExit) as end:
        main(TASK)
    assert end.value.code == 0
    line = re.search(r"^champion   \w+, split \d, version 1 of models:/task3$", capsys.readouterr().out, re.MULTILINE)
    assert line is not None
    assert registry.read_champion(store, "task3") == registered
    store.client.delete_registered_model_alias("task3", keys.CHAMPION)
    with pytest.raises(SystemExit):
        main(TASK)
    assert line.group() in capsys.readouterr().out
    assert registry.read_champion(store, "task3") == registered
    assert versions(store) == ["1"]


def test_a_server_that_refuses_to_register_leaves_the_results_as_they_are(
    store: tracking.Store, registered: Champion, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> str:
        raise MlflowException("you may write runs only", PERMISSION_DENIED)

    store.client.delete_registered_model_alias("task3", keys.CHAMPION)
    monkeypatch.setattr(registry, "register_champion", refuse)
    monkeypatch.setattr(sys, "argv", command_line(store))
    with pytest.raises(SystemExit) as end:
        main(TASK)
    assert end.value.code == 0
    printed = capsys.readouterr()
    assert "2/2" in printed.out
    assert "not registered as models:/task3" in printed.err and "you may write runs only" in printed.err
    monkeypatch.undo()
    crown(store)
    assert registry.read_champion(store, "task3") == registered


def test_weights_are_not_put_into_other_source(
    store: tracking.Store, registered: Champion, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.client.delete_registered_model_alias("task3", keys.CHAMPION)
    with monkeypatch.context() as patched:
        other = fingerprint.Source("of another network", frozenset())
        patched.setattr(fingerprint, "source_of", lambda model: other)
        with pytest.raises(tracking.StoreError, match="cannot be exported: other source trained it"):
            crown(store)
    crown(store)
    assert registry.read_champion(store, "task3") == registered


def test_what_another_command_registers_meanwhile_is_looked_at_again(
    store: tracking.Store, registered: Champion, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([None, registered, registered])
    monkeypatch.setattr(registry, "read_champion", lambda *_: next(answers))
    assert crown(store).endswith(", version 1 of models:/task3")
    assert versions(store) == ["1"]


def test_a_champion_without_files_is_replaced(store: tracking.Store, registered: Champion, tmp_path: Path) -> None:
    folder = registry.fetch_champion(store, "task3", registered, tmp_path)
    away = folder.rename(folder.with_name("away"))
    held = registry.read_champion(store, "task3")
    assert held is not None and not held.has_files
    code, _, err = predict(store, "task3", *odd_photos(tmp_path)[:1])
    assert code == 1 and "are gone; the next experiments/task3.py registers another" in err
    assert crown(store).endswith(", version 2 of models:/task3")
    assert "the files of version 1 are gone" in store.client.get_model_version("task3", "2").description
    away.rename(folder)
    store.client.delete_model_version("task3", "2")
    store.client.set_registered_model_alias("task3", keys.CHAMPION, "1")


def odd_photos(folder: Path) -> list[Path]:
    """One scene as files of different kinds."""
    rng = np.random.default_rng(0)
    scene = Image.fromarray(rng.integers(0, 256, (30, 40, 3)).astype(np.uint8)).resize((400, 300))
    kinds = {
        "alpha.png": scene.convert("RGBA"),
        "gray.jpg": scene.convert("L"),
        "cmyk.jpg": scene.convert("CMYK"),
        "large.jpg": scene.resize((5200, 3900)),
        "turned.jpg": scene,
        "palette.gif": scene.convert("P"),
        "odd \u00fc name.webp": scene,
    }
    for name, image in kinds.items():
        exif = Image.Exif()
        exif[0x0112] = 6 if name == "turned.jpg" else 1
        image.save(folder / name, **({"exif": exif} if name.endswith("jpg") else {}))
    return [folder / name for name in kinds]


def test_predict_takes_photos_of_any_kind(store: tracking.Store, registered: Champion, tmp_path: Path) -> None:
    photos = odd_photos(tmp_path)
    code, out, err = predict(store, "task3", *photos, "--out", tmp_path / "new" / "p.csv")
    assert code == 0
    first, *lines = out.splitlines()
    assert registered.run_id in first
    assert f"version {registered.version} of models:/task3" in first
    assert "generated images" in err
    table = pd.read_csv(tmp_path / "new" / "p.csv")
    assert list(table.columns) == ["photo", "class", "probability", "run_id"]
    assert table["photo"].tolist() == [str(photo) for photo in photos]
    assert set(table["run_id"]) == {registered.run_id}
    for line, (_, row) in zip(lines, table.iterrows(), strict=True):
        assert line.startswith(row["photo"])
        assert f"{row['probability']:.1%}" in line
        assert line.endswith(f"  {row['class']}")
    program, about = export.load(registry.fetch_champion(store, "task3", registered, tmp_path))
    images = torch.from_numpy(np.stack([decode(photo, 28, 1) for photo in photos]))
    with torch.inference_mode():
        probability, label = program(images).max(1)
    assert table["class"].tolist() == [about["classes"][number] for number in label]
    assert table["probability"].to_numpy() == pytest.approx(probability.numpy(), abs=1e-6)


def test_predict_names_what_it_cannot_read_and_does_the_rest(store: tracking.Store, tmp_path: Path) -> None:
    good = odd_photos(tmp_path)[0]
    whole = (tmp_path / "gray.jpg").read_bytes()
    (tmp_path / "broken.jpg").write_bytes(whole[: len(whole) // 3])
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "photo.heic").write_bytes(b"\0\0\0\x18ftypheic")
    reasons = {
        tmp_path / "broken.jpg": "cannot be read as an image (OSError: ",
        tmp_path / "text.jpg": "cannot be read as an image (Pillow finds no image in it)",
        tmp_path / "photo.heic": "(Pillow reads no .heic files; convert it to PNG or JPEG)",
        tmp_path / "missing.jpg": "is not there",
        tmp_path: "is a folder; name the photos in it",
        Path("/dev/null"): "is no regular file",
    }
    bad = list(reasons)
    code, out, err = predict(store, "task3", *bad, good, "--out", tmp_path / "p.csv")
    assert code == 1
    assert str(good) in out
    errors = [line for line in err.splitlines() if line.startswith("Error:")]
    for (path, reason), line in zip(reasons.items(), errors, strict=True):
        assert str(path) in line and reason in line
    assert len(pd.read_csv(tmp_path / "p.csv")) == 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["task9", "a.png"], "'task9' is not one of task1, task2, task3"),
        (["task1", "a.png"], "task1 has no champion in"),
        (["task3"], "Missing argument 'PHOTO...'"),
        (["task3", "a.png", "--out", "answers.xlsx"], "'answers.xlsx' does not end in .csv"),
    ],
)
def test_predict_says_what_is_wrong(store: tracking.Store, arguments: list[str], expected: str) -> None:
    code, _, err = predict(store, *arguments)
    assert code != 0
    assert expected in err
    assert "Traceback" not in err


@pytest.mark.parametrize("attack", ["pickle", "code", "pickled model"])
def test_nothing_that_comes_with_a_model_is_executed(
    store: tracking.Store, registered: Champion, tmp_path: Path, attack: str
) -> None:
    model, executed = tmp_path / "model", tmp_path / "executed"
    shutil.copytree(registry.fetch_champion(store, "task3", registered, tmp_path), model)
    module = f"open({str(executed)!r}, 'w')"
    if attack == "pickle":
        with zipfile.ZipFile(model / "data" / "model.pt2", "a") as archive:
            archive.writestr("archive/data/constants/custom_obj_0", f"cos\nsystem\n(S'touch {executed}'\ntR.".encode())
    else:
        (model / "code").mkdir(exist_ok=True)
        (model / "code" / "evil_module_of_the_test.py").write_text(module)
        text = (model / "MLmodel").read_text()
        assert text.count("code: null") == 1
        (model / "MLmodel").write_text(text.replace("code: null", "code: code"))
        if attack == "pickled model":
            (model / "data" / "model.pth").write_bytes(b"")
            (model / "data" / "pickle_module_info.txt").write_text("evil_module_of_the_test")
    with pytest.raises(tracking.StoreError, match="holds no model that was registered by this program"):
        export.load(model)
    assert not executed.exists()


def test_a_moved_store_keeps_its_champion(store: tracking.Store, tmp_path: Path) -> None:
    assert store.database is not None
    photo = odd_photos(tmp_path)[0]
    before = predict(store, "task3", photo)
    place = store.database.parent
    moved = place.with_name("champion-moved-away")
    place.rename(moved)
    try:
        elsewhere = tracking.open_store(f"sqlite:///{moved / 'mlflow.db'}")
        assert predict(elsewhere, "task3", photo) == before
    finally:
        moved.rename(place)


@pytest.mark.slow
def test_mlflow_serves_it(store: tracking.Store, registered: Champion, tmp_path: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/task3@champion"]
    environment = os.environ | {"MLFLOW_TRACKING_URI": store.uri, "MLFLOW_DISABLE_TELEMETRY": "true",
                                "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}  # fmt: skip
    log = tmp_path / "log"
    photo = odd_photos(tmp_path)[0]
    image = decode(photo, 28, 1)
    serve = [*command, "--env-manager", "local", "--port", str(port)]
    with running(serve, log, cwd=tmp_path, env=environment) as process:
        wait_until(lambda: answers(f"http://127.0.0.1:{port}/ping"), process, log)
        served = []
        for one in (image.tolist(), base64.b64encode(photo.read_bytes()).decode()):
            body = json.dumps({"inputs": [one]}).encode()
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}/invocations", body, {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=60) as reply:
                served += json.load(reply)["predictions"]
        request.data = json.dumps({"inputs": [(image / 255).tolist()]}).encode()
        with pytest.raises(urllib.error.HTTPError, match="400") as refused:
            urllib.request.urlopen(request, timeout=60)
        assert "pixels are whole numbers from 0 to 255" in refused.value.read().decode()
    program, about = export.load(registry.fetch_champion(store, "task3", registered, tmp_path))
    with torch.inference_mode():
        expected = program(torch.from_numpy(image[None].copy()))[0].tolist()
    for answer in served:
        assert answer == pytest.approx(dict(zip(about["classes"], expected, strict=True)), abs=1e-5)


def decision(uri: str, held: str, **ours: object) -> tuple[bool, str]:
    """What is decided when the group with these settings is concluded and that run of lenet5 is the champion."""
    runs = analysis.load_runs(["task3"], uri)
    chosen = runs
    for key, value in ours.items():
        chosen = chosen[chosen[key] == value]
    evidence = analysis.Evidence(analysis.choose_group(chosen), uri)
    best = selection.best_split(evidence, "test/accuracy")
    assert best is not None
    return selection.decide(WHOLE, runs, evidence, "test/accuracy", best, Champion("1", held, "", True))


def run_of(uri: str, **settings: object) -> str:
    """The first split's run of the group with these settings."""
    runs = analysis.load_runs(["task3"], uri)
    for key, value in {"split": 0, **settings}.items():
        runs = runs[runs[key] == value]
    return str(runs["run_id"].iloc[0])


def test_within_a_group_the_better_takes_the_place_of_the_worse(store_uri: str, tmp_path: Path) -> None:
    log_model(store_uri, "lenet5", 0.3, tmp=tmp_path)
    log_model(store_uri, "vggnet", 0.95, tmp=tmp_path)
    stays, reason = decision(store_uri, run_of(store_uri, model="lenet5"))
    assert not stays
    assert reason.startswith("its mean accuracy is ")
    assert "lenet5, split 0 (version 1)" in reason
    runs = analysis.load_runs(["task3"], store_uri)
    vgg = runs[runs["model"] == "vggnet"].sort_values(["test/accuracy", "split"], ascending=[False, True])
    assert decision(store_uri, vgg["run_id"].iloc[0]) == (True, "")
    worse = vgg[vgg["test/accuracy"] < vgg["test/accuracy"].max()]
    stays, reason = decision(store_uri, worse["run_id"].iloc[0])
    assert not stays and reason.startswith("its accuracy on its split is ")
    assert decision(store_uri, "of a run that was deleted") == (False, "the run of version 1 was deleted")


def test_an_unfinished_model_and_a_baseline_are_no_champions(store_uri: str, tmp_path: Path) -> None:
    log_model(store_uri, "linear", 0.2, tmp=tmp_path)
    log_model(store_uri, "vggnet", 0.95, splits=3, tmp=tmp_path)
    runs = analysis.load_runs(["task3"], store_uri)
    assert selection.best_split(analysis.Evidence(analysis.choose_group(runs), store_uri), "test/accuracy") is None
    log_model(store_uri, "lenet5", 0.3, tmp=tmp_path)
    runs = analysis.load_runs(["task3"], store_uri)
    best = selection.best_split(analysis.Evidence(analysis.choose_group(runs), store_uri), "test/accuracy")
    assert best is not None
    assert best["model"] == "lenet5"


def test_a_network_that_beats_no_baseline_is_no_champion(store_uri: str, tmp_path: Path) -> None:
    for model, score in (("majority", 0.5), ("linear", 0.9), ("lenet5", 0.4)):
        log_model(store_uri, model, score, tmp=tmp_path)
    runs = analysis.load_runs(["task3"], store_uri)
    assert selection.best_split(analysis.Evidence(analysis.choose_group(runs), store_uri), "test/accuracy") is None


@pytest.mark.parametrize(
    ("earlier", "later", "replaces", "back"),
    [
        ({"dataset": "sample/d"}, {"dataset": "d"}, True, False),
        ({"epochs": 1}, {"epochs": 2}, True, False),
        ({"patience": 3}, {"patience": 7}, True, False),
        ({"dataset": "sample/d", "epochs": 2}, {"dataset": "d", "epochs": 1}, True, False),  # data come first
        ({"leak_free": True}, {"leak_free": False}, True, False),
        ({"lr": 1e-3}, {"lr": 3e-3}, True, False),  # otherwise the newer
        ({"epochs": 3}, {"epochs": 2}, True, False),  # more than the task has is not reduced
    ],
)
def test_between_groups(
    store_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    earlier: dict[str, object], later: dict[str, object], replaces: bool, back: bool,
) -> None:  # fmt: skip
    """Whether the later group takes the place of the earlier, and whether the earlier takes it back."""
    for settings in (earlier, later):
        monkeypatch.setitem(TAGS, "dataset_digest", str(settings.get("dataset", "")).ljust(64, "0"))
        log_model(store_uri, "lenet5", 0.5, tmp=tmp_path, **settings)
    assert decision(store_uri, run_of(store_uri, **earlier), **later)[0] is not replaces
    assert decision(store_uri, run_of(store_uri, **later), **earlier)[0] is not back


def test_newer_is_the_network_and_not_what_ran_beside_it(store_uri: str, tmp_path: Path) -> None:
    log_model(store_uri, "lenet5", 0.5, tmp=tmp_path)
    log_model(store_uri, "lenet5", 0.5, tmp=tmp_path, lr=3e-3)
    log_model(store_uri, "linear", 0.3, tmp=tmp_path)  # last, in the older group
    assert decision(store_uri, run_of(store_uri, lr=3e-3, model="lenet5"), lr=1e-3) == (True, "it is newer")


def test_a_reduced_one_does_not_take_the_place_of_a_whole_one(store_uri: str, tmp_path: Path) -> None:
    log_model(store_uri, "lenet5", 0.5, tmp=tmp_path)
    log_model(store_uri, "lenet5", 0.9, tmp=tmp_path, epochs=1)
    assert decision(store_uri, run_of(store_uri, epochs=2), epochs=1) == (
        True, "a whole protocol before a reduced",
    )  # fmt: skip


def test_a_split_that_was_trained_again_takes_the_place_of_itself(store_uri: str, tmp_path: Path) -> None:
    log_model(store_uri, "lenet5", 0.5, tmp=tmp_path)
    runs = analysis.load_runs(["task3"], store_uri)
    held = str(runs.sort_values("test/accuracy")["run_id"].iloc[-1])
    log_model(store_uri, "lenet5", 0.5, tmp=tmp_path, threads=2)  # which is no other group
    assert decision(store_uri, held) == (False, "the split of version 1 was trained again")
