"""Tuning curves, crossings, importance and Optuna's studies: formulas against brute force, and frames of trials."""

import itertools
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.groups import ComparisonError
from analysis.study import importances
from analysis.tuning import TuningCurve, expected_best, orders, tuning_curves
from analysis.tuning_tables import budget_sentences

VALUES = st.floats(0, 1, width=16)


@given(st.lists(st.tuples(st.sampled_from([0.1, 0.2, 0.5, np.inf]), VALUES), min_size=1, max_size=7))
def test_expected_best_is_the_mean_over_all_subsets(trials: list[tuple[float, float]]) -> None:
    losses, scores = zip(*trials, strict=True)
    curve = expected_best(losses, scores)
    for k in range(1, len(trials) + 1):
        subsets = list(itertools.combinations(range(len(trials)), k))
        chosen = [min(subset, key=lambda number: (losses[number], number)) for subset in subsets]
        assert curve[k - 1] == pytest.approx(np.mean([scores[number] for number in chosen]), abs=1e-12)


@pytest.mark.parametrize(("losses", "scores"), [([], []), ([1.0], [1.0, 2.0]), ([np.nan], [1.0]), ([1.0], [np.nan])])
def test_expected_best_refuses_what_it_cannot_rank(losses: list[float], scores: list[float]) -> None:
    with pytest.raises(ValueError, match="must be two|not a number"):
        expected_best(losses, scores)


def curve(model: str, scores: list[float], spent: float) -> TuningCurve:
    frame = pd.DataFrame([scores, [score + 0.02 for score in scores]], columns=range(1, len(scores) + 1))
    return TuningCurve(model, frame, own=scores[0], spent=spent)


def test_where_two_models_change_places_by_number_and_by_compute() -> None:
    cheap, costly = curve("cheap", [0.5, 0.7, 0.75, 0.76], 1.0), curve("costly", [0.6, 0.68, 0.8, 0.85], 2.0)
    (by_number,) = orders([cheap, costly])
    assert (by_number.first, by_number.other, by_number.last) == ("costly", "cheap", "costly")
    assert by_number.changes == [2.0, 3.0] and by_number.ends == (1.0, 4.0)
    assert by_number.leads == pytest.approx((0.1, 0.09)) and by_number.in_splits == (2, 2)
    # both can spend 2 to 4: there the cheap one has tried 2 to 4 configurations, the costly one 1 or 2
    (by_compute,) = orders([cheap, costly], by_compute=True)
    assert (by_compute.first, by_compute.changes, by_compute.ends) == ("cheap", [], (2.0, 4.0))
    first, second = budget_sentences([cheap, costly])
    assert "it changes at k = 2 and k = 3. At k = 1 costly leads by 10.0 points (in 2 of 2 splits)" in first
    assert (
        second
        == "With equal compute, of 2e-12 to 4e-12 T multiply-accumulates, cheap leads costly, by 8.0 points at the end."
    )
    (late,) = orders([curve("cheap", [0.5, 0.62, 0.65, 0.66], 1.0), costly], by_compute=True)
    assert (late.first, late.changes, late.last) == ("cheap", [4.0], "costly")
    assert list(orders([curve("cheap", [0.5, 0.7], 1.0), curve("dear", [0.5, 0.7], 9.0)], by_compute=True)) == []


def test_a_lead_within_its_spread_over_splits_is_no_change_of_places() -> None:
    first, second = curve("first", [0.6, 0.8], 1.0), curve("second", [0.601, 0.75], 1.0)
    (before,) = orders([first, second])
    assert (before.first, before.changes) == ("second", [2.0])
    second.scores[1] += [0.02, -0.02]  # the same mean, but ahead in one of two splits
    (after,) = orders([first, second])
    assert (after.first, after.changes, after.ends) == ("first", [], (2.0, 2.0))
    (sentence,) = budget_sentences([first, second])
    assert sentence.startswith("No two curves cross by leads above their sd") and sentence.endswith("first, second.")


def frame(configurations: int, splits: int, best: float = 0.6) -> pd.DataFrame:
    """Trials of a model whose score depends on the learning rate alone, and on the split."""
    rng = np.random.default_rng(0)
    shares = rng.random((configurations, 2))
    rows = [
        {
            "model": "lenet5", "split": split, "replicate": 0, "trial": number, "lr": 10 ** (-4 + 2 * lr),
            "weight_decay": 10 ** (-3 + 2 * decay), "loss": (lr - best) ** 2, "spent": 3.0,
            "score": 0.8 - 0.5 * (lr - best) ** 2 - 0.1 * split + 0.01 * rng.standard_normal(),
        }
        for split in range(splits)
        for number, (lr, decay) in enumerate(shares)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def test_curves_are_means_over_splits_after_those_over_replicates() -> None:
    trials = frame(4, 2)
    again = trials[trials["split"] == 0].assign(replicate=1, score=0.5)
    (found,) = tuning_curves(pd.concat([trials, again]))
    by_split = [expected_best(each["loss"], each["score"]) for _, each in trials.groupby("split")]
    wanted = [(by_split[0] + 0.5) / 2, by_split[1]]
    assert found.mean == pytest.approx(np.mean(wanted, axis=0))
    assert found.sd == pytest.approx(np.std(wanted, axis=0, ddof=1))
    assert found.own == pytest.approx(((trials["score"][0] + 0.5) / 2 + trials["score"][4]) / 2)


def test_importance_names_the_setting_that_decides_and_says_nothing_from_few_trials() -> None:
    pytest.importorskip("optuna")
    space = "lr=0.0001..0.01 weight_decay=0.001..0.1"
    shares = importances(frame(16, 5), space)
    assert shares["lr"] > 0.8 and sum(shares.values()) == pytest.approx(1)
    with pytest.raises(ComparisonError, match="takes 16 configurations on 5 splits, and here are 8 on 5"):
        importances(frame(8, 5), space)


def test_without_optuna_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ComparisonError, match=r"needs Optuna: .*pip install -r requirements-tuning.txt"):
        importances(frame(16, 5), "lr=0.0001..0.01 weight_decay=0.001..0.1")
    assert (Path(__file__).parent.parent / "requirements-tuning.txt").exists()
