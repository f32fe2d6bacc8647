"""The images of a data set in memory, and the cache of decoded ones."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock, Timeout

from datasets.decoding import Range
from datasets.names import readable_name

DATA_DIR = Path(__file__).resolve().parent.parent / "data"  # downloads, the sample, and the cache
CACHE_FORMAT = 6  # part of every cache key: raise it when decoding or the layout of an entry changes
STORED = ("name", "classes", "n_pool", "n_val", "depth", "files", "aside")  # besides the arrays and the digest
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
        where = readable_name(str(error.filename or "the data"))
        raise DatasetError(f"cannot use {where} ({error.strerror or error}); {remedy} and run again") from None


class SetAside(NamedTuple):
    """A file that is not used."""

    part: str  # train, val or test; empty outside them
    label: str  # name of the class; empty outside of one
    file: str  # readable path below the data set's folder
    reason: str
    detail: str  # what Pillow says of a picture that does not decode; empty for other files

    @property
    def is_broken(self) -> bool:
        """Whether it is a picture that does not decode."""
        return bool(self.detail)


@dataclass(frozen=True)
class ImageData:
    """All images of a data set in memory: the published training, validation and test parts, in this order."""

    name: str  # the published name, or the name of the user's folder
    images: np.ndarray  # uint8, shape (N, height, width, channels)
    labels: np.ndarray  # int64, shape (N,): indices into `classes`
    classes: tuple[str, ...]  # class names in Unicode NFC, in the order of their code points on every machine
    n_pool: int  # size of the published training and validation parts, which protocols split
    n_val: int = 0  # size of the published validation part, the last images of the pool
    # values that became 0 and 255, by kind, of images of 16 or 32 bits (`decoding.decode`)
    depth: dict[str, Range] = field(default_factory=dict)
    files: tuple[str, ...] = ()  # readable paths below the data set's folder; empty if images have no files
    aside: tuple[SetAside, ...] = ()
    digest: str = ""  # SHA-256 over shape, classes, sizes of the parts, depth, labels and pixels, in hexadecimal

    def __post_init__(self) -> None:
        # parts that most data sets lack are left out, so that their digests are those of earlier versions
        others = {"n_val": self.n_val or None, "depth": self.depth or None}
        header = json.dumps([self.images.shape, self.classes, self.n_pool, *([others] if any(others.values()) else [])])
        digest = hashlib.sha256(header.encode())
        digest.update(np.ascontiguousarray(self.labels, dtype="<i8").data)
        digest.update(np.ascontiguousarray(self.images).data)
        object.__setattr__(self, "digest", digest.hexdigest())


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
        meta |= {"classes": tuple(meta["classes"]), "files": tuple(meta["files"])}
        meta["depth"] = {kind: (low, high) for kind, (low, high) in meta["depth"].items()}
        meta["aside"] = tuple(SetAside(*each) for each in meta["aside"])
        data = ImageData(images=images, labels=labels, **{key: meta[key] for key in STORED})
        return data if data.digest == meta["digest"] else None
    except (OSError, ValueError, EOFError, KeyError, TypeError, AttributeError):
        return None  # damaged: the caller reads the files again


def _write_entry(partial: Path, data: ImageData) -> None:
    np.save(partial / "images.npy", data.images)
    np.save(partial / "labels.npy", data.labels)
    meta = {key: getattr(data, key) for key in (*STORED, "digest")}
    (partial / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
