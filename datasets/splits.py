"""Index arrays for repeated holdout and stratified k-fold, made from labels and a seed alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from datasets.images import DatasetError


class Split(NamedTuple):
    """Sorted indices (int64) of the images of each part; `test` may be empty."""

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray


@dataclass(frozen=True)
class RepeatedHoldout:
    """Independent stratified divisions of all images into parts of fixed shares.

    Parameters
    ----------
    n_splits : int
        How many divisions, at least 1.
    shares : sequence of int
        Relative sizes of training, validation and, as an optional third, test.

    Notes
    -----
    Every part holds each class in its share to within one image, and its total size is exact. scikit-learn's
    `StratifiedShuffleSplit` promises this for two parts and is used for them. Applied twice, for three parts, it does
    not (off by up to 1.23 images in 37 of 39,880 random label sets), so for three parts the counts are rounded
    jointly (`controlled_rounding`) and drawn by permutation.

    Split i depends on the labels, the seed and i only: raising `n_splits` keeps the earlier ones.
    """

    n_splits: int
    shares: Sequence[int]

    def __post_init__(self) -> None:
        if self.n_splits < 1 or len(self.shares) not in (2, 3) or min(self.shares) <= 0:
            raise ValueError("repeated holdout takes at least 1 split, and two or three positive shares")

    @property
    def name(self) -> str:
        """How the protocol is called in the result database."""
        return f"repeated holdout {':'.join(map(str, self.shares))}"

    @property
    def has_test_part(self) -> bool:
        """Whether each split draws its own test part."""
        return len(self.shares) == 3

    def split(self, labels: np.ndarray, seed: int) -> list[Split]:
        """Return the splits of `labels` (shape (N,)); see the class's notes for the guarantees.

        Raises
        ------
        DatasetError
            A class has fewer images than there are parts, a part fewer images than there are classes, or training
            none of a class.
        """
        counts = np.bincount(labels)
        sizes = controlled_rounding(np.atleast_2d(np.asarray(self.shares) * len(labels) / sum(self.shares)))[0]
        if counts.min() < len(self.shares) or sizes.min() < len(counts):
            raise DatasetError(
                f"{len(labels)} images of {len(counts)} classes, {counts.min()} in the smallest, are too few for "
                f"{self.name}; add images"
            )
        draw = self._draw_three if self.has_test_part else self._draw_two
        splits = [draw(labels, sizes, np.random.SeedSequence([seed, i])) for i in range(self.n_splits)]
        for split in splits:
            if (trained := np.bincount(labels[split.train], minlength=len(counts))).min() == 0:
                raise DatasetError(
                    f"{self.name} leaves no training image of class {trained.argmin()}; add images of it"
                )
        return splits

    def _draw_two(self, labels: np.ndarray, sizes: np.ndarray, seed: np.random.SeedSequence) -> Split:
        from sklearn.model_selection import StratifiedShuffleSplit

        state = int(seed.generate_state(1)[0])
        splitter = StratifiedShuffleSplit(1, train_size=int(sizes[0]), test_size=int(sizes[1]), random_state=state)
        train, val = next(splitter.split(labels, labels))
        return _sorted_split(train, val)

    def _draw_three(self, labels: np.ndarray, sizes: np.ndarray, seed: np.random.SeedSequence) -> Split:
        rng = np.random.default_rng(seed)
        counts = controlled_rounding(np.outer(np.bincount(labels), sizes / sizes.sum()))  # (classes, parts)
        orders = [rng.permutation(np.flatnonzero(labels == label)) for label in range(len(counts))]
        pieces = [np.split(order, np.cumsum(row)[:-1]) for order, row in zip(orders, counts, strict=True)]
        return _sorted_split(*(np.concatenate(part) for part in zip(*pieces, strict=True)))


@dataclass(frozen=True)
class StratifiedKFold:
    """Stratified k-fold cross-validation: every image is validated on once (scikit-learn's splitter, shuffled).

    Parameters
    ----------
    n_splits : int
        How many folds, at least 2. A fold holds each class to within one image of its share.
    """

    n_splits: int

    name = "stratified k-fold"
    has_test_part = False

    def __post_init__(self) -> None:
        if self.n_splits < 2:
            raise ValueError("k-fold takes at least 2 splits")

    def split(self, labels: np.ndarray, seed: int) -> list[Split]:
        """Return the folds of `labels` (shape (N,)).

        Raises
        ------
        DatasetError
            A class with fewer images than folds.
        """
        from sklearn import model_selection

        if (fewest := int(np.bincount(labels).min())) < self.n_splits:
            raise DatasetError(f"the smallest class has {fewest} images for {self.n_splits} folds; lower --n-splits")
        folds = model_selection.StratifiedKFold(self.n_splits, shuffle=True, random_state=seed)
        return [_sorted_split(train, val) for train, val in folds.split(labels, labels)]


def controlled_rounding(table: np.ndarray) -> np.ndarray:
    """Round a table to integers so that each cell, row total and column total moves by less than one.

    Such a rounding exists for every two-way table (Bacharach 1966; Cox and Ernst 1982): the fractions are a
    point of a transport polytope, whose corners are integral, and a linear program finds a corner.

    Parameters
    ----------
    table : numpy.ndarray of float, shape (rows, columns)
        Non-negative; where a row or column adds up to an integer, the rounded one adds up to the same.

    Returns
    -------
    numpy.ndarray of int64, shape (rows, columns)
    """
    from scipy.optimize import linprog

    floors = np.floor(table + 1e-9)
    fractions = np.clip(table - floors, 0, None)
    rows, columns = table.shape
    cells = np.arange(table.size).reshape(table.shape)
    margins = np.zeros((rows + columns, table.size))  # one line a row and a column: which cells it adds up
    for line, members in enumerate([*cells, *cells.T]):
        margins[line, members] = 1
    totals = margins @ fractions.ravel()
    upper = (fractions.ravel() > 1e-9).astype(float)
    bounds = np.column_stack([np.zeros_like(upper), upper])
    # larger fractions are rounded up first; rows and columns get the floor or the ceiling of their total
    result = linprog(
        -fractions.ravel(),
        A_ub=np.vstack([margins, -margins]),
        b_ub=np.concatenate([np.ceil(totals - 1e-9), -np.floor(totals + 1e-9)]),
        bounds=bounds,
        method="highs-ds",
    )
    rounded: np.ndarray = floors + np.rint(result.x).reshape(table.shape)
    return rounded.astype(np.int64)


def _sorted_split(train: np.ndarray, val: np.ndarray, test: np.ndarray | None = None) -> Split:
    empty = np.empty(0, dtype=np.int64)
    return Split(*(np.sort(part).astype(np.int64) for part in (train, val, empty if test is None else test)))
