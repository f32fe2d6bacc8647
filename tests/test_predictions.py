"""The file of predictions: what is written is read again, and scores follow from it, also for earlier versions."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import log_loss, roc_auc_score

from tracking.predictions import PARTS, PartPredictions, Predictions, of_classes


def drawn(seed: int, n: int, classes: int, spread: float = 8.0) -> PartPredictions:
    """Predictions as a model makes them: log-probabilities in float32, some of them of a probability near 0 or 1."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, spread, (n, classes)).astype(np.float32)
    log_probs = logits - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
    log_probs = (log_probs - logits.max(1, keepdims=True)).astype(np.float32)
    return of_classes(rng.permutation(10 * n)[:n], np.arange(n) % classes, log_probs)


def of_a_split(seed: int, n: int, classes: int, other: tuple[bool, bool]) -> Predictions:
    val, test, elsewhere = drawn(seed, n, classes), drawn(seed + 1, n + 1, classes), drawn(seed + 2, n, classes)
    half = np.random.default_rng(seed).integers(0, 2, n).astype(np.uint8)
    moved = np.array(other)[half]
    assert val.log_probs is not None and elsewhere.log_probs is not None
    cross_val = of_classes(val.index, val.true, np.where(moved[:, None], elsewhere.log_probs, val.log_probs))
    return Predictions(val, test, cross_val, half, np.array(other))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 999), st.integers(4, 40), st.integers(2, 4), st.booleans(), st.booleans())
def test_what_is_written_is_read_again(seed: int, n: int, classes: int, first: bool, second: bool) -> None:
    written = of_a_split(seed, n, classes, (first, second))
    read = Predictions.of(written.arrays())
    for name in PARTS:
        before, after = written.part(name), read.part(name)
        assert before is not None and after is not None
        for key, value in vars(before).items():
            assert np.array_equal(getattr(after, key), value) and getattr(after, key).dtype == value.dtype
    moved = np.array([first, second])[written.half].sum()
    assert written.arrays()["cross_val_probs"].shape == (moved, classes)  # only what differs from `val_probs`


def test_scores_follow_from_the_file(tmp_path: Path) -> None:
    of_a_split(3, 400, 3, (True, False)).write(tmp_path / "predictions.npz")
    with np.load(tmp_path / "predictions.npz", allow_pickle=False) as arrays:
        assert np.array_equal(arrays["val_probs"].argmax(1), arrays["val_pred"])
        raw = {key: arrays[key] for key in arrays}
    read = Predictions.read(tmp_path / "predictions.npz")
    for name in ("val", "test"):
        part = read.part(name)
        assert part is not None and part.probs is not None
        assert part.probs.sum(1) == pytest.approx(1, abs=1e-12)
        assert part.loss == pytest.approx(log_loss(part.true, part.probs), abs=1e-6)
        exact = np.exp(raw[f"{name}_probs"].astype(float))
        exact /= exact.sum(1, keepdims=True)
        assert roc_auc_score(part.true, part.probs, multi_class="ovr") == pytest.approx(
            roc_auc_score(part.true, exact, multi_class="ovr"), abs=1e-6
        )
        assert part.probability == pytest.approx(part.probs.max(1), rel=1e-5)


def test_predictions_alone_are_those_of_the_whole_file(tmp_path: Path) -> None:
    of_a_split(3, 400, 3, (True, False)).write(tmp_path / "predictions.npz")
    whole, alone = (Predictions.read(tmp_path / "predictions.npz", probabilities) for probabilities in (True, False))
    for name in PARTS:
        part, same = alone.part(name), whole.part(name)
        assert part is not None and same is not None and part.log_probs is None
        for key in ("index", "true", "predicted", "probability"):
            assert np.array_equal(getattr(part, key), getattr(same, key))


def test_a_probability_too_small_for_float32_keeps_the_loss_finite() -> None:
    part = of_classes(np.arange(2), np.array([1, 0]), np.array([[0, -400], [-1e-9, -21]], np.float32))
    assert (
        part.loss == pytest.approx(200)
        and part.probs is not None
        and part.probs[0, 1] == pytest.approx(np.exp(-400), rel=1e-6)
    )


def test_a_file_of_an_earlier_version_has_no_probabilities(tmp_path: Path) -> None:
    arrays = of_a_split(0, 9, 2, (True, True)).arrays()
    earlier = {
        key: value for key, value in arrays.items() if key.rpartition("_")[2] in ("index", "true", "pred", "prob")
    }
    np.savez_compressed(tmp_path / "predictions.npz", **earlier)
    read = Predictions.read(tmp_path / "predictions.npz")
    assert read.cross_val is None and read.val.probs is None and read.test.log_probs is None
    assert read.arrays().keys() == earlier.keys()
    with pytest.raises(ValueError, match="follows from the probabilities of all classes"):
        _ = read.val.loss


@pytest.mark.parametrize("change", [
    {"val_probs": np.zeros((9, 2))},  # float64
    {"val_probs": np.zeros((8, 2), np.float32)},
    {"val_true": np.zeros(8, np.int64)},
    {"val_pred": np.zeros(9)},
    {"val_half": np.full(9, 2, np.uint8)},
    {"cross_val_other": np.array([True])},
    {"cross_val_probs": np.zeros((3, 2), np.float32)},
])  # fmt: skip
def test_arrays_that_do_not_fit_are_refused(change: dict[str, np.ndarray]) -> None:
    with pytest.raises((TypeError, ValueError)):
        Predictions.of(of_a_split(0, 9, 2, (True, True)).arrays() | change)
