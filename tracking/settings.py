"""The settings of a training, which are options of the scripts and params of a run.

`TrainingConfig` is the single source. Its fields become params and columns (`tracking.keys`). Fields declared with
`compared` divide runs into comparison groups; a field declared with neither function is an error at import.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

T = TypeVar("T")
Precision = Literal["auto", "fp32", "bf16", "fp16"]
PLAIN = {int: "whole number", float: "number", bool: "boolean", str: "text"}
LARGEST_SEED = 2**32 - 1
DEVICE_MEMORY = 0.5  # share of a device's memory that images may take before they are streamed from the host


class SettingError(ValueError):
    """A setting has an invalid value."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)  # both, so that the error can be pickled
        self.option = f"--{name.replace('_', '-')}"
        self.reason = reason  # a clause that follows the option

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
    tunable: bool = False,
    later: bool = False,
) -> T:
    """Declare a setting that decides results: runs with different values are never in one comparison group.

    Values lie in [low, high] and are greater than `above`; texts are among `choices`. `--tune` may choose the values
    of `tunable` settings. A setting that came `later` is logged only where it is not the default, so that runs from
    before it was there are the same as without it.
    """
    limits = {"low": low, "high": high, "above": above, "choices": tuple(choices)}
    metadata = {"compared": True, "meaning": meaning, "tunable": tunable, "later": later, **limits}
    return dataclasses.field(default=default, metadata=metadata)


def not_compared(default: T, meaning: str) -> T:
    """Declare a setting that may differ within a comparison group."""
    return dataclasses.field(default=default, metadata={"compared": False, "meaning": meaning})


def require_declarations(cls: type[T]) -> type[T]:
    """Raise a `TypeError` if a field of a dataclass is declared with neither `compared` nor `not_compared`."""
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if "compared" not in field.metadata:
            raise TypeError(
                f"{cls.__name__}.{field.name} does not say whether it makes runs comparable; declare it with "
                "compared(...) or not_compared(...)"
            )
        if field.type in PLAIN and type(field.default) is not field.type:  # the type of the column follows from it
            raise TypeError(f"the default of {cls.__name__}.{field.name}, {field.default!r}, is not of its type")
    return cls


def check_range(name: str, value: Any, limits: Any) -> None:
    """Raise a `SettingError` if a value is not finite, out of range, or not among its choices."""
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
    """The settings of a training. Each field is an option, a logged param and a column.

    A value that is out of range raises a `SettingError`.
    """

    lr: float = compared(1e-3, "learning rate of AdamW at the start", above=0, tunable=True)
    weight_decay: float = compared(0.01, "decoupled weight decay of AdamW", low=0, tunable=True)
    batch_size: int = compared(
        128, "largest number of training images per step; batches have equal sizes", low=2, tunable=True
    )
    epochs: int = compared(30, "largest number of epochs, and length of the cosine schedule", low=1)
    patience: int = compared(7, "epochs without a lower validation loss before stopping", low=1)
    augment: bool = compared(False, "whether to flip and shift training images at random", tunable=True)
    precision: Precision = compared(
        "auto",
        "precision of convolutions and matrix products; auto: bf16 if the hardware has it, fp16 on older GPUs",
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    pretrained: str = compared(
        "", "weights that the training began with: those of a library, or of a file, which saw other images", later=True
    )
    freeze: bool = compared(False, "whether only the head, the last layer, was trained", later=True)
    cudnn_benchmark: bool = compared(False, "whether cuDNN chooses its algorithms by timing them, on a GPU", later=True)
    # analysis.groups compares the kind of device, but not its number
    device: str = not_compared("auto", "auto, cpu, cuda, cuda:1, ... or mps; auto takes a GPU if there is one")
    split_seed: int = compared(0, "seed of the splits", low=0, high=LARGEST_SEED)
    train_seed: int = compared(0, "seed of weights, batches and augmentation", low=0, high=LARGEST_SEED)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            kinds = (int, float) if field.type is float else (field.type,)  # a bool is an int, but not here
            if field.type in PLAIN and type(value) not in kinds:
                raise SettingError(field.name, f"{value!r} is not a {PLAIN[field.type]}")
            check_range(field.name, getattr(self, field.name), field.metadata)


MEANINGS: dict[str, str] = {field.name: field.metadata["meaning"] for field in dataclasses.fields(TrainingConfig)}
COMPARED: tuple[str, ...] = tuple(f.name for f in dataclasses.fields(TrainingConfig) if f.metadata["compared"])
TUNABLE: tuple[str, ...] = tuple(f.name for f in dataclasses.fields(TrainingConfig) if f.metadata.get("tunable"))
LATER: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(TrainingConfig) if f.metadata.get("later")}
TYPES: dict[str, type] = {f.name: type(f.default) for f in dataclasses.fields(TrainingConfig)}  # of columns


def logged_settings(config: TrainingConfig) -> dict[str, Any]:
    """The settings that are params of a run: all but those that came later and have their default."""
    return {key: value for key, value in dataclasses.asdict(config).items() if key not in LATER or value != LATER[key]}


def kind_of(value: Any) -> str:
    """Return the part before the colon of a device or of pretrained weights, which groups compare."""
    return str(value).split(":")[0]
