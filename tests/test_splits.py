"""Guarantees of the splitters, as properties over many label arrays."""

import re
import time

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from datasets import DatasetError, ImageData, RepeatedHoldout, Split, StratifiedKFold
from datasets.splits import controlled_rounding, draw_splits, halve
from tracking.keys import has_open_end

LABELS = st.lists(st.integers(6, 60), min_size=2, max_size=8).flatmap(
    lambda counts: st.permutations(np.repeat(np.arange(len(counts)), counts).tolist()).map(np.array)
)
SHARES = st.sampled_from([(3, 2), (4, 1), (1, 1), (2, 49, 49), (1, 1, 1), (6, 3, 1), (5, 2, 3)])


def draw_groups(draw: st.DataObject, labels: np.ndarray, mixed: bool) -> np.ndarray:
    """Groups of up to four images, of one class each unless `mixed`, some images alone; ids in no order."""
    rng = np.random.default_rng(draw.draw(st.integers(0, 2**32 - 1)))
    alone = draw.draw(st.floats(0, 1))  # about this share of the images
    order = rng.permutation(len(labels))
    if not mixed:
        order = order[np.argsort(labels[order], kind="stable")]
    starts = rng.random(len(labels)) < max(alone, 0.3)
    starts[1:] |= (np.diff(labels[order]) != 0) & (not mixed)
    members = np.split(order, np.flatnonzero(starts[1:]) + 1)
    pieces = [piece[i : i + 4] for piece in members for i in range(0, len(piece), 4)]
    ids = np.empty(len(labels), dtype=np.int64)
    for name, piece in zip(rng.permutation(len(pieces)), pieces, strict=True):
        ids[piece] = name
    return ids


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


def check_repetitions(splits: list[Split], folds: int, n: int) -> None:
    """Check that the folds of each repetition validate each image once."""
    for first in range(0, len(splits), folds):
        validated = np.concatenate([split.val for split in splits[first : first + folds]])
        assert np.array_equal(np.sort(validated), np.arange(n))


@settings(max_examples=40, deadline=None)
@given(LABELS, st.integers(2, 6), st.integers(0, 2**32 - 1))
def test_folds_cover_once_and_are_stratified(labels: np.ndarray, folds: int, seed: int) -> None:
    splits = StratifiedKFold(folds, 3).split(labels, seed)
    assert same(StratifiedKFold(folds).split(labels, seed), splits[:folds])
    assert same(StratifiedKFold(folds, 2).split(labels, seed), splits[: 2 * folds])
    check_repetitions(splits, folds, len(labels))
    for split in splits:
        assert np.array_equal(np.sort(np.concatenate(split)), np.arange(len(labels)))
        assert all(part.dtype == np.int64 and np.all(np.diff(part) > 0) for part in split)
        assert np.all(np.abs(np.bincount(labels[split.val]) - np.bincount(labels) / folds) < 1)


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


@pytest.mark.parametrize("groups", [None, np.arange(700) // 2])
def test_each_repetition_of_folds_is_shuffled_anew(groups: np.ndarray | None) -> None:
    labels = np.repeat(np.arange(10), 70)
    parts = [split.val.tobytes() for split in StratifiedKFold(5, 4).split(labels, 7, groups)]
    others = [split.val.tobytes() for split in StratifiedKFold(5, 4).split(labels, 8, groups)]
    assert len(set(parts + others)) == 40


def test_task3_sizes() -> None:
    split = RepeatedHoldout(1, (2, 49, 49)).split(np.repeat(np.arange(10), 7000), 0)[0]
    assert [len(part) for part in (split.train, split.val, split.test)] == [1_400, 34_300, 34_300]


@pytest.mark.parametrize("protocol", [StratifiedKFold(5), RepeatedHoldout(2, (2, 49, 49))])
def test_too_few_images_are_one_sentence(protocol) -> None:
    with pytest.raises(DatasetError, match="images|fold"):
        protocol.split(np.array([0, 0, 0, 1, 1, 1, 1, 1]), 0)


def together(split: Split, groups: np.ndarray) -> bool:
    parts = [set(groups[part].tolist()) for part in split]
    return sum(map(len, parts)) == len(set().union(*parts))


def same(first: list[Split], second: list[Split]) -> bool:
    return all(np.array_equal(a, b) for x, y in zip(first, second, strict=True) for a, b in zip(x, y, strict=True))


@settings(max_examples=60, deadline=None)
@given(LABELS, SHARES, st.booleans(), st.integers(0, 2**32 - 1), st.data())
def test_grouped_holdout_keeps_groups_together(labels, shares, mixed: bool, seed: int, draw) -> None:
    groups = draw_groups(draw, labels, mixed)
    try:
        splits = RepeatedHoldout(3, shares).split(labels, seed, groups)
    except DatasetError:
        assert min(np.array(shares) * len(labels) / sum(shares)) < 4 * len(np.unique(labels)) + 1
        return
    sizes, counts = np.unique(groups, return_counts=True)[1], np.bincount(labels)
    for split in splits:
        parts = [split.train, split.val, split.test][: len(shares)]
        assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(len(labels)))
        assert all(part.dtype == np.int64 and np.all(np.diff(part) > 0) for part in parts)
        assert together(split, groups)
        for part, share in zip(parts, np.array(shares) / sum(shares), strict=True):
            excess = np.bincount(labels[part], minlength=len(counts)) - share * counts
            assert mixed or excess.max() < max(sizes.max(), 2)
    assert same(splits[:2], RepeatedHoldout(2, shares).split(labels, seed, groups))


@settings(max_examples=60, deadline=None)
@given(LABELS, SHARES, st.integers(0, 2**32 - 1), st.data())
def test_grouped_holdout_is_exact_where_single_images_fill_up(labels, shares, seed: int, draw) -> None:
    groups = draw_groups(draw, labels, mixed=False)
    sizes = dict(zip(*np.unique(groups, return_counts=True), strict=True))
    own = np.array([sizes[group] for group in groups])  # of each image's group
    for label in np.unique(labels):
        inside = own[labels == label]
        assume(np.sum(inside == 1) >= len(shares) * (inside.max() - 1))
    try:
        splits = RepeatedHoldout(2, shares).split(labels, seed, groups)
    except DatasetError:
        assert min(np.array(shares) * len(labels) / sum(shares)) < len(np.unique(labels)) + 1
        return
    for split in splits:
        check([split.train, split.val, split.test][: len(shares)], labels, np.array(shares) * len(labels) / sum(shares))


@settings(max_examples=40, deadline=None)
@given(LABELS, st.integers(2, 5), st.booleans(), st.integers(0, 2**32 - 1), st.data())
def test_grouped_folds_keep_groups_together(labels, folds: int, mixed: bool, seed: int, draw) -> None:
    groups = draw_groups(draw, labels, mixed)
    try:
        splits = StratifiedKFold(folds, 2).split(labels, seed, groups)
    except DatasetError:
        assert np.bincount(labels).min() < 4 * folds
        return
    check_repetitions(splits, folds, len(labels))
    for split in splits:
        assert np.array_equal(np.sort(np.concatenate(split)), np.arange(len(labels)))
        assert together(split, groups)
        assert len(np.unique(labels[split.val])) == len(np.unique(labels))
    assert same(splits[:folds], StratifiedKFold(folds).split(labels, seed, groups))


def test_groups_of_one_leave_holdouts_with_test_part_as_they_are() -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 70))
    protocol = RepeatedHoldout(3, (2, 49, 49))
    assert same(protocol.split(labels, 5), protocol.split(labels, 5, np.arange(700)[::-1]))


def test_pairs_and_two_label_pairs_are_drawn_like_single_images() -> None:
    labels = np.repeat([0, 1], 100)
    groups = np.arange(200)
    groups[1:60:2] = groups[0:60:2]  # 30 pairs of class 0
    groups[100:110] = groups[60:70]  # 10 pairs with both labels
    splits = RepeatedHoldout(300, (3, 2)).split(labels, 0, groups)
    for first, last in ((0, 60), (60, 70), (70, 100), (110, 200)):
        shares = [np.mean((split.train >= first) & (split.train < last)) for split in splits]
        shares = [share * len(split.train) / (last - first) for share, split in zip(shares, splits, strict=True)]
        assert abs(np.mean(shares) - 0.6) < 0.02
        assert np.std(shares) > 0.01
    assert all(np.bincount(labels[split.train]).tolist() == [60, 60] for split in splits)


def test_grouped_folds_are_even() -> None:
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1], [210, 190]))
    groups = np.arange(400)
    groups[1:90:3] = groups[0:90:3]  # pairs, of two labels as it happens
    for split in StratifiedKFold(5).split(labels, 3, groups):
        assert together(split, groups)
        assert np.all(np.abs(np.bincount(labels[split.val]) - [42, 38]) <= 1)


def test_labels_and_groups_of_task3_are_split_at_once() -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 7_000))
    groups = np.arange(70_000)
    groups[1:600:3] = groups[0:600:3]
    started = time.process_time()
    split = RepeatedHoldout(1, (2, 49, 49)).split(labels, 0, groups)[0]
    assert time.process_time() - started < 2
    assert [len(part) for part in split] == [1_400, 34_300, 34_300]
    assert together(split, groups)


@pytest.mark.parametrize("protocol", [StratifiedKFold(2), RepeatedHoldout(1, (3, 2)), RepeatedHoldout(1, (1, 1, 1))])
def test_groups_that_leave_a_part_empty_are_one_sentence(protocol) -> None:
    with pytest.raises(DatasetError, match="near duplicates|no training image"):
        protocol.split(np.repeat([0, 1], 20), 0, np.zeros(40, dtype=int))


def test_protocols_that_cannot_be() -> None:
    for make in (
        lambda: StratifiedKFold(1),
        lambda: RepeatedHoldout(0, (3, 2)),
        lambda: RepeatedHoldout(1, (1,)),
        lambda: RepeatedHoldout(1, (1, 0)),
    ):
        with pytest.raises(ValueError, match="takes at least"):
            make()


def test_a_large_group_with_all_classes_does_not_come_on_top_of_a_full_fold() -> None:
    labels, groups = np.tile([0, 1], 500), np.arange(1000)
    groups[:160] = 0
    for seed in range(3):
        folds = StratifiedKFold(5).split(labels, seed, groups)
        assert [len(split.val) for split in folds] == [200] * 5
        assert all(np.bincount(labels[split.val]).tolist() == [100, 100] for split in folds)
        together = [np.isin(np.arange(160), split.val).sum() for split in folds]
        assert sorted(together) == [0, 0, 0, 0, 160]


def test_folds_that_exist_are_found() -> None:
    labels, groups = np.array([0, 0, 0, 1, 1, 1]), np.array([0, 0, 1, 2, 2, 3])
    for seed in range(20):
        for split in StratifiedKFold(2).split(labels, seed, groups):
            assert set(labels[split.val]) == set(labels[split.train]) == {0, 1}
            assert not set(groups[split.val]) & set(groups[split.train])


@pytest.mark.parametrize(("n_splits", "dogs", "sentence"), [
    (2, 1, "1 image for 2 folds; add images of it, or leave it out"),
    (3, 1, "1 image for 3 folds; add images of it, or leave it out"),
    (3, 2, "2 images for 3 folds; lower --n-splits to 2"),
])  # fmt: skip
def test_a_class_that_is_too_small_is_named_with_what_can_be_done(n_splits: int, dogs: int, sentence: str) -> None:
    labels = np.array([0] * 4 + [1] * dogs)
    with pytest.raises(DatasetError, match=f"class 'dogs' has {sentence}$"):
        StratifiedKFold(n_splits).split(labels, 0, classes=("cats", "dogs"))


@pytest.mark.parametrize(("shares", "counts"), [
    ((3, 1, 1), (40, 2)), ((3, 2), (20, 1)), ((2, 49, 49), (60, 3)), ((1, 30), (90, 4)), ((3, 1, 1), (2, 2, 2)),
])  # fmt: skip
def test_divisions_that_an_error_names_exist(shares: tuple[int, ...], counts: tuple[int, ...]) -> None:
    labels = np.repeat(np.arange(len(counts)), counts)
    with pytest.raises(DatasetError) as error:
        RepeatedHoldout(5, shares).split(labels, 0)
    named = re.search(r"take --holdout ([\d:]+) or --folds (\d+)", str(error.value))
    assert named is not None or ("leave it out" in str(error.value) and min(counts) == 1)
    if named:
        for protocol in (RepeatedHoldout(5, tuple(map(int, named[1].split(":")))), StratifiedKFold(int(named[2]))):
            for split in protocol.split(labels, 0):
                assert len(set(labels[split.train])) == len(counts) and len(split.val)


def test_no_folds_are_refused_that_exist() -> None:
    rng = np.random.default_rng(0)
    examples = [(np.array([1, 0, 0, 0, 0, 0, 1, 1]), np.array([0, 0, 1, 1, 1, 1, 2, 2]))]
    for _ in range(150):
        n = int(rng.integers(6, 11))
        examples.append((rng.integers(0, 2, n), rng.integers(0, int(rng.integers(3, 6)), n)))
    found = 0
    for labels, groups in examples:
        names = np.unique(groups)
        exist = any(
            len(np.unique(labels[inside])) == len(np.unique(labels[~inside])) == 2
            for choice in range(1, 2 ** len(names) - 1)
            for inside in [np.isin(groups, names[[bool(choice >> bit & 1) for bit in range(len(names))]])]
        )
        if exist:
            found += 1
            for split in StratifiedKFold(2).split(labels, 0, groups):
                assert set(labels[split.val]) == {0, 1} and not set(groups[split.val]) & set(groups[split.train])
    assert found > 50


@settings(max_examples=60, deadline=None)
@given(LABELS, st.integers(0, 2**32 - 1), st.data())
def test_halves_are_stratified_and_depend_on_the_images_alone(
    labels: np.ndarray, seed: int, draw: st.DataObject
) -> None:
    rng = np.random.default_rng(seed)
    images = np.sort(rng.choice(len(labels), len(labels) // 2 + 1, replace=False))
    half = halve(images, labels)
    assert half.dtype == np.uint8 and half.shape == images.shape
    assert np.array_equal(half, halve(images, np.where(np.isin(np.arange(len(labels)), images), labels, 0)))
    counts = [np.bincount(labels[images[half == number]], minlength=labels.max() + 1) for number in (0, 1)]
    assert np.all(np.abs(counts[0] - counts[1]) <= 1) and counts[0].sum() - counts[1].sum() in (0, 1)
    groups = draw_groups(draw, labels, mixed=True)
    together = halve(images, labels, groups)
    for group in np.unique(groups[images]):
        assert len(np.unique(together[groups[images] == group])) == 1
    assert 0 < together.sum() < len(images) or len(np.unique(groups[images])) == 1


def test_images_of_one_group_are_one_half() -> None:
    assert halve(np.arange(3), np.array([0, 1, 0]), np.zeros(3, int)).tolist() == [0, 0, 0]
    assert halve(np.arange(1), np.array([0])).tolist() == [0]


@settings(max_examples=25, deadline=None)
@given(LABELS, SHARES, st.integers(0, 2**32 - 1), st.integers(1, 3), st.booleans(), st.data())
def test_the_first_of_more_holdouts_are_the_same(
    labels: np.ndarray, shares: tuple[int, ...], seed: int, n: int, grouped: bool, draw: st.DataObject
) -> None:
    groups = draw_groups(draw, labels, mixed=False) if grouped else None
    try:
        more = RepeatedHoldout(n + 2, shares).split(labels, seed, groups)
    except DatasetError:
        assume(False)
    first = RepeatedHoldout(n, shares).split(labels, seed, groups)
    assert has_open_end(RepeatedHoldout(n, shares).name)
    for split, same in zip(first, more[:n], strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(split, same, strict=True))


def test_no_class_is_trained_on_without_images_that_leak() -> None:
    labels = np.array([0, 1] * 20 + [0, 1])
    groups = np.arange(42)
    groups[1:40:2] = 41  # all of class 1 in training look like the test image
    data = ImageData("photos", np.zeros((42, 4, 4, 1), np.uint8), labels, ("cat", "dog"), 40)
    with pytest.raises(DatasetError, match=r"split 0 of .* has no training image of class 'dog'; add images, or leave"):
        draw_splits(RepeatedHoldout(2, (1, 1)), data, 0, groups)
