"""The result database: its keys, opening it, writing runs, and checkpoints.

`keys` names and explains everything that is stored. Neither mlflow nor torch is imported before it is needed.
"""

from tracking.keys import EXPERIMENTS
from tracking.runs import Run, child_run, parent_run
from tracking.store import Store, StoreError, check_uri, open_store

__all__ = [
    "EXPERIMENTS",
    "Run",
    "Store",
    "StoreError",
    "check_uri",
    "child_run",
    "open_store",
    "parent_run",
]
