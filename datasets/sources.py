"""Data sources: a Kaggle data set, Fashion-MNIST, or a folder of images.

A `Task` names one. `load` finds it, downloads it or draws its sample, decodes it once and returns `ImageData`.
"""

import contextlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from datasets.folder import Listing, decode_listed, find_parts, folders_in, list_folder, loose_pictures, no_class
from datasets.images import DATA_DIR, DatasetError, ImageData, cache_dir, cached, one_sentence
from datasets.names import readable_name

KAGGLE_INPUT = Path("/kaggle/input")  # data sets that are attached to a Kaggle notebook


class Source(ABC):
    """A data set, and the size and channels of its images as models see them."""

    image_size: int  # height and width in pixels
    channels: int  # 3 for RGB, 1 for gray

    @property
    @abstractmethod
    def name(self) -> str:
        """Name in the result database, and of the folder that holds the data set."""

    @property
    def home(self) -> Path:
        """The folder of the data set, unless `data_dir` names another."""
        return DATA_DIR / self.name

    @abstractmethod
    def download(self, root: Path) -> None:
        """Download the data set to the folder `root`, which appears only when complete."""

    def is_in(self, folder: Path) -> bool:
        """Whether `folder` itself is such a data set."""
        return folder.is_dir() and bool(find_parts(folder))

    def _list(self, root: Path) -> Listing:
        return list_folder(root)

    def read(self, root: Path, name: str) -> ImageData:
        """Decode the data set in `root`, or read it from the cache."""
        listing = self._list(root)
        files, settings = listing.files(), [name, self.image_size, self.channels, [each.file for each in listing.aside]]
        return cached(
            name, files, settings, cache_dir(), lambda: decode_listed(listing, name, self.image_size, self.channels)
        )


@dataclass(frozen=True)
class ImageFolder(Source):
    """A folder with `train/<class>/*` and, optionally, `test/<class>/*`."""

    path: str  # a relative path starts at data/
    image_size: int = 128
    channels: int = 3
    listing: Listing | None = field(default=None, repr=False, compare=False)  # of its files, if they were just listed

    def _list(self, root: Path) -> Listing:
        return self.listing if self.listing and self.listing.root == root else super()._list(root)

    @property
    def name(self) -> str:
        """Name of the folder."""
        return readable_name(self.home.name)

    @property
    def home(self) -> Path:
        """The folder itself."""
        return (DATA_DIR / Path(self.path).expanduser()).resolve()

    def download(self, root: Path) -> None:
        """Raise `DatasetError`: the folder does not exist."""
        raise DatasetError(f"there is no folder {root}; create it, or name another one in the task or in --data-dir")


@dataclass(frozen=True)
class Kaggle(Source):
    """A data set on Kaggle that unpacks to `train/<class>/*` and, optionally, `test/<class>/*`."""

    slug: str  # owner/name, as in the address of its page
    image_size: int = 128
    channels: int = 3

    def __post_init__(self) -> None:
        if self.slug.count("/") != 1 or not all(self.slug.split("/")):
            raise ValueError(f"a Kaggle data set is named owner/name, not {self.slug!r}")

    @property
    def name(self) -> str:
        """The published name, without the owner."""
        return self.slug.split("/")[1]

    @property
    def home(self) -> Path:
        """Where it is attached to a Kaggle notebook, or else the folder in `data/`."""
        attached = (KAGGLE_INPUT / self.name, KAGGLE_INPUT / "datasets" / self.slug)  # Kaggle has had both
        return next(filter(self.is_in, attached), super().home)

    def download(self, root: Path) -> None:
        """See `kaggle.download`, also for the errors."""
        from datasets import kaggle

        with _advice(self.name):
            kaggle.download(self.slug, root)


@dataclass(frozen=True)
class FashionMNIST(Source):
    """Fashion-MNIST (Xiao, Rasul and Vollgraf 2017, arXiv:1708.07747): 70,000 garments of 10 classes, 28x28 gray."""

    image_size: int = 28
    channels: int = 1

    @property
    def name(self) -> str:
        """Torchvision's name of the folder."""
        return "FashionMNIST"

    def download(self, root: Path) -> None:
        """See `fashion_mnist.download`, also for the errors."""
        from datasets import fashion_mnist

        with _advice(self.name):
            fashion_mnist.download(root)

    def is_in(self, folder: Path) -> bool:
        """Whether `folder` has the published files, or images in `train/`."""
        return self.is_packed(folder) or super().is_in(folder)

    def is_packed(self, folder: Path) -> bool:
        """Whether `folder` has the published idx files rather than pictures."""
        return (folder / "raw").is_dir() and not super().is_in(folder)

    def read(self, root: Path, name: str) -> ImageData:
        """Decode the data set in `root`, or read it from the cache."""
        from datasets import fashion_mnist

        if not self.is_packed(root):
            return super().read(root, name)
        files = fashion_mnist.raw_files(root)
        return cached(name, files, [name], cache_dir(), lambda: fashion_mnist.read(root, name))


@contextlib.contextmanager
def _advice(name: str) -> Iterator[None]:
    """Add to the error of a download how to get images without it."""
    try:
        yield
    except DatasetError as error:
        raise DatasetError(
            f"{error}. Three ways on: a network connection (and Kaggle credentials in KAGGLE_API_TOKEN or "
            "~/.kaggle/kaggle.json if Kaggle asks for them); --data-dir with a folder that holds "
            f"{name}/ or train/<class>/; or --sample for generated images"
        ) from None


def load(source: Source, data_dir: str | os.PathLike[str] | None = None, sample: bool = False) -> ImageData:
    """Return the images of a source.

    Parameters
    ----------
    source : Source
    data_dir : path, optional
        A folder that holds the data set under its name, or is itself one with `train/<class>/*` and optionally
        `test/<class>/*`. It is only read. The default is `data/`, to which missing data sets are downloaded.
    sample : bool
        Use the generated sample instead of real data; its name begins with `sample/`.

    Raises
    ------
    DatasetError
        The data set is missing and cannot be downloaded, or is unusable.
    """
    root = find(source, data_dir, sample)
    name = f"sample/{source.name}" if sample else readable_name(root.name)
    with one_sentence():
        return source.read(root, name)


def find(source: Source, data_dir: str | os.PathLike[str] | None = None, sample: bool = False) -> Path:
    """Return the folder of a data set; draw or download it first if necessary.

    Parameters and errors are those of `load`.
    """
    with one_sentence():
        if sample:
            from datasets import sample as generated

            return generated.draw(source.name, DATA_DIR / "sample") / source.name
        if data_dir is not None and Path(data_dir).resolve() != DATA_DIR:
            return _find_in(Path(data_dir).resolve(), source)
        if not source.home.is_dir():
            source.download(source.home)
    return source.home


def _find_in(folder: Path, source: Source) -> Path:
    if not folder.is_dir():
        raise DatasetError(f"--data-dir {folder} is no folder; name one that exists")
    if not os.access(folder, os.R_OK | os.X_OK):
        raise DatasetError(f"--data-dir {folder} cannot be read; check its permissions")
    for root in (folder / source.name, folder):
        if source.is_in(root):
            return root
    if (loose := loose_pictures(folder)) and not folders_in(folder):
        raise DatasetError(no_class(folder, readable_name(loose[0].name), len(loose)))
    raise DatasetError(
        f"--data-dir {folder} holds neither {source.name}/ nor train/<class>/; name the folder that does, omit "
        "--data-dir to download, or use --sample for generated images"
    )
