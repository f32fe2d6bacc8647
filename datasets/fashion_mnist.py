"""Fashion-MNIST (Xiao et al. 2017) through torchvision, from a folder that is only read."""

import gzip
import socket
import tempfile
from http.client import HTTPException
from pathlib import Path
from urllib.error import URLError

import numpy as np

from datasets.images import DatasetError, ImageData, building

FOLDER = "FashionMNIST"
TIMEOUT = 30.0  # seconds without an answer or a further byte


def raw_files(root: Path) -> list[Path]:
    """List the four idx files in `root/raw`, unpacked or as published (.gz); fewer if some are missing."""
    found = []
    for part in ("train", "t10k"):
        for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"):
            candidates = (root / "raw" / f"{part}-{kind}{suffix}" for suffix in ("", ".gz"))
            found += [next((path for path in candidates if path.is_file()), None)]
    return [path for path in found if path is not None]


def read(root: Path, name: str) -> ImageData:
    """Read the four files below `root`; packed files are unpacked to a temporary folder.

    Returns
    -------
    ImageData
        60,000 training images, then 10,000 test images, of 28x28 gray pixels, in the published order.

    Raises
    ------
    DatasetError
        A file is missing or damaged.
    """
    from torchvision.datasets import FashionMNIST
    from torchvision.datasets.utils import check_integrity

    files = raw_files(root)
    if len(files) < 4:
        raise DatasetError(f"{root / 'raw'} lacks {4 - len(files)} of the 4 files of Fashion-MNIST")
    with tempfile.TemporaryDirectory() as scratch:
        # torchvision unpacks beside the packed files, in a folder that may be read-only
        raw = Path(scratch) / FOLDER / "raw"
        raw.mkdir(parents=True)
        checksums = dict(FashionMNIST.resources)
        for path in files:
            if path.suffix == ".gz" and not check_integrity(str(path), checksums[path.name]):
                raise DatasetError(f"{path} is damaged: its MD5 is not the published one; remove it and fetch it again")
            with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as source:
                (raw / path.name.removesuffix(".gz")).write_bytes(source.read())
        try:
            parts = [FashionMNIST(scratch, train=train) for train in (True, False)]
        except (RuntimeError, ValueError, AssertionError) as error:
            raise DatasetError(f"{root / 'raw'} is not Fashion-MNIST ({error})") from None
    images = np.concatenate([part.data.numpy() for part in parts])[..., None]  # (N, 28, 28, 1)
    labels = np.concatenate([part.targets.numpy() for part in parts]).astype(np.int64)
    if len(images) != len(labels):
        raise DatasetError(f"{root / 'raw'} holds {len(images)} images and {len(labels)} labels; fetch it again")
    return ImageData(name, images, labels, tuple(FashionMNIST.classes), len(parts[0]))


def download(root: Path) -> None:
    """Download the published files into `root`, which appears only when complete.

    Raises
    ------
    DatasetError
        There is no network, or a file is not the published one.
    OSError
        The parent of `root` cannot be written, or the disk is full.
    """
    from torchvision.datasets import FashionMNIST

    with building(root) as partial:
        if root.is_dir():
            return
        patience = socket.getdefaulttimeout()
        socket.setdefaulttimeout(TIMEOUT)  # torchvision sets none
        try:
            FashionMNIST(partial, download=True)
        except (RuntimeError, URLError, ConnectionError, TimeoutError, HTTPException) as error:
            reason = " ".join(str(error).split())[:200] or error.__class__.__name__
            raise DatasetError(
                f"cannot download Fashion-MNIST ({reason}); check the network connection and run again"
            ) from None
        finally:
            socket.setdefaulttimeout(patience)
        (partial / FOLDER / "raw").rename(partial / "raw")
        (partial / FOLDER).rmdir()
