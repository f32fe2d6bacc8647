"""The file `predictions.npz`: the probabilities that a split's model gave to its validation and test images.

===================  ===============  ======================================================================
array                dtype, shape     meaning
===================  ===============  ======================================================================
`val_index`          int64, (n,)      image of the data set
`val_true`           int64, (n,)      its label
`val_pred`           int64, (n,)      the likeliest class at the best epoch
`val_prob`           float32, (n,)    its probability
`val_probs`          float32, (n, K)  log-probabilities of all classes
`test_...`           likewise         of the test part
`val_half`           uint8, (n,)      half of the validation part, 0 or 1, that an image is in
`cross_val_other`    bool, (2,)       whether half 0 and half 1 are scored at another epoch than the best
`cross_val_probs`    float32, (m, K)  as `val_probs`, of the images in those halves, each at its half's epoch
===================  ===============  ======================================================================

Files of earlier versions have only the first four of `val` and `test`. Log-probabilities rather than probabilities:
rounded to float32, probabilities of 1 - 1e-8 and 1 would be equal, and one of 1e-50 would be 0; the order of images,
the predicted class, and the loss would be lost. So nothing needs to be clipped.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

PARTS = ("val", "cross_val", "test")


@dataclass(frozen=True)
class PartPredictions:
    """The predictions for one part of a split."""

    index: np.ndarray  # int64, shape (n,): images of the data set
    true: np.ndarray  # int64, shape (n,): labels
    predicted: np.ndarray  # int64, shape (n,)
    probability: np.ndarray  # float32, shape (n,): of the predicted class
    # float32, shape (n, K); None in files of earlier versions, or if they are not asked for
    log_probs: np.ndarray | None

    def __len__(self) -> int:
        return len(self.index)

    @property
    def probs(self) -> np.ndarray | None:
        """Probabilities of all classes: float64, shape (n, K), rows sum to 1; None without `log_probs`."""
        if self.log_probs is None:
            return None
        exponentials = np.exp(self.log_probs.astype(np.float64))
        return np.asarray(exponentials / exponentials.sum(1, keepdims=True))

    @property
    def loss(self) -> float:
        """Mean cross-entropy in nats; a `ValueError` if there are no probabilities or images."""
        if self.log_probs is None or not len(self):
            raise ValueError("the loss follows from the probabilities of all classes, of one image at least")
        # fsum is exact, so it depends on no processor
        return -math.fsum(self.log_probs[np.arange(len(self)), self.true].tolist()) / len(self)


@dataclass(frozen=True)
class Predictions:
    """The contents of the file.

    `cross_val` has the images of `val`, in the same order. Each half of them is predicted by the model of the epoch
    that the other half chose, so no image is scored by an epoch that it helped to choose.
    """

    val: PartPredictions  # at the best epoch
    test: PartPredictions  # likewise; empty without a test part
    cross_val: PartPredictions | None = None  # this and the next two are None in files of earlier versions
    half: np.ndarray | None = None  # uint8, shape (n_val,)
    other: np.ndarray | None = None  # bool, shape (2,): whether another epoch than the best scores half 0 and half 1

    def part(self, name: str) -> PartPredictions | None:
        """Predictions of one of `PARTS`; None if the file is of an earlier version, which has no `cross_val`."""
        found: PartPredictions | None = {"val": self.val, "cross_val": self.cross_val, "test": self.test}[name]
        return found

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays of the file."""
        arrays: dict[str, np.ndarray] = {}
        for name, part in (("val", self.val), ("test", self.test)):
            arrays |= {f"{name}_{key}": getattr(part, attribute) for key, (attribute, _) in _TYPES.items()}
            if part.log_probs is not None:
                arrays[f"{name}_probs"] = part.log_probs
        if self.cross_val is not None and self.half is not None and self.other is not None:
            assert self.cross_val.log_probs is not None
            arrays |= {"val_half": self.half, "cross_val_other": self.other}
            arrays["cross_val_probs"] = self.cross_val.log_probs[self.other[self.half]]
        return arrays

    def write(self, path: Path) -> None:
        """Write the file."""
        np.savez_compressed(path, **self.arrays())  # type: ignore[arg-type]

    @classmethod
    def read(cls, path: Path, probabilities: bool = True) -> "Predictions":
        """Read a file of this or an earlier version; without the probabilities of all classes in a tenth of the time.

        A `KeyError`, `TypeError` or `ValueError` says that it lacks an array, or that one has another type or shape; a
        damaged file raises whatever its reader trips over.
        """
        with np.load(path, allow_pickle=False) as arrays:
            return cls.of(arrays, probabilities)

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray], probabilities: bool = True) -> "Predictions":
        """Predictions from the arrays of a file; parameters and errors are those of `read`."""
        val, test = (_part(arrays, name, probabilities) for name in ("val", "test"))
        if "val_probs" not in arrays or "val_half" not in arrays:
            return cls(val, test)
        half, other = arrays["val_half"], arrays["cross_val_other"]
        if half.dtype != np.uint8 or half.shape != val.index.shape or (half > 1).any():
            raise ValueError("each validation image is in half 0 or 1")
        if other.dtype != np.bool_ or other.shape != (2,):
            raise ValueError("each half is scored at the best epoch or at another")
        rows = np.flatnonzero(other[half])
        crossed = of_classes(val.index[rows], val.true[rows], _log_probs(arrays["cross_val_probs"], len(rows)))
        predicted, probability = val.predicted.copy(), val.probability.copy()
        predicted[rows], probability[rows] = crossed.predicted, crossed.probability
        log_probs = None if val.log_probs is None else val.log_probs.copy()
        if log_probs is not None:
            log_probs[rows] = crossed.log_probs
        return cls(val, test, PartPredictions(val.index, val.true, predicted, probability, log_probs), half, other)


def of_classes(index: np.ndarray, true: np.ndarray, log_probs: np.ndarray) -> PartPredictions:
    """Predictions from the log-probabilities, float32 of shape (n, K); of equally likely classes the first counts."""
    predicted = log_probs.argmax(1)
    return PartPredictions(index, true, predicted, np.exp(log_probs[np.arange(len(index)), predicted]), log_probs)


_TYPES: dict[str, tuple[str, type]] = {  # of the arrays of a part: their attribute and dtype
    "index": ("index", np.int64),
    "true": ("true", np.int64),
    "pred": ("predicted", np.int64),
    "prob": ("probability", np.float32),
}


def _part(arrays: Mapping[str, np.ndarray], name: str, probabilities: bool) -> PartPredictions:
    values: dict[str, np.ndarray] = {}
    for key, (attribute, dtype) in _TYPES.items():
        array = arrays[f"{name}_{key}"]
        if array.dtype.kind not in ("f" if dtype is np.float32 else "iu"):
            raise TypeError(f"{name}_{key} is {array.dtype}, not {np.dtype(dtype)}")
        values[attribute] = array.astype(dtype)
        if array.ndim != 1 or len(array) != len(values["index"]):
            raise ValueError("an image has one of each")
    log_probs = arrays.get(f"{name}_probs") if probabilities else None  # a file's arrays are unpacked when asked for
    return PartPredictions(**values, log_probs=log_probs if log_probs is None else _log_probs(log_probs, len(array)))


def _log_probs(array: np.ndarray, n: int) -> np.ndarray:
    if array.dtype != np.float32 or array.ndim != 2 or len(array) != n:
        raise ValueError(f"log-probabilities are float32, a row for each of {n} images")
    return array
