"""Concluding a run: planned looks, the comparison table, the figures, and the champion. Finished steps are skipped."""

from pathlib import Path

import pandas as pd
from mlflow.exceptions import MlflowException

import analysis
import tracking
from analysis.comparison import ROPE
from analysis.groups import ComparisonError
from analysis.looks import look_by_look, planned_looks
from experiments import champion
from experiments.jobs.progress import console
from experiments.provenance import fingerprint
from experiments.run.announce import announce_champion, announce_no_champion
from experiments.run.execute import Outcome
from experiments.run.plan import Plan
from experiments.task import TaskError
from tracking import Run, Store, keys


def is_decided(plan: Plan, store: Store, outcome: Outcome) -> bool:
    """Look at the pairs of the plan's models, as planned, and say whether that was the last look.

    It is if every pair is decided, or if other commands have not yet finished the splits of this look.
    """
    runs, group = _group_of(plan, store, outcome)
    if group is None:
        return True
    names = [model.card.name for model in plan.models]
    evidence = analysis.Evidence(group[group["model"].isin(names)], store.uri)
    looks, name = plan.request.looks, plan.request.task.name
    try:
        planned_looks(group, looks)  # refuses a change of plan
        found = look_by_look(evidence, analysis.default_metric(runs), ROPE, looks)
    except ComparisonError as error:
        raise TaskError(f"no look at {name}: {error}") from None
    console.print(found.sentence(looks), markup=False, soft_wrap=True)
    return found.next_look is None or found.next_look <= plan.request.all_splits


def _group_of(plan: Plan, store: Store, outcome: Outcome) -> tuple[pd.DataFrame, pd.DataFrame | None]:
    """Return the runs of the task, and the comparison group of the outcome; None if nothing in it is finished."""
    runs = tracking.persist(lambda: analysis.load_runs([plan.request.task.name], store.uri))
    groups = [group for group in analysis.comparison_groups(runs) if group["parent_id"].isin(outcome.parents).any()]
    return runs, None if not groups or analysis.finished(groups[0]).empty else groups[0]


def conclude(plan: Plan, store: Store, outcome: Outcome) -> None:
    """Print the table of the comparison group that the runs belong to, log its figures, register the best model."""
    task = plan.request.task
    runs, group = _group_of(plan, store, outcome)
    if group is None:
        return  # every split failed, and is named with its reason
    evidence = analysis.Evidence(group, store.uri)
    analysis.print_scores(store, runs, evidence)
    shown = fingerprint.digest(sorted(analysis.finished(group)["run_id"]))
    owners = [Run(store, run_id) for run_id in outcome.parents]
    if any(owner.tag("figures_of") != shown for owner in owners):
        tracking.persist(lambda: log_figures(store, evidence))
        for owner in owners:
            owner.set_tag("figures_of", shown)
    try:
        text = champion.crown(store, task, plan.data, runs, evidence)
    except (tracking.StoreError, MlflowException, OSError) as error:  # a server may let us write runs only
        announce_no_champion(task.name, tracking.in_one_line(error))
    else:
        announce_champion(store, task.name, text)


def log_figures(store: Store, evidence: analysis.Evidence) -> None:
    """Log a group's figures: comparisons to all parent runs, the others to the model's own."""
    from analysis import figures  # late: matplotlib takes half a second, and the first epoch comes first

    parents = evidence.runs.groupby("model")["parent_id"].last()
    with store.scratch() as shared, store.scratch() as own:  # files for all are written once
        for figure_name, model, figure in figures.draw_figures(evidence, analysis.default_metric(evidence.runs)):
            figures.save(figure, Path(own) / figures.file_name(model) if model else Path(shared), figure_name)
        for owner, run_id in parents.items():
            for folder in filter(Path.is_dir, (Path(shared), Path(own) / figures.file_name(str(owner)))):
                Run(store, str(run_id)).log_files(folder, keys.FIGURES)
