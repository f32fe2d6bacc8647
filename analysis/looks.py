"""Planned looks: stopping a repeated protocol as soon as every pair is decided, without more false findings.

Whoever looks after 5, 10 and 20 splits and stops at the first p below 0.05 has three chances of a false finding. So
each look has a level of its own, and the levels add up to `ALPHA`: a look at n splits may spend the share n/last of it
that no earlier one could spend. By the union bound the probability of any false finding over all looks is then at most
`ALPHA` in a family, however the looks depend on each other.
"""

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import pandas as pd

from analysis.comparison import AGAINST_BASELINES, ALPHA, NETWORKS, NONE, OPEN, ROPE, compare, pairs_of_models
from analysis.evidence import Evidence
from analysis.groups import ComparisonError
from analysis.statistics import MIN_SPLITS
from tracking.keys import BASELINES, LOOKS, has_folds, has_open_end


@dataclass(frozen=True)
class Outcome:
    """The result of the looks so far."""

    tests: pd.DataFrame  # see `look_by_look`
    next_look: int | None  # splits that are to be finished for the next look; None if there is nothing to look for

    def sentence(self, looks: Sequence[int]) -> str:
        """Say where the looks stopped, or which is next."""
        plan = f"Of the planned looks ({', '.join(map(str, looks))} splits)"
        open_pairs = 0 if self.tests.empty else int(self.tests["verdict"].isin([OPEN, NONE]).sum())
        if self.next_look:
            so_far = f", with {open_pairs} of {len(self.tests)} pairs undecided" if len(self.tests) else ""
            return f"{plan} the next is at {self.next_look}{so_far}."
        stopped = int(self.tests["looks"].max())
        own = ", ".join(f"{level:.4g}" for level in levels(looks))
        decided = f"{open_pairs} of {len(self.tests)} pairs stay undecided" if open_pairs else "every pair is decided"
        return f"{plan} the last was at {stopped}: {decided}. Each look has a level of its own, {own}."


def parse_looks(text: str) -> tuple[int, ...]:
    """Parse numbers of splits such as 5,10,20; a `ValueError` names the mistake."""
    numbers = [number.strip() for number in text.split(",")]
    if not all(number.isdecimal() for number in numbers):
        raise ValueError(f"looks are increasing numbers of splits, such as 5,10,20, not {text}")
    looks = tuple(map(int, numbers))
    levels(looks)
    return looks


def levels(looks: Sequence[int]) -> list[float]:
    """Return the level of each look, in proportion to the splits since the one before; they add up to `ALPHA`.

    Raises
    ------
    ValueError
        If the numbers of splits do not increase, or the first is too small for a verdict.
    """
    if not looks or any(later <= earlier for earlier, later in itertools.pairwise(looks)):
        raise ValueError(f"looks are increasing numbers of splits, such as 5,10,20, not {','.join(map(str, looks))}")
    if looks[0] < MIN_SPLITS:
        raise ValueError(f"the first look is at {looks[0]} splits, and a verdict takes {MIN_SPLITS}")
    return [ALPHA * (n - before) / looks[-1] for before, n in itertools.pairwise([0, *looks])]


def check_looks(looks: Sequence[int], protocol: str, n_splits: int) -> None:
    """Raise a `ComparisonError` if a protocol, by its name, has no first splits that end at each of these looks."""
    if has_folds(protocol):
        if any(n % n_splits for n in looks):
            examples = ",".join(str(times * n_splits) for times in (1, 2, 4))
            raise ComparisonError(f"looks are after whole repetitions of {n_splits} folds, such as {examples}")
    elif not has_open_end(protocol):
        raise ComparisonError(f"looks are of repeated holdouts or folds, and {protocol!r} has no more splits")


def planned_looks(group: pd.DataFrame, also: Sequence[int] = ()) -> tuple[int, ...]:
    """Return the looks that the runs of a comparison group were planned with; empty if none were.

    Raises
    ------
    ComparisonError
        If there are several plans, those that are `also` meant among them: a plan that changes after a look keeps no
        level.
    """
    plans = sorted({*group[LOOKS].dropna(), ",".join(map(str, also))} - {""})
    if len(plans) > 1:
        raise ComparisonError(
            f"its looks were planned as {' and as '.join(plans)}, and a plan that changes after a look keeps no level; "
            "name the earlier plan again, or other splits by --split-seed"
        )
    return parse_looks(plans[0]) if plans else ()


def look_by_look(evidence: Evidence, metric: str, rope: float, looks: Sequence[int]) -> Outcome:
    """Compare models at each look that their finished splits permit, until every pair is decided.

    Parameters
    ----------
    evidence, metric, rope
        See `analysis.comparison.compare`. The first n splits of the group are those of the look at n.
    looks : sequence of int
        Numbers of splits, planned before the first look.

    Returns
    -------
    Outcome
        `tests` has the columns of `pairwise_tests`, each pair as it was when it was decided, or at the last look; and
        `looks`, the number of splits there, and `level`. Without a look it is empty.

    Raises
    ------
    ValueError
        See `levels`.
    ComparisonError
        If a look is not after whole repetitions of folds, or the protocol has no more splits; or as `compare` does.
    """
    check_looks(looks, str(evidence.group["protocol"].iloc[0]), int(evidence.group["n_splits"].max()))
    decided: dict[frozenset[str], pd.Series] = {}
    for n, level in zip(looks, levels(looks), strict=True):
        if _finished(evidence) < n:
            return Outcome(pd.DataFrame(decided.values()), n)
        first = Evidence(evidence.group[evidence.group["split"] < n], evidence.tracking_uri, evidence)
        tests = compare(first, metric, rope, level).assign(looks=n, level=level)
        for _, row in tests.iterrows():
            pair = frozenset((row["model_a"], row["model_b"]))
            if pair not in decided or not _is_decided(decided[pair]):
                decided[pair] = row
        if all(map(_is_decided, decided.values())):
            break
    return Outcome(pd.DataFrame(decided.values()).reset_index(drop=True), None)


def compare_as_planned(
    evidence: Evidence,
    metric: str,
    rope: float = ROPE,
    looks: Sequence[int] = (),
    families: Collection[str] = (NETWORKS, AGAINST_BASELINES),
) -> tuple[pd.DataFrame, list[str]]:
    """Compare models at `looks`, or at those that their runs were planned with; without any once, at `ALPHA`.

    Only pairs of the `families` are returned, whose results do not depend on other pairs. Errors are those of
    `compare`.

    Returns
    -------
    tests : pandas.DataFrame
        See `look_by_look`. Before the first look all splits that are there are compared, at its level.
    about : list of str
        A sentence on the looks, if there are any.
    """
    pairs = [pair for pair in pairs_of_models(evidence, metric) if pair[0] in families]
    asked, looks = bool(looks), planned_looks(evidence.group, looks)
    if not looks:
        return compare(evidence, metric, rope, pairs=pairs).assign(level=ALPHA), []
    outcome = look_by_look(evidence, metric, rope, looks)
    about = [outcome.sentence(looks)]
    if outcome.tests.empty:
        if asked:
            raise ComparisonError(f"the first look is at {looks[0]} splits, which not all models have finished")
        first = levels(looks)[0]
        return compare(evidence, metric, rope, first, pairs).assign(level=first), about
    return outcome.tests[outcome.tests["family"].isin(families)], about


def _is_decided(row: pd.Series) -> bool:
    return row["verdict"] not in (OPEN, NONE)


def _finished(evidence: Evidence) -> int:
    """Return the splits, counted from the first, that all models have finished, networks with all seeds."""
    counts = []
    seeds = evidence.group.loc[~evidence.group["model"].isin(BASELINES), "replicate"].nunique()
    for model in map(str, evidence.group["model"].unique()):
        trained = evidence.replicates(model).groupby("split").size()
        there = set(trained.index[trained >= (1 if model in BASELINES else seeds)])
        counts.append(next(number for number in itertools.count() if number not in there))
    return min(counts)
