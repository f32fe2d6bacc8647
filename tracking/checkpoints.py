"""Checkpoints: weights with what rebuilds their model; and resume files, from which an interrupted split goes on."""

import hashlib
import io
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

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


def save_resume_file(path: Path, content: dict[str, Any]) -> None:
    """Put what a split needs to go on (tensors, numbers, text, and lists and dicts of them) in place of the last.

    The digest in front makes a file that a power cut left incomplete known as such; against a killed process the
    rename suffices.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)
    partial = path.with_suffix(".partial")
    try:
        with partial.open("wb") as file:
            file.write(hashlib.sha256(buffer.getbuffer()).digest())
            file.write(buffer.getbuffer())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)  # on a full disk it would only be in the way
        raise


def load_resume_file(path: Path) -> dict[str, Any] | None:
    """Read a resume file back, onto the CPU; None where there is none or it is not whole."""
    try:
        digest, payload = (content := path.read_bytes())[:32], memoryview(content)[32:]
    except FileNotFoundError:
        return None
    if hashlib.sha256(payload).digest() != digest:
        return None
    loaded: dict[str, Any] = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    return loaded
