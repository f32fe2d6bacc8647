"""A model from its checkpoint."""

from pathlib import Path
from typing import NamedTuple

from torch import nn

import models
from tracking.checkpoints import Checkpoint


class Rebuilt(NamedTuple):
    """A checkpoint and its model."""

    checkpoint: Checkpoint
    card: models.ModelCard
    model: nn.Module


def rebuild(path: Path) -> Rebuilt:
    """Read a checkpoint and build its model, on the CPU; a damaged file raises any exception of its readers."""
    checkpoint = Checkpoint.load(path)
    if checkpoint.mean.shape != (checkpoint.arguments["in_channels"],) or checkpoint.std.shape != checkpoint.mean.shape:
        raise ValueError("each channel has a mean and a standard deviation")
    model = models.build(checkpoint.model, **checkpoint.arguments)
    model.load_state_dict(checkpoint.state_dict)
    return Rebuilt(checkpoint, models.describe(checkpoint.model, **checkpoint.arguments), model)
