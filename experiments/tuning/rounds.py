"""The rounds of a tuned split: its trials, rung by rung, then the split's own job with the chosen trial."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from experiments.jobs.job import Curve, Job, Result, Tuned
from experiments.tuning import halving
from tracking.settings import TUNABLE, TrainingConfig


def is_over(curve: Curve, config: TrainingConfig) -> bool:
    """Whether a training with these losses has ended: by its epochs, by patience, or because it diverged."""
    losses = [losses[0] for losses in curve]
    if not losses:
        return False
    best = losses.index(min(losses))
    return not math.isfinite(losses[-1]) or len(losses) >= config.epochs or len(losses) - 1 - best >= config.patience


@dataclass
class TunedSplit:
    """A split of a model, between two rounds.

    Parameters
    ----------
    final : Job
        The split's own job, without a chosen configuration.
    trials : sequence of Job
        By number.
    rungs : sequence of int
        Epochs at which trials are compared (`halving.rungs`).
    """

    final: Job
    trials: Sequence[Job]
    rungs: Sequence[int]
    rung: int = 0  # number of the next comparison
    alive: list[int] = field(default_factory=list)  # trials that have stopped at no rung
    curves: dict[int, Curve] = field(default_factory=dict)  # losses of each trial so far
    problem: Result | None = None  # of a trial, which keeps the split from its result
    decided: bool = False

    def begin(self) -> list[Job]:
        """The jobs of the first round."""
        self.alive = list(range(len(self.trials)))
        return [dataclasses.replace(trial, until=self.rungs[0]) for trial in self.trials]

    def note(self, job: Job, result: Result) -> None:
        """Take in the result of a trial's job."""
        assert job.trial is not None
        if result.outcome in ("failed", "left"):
            self.problem = self.problem or result
        else:
            self.curves[job.trial] = result.curve

    def advance(self) -> list[Job]:
        """Compare the trials, once all jobs of a round are done; return those of the next round, none after the last.

        A stopped trial has one more job, which records it. The last round is the split's own job.
        """
        while not self.problem and not self.decided:
            if self.rung == len(self.rungs) - 1:
                self.decided = True
                return [self._conclusion()]
            kept = halving.survivors(self._lowest(self.rungs[self.rung]))
            stopped = [number for number in self.alive if number not in kept]
            self.alive, self.rung = kept, self.rung + 1
            jobs = [self._job(number, self.rung) for number in kept if self._goes_on(number, self.rung)]
            jobs += [self._job(number, self.rung - 1, ends=True) for number in stopped if not self._is_over(number)]
            if jobs:
                return jobs
        return []

    def _lowest(self, epochs: int) -> dict[int, float]:
        """The lowest validation loss of each living trial within some epochs."""
        return {number: lowest(self.curves[number][:epochs]) for number in self.alive}

    def _is_over(self, number: int) -> bool:
        return is_over(self.curves[number], self.trials[number].config)

    def _goes_on(self, number: int, rung: int) -> bool:
        return len(self.curves[number]) < self.rungs[rung] and not self._is_over(number)

    def _job(self, number: int, rung: int, ends: bool = False) -> Job:
        return dataclasses.replace(self.trials[number], until=self.rungs[rung], ends=ends)

    def _conclusion(self) -> Job:
        chosen, *of_halves = choose({number: self.curves[number] for number in self.alive})
        config = self.trials[chosen].config
        values = {key: getattr(config, key) for key in TUNABLE}
        params = {**self.final.params, **values, "chosen_trial": chosen}
        first, second = (self.trials[number] for number in of_halves)
        tuned = Tuned(self.trials[chosen], (first, second))
        return dataclasses.replace(self.final, config=config, params=params, tuned=tuned)


def lowest(curve: Curve, part: int = 0) -> float:
    """The lowest loss on the validation part (0), or on one of its halves (1, 2); infinite after a divergence.

    A training that diverged is the worst, whatever it had reached: its settings cannot train the split.
    """
    if not curve or not math.isfinite(curve[-1][0]):
        return math.inf
    return min(losses[part] for losses in curve)


def choose(curves: Mapping[int, Curve]) -> tuple[int, int, int]:
    """Return the trial with the lowest validation loss, and those that score half 0 and half 1 of the validation part.

    Each half is scored by the trial that has the lowest loss on the other one: neither its configuration nor its epoch
    was chosen by the images that it is scored on.
    """
    whole, first, second = (halving.ranked({n: lowest(c, part) for n, c in curves.items()})[0] for part in range(3))
    return whole, second, first
