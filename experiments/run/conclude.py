"""Concluding a run: the comparison table, the figures, and the champion. Finished steps are skipped."""

from mlflow.exceptions import MlflowException

import analysis
import tracking
from experiments import champion
from experiments.jobs import results
from experiments.provenance import fingerprint
from experiments.run.announce import announce_champion, announce_no_champion
from experiments.run.execute import Outcome
from experiments.run.plan import Plan
from tracking import Run, Store


def conclude(plan: Plan, store: Store, outcome: Outcome) -> None:
    """Print the table of the comparison group that the runs belong to, log its figures, register the best model."""
    task = plan.request.task
    runs = tracking.persist(lambda: analysis.load_runs([task.name], store.uri))
    groups = [group for group in analysis.comparison_groups(runs) if group["parent_id"].isin(outcome.parents).any()]
    if not groups or analysis.finished(groups[0]).empty:
        return  # every split failed, and is named with its reason
    evidence = analysis.Evidence(groups[0], store.uri)
    analysis.print_scores(store, runs, evidence)
    shown = fingerprint.digest(sorted(analysis.finished(groups[0])["run_id"]))
    owners = [Run(store, run_id) for run_id in outcome.parents]
    if any(owner.tag("figures_of") != shown for owner in owners):
        tracking.persist(lambda: results.log_figures(store, evidence))
        for owner in owners:
            owner.set_tag("figures_of", shown)
    try:
        text = champion.crown(store, task, plan.data, runs, evidence)
    except (tracking.StoreError, MlflowException, OSError) as error:  # a server may let us write runs only
        announce_no_champion(task.name, tracking.in_one_line(error))
    else:
        announce_champion(store, task.name, text)
