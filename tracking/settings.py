"""The settings of a training: options of the scripts, params of a run, and which of them make runs comparable.

`TrainingConfig` is the single source. Its fields become params and columns (`tracking.keys`), and those declared with
`compared` divide runs into comparison groups. A setting that does not say whether it does is an error at import.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

T = TypeVar("T")
Precision = Literal["auto", "fp32", "bf16", "fp16"]
LARGEST_SEED = 2**32 - 1


class SettingError(ValueError):
    """A setting has a value that it cannot have.

    Attributes
    ----------
    option : str
        The command-line option of the setting, such as `--lr`.
    reason : str
        What is wrong with the value, as one clause.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)  # the arguments, so that it can travel between processes
        self.option = f"--{name.replace('_', '-')}"
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.option}: {self.reason}"


def compared(
    default: T,
    meaning: str,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    above: float = -math.inf,
    choices: Sequence[str] = (),
) -> T:
    """Declare a setting that decides results: runs that differ in it are never in one comparison group.

    `low` and `high` are the ends of the allowed range, `above` is a bound that is not allowed itself, and `choices`
    are the allowed texts.
    """
    limits = {"low": low, "high": high, "above": above, "choices": tuple(choices)}
    return _setting(default, meaning, is_compared=True, limits=limits)


def not_compared(default: T, meaning: str) -> T:
    """Declare a setting in which runs of one comparison group may differ."""
    return _setting(default, meaning, is_compared=False, limits={})


def _setting(default: T, meaning: str, is_compared: bool, limits: dict[str, Any]) -> T:
    metadata = {"compared": is_compared, "meaning": meaning, **limits}
    return dataclasses.field(default=default, metadata=metadata)


def require_declarations(cls: type[T]) -> type[T]:
    """Refuse a settings dataclass with a field that is declared by neither `compared` nor `not_compared`."""
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if "compared" not in field.metadata:
            raise TypeError(
                f"{cls.__name__}.{field.name} does not say whether it makes runs comparable; declare it with "
                "compared(...) or not_compared(...)"
            )
    return cls


def check_range(name: str, value: Any, limits: Any) -> None:
    """Raise a `SettingError` where a value is not finite, out of its range, or none of its choices."""
    if limits.get("choices"):
        if value not in limits["choices"]:
            raise SettingError(name, f"{value!r} is not one of {', '.join(limits['choices'])}")
        return
    if isinstance(value, str | bool):
        return
    if not math.isfinite(value):
        raise SettingError(name, f"{value} is not a finite number")
    low, high = limits.get("low", -math.inf), limits.get("high", math.inf)
    if value <= limits.get("above", -math.inf):
        raise SettingError(name, f"{value} is not above {limits['above']:g}")
    if not low <= value <= high:
        allowed = f"in the range x>={low:g}" if high == math.inf else f"in the range {low:g}<=x<={high:.0f}"
        raise SettingError(name, f"{value} is not {allowed}")


@require_declarations
@dataclass(frozen=True)
class TrainingConfig:
    """Everything about training that decides a result. Each field is an option, a logged param and a column.

    Raises
    ------
    SettingError
        A value is out of its range.
    """

    lr: float = compared(1e-3, "learning rate of AdamW at the start", above=0)
    weight_decay: float = compared(0.01, "decoupled weight decay of AdamW", low=0)
    batch_size: int = compared(128, "training images per step, at most: batches are made equal", low=2)
    epochs: int = compared(30, "most epochs, and the length of the cosine schedule", low=1)
    patience: int = compared(7, "epochs without a lower validation loss before stopping", low=1)
    augment: bool = compared(False, "whether to flip and shift training images at random")
    precision: Precision = compared(
        "auto",
        "precision of convolutions and matrix products; auto: bf16 where the hardware has it, fp16 on older GPUs",
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    # the kind of device is compared as well (see analysis.groups); which of several GPUs is not
    device: str = not_compared("auto", "auto, cpu, cuda, cuda:1, ...; auto takes a GPU if there is one")
    split_seed: int = compared(0, "seed of the splits", low=0, high=LARGEST_SEED)
    train_seed: int = compared(0, "seed of weights, batches and augmentation", low=0, high=LARGEST_SEED)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check_range(field.name, getattr(self, field.name), field.metadata)


MEANINGS: dict[str, str] = {field.name: field.metadata["meaning"] for field in dataclasses.fields(TrainingConfig)}
COMPARED: tuple[str, ...] = tuple(f.name for f in dataclasses.fields(TrainingConfig) if f.metadata["compared"])
TYPES: dict[str, type] = {
    field.name: type(field.default)  # of the column in which the param is read back
    for field in dataclasses.fields(TrainingConfig)
}
