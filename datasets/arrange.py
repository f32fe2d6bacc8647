"""Copying pictures that lie in one folder into a folder for each class, by their names or by a table."""

import csv
import io
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from datasets.decoding import is_picture_by_name, opens
from datasets.folder import part_of, some
from datasets.images import DatasetError, building
from datasets.names import is_hidden, readable_name

SEPARATORS = ",;\t|"
CLASS_COLUMN = re.compile(
    r"(label|class|categor(?:y|ies)|target)(e?s)?([ _-]?names?)?", re.IGNORECASE
)  # what people call it
INDEX_COLUMN = re.compile(r"|unnamed: \d+", re.IGNORECASE)  # the first one of a table that pandas wrote
LONGEST_NAME = 255  # bytes of a folder's name, on all common file systems


def arrange(source: Path, target: Path, labels: Path | None = None) -> tuple[dict[str, int], list[Path], list[str]]:
    """Copy the pictures of a folder to `target/<class>/`, which must not exist; the source is only read.

    Parameters
    ----------
    source, target : Path
    labels : Path, optional
        A CSV file (comma, semicolon, tab or bar) of which one column names the pictures, with or without their
        suffixes, and one their classes: the only other one, or the one that is called label, class, category or
        target; without the file, the class is the start of a picture's name, such as cat of cat.0.jpg, cat_0.jpg and
        cat0.jpg.

    Returns
    -------
    counts : dict of str to int
        Pictures by class.
    left : list of Path
        Files of the source that are no pictures, which were not copied.
    missing : list of str
        Pictures that the table names and the source lacks.

    Raises
    ------
    DatasetError
        There are no pictures, a picture has no class, all have the same, the table has several columns that may be
        that of the classes, or `target` exists.
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
        classes, missing = _by_table(labels, pictures) if labels else (dict(_by_names(pictures)), [])
    except (UnicodeError, csv.Error):
        raise DatasetError(f"{readable_name(str(labels))} is no CSV file in UTF-8; save it as one") from None
    if without := sorted(set(pictures) - set(classes)):
        where, remedy = (
            (readable_name(str(labels)), "add them") if labels else ("its own name", "name a table in --labels")
        )
        raise DatasetError(
            f"{len(without)} picture{'s have' if len(without) > 1 else ' has'} no class in {where}, such as "
            f"{readable_name(without[0])}; {remedy}, or take such pictures out of the folder"
        )
    for label in sorted(set(classes.values())):
        if reason := _why_no_folder(label):
            raise DatasetError(f"a class cannot be called {label[:60]!r}: {reason}")
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
    left = [path for path in visible if path.name not in pictures]
    return dict(sorted(Counter(classes.values()).items())), left, missing


def _why_no_folder(label: str) -> str:
    """Return why a class cannot have a folder of its name, or an empty string."""
    if part_of(label) or is_hidden(Path(label)):
        return "this name is reserved for a part of the data, a hidden folder or the system"
    if "\0" in label:
        return "it holds a character that no folder's name can hold"
    if len(os.fsencode(label)) > LONGEST_NAME:
        return f"its name has {len(os.fsencode(label)):,} bytes, and a folder's at most {LONGEST_NAME}"
    return ""


def _by_names(pictures: dict[str, Path]) -> Iterator[tuple[str, str]]:
    for name in pictures:
        if start := re.match(r"[^\W\d_]+(?:[ _-][^\W\d_]+)*", Path(name).stem):
            yield name, start[0]


def _by_table(labels: Path, pictures: Mapping[str, Path]) -> tuple[dict[str, str], list[str]]:
    """Return the classes of the pictures that a table names, and the names in it that are no pictures."""
    where = readable_name(str(labels))
    text = labels.read_text(encoding="utf-8-sig")
    known = {Path(name).stem: name for name in pictures} | {name: name for name in pictures}
    tables = [_filled(csv.reader(io.StringIO(text, newline=""), delimiter=each)) for each in SEPARATORS]
    found, place, rows = max(((*_picture_column(rows, known), rows) for rows in tables), key=lambda table: table[0])
    if not any(found):
        return {}, []
    head = (
        rows[0]
        if _file_name(rows[0], place) not in known and not is_picture_by_name(Path(_cell(rows[0], place)))
        else []
    )
    column = _class_column(where, rows, head, place)
    classes: dict[str, str] = {}
    missing: dict[str, None] = {}
    for row in rows[bool(head) :]:
        cell = _file_name(row, place)
        label = re.sub(r"[/\\]", "-", _cell(row, column))
        if cell and cell not in known:
            missing[cell] = None
        elif cell and label not in ("", ".", "..") and classes.setdefault(known[cell], label) != label:
            raise DatasetError(
                f"{readable_name(known[cell])} is of two classes in {where}: {classes[known[cell]]!r} and {label!r}; "
                "remove one"
            )
    return classes, list(missing)


def _filled(rows: Iterable[list[str]]) -> list[list[str]]:
    """Leave out empty rows, and the empty columns at the end of a table."""
    kept = [row for row in rows if any(map(str.strip, row))]
    width = max((place + 1 for row in kept for place, cell in enumerate(row) if cell.strip()), default=0)
    return [row[:width] for row in kept]


def _picture_column(rows: Sequence[Sequence[str]], known: Mapping[str, str]) -> tuple[tuple[int, int], int]:
    """Return which column names most pictures, and how many: with their suffixes, which counts more, and at all."""
    whole, all_names = Counter[int](), Counter[int]()
    for row in rows:
        for place in range(len(row) if len(row) > 1 else 0):
            cell = _file_name(row, place)
            whole[place] += known.get(cell) == cell
            all_names[place] += cell in known
    best = max(sorted(all_names), key=lambda place: (whole[place], all_names[place]), default=0)
    return (whole[best], all_names[best]), best


def _class_column(where: str, rows: Sequence[Sequence[str]], head: Sequence[str], place: int) -> int:
    others = [other for other in range(max(map(len, rows))) if other != place]
    named = [other for other in others if CLASS_COLUMN.fullmatch(_cell(head, other))]
    named = [other for other in named if _cell(head, other).lower() == "label"] or named
    likely = named or [other for other in others if not (head and INDEX_COLUMN.fullmatch(_cell(head, other)))]
    if len(likely) != 1:
        names = [readable_name(_cell(head or rows[0], other)) for other in likely]
        raise DatasetError(
            f"{len(likely)} columns of {where} may be that of the classes: {some(names, 5)}; name one of them label in "
            "the first row, or leave the others out"
        )
    return likely[0]


def _cell(row: Sequence[str], place: int) -> str:
    return row[place].strip() if place < len(row) else ""


def _file_name(row: Sequence[str], place: int) -> str:
    """Return the name of a path in a table, of whichever system."""
    return re.split(r"[/\\]", _cell(row, place))[-1]
