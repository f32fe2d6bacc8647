"""`python -m datasets audit`: what it finds in a folder with known faults, as JSON, text and contact sheet."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import datasets
from datasets import DatasetError
from datasets.audit import MAX_GROUPS, audit, draw_contact_sheet, to_text
from experiments import task1, task2, task3
from tests.conftest import REAL_DATA, snapshot
from tests.test_datasets import run_here
from tests.test_duplicates import picture

DATA = {module.TASK.name: module.TASK.data for module in (task1, task2, task3)}
KEYS = {
    "task", "dataset", "folder", "digest", "refusal", "parts", "original_size", "undecodable", "exact_duplicate_groups",
    "exact_duplicates", "near_duplicate_groups", "near_duplicate_images", "two_label_groups", "across_parts_groups",
    "near_duplicates", "val_images_with_near_duplicate_in_train", "test_images_also_in_train",
    "test_images_with_near_duplicate_in_train", "leaks", "method",
}  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """46 different pictures, and copies of some: within a class, under another label, in the test folder."""
    root = tmp_path / "pets"
    for number in range(46):
        part = root / ("train" if number < 30 else "test") / ("cats" if number % 2 else "dogs")
        part.mkdir(parents=True, exist_ok=True)
        picture(number, 200 + number, 150).save(part / f"{number:02d}.png")
    picture(1, 201, 150).save(root / "train" / "cats" / "01 equal.png")
    picture(3, 203, 150).save(root / "train" / "dogs" / "03 other label.jpg", quality=60)
    picture(4, 204, 150).resize((120, 80)).save(root / "test" / "dogs" / "04 small.jpg", quality=20)
    picture(5, 205, 150).save(root / "test" / "cats" / "05 [red] equal.png")
    return root


def files(images: list[dict]) -> list[str]:
    return [image["file"] for image in images]


def test_every_fault_is_found_and_nothing_else(folder: Path) -> None:
    (folder / "test" / "cats" / "broken (1).jpg").write_bytes(b"\xff\xd8 no photograph")
    before = snapshot(folder)
    report, data = audit("task1", DATA["task1"], folder)
    assert snapshot(folder) == before
    assert set(report) == KEYS and json.loads(json.dumps(report)) == report
    assert report["dataset"] == "pets" and report["refusal"] is None
    assert report["digest"] == data.digest == datasets.load(DATA["task1"], folder).digest
    assert report["parts"] == {"train": {"cats": 16, "dogs": 16}, "test": {"cats": 9, "dogs": 9}}
    assert report["original_size"]["width"] == {"min": 120, "median": 220.5, "max": 245}
    assert report["original_size"]["height"] == {"min": 80, "median": 150, "max": 150}
    (broken,) = report["undecodable"]
    assert broken["file"] == "test/cats/broken (1).jpg"
    assert broken["reason"] == "Pillow finds no image in it"

    assert [files(images) for images in report["exact_duplicates"]] == [
        ["train/cats/01 equal.png", "train/cats/01.png"],
        ["train/cats/05.png", "test/cats/05 [red] equal.png"],
    ]
    found = {tuple(files(group["images"])): group for group in report["near_duplicates"]}
    two_labels = found.pop(("train/cats/03.png", "train/dogs/03 other label.jpg"))
    assert two_labels["two_labels"] and not two_labels["across_parts"]
    assert [image["class"] for image in two_labels["images"]] == ["cats", "dogs"]
    small = found.pop(("train/dogs/04.png", "test/dogs/04 small.jpg"))
    assert small["across_parts"] and not small["two_labels"] and small["correlation"] < 1
    assert [image["part"] for image in small["images"]] == ["train", "test"]
    assert sorted(found) == [tuple(files(images)) for images in report["exact_duplicates"]]
    assert all(group["distance"] == 0 and group["correlation"] == 1 for group in found.values())
    for group in report["near_duplicates"]:
        for image in group["images"]:
            assert data.classes[data.labels[image["index"]]] == image["class"] == image["file"].split("/")[1]


def test_test_images_in_training_are_counted_twice_over(folder: Path) -> None:
    report, _ = audit("task1", DATA["task1"], folder)
    assert [(leak["test"], leak["train"]) for leak in report["leaks"]] == [
        ("test/cats/05 [red] equal.png", ["train/cats/05.png"]),
        ("test/dogs/04 small.jpg", ["train/dogs/04.png"]),
    ]
    same_hash = [leak["same_hash"] for leak in report["leaks"]]
    assert same_hash[0] and report["test_images_also_in_train"] == sum(same_hash)
    assert report["test_images_with_near_duplicate_in_train"] == report["across_parts_groups"] == 2
    counts = {key: report[f"{key}_groups"] for key in ("exact_duplicate", "near_duplicate", "two_label")}
    assert counts == {"exact_duplicate": 2, "near_duplicate": 4, "two_label": 1}
    assert report["near_duplicate_images"] == 8


def test_a_published_validation_part_is_a_part(folder: Path) -> None:
    for label in ("cats", "dogs"):
        (folder / "val" / label).mkdir(parents=True)
        picture(90 + len(label) + (label == "cats"), 200, 150).save(folder / "val" / label / "new.png")
    picture(7, 207, 150).save(folder / "val" / "cats" / "07 equal.png")
    report, _ = audit("task1", DATA["task1"], folder)
    assert report["parts"]["val"] == {"cats": 2, "dogs": 1} and [*report["parts"]] == ["train", "val", "test"]
    (copied,) = [group for group in report["near_duplicates"] if "val/cats/07 equal.png" in files(group["images"])]
    assert copied["across_parts"] and {image["part"] for image in copied["images"]} == {"train", "val"}
    assert report["across_parts_groups"] == 3 and report["val_images_with_near_duplicate_in_train"] == 1
    assert "Validation images that are also in training, equal or nearly equal: 1 of 3" in to_text(report)


def test_clean_data_have_no_findings(image_folder: Path) -> None:
    report, data = audit("task1", DATA["task1"], image_folder)
    assert not any(report[key] for key in KEYS if key.endswith(("groups", "duplicates", "train", "leaks", "able")))
    draw_contact_sheet(report, data, image_folder.parent / "new" / "sheet.png")
    assert "0 of 12" in to_text(report)


def test_broken_files_are_named_where_a_run_refuses_the_data(folder: Path, run_command) -> None:
    for number in range(0, 30, 4):
        (folder / "train" / "dogs" / f"{number:02d}.png").write_bytes(b"nothing")
    with pytest.raises(DatasetError, match="do not decode"):
        datasets.load(DATA["task1"], folder)
    result = run_command("-m", "datasets", "audit", "task1", "--data-dir", str(folder), "--format", "json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert set(report) == KEYS
    assert files(report["undecodable"]) == [f"train/dogs/{number:02d}.png" for number in range(0, 30, 4)]
    assert "8 of 50 pictures" in report["refusal"]
    assert report["parts"]["train"] == {"cats": 16, "dogs": 8}
    assert [files(group["images"]) for group in report["near_duplicates"]] == [
        ["train/cats/01 equal.png", "train/cats/01.png"],
        ["train/cats/03.png", "train/dogs/03 other label.jpg"],
        ["train/cats/05.png", "test/cats/05 [red] equal.png"],
    ]


def test_nothing_decodes_at_all(image_folder: Path) -> None:
    for path in image_folder.rglob("*.png"):
        path.write_bytes(b"nothing")
    report, _ = audit("task1", DATA["task1"], image_folder)
    assert len(report["undecodable"]) == 52 and report["parts"]["train"] == {"dark": 0, "light": 0}
    assert report["original_size"] == {"width": None, "height": None}
    text = to_text(report)
    assert "Undecodable files: 52" in text and "and 49 more" in text and "A run refuses these data" in text


def test_refusals_for_another_reason_stay_errors(image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHE_DIR", str(image_folder / "train" / "dark" / "00.png" / "cache"))
    with pytest.raises(DatasetError, match="CACHE_DIR"):
        audit("task1", DATA["task1"], image_folder)


def test_text_json_file_and_contact_sheet_of_the_command(folder: Path, tmp_path: Path, run_command) -> None:
    command = ["-m", "datasets", "audit", "task1", "--data-dir", str(folder)]
    sheet = tmp_path / "new" / "sheet.png"
    shown = run_command(*command, "--contact-sheet", str(sheet))
    assert shown.returncode == 0, shown.stderr
    lines = [line.strip() for line in shown.stdout.splitlines()]
    assert "Pictures with two labels: 1" in lines
    assert "train/cats/03.png = train/dogs/03 other label.jpg" in lines
    assert "test/cats/05 [red] equal.png = train/cats/05.png" in lines
    assert "Test images that are also in training, equal or nearly equal: 2 of 18" in lines
    assert f"contact sheet: {sheet}" in shown.stderr
    with Image.open(sheet) as image:
        assert image.format == "PNG" and image.width > 1_000

    out = tmp_path / "other" / "audit.json"
    written = run_command(*command, "--out", str(out))
    assert written.returncode == 0 and written.stdout.strip() == str(out)
    assert json.loads(out.read_text())["two_label_groups"] == 1
    assert json.loads(out.read_text()) == audit("task1", DATA["task1"], folder)[0]


def test_wrong_input_is_one_sentence(image_folder: Path, monkeypatch, capfd) -> None:
    for arguments, code in (
        (("task9",), 2),
        (("task1", "--format", "latex"), 2),
        (("task1", "--data-dir", str(image_folder / "nowhere")), 1),
        (("task1", "--data-dir", str(image_folder), "--out", "/dev/null/a.json"), 1),
        (("task1", "--data-dir", str(image_folder), "--out", str(image_folder / "a.json")), 2),
        ((str(image_folder), "--out", str(image_folder / "a.json")), 2),
    ):
        result = run_here(monkeypatch, capfd, "audit", *arguments)
        assert result.returncode == code and "Traceback" not in result.stderr
        assert code == 2 or result.stderr.splitlines()[-1].startswith("Error: ")


def test_a_folder_of_ones_own_is_audited(image_folder: Path, monkeypatch, capfd) -> None:
    result = run_here(monkeypatch, capfd, "audit", str(image_folder), "--format", "json")
    assert result.returncode == 0 and json.loads(result.stdout)["folder"] == str(image_folder)


def test_images_without_files_are_named_by_part_and_number(tmp_path: Path) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 255, (50, 28, 28)).astype(np.uint8)
    images[44] = images[7]
    for part, chosen in (("train", images[:40]), ("t10k", images[40:])):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, *chosen.shape) + chosen.tobytes())
        labels = bytes(number % 10 for number in range(len(chosen)))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, len(chosen)) + labels)
    report, _ = audit("task3", DATA["task3"], tmp_path)
    (group,) = report["near_duplicates"]
    assert group["images"] == [
        {"index": 7, "part": "train", "class": "Sneaker", "file": "train/7"},
        {"index": 44, "part": "test", "class": "Coat", "file": "test/4"},
    ]
    assert report["test_images_also_in_train"] == report["two_label_groups"] == 1
    assert report["original_size"]["width"] == {"min": 28, "median": 28, "max": 28}


def test_contact_sheet_shows_the_worst_groups_and_says_what_is_missing(folder: Path, tmp_path: Path) -> None:
    report, data = audit("task1", DATA["task1"], folder)
    report["near_duplicates"] *= 40
    draw_contact_sheet(report, data, tmp_path / "many.png")
    report["near_duplicates"] = report["near_duplicates"][: MAX_GROUPS // 2]
    draw_contact_sheet(report, data, tmp_path / "few.png")
    with Image.open(tmp_path / "many.png") as many, Image.open(tmp_path / "few.png") as few:
        assert few.height * 1.5 < many.height < few.height * 2.1
        # the first thumbnails are the picture with two labels, as the models see it
        first = np.asarray(many)[26:154, 12:140].astype(int)
    index = next(image["index"] for image in report["near_duplicates"][1]["images"])
    assert np.array_equal(first, data.images[index])


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason=f"the real data are not in {REAL_DATA.name}/ beside the repository")
@pytest.mark.parametrize(
    ("task", "also", "near", "pictures", "images"), [("task1", 7, 11, 35, 70), ("task2", 78, 128, 393, 792)]
)
@pytest.mark.slow
def test_real_pictures_that_are_in_train_and_test(task: str, also: int, near: int, pictures: int, images: int) -> None:
    report, _ = audit(task, DATA[task], REAL_DATA)
    assert report["test_images_also_in_train"] == also
    assert report["test_images_with_near_duplicate_in_train"] == near == len(report["leaks"])
    assert (report["near_duplicate_groups"], report["near_duplicate_images"]) == (pictures, images)
    assert report["two_label_groups"] == report["exact_duplicate_groups"] == 0
