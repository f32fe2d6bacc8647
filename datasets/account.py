"""The account of a folder: by part and class, files found = used + set aside, with the reasons."""

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from datasets.folder import LOOP, PARTS, nested, some
from datasets.images import ImageData
from datasets.names import looks_like
from datasets.splits import Split

EXAMPLES = 3  # of the files of a reason
MOST_ELSEWHERE = 10  # examples of files outside of all parts: their reason names the folder
PLURALS = {  # of reasons, beside those that begin with "lies"
    "is no image": "are no images",
    "does not decode": "do not decode",
    "is no regular file": "are no regular files",
    "is a link to nothing": "are links to nothing",
    LOOP: "are links to folders that hold them",
}
FEW = 10  # test images of a class, below which its score says little


def slices(data: ImageData) -> dict[str, slice]:
    """Return the rows of each published part."""
    n_train = data.n_pool - data.n_val
    bounds = (0, n_train, data.n_pool, len(data.labels))
    return {part: slice(*bounds[i : i + 2]) for i, part in enumerate(PARTS)}


def count_classes(data: ImageData) -> dict[str, dict[str, int]]:
    """Return the number of images by published part and class; `val` only if there is such a part."""
    return {
        part: {name: int(np.sum(data.labels[rows] == label)) for label, name in enumerate(data.classes)}
        for part, rows in slices(data).items()
        if part != "val" or data.n_val
    }


def account(data: ImageData, examples: int = EXAMPLES) -> Iterator[str]:
    """Yield the lines of the account: the sum, then a line a reason for each part and class, with some files."""
    used = len(data.labels)
    yield f"found {used + len(data.aside):,} = used {used:,} + set aside {len(data.aside):,}"
    counts = {(part, label): n for part, classes in count_classes(data).items() for label, n in classes.items()}
    places = Counter((each.part, each.label) for each in data.aside)
    for part, label in sorted(places, key=lambda place: ([*PARTS, ""].index(place[0]), place)):
        own = [each for each in data.aside if (each.part, each.label) == (part, label)]
        kept = counts.get((part, label), 0)
        shown = examples if part else min(examples, MOST_ELSEWHERE)
        where = "/".join(filter(None, (part, label))) or "elsewhere"
        yield f"{where}: found {kept + len(own):,} = used {kept:,} + set aside {len(own):,}"
        for reason, count in Counter(each.reason for each in own).items():
            alike = sorted((each for each in own if each.reason == reason), key=lambda each: each.file)[:shown]
            named = "; ".join(f"{each.file} ({each.detail})" if each.detail else each.file for each in alike)
            more = f"; and {count - shown:,} more" if count > shown else ""
            said = reason if count == 1 else PLURALS.get(reason) or reason.replace("lies", "lie", 1)
            yield f"  {count:,} {said}: {named}{more}"


def notes(data: ImageData, split: Split | None = None) -> Iterator[str]:
    """Yield what a user should know of images that are used; the test part is a split's, or the published one."""
    for kind, (low, high) in data.depth.items():
        yield f"{kind} of 16 or 32 bits: {low:g} becomes black and {high:g} white, their range outside of test/"
    if within := _classes_of_folders(data):
        name, inner = next(iter(within.items()))
        others = f", as those of {len(within) - 1} other classes do" if len(within) > 1 else ""
        yield (
            f"the pictures of class {name!r} lie in {len(inner)} folders ({some(inner)}), which are one class{others}; "
            "if each is a class, name the folder that holds them"
        )
    for names in _alike(data.classes):
        yield (
            f"the names of the classes {' and '.join(map(repr, names))} look alike; if they are one class, merge their "
            "folders"
        )
    plain = (data.images == data.images[:, :1, :1]).all((1, 2, 3))
    for label, name in enumerate(data.classes):
        if count := int(plain[data.labels == label].sum()):
            yield f"{count:,} of {np.sum(data.labels == label):,} pictures of class {name!r} are of one colour"
    tested = data.labels[data.n_pool :] if split is None else data.labels[split.test]
    for label, name in enumerate(data.classes if len(tested) else ()):
        count = int(np.sum(tested == label))
        if count == 0:
            yield f"the test part has no image of class {name!r}: its score there is not known"
        elif count < FEW:
            yield f"the test part has only {count} of class {name!r}: one image is {100 / count:.0f} % of it"


def _alike(classes: Sequence[str]) -> list[list[str]]:
    """Return the names that people may take for one, such as cat and Cat."""
    found: dict[str, list[str]] = {}
    for name in classes:
        found.setdefault(looks_like(name), []).append(name)
    return [names for names in found.values() if len(names) > 1]


def _classes_of_folders(data: ImageData) -> dict[str, list[str]]:
    """Return the folders within the folder of a class, for those whose training pictures all lie in several."""
    names = np.array(data.files, dtype=object)[: data.n_pool - data.n_val]
    found = {name: nested(name, names[data.labels[: len(names)] == label]) for label, name in enumerate(data.classes)}
    return {name: inner for name, inner in found.items() if inner}
