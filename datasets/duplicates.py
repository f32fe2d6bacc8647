"""Near duplicates: recompressed, resized, brightened or slightly edited copies of a picture.

Two images are near duplicates if their perceptual hashes (64-bit dHash, Krawetz 2013) are close and their pixels
agree. The hash alone reports coincidences: two trousers, or two cakes on white. Mirrored, rotated and cropped copies
are not found.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from datasets.images import ImageData, building, cache_dir, cache_sentence

PAIRS = "pairs.npz"  # file of a cache entry
METHOD = 1  # part of the cache's key, as are the limits: raise it when the method changes


class Limits(NamedTuple):
    """How close two images must be."""

    distance: int  # differing bits of the 64 of the hash, at most
    correlation: float  # of the gray pixels, averaged down to at most 32x32, at least


# Calibrated by eye on the three published data sets, on pairs found by correlation alone and by the hash.
#
# Photographs. Cats and dogs: 35 pairs correlate by 0.995 or more, all of one picture, at distance 0 to 4; no other pair
# reaches 0.8. Muffins, within distance 8: 397 pairs from 0.995, 4 from 0.975 to 0.991 and 5 from 0.949 to 0.952, at
# distance 0 to 7, all of one picture (recompressed, watermarked, stretched, retouched). Below the limit true and false
# pairs mix: 0.941 and 0.940 (one picture under a watermark), 0.933 (two masks on white), 0.923 (a print on a blue and
# on a black shirt), 0.909 (two muffins on white). Beyond distance 8 two cupcakes of one series reach 0.956.
PHOTOGRAPHS = Limits(distance=8, correlation=0.945)
# Small images, such as Fashion-MNIST. Different garments in one place on black correlate by more than 0.99, so the
# limit is close to 1. From 0.9995 there are 27 pairs, at distance 0 to 2, each of one photograph, some lighter or
# darker. Of the 15 down to 0.999, some are one photograph with another print or stripe; below 0.998 come different
# trousers and bags. No two images have equal pixels.
SMALL_IMAGES = Limits(distance=4, correlation=0.9995)
SMALL = 64  # pixels: images with a shorter side below this are small
THUMBNAIL = 32  # pixels: largest side at which pixels are compared
BLOCK = 64  # hashes compared with all others at once: they fit the cache of a core
CHUNK = 4096  # pairs whose pixels are compared at once: 32 MB


class NearDuplicates(NamedTuple):
    """Pairs of near duplicates; an image with equal pixels is paired only with the first such image."""

    pairs: np.ndarray  # int64, shape (P, 2): indices of images, the smaller first, in order
    distance: np.ndarray  # uint8, shape (P,): differing bits of the hashes
    correlation: np.ndarray  # float32, shape (P,): of the gray pixels


def limits(image_shape: tuple[int, ...]) -> Limits:
    """Return the limits for images of shape (height, width, channels)."""
    return SMALL_IMAGES if min(image_shape[:2]) < SMALL else PHOTOGRAPHS


def duplicate_groups(data: ImageData) -> np.ndarray:
    """Group the images of both published parts that are near duplicates, directly or through other images.

    The cache folder keeps the result.

    Returns
    -------
    numpy.ndarray of int64, shape (N,)
        Index of the first image of each image's group: its own index if it has no near duplicate.

    Raises
    ------
    DatasetError
        The cache folder cannot be written (no space, no permission).
    """
    return connect(near_duplicates(data).pairs, len(data.images))


def leaking(groups: np.ndarray, train: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the indices of `others` that have a near duplicate among the indices `train`, in the order of `others`.

    `groups` (int64, shape (N,)) is the result of `duplicate_groups`.
    """
    return others[np.isin(groups[others], groups[train])]


def near_duplicates(data: ImageData) -> NearDuplicates:
    """Find all pairs of near duplicates, or read them from the cache; see `duplicate_groups` for the errors."""
    folder = cache_dir()
    limit = limits(data.images.shape[1:])
    entry = folder / f"near-duplicates-{METHOD}-{limit.distance}-{limit.correlation}-{data.digest[:32]}"
    if (known := _read_entry(entry)) is not None:
        return known
    with cache_sentence("near duplicates", folder), building(entry) as partial:
        if (known := _read_entry(entry)) is not None:  # built while this process waited
            return known
        found = _search(data.images, limit)
        np.savez(partial / PAIRS, **found._asdict())
    return found


def connect(pairs: np.ndarray, n_images: int) -> np.ndarray:
    """Return the smallest index that `pairs` (int64, shape (P, 2)) connect each of `n_images` images with."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    graph = coo_array((np.ones(len(pairs), dtype=np.int8), tuple(pairs.T)), shape=(n_images, n_images))
    component = connected_components(graph, directed=False)[1]
    _, first, inverse = np.unique(component, return_index=True, return_inverse=True)
    groups: np.ndarray = first[inverse]
    return groups.astype(np.int64)


def equal_pixels(images: np.ndarray) -> np.ndarray:
    """Return the first image with the same pixels for each of `images` (uint8, shape (N, height, width, channels))."""
    first: dict[bytes, int] = {}
    digests = (hashlib.sha256(np.ascontiguousarray(image).data).digest() for image in images)
    return np.fromiter((first.setdefault(digest, i) for i, digest in enumerate(digests)), np.int64, len(images))


def _search(images: np.ndarray, limit: Limits) -> NearDuplicates:
    first = equal_pixels(images)
    copies = np.flatnonzero(first != np.arange(len(images)))
    originals = np.flatnonzero(first == np.arange(len(images)))
    parts = [(first[copies], copies, np.zeros(len(copies), np.uint8), np.ones(len(copies), np.float32))]
    hashes, pixels = _describe(images[originals] if len(copies) else images)
    for i, j, distance in _candidates(hashes, limit.distance):
        correlation = _correlate(pixels, i, j)
        same = correlation >= limit.correlation
        parts.append((originals[i[same]], originals[j[same]], distance[same], correlation[same]))
    i, j, distance, correlation = (np.concatenate(column) for column in zip(*parts, strict=True))
    pairs = np.column_stack([np.minimum(i, j), np.maximum(i, j)]).astype(np.int64)
    order = np.lexsort(pairs.T[::-1])
    return NearDuplicates(pairs[order], distance[order], correlation[order])


def _describe(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return hashes (uint64, shape (N,)) and small gray pixels (float32, (N, P)) with mean 0 and norm 1."""
    import imagehash

    side = min(THUMBNAIL, *images.shape[1:3])
    hashes = np.empty(len(images), dtype=np.uint64)
    pixels = np.empty((len(images), side * side), dtype=np.float32)
    for row, image in enumerate(images):
        gray = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).convert("L")
        hashes[row] = np.packbits(imagehash.dhash(gray).hash).view(np.uint64)[0]
        pixels[row] = np.asarray(gray.resize((side, side), Image.Resampling.BOX)).ravel()
    pixels -= pixels.mean(axis=1, keepdims=True)
    pixels /= np.maximum(np.linalg.norm(pixels, axis=1, keepdims=True), 1e-6)  # a uniform image correlates with none
    return hashes, pixels


def _candidates(hashes: np.ndarray, limit: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield all pairs of rows within the distance `limit`, and their distances, one block of rows at a time."""
    ones = np.bitwise_count(hashes)
    order = np.argsort(ones, kind="stable")
    ones = ones[order]
    for start in range(0, len(order), BLOCK):
        rows = order[start : start + BLOCK]
        # hashes that differ in d bits differ by at most d in their number of ones: later rows are too far
        stop = np.searchsorted(ones, ones[start + len(rows) - 1] + limit, side="right")
        columns = order[start:stop]
        distance = np.bitwise_count(hashes[rows, None] ^ hashes[columns])
        row, column = np.nonzero(distance <= limit)
        once = column > row
        row, column = row[once], column[once]
        yield rows[row], columns[column], distance[row, column]


def _correlate(pixels: np.ndarray, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    chunks = [slice(start, start + CHUNK) for start in range(0, len(i), CHUNK)]
    values = [np.einsum("pd,pd->p", pixels[i[chunk]], pixels[j[chunk]]) for chunk in chunks]
    return np.concatenate([np.empty(0, np.float32), *values])


def _read_entry(entry: Path) -> NearDuplicates | None:
    try:
        with np.load(entry / PAIRS, allow_pickle=False) as file:  # a zip file, whose checksums are verified
            return NearDuplicates(*(file[name] for name in NearDuplicates._fields))
    except Exception:  # noqa: BLE001 - absent or damaged: zipfile and NumPy raise many errors
        return None
