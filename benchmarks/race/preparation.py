"""Prepare the common start of all contestants of a work, once and in a separate process: the driver has to stay small.

    python -m benchmarks.race.preparation WORK FOLDER [DATA_DIR]

In FOLDER: `prepared.json`, the split's indices, the initial weights, the images in the form that the peers read, the
cache of decoded images that ours reads (CACHE_DIR has to be FOLDER/cache), and an empty MLflow database, which every
run gets a copy of, since to make one takes MLflow seconds and is done once in a project's life.
"""

import gzip
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import datasets
import models
import tracking
from benchmarks.race.common import Prepared
from benchmarks.race.works import WORKS, Work
from datasets.fashion_mnist import raw_files
from datasets.folder import list_folder
from experiments import task
from experiments.jobs.job import model_arguments
from experiments.training.images import DeviceImages
from experiments.training.state import initialise, seed_of_split

PUBLISHED_SIZE = (800, 532)  # pixels: medians of the published photos
QUALITY = 90  # of JPEG, for enlarged photos


def photos_folder(root: Path, count: int, size: int, folder: Path) -> str:
    """Make `folder/train/<class>/` of the first photos of each class; return their origin.

    They are links if the data set is as published. A copy that was reduced to the models' input size is enlarged, so
    that decoding costs as much as it does with the published files.
    """
    chosen = {label: files[: count // 2] for label, files in list_folder(root).parts["train"].items()}
    reduced = True
    for path in (path for files in chosen.values() for path in files):
        with Image.open(path) as image:  # reads the header alone
            reduced &= max(image.size) <= size
    for label, files in chosen.items():
        target = folder / "train" / label
        target.mkdir(parents=True)
        for path in files:
            if reduced:
                with Image.open(path) as image:
                    enlarged = image.convert("RGB").resize(PUBLISHED_SIZE, Image.Resampling.BICUBIC)
                enlarged.save((target / path.name).with_suffix(".jpg"), quality=QUALITY)
            else:
                (target / path.name).symlink_to(path)
    if not reduced:
        return "photos as published"
    width, height = PUBLISHED_SIZE
    return (
        f"photos of at most {size} px in the data folder, enlarged to {width}x{height} px (medians of the published "
        f"files) and saved as JPEG of quality {QUALITY}: not the published files"
    )


def unpack_fashion_mnist(root: Path, folder: Path) -> None:
    """Unpack the raw files into the subfolder of `folder` that torchvision reads."""
    raw = folder / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for path in raw_files(root):
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as source:
            (raw / path.name.removesuffix(".gz")).write_bytes(source.read())


def check_same_images(prepared: Prepared, data: datasets.ImageData) -> None:
    """Compare some images as a peer loads them with ours; raise `SystemExit` if they differ.

    Peers decode photos whole, ours as near as `datasets.decoding.decode` says.
    """
    images = prepared.images()
    mean, largest = (0.01, 0.01) if prepared.files is None else (0.6, 12)  # of 255
    for index in np.linspace(0, len(data.labels) - 1, 9).astype(int).tolist():
        x, label = images[index]
        pixels = x.permute(1, 2, 0).numpy() * prepared.std + prepared.mean
        off = np.abs(pixels - data.images[index])
        if label != data.labels[index] or off.mean() > mean or off.max() > largest:
            raise SystemExit(f"image {index} is not the same for the peers and for ours")


def prepare(work: Work, folder: Path, data_dir: Path | None, sample: bool = False) -> Prepared:
    """Fill a new folder for a work; CACHE_DIR has to be set.

    Parameters
    ----------
    work : Work
    folder : Path
    data_dir, sample : see `datasets.load`
    """
    folder.mkdir(parents=True)
    found = task.find(work.task)
    root, note, files = datasets.find(found.data, data_dir, sample), "", None
    if work.photos is not None:
        note = photos_folder(root, work.photos, found.data.image_size, folder / "photos")
        root = folder / "photos"
    started = time.perf_counter()
    data = datasets.load(found.data, root)
    datasets.duplicate_groups(data)
    once_seconds = time.perf_counter() - started
    if work.photos is None:
        unpack_fashion_mnist(root, folder)
    else:
        parts = list_folder(root).parts["train"].values()
        files = [(str(path), label) for label, paths in enumerate(parts) for path in paths]
        if data.aside:
            raise SystemExit(f"these files are no photos: {', '.join(each.file for each in data.aside)}")
    split = datasets.draw_splits(found.protocol, data, found.training.split_seed)[0]
    arguments = model_arguments(data)
    seed = seed_of_split(found.training.train_seed, 0)
    model = initialise(lambda: models.build(work.model, **arguments), seed, "cpu")
    mean, std = DeviceImages.load(data, "cpu").normalisation(split.train)
    np.savez(folder / "split.npz", **split._asdict())
    torch.save(model.state_dict(), folder / "initial.pt")
    written = {
        "task": work.task,
        "data_root": str(root),
        "model_arguments": arguments,
        "mean": mean.tolist(),
        "std": std.tolist(),
        "files": files,
        "once_seconds": once_seconds,
        "note": note,
        "sizes": {part: len(rows) for part, rows in split._asdict().items()},
    }
    (folder / "prepared.json").write_text(json.dumps(written), encoding="utf-8")
    tracking.open_store(f"sqlite:///{folder}/mlflow.db", create=True)
    prepared = Prepared.read(folder)
    check_same_images(prepared, data)
    return prepared


if __name__ == "__main__":
    _, name, target, *rest = sys.argv
    prepare(WORKS[name], Path(target), Path(rest[0]) if rest else None)
