"""Reading folders of images of every kind, and the cache of decoded ones."""

import os
import stat
import subprocess
import sys
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import datasets
from datasets import DatasetError, Kaggle
from datasets.decoding import decode, decode_files
from datasets.folder import list_folder, read_folder
from datasets.images import LOCK, cached
from datasets.kaggle import unpack
from tests.conftest import ROOT, snapshot

PHOTOS = Kaggle("somebody/photos")


def gradient(width: int = 40, height: int = 20) -> Image.Image:
    """Dark on the left, bright on the right; red at the top, blue at the bottom."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    return Image.fromarray((np.stack([x * (1 - y), 0.5 * x, x * y], -1) * 255).astype(np.uint8))


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("RGB", "jpg"), ("L", "jpg"), ("CMYK", "jpg"), ("RGB", "webp"), ("RGBA", "webp"), ("RGB", "tif"), ("P", "gif")]
    + [(mode, "png") for mode in ("RGB", "L", "RGBA", "P", "LA", "1", "I;16")],
)
def test_every_mode_becomes_rgb_and_gray(tmp_path: Path, mode: str, suffix: str) -> None:
    image = gradient()
    if mode == "I;16":
        wide = np.asarray(image.convert("L")).astype(np.uint16) * 257
        converted = Image.fromarray(wide)
    else:
        converted = image.convert(mode)
    path = tmp_path / f"image.{suffix}"
    converted.save(path)
    rgb, gray = decode(path, 16, 3), decode(path, 16, 1)
    assert rgb.shape == (16, 16, 3) and gray.shape == (16, 16, 1)
    assert rgb.dtype == gray.dtype == np.uint8
    expected = np.asarray(image.convert("L").resize((16, 16), Image.Resampling.BILINEAR)).astype(int)
    limit = 60 if mode in ("1", "P", "CMYK") else 16  # dithering, 256 colours, and conversion there and back
    assert np.abs(gray[..., 0].astype(int) - expected).mean() < limit
    assert gray[:, 12:].mean() > gray[:, :4].mean() + 30


def test_transparent_parts_are_white(tmp_path: Path) -> None:
    Image.new("RGBA", (8, 8), (10, 20, 30, 0)).save(tmp_path / "a.png")
    assert decode(tmp_path / "a.png", 8, 3).min() == 255


def test_exif_orientation_is_honoured(tmp_path: Path) -> None:
    upright = gradient(32, 32)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    upright.save(tmp_path / "upright.png")
    assert np.array_equal(decode(tmp_path / "turned.png", 16, 3), decode(tmp_path / "upright.png", 16, 3))


@pytest.mark.parametrize("quality", [75, 95])
def test_a_large_jpeg_is_the_picture_that_its_pixels_give(tmp_path: Path, quality: int) -> None:
    rng = np.random.default_rng(quality)
    coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3)).astype(np.uint8)).resize((1200, 900))
    noise = rng.normal(0, 12, (900, 1200, 3))
    photo = Image.fromarray((np.asarray(coarse) + noise).clip(0, 255).astype(np.uint8))
    photo.save(tmp_path / "photo.jpg", quality=quality)
    with Image.open(tmp_path / "photo.jpg") as file:
        expected = np.asarray(file.resize((128, 128), Image.Resampling.BILINEAR)).astype(int)
    difference = np.abs(decode(tmp_path / "photo.jpg", 128, 3) - expected)
    assert difference.mean() < 0.6 and difference.max() < 12


def test_folder_is_read_in_an_order_that_is_the_same_everywhere(image_folder: Path) -> None:
    first, second = (read_folder(image_folder, "photos", 16, 3, num_workers=workers) for workers in (1, 8))
    assert first.digest == second.digest
    assert first.classes == ("dark", "light")
    assert first.images.shape == (52, 16, 16, 3) and first.n_pool == 40
    assert first.labels[:40].tolist() == [0] * 20 + [1] * 20
    assert first.images[first.labels == 1].mean() > first.images[first.labels == 0].mean() + 60


def test_class_names_do_not_depend_on_how_a_system_writes_unicode(image_folder: Path) -> None:
    for part in ("train", "test"):
        (image_folder / part / "dark").rename(image_folder / part / unicodedata.normalize("NFD", "어두움"))
    assert read_folder(image_folder, "photos", 16, 3).classes == ("light", "어두움")


def test_broken_files_are_named_and_left_out(image_folder: Path) -> None:
    whole = read_folder(image_folder, "photos", 16, 3)
    (image_folder / "train" / "dark" / "broken.jpg").write_bytes(b"\xff\xd8 this is no photograph")
    truncated = (image_folder / "train" / "light" / "00.png").read_bytes()[:200]
    (image_folder / "test" / "light" / "cut.png").write_bytes(truncated)
    (image_folder / "train" / "dark" / "notes.txt").write_text("not an image, and not meant to be one")
    (image_folder / "train" / "dark" / ".checkpoints").mkdir()
    for hidden in (".checkpoints/00.png", "._00.png"):
        (image_folder / "train" / "dark" / hidden).write_bytes(b"nobody put this here as a picture")
    data = read_folder(image_folder, "photos", 16, 3)
    assert np.array_equal(data.images, whole.images) and data.n_pool == whole.n_pool
    assert [(each.part, each.label, each.file, each.is_broken) for each in data.aside] == [
        ("train", "dark", "train/dark/broken.jpg", True), ("train", "dark", "train/dark/notes.txt", False),
        ("test", "light", "test/light/cut.png", True),
    ]  # fmt: skip
    assert list(datasets.account(data)) == [
        "found 55 = used 52 + set aside 3",
        "train/dark: found 22 = used 20 + set aside 2",
        "  1 does not decode: train/dark/broken.jpg (Pillow finds no image in it)",
        "  1 is no image: train/dark/notes.txt",
        "test/light: found 7 = used 6 + set aside 1",
        "  1 does not decode: test/light/cut.png (OSError: image file is truncated)",
    ]


def test_many_broken_files_are_an_error(image_folder: Path) -> None:
    for number in range(3):
        (image_folder / "train" / "dark" / f"broken{number}.jpg").write_bytes(b"nothing")
    with pytest.raises(DatasetError, match=r"3 of 55 pictures .* do not decode, more than 5%: train/dark/broken0"):
        read_folder(image_folder, "photos", 16, 3)


def test_decoding_names_the_file_of_each_row_however_many_fail(image_folder: Path) -> None:
    whole = read_folder(image_folder, "photos", 16, 3)
    for number in range(20):
        (image_folder / "train" / "dark" / f"{number:02d}.png").write_bytes(b"nothing")
    files = list_folder(image_folder).files()
    images, failures, depth = decode_files(image_folder, files, 16, 3)
    assert [failure is None for failure in failures] == [path.read_bytes() != b"nothing" for path in files]
    assert type(failures[0]).__name__ == "UnidentifiedImageError" and depth == {}
    assert np.array_equal(images[20:], whole.images[20:])


def test_folders_that_are_no_data_set(image_folder: Path) -> None:
    (image_folder / "train" / "empty").mkdir()
    with pytest.raises(DatasetError, match="empty holds no image"):
        read_folder(image_folder, "photos", 16, 3)
    (image_folder / "train" / "empty").rmdir()
    (image_folder / "test" / "other").mkdir()
    Image.new("L", (4, 4)).save(image_folder / "test" / "other" / "a.png")
    with pytest.raises(DatasetError, match="lacks: other"):
        read_folder(image_folder, "photos", 16, 3)
    (image_folder / "train" / "light").rename(image_folder / "train" / ".light")
    with pytest.raises(DatasetError, match="only the class 'dark'"):
        read_folder(image_folder, "photos", 16, 3)


def only_entry(cache: Path) -> Path:
    (entry,) = (path for path in cache.iterdir() if path.name != LOCK)
    return entry


def test_cache_is_used_until_a_file_changes_and_nothing_is_written_beside_the_data(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CACHE_DIR", str(tmp_path / "cache"))
    before = snapshot(image_folder)
    first = datasets.load(PHOTOS, image_folder)
    entry = only_entry(tmp_path / "cache")
    before_use = snapshot(tmp_path / "cache")
    assert datasets.load(PHOTOS, image_folder).digest == first.digest
    assert only_entry(tmp_path / "cache") == entry and snapshot(tmp_path / "cache") == before_use
    assert snapshot(image_folder) == before

    changed = image_folder / "train" / "dark" / "00.png"
    old = changed.stat()
    Image.new("RGB", (32, 24), "blue").save(changed)
    os.utime(changed, ns=(old.st_atime_ns, old.st_mtime_ns))  # as some copy tools do
    assert datasets.load(PHOTOS, image_folder).digest != first.digest


def test_damaged_or_half_written_entries_are_never_used(image_folder: Path, tmp_path: Path) -> None:
    files = list(image_folder.rglob("*.png"))
    reads = []

    def read() -> datasets.ImageData:
        reads.append(1)
        return read_folder(image_folder, "photos", 16, 3)

    def load() -> str:
        return cached("photos", files, [16], tmp_path / "cache", read).digest

    digest = load()
    entry = only_entry(tmp_path / "cache")
    assert load() == digest and len(reads) == 1
    damaged = bytearray((entry / "images.npy").read_bytes())
    damaged[-1] ^= 1
    (entry / "images.npy").write_bytes(bytes(damaged))
    assert load() == digest and len(reads) == 2
    (entry / "images.npy").write_bytes(b"")
    assert load() == digest and len(reads) == 3
    (entry / "meta.json").unlink()
    assert load() == digest and len(reads) == 4
    (tmp_path / "cache" / ".partial-x").mkdir()  # what a killed process leaves
    assert load() == digest and len(reads) == 4
    (entry / "labels.npy").unlink()
    assert load() == digest and len(reads) == 5
    assert only_entry(tmp_path / "cache") == entry  # what was left is gone


def test_processes_that_fill_one_cache_entry_at_once(image_folder: Path, tmp_path: Path) -> None:
    code = (
        "import os, datasets, datasets.decoding as decoding; open_image = decoding._open\n"
        "decoding._open = lambda *arguments: os.write(1, b'#') and open_image(*arguments)\n"
        f"print(datasets.load(datasets.Kaggle('somebody/photos'), {str(image_folder)!r}).digest)"
    )
    environment = os.environ | {"CACHE_DIR": str(tmp_path / "cache")}
    started = [
        subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment, stdout=-1, stderr=-1, text=True)
        for _ in range(4)
    ]
    answers = [process.communicate(timeout=100) for process in started]
    assert len({printed.strip("#\n") for printed, _ in answers}) == 1 and answers[0][0].strip("#\n") != ""
    assert sum(printed.count("#") for printed, _ in answers) == 52  # each image was decoded once
    assert only_entry(tmp_path / "cache").name.startswith("photos-")


def test_a_reader_that_fails_is_not_the_caches_fault(image_folder: Path, tmp_path: Path) -> None:
    def read() -> datasets.ImageData:
        raise PermissionError(13, "Permission denied", "train/secret.png")

    with pytest.raises(PermissionError, match="secret.png"):
        cached("photos", [], [16], tmp_path / "cache", read)
    (tmp_path / "file").touch()
    with pytest.raises(DatasetError, match="cannot write the cache of decoded images to .*Not a directory.* CACHE_DIR"):
        cached("photos", [], [16], tmp_path / "file" / "cache", lambda: read_folder(image_folder, "photos", 16, 3))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_cache_is_one_sentence(image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    monkeypatch.setenv("CACHE_DIR", str(tmp_path / "locked" / "cache"))
    with pytest.raises(DatasetError, match="CACHE_DIR"):
        datasets.load(PHOTOS, image_folder)


def test_archives_are_unpacked_safely(tmp_path: Path) -> None:
    def archive(name: str, **members: str) -> Path:
        with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as file:
            for member, text in members.items():
                file.writestr(member, text)
        return tmp_path / name

    unpack(archive("good.zip", **{"train/cats/a.txt": "a"}), tmp_path / "good")
    assert (tmp_path / "good" / "train" / "cats" / "a.txt").read_text() == "a"
    with pytest.raises(DatasetError, match="leads out"):
        unpack(archive("slip.zip", **{"../outside.txt": "a"}), tmp_path / "slip")
    assert not (tmp_path / "outside.txt").exists()
    with pytest.raises(DatasetError, match="would unpack to"):
        unpack(archive("bomb.zip", a="0" * (101 * 2**20)), tmp_path / "bomb")
    link = zipfile.ZipInfo("link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "link.zip", "w") as file:
        file.writestr(link, "/etc")
    with pytest.raises(DatasetError, match="leads out"):
        unpack(tmp_path / "link.zip", tmp_path / "link")
    (tmp_path / "cut.zip").write_bytes((tmp_path / "good.zip").read_bytes()[:40])
    with pytest.raises(DatasetError, match="cannot be unpacked"):
        unpack(tmp_path / "cut.zip", tmp_path / "cut")
