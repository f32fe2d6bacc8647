"""Folders as people have them: every file is used or set aside with a reason, and a picture is what it looks like."""

import os
import re
import struct
import subprocess
import sys
import unicodedata
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import datasets
from datasets import DatasetError, ImageData, Kaggle, folder
from datasets.account import count_classes, slices
from datasets.arrange import arrange
from datasets.decoding import decode
from datasets.folder import list_folder, read_folder, usual_shape
from datasets.names import readable_name
from experiments.folder import make_task
from tests.conftest import ROOT, snapshot


def picture(path: Path, value: int = 100, mode: str = "L") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(value)
    Image.fromarray(rng.integers(value - 20, value + 20, (12, 12)).astype(np.uint8)).convert(mode).save(path)
    return path


def fill(folder: Path, *labels: str, count: int = 3) -> Path:
    for number, label in enumerate(labels):
        for index in range(count):
            picture(folder / label / f"{index}.png", 40 + 60 * number + index)
    return folder


def read(root: Path) -> ImageData:
    return read_folder(root, "photos", 8, 1)


def on_disk(root: Path) -> int:
    """Count files as a user does, with a tool of another kind."""
    listed = subprocess.run(
        ["find", "-L", str(root), "-name", ".*", "!", "-name", ".", "-prune", "-o", "!", "-type", "d", "-print0"],
        capture_output=True, check=False,
    ).stdout  # fmt: skip
    system = (b"@eaDir", b"__MACOSX", b"Thumbs.db", b"desktop.ini")
    return sum(not any(name in path for name in system) for path in listed.split(b"\0") if path)


def test_every_file_is_used_or_named_with_a_reason(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    fill(root / "train", "cats", "dogs", count=30)
    fill(root / "validation", "cats", "dogs")
    fill(root / "test", "cats")
    picture(root / "train/cats/holiday/1.pgm")
    (root / "train/cats/nothing.jpg").symlink_to(tmp_path / "gone.jpg")
    (root / "train/dogs/more").symlink_to(fill(tmp_path / "elsewhere", "in") / "in", target_is_directory=True)
    (root / "train/dogs/loop").symlink_to(root / "train", target_is_directory=True)
    (root / "train/dogs/itself.png").symlink_to(root / "train/dogs/itself.png")
    (root / "train/cats/notes.txt").write_text("no image")
    (root / "train/cats/broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    (root / "train/cats/photo.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    (root / "train/cats/empty.jpg").write_bytes(b"")
    picture(root / "train/loose.png")
    picture(root / "test/unknown.png")
    picture(root / "raw/scan.png")
    (root / "README.md").write_text("mine")
    picture(root / "train/cats/@eaDir/0.png/SYNOPHOTO_THUMB_M.png")
    picture(root / "train/__MACOSX/cats/0.png")
    picture(root / "train/cats/.hidden.png")
    (root / "train/cats/Thumbs.db").write_bytes(b"windows")
    before = snapshot(root)
    data = read(root)
    assert snapshot(root) == before
    used = {each: np.bincount(data.labels[rows]).tolist() for each, rows in slices(data).items()}
    assert used == {"train": [31, 33], "val": [3, 3], "test": [3]}
    aside = {(each.part, each.label, each.file): each.reason for each in data.aside}
    assert aside == {
        ("train", "cats", "train/cats/nothing.jpg"): "is a link to nothing",
        ("train", "dogs", "train/dogs/loop"): "is a link to a folder that holds it",
        ("train", "dogs", "train/dogs/itself.png"): "is a link to nothing",
        ("train", "cats", "train/cats/notes.txt"): "is no image",
        ("train", "cats", "train/cats/broken.png"): "does not decode",
        ("train", "cats", "train/cats/photo.HEIC"): "does not decode",
        ("train", "cats", "train/cats/empty.jpg"): "does not decode",
        ("train", "", "train/loose.png"): "lies in no class folder",
        ("test", "", "test/unknown.png"): "lies in no class folder",
        ("", "", "raw/scan.png"): "lies in raw/, which is no part of the data",
        ("", "", "README.md"): "lies beside the folders of the classes",
    }
    details = {each.file: each.detail for each in data.aside}
    assert details["train/cats/photo.HEIC"] == "Pillow reads no .heic files; convert it to PNG or JPEG"
    assert details["train/cats/empty.jpg"] == "it is empty"
    assert len(data.labels) + len(data.aside) == on_disk(root) + 2  # find passes over the loops
    assert len(data.files) == len(data.labels) == len(set(data.files))


LAYOUTS: dict[str, Callable[[Path], object]] = {
    "train and test": lambda root: (fill(root / "train", "a", "b"), fill(root / "test", "a", "b")),
    "other names": lambda root: (fill(root / "Training", "a", "b"), fill(root / "testing", "a", "b")),
    "a year each": lambda root: (fill(root / "train2017", "a", "b"), fill(root / "test2017", "a", "b")),
    "a set each": lambda root: (fill(root / "training_set", "a", "b"), fill(root / "Test-Images", "a", "b")),
    "a folder in a folder": lambda root: (fill(root / "x/y/train", "a", "b"), fill(root / "x/y/test", "a", "b")),
    "train in train": lambda root: (fill(root / "train/train", "a", "b"), fill(root / "test/test", "a", "b")),
    "raw beside it": lambda root: (
        fill(root / "train", "a", "b"), fill(root / "test", "a", "b"), (root / "raw").mkdir(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_that_people_have(layout: str, tmp_path: Path) -> None:
    LAYOUTS[layout](tmp_path / "photos")
    expected = {part: {"a": 3, "b": 3} for part in ("train", "test")}
    for source in (Kaggle("somebody/photos", 8, 1), datasets.FashionMNIST()):
        data = datasets.load(source, tmp_path / "photos")
        assert count_classes(data) == expected and data.aside == ()


def test_a_folder_that_is_no_part_is_named_by_some_of_its_files(tmp_path: Path) -> None:
    fill(tmp_path / "photos" / "train_set", "a", "b")
    for number in range(12):
        picture(tmp_path / "photos" / "raw" / f"{number:02d}.png")
    total, elsewhere, line = datasets.account(read(tmp_path / "photos"), examples=1000)
    assert total == "found 18 = used 6 + set aside 12" and elsewhere.startswith("elsewhere: found 12 = used 0")
    assert line.startswith("  12 lie in raw/, which is no part of the data: raw/") and line.endswith("; and 2 more")


def test_classes_alone_are_a_training_part(tmp_path: Path) -> None:
    fill(tmp_path / "photos", "a", "b")
    picture(tmp_path / "photos" / "stray.png")
    data = read(tmp_path / "photos")
    assert count_classes(data) == {"train": {"a": 3, "b": 3}, "test": {"a": 0, "b": 0}}
    assert [each.file for each in data.aside] == ["stray.png"]
    assert datasets.load(Kaggle("somebody/photos", 8, 1), tmp_path / "photos").digest == data.digest


def test_a_folder_of_data_sets_is_no_data_set(tmp_path: Path) -> None:
    fill(tmp_path / "cats-and-dogs" / "train", "a", "b")
    fill(tmp_path / "muffins" / "train", "a", "b")
    with pytest.raises(DatasetError, match="holds neither photos/ nor"):
        datasets.load(Kaggle("somebody/photos"), tmp_path)


def test_pictures_in_no_folder_get_the_command_that_arranges_them(tmp_path: Path) -> None:
    for part in ("train", "."):
        root = tmp_path / part.replace(".", "flat")
        for name in ("cat.0.png", "cat.1.png", "dog.0.png"):
            picture(root / (part if part == "train" else "") / name)
        sentence = r"holds 3 pictures in no class folder, such as cat\.0\.png; .*arrange"
        with pytest.raises(DatasetError, match=sentence):
            read(root)
    with pytest.raises(DatasetError, match=sentence):  # and as the folder of a task's own data set
        datasets.load(Kaggle("somebody/photos", 8, 1), tmp_path / "flat")


@pytest.mark.parametrize(("place", "sentence"), [
    ("images/{}", "neither train/<class>/ nor two or more folders of pictures, but {root}/images does; name that one"),
    ("train/images/{}", "{root}/train holds only the class 'images', whose pictures lie in 2 folders (a, b); if these"),
    ("images", "{root}/images holds 3 pictures in no class folder, such as 0.png; python -m datasets arrange "
     "{root}/images TARGET"),
])  # fmt: skip
def test_classes_that_lie_deeper_are_found(place: str, sentence: str, tmp_path: Path) -> None:
    root = tmp_path / "photos"
    for label in ("a", "b"):
        fill(root, place.format(label))
    (root / "annotations").mkdir()
    (root / "annotations" / "table.csv").write_text("")
    picture(root / "example.png")
    with pytest.raises(DatasetError) as error:
        read(root)
    assert sentence.format(root=root) in str(error.value)


def test_a_class_that_may_be_a_folder_of_classes_is_noted(tmp_path: Path) -> None:
    fill(tmp_path / "photos" / "letters", "a", "b", "c", "d")
    fill(tmp_path / "photos", "examples")
    notes = list(datasets.notes(read(tmp_path / "photos")))
    assert notes[0].startswith(
        "the pictures of class 'letters' lie in 4 folders (a, b, c, ...), which are one class; if"
    )
    (tmp_path / "photos" / "letters").rename(tmp_path / "photos" / "all")
    (tmp_path / "photos" / "letters").mkdir()
    (tmp_path / "photos" / "all").rename(tmp_path / "photos" / "letters" / "all")
    assert "class 'letters' lie in 4 folders (a, b, c, ...)" in next(datasets.notes(read(tmp_path / "photos")))
    picture(tmp_path / "photos" / "letters" / "one.png")
    assert not any("folders" in note for note in datasets.notes(read(tmp_path / "photos")))


def test_a_folder_is_listed_once_before_its_pictures_are_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "photos", "a", "b", count=6)
    listed: list[Path] = []
    monkeypatch.setattr(folder, "_list_others", lambda listing, folders: listed.append(listing.root))
    data = datasets.load(make_task(tmp_path / "photos").data)
    assert len(data.labels) == 12 and listed == [tmp_path / "photos"]


def test_names_that_are_equal_in_unicode_are_one_class_and_others_stay_apart(tmp_path: Path) -> None:
    root = fill(tmp_path / "photos" / "train", "개", unicodedata.normalize("NFD", "개"), "고양이")
    for number, name in enumerate((b"caf\xe9", b"caf\xe8")):
        for index in range(3):
            picture(root / os.fsdecode(name) / f"{index}.png", 200 + number)
    data = read(tmp_path / "photos")
    assert count_classes(data)["train"] == {"caf\\xe8": 3, "caf\\xe9": 3, "개": 6, "고양이": 3}
    assert len(data.labels) == 15


def test_classes_whose_names_look_alike_stay_apart_and_are_named(tmp_path: Path) -> None:
    fill(tmp_path / "photos", "cat", "cat ", "Cat", "c\u200bat", "dog")
    data = read(tmp_path / "photos")
    assert count_classes(data)["train"] == {"Cat": 3, "cat": 3, "cat ": 3, "c\u200bat": 3, "dog": 3}
    note = (
        "the names of the classes 'Cat' and 'cat' and 'cat ' and 'c\\u200bat' look alike; if they are one class, merge"
    )
    assert any(each.startswith(note) for each in datasets.notes(data))


def test_no_name_reaches_a_terminal_raw(tmp_path: Path) -> None:
    assert readable_name("a\x1b[31m\nb\u202ec") == "a\\x1b[31m\\nb\\u202ec"
    fill(tmp_path / "photos" / "train", "red\x1b[31m", "b")
    (tmp_path / "photos" / "train" / "b" / "x\x1b[2J.txt").write_text("")
    data = read(tmp_path / "photos")
    assert data.classes == ("b", "red\\x1b[31m")
    assert "\x1b" not in "".join(datasets.account(data))


@pytest.mark.parametrize(("kind", "dark", "bright"), [
    ("12 bits in 16", 300, 3_000), ("8 bits in 16", 40, 200), ("negative", -900, 1_200), ("fractions", 0.1, 0.8),
    ("large fractions", 1e4, 9e4), ("16 bits", 5_000, 60_000),
])  # fmt: skip
def test_deep_pixels_keep_the_range_of_the_training_part(kind: str, dark: float, bright: float, tmp_path: Path) -> None:
    dtype = {"negative": np.int32, "fractions": np.float32, "large fractions": np.float32}.get(kind, np.uint16)
    rng = np.random.default_rng(0)
    spread = abs(bright - dark) / 10
    every = []
    for part in ("train", "test"):
        for label, base in (("dark", dark), ("bright", bright)):
            (tmp_path / "photos" / part / label).mkdir(parents=True)
            for number in range(3):
                pixels = (base + rng.uniform(-spread, spread, (8, 8))).astype(dtype)
                Image.fromarray(pixels).save(tmp_path / "photos" / part / label / f"{number}.tif")
                every += [pixels] * (part == "train")
    data = read(tmp_path / "photos")
    low, high = float(np.min(every)), float(np.max(every))
    kind = "fractions" if dtype is np.float32 else "integers"
    assert data.depth == {kind: (low, high)}
    first = np.asarray(Image.open(tmp_path / "photos" / "train" / "bright" / "0.tif")).astype(float)
    assert np.abs(data.images[0, ..., 0] - (first - low) / (high - low) * 255).max() <= 0.51
    means = [data.images[data.labels == label].mean() for label in (0, 1)]  # bright, dark
    assert means[0] - means[1] > 100
    again = decode(tmp_path / "photos" / "train" / "bright" / "0.tif", 8, 1, data.depth)
    assert np.array_equal(again, data.images[0])
    assert f"{kind} of 16 or 32 bits: {low:g} becomes black and {high:g} white" in " ".join(datasets.notes(data))
    assert data.digest != ImageData(data.name, data.images, data.labels, data.classes, data.n_pool).digest


def png_of_16_bits(pixels: np.ndarray) -> bytes:
    """Encode uint16 pixels (height, width, 2, 3 or 4), as the PNG specification says; Pillow writes no such files."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    height, width, planes = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[planes], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    chunks = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_a_hidden_colour_of_16_bits_is_white(tmp_path: Path) -> None:
    pixels = np.full((8, 8, 3), 300, np.uint16)
    pixels[:4] = 9
    content = png_of_16_bits(pixels)
    chunk = b"tRNS" + struct.pack(">HHH", 9, 9, 9)
    place = content.index(b"IDAT") - 4
    hidden = struct.pack(">I", 6) + chunk + struct.pack(">I", zlib.crc32(chunk))
    (tmp_path / "hidden.png").write_bytes(content[:place] + hidden + content[place:])
    image = decode(tmp_path / "hidden.png", 8, 3, {"integers": (0.0, 600.0)})
    assert (image[:3] == 255).all() and (image[5:] == 128).all()


@pytest.mark.parametrize("planes", [2, 3, 4])
def test_colours_of_16_bits_keep_their_low_bytes(planes: int, tmp_path: Path) -> None:
    """12 bits in 16: their high bytes alone are at most 15."""
    rng = np.random.default_rng(0)
    every, opaque = {}, planes % 2 == 0
    for label, base in (("dark", 300), ("light", 3000)):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for number in range(3):
            pixels = rng.integers(base, base + 900, (8, 8, planes)).astype(np.uint16)
            pixels[..., -1] = 65_535 if opaque else pixels[..., -1]
            (tmp_path / "photos" / label / f"{number}.png").write_bytes(png_of_16_bits(pixels))
            every[label, number] = pixels[..., : planes - opaque].astype(float)
    data = datasets.load(datasets.ImageFolder(str(tmp_path / "photos"), 8, 3))
    low, high = min(each.min() for each in every.values()), max(each.max() for each in every.values())
    assert data.depth == {"integers": (low, high)}
    for image, (_, pixels) in zip(data.images, sorted(every.items()), strict=True):
        assert np.abs(image - (pixels - low) / (high - low) * 255).max() <= 0.51


def test_fractions_and_integers_have_a_range_each(tmp_path: Path) -> None:
    pixels = np.arange(64).reshape(8, 8)
    kinds = {"integers": pixels.astype(np.uint16) * 40 + 100, "fractions": (pixels / 64).astype(np.float32)}
    for label in ("a", "b"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for kind, values in kinds.items():
            Image.fromarray(values).save(tmp_path / "photos" / label / f"{kind}.tif")
        picture(tmp_path / "photos" / label / "eight bits.png")
    data = datasets.load(datasets.ImageFolder(str(tmp_path / "photos"), 8, 1))
    assert data.depth == {"fractions": (0.0, 63 / 64), "integers": (100.0, 2620.0)}
    by_kind = {name: data.images[data.files.index(f"a/{name}.tif")] for name in kinds}
    assert np.array_equal(by_kind["integers"], by_kind["fractions"])
    assert by_kind["integers"].min() == 0 and by_kind["integers"].max() == 255
    cached = datasets.load(datasets.ImageFolder(str(tmp_path / "photos"), 8, 1))
    assert (cached.depth, cached.digest) == (data.depth, data.digest)
    for name, image in by_kind.items():
        assert np.array_equal(decode(tmp_path / "photos" / "a" / f"{name}.tif", 8, 1, data.depth), image)


def test_pictures_of_one_colour_and_small_test_parts_are_named(tmp_path: Path) -> None:
    fill(tmp_path / "photos" / "train", "a", "b")
    fill(tmp_path / "photos" / "test", "a")
    Image.new("L", (9, 9), 7).save(tmp_path / "photos" / "train" / "b" / "black.png")
    assert list(datasets.notes(read(tmp_path / "photos"))) == [
        "1 of 4 pictures of class 'b' are of one colour",
        "the test part has only 3 of class 'a': one image is 33 % of it",
        "the test part has no image of class 'b': its score there is not known",
    ]


@pytest.mark.parametrize("suffix", ["png", "webp", "jpg"])
def test_damaged_metadata_are_no_damaged_picture(suffix: str, tmp_path: Path) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3)).astype(np.uint8))
    broken = b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">H", 900) + b"\x01\x12\0\x03\xff\xff"
    options = {"lossless": True} if suffix == "webp" else {}
    image.save(tmp_path / f"a.{suffix}", exif=broken, **options)
    image.save(tmp_path / f"b.{suffix}", **options)
    assert np.array_equal(decode(tmp_path / f"a.{suffix}", 16, 3), decode(tmp_path / f"b.{suffix}", 16, 3))


@pytest.mark.parametrize("name", [b"tEXt", b"zTXt", b"eXIf", b"cHRM", b"gAMA", b"pHYs"])
def test_damaged_chunks_beside_the_pixels_are_no_damaged_picture(name: bytes, tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    chunk = struct.pack(">I", 3) + name + b"no\0" + b"sums"
    (tmp_path / "b.png").write_bytes(content[:33] + chunk + content[33:])
    expected = decode(tmp_path / "a.png", 12, 1)
    assert np.array_equal(decode(tmp_path / "b.png", 12, 1), expected)
    with (tmp_path / "b.png").open("rb") as file:
        assert np.array_equal(decode(file, 12, 1), expected)
    (tmp_path / "b.png").write_bytes(content[:33] + chunk + content[33:50])
    with pytest.raises((OSError, ValueError), match="cannot identify|[Tt]runcated|checksum"):
        decode(tmp_path / "b.png", 12, 1)


def test_libraries_print_nothing(tmp_path: Path) -> None:
    fill(tmp_path / "photos" / "train", "a", "b", count=30)
    rng = np.random.default_rng(0)
    fax = Image.fromarray(rng.integers(0, 255, (64, 64)).astype(np.uint8)).convert("1")
    fax.save(tmp_path / "photos" / "train" / "a" / "fax.tif", compression="group4")
    content = bytearray((tmp_path / "photos" / "train" / "a" / "fax.tif").read_bytes())
    for place in range(200, len(content) - 200, 37):
        content[place] ^= 0xFF
    (tmp_path / "photos" / "train" / "a" / "fax.tif").write_bytes(bytes(content))
    code = f"import pathlib, datasets.folder as folder; folder.read_folder(pathlib.Path({str(tmp_path)!r}), 'p', 8, 1)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert all("decoding" in line for line in done.stderr.splitlines() if line.strip()), done.stderr


@pytest.mark.parametrize("table", [None, "id,label\n{},cat\n{},cat\n{},dog\n", "{};cat\n{};cat\n{};dog\n", "{}.png|\n"])
def test_loose_pictures_are_arranged_in_copies(table: str | None, tmp_path: Path) -> None:
    names = ["cat.0", "cat_1", "dog2"] if table is None else ["a1", "a2", "a3"]
    for name in names:
        picture(tmp_path / "loose" / f"{name}.png")
    before = snapshot(tmp_path / "loose")
    labels = None
    if table:
        labels = tmp_path / "labels.csv"
        labels.write_text(table.format(*names))
    if table and "|" in table:
        with pytest.raises(DatasetError, match="3 pictures have no class in"):
            arrange(tmp_path / "loose", tmp_path / "new", labels)
        return
    assert arrange(tmp_path / "loose", tmp_path / "new", labels) == ({"cat": 2, "dog": 1}, [], [])
    assert count_classes(read(tmp_path / "new"))["train"] == {"cat": 2, "dog": 1}
    assert snapshot(tmp_path / "loose") == before
    with pytest.raises(DatasetError, match="exists already"):
        arrange(tmp_path / "loose", tmp_path / "new", labels)


def test_pictures_without_a_suffix_are_arranged_by_their_names(tmp_path: Path) -> None:
    for name in ("cat0", "cat1", "dog0"):
        picture(tmp_path / "loose" / f"{name}.png").rename(tmp_path / "loose" / name)
    assert arrange(tmp_path / "loose", tmp_path / "new")[0] == {"cat": 2, "dog": 1}


def test_gray_pictures_with_transparency_are_gray(tmp_path: Path) -> None:
    for name in ("train/a/0.png", "train/b/0.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        Image.new("LA", (40, 40), (90, 200)).save(tmp_path / name)
    assert usual_shape(list_folder(tmp_path)) == (48, 1)


TABLES = {
    "class before picture": "breed,file\ncat,1.png\ndog,2.png\n",
    "class behind numbers": "file,width,Label\n1.png,40,cat\n2.png,50,dog\n",
    "index of pandas": ",file,breed\n0,1.png,cat\n1,2.png,dog\n",
    "index like pictures": "n,id,category\n1,2.png,dog\n2,1.png,cat\n",
    "commas of numbers": "file;weight;class\n1.png;1,25;cat\n2.png;1,5;dog\n",
    "bars": "1.png|cat\n2.png|dog\n",
    "paths of Windows": "photos\\1.png,cat\nphotos\\2.png,dog\n",
    "byte order mark": "\ufeff1,cat\r\n2,dog\r\n",
    "separators at the end": "1.png,cat,\n2.png,dog,,\n",
    "an empty line first": "\nfile,width,label\n1.png,40,cat\n2.png,50,dog\n",
    "label and its name": "file,label,label_name\n1.png,cat,Cat\n2.png,dog,Dog\n",
}


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_the_columns_of_a_table_are_found(table: str, tmp_path: Path) -> None:
    for name in ("1.png", "2.png"):
        picture(tmp_path / "loose" / name)
    lost = re.sub(r"[12](?=\.png|,cat|,dog)", "99", table.splitlines()[-1])
    (tmp_path / "labels.csv").write_text(f"{table}{lost}\n{lost}\n")
    counts, _, missing = arrange(tmp_path / "loose", tmp_path / "new", tmp_path / "labels.csv")
    assert counts == {"cat": 1, "dog": 1} and missing == ["99.png" if "png" in table else "99"]
    assert (tmp_path / "new/cat/1.png").exists() and (tmp_path / "new/dog/2.png").exists()


@pytest.mark.parametrize(("table", "sentence"), [
    ("file,cat,dog\n1.png,1,0\n2.png,0,1\n", r"2 columns of .* may be that of the classes: cat, dog; name one of them"),
    ("1.png,40,cat\n2.png,50,dog\n", "2 columns of .* may be that of the classes: 40, cat; name one of them"),
    ("1.png,cat\n2.png,lost+found\n", r"a class cannot be called 'lost\+found'"),
    ("1.png,cat\n2.png,do\0g\n", "a class cannot be called .* no folder's name can hold"),
    (f"1.png,cat\n2.png,{'dog' * 100}\n", "a class cannot be called 'dog.*: its name has 300 bytes"),
    ("1.png,cat\n", r"1 picture has no class in .*, such as 2\.png"),
])  # fmt: skip
def test_a_table_that_says_no_class_is_refused(table: str, sentence: str, tmp_path: Path) -> None:
    for name in ("1.png", "2.png"):
        picture(tmp_path / "loose" / name)
    (tmp_path / "labels.csv").write_text(table)
    with pytest.raises(DatasetError, match=sentence):
        arrange(tmp_path / "loose", tmp_path / "new", tmp_path / "labels.csv")
    assert not (tmp_path / "new").exists()


def test_numbers_that_are_no_years_make_no_parts(tmp_path: Path) -> None:
    assert read(fill(tmp_path, "test0001", "test0002")).classes == ("test0001", "test0002")


def test_pictures_of_one_class_are_not_arranged(tmp_path: Path) -> None:
    for name in ("n01440764_tench", "n01443537_goldfish"):
        picture(tmp_path / "loose" / f"{name}.png")
    with pytest.raises(DatasetError, match="all 2 pictures are of one class, 'n', by their names; name a table"):
        arrange(tmp_path / "loose", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_long_folder_name_leaves_room_for_the_bar(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    fill(tmp_path / ("long " * 40), "a", "b")
    read(tmp_path / ("long " * 40))
    shown = [line for line in capfd.readouterr().err.splitlines() if "decoding" in line]
    assert shown and all(len(line) < 120 and "…" in line and "100%" in line for line in shown)
