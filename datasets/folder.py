"""Folders of images: which pictures belong to which class and part, and why a file is set aside.

Every file below a folder is used or named with a reason, except hidden files and those that systems make.
"""

import contextlib
import itertools
import os
import posixpath
import re
import shlex
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image

from datasets.decoding import (
    NoImageError,
    decode_files,
    is_picture_by_name,
    opens,
    quiet_libraries,
    why_undecoded,
)
from datasets.images import DatasetError, ImageData, SetAside
from datasets.names import is_hidden, readable_name

MAX_BROKEN = 0.05  # a larger share of pictures that do not decode means that the folder is no data set
PARTS = {"train": "train|training", "val": "val|valid|validation", "test": "test|testing"}  # patterns of folders
KINDS_OF_FOLDER = r"set|data|dataset|images|(19|20)\d\d"  # that may follow, as in training_set and train2017
USUAL_SIZES = (28, 32, 48, 64, 96, 128)  # pixels
LOOP = "is a link to a folder that holds it"
LOOKED_AT = 200  # pictures, at most, to choose a size
GRAY_MODES = {"1", "L", "LA", "I", "F", "I;16", "I;16B", "I;16L"}
ARRANGE = "python -m datasets arrange"
DEEPEST = 3  # levels below a folder that is no data set, at which one is looked for


@dataclass
class Listing:
    """The files of a folder: by part and class, and those that are set aside."""

    root: Path
    parts: dict[str, dict[str, list[Path]]] = field(default_factory=dict)  # part -> class -> files, in order
    aside: list[SetAside] = field(default_factory=list)

    def files(self, *parts: str) -> list[Path]:
        """Files of the parts, in the order of `ImageData`."""
        return [path for part in parts or PARTS for files in self.parts[part].values() for path in files]

    def set_aside(self, path: Path, reason: str, part: str = "", label: str = "", detail: str = "") -> None:
        """Note that a file is not used; a picture that does not decode has a `detail`."""
        self.aside.append(SetAside(part, label, self.name(path), reason, detail))

    def name(self, path: Path) -> str:
        """Return the readable path below the root."""
        return readable_name(path.relative_to(self.root).as_posix())


def list_folder(root: Path) -> Listing:
    """List the images of a folder by part and class, and check that they form a data set.

    The layouts: `train/<class>/*` with, optionally, `val/<class>/*` and `test/<class>/*` (or other
    names that `part_of` knows); `<class>/*` alone; any of these inside a folder that is the only one. Folders in a
    class belong to the class, and links are followed. Class names that are equal in Unicode are one class.

    Raises
    ------
    DatasetError
        There is no such layout, only one class, a class without files, or a test class missing from training.
    """
    listing = Listing(root)
    folders = find_parts(root)
    shown: dict[str, str] = {}
    for part in PARTS:
        listing.parts[part] = _list_classes(listing, part, folders, shown)
    _list_others(listing, folders)
    _check(listing, folders)
    return listing


def find_parts(root: Path) -> dict[str, list[Path]]:
    """Return the folders of each part; without one for `train` if `root` has no layout that is known."""
    inside = folders_in(root)
    found: dict[str, list[Path]] = {}
    for folder in inside:
        if part := part_of(folder.name):
            found.setdefault(part, []).append(_innermost(folder, part))
    if "train" in found:
        return found
    if len(inside) == 1 and not found and (deeper := find_parts(inside[0])):
        return deeper
    classes = [folder for folder in inside if not part_of(folder.name)]
    if any(part_of(inner.name) == "train" for folder in classes for inner in folders_in(folder)):
        return {}  # a folder of data sets
    if sum(_holds_pictures(folder) for folder in classes) > 1:
        found["train"] = [root]
    return found


def part_of(name: str) -> str:
    """Return the part of a data set that a folder of this name holds, in any case, or an empty string."""
    ends = rf"([ _-]?({KINDS_OF_FOLDER}))?"
    return next((part for part, names in PARTS.items() if re.fullmatch(f"({names}){ends}", name, re.IGNORECASE)), "")


def folders_in(folder: Path) -> list[Path]:
    """List the folders in a folder, but for hidden ones, in order."""
    return sorted(path for path in folder.iterdir() if path.is_dir() and not is_hidden(path))


def _innermost(folder: Path, part: str) -> Path:
    """Return the `train/` in a `train/` that holds no other folder."""
    inside = folders_in(folder)
    if len(inside) == 1 and part_of(inside[0].name) == part:
        return _innermost(inside[0], part)
    return folder


def _holds_pictures(folder: Path) -> bool:
    """Whether one of the first files below a folder is a picture, by its name or its content."""
    files = (path for path, reason in _walk(folder) if not reason)
    return any(is_picture_by_name(path) or opens(path) for path in itertools.islice(files, LOOKED_AT))


def _list_classes(
    listing: Listing, part: str, folders: Mapping[str, Sequence[Path]], shown: dict[str, str]
) -> dict[str, list[Path]]:
    """List files by class name, both sorted; `shown` has the readable names of all parts, by names as they are."""
    found: dict[str, list[Path]] = {}
    everyone = {folder for of_part in folders.values() for folder in of_part}
    for folder in folders.get(part, ()):
        parts_within = [other for other in everyone - {folder} if other.is_relative_to(folder)]
        for path in sorted(folder.iterdir(), key=_in_order):
            if is_hidden(path) or any(other.is_relative_to(path) for other in parts_within):
                continue
            if not path.is_dir():
                listing.set_aside(path, _why_unusable(path) or "lies in no class folder", part)
                continue
            if _holds_itself(path, [parent.stat() for parent in path.parents]):
                listing.set_aside(path, LOOP, part)
                continue
            own = unicodedata.normalize("NFC", path.name)
            if own not in shown:
                shown[own] = _unlike(readable_name(path.name), set(shown.values()))
            label = shown[own]
            files = found.setdefault(label, [])
            for inner, reason in _walk(path):
                if reason:
                    listing.set_aside(inner, reason, part, label)
                else:
                    files.append(inner)
            files.sort(key=_in_order)
    return dict(sorted(found.items()))


def _holds_itself(folder: Path, above: Sequence[os.stat_result]) -> bool:
    return any(os.path.samestat(folder.stat(), status) for status in above)


def _in_order(path: Path) -> tuple[str, bytes]:
    """Sort by the readable name, and equal ones as they are on the disk."""
    return readable_name(path.as_posix()), os.fsencode(path)


def _unlike(name: str, others: set[str]) -> str:
    """Append a number until no other folder has this readable name; bytes that are no UTF-8 can make two alike."""
    numbered = (f"{name} ({number})" for number in itertools.count(2))
    return next(each for each in itertools.chain([name], numbered) if each not in others)


def _walk(folder: Path, above: Sequence[os.stat_result] = ()) -> Iterator[tuple[Path, str]]:
    """Yield all files below a folder, each with the reason why it cannot be used, or an empty one."""
    here = [*(above or (parent.stat() for parent in folder.parents)), folder.stat()]
    for entry in os.scandir(folder):  # raises for an unreadable folder, which Path.rglob passes over
        path = Path(entry.path)
        if is_hidden(path):
            continue
        # a link to itself is no folder for a path, and an error for an entry, which is faster
        if not (path.is_dir() if entry.is_symlink() else entry.is_dir()):
            yield path, _why_unusable(path)
        elif _holds_itself(path, here):
            yield path, LOOP
        else:
            yield from _walk(path, here)


def _why_unusable(path: Path) -> str:
    if path.is_symlink() and not path.exists():
        return "is a link to nothing"
    return "" if path.is_file() else "is no regular file"


def _list_others(listing: Listing, folders: Mapping[str, Sequence[Path]]) -> None:
    """Set aside all files that lie in no part."""
    within = {folder for part in folders.values() for folder in part}

    def visit(folder: Path) -> None:
        for path in sorted(folder.iterdir(), key=_in_order):
            if is_hidden(path) or path in within:
                continue
            if any(inner.is_relative_to(path) for inner in within):
                visit(path)
            elif path.is_dir():
                for inner, reason in _walk(path):
                    listing.set_aside(inner, reason or f"lies in {listing.name(path)}/, which is no part of the data")
            else:
                listing.set_aside(path, _why_unusable(path) or "lies beside the folders of the classes")

    if listing.root not in within:
        visit(listing.root)


def _check(listing: Listing, folders: Mapping[str, Sequence[Path]]) -> None:
    root, train = listing.root, listing.parts["train"]
    where_loose = "train" if folders.get("train") else ""
    loose = [
        each.file
        for each in listing.aside
        if not each.label and each.part == where_loose and is_picture_by_name(Path(each.file))
        if where_loose or "/" not in each.file
    ]
    if not folders.get("train"):
        raise DatasetError(_no_layout(root))
    where = readable_name(str(folders["train"][0]))
    if len(train) < 2:
        if loose:
            raise DatasetError(no_class(folders["train"][0], Path(loose[0]).name, len(loose)))
        found = f"only the class {next(iter(train))!r}" if train else "no class"
        for label, files in train.items():
            if inner := nested(label, map(listing.name, files)):
                raise DatasetError(
                    f"{where} holds {found}, whose pictures lie in {len(inner)} folders ({some(inner)}); if these are "
                    f"the classes, move them from {label} to {where}"
                )
        raise DatasetError(f"{where} holds {found}; put each of two or more classes into a folder of its own")
    for label, files in train.items():
        if not files:
            raise DatasetError(f"{where}/{label} holds no image; add some or remove the folder")
    for part in ("val", "test"):
        if unknown := sorted(set(listing.parts[part]) - set(train)):
            raise DatasetError(
                f"{readable_name(str(folders[part][0]))} holds classes that {where} lacks: {', '.join(unknown)}; "
                "rename or remove them"
            )


def _no_layout(root: Path) -> str:
    """Say what a folder lacks, and which folder or command serves instead."""
    name = readable_name(str(root))
    below = [root]
    for folder in below:
        if len(folder.relative_to(root).parts) < DEEPEST:
            below += folders_in(folder)
    if other := next((folder for folder in below[1:] if find_parts(folder)), None):
        return (
            f"{name} holds neither train/<class>/ nor two or more folders of pictures, but {readable_name(str(other))} "
            "does; name that one"
        )
    if most := max(map(loose_pictures, below), key=len):
        return no_class(most[0].parent, readable_name(most[0].name), len(most))
    return (
        f"{name} holds neither train/<class>/ nor two or more folders of pictures; put each class into a folder of its "
        f"own ({ARRANGE} does so by file names or a table)"
    )


def loose_pictures(folder: Path) -> list[Path]:
    """List the pictures in a folder itself, by their names, in order."""
    return sorted(
        path for path in folder.iterdir() if is_picture_by_name(path) and not is_hidden(path) and path.is_file()
    )


def no_class(folder: Path, example: str, count: int) -> str:
    """Say that pictures lie in no class folder, and which command puts them there."""
    place = readable_name(str(folder))
    return (
        f"{place} holds {count:,} picture{'s' * (count > 1)} in no class folder, such as {example}; {ARRANGE} "
        f"{shlex.quote(place)} TARGET copies them into folders, by their names or, with --labels FILE, by a table"
    )


def nested(label: str, files: Iterable[str]) -> list[str]:
    """Return the folders in a class's own, if all its pictures lie in several of them.

    `files` are the paths of its pictures below the data set's folder, as in `ImageData`.
    """
    folders = {posixpath.dirname(path) for path in files}
    common = posixpath.commonpath(folders) if folders else ""
    if common in folders or label not in common.split("/"):
        return []
    return sorted({posixpath.relpath(folder, common).partition("/")[0] for folder in folders})


def some(names: Sequence[str], count: int = 3) -> str:
    """List the first names."""
    return ", ".join(names[:count]) + ", ..." * (len(names) > count)


def read_folder(
    root: Path, name: str, size: int, channels: int, num_workers: int = 8, strict: bool = True
) -> ImageData:
    """List and decode a folder of images; see `list_folder` and `decode_listed`, also for the errors."""
    return decode_listed(list_folder(root), name, size, channels, num_workers, strict)


def decode_listed(
    listing: Listing, name: str, size: int, channels: int, num_workers: int = 8, strict: bool = True
) -> ImageData:
    """Decode the images of a folder, which is only read.

    See `decode_files` for the parameters; `name` is that in the result database. Without `strict`, broken pictures
    are set aside however many they are.

    Raises
    ------
    DatasetError
        More than 5 % of its pictures do not decode, or a class has none that do.
    """
    root, listing = listing.root, replace(listing, aside=[*listing.aside])
    rows = [
        (part, label, path) for part, classes in listing.parts.items() for label, files in classes.items()
        for path in files
    ]  # fmt: skip
    n_train = sum(part != "test" for part, _, _ in rows)
    paths = [path for _, _, path in rows]
    images, failures, depth = decode_files(root, paths, size, channels, num_workers, n_train)
    for (part, label, path), failure in zip(rows, failures, strict=True):
        if isinstance(failure, NoImageError):
            listing.set_aside(path, "is no image", part, label)
        elif failure is not None:
            listing.set_aside(path, "does not decode", part, label, why_undecoded(path, failure))
    good = np.array([failure is None for failure in failures], dtype=bool)
    kept = [row for row, is_good in zip(rows, good, strict=True) if is_good]
    classes = tuple(listing.parts["train"])
    if strict:
        _refuse_broken(listing, len(kept))
        trained = {label for part, label, _ in kept if part == "train"}
        broken = {each.label for each in listing.aside if each.part == "train" and each.is_broken}
        for label in sorted((broken | {label for _, label, _ in kept}) - trained):
            raise DatasetError(
                f"no image of class {label!r} in the training part of {readable_name(str(root))} decodes; add some, or "
                "remove the class"
            )
        classes = tuple(label for label in classes if label in trained)  # the others hold files that are no images
        if len(classes) < 2:
            found = f"only the class {classes[0]!r}" if classes else "no class"
            raise DatasetError(
                f"{readable_name(str(root))} holds images of {found}; put each of two or more classes into a folder of "
                "its own"
            )
    counts = {part: sum(each == part for each, _, _ in kept) for part in PARTS}
    return ImageData(
        name,
        images if good.all() else images[good],
        np.array([classes.index(label) for _, label, _ in kept], dtype=np.int64),
        classes,
        counts["train"] + counts["val"],
        counts["val"],
        depth,
        tuple(listing.name(path) for _, _, path in kept),
        tuple(listing.aside),
    )


def usual_shape(listing: Listing) -> tuple[int, int]:
    """Choose size and channels for the pictures of a folder by some of them: at most 128 pixels; 1 if all are gray."""
    sides, colours = [], False
    files = listing.files("train")
    for path in files[:: 1 + len(files) // LOOKED_AT]:
        with contextlib.suppress(Exception), quiet_libraries(), Image.open(path) as file:
            sides.append(min(file.size))
            colours |= file.mode not in GRAY_MODES
    median = float(np.median(sides)) if sides else USUAL_SIZES[-1]
    return next((size for size in USUAL_SIZES if size >= median), USUAL_SIZES[-1]), 3 if colours else 1


def _refuse_broken(listing: Listing, n_decoded: int) -> None:
    broken = [each for each in listing.aside if each.is_broken]
    total = len(broken) + n_decoded
    if len(broken) > MAX_BROKEN * total:
        named = "; ".join(f"{each.file} ({each.detail})" for each in broken[:3])
        raise DatasetError(
            f"{len(broken)} of {total} pictures in {readable_name(str(listing.root))} do not decode, more than "
            f"{MAX_BROKEN:.0%}: {named}; repair or remove them"
        )
