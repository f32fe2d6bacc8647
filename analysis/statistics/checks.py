"""Checks of arguments, and equality up to rounding."""

import math

import numpy as np
from numpy.typing import ArrayLike

MIN_SPLITS = 4  # fewest for an interval or a p: with fewer, families of tests find too much (docs/statistics.md)
ZERO = 1e-12  # values below are 0 but for rounding
ALIKE = 1e-9  # values that differ by less, relative to the largest, differ by rounding


def check_splits(n_splits: int) -> None:
    """Raise a `ValueError` that names the number of splits that an interval or a p takes, if these are fewer."""
    if n_splits < MIN_SPLITS:
        count = "1 split is" if n_splits == 1 else f"{n_splits or 'no'} splits are"
        raise ValueError(f"{count} finished, and an interval or a verdict takes {MIN_SPLITS}")


def moments(differences: ArrayLike) -> tuple[float, float, int]:
    """Mean, sample variance (ddof 1) and number of differences; the variance of nearly equal ones is exactly 0."""
    values = np.asarray(differences, np.float64)
    if values.ndim != 1 or len(values) < 2:
        raise ValueError("a test takes the differences of at least two splits")
    if not np.isfinite(values).all():
        raise ValueError("a difference is not finite: a split has no score")
    mean = round_to_zero(float(np.mean(values)))
    return mean, 0.0 if tied(values) else float(np.var(values, ddof=1)), len(values)


def tied(values: np.ndarray) -> bool:
    """Whether all values are equal but for rounding."""
    return bool(np.ptp(values) <= max(ZERO, ALIKE * np.max(np.abs(values))))


def round_to_zero(mean: float) -> float:
    """Return exactly 0 for a mean that is 0 but for rounding."""
    return 0.0 if abs(mean) < ZERO else mean


def check_sizes(**sizes: float) -> None:
    """Raise a `ValueError` that names a size that is not above 0 and finite."""
    for name, size in sizes.items():
        check_inside(name, size, 0, math.inf)


def check_inside(name: str, value: float, low: float, high: float) -> None:
    """Raise a `ValueError` if a value does not lie between two others."""
    if not low < value < high:
        raise ValueError(f"{name} must lie between {low} and {high}, not be {value}")


def check_variance(variance: float) -> float:
    """Return a variance; raise a `ValueError` if it is below 0 or not finite."""
    if not 0 <= variance < math.inf:
        raise ValueError(f"a variance must be 0 or more, not {variance}")
    return float(variance)


def check_rope(rope: float) -> None:
    """Raise a `ValueError` if the half-width of a region of practical equivalence is below 0 or not finite."""
    if not 0 <= rope < math.inf:
        raise ValueError(f"the region of practical equivalence must be 0 or more, not {rope}")


def check_scale(mean: float, se: float, df: float) -> tuple[float, float]:
    """Return a mean and its standard error; raise a `ValueError` if they or the degrees of freedom are impossible."""
    if not (math.isfinite(mean) and 0 <= se < math.inf):
        raise ValueError(f"a mean must be finite and its standard error 0 or more, not {mean} and {se}")
    check_inside("df", df, 0, math.inf)
    return float(mean), float(se)
