"""The champion of a task: its best network so far, registered in MLflow, exported, and used for predictions."""

from experiments.champion.selection import crown

__all__ = ["crown"]
