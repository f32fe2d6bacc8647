"""Copying pictures that lie in one folder into a folder for each class, by their names or by a table."""

import csv
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from datasets.decoding import is_picture_by_name
from datasets.images import DatasetError
from datasets.names import is_hidden, readable_name


def arrange(source: Path, target: Path, labels: Path | None = None) -> dict[str, int]:
    """Copy the pictures of a folder to `target/<class>/`, which must not exist; the source is only read.

    Parameters
    ----------
    source, target : Path
    labels : Path, optional
        A CSV file whose rows name a picture, with or without its suffix, and its class, in the first two columns that
        do; without it, the class is the start of a picture's name, such as cat of cat.0.jpg, cat_0.jpg and cat0.jpg.

    Returns
    -------
    dict of str to int
        Pictures by class.

    Raises
    ------
    DatasetError
        There are no pictures, a picture has no class, or `target` exists.
    """
    pictures = {
        path.name: path for path in sorted(source.iterdir()) if not is_hidden(path) and is_picture_by_name(path)
    }
    if not pictures:
        raise DatasetError(f"{readable_name(str(source))} holds no pictures; name the folder that does")
    if target.exists():
        raise DatasetError(f"{readable_name(str(target))} exists already; name a new folder")
    classes = dict(_by_table(labels, pictures) if labels else _by_names(pictures))
    if without := sorted(set(pictures) - set(classes)):
        where = readable_name(str(labels)) if labels else "its own name"
        raise DatasetError(f"{len(without)} pictures have no class in {where}, such as {readable_name(without[0])}")
    counts: dict[str, int] = {}
    for name, label in classes.items():
        (target / label).mkdir(parents=True, exist_ok=True)
        shutil.copy2(pictures[name], target / label / name)
        counts[label] = counts.get(label, 0) + 1
    return dict(sorted(counts.items()))


def _by_names(pictures: dict[str, Path]) -> Iterator[tuple[str, str]]:
    for name in pictures:
        if start := re.match(r"[^\W\d_]+(?:[ _-][^\W\d_]+)*", name.rpartition(".")[0]):
            yield name, start[0]


def _by_table(labels: Path, pictures: dict[str, Path]) -> Iterator[tuple[str, str]]:
    known = {name: name for name in pictures} | {name.rpartition(".")[0]: name for name in pictures}
    with labels.open(newline="", encoding="utf-8-sig") as file:
        for row in csv.reader(file):
            place = next((place for place, cell in enumerate(row[:-1]) if Path(cell.strip()).name in known), None)
            if place is not None and (label := row[place + 1].strip().replace("/", "-")) not in ("", ".", ".."):
                yield known[Path(row[place].strip()).name], label
