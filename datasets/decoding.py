"""Decoding image files to the pixels that models see, quietly and in several threads.

A copy of this file goes with each champion, for MLflow to serve it; so NumPy and Pillow are all that `decode` needs.
"""

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, TextIO

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

Range = tuple[float, float]  # values that become 0 and 255
Decoded = Image.Image | tuple[Image.Image, ...]  # planes of 16 bits of RGB or RGBA, for which Pillow has no mode
# of images that have more than 8 bits a channel, by the kind of their numbers: a range for each of TYPICAL's
Depth = Mapping[str, Range]
TYPICAL: Depth = {"integers": (0.0, 65_535.0), "fractions": (0.0, 1.0)}
LONGEST_NAME = 40  # characters of a folder's name beside a bar
# what an EXIF orientation asks for (CIPA DC-008, tag 0x0112)
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
ORIENTATION = 0x0112
PLANAR, SEPARATE = 0x011C, 2  # TIFF's tag for the arrangement of the planes, and that of one after the other
PNG = b"\x89PNG\r\n\x1a\n"  # begins such files
# of files that are pictures to their owner, whether Pillow opens them or not
FOREIGN_SUFFIXES = {".heic", ".heif", ".jxl", ".svg", ".cr2", ".cr3", ".nef", ".arw", ".dng", ".raf", ".orf", ".rw2"}

logging.getLogger("PIL").addHandler(logging.NullHandler())  # else Python prints what Pillow logs of odd files


class NoImageError(Exception):
    """The file is something else than an image."""


def is_picture_by_name(path: Path) -> bool:
    """Whether the suffix is that of an image."""
    Image.init()
    suffix = path.suffix.lower()
    return suffix in FOREIGN_SUFFIXES or Image.EXTENSION.get(suffix) in Image.OPEN


def opens(path: Path) -> bool:
    """Whether Pillow takes a file for an image, by its first bytes."""
    try:
        with quiet_libraries(), Image.open(path):
            return True
    except Exception:  # noqa: BLE001 - Pillow's parsers raise anything
        return False


def why_undecoded(path: Path, failure: Exception) -> str:
    """Say why a picture does not decode: `failure` is the error of `decode`."""
    if not isinstance(failure, UnidentifiedImageError):
        words = " ".join(str(failure).replace(str(path), "the file").split())
        return f"{type(failure).__name__}: {words}"
    if not path.stat().st_size:
        return "it is empty"
    if path.suffix.lower() in FOREIGN_SUFFIXES:
        return f"Pillow reads no {path.suffix.lower()} files; convert it to PNG or JPEG"
    return "Pillow finds no image in it"


def decode(file: Path | BinaryIO, size: int, channels: int, depth: Depth | None = None) -> np.ndarray:
    """Decode one image file to the pixels that models see.

    Only the first frame is read. EXIF orientation is applied, unless the EXIF data are damaged. Transparency becomes
    white, CMYK and palettes are converted, and the image is resized to a square regardless of its aspect ratio, as is
    usual for both Kaggle tasks.

    Parameters
    ----------
    file : Path or binary file
    size, channels : int
        Height and width in pixels; 3 for RGB, 1 for gray.
    depth : mapping of str to (float, float), optional
        The values of an image with 16 or 32 bits a number that become 0 and 255, for `integers` and `fractions`. The
        default is the range of its kind, 0 to 65,535 and 0 to 1, or that of the image itself if it goes beyond.

    Returns
    -------
    numpy.ndarray of uint8, shape (size, size, channels)

    Raises
    ------
    NoImageError
        Pillow finds no image in the file, and its suffix is not that of one.
    """
    image = _open(file, 2 * size)
    if kind := _deep_kind(image):
        image = _to_8_bits(image, (depth or {}).get(kind) or _own_range(image, kind))
    return _to_pixels(image, size, channels)


def _to_pixels(image: Decoded, size: int, channels: int) -> np.ndarray:
    assert isinstance(image, Image.Image)
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    image = image.convert("RGB" if channels == 3 else "L")
    image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(image).reshape(size, size, channels)


def _open(source: Path | BinaryIO, least: int) -> Decoded:
    """Read and turn the first frame, of a PNG also if its metadata are damaged; for `least` see `_read`."""
    try:
        return _read(source, least)
    except Exception:
        if (pixels := _without_metadata(source)) is not None:
            with contextlib.suppress(Exception):
                return _read(pixels, least)
        raise


def _without_metadata(source: Path | BinaryIO) -> BinaryIO | None:
    """Return the chunks of a PNG file that decide its pixels; None for other files."""
    if isinstance(source, Path):
        content = source.read_bytes()
    else:
        source.seek(0)
        content = source.read()
    if not content.startswith(PNG):
        return None
    kept, place = PNG, len(PNG)
    while place < len(content):
        end = place + 12 + int.from_bytes(content[place : place + 4], "big")  # length, name, data, checksum
        name = content[place + 4 : place + 8]
        if name[:1].isupper() or name == b"tRNS":  # a capital marks what a decoder needs; tRNS is the transparency
            kept += content[place:end]
        place = end
    return io.BytesIO(kept)


def _read(source: Path | BinaryIO, least: int) -> Decoded:
    """Read and turn the first frame; a JPEG may be reduced to at least `least` pixels a side."""
    try:
        file = Image.open(source)
    except UnidentifiedImageError:
        if isinstance(source, Path) and is_picture_by_name(source):
            raise
        raise NoImageError from None
    with file:
        if file.format == "EPS":  # Pillow has Ghostscript execute it
            raise ValueError("EPS is a program for printers; convert it to PNG")
        # JPEG decodes to 1/2, 1/4 or 1/8 of its size by skipping frequencies: twice as fast for a photo of 800x532
        # pixels. At twice the wanted size the picture is the same: 0.24 of 255 off in the mean, 7 at most
        file.draft(None, (least, least))
        swapped = _low_byte_modes(file)
        file.load()
        orientation = 1
        with contextlib.suppress(Exception):  # damaged metadata are no damaged picture; the parsers raise anything
            orientation = file.getexif().get(ORIENTATION, 1)
        planes = _sixteen_bits(source, file, swapped) if swapped else (file.copy(),)
    if orientation in TURNS:
        planes = tuple(plane.transpose(TURNS[orientation]) for plane in planes)
    return planes if swapped else planes[0]


def _low_byte_modes(file: ImageFile.ImageFile) -> dict[str, str]:
    """Return the raw modes of an RGB, RGBA or LA image of 16 bits, and those that read its low bytes; else nothing.

    Pillow keeps the high byte of such numbers. With the order of the bytes reversed it keeps the low one.
    """
    if getattr(file, "tag_v2", {}).get(PLANAR) == SEPARATE:  # libtiff reads such planes in a mode of its own
        return {}
    ends = {"16B": "16L", "16L": "16B", "16N": "16B" if sys.byteorder == "little" else "16L"}
    found = {}
    for raw in {_raw_mode(tile) for tile in file.tile}:
        colours, _, end = raw.partition(";")
        if colours not in ("LA", "RGB", "RGBA") or end not in ends:
            return {}
        found[raw] = "RGBA" if colours == "LA" else f"{colours};{ends[end]}"  # LA has no reversed form
    return found


def _raw_mode(tile: ImageFile._Tile) -> str:
    return str(tile.args[0] if isinstance(tile.args, tuple) else tile.args)


def _sixteen_bits(source: Path | BinaryIO, high: Image.Image, swapped: Mapping[str, str]) -> tuple[Image.Image, ...]:
    """Return the planes of an image, in the mode I, from its high bytes and the raw modes of its low ones."""
    if not isinstance(source, Path):
        source.seek(0)
    with Image.open(source) as file:
        file.tile = [
            tile._replace(args=(swapped[_raw_mode(tile)], *tile.args[1:]) if isinstance(tile.args, tuple)
                          else swapped[_raw_mode(tile)])
            for tile in file.tile
        ]  # fmt: skip
        file.load()
        low = file.split()
    if "RGBA" in swapped.values():  # the four bytes of a pixel of LA
        low = (low[1], low[1], low[1], low[3])
    pairs = zip(high.split(), low, strict=True)
    planes = [Image.fromarray(np.asarray(first, np.int32) << 8 | np.asarray(second)) for first, second in pairs]
    if isinstance(hidden := high.info.get("transparency"), tuple):  # of a PNG: the colour that is not there
        same = np.all([np.asarray(plane) == value for plane, value in zip(planes, hidden, strict=True)], axis=0)
        planes.append(Image.fromarray(np.where(same, 0, 65_535).astype(np.int32)))
    return tuple(planes)


def _colours(image: Decoded) -> tuple[Image.Image, ...]:
    """Return the planes of an image but for that of its transparency."""
    return (image,) if isinstance(image, Image.Image) else image[:3]


def _deep_kind(image: Decoded) -> str:
    """Return the kind of numbers of 16 or 32 bits, which Pillow's own conversion cuts off at 255; empty for others."""
    if isinstance(image, tuple):
        return "integers"
    return "fractions" if image.mode == "F" else "integers" if image.mode.startswith("I") else ""


def _to_8_bits(image: Decoded, values: Range) -> Image.Image:
    if isinstance(image, tuple):
        ranges = [*(values for _ in _colours(image)), TYPICAL["integers"]]
        return Image.merge("RGBA"[: len(image)], [_to_8_bits(*each) for each in zip(image, ranges, strict=False)])
    # scaled here, since Pillow clips (findings/pillow_sixteen_bits.sh)
    pixels = np.asarray(image).astype(np.float64)
    low, high = values
    scaled = np.nan_to_num(pixels - low, nan=0.0, posinf=high - low, neginf=0.0) * (255 / max(high - low, 1e-300))
    return Image.fromarray(np.rint(scaled.clip(0, 255)).astype(np.uint8))


def _own_range(image: Decoded, kind: str) -> Range:
    low, high = TYPICAL[kind]
    found = _range_of(image)
    return (low, high) if low <= found[0] and found[1] <= high else found


def _range_of(image: Decoded) -> Range:
    """Return the lowest and the highest value that is finite, transparency aside; (0, 0) without one."""
    ends = []
    for plane in _colours(image):  # one after the other: planes of a large photo take much memory
        pixels = np.asarray(plane)
        finite = pixels[np.isfinite(pixels)] if plane.mode == "F" else pixels
        ends += [float(finite.min()), float(finite.max())] if finite.size else []
    return (min(ends), max(ends)) if ends else (0.0, 0.0)


@contextlib.contextmanager
def quiet_libraries() -> Iterator[TextIO]:
    """Keep off the screen what libraries print of odd files, also those in C; yield a stream for our own messages."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            sys.stderr.flush()
            ours = sys.stderr.fileno()
        except (OSError, ValueError, AttributeError):  # of a notebook
            yield sys.stderr
            return
        with os.fdopen(os.dup(ours), "w", encoding=sys.stderr.encoding, errors=sys.stderr.errors) as screen:
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, ours)
            os.close(nothing)
            try:
                yield screen
            finally:
                os.dup2(screen.fileno(), ours)


def decode_files(
    root: Path, files: Sequence[Path], size: int, channels: int, num_workers: int = 8, n_train: int | None = None
) -> tuple[np.ndarray, list[Exception | None], dict[str, Range]]:
    """Decode image files below `root`, and record those that fail.

    Pillow releases the interpreter lock, so up to `num_workers` threads decode, at most one per core.

    Parameters
    ----------
    root, files : Path, sequence of Path
    size, channels : int
        See `decode`.
    num_workers : int
    n_train : int, optional
        How many of the files, from the first one, decide the range of deep images; all of them by default.

    Returns
    -------
    images : numpy.ndarray of uint8, shape (N, size, size, channels)
        Row i is `decode(files[i], size, channels, depth)`, or undefined if that fails.
    failures : list of Exception or None, length N
    depth : dict of str to (float, float)
        For each kind of deep images (`decode`) the lowest and the highest value among the first `n_train`, or of all if
        none of these is of that kind.
    """
    from rich.console import Console
    from rich.progress import Progress, TextColumn
    from rich.table import Column

    from datasets.names import readable_name

    images = np.empty((len(files), size, size, channels), dtype=np.uint8)
    deep: dict[int, tuple[str, Range]] = {}

    def decode_into(row: int) -> Exception | None:
        try:
            image = _open(files[row], 2 * size)
            if kind := _deep_kind(image):
                deep[row] = kind, _range_of(image)  # decoded once the range of all is known
            else:
                images[row] = _to_pixels(image, size, channels)
        except Exception as error:  # noqa: BLE001 - Pillow's parsers raise any error for a broken file
            return error
        return None

    def decode_deep(row: int) -> Exception | None:
        try:
            images[row] = decode(files[row], size, channels, depth)
        except Exception as error:  # noqa: BLE001 - Pillow's parsers raise any error for a broken file
            return error
        return None

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with quiet_libraries() as screen, ThreadPoolExecutor(min(num_workers, cores)) as pool:
        name = TextColumn("decoding {task.description}", markup=False, table_column=Column(
            no_wrap=True, overflow="ellipsis", max_width=len("decoding ") + LONGEST_NAME))  # fmt: skip
        with Progress(name, *Progress.get_default_columns()[1:], console=Console(file=screen)) as bar:
            results = pool.map(decode_into, range(len(files)))
            failures = list(bar.track(results, len(files), description=readable_name(root.name)))
        depth = {kind: _widest(deep, kind, n_train) for kind in sorted({kind for kind, _ in deep.values()})}
        for row, failure in zip(deep, pool.map(decode_deep, deep), strict=True):
            failures[row] = failure
    return images, failures, depth


def _widest(deep: Mapping[int, tuple[str, Range]], kind: str, n_train: int | None) -> Range:
    """Return the range of all images of a kind that are among the first `n_train`, or of all of the kind."""
    own = {row: values for row, (of, values) in deep.items() if of == kind}
    known = [values for row, values in own.items() if n_train is None or row < n_train] or list(own.values())
    return min(low for low, _ in known), max(high for _, high in known)
