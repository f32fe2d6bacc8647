"""Audit of a data set: broken files, duplicate pictures, pictures with two labels, test images in training.

`audit` returns a dict for programs; `to_text` and `draw_contact_sheet` present it to people. Its keys:

=========================================  ============================================================================
`task` `dataset` `folder` `digest`         the audited data; the digest is `ImageData.digest`
`refusal`                                  why a run refuses these data, or null
`parts`                                    decodable images: `train`, `val` if the data have this part, and `test`,
                                           each with counts by class
`original_size`                            `width` and `height` of the files in pixels, each `min` `median` `max`
`undecodable`                              `file` and `reason` of each undecodable file
`exact_duplicate_groups`                   number of pictures that occur more than once with equal pixels
`exact_duplicates`                         a list of images for each of them
`near_duplicate_groups`                    number of pictures that occur more than once, equal or nearly equal
`near_duplicate_images`                    number of images in these groups
`two_label_groups` `across_parts_groups`   number of groups with two classes; with images of several parts
`near_duplicates`                          the groups: `images`, the largest `distance` of two hashes (bits) and the
                                           smallest `correlation` of pixels that connect them, `two_labels`,
                                           `across_parts`
`val_images_with_near_duplicate_in_train`  number of images of `val` with any near duplicate in `train`
`test_images_also_in_train`                number of test images with a near duplicate of equal hash in `train` or `val`
`test_images_with_near_duplicate_in_train` number of test images with any near duplicate there
`leaks`                                    these test images: `test` file, `train` files, `same_hash`
`method`                                   the hash, and the limits of `distance` and `correlation`
=========================================  ============================================================================

An image has `index` (in `ImageData`), `part`, `class` and `file`. Images of Fashion-MNIST have no files: `file` is part
and number in the published order, such as `test/17`. Pixels are compared as models see them.
"""

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from datasets.account import count_classes, slices
from datasets.duplicates import NearDuplicates, connect, equal_pixels, leaking, limits, near_duplicates
from datasets.folder import list_folder, read_folder
from datasets.images import DatasetError, ImageData, one_sentence
from datasets.names import readable_name
from datasets.sources import Source, find, load

Report = dict[str, Any]

MAX_EXAMPLES = 3  # of each finding, in the text
MAX_GROUPS = 60  # on a contact sheet
MAX_THUMBNAILS = 6  # of one group
SHEET_WIDTH, THUMBNAIL, GAP, LINE = 1_420, 128, 12, 14  # pixels: five pairs a row


class _Images(NamedTuple):
    """All decodable images, even if a run refuses them."""

    folder: Path
    data: ImageData
    files: list[str]  # of length N
    sizes: np.ndarray  # (N, 2): width and height of the originals, in pixels
    undecodable: list[dict[str, str]]
    refusal: str | None


def audit(
    task: str, source: Source, data_dir: str | os.PathLike[str] | None = None, sample: bool = False
) -> tuple[Report, ImageData]:
    """Examine the images of a task; undecodable files are reported, never an error.

    Other parameters and errors are those of `datasets.load`.

    Returns
    -------
    report : dict
        JSON values; the module's docstring lists the keys.
    data : ImageData
        The decodable images.
    """
    with one_sentence():
        found = _read(source, data_dir, sample)
    data = found.data
    near = near_duplicates(data)
    groups = connect(near.pairs, len(data.labels))
    limit = limits(data.images.shape[1:])
    exact = [_describe(found, members) for members in _members(equal_pixels(data.images))]
    duplicates = [_describe_group(found, near, members) for members in _members(groups)]
    leaks = _leaks(found, near, groups)
    train, val = (np.arange(len(groups))[slices(data)[part]] for part in ("train", "val"))
    return {
        "task": task,
        "dataset": data.name,
        "folder": str(found.folder),
        "digest": data.digest,
        "refusal": found.refusal,
        "parts": count_classes(data),
        "original_size": {name: _spread(found.sizes[:, axis]) for axis, name in enumerate(("width", "height"))},
        "undecodable": found.undecodable,
        "exact_duplicate_groups": len(exact),
        "exact_duplicates": exact,
        "near_duplicate_groups": len(duplicates),
        "near_duplicate_images": sum(len(group["images"]) for group in duplicates),
        "two_label_groups": sum(group["two_labels"] for group in duplicates),
        "across_parts_groups": sum(group["across_parts"] for group in duplicates),
        "near_duplicates": duplicates,
        "val_images_with_near_duplicate_in_train": len(leaking(groups, train, val)),
        "test_images_also_in_train": sum(leak["same_hash"] for leak in leaks),
        "test_images_with_near_duplicate_in_train": len(leaks),
        "leaks": leaks,
        "method": {"hash": "dHash, 64 bits", "distance": limit.distance, "correlation": limit.correlation},
    }, data


def count_table(parts: Mapping[str, Mapping[str, int]]) -> Table:
    """Lay out the counts of `count_classes` as a table with one row per class."""
    table = Table("class", box=box.SIMPLE_HEAD)
    for part in parts:
        table.add_column(part, justify="right")
    for name in parts["train"]:
        table.add_row(escape(name), *(f"{counts[name]:,}" for counts in parts.values()))
    table.add_section()
    table.add_row("all", *(f"{sum(counts.values()):,}" for counts in parts.values()))
    return table


def to_text(report: Report) -> str:
    """Format the counts of a report and a few examples of each finding."""
    written = io.StringIO()
    console = Console(file=written, highlight=False)
    console.print(f"{report['task']}: {report['dataset']} in {report['folder']}", markup=False, soft_wrap=True)
    console.print(count_table(report["parts"]))
    if all(report["original_size"].values()):
        wide, high = (_range(spread) for spread in report["original_size"].values())
        console.print(f"Originals are {wide} px wide and {high} px high.\n", soft_wrap=True)
    for finding, examples in _findings(report):
        console.print(finding, markup=False, soft_wrap=True)
        for example in examples[:MAX_EXAMPLES]:
            console.print(f"    {example}", markup=False, soft_wrap=True)
        if len(examples) > MAX_EXAMPLES:
            console.print(f"    and {len(examples) - MAX_EXAMPLES:,} more")
    if report["refusal"]:
        console.print(f"\nA run refuses these data: {report['refusal']}", markup=False, soft_wrap=True)
    if report["near_duplicates"]:
        console.print(
            "\nTo list all: --format json. To view them: --contact-sheet FILE.png. To keep near duplicates together "
            "in a run, and near duplicates of test images out of training: --leak-free.",
            soft_wrap=True,
        )
    return written.getvalue()


def draw_contact_sheet(report: Report, data: ImageData, path: Path) -> None:
    """Draw groups of near duplicates into one PNG: two labels first, then across parts, then by correlation.

    `report` and `data` are results of `audit`. The folder of `path` is created. At most `MAX_GROUPS` groups are drawn;
    a line below them counts the others.
    """
    order = sorted(
        report["near_duplicates"],
        key=lambda group: (not group["two_labels"], not group["across_parts"], group["correlation"]),
    )
    tiles = [_draw_group(group, data.images) for group in order[:MAX_GROUPS]]
    places, x, y = [], GAP, GAP
    for tile in tiles:
        if x > GAP and x + tile.width + GAP > SHEET_WIDTH:
            x, y = GAP, y + tile.height + GAP
        places.append((x, y))
        x += tile.width + GAP
    height = places[-1][1] + tiles[-1].height if tiles else GAP
    sheet = Image.new("RGB", (SHEET_WIDTH, height + 2 * GAP + LINE), "white")
    for tile, place in zip(tiles, places, strict=True):
        sheet.paste(tile, place)
    note = f"{report['dataset']}: {len(tiles):,} of {len(order):,} groups of near duplicates"
    if len(order) > len(tiles):
        note += f"; {len(order) - len(tiles):,} more are not shown"
    ImageDraw.Draw(sheet).text((GAP, height + GAP), note, "black", ImageFont.load_default(LINE - 2))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, format="PNG")


def _read(source: Source, data_dir: str | os.PathLike[str] | None, sample: bool) -> _Images:
    root = find(source, data_dir, sample)
    refusal = None
    try:
        data = load(source, data_dir, sample)
    except DatasetError as error:
        refusal = str(error)
        # without the pictures that do not decode it may be a data set; if not, this raises the reason
        data = read_folder(root, readable_name(root.name), source.image_size, source.channels, strict=False)
    undecodable = [{"file": each.file, "reason": each.detail} for each in data.aside if each.is_broken]
    if not data.files:
        numbers = [f"{part}/{n}" for part, rows in slices(data).items() for n in range(rows.stop - rows.start)]
        sizes = np.tile(data.images.shape[2:0:-1], (len(data.labels), 1))
        return _Images(root, data, numbers, sizes, undecodable, refusal)
    paths = {listing.name(path): path for listing in [list_folder(root)] for path in listing.files()}
    sizes = np.array([_original_size(paths[name]) for name in data.files]).reshape(-1, 2)
    return _Images(root, data, list(data.files), sizes, undecodable, refusal)


def _original_size(path: Path) -> tuple[int, int]:
    with Image.open(path) as file:  # reads the header only
        return file.size


def _spread(values: np.ndarray) -> dict[str, float] | None:
    if len(values) == 0:
        return None
    return {"min": int(values.min()), "median": float(np.median(values)), "max": int(values.max())}


def _range(spread: Mapping[str, float]) -> str:
    if spread["min"] == spread["max"]:
        return f"{spread['min']:,}"
    return f"{spread['min']:,} to {spread['max']:,} (median {spread['median']:,g})"


def _members(groups: np.ndarray) -> list[np.ndarray]:
    """Return the indices of the images of each group of several, from the group id of each image."""
    order = np.argsort(groups, kind="stable")
    pieces = np.split(order, np.flatnonzero(np.diff(groups[order])) + 1)
    return [piece for piece in pieces if len(piece) > 1]


def _describe(found: _Images, members: np.ndarray) -> list[dict[str, Any]]:
    data = found.data
    parts = [next(part for part, rows in slices(data).items() if index < rows.stop) for index in members]
    return [
        {"index": int(index), "part": part, "class": data.classes[data.labels[index]], "file": found.files[index]}
        for index, part in zip(members, parts, strict=True)
    ]


def _describe_group(found: _Images, near: NearDuplicates, members: np.ndarray) -> dict[str, Any]:
    images = _describe(found, members)
    inside = np.isin(near.pairs[:, 0], members)  # so is the other image of the pair
    return {
        "images": images,
        "distance": int(near.distance[inside].max()),
        "correlation": float(near.correlation[inside].min()),
        "two_labels": len({image["class"] for image in images}) > 1,
        "across_parts": len({image["part"] for image in images}) > 1,
    }


def _leaks(found: _Images, near: NearDuplicates, groups: np.ndarray) -> list[dict[str, Any]]:
    train, test = np.split(np.arange(len(groups)), [found.data.n_pool])
    same = connect(near.pairs[near.distance == 0], len(groups))
    also = set(leaking(same, train, test).tolist())
    return [
        {
            "test": found.files[index],
            "train": [found.files[other] for other in train[groups[train] == groups[index]]],
            "same_hash": index in also,
        }
        for index in leaking(groups, train, test).tolist()
    ]


def _findings(report: Report) -> list[tuple[str, list[str]]]:
    """Return each finding in words, and its examples."""
    n_val, n_test = (sum(report["parts"].get(part, {}).values()) for part in ("val", "test"))
    duplicates = report["near_duplicates"]
    leaked = [f"{leak['test']} = {' = '.join(leak['train'])}" for leak in report["leaks"]]
    same_hash = [line for line, leak in zip(leaked, report["leaks"], strict=True) if leak["same_hash"]]
    undecodable = [f"{file['file']} ({file['reason']})" for file in report["undecodable"]]
    exact = [_equation(images) for images in report["exact_duplicates"]]
    near = [_equation(group["images"]) for group in duplicates]
    two_labels = [_equation(group["images"]) for group in duplicates if group["two_labels"]]
    counts = {key: f"{value:,}" for key, value in report.items() if isinstance(value, int)}
    also, close = counts["test_images_also_in_train"], counts["test_images_with_near_duplicate_in_train"]
    groups, images = counts["near_duplicate_groups"], counts["near_duplicate_images"]
    in_val = f"{counts['val_images_with_near_duplicate_in_train']} of {n_val:,}"
    of_val = [(f"Validation images that are also in training, equal or nearly equal: {in_val}", list[str]())]
    return [
        (f"Undecodable files: {len(undecodable):,}", undecodable),
        (f"Pictures that occur more than once with equal pixels: {counts['exact_duplicate_groups']}", exact),
        (f"Pictures that occur more than once, equal or nearly equal: {groups}, as {images} images", near),
        (f"Pictures with two labels: {counts['two_label_groups']}", two_labels),
        *(of_val if n_val else []),
        (f"Test images that are also in training with the same hash: {also} of {n_test:,}", same_hash),
        (f"Test images that are also in training, equal or nearly equal: {close} of {n_test:,}", leaked),
    ]


def _equation(images: Sequence[Mapping[str, Any]]) -> str:
    return " = ".join(image["file"] for image in images)


def _draw_group(group: Mapping[str, Any], images: np.ndarray) -> Image.Image:
    """Draw the images of one group side by side, between captions."""
    shown = group["images"][:MAX_THUMBNAILS]
    step = THUMBNAIL + GAP // 2
    tile = Image.new("RGB", (len(shown) * step, THUMBNAIL + 3 * LINE), "white")
    pen, font = ImageDraw.Draw(tile), ImageFont.load_default(LINE - 4)
    title = f"distance {group['distance']}, correlation {group['correlation']:.4f}"
    flags = [name for key, name in (("two_labels", "two labels"), ("across_parts", "several parts")) if group[key]]
    if hidden := len(group["images"]) - len(shown):
        flags.append(f"{hidden} more")
    pen.text((0, 0), title, "black", font)
    pen.text((tile.width - GAP // 2, 0), ", ".join(flags), "firebrick", font, anchor="ra")
    for column, image in enumerate(shown):
        pixels = images[image["index"]]
        thumbnail = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
        tile.paste(thumbnail.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.NEAREST), (column * step, LINE))
        for line, text in enumerate((f"{image['part']}: {image['class']}", Path(image["file"]).name)):
            place = (column * step, THUMBNAIL + (1 + line) * LINE)
            pen.text(place, _shorten(text, font), "black", font)
    return tile


def _shorten(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> str:
    """Shorten a text in its middle to the width of a thumbnail."""
    whole, kept = text, len(text)
    while font.getlength(text) > THUMBNAIL:
        kept -= 1
        text = f"{whole[: (kept + 1) // 2]}…{whole[len(whole) - kept // 2 :]}"
    return text
