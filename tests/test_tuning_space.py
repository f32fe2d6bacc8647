"""The search space, its configurations, and successive halving."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.jobs.job import DIVERGED
from experiments.tuning import halving
from experiments.tuning.rounds import choose, lowest
from experiments.tuning.space import (
    DEFAULT_SPACE,
    Between,
    OneOf,
    configurations,
    parse_space,
    parse_tuned,
    space_text,
    tuned_text,
)
from tracking import TrainingConfig
from tracking.settings import SettingError

USUAL = TrainingConfig(lr=3e-4, batch_size=50, epochs=12)


def test_number_0_is_the_usual_one_and_more_configurations_begin_with_the_same():
    few, many = (configurations(DEFAULT_SPACE, USUAL, count, seed=3) for count in (8, 16))
    assert few[0] == USUAL
    assert many[:8] == few
    assert len(set(many)) == 16
    assert configurations(DEFAULT_SPACE, USUAL, 1, seed=3) == [USUAL]
    assert configurations(DEFAULT_SPACE, USUAL, 8, seed=4)[1:] != few[1:]


def test_a_further_setting_changes_no_other_and_what_is_not_tuned_stays():
    wider = {**DEFAULT_SPACE, "augment": OneOf((True, False))}
    for plain, other in zip(
        configurations(DEFAULT_SPACE, USUAL, 9, 0), configurations(wider, USUAL, 9, 0), strict=True
    ):
        assert dataclasses.replace(other, augment=False) == plain
        assert plain.batch_size == 50


def test_models_with_other_ranges_get_the_same_places_in_them():
    narrow = {"lr": Between(1e-3, 1e-1)}
    for ours, theirs in zip(
        configurations({"lr": Between(1e-4, 1e-2)}, USUAL, 20, 0)[1:],
        configurations(narrow, USUAL, 20, 0)[1:],
        strict=True,
    ):
        assert theirs.lr == pytest.approx(10 * ours.lr, rel=1e-6)


def test_a_grid_is_drawn_without_repetition():
    grid = {"lr": OneOf((1e-4, 3e-4)), "weight_decay": OneOf((0.01, 0.1))}
    four = configurations(grid, USUAL, 4, 0)
    assert len({(each.lr, each.weight_decay) for each in four}) == 4 and configurations(grid, USUAL, 3, 0) == four[:3]
    with pytest.raises(SettingError, match="holds only 4 different configurations"):
        configurations(grid, USUAL, 5, 0)
    with pytest.raises(SettingError, match="holds only 3 different configurations"):  # the usual one, and two others
        configurations({"lr": OneOf((1e-4, 1e-2))}, USUAL, 4, 0)


def test_the_sequence_fills_the_logarithms_evenly():
    rates = np.log10([each.lr for each in configurations(DEFAULT_SPACE, USUAL, 65, 0)[1:]])
    counts, _ = np.histogram(rates, bins=8, range=(-4, -2))
    assert counts.min() >= 7  # of 8 in each eighth; of 64 independent draws some eighth has 4 or fewer in most cases
    assert counts.max() <= 9


@given(st.floats(0, 1), st.floats(1e-6, 1), st.floats(1.01, 1e6))
def test_values_never_leave_their_range(share, low, factor):
    values = Between(low, low * factor)
    assert low <= values.at(share) <= low * factor
    assert 0 <= Between(0, low).at(share) <= low


def test_a_space_is_read_as_it_is_written():
    text = "lr=0.0001..0.01 weight_decay=0..0.1 batch_size=32,64,128 augment=true,false"
    space = parse_space(text.split())
    assert space_text(space) == text
    assert space["weight_decay"].at(0.5) == 0.05
    assert space["batch_size"] == OneOf((32, 64, 128))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("lr", "'lr' is not like"),
        ("rate=1..2", "'rate' is not one of lr, weight_decay, batch_size, augment"),
        ("epochs=1,2", "'epochs' is not one of"),
        ("lr=1e-2..1e-4", "0.01..0.0001 is no range"),
        ("lr=a..b", "'a..b' are no values of lr"),
        ("lr=1..2..3", "'1..2..3' are no values of lr"),
        ("lr=1e-4...1e-2", "'1e-4...1e-2' is no range; it takes two dots"),
        ("lr=0..1", "lr: 0.0 is not above 0"),
        ("lr=nan..1", "nan..1 is no range"),
        ("batch_size=8..64", "batch_size is no number with a fraction; name its values"),
        ("batch_size=1,2", "batch_size: 1 is not"),
        ("batch_size=8,8", "8,8 is no choice"),
        ("augment=yes,no", "'yes,no' are no values of augment"),
    ],
)
def test_a_wrong_space_is_refused_in_words(text, reason):
    with pytest.raises(SettingError, match="^--space: ") as error:
        parse_space([text])
    assert reason in str(error.value)


def test_a_trial_that_diverges_is_the_worst_whatever_it_had_reached():
    steady, late = ((2.0, 2.0, 2.0), (1.9, 1.9, 1.9)), ((1.0, 1.0, 1.0), DIVERGED)
    assert choose({0: late, 1: steady}) == (1, 1, 1)
    assert choose({0: late, 1: late}) == (0, 0, 0)
    assert lowest(late[:1]) == 1.0  # at a rung before, that is not known
    assert halving.survivors({0: lowest(late), 1: lowest(steady)}) == [1]


def test_rungs_are_shares_of_the_epochs():
    assert halving.rungs(30, halving=True) == [8, 15, 30]
    assert halving.rungs(2, halving=True) == [1, 2]
    assert halving.rungs(1, halving=True) == [1]
    assert halving.rungs(30, halving=False) == [30]


@given(st.lists(st.sampled_from([0.1, 0.2, 0.3, math.inf]), min_size=1, max_size=20))
def test_the_better_half_passes_a_rung(losses):
    numbered = dict(enumerate(losses))
    kept = halving.survivors(numbered)
    assert len(kept) == math.ceil(len(losses) / 2)
    assert kept == sorted(kept)
    lost = set(numbered) - set(kept)
    for number in lost:  # none that stopped is better than one that passed; of equals the lower number passes
        assert all((losses[other], other) < (losses[number], number) for other in kept)


@given(st.integers(1, 40), st.integers(1, 60), st.booleans())
def test_the_expected_epochs_are_those_of_the_trials(count, epochs, halve):
    alive, done, total = list(range(count)), 0, 0
    for rung in halving.rungs(epochs, halve):
        total += len(alive) * (rung - done)
        alive, done = halving.survivors(dict.fromkeys(alive, 0.0)), rung
    assert halving.expected_epochs(count, epochs, halve) == total


@given(st.sampled_from(["lr", "weight_decay", "batch_size", "augment"]))
def test_a_parent_says_what_was_tuned_and_from_where(name):
    values = {"batch_size": OneOf((8, 16)), "augment": OneOf((True, False))}.get(name, Between(1e-5, 0.1))
    usual = getattr(USUAL, name)
    assert parse_tuned(name, tuned_text(usual, values)) == (usual, values)
