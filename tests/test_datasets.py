"""The data sets of the tasks: the sample, Fashion-MNIST's files, and the real ones where they are."""

import gzip
import hashlib
import runpy
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest

import datasets
from datasets import DatasetError, FashionMNIST, ImageFolder, Kaggle
from datasets.images import LOCK
from experiments import task1, task2, task3
from tests.conftest import REAL_DATA, snapshot

DATA = {module.TASK.name: module.TASK.data for module in (task1, task2, task3)}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHE_DIR", str(tmp_path / "cache"))


@pytest.mark.parametrize(("task", "shape", "classes"), [
    ("task1", (128, 128, 3), ("cats", "dogs")),
    ("task2", (128, 128, 3), ("chihuahua", "muffin")),
    ("task3", (28, 28, 1), None),
])  # fmt: skip
def test_sample_looks_like_the_real_thing(task: str, shape: tuple[int, ...], classes: tuple[str, ...] | None) -> None:
    data = datasets.load(DATA[task], sample=True)
    assert data.images.shape[1:] == shape
    assert data.name == f"sample/{DATA[task].name}"
    assert 0 < data.n_pool < len(data.labels)
    assert len(np.unique(data.labels)) == len(data.classes)
    assert data.classes == classes if classes else len(data.classes) == 10
    assert data.images.std() > 20
    assert datasets.load(DATA[task], sample=True).digest == data.digest


def test_other_data_sets_have_no_sample() -> None:
    for source in (Kaggle("somebody/flowers"), ImageFolder("flowers")):
        with pytest.raises(DatasetError, match="no generated sample of flowers; .*--data-dir"):
            datasets.load(source, sample=True)


def test_sample_is_drawn_the_same_each_time(tmp_path: Path) -> None:
    from datasets import sample

    def files(folder: Path) -> list[str]:
        root = sample.draw(DATA["task2"].name, folder)
        return [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(root.rglob("*.jpg"))]

    first = files(tmp_path / "a")
    assert first == files(tmp_path / "b") and len(set(first)) == len(first) > 0


REAL = [
    ("task1", 557, 140, [279, 278]),
    ("task2", 4_733, 1_184, [2_559, 2_174]),
    ("task3", 60_000, 10_000, [6_000] * 10),
]


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason=f"the real data are not in {REAL_DATA.name}/ beside the repository")
@pytest.mark.parametrize(("task", "train", "test", "counts"), REAL)
def test_real_data(task: str, train: int, test: int, counts: list[int]) -> None:
    data = datasets.load(DATA[task], REAL_DATA)
    assert (data.n_pool, len(data.labels) - data.n_pool) == (train, test)
    assert np.bincount(data.labels[: data.n_pool]).tolist() == counts
    assert data.aside == ()


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason=f"the real data are not in {REAL_DATA.name}/ beside the repository")
def test_fashion_mnist_packed_unpacked_and_damaged(tmp_path: Path) -> None:
    published = REAL_DATA / "FashionMNIST" / "raw"
    before = snapshot(published)
    packed = datasets.load(DATA["task3"], REAL_DATA)
    assert snapshot(published) == before
    raw = tmp_path / "unpacked" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for path in published.iterdir():
        (raw / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
    assert datasets.load(DATA["task3"], tmp_path / "unpacked").digest == packed.digest
    with gzip.open(published / "t10k-labels-idx1-ubyte.gz") as file:
        assert np.array_equal(np.frombuffer(file.read(), np.uint8, offset=8), packed.labels[60_000:])

    for path in published.iterdir():
        shutil.copyfile(path, raw / path.name)
        (raw / path.stem).unlink()
    (raw / "t10k-images-idx3-ubyte.gz").write_bytes(b"cut short")
    with pytest.raises(DatasetError, match="t10k-images-idx3-ubyte.gz is damaged"):
        datasets.load(DATA["task3"], tmp_path / "unpacked")
    (raw / "t10k-images-idx3-ubyte.gz").unlink()
    with pytest.raises(DatasetError, match="lacks 1 of the 4 files"):
        datasets.load(DATA["task3"], tmp_path / "unpacked")


def test_folder_of_ones_own_serves_every_task(image_folder: Path) -> None:
    for source in DATA.values():
        data = datasets.load(source, image_folder)
        assert data.name == "photos"
        assert data.images.shape[1:] == (source.image_size, source.image_size, source.channels)


def test_a_folder_is_a_source(image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.sources.DATA_DIR", tmp_path)
    absolute, relative = ImageFolder(str(image_folder), 16, 1), ImageFolder("photos", 16, 1)
    first = datasets.load(absolute)
    assert first.name == absolute.name == relative.name == "photos" and first.images.shape == (52, 16, 16, 1)
    assert datasets.load(relative).digest == first.digest == datasets.load(relative, tmp_path).digest
    with pytest.raises(DatasetError, match=f"there is no folder {tmp_path / 'nowhere'}"):
        datasets.load(ImageFolder("nowhere"))


@pytest.mark.parametrize("slug", ["cats", "a/b/c", "/cats", "somebody/", ""])
def test_a_kaggle_data_set_has_an_owner_and_a_name(slug: str) -> None:
    with pytest.raises(ValueError, match="named owner/name"):
        Kaggle(slug)
    assert (Kaggle("somebody/cats").name, FashionMNIST().name) == ("cats", "FashionMNIST")


@pytest.mark.parametrize("place", ["photos", "datasets/somebody/photos"])
def test_a_data_set_that_is_attached_to_a_kaggle_notebook_is_found(
    place: str, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attached = tmp_path / "input"
    monkeypatch.setattr("datasets.sources.KAGGLE_INPUT", attached)
    (attached / place).mkdir(parents=True)
    source = Kaggle("somebody/photos", image_size=16)
    assert source.home == datasets.images.DATA_DIR / "photos"  # nothing is in there
    shutil.copytree(image_folder, attached / place, dirs_exist_ok=True)
    assert source.home == attached / place and Kaggle("somebody/others").home == datasets.images.DATA_DIR / "others"
    assert datasets.load(source).digest == datasets.load(source, image_folder).digest


def test_data_dir_that_holds_nothing(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no folder"):
        datasets.load(DATA["task1"], tmp_path / "nowhere")
    with pytest.raises(DatasetError, match="holds neither .* use --sample"):
        datasets.load(DATA["task1"], tmp_path)


def test_no_network_says_the_three_ways_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    monkeypatch.setattr("datasets.sources.DATA_DIR", tmp_path / "data")
    # a proxy that nobody listens on: the same as no network, wherever the test runs
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setattr(urllib.request, "_opener", None)  # it remembers the proxies of its first use
    for task in ("task1", "task3"):
        with pytest.raises(DatasetError, match=r"Three ways on: .*credentials.*--data-dir.*--sample"):
            datasets.load(DATA[task])
    assert [path.name for path in (tmp_path / "data").iterdir()] == [LOCK]
    assert capfd.readouterr().out == ""


def run_here(monkeypatch: pytest.MonkeyPatch, capfd, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m datasets` in this process: a new one takes seconds to import all that it needs."""
    monkeypatch.setattr(sys, "argv", ["datasets", *arguments])
    capfd.readouterr()
    with pytest.raises(SystemExit) as end:
        runpy.run_module("datasets", run_name="__main__")
    return subprocess.CompletedProcess(arguments, end.value.code or 0, *capfd.readouterr())


def test_info_prints_classes_counts_and_digest(image_folder: Path, run_command, monkeypatch, capfd) -> None:
    result = run_command("-m", "datasets", "info", "task1", "--data-dir", str(image_folder))
    assert result.returncode == 0, result.stderr
    words = result.stdout.split()
    assert words[words.index("dark") : words.index("dark") + 3] == ["dark", "20", "6"]
    assert datasets.load(DATA["task1"], image_folder).digest in result.stdout
    assert run_here(monkeypatch, capfd, "info", "task9").returncode == 2
    missing = run_here(monkeypatch, capfd, "info", "task1", "--data-dir", str(image_folder / "nowhere"))
    assert missing.returncode == 1 and missing.stderr.startswith("Error: ") and "Traceback" not in missing.stderr
