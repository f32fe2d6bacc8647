"""The task scripts, and what runs them.

`Task` and `TrainingConfig` (config) say what is asked; `main` (command_line) is a script's command; protocol is the
loop over models and splits, training the loop over epochs.
"""

from experiments.command_line import main
from experiments.config import Task, TrainingConfig

__all__ = ["Task", "TrainingConfig", "main"]
