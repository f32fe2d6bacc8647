"""The account of a folder: by part and class, files found = used + set aside, with the reasons."""

from collections import Counter
from collections.abc import Iterator

import numpy as np

from datasets.folder import PART_NAMES
from datasets.images import ImageData

EXAMPLES = 3  # of the files of a reason
FEW = 10  # test images of a class, below which its score says little


def slices(data: ImageData) -> dict[str, slice]:
    """Return the rows of each published part."""
    n_train = data.n_pool - data.n_val
    bounds = (0, n_train, data.n_pool, len(data.labels))
    return {part: slice(*bounds[i : i + 2]) for i, part in enumerate(PART_NAMES)}


def count_classes(data: ImageData) -> dict[str, dict[str, int]]:
    """Return the number of images by published part and class; `val` only if there is such a part."""
    return {
        part: {name: int(np.sum(data.labels[rows] == label)) for label, name in enumerate(data.classes)}
        for part, rows in slices(data).items()
        if part != "val" or data.n_val
    }


def account(data: ImageData) -> Iterator[str]:
    """Yield the lines of the account: the sum, then a line a reason for each part and class."""
    used = len(data.labels)
    yield f"found {used + len(data.aside):,} = used {used:,} + set aside {len(data.aside):,}"
    counts = {(part, label): n for part, classes in count_classes(data).items() for label, n in classes.items()}
    places = Counter((each.part, each.label) for each in data.aside)
    for part, label in sorted(places, key=lambda place: (list(PART_NAMES).index(place[0] or "test"), place)):
        own = [each for each in data.aside if (each.part, each.label) == (part, label)]
        kept = counts.get((part, label), 0)
        where = "/".join(filter(None, (part, label))) or "elsewhere"
        yield f"{where}: found {kept + len(own):,} = used {kept:,} + set aside {len(own):,}"
        # the reason of a broken picture has Pillow's words in parentheses, which differ
        kinds = Counter(each.reason.partition(" (")[0] for each in own)
        for kind, count in kinds.items():
            files = [each for each in own if each.reason.partition(" (")[0] == kind]
            named = "; ".join(f"{each.file}{each.reason.removeprefix(kind)}" for each in files[:EXAMPLES])
            more = f"; and {count - EXAMPLES:,} more" if count > EXAMPLES else ""
            yield f"  {count:,} {kind}: {named}{more}"


def notes(data: ImageData) -> Iterator[str]:
    """Yield what a user should know of images that are used."""
    if data.depth:
        low, high = data.depth
        yield f"pixels of 16 or 32 bits: {low:g} becomes black and {high:g} white, the range of the training part"
    flat = data.images.reshape(len(data.images), -1)
    plain = flat.min(1) == flat.max(1)
    for label, name in enumerate(data.classes):
        if count := int(plain[data.labels == label].sum()):
            yield f"{count:,} of {np.sum(data.labels == label):,} pictures of class {name!r} are of one colour"
    for part, classes in count_classes(data).items():
        total = sum(classes.values())
        if part == "test" and total:
            for name, count in classes.items():
                if count == 0:
                    yield f"the test part has no image of class {name!r}: its score there is not known"
                elif count < FEW:
                    yield f"the test part has only {count} of class {name!r}: one image is {100 / count:.0f} % of it"
