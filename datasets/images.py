"""Folders of images, decoded once into one uint8 array that a cache keeps."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rich.markup
from filelock import FileLock, Timeout
from PIL import Image, ImageOps
from rich.console import Console
from rich.progress import track

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".heic", ".avif"}
MAX_SKIPPED = 0.05  # a larger share of undecodable files means that the folder is no data set
DATA_DIR = Path(__file__).resolve().parent.parent / "data"  # downloads, the sample, and the cache
CACHE_FORMAT = 2  # part of every cache key: raise it when decoding or the layout of an entry changes
LOCK = ".lock"  # in every folder that `building` fills
SILENT_WAIT = 3.0  # seconds of waiting for another process before a message
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, the user's share of it, or a file is full


class DatasetError(Exception):
    """The data are unusable; the message is one sentence for the user."""


def cache_dir() -> Path:
    """Return the cache folder: `CACHE_DIR`, or `data/cache/`."""
    return Path(os.environ.get("CACHE_DIR") or DATA_DIR / "cache")


@contextlib.contextmanager
def one_sentence() -> Iterator[None]:
    """Turn an error of the file system into a `DatasetError`."""
    try:
        yield
    except OSError as error:
        remedy = "free some space there" if error.errno in NO_ROOM else "repair that"
        where = error.filename or "the data"
        raise DatasetError(f"cannot use {where} ({error.strerror or error}); {remedy} and run again") from None


@dataclass(frozen=True)
class ImageData:
    """All images of a data set in memory: the published training part, then the published test part."""

    name: str  # the published name, or the name of the user's folder
    images: np.ndarray  # uint8, shape (N, height, width, channels)
    labels: np.ndarray  # int64, shape (N,): indices into `classes`
    classes: tuple[str, ...]  # class names in Unicode NFC, in the order of their code points on every machine
    n_pool: int  # size of the published training part, which protocols split
    skipped: tuple[str, ...] = ()  # undecodable files, each with the reason
    digest: str = ""  # SHA-256 over shape, classes, `n_pool`, labels and pixels, in hexadecimal

    def __post_init__(self) -> None:
        header = json.dumps([self.images.shape, self.classes, self.n_pool])
        digest = hashlib.sha256(header.encode())
        digest.update(np.ascontiguousarray(self.labels, dtype="<i8").data)
        digest.update(np.ascontiguousarray(self.images).data)
        object.__setattr__(self, "digest", digest.hexdigest())


def decode(path: Path, size: int, channels: int) -> np.ndarray:
    """Decode one image file to the pixels that models see.

    Only the first frame is read. EXIF orientation is applied, transparency becomes white, CMYK and palettes are
    converted, and the image is resized to a square regardless of its aspect ratio, as is usual for both Kaggle tasks.

    Returns
    -------
    numpy.ndarray of uint8, shape (size, size, channels)
        RGB for 3 channels, gray for 1.
    """
    with Image.open(path) as file:
        # JPEG decodes to 1/2, 1/4 or 1/8 of its size by skipping frequencies: twice as fast for a photo of 800x532
        # pixels. At twice the wanted size the picture is the same: 0.24 of 255 off in the mean, 7 at most
        file.draft(None, (2 * size, 2 * size))
        image: Image.Image = ImageOps.exif_transpose(file)
    if image.mode.startswith("I"):  # 16 bits a pixel: Pillow's own conversion clips at 255 instead of scaling
        image = Image.fromarray((np.asarray(image, dtype=np.uint32) >> 8).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    image = image.convert("RGB" if channels == 3 else "L")
    image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(image).reshape(size, size, channels)


def readable_name(name: str) -> str:
    """Return a file name as printable, comparable text: Unicode NFC, undecodable bytes replaced."""
    return unicodedata.normalize("NFC", os.fsencode(name).decode("utf-8", "replace"))


def _visible_files(folder: Path) -> list[Path]:
    """List the files below a folder in order of their names, without hidden files and folders."""
    os.scandir(folder).close()  # raises for an unreadable folder, which rglob skips silently
    found = [path for path in folder.rglob("*") if not any(part[0] == "." for part in path.relative_to(folder).parts)]
    return sorted(filter(Path.is_file, found), key=lambda path: readable_name(path.as_posix()))


def _list_classes(part: Path) -> dict[str, list[Path]]:
    """List image files by class name, both sorted; subfolders belong to their class."""
    found: dict[str, list[Path]] = {}
    for folder in part.iterdir():
        if folder.is_dir() and not folder.name.startswith("."):
            images = [path for path in _visible_files(folder) if path.suffix.lower() in IMAGE_SUFFIXES]
            found[readable_name(folder.name)] = images
    return dict(sorted(found.items()))


def list_folder(root: Path) -> tuple[dict[str, list[Path]], dict[str, list[Path]]]:
    """List `root/train/<class>/*` and `root/test/<class>/*`, and check that they form a data set.

    Returns
    -------
    train, test : dict of str to list of Path
        Files by class name; `test` is empty without a test folder.

    Raises
    ------
    DatasetError
        There is no train folder, only one class, a class without images, or a test class missing from training.
    """
    if not (root / "train").is_dir():
        raise DatasetError(f"{root} holds no folder train/; put each class into a folder of its own below it")
    train = _list_classes(root / "train")
    test = _list_classes(root / "test") if (root / "test").is_dir() else {}
    if len(train) < 2:
        found = f"only the class {next(iter(train))!r}" if train else "no class"
        raise DatasetError(f"{root / 'train'} holds {found}; put each of two or more classes into a folder of its own")
    for part, classes in (("train", train), ("test", test)):
        for name, files in classes.items():
            if not files:
                raise DatasetError(f"{root / part / name} holds no image; add some or remove the folder")
    if unknown := sorted(set(test) - set(train)):
        raise DatasetError(f"{root / 'test'} holds classes that {root / 'train'} lacks: {', '.join(unknown)}")
    return train, test


def decode_files(
    root: Path, files: Sequence[Path], size: int, channels: int, num_workers: int = 8
) -> tuple[np.ndarray, list[str | None]]:
    """Decode image files below `root`, and record those that fail.

    Pillow releases the interpreter lock, so up to `num_workers` threads decode, at most one per core.

    Returns
    -------
    images : numpy.ndarray of uint8, shape (N, size, size, channels)
        Row i is `decode(files[i])`, or undefined if that fails.
    failures : list of str or None, length N
        The file's path below `root` and the reason, or None for a decoded file.
    """
    images = np.empty((len(files), size, size, channels), dtype=np.uint8)

    def decode_into(row: int) -> str | None:
        try:
            images[row] = decode(files[row], size, channels)
        except Exception as error:  # noqa: BLE001 - Pillow's parsers raise any error for a broken file
            reason = str(error).replace(str(files[row]), "the file")
            return readable_name(f"{files[row].relative_to(root)} ({error.__class__.__name__}: {reason})")
        return None

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ThreadPoolExecutor(min(num_workers, cores)) as pool:
        results = pool.map(decode_into, range(len(files)))
        description = f"decoding {rich.markup.escape(root.name)}"
        return images, list(track(results, description, total=len(files), console=Console(stderr=True)))


def read_folder(root: Path, name: str, size: int, channels: int, num_workers: int = 8) -> ImageData:
    """Decode a folder with `train/<class>/*` and optionally `test/<class>/*`, which is only read.

    See `decode_files` for the parameters; `name` is that in the result database.

    Raises
    ------
    DatasetError
        The folder is no data set, or more than 5 % of its files do not decode.
    """
    parts = list_folder(root)
    classes = tuple(parts[0])
    jobs = [(path, classes.index(label)) for part in parts for label, files in part.items() for path in files]
    n_train = sum(map(len, parts[0].values()))
    images, failures = decode_files(root, [path for path, _ in jobs], size, channels, num_workers)
    skipped = tuple(filter(None, failures))
    if len(skipped) > MAX_SKIPPED * len(jobs):
        raise DatasetError(
            f"{len(skipped)} of {len(jobs)} files in {root} do not decode, more than {MAX_SKIPPED:.0%}: "
            f"{'; '.join(skipped[:3])}; repair or remove them"
        )
    good = np.array([failure is None for failure in failures])
    labels = np.array([label for _, label in jobs], dtype=np.int64)
    n_pool = int(good[:n_train].sum())
    if missing := set(range(len(classes))) - set(labels[:n_train][good[:n_train]].tolist()):
        raise DatasetError(f"no image of class {classes[missing.pop()]!r} in {root / 'train'} decodes; repair them")
    return ImageData(name, images if good.all() else images[good], labels[good], classes, n_pool, skipped)


def cached(
    name: str, files: Iterable[Path], settings: object, cache_dir: Path, read: Callable[[], ImageData]
) -> ImageData:
    """Return the result of `read` for `files`, from the cache if they are unchanged since it was stored.

    The key of an entry covers `settings` and the path, size, modification time and inode change time (which no copy
    tool sets back) of every file. Processes that need the same entry build it once. Every use checks the digest, and
    a damaged entry is rebuilt.

    Raises
    ------
    DatasetError
        The cache folder cannot be written (no space, no permission).
    """
    key = hashlib.sha256(json.dumps([CACHE_FORMAT, settings]).encode())
    for path in sorted(files):
        stat = path.stat()
        key.update(os.fsencode(path))
        key.update(f"\0{stat.st_size}\0{stat.st_mtime_ns}\0{stat.st_ctime_ns}\0".encode())
    entry = cache_dir / f"{name.replace('/', '-')[:40]}-{key.hexdigest()[:20]}"
    if (data := _read_entry(entry)) is not None:
        return data
    with contextlib.ExitStack() as stack:  # errors of `read` are not the cache's
        with cache_sentence("decoded images", cache_dir):
            partial = stack.enter_context(building(entry))
        if (data := _read_entry(entry)) is None:
            data = read()
            with cache_sentence("decoded images", cache_dir):
                _write_entry(partial, data)
    return data


@contextlib.contextmanager
def building(target: Path) -> Iterator[Path]:
    """Build a folder that appears complete or not at all, in one process at a time.

    Parameters
    ----------
    target : Path
        The folder to build. Its parent is created, and locked meanwhile.

    Yields
    ------
    Path
        An empty folder beside `target`. It replaces `target` if the body leaves files in it and raises no error;
        otherwise it is removed.

    Raises
    ------
    OSError
        The parent cannot be written, or the disk is full; the error names the parent.

    Notes
    -----
    Another process may build `target` while this one waits for the lock: check in the body, and leave the folder
    empty in that case.
    """
    parent = target.parent
    parent.mkdir(parents=True, exist_ok=True)
    with _locked(parent):
        for stray in parent.glob(".partial-*"):  # of a killed process: a live one would hold the lock
            shutil.rmtree(stray, ignore_errors=True)
        partial = parent / f".partial-{target.name}"
        partial.mkdir()
        try:
            yield partial
            if any(partial.iterdir()):
                shutil.rmtree(target, ignore_errors=True)
                partial.rename(target)
        except OSError as error:
            if error.errno in NO_ROOM:  # names no file, or one that is removed below
                raise OSError(error.errno, os.strerror(error.errno), str(parent)) from None
            raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=SILENT_WAIT)
    except Timeout:
        print(f"waiting for another process that fills {folder}; Ctrl-C cancels", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def cache_sentence(contents: str, folder: Path) -> Iterator[None]:
    """Turn an error of writing to the cache into a `DatasetError`."""
    try:
        yield
    except OSError as error:
        raise DatasetError(
            f"cannot write the cache of {contents} to {folder}: {error.strerror or error}; "
            "make room there or name another folder in CACHE_DIR"
        ) from None


def _read_entry(entry: Path) -> ImageData | None:
    try:
        meta = json.loads((entry / "meta.json").read_text(encoding="utf-8"))
        images, labels = (np.load(entry / f"{part}.npy", allow_pickle=False) for part in ("images", "labels"))
        classes, skipped = tuple(meta["classes"]), tuple(meta["skipped"])
        data = ImageData(meta["name"], images, labels, classes, meta["n_pool"], skipped)
        return data if data.digest == meta["digest"] else None
    except (OSError, ValueError, EOFError, KeyError, TypeError):
        return None  # damaged: the caller reads the files again


def _write_entry(partial: Path, data: ImageData) -> None:
    np.save(partial / "images.npy", data.images)
    np.save(partial / "labels.npy", data.labels)
    meta = {key: getattr(data, key) for key in ("name", "classes", "n_pool", "skipped", "digest")}
    (partial / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
