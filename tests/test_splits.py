"""Guarantees of the splitters, as properties over many label arrays."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets import DatasetError, RepeatedHoldout, StratifiedKFold
from datasets.splits import controlled_rounding

LABELS = st.lists(st.integers(6, 60), min_size=2, max_size=8).flatmap(
    lambda counts: st.permutations(np.repeat(np.arange(len(counts)), counts).tolist()).map(np.array)
)
SHARES = st.sampled_from([(3, 2), (4, 1), (1, 1), (2, 49, 49), (1, 1, 1), (6, 3, 1), (5, 2, 3)])


def check(parts, labels: np.ndarray, sizes: np.ndarray) -> None:
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(len(labels)))  # disjoint and covering
    totals = np.bincount(labels)
    for part, size in zip(parts, sizes, strict=True):
        assert part.dtype == np.int64
        assert np.array_equal(part, np.sort(part))
        assert abs(len(part) - size) < 1
        counts = np.bincount(labels[part], minlength=len(totals))
        assert np.all(np.abs(counts - totals * len(part) / len(labels)) <= 1)


@settings(max_examples=60, deadline=None)
@given(LABELS, SHARES, st.integers(0, 2**32 - 1))
def test_holdout_is_disjoint_covering_and_stratified(labels: np.ndarray, shares: tuple[int, ...], seed: int) -> None:
    sizes = np.array(shares) * len(labels) / sum(shares)
    try:
        splits = RepeatedHoldout(3, shares).split(labels, seed)
    except DatasetError:
        assert min(sizes) < len(np.unique(labels)) + 1
        return
    for split in splits:
        check([split.train, split.val, split.test][: len(shares)], labels, sizes)
        assert len(shares) == 3 or len(split.test) == 0


@settings(max_examples=40, deadline=None)
@given(LABELS, st.integers(2, 6), st.integers(0, 2**32 - 1))
def test_folds_cover_once_and_are_stratified(labels: np.ndarray, folds: int, seed: int) -> None:
    splits = StratifiedKFold(folds).split(labels, seed)
    assert np.array_equal(np.sort(np.concatenate([split.val for split in splits])), np.arange(len(labels)))
    for split in splits:
        check([split.train, split.val], labels, np.array([len(split.train), len(split.val)]))
        assert np.all(np.bincount(labels[split.val]) - np.bincount(labels) // folds <= 1)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 2**31))
def test_controlled_rounding_moves_cells_and_margins_by_less_than_one(rows: int, columns: int, seed: int) -> None:
    table = np.random.default_rng(seed).uniform(0, 9, (rows, columns))
    rounded = controlled_rounding(table)
    for axis in (None, 0, 1):
        before, after = (table, rounded) if axis is None else (table.sum(axis), rounded.sum(axis))
        assert np.all(np.abs(after - before) < 1 + 1e-6)


def test_same_seed_same_splits_and_more_splits_keep_the_first() -> None:
    labels = np.repeat(np.arange(10), 70)
    for shares in ((3, 2), (2, 49, 49)):
        few, many = (RepeatedHoldout(n, shares).split(labels, 7) for n in (2, 5))
        other = RepeatedHoldout(2, shares).split(labels, 8)
        for i in range(2):
            assert np.array_equal(few[i].train, many[i].train) and np.array_equal(few[i].val, many[i].val)
            assert not np.array_equal(few[i].train, other[i].train)
        assert not np.array_equal(many[0].train, many[1].train)
    first, second = (StratifiedKFold(5).split(labels, 7) for _ in range(2))
    assert all(np.array_equal(a.val, b.val) for a, b in zip(first, second, strict=True))


def test_task3_sizes() -> None:
    split = RepeatedHoldout(1, (2, 49, 49)).split(np.repeat(np.arange(10), 7000), 0)[0]
    assert [len(part) for part in (split.train, split.val, split.test)] == [1_400, 34_300, 34_300]


@pytest.mark.parametrize("protocol", [StratifiedKFold(5), RepeatedHoldout(2, (2, 49, 49))])
def test_too_few_images_are_one_sentence(protocol) -> None:
    with pytest.raises(DatasetError, match="images|fold"):
        protocol.split(np.array([0, 0, 0, 1, 1, 1, 1, 1]), 0)


def test_protocols_that_cannot_be() -> None:
    for make in (
        lambda: StratifiedKFold(1),
        lambda: RepeatedHoldout(0, (3, 2)),
        lambda: RepeatedHoldout(1, (1,)),
        lambda: RepeatedHoldout(1, (1, 0)),
    ):
        with pytest.raises(ValueError, match="takes at least"):
            make()
