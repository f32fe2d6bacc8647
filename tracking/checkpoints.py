"""Checkpoints hold weights and the arguments that rebuild their model; resume files hold an interrupted training."""

import hashlib
import io
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Checkpoint:
    """The best epoch of a split."""

    model: str  # name in `models.MODELS`
    arguments: dict[str, Any]  # of `models.build`, without the name
    epoch: int  # from 1
    score: float  # validation loss of that epoch, which chose it
    mean: Tensor  # float32, shape (channels,): of the training pixels (0 to 255), normalises the model's input
    std: Tensor  # likewise
    state_dict: dict[str, Tensor]  # on the CPU
    # epoch and weights of the models that score half 0 and half 1 of the validation part (see `cross_val` in
    # tracking.predictions); None where it is this one; missing in files of earlier versions
    of_halves: tuple[tuple[int, dict[str, Tensor]] | None, ...] = ()

    def save(self, path: Path) -> None:
        """Write the file; an `OSError` gives the reason if that fails (torch itself would hide it)."""
        buffer = io.BytesIO()
        torch.save({field.name: getattr(self, field.name) for field in fields(self)}, buffer)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(buffer.getbuffer())

    @classmethod
    def load(cls, path: Path) -> "Checkpoint":
        """Read a file onto the CPU without executing anything in it."""
        return cls(**torch.load(path, map_location="cpu", weights_only=True))


def save_resume_file(path: Path, content: dict[str, Any]) -> None:
    """Replace the resume file of a split: tensors, numbers, text, and lists and dicts of them.

    The leading digest exposes a file that a power cut left incomplete; the rename protects against a killed process.
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
        partial.unlink(missing_ok=True)  # it would fill a full disk further
        raise


def load_resume_file(path: Path) -> dict[str, Any] | None:
    """Read a resume file onto the CPU; None if it is missing or incomplete."""
    try:
        digest, payload = (content := path.read_bytes())[:32], memoryview(content)[32:]
    except FileNotFoundError:
        return None
    if hashlib.sha256(payload).digest() != digest:
        return None
    loaded: dict[str, Any] = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    return loaded
