"""A run of a task: `make_plan`, `execute`, `conclude`.

The plan is data: which jobs, on which splits, with which params. Executing it opens the parent runs and does the jobs
(experiments/jobs); with planned looks it is a plan of the splits up to each look. Concluding prints the table, logs the
figures, and registers the best network.
"""

import itertools
from collections.abc import Sequence

from experiments.request import Request
from experiments.run.announce import announce
from experiments.run.conclude import conclude, is_decided
from experiments.run.execute import execute, open_store
from experiments.run.forecast import in_words, longest_seconds
from experiments.run.plan import Plan, make_plan
from experiments.task import TaskError
from tracking.errors import without_password

LONG = 4 * 3600.0  # seconds of a tuned run above which `--yes` is needed

__all__ = ["Plan", "conclude", "execute", "make_plan", "run"]


def run(request: Request) -> Sequence[str]:
    """Do the unfinished jobs of a request, track them, and print the comparison table.

    Returns
    -------
    sequence of str
        One sentence for each model that cannot be used and each split that failed.

    Raises
    ------
    SettingError, DatasetError, StoreError, EngineError
        It cannot be done; the message is one sentence for the user.
    """
    plan = make_plan(request)
    seconds = longest_seconds(plan) if request.dry_run or request.tune else None
    if request.dry_run:
        announce(plan, without_password(plan.uri), seconds)
        return plan.unusable
    store = open_store(plan)
    announce(plan, store.label, seconds)
    if seconds is not None and seconds > LONG and not request.yes:
        raise TaskError(f"this may take {in_words(seconds)}; say --yes, or see --dry-run with fewer models or splits")
    of_looks = [request.of_look(before, n) for before, n in itertools.pairwise([0, *request.looks])]
    for part in of_looks or [request]:
        plan = plan if part is request else make_plan(part)
        outcome = execute(plan, store)
        if not request.looks or outcome.failures or is_decided(plan, store, outcome):
            break
    conclude(plan, store, outcome)
    return [*plan.unusable, *outcome.failures]
