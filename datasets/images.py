"""Folders of images, decoded once to one uint8 array that is kept in a cache."""

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
MAX_SKIPPED = 0.05  # a larger share of undecodable files means that the folder is not what it seems to be
DATA_DIR = Path(__file__).resolve().parent.parent / "data"  # downloads, the sample, and the cache
CACHE_FORMAT = 2  # part of every cache key: raise it when decoding or the layout of an entry changes
LOCK = ".lock"  # in a folder in which others are built
SILENT_WAIT = 3.0  # seconds for another process before a line says so
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, the user's share of it, or a file is full


class DatasetError(Exception):
    """The data cannot be used; the message is one sentence for the user."""


@contextlib.contextmanager
def one_sentence() -> Iterator[None]:
    """Turn what the file system says into a `DatasetError`."""
    try:
        yield
    except OSError as error:
        what = error.filename or "the data"
        how = "free some space there" if error.errno in NO_ROOM else "repair that"
        raise DatasetError(f"cannot use {what} ({error.strerror or error}); {how} and run again") from None


@dataclass(frozen=True)
class ImageData:
    """All images of a data set in memory.

    Attributes
    ----------
    name : str
        The published name, or the name of the user's folder.
    images : numpy.ndarray of uint8, shape (N, height, width, channels)
        The published training part first (`n_pool` images), then the published test part.
    labels : numpy.ndarray of int64, shape (N,)
        Indices into `classes`.
    classes : tuple of str
        Class names in the order of their code points (Unicode NFC), which is the same everywhere.
    n_pool : int
        How many images may be split into training and validation.
    skipped : tuple of str
        Files that did not decode, each with the reason.
    digest : str
        SHA-256 over shape, classes, `n_pool`, labels and pixels, in hexadecimal.
    """

    name: str
    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    n_pool: int
    skipped: tuple[str, ...] = ()
    digest: str = ""

    def __post_init__(self) -> None:
        header = json.dumps([self.images.shape, self.classes, self.n_pool])
        digest = hashlib.sha256(header.encode())
        digest.update(np.ascontiguousarray(self.labels, dtype="<i8").data)
        digest.update(np.ascontiguousarray(self.images).data)
        object.__setattr__(self, "digest", digest.hexdigest())


def decode(path: Path, size: int, channels: int) -> np.ndarray:
    """Read one image file as the array that the models see.

    The first frame, turned upright by its EXIF orientation, transparent parts on white, CMYK and palettes
    converted, resized to a square without keeping the aspect ratio (as both Kaggle tasks are usually run).

    Parameters
    ----------
    path : Path
        A file in any format that Pillow reads.
    size, channels : int
        Height and width in pixels; 3 for RGB, 1 for gray.

    Returns
    -------
    numpy.ndarray of uint8, shape (size, size, channels)
    """
    with Image.open(path) as file:
        # JPEG decodes to 1/2, 1/4 or 1/8 by leaving out frequencies: twice as fast for a photo of 800x532 pixels, more
        # for larger ones. At twice the wanted size it is the same picture: 0.24 of 255 off in the mean, 7 at most
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
    """A file name as text that can be printed and compared: Unicode NFC, whatever is no text replaced."""
    return unicodedata.normalize("NFC", os.fsencode(name).decode("utf-8", "replace"))


def _visible_files(folder: Path) -> list[Path]:
    """All files below a folder but hidden ones and those in hidden folders, in the order of their names."""
    os.scandir(folder).close()  # an unreadable folder is an error here; rglob passes over it in silence
    found = [path for path in folder.rglob("*") if not any(part[0] == "." for part in path.relative_to(folder).parts)]
    return sorted(filter(Path.is_file, found), key=lambda path: readable_name(path.as_posix()))


def _list_classes(part: Path) -> dict[str, list[Path]]:
    """Image files by class name, both sorted; subfolders of a class belong to the class."""
    found: dict[str, list[Path]] = {}
    for folder in part.iterdir():
        if folder.is_dir() and not folder.name.startswith("."):
            images = [path for path in _visible_files(folder) if path.suffix.lower() in IMAGE_SUFFIXES]
            found[readable_name(folder.name)] = images
    return dict(sorted(found.items()))


def list_folder(root: Path) -> tuple[dict[str, list[Path]], dict[str, list[Path]]]:
    """List `root/train/<class>/*` and `root/test/<class>/*`, and check that they can be a data set.

    Returns
    -------
    train, test : dict of str to list of Path
        Files by class name; `test` is empty where there is no test folder.

    Raises
    ------
    DatasetError
        No train folder, fewer than two classes, a class without images, or test classes that training lacks.
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
    """Decode image files, whether or not all of them can be.

    Parameters
    ----------
    root : Path
        The folder that all of them lie below.
    files : sequence of Path, length N
        In any order, such as `list_folder`'s.
    size, channels : int
        Height and width in pixels; 3 for RGB, 1 for gray.
    num_workers : int
        Decoding threads (Pillow releases the interpreter lock); at most one a core is used.

    Returns
    -------
    images : numpy.ndarray of uint8, shape (N, size, size, channels)
        Row i is what `decode` makes of `files[i]`; without meaning where that failed.
    failures : list of str or None, length N
        None where it did not fail, otherwise the file's path below `root` and the reason.
    """
    images = np.empty((len(files), size, size, channels), dtype=np.uint8)

    def decode_into(row: int) -> str | None:
        try:
            images[row] = decode(files[row], size, channels)
        except Exception as error:  # noqa: BLE001 - Pillow's parsers raise whatever a broken file makes them trip over
            reason = str(error).replace(str(files[row]), "the file")
            return readable_name(f"{files[row].relative_to(root)} ({error.__class__.__name__}: {reason})")
        return None

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ThreadPoolExecutor(min(num_workers, cores)) as pool:
        results = pool.map(decode_into, range(len(files)))
        description = f"decoding {rich.markup.escape(root.name)}"
        return images, list(track(results, description, total=len(files), console=Console(stderr=True)))


def read_folder(root: Path, name: str, size: int, channels: int, num_workers: int = 8) -> ImageData:
    """Decode a folder with `train/<class>/*` and optionally `test/<class>/*`.

    Parameters
    ----------
    root : Path
        Only read, never written to.
    name : str
        What the data set is called in the result database.
    size, channels : int
        Height and width in pixels; 3 for RGB, 1 for gray.
    num_workers : int
        See `decode_files`.

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
    """Return what `read` makes of `files`, from the cache where these very files were read before.

    An entry's key covers `settings` and every file's path, size and times of change (modification, and inode
    change, which no copy tool sets back), so it changes when the files do. An entry is built once however many
    processes ask for it, and its digest is checked at each use: a damaged one is built again.

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
    with contextlib.ExitStack() as stack:  # what `read` raises is not the cache's fault
        with _cache_sentence(cache_dir):
            partial = stack.enter_context(building(entry))
        if (data := _read_entry(entry)) is None:
            data = read()
            with _cache_sentence(cache_dir):
                _write_entry(partial, data)
    return data


@contextlib.contextmanager
def building(target: Path) -> Iterator[Path]:
    """Build a folder that appears whole or not at all, in one process at a time.

    Parameters
    ----------
    target : Path
        The folder to build. The folder that will hold it is made, and locked meanwhile.

    Yields
    ------
    Path
        An empty folder beside `target`. When the body ends without an error it takes the place of `target`, unless
        it is still empty; otherwise it is removed.

    Raises
    ------
    OSError
        The folder that holds `target` cannot be written, or the disk is full; it is named.

    Notes
    -----
    Another process may have built `target` while this one waited for the lock: look for it in the body, and leave
    the empty folder alone if it will do.
    """
    parent = target.parent
    parent.mkdir(parents=True, exist_ok=True)
    with _locked(parent):
        for stray in parent.glob(".partial-*"):  # of a process that was killed: whoever lives would hold the lock
            shutil.rmtree(stray, ignore_errors=True)
        partial = parent / f".partial-{target.name}"
        partial.mkdir()
        try:
            yield partial
            if any(partial.iterdir()):
                shutil.rmtree(target, ignore_errors=True)
                partial.rename(target)
        except OSError as error:
            if error.errno in NO_ROOM:  # it names no file, or one that is gone by now
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
        print(f"waiting for another process that fills {folder}; Ctrl-C gives up", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _cache_sentence(cache_dir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DatasetError(
            f"cannot write the cache of decoded images to {cache_dir}: {error.strerror or error}; "
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
