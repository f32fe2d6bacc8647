"""Successive halving within a split: the worse trials stop at rungs (Jamieson and Talwalkar 2016, arXiv:1502.07943).

The rungs are fixed shares of a full training, and a rung keeps a fixed share of all trials. Hyperband's brackets would
give models different budgets (findings/optuna_hyperband_name.sh). A trial that goes on does so from its state, so no
epoch is trained twice.
"""

import math
from collections.abc import Mapping

RATE = 2  # a rung lets one of so many trials pass
SHARES = (4, 2, 1)  # the rungs: after a quarter and a half of the epochs, and at the end


def rungs(epochs: int, halving: bool) -> list[int]:
    """Epochs at which trials are compared, ascending; the last one is `epochs`."""
    return sorted({math.ceil(epochs / share) for share in SHARES}) if halving else [epochs]


def survivors(losses: Mapping[int, float]) -> list[int]:
    """Return the trials that pass a rung: the better ones by validation loss, the lower number if two are equal.

    Parameters
    ----------
    losses : mapping of int to float
        The lowest validation loss of each trial that reached the rung, by number; infinite if it diverged.

    Returns
    -------
    list of int
        Ascending; at least one.
    """
    return sorted(ranked(losses)[: math.ceil(len(losses) / RATE)])


def ranked(losses: Mapping[int, float]) -> list[int]:
    """Return trials from the lowest to the highest loss; the lower number comes first if two are equal."""
    return sorted(losses, key=lambda number: (losses[number], number))


def expected_epochs(count: int, epochs: int, halving: bool) -> int:
    """Epochs of all trials of a split, if none stops early."""
    total, done, left = 0, 0, count
    for rung in rungs(epochs, halving):
        total += left * (rung - done)
        done, left = rung, math.ceil(left / RATE)
    return total
