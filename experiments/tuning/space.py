"""The search space of a task, and the configurations drawn from it."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tracking.settings import TUNABLE, SettingError, TrainingConfig

FIELDS = {field.name: field for field in dataclasses.fields(TrainingConfig) if field.name in TUNABLE}


@dataclass(frozen=True)
class Between:
    """Values from `low` to `high`, both included: log-uniform, or uniform where `low` is 0."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not (0 <= self.low < self.high < math.inf):
            raise ValueError(f"{self} is no range: the ends are 0 or more, and the first is the lower one")

    def __str__(self) -> str:
        return f"{self.low:g}..{self.high:g}"

    def at(self, share: float) -> float:
        """The value at a share of the range, from 0 to 1, to three significant digits."""
        if not self.low:
            value = share * self.high
        else:
            value = math.exp(math.log(self.low) + share * math.log(self.high / self.low))
        return min(max(float(f"{value:.3g}"), self.low), self.high)  # rounding may leave the range

    @property
    def ends(self) -> tuple[Any, ...]:
        """The values that must be allowed, so that all are."""
        return self.low, self.high


@dataclass(frozen=True)
class OneOf:
    """One of a few values, all equally often."""

    values: tuple[Any, ...]

    def __post_init__(self) -> None:
        if len(set(self.values)) < 2 or len(set(self.values)) != len(self.values):
            raise ValueError(f"{self} is no choice: name two or more different values")

    def __str__(self) -> str:
        return ",".join(_as_text(value) for value in self.values)

    def at(self, share: float) -> Any:
        """The value at a share of the list, from 0 to 1."""
        return self.values[min(int(share * len(self.values)), len(self.values) - 1)]

    @property
    def ends(self) -> tuple[Any, ...]:
        """The values that must be allowed."""
        return self.values


Space = Mapping[str, Between | OneOf]  # by setting
DEFAULT_SPACE: Space = {"lr": Between(1e-4, 1e-2), "weight_decay": Between(1e-3, 1e-1)}


def parse_space(texts: Iterable[str]) -> dict[str, Between | OneOf]:
    """Read texts such as `lr=1e-4..1e-2` and `batch_size=32,64`, as the option `--space` has them.

    Raises
    ------
    SettingError
        Of `--space`: there is no such setting, or it cannot have such values.
    """
    space: dict[str, Between | OneOf] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not values:
            raise SettingError("space", f"{text!r} is not like lr=1e-4..1e-2 or batch_size=32,64")
        if name not in FIELDS:
            raise SettingError("space", f"{name!r} is not one of {', '.join(FIELDS)}")
        if name in space:
            raise SettingError("space", f"{name} is there twice; leave one of them out")
        try:
            if "..." in values:
                raise ValueError(f"{values!r} is no range; it takes two dots")
            if ".." in values:
                low, high = values.split("..")
                space[name] = Between(float(low), float(high))
            else:
                space[name] = OneOf(tuple(_value(name, each) for each in values.split(",")))
        except ValueError as error:
            reason = str(error) if " is no " in str(error) else f"{values!r} are no values of {name}"
            raise SettingError("space", reason) from None
    check_space(space)
    return space


def check_space(space: Space) -> None:
    """Raise a `SettingError` of `--space` for values that a setting cannot have."""
    for name, values in space.items():
        if name not in FIELDS:
            raise SettingError("space", f"{name!r} is not one of {', '.join(FIELDS)}")
        if isinstance(values, Between) and FIELDS[name].type is not float:
            raise SettingError("space", f"{name} is no number with a fraction; name its values, as in {name}=a,b")
        for value in values.ends:
            try:
                dataclasses.replace(TrainingConfig(), **{name: value})
            except SettingError as error:
                raise SettingError("space", f"{name}: {error.reason}") from None


def space_text(space: Space) -> str:
    """Return a space as one line, such as `lr=0.0001..0.01 weight_decay=0.001..0.1`."""
    return " ".join(f"{name}={space[name]}" for name in FIELDS if name in space)


def with_start(space: Space, usual: TrainingConfig) -> str:
    """Return a space and where it starts, such as `lr=0.0001..0.01 from lr=0.001`: the param `space`."""
    start = " ".join(f"{name}={_as_text(getattr(usual, name))}" for name in FIELDS if name in space)
    return f"{space_text(space)} from {start}"


def tuned_text(usual: Any, values: Between | OneOf) -> str:
    """Return a parent run's param of a tuned setting: its usual value and its range."""
    return f"tuned: {_as_text(usual)}; {values}"


def parse_tuned(name: str, text: str) -> tuple[Any, Between | OneOf]:
    """Parse the text of `tuned_text`."""
    usual, _, values = text.removeprefix("tuned: ").partition("; ")
    return _value(name, usual), parse_space([f"{name}={values}"])[name]


def configurations(space: Space, usual: TrainingConfig, count: int, seed: int) -> list[TrainingConfig]:
    """Draw the configurations of a model: number 0 is the usual one, the others are quasi-random.

    A scrambled Halton sequence (Owen 2017, arXiv:1706.02808) fills the space evenly at any number of points. The
    coordinates belong to the settings by name, and are drawn for all that can be tuned: so the first n of more
    configurations are the same, models with equal ranges get equal values, and a further setting changes no other.

    Parameters
    ----------
    space : Space
    usual : TrainingConfig
        The task's own settings; those that are not tuned keep its values.
    count : int
        From 1.
    seed : int
        Of the scrambling.

    Raises
    ------
    SettingError
        Of `--tune`: the space holds fewer different configurations.
    """
    from scipy.stats import qmc  # late: it takes half a second, which only tuning needs

    # once for all models: a seeded sampler gives each other ones (findings/optuna_seed_per_model.sh)
    most = number_of_configurations(space, usual)
    if count > most:
        reason = f"the space holds only {most} different configurations; lower --tune, or widen --space"
        raise SettingError("tune", reason)
    sequence = qmc.Halton(len(FIELDS), rng=seed)
    drawn = [usual]
    while len(drawn) < count:
        shares = dict(zip(FIELDS, map(float, sequence.random(1)[0]), strict=True))
        values: dict[str, Any] = {name: each.at(shares[name]) for name, each in space.items()}
        one = dataclasses.replace(usual, **values)
        # a grid has each of its points once; in ranges all models keep their places, equal after rounding or not
        if most == math.inf or one not in drawn:
            drawn.append(one)
    return drawn


def number_of_configurations(space: Space, usual: TrainingConfig) -> float:
    """How many different configurations a space holds, the usual one among them; infinitely many if it has ranges."""
    if any(isinstance(values, Between) for values in space.values()):
        return math.inf
    inside = all(getattr(usual, name) in values.ends for name, values in space.items())
    return math.prod(len(values.ends) for values in space.values()) + (not inside)


def _value(name: str, text: str) -> Any:
    kind = FIELDS[name].type
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError
        return text.lower() == "true"
    return kind(text)  # type: ignore[operator]


def _as_text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}"
