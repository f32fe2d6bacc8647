"""Images and labels of the tasks, and how they are divided into training, validation and test.

`load` finds a task's data set (or downloads it, or draws the sample), decodes it once and returns `ImageData`.
`RepeatedHoldout` and `StratifiedKFold` turn its labels and a seed into `Split`s. A data set is added by an entry
in `SOURCES`; one that is a folder of images, given by `--data-dir`, needs no other code.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from datasets.duplicates import duplicate_groups, leaking
from datasets.fashion_mnist import FOLDER as FASHION_MNIST
from datasets.images import DatasetError, ImageData, cached, list_folder, one_sentence, read_folder
from datasets.splits import RepeatedHoldout, Split, StratifiedKFold

__all__ = [
    "SOURCES",
    "DatasetError",
    "ImageData",
    "RepeatedHoldout",
    "Source",
    "Split",
    "StratifiedKFold",
    "duplicate_groups",
    "find",
    "leaking",
    "load",
]

DATA_DIR = Path(__file__).resolve().parent.parent / "data"


@dataclass(frozen=True)
class Source:
    """Where a task's images come from and the shape in which its models see them."""

    name: str  # as published, which is also the folder's name
    image_size: int  # pixels, height and width
    channels: int


SOURCES: Mapping[str, Source] = {
    "task1": Source("cats-and-dogs-image-classification", 128, 3),
    "task2": Source("muffin-vs-chihuahua-image-classification", 128, 3),
    "task3": Source(FASHION_MNIST, 28, 1),
}


def load(task: str, data_dir: str | os.PathLike[str] | None = None, sample: bool = False) -> ImageData:
    """Return the images of a task.

    Parameters
    ----------
    task : str
        A key of `SOURCES`.
    data_dir : path, optional
        A folder that holds the data set under its published name, or is itself one with `train/<class>/*` and
        optionally `test/<class>/*`. It is only read. Without it `data/` is used, and filled by a download.
    sample : bool
        The generated sample instead of real data; its name begins with `sample/`.

    Returns
    -------
    ImageData

    Raises
    ------
    DatasetError
        The data are not there and cannot be fetched, or cannot be used.
    """
    source = SOURCES[task]
    root = find(task, data_dir, sample)
    name = f"sample/{source.name}" if sample else root.name
    with one_sentence():
        return _read(source, root, name, Path(os.environ.get("CACHE_DIR") or DATA_DIR / "cache"))


def find(task: str, data_dir: str | os.PathLike[str] | None = None, sample: bool = False) -> Path:
    """Return the folder of a task's data set, which is drawn or downloaded first where that is asked for.

    Parameters and errors are those of `load`.
    """
    from datasets import fashion_mnist, kaggle
    from datasets import sample as generated

    source = SOURCES[task]
    root = DATA_DIR / source.name
    with one_sentence():
        if sample:
            return generated.draw(task, DATA_DIR / "sample") / source.name
        if data_dir is not None and Path(data_dir).resolve() != DATA_DIR:
            return _find_in(Path(data_dir).resolve(), source)
        if root.is_dir():
            return root
        try:
            if source.name == FASHION_MNIST:
                fashion_mnist.download(root)
            else:
                kaggle.download(source.name, root)
        except DatasetError as error:
            raise DatasetError(
                f"{error}. Three ways on: a network connection (and Kaggle credentials in KAGGLE_API_TOKEN or "
                f"~/.kaggle/kaggle.json where Kaggle asks for them); --data-dir with a folder that holds "
                f"{source.name}/ or train/<class>/; or --sample for generated images"
            ) from None
    return root


def _find_in(folder: Path, source: Source) -> Path:
    if not folder.is_dir():
        raise DatasetError(f"--data-dir {folder} is no folder; name one that exists")
    if not os.access(folder, os.R_OK | os.X_OK):
        raise DatasetError(f"--data-dir {folder} cannot be read; check its permissions")
    markers = ("train", "raw") if source.name == FASHION_MNIST else ("train",)
    for root in (folder / source.name, folder):
        if any((root / marker).is_dir() for marker in markers):
            return root
    raise DatasetError(
        f"--data-dir {folder} holds neither {source.name}/ nor train/<class>/; name the folder that does, leave "
        "--data-dir out to download, or use --sample for generated images"
    )


def _read(source: Source, root: Path, name: str, cache_dir: Path) -> ImageData:
    from datasets import fashion_mnist

    if source.name == FASHION_MNIST and (root / "raw").is_dir():
        files = fashion_mnist.raw_files(root)
        return cached(name, files, [name], cache_dir, lambda: fashion_mnist.read(root, name))
    size, channels = source.image_size, source.channels
    files = [path for classes in list_folder(root) for paths in classes.values() for path in paths]
    settings = [name, size, channels]
    return cached(name, files, settings, cache_dir, lambda: read_folder(root, name, size, channels))
