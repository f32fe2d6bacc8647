"""Index arrays of repeated holdout and stratified k-fold, which depend only on labels, groups and a seed."""

import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from datasets.duplicates import leaking
from datasets.images import DatasetError, ImageData

APART = "add images, or leave --leak-free out"  # where groups are in the way of a division
ATTEMPTS = 200  # at a division in which no part lacks what it needs: the second half places groups by chance alone


class Split(NamedTuple):
    """Sorted indices (int64) of the images of each part; `test` may be empty."""

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray


@dataclass(frozen=True)
class RepeatedHoldout:
    """Independent stratified divisions of all images into parts of fixed shares.

    Notes
    -----
    Every part has its share of each class to within one image, and its exact total size. scikit-learn's
    `StratifiedShuffleSplit` guarantees this for two parts and is used for them. Applied twice, for three parts, it does
    not (off by up to 1.23 images in 37 of 39,880 random label sets), so for three parts the counts are rounded
    jointly (`controlled_rounding`) and drawn by permutation.

    Groups, such as near duplicates, stay in one part. Groups of several images are placed first, from the largest to
    the smallest in random order. A group goes to a part that still lacks all its images, with a probability
    proportional to the number of images of its classes that the part lacks. Single images then fill the parts. If
    every group finds such a part, counts and sizes are as exact as without groups. For groups of one class each, this
    is certain if a class has at least parts x (size of its largest group - 1) single images. A group without such a
    part goes where its excess is smallest; for groups of one class each, a part then exceeds its share of a class by
    less than the largest group.

    Split i depends only on the labels, the groups, the seed and i: raising `n_splits` keeps the earlier splits.
    """

    n_splits: int  # at least 1
    shares: Sequence[int]  # relative sizes of training, validation and, optionally, test
    repetitions = 1

    def __post_init__(self) -> None:
        if self.n_splits < 1 or len(self.shares) not in (2, 3) or min(self.shares) <= 0:
            raise ValueError("repeated holdout takes at least 1 split, and two or three positive shares")

    @property
    def name(self) -> str:
        """Name in the result database."""
        return f"repeated holdout {':'.join(map(str, self.shares))}"

    @property
    def has_test_part(self) -> bool:
        """Whether each split draws its own test part."""
        return len(self.shares) == 3

    def split(
        self, labels: np.ndarray, seed: int, groups: np.ndarray | None = None, classes: Sequence[str] = ()
    ) -> list[Split]:
        """Return the splits of `labels`, with the guarantees in the notes of the class.

        Parameters
        ----------
        labels : numpy.ndarray of int64, shape (N,)
            Class of each image, from 0.
        seed : int
            Not negative.
        groups : numpy.ndarray of int64, shape (N,), optional
            Images with equal ids stay in one part.
        classes : sequence of str, optional
            Names, for the messages of errors.

        Raises
        ------
        DatasetError
            A class has fewer images than there are parts, a part has fewer images than there are classes, training
            lacks a class, or large groups leave a part empty.
        """
        counts = np.bincount(labels)
        sizes = controlled_rounding(np.atleast_2d(np.asarray(self.shares) * len(labels) / sum(self.shares)))[0]
        smallest = _name(classes, int(counts.argmin()))
        if counts.min() < len(self.shares) or sizes.min() < len(counts):
            raise DatasetError(
                f"{len(labels)} images of {len(counts)} classes, {counts.min()} of {smallest}, are too few for "
                f"{self.name}; {self._remedy(int(counts.min()), smallest)}"
            )
        remedy = self._remedy(int(counts.min()), smallest) if groups is None else APART
        if groups is None and not self.has_test_part:
            seeds = [np.random.SeedSequence([seed, i]) for i in range(self.n_splits)]
            splits = [self._draw_two(labels, sizes, own) for own in seeds]
        else:
            groups = np.arange(len(labels)) if groups is None else groups
            splits = [_sorted_split(*_draw_parts(labels, sizes, (seed, i), groups)) for i in range(self.n_splits)]
        for split in splits:
            if (trained := np.bincount(labels[split.train], minlength=len(counts))).min() == 0:
                missing = _name(classes, int(trained.argmin()))
                raise DatasetError(f"{self.name} leaves no training image of {missing}; {remedy}")
            if min(map(len, split[: len(self.shares)])) == 0:
                raise DatasetError(f"near duplicates that stay together leave a part of {self.name} empty; {remedy}")
        return splits

    def _remedy(self, fewest: int, smallest: str) -> str:
        """Name the divisions that exist where the smallest class has so few images: equal parts lack no class."""
        parts = min(fewest, len(self.shares))
        if parts < 2:
            return f"add images of {smallest}, or leave it out"
        holdout = ":".join(["1"] * parts)
        return f"add images, or take --holdout {holdout} or --folds {min(fewest, 5)} of experiments/folder.py"

    def _draw_two(self, labels: np.ndarray, sizes: np.ndarray, seed: np.random.SeedSequence) -> Split:
        from sklearn.model_selection import StratifiedShuffleSplit

        state = int(seed.generate_state(1)[0])
        splitter = StratifiedShuffleSplit(1, train_size=int(sizes[0]), test_size=int(sizes[1]), random_state=state)
        train, val = next(splitter.split(labels, labels))
        return _sorted_split(train, val)


@dataclass(frozen=True)
class StratifiedKFold:
    """Stratified k-fold cross-validation with scikit-learn's splitter, shuffled, and shuffled anew to be repeated.

    In each repetition an image is in the validation part of one split. A fold has its share of each class to within one
    image. Split s is fold s % n_splits of repetition s // n_splits.

    Notes
    -----
    A repetition depends only on the labels, the groups, the seed, `n_splits` and its number: raising `repetitions`
    keeps the earlier ones.

    Groups stay in one fold. scikit-learn's `StratifiedGroupKFold` places a group that holds the classes evenly last, on
    top of a full fold, and may leave a fold without a class where others would not. Where one of its folds lacks a
    class, or is more than 10 % too large, folds are drawn by the method of `RepeatedHoldout`, if they are more even.
    """

    n_splits: int  # folds of a repetition, at least 2
    repetitions: int = 1
    name = "stratified k-fold"
    has_test_part = False

    def __post_init__(self) -> None:
        if self.n_splits < 2:
            raise ValueError("k-fold takes at least 2 splits")
        if self.repetitions < 1:
            raise ValueError("k-fold takes at least 1 repetition")

    def split(
        self, labels: np.ndarray, seed: int, groups: np.ndarray | None = None, classes: Sequence[str] = ()
    ) -> list[Split]:
        """Return the folds of `labels`; parameters are those of `RepeatedHoldout.split`, seed is below 2**32.

        Raises
        ------
        DatasetError
            A class has fewer images or groups than folds, or large groups leave a fold without a class.
        """
        later = [np.random.SeedSequence([seed, number]) for number in range(1, self.repetitions)]
        seeds = [seed, *(int(own.generate_state(1)[0]) for own in later)]
        return [split for own in seeds for split in self._divide(labels, own, groups, classes)]

    def _divide(self, labels: np.ndarray, seed: int, groups: np.ndarray | None, classes: Sequence[str]) -> list[Split]:
        """Return the folds of one repetition, which has a seed of its own."""
        from sklearn import model_selection

        held, unit, more = labels, "image", "images"  # class of each indivisible unit
        if groups is not None:
            held = np.unique(np.column_stack([groups, labels]), axis=0)[:, 1]
            unit, more = "group of near duplicates", "groups of near duplicates"
        fewest = np.bincount(held)
        most = min(int(fewest.min()), self.n_splits - 1)  # folds that may exist
        remedy = f"lower --n-splits to {most}" if most > 1 else "add images of it, or leave it out"
        if fewest.min() < self.n_splits:
            few = f"1 {unit}" if fewest.min() == 1 else f"{fewest.min()} {more}"
            smallest = _name(classes, int(fewest.argmin()))
            raise DatasetError(f"{smallest} has {few} for {self.n_splits} folds; {remedy}")
        if groups is None:
            folds = model_selection.StratifiedKFold(self.n_splits, shuffle=True, random_state=seed)
            return [_sorted_split(train, val) for train, val in folds.split(labels, labels)]
        # may be far from even, see above (findings/sklearn_group_folds.sh)
        several = model_selection.StratifiedGroupKFold(self.n_splits, shuffle=True, random_state=seed)
        parts = [val for _, val in several.split(labels, labels, groups)]

        def is_usable(parts: Sequence[np.ndarray]) -> bool:
            return all(len(np.unique(labels[part])) == labels.max() + 1 for part in parts)

        if not is_usable(parts) or max(map(len, parts)) > 1.1 * len(labels) / self.n_splits:
            sizes = controlled_rounding(np.full((1, self.n_splits), len(labels) / self.n_splits))[0]
            ours = _draw_parts(labels, sizes, (seed,), groups, is_usable)
            if (is_usable(ours), -max(map(len, ours))) > (is_usable(parts), -max(map(len, parts))):
                parts = ours
        for part in parts:
            if (counts := np.bincount(labels[part], minlength=labels.max() + 1)).min() == 0:
                raise DatasetError(
                    f"near duplicates that stay together leave no image of {_name(classes, int(counts.argmin()))} in "
                    f"one of {self.n_splits} folds; {remedy}"
                )
        return [_sorted_split(np.setdiff1d(np.arange(len(labels)), part), part) for part in parts]


@dataclass(frozen=True)
class PublishedValidation:
    """One split: the published training and validation parts as they are."""

    n_splits: int = 1
    repetitions = 1
    name = "published validation part"
    has_test_part = False

    def __post_init__(self) -> None:
        if self.n_splits != 1:
            raise ValueError("there is one published validation part; --holdout or --folds divide anew")


Protocol = RepeatedHoldout | StratifiedKFold | PublishedValidation


def named_protocol(name: str, n_splits: int, repetitions: int = 1) -> Protocol:
    """Return the protocol with a name from the result database; a `ValueError` if there is none."""
    if name == StratifiedKFold.name:
        return StratifiedKFold(n_splits, repetitions)
    if repetitions != 1:
        raise ValueError(f"{name!r} has no repetitions")
    if shares := re.fullmatch(r"repeated holdout (\d+(?::\d+)+)", name):
        return RepeatedHoldout(n_splits, tuple(map(int, shares[1].split(":"))))
    if name == PublishedValidation.name:
        return PublishedValidation(n_splits)
    raise ValueError(f"{name!r} is no protocol")


def draw_splits(protocol: Protocol, data: ImageData, seed: int, groups: np.ndarray | None = None) -> list[Split]:
    """Split all images of a data set if the protocol draws a test part, otherwise the published training part.

    With `groups` (see `duplicate_groups`) near duplicates stay together, and training excludes near duplicates of the
    published test part. Errors are those of the protocol, or that this leaves a class without training images.
    """
    published_test = np.arange(data.n_pool, len(data.labels))
    if isinstance(protocol, PublishedValidation):
        if not data.n_val:
            raise DatasetError(f"{data.name} has no folder val/ with the validation part")
        train, val = np.split(np.arange(data.n_pool), [data.n_pool - data.n_val])
        splits = [_sorted_split(train, val, published_test)]
    elif protocol.has_test_part:
        return protocol.split(data.labels, seed, groups, data.classes)
    else:
        pool = slice(data.n_pool)
        splits = protocol.split(data.labels[pool], seed, None if groups is None else groups[pool], data.classes)
        splits = [split._replace(test=published_test) for split in splits]
    if groups is None:
        return splits
    published = isinstance(protocol, PublishedValidation)
    held_out = [np.concatenate([split.val, split.test]) if published else split.test for split in splits]
    leaked = [leaking(groups, held, split.train) for held, split in zip(held_out, splits, strict=True)]
    splits = [split._replace(train=np.setdiff1d(split.train, own)) for split, own in zip(splits, leaked, strict=True)]
    for number, split in enumerate(splits):
        if (trained := np.bincount(data.labels[split.train], minlength=len(data.classes))).min() == 0:
            raise DatasetError(
                f"without near duplicates of test images, split {number} of {protocol.name} has no training image of "
                f"{_name(data.classes, int(trained.argmin()))}; {APART}"
            )
    return splits


def halve(images: np.ndarray, labels: np.ndarray, groups: np.ndarray | None = None) -> np.ndarray:
    """Divide the validation part of a split into two halves, stratified by class, always in the same way.

    Parameters
    ----------
    images : numpy.ndarray of int64, shape (n,)
        Indices of the part; the division depends on them, their labels and their groups alone.
    labels, groups : numpy.ndarray of int64, shape (N,)
        Of all images. Images with equal ids in `groups` stay in one half, as in `RepeatedHoldout`.

    Returns
    -------
    numpy.ndarray of uint8, shape (n,)
        0 or 1 for each image. A single group leaves half 1 empty.
    """
    together = np.arange(len(images)) if groups is None else groups[images]
    sizes = np.array([(len(images) + 1) // 2, len(images) // 2])
    half = np.ones(len(images), np.uint8)
    if len(np.unique(together)) < 2:
        return np.zeros_like(half)
    seed = zlib.crc32(np.ascontiguousarray(images, dtype="<i8").data)
    half[_draw_parts(labels[images], sizes, (seed,), together)[0]] = 0
    return half


def _several_and_single(groups: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """Return the indices of each group of several images, in order of their ids, and of the single images."""
    _, inverse, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    together = np.flatnonzero(sizes[inverse] > 1)
    together = together[np.argsort(inverse[together], kind="stable")]
    several = np.split(together, np.cumsum(sizes[sizes > 1])[:-1]) if len(together) else []
    return several, np.flatnonzero(sizes[inverse] == 1)


def _draw_parts(
    labels: np.ndarray,
    sizes: np.ndarray,
    seed: tuple[int, ...],
    groups: np.ndarray,
    is_usable: Callable[[Sequence[np.ndarray]], bool] = lambda parts: True,
) -> list[np.ndarray]:
    """Divide images into parts of these sizes by the method of `RepeatedHoldout`; draw again if they are not usable."""
    several, single = _several_and_single(groups)
    for attempt in range(ATTEMPTS):
        rng = np.random.default_rng(np.random.SeedSequence(seed if attempt == 0 else [*seed, attempt]))
        lacking = controlled_rounding(np.outer(np.bincount(labels), sizes / sizes.sum()))  # (classes, parts)
        placed: list[list[np.ndarray]] = [[] for _ in sizes]
        groups_in_order = [several[i] for i in rng.permutation(len(several))]
        if attempt == 0:
            groups_in_order.sort(key=len, reverse=True)
        for group in groups_in_order:
            held = np.bincount(labels[group], minlength=len(lacking))
            part = int(rng.integers(len(sizes))) if attempt > ATTEMPTS // 2 else _choose_part(lacking, held, rng)
            lacking[:, part] -= held
            placed[part].append(group)
        for label, row in enumerate(lacking):
            rest = rng.permutation(single[labels[single] == label])
            for part, piece in enumerate(np.split(rest, np.cumsum(_fill(row, len(rest)))[:-1])):
                placed[part].append(piece)
        parts = [np.concatenate(pieces) for pieces in placed]
        if is_usable(parts):
            break
    return parts


def _name(classes: Sequence[str], label: int) -> str:
    return f"class {classes[label]!r}" if classes else f"class {label}"


def _choose_part(lacking: np.ndarray, held: np.ndarray, rng: np.random.Generator) -> int:
    """Draw the part of a group with `held` (classes,) images, for parts that lack `lacking` (classes, parts)."""
    excess = np.clip(held[:, None] - lacking, 0, None)[held > 0].sum(axis=0)
    fits = excess == 0
    if not fits.any():
        return int(excess.argmin())
    seats = (held @ lacking) * fits
    return int(rng.choice(len(seats), p=seats / seats.sum()))


def _fill(lacking: np.ndarray, available: int) -> np.ndarray:
    """Return the number of single images of a class for each part; groups may already exceed the share of a part."""
    wanted: np.ndarray = np.clip(lacking, 0, None)
    if wanted.sum() == available:
        return wanted  # unless a group found no part with room
    reduced: np.ndarray = controlled_rounding(np.atleast_2d(wanted * available / wanted.sum()))[0]
    return reduced


def controlled_rounding(table: np.ndarray) -> np.ndarray:
    """Round a table to integers so that each cell, row total and column total moves by less than one.

    Such a rounding exists for every two-way table (Bacharach 1966; Cox and Ernst 1982): the fractions are a
    point of a transport polytope, whose corners are integral, and a linear program finds a corner. Integral row and
    column totals are preserved.

    Parameters
    ----------
    table : numpy.ndarray of float, shape (rows, columns)
        Non-negative.

    Returns
    -------
    numpy.ndarray of int64, shape (rows, columns)
    """
    from scipy.optimize import linprog

    floors = np.floor(table + 1e-9)
    fractions = np.clip(table - floors, 0, None)
    rows, columns = table.shape
    cells = np.arange(table.size).reshape(table.shape)
    margins = np.zeros((rows + columns, table.size))  # one row per total, with ones at its cells
    for line, members in enumerate([*cells, *cells.T]):
        margins[line, members] = 1
    totals = margins @ fractions.ravel()
    upper = (fractions.ravel() > 1e-9).astype(float)
    bounds = np.column_stack([np.zeros_like(upper), upper])
    # larger fractions are rounded up first; each total gets its floor or ceiling
    limits = np.concatenate([np.ceil(totals - 1e-9), -np.floor(totals + 1e-9)])
    constraints = {"A_ub": np.vstack([margins, -margins]), "b_ub": limits, "bounds": bounds}
    result = linprog(-fractions.ravel(), **constraints, method="highs-ds")
    rounded: np.ndarray = floors + np.rint(result.x).reshape(table.shape)
    return rounded.astype(np.int64)


def _sorted_split(train: np.ndarray, val: np.ndarray, test: np.ndarray | None = None) -> Split:
    empty = np.empty(0, dtype=np.int64)
    return Split(*(np.sort(part).astype(np.int64) for part in (train, val, empty if test is None else test)))
