"""Copying pictures that lie in one folder into a folder for each class, by their names or by a table."""

import csv
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from datasets.decoding import is_picture_by_name, opens
from datasets.folder import part_of
from datasets.images import LOCK, DatasetError, building
from datasets.names import is_hidden, readable_name


def arrange(source: Path, target: Path, labels: Path | None = None) -> tuple[dict[str, int], list[Path]]:
    """Copy the pictures of a folder to `target/<class>/`, which must not exist; the source is only read.

    Parameters
    ----------
    source, target : Path
    labels : Path, optional
        A CSV file (comma, semicolon or tab) whose rows name a picture, with or without its suffix, and in the next
        column its class; without it, the class is the start of a picture's name, such as cat of cat.0.jpg, cat_0.jpg
        and cat0.jpg.

    Returns
    -------
    counts : dict of str to int
        Pictures by class.
    left : list of Path
        Files of the source that are no pictures, which were not copied.

    Raises
    ------
    DatasetError
        There are no pictures, a picture has no class, all have the same, or `target` exists.
    """
    visible = sorted(path for path in source.iterdir() if not is_hidden(path))
    files = [path for path in visible if path.is_file()]
    pictures = {path.name: path for path in files if is_picture_by_name(path) or opens(path)}
    if not pictures:
        raise DatasetError(f"{readable_name(str(source))} holds no pictures; name the folder that does")
    if target.resolve().is_relative_to(source.resolve()):
        raise DatasetError(f"{readable_name(str(target))} lies in the folder of the pictures, which is only read")
    if target.exists():
        raise DatasetError(f"{readable_name(str(target))} exists already; name a new folder")
    try:
        classes = dict(_by_table(labels, pictures) if labels else _by_names(pictures))
    except (UnicodeError, csv.Error):
        raise DatasetError(f"{readable_name(str(labels))} is no CSV file in UTF-8; save it as one") from None
    if without := sorted(set(pictures) - set(classes)):
        where = readable_name(str(labels)) if labels else "its own name"
        raise DatasetError(f"{len(without)} pictures have no class in {where}, such as {readable_name(without[0])}")
    if reserved := sorted(label for label in set(classes.values()) if part_of(label) or label[0] == "."):
        raise DatasetError(f"a class cannot be called {reserved[0]!r}, as a part of the data or a hidden folder is")
    if len(set(classes.values())) < 2:
        where = readable_name(str(labels)) if labels else "their names"
        raise DatasetError(
            f"all {len(classes):,} pictures are of one class, {next(iter(classes.values()))!r}, by {where}; name a "
            "table of their classes in --labels"
        )
    with building(target) as partial:  # it appears when it is complete
        for name, label in classes.items():
            (partial / label).mkdir(exist_ok=True)
            shutil.copy2(pictures[name], partial / label / name)
    (target.parent / LOCK).unlink(missing_ok=True)
    left = [path for path in visible if path.name not in pictures]
    return dict(sorted(Counter(classes.values()).items())), left


def _by_names(pictures: dict[str, Path]) -> Iterator[tuple[str, str]]:
    for name in pictures:
        if start := re.match(r"[^\W\d_]+(?:[ _-][^\W\d_]+)*", name.rpartition(".")[0]):
            yield name, start[0]


def _by_table(labels: Path, pictures: dict[str, Path]) -> Iterator[tuple[str, str]]:
    known = {name: name for name in pictures} | {name.rpartition(".")[0]: name for name in pictures}
    text = labels.read_text(encoding="utf-8-sig")
    separator = max(",;\t", key=text.count)
    seen: dict[str, str] = {}
    for row in csv.reader(text.splitlines(), delimiter=separator):
        place = next((place for place, cell in enumerate(row[:-1]) if Path(cell.strip()).name in known), None)
        label = re.sub(r"[/\\]", "-", row[place + 1].strip()) if place is not None else ""
        if place is None or label in ("", ".", ".."):
            continue
        name = known[Path(row[place].strip()).name]
        if seen.setdefault(name, label) != label:
            where = readable_name(str(labels))
            raise DatasetError(f"{readable_name(name)} is of two classes in {where}: {seen[name]!r} and {label!r}")
        yield name, label
