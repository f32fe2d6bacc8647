"""Scores from a confusion matrix equal scikit-learn's from labels."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

from experiments.training import confusion as scores


@settings(max_examples=150, deadline=None)
@given(st.integers(2, 11), st.integers(1, 200), st.integers(0, 2**31))
def test_scores_equal_scikit_learns(classes: int, n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    present = rng.choice(classes, rng.integers(1, classes + 1), replace=False)  # some classes never occur
    true, predicted = rng.choice(present, n), rng.choice(present, n)
    counts = confusion_matrix(true, predicted, labels=range(classes))
    assert scores.accuracy(counts) == pytest.approx(accuracy_score(true, predicted), abs=1e-12)
    assert scores.f1_micro(counts) == pytest.approx(f1_score(true, predicted, average="micro"), abs=1e-12)
    assert scores.f1_macro(counts) == pytest.approx(f1_score(true, predicted, average="macro"), abs=1e-12)
