"""The task scripts, the `Task` that each states, and the rooms that run them.

=============  =====================================================================
task           `Task`: question, data, protocol, models, settings
request        `Request`: everything that a user asked for in one command
command_line   the options of a script, and its errors as sentences
run            plan, execute, conclude
tuning         the space of settings, its configurations, and their rounds on a split
jobs           a job is a model on a split; engines do jobs, a recorder stores them
training       images on the device, `fit`, `evaluate`, baselines, hardware
provenance     digests of source, splits and configuration
champion       the best network of a task: chosen, exported, used for predictions
verification   every stored number is derived again
=============  =====================================================================

Each room imports only rooms below it in this order: command_line, run, champion and verification, tuning,
jobs, provenance, training.
"""

from experiments.command_line import main
from experiments.provenance import sources  # noqa: F401 - reads the source before models and training are imported
from experiments.task import Task
from tracking.settings import TrainingConfig

__all__ = ["Task", "TrainingConfig", "main"]
