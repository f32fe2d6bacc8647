"""Checkpoints: weights with everything that rebuilds and explains the model they belong to."""

import io
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True)
class Checkpoint:
    """The best epoch of a split.

    Attributes
    ----------
    model : str
        Name in `models.MODELS`.
    arguments : dict
        Of `models.build`, but for the name.
    epoch : int
        From 1.
    score : float
        Validation loss of that epoch, by which it was chosen.
    mean, std : Tensor of float32, shape (channels,)
        Of the training images' pixels (0 to 255), which the model's input is normalised with.
    state_dict : dict of str to Tensor
        On the CPU.
    """

    model: str
    arguments: dict[str, int]
    epoch: int
    score: float
    mean: Tensor
    std: Tensor
    state_dict: dict[str, Tensor]

    def save(self, path: Path) -> None:
        """Write the file. An `OSError` says why where that fails (torch itself would say something else)."""
        buffer = io.BytesIO()
        torch.save({field.name: getattr(self, field.name) for field in fields(self)}, buffer)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(buffer.getbuffer())

    @classmethod
    def load(cls, path: Path) -> "Checkpoint":
        """Read a file back, onto the CPU; nothing in it is executed."""
        return cls(**torch.load(path, map_location="cpu", weights_only=True))
