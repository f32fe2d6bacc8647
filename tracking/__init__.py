"""The result database: its keys, opening it, writing runs, and checkpoints.

`keys` names and explains everything that is stored. mlflow and torch are imported only when they are needed.
"""

from tracking.claims import (
    Claim,
    begin_again,
    child_run,
    claim,
    is_finished,
    load_progress,
    save_progress,
    wait_and_claim,
)  # fmt: skip
from tracking.errors import StoreError, UnknownTaskError, in_one_line, is_mlflow_error
from tracking.outages import SHORT, attempt, impatient, passes, persist
from tracking.runs import Parent, Run, close_dead_runs, parent_run
from tracking.scores import SCORES, Score, score_of
from tracking.settings import SettingError, TrainingConfig
from tracking.store import Store, check_uri, open_store

__all__ = [
    "SCORES", "SHORT", "Claim", "Parent", "Run", "Score", "SettingError", "Store", "StoreError", "TrainingConfig",
    "UnknownTaskError", "attempt", "begin_again", "check_uri", "child_run", "claim", "close_dead_runs", "impatient",
    "in_one_line", "is_finished", "is_mlflow_error", "load_progress", "open_store", "parent_run", "passes", "persist",
    "save_progress", "score_of", "wait_and_claim",
]  # fmt: skip
