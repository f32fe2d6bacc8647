"""Images and labels of the tasks, and their division into training, validation and test parts.

`Kaggle`, `FashionMNIST` and `ImageFolder` name a data set; `load` returns its images as `ImageData`. `RepeatedHoldout`
and `StratifiedKFold` turn labels and a seed into `Split`s, and `draw_splits` does so for a whole data set.
"""

from datasets.account import account, notes
from datasets.duplicates import duplicate_groups, leaking
from datasets.images import DatasetError, ImageData
from datasets.sources import FashionMNIST, ImageFolder, Kaggle, Source, find, load
from datasets.splits import (
    Protocol,
    PublishedValidation,
    RepeatedHoldout,
    Split,
    StratifiedKFold,
    draw_splits,
    halve,
    named_protocol,
)

__all__ = [
    "DatasetError", "FashionMNIST", "ImageData", "ImageFolder", "Kaggle", "Protocol", "PublishedValidation",
    "RepeatedHoldout", "Source", "Split", "StratifiedKFold", "account", "draw_splits", "duplicate_groups", "find",
    "halve", "leaking", "load", "named_protocol", "notes",
]  # fmt: skip
