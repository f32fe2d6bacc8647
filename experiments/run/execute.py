"""Executing a plan: opening the parent runs, doing the jobs, and catching up with a store that was away."""

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

import analysis
import datasets
import tracking
from experiments.jobs import progress
from experiments.jobs.engine import Engine, EngineError, run_jobs
from experiments.jobs.job import Job, JobContext, Result
from experiments.jobs.local import Local
from experiments.jobs.schedule import cost
from experiments.jobs.sequential import Sequential
from experiments.jobs.worker import Worker
from experiments.run import descriptions
from experiments.run.announce import left_alone, sent_later
from experiments.run.parents import ModelRuns
from experiments.run.plan import Plan
from experiments.tuning import halving
from experiments.tuning.rounds import TunedSplit
from tracking import Store, journal
from tracking.keys import trials_of


@dataclass
class Outcome:
    """The outcome of a plan's jobs."""

    parents: list[str] = field(default_factory=list)  # ids of the parent runs
    failures: list[str] = field(default_factory=list)  # a sentence for each split that failed


def open_store(plan: Plan) -> Store:
    """Open the plan's store, and tidy up after commands that ended early: end their runs, send their results."""
    store = tracking.open_store(plan.uri, create=True)
    if store.database and plan.cluster is not None and (machines := plan.cluster.machines_elsewhere()):
        raise EngineError(
            f"{', '.join(sorted(machines))} cannot write to the SQLite file {store.database}; name a tracking server "
            "in --tracking-uri (deploy/README.md)"
        )
    tracking.persist(lambda: tracking.close_dead_runs(store, plan.request.task.name))
    sent, refused = journal.send_all(store)
    sent_later(sent, list(refused.values()))
    return store


def execute(plan: Plan, store: Store) -> Outcome:
    """Do the jobs of a plan that are not finished. A `StoreError` says if the store stays away."""
    task, context = plan.request.task, plan.context(store)
    descriptions.describe_experiment(store, task)
    if any(model.trials for model in plan.models):
        name = f"{task.experiment}-trials"
        tracking.persist(lambda: store.make_experiment(trials_of(task.name), name))
    with contextlib.ExitStack() as open_runs:
        of_model: dict[str, ModelRuns] = {}
        jobs: list[Job] = []
        trials: dict[str, Sequence[Job]] = {}  # of a tuned split, by its fingerprint
        for model in plan.models:
            # all of them now, from the source that is running: files may be edited while it runs
            parent = open_runs.enter_context(
                tracking.parent_run(store, task.name, model.name, model.params, model.tags)
            )
            of_model[model.card.name] = ModelRuns(model.card, parent, len(model.jobs), context, store)
            jobs += [replace(job, parent_id=parent.id, experiment=parent.experiment) for job in model.jobs]
            trials |= {job.fingerprint: of_job for job, of_job in zip(model.jobs, model.trials, strict=False)}
        if plan.request.fresh:  # all at once, so that an interrupted command need not be told so again
            for job in [*jobs, *itertools.chain(*trials.values())]:
                tracking.persist(lambda tags=job.tags: tracking.begin_again(store, tags["task"], tags))  # type: ignore[misc]
        counts = _do_jobs(plan, context, store, of_model, jobs, trials)
        _catch_up(context, store, list(of_model.values()))
    left_alone(*counts)
    failures = [failure for runs in of_model.values() for failure in runs.failures]
    return Outcome([runs.parent.id for runs in of_model.values()], failures)


def _do_jobs(
    plan: Plan,
    context: JobContext,
    store: Store,
    of_model: dict[str, ModelRuns],
    jobs: Sequence[Job],
    trials: Mapping[str, Sequence[Job]],
) -> tuple[int, list[str]]:
    """Do the jobs that are not finished; return how many were, and which were left to others."""
    found, elsewhere = 0, list[str]()
    waiting: list[Job] = []
    finished = _known_as_finished(store, context.task)
    for job in jobs:
        runs = of_model[job.card.name]
        if job.fingerprint in finished and tracking.is_finished(runs.parent, job.tags):
            found += 1
            runs.note(job, Result("found"))
        else:
            waiting.append(job)
    if not waiting:
        return found, elsewhere
    for name in dict.fromkeys(job.card.name for job in waiting):
        of_model[name].begin()
    try:
        tuned = {
            job.fingerprint: _open_split(plan, store, job, trials[job.fingerprint])
            for job in waiting
            if job.fingerprint in trials
        }
        round_ = [job for job in waiting if job.fingerprint not in tuned]
        round_ += [job for split in tuned.values() for job in split.begin()]
        with contextlib.ExitStack() as working:
            engine = working.enter_context(_make_engine(plan, context, store, working))
            while round_:
                for job, result in _do_round(plan, engine, round_):
                    if job.trial is not None:
                        tuned[job.of_split].note(job, result)
                        continue
                    found += result.outcome == "found"
                    elsewhere += [result.text] if result.outcome == "left" else []
                    of_model[job.card.name].note(job, result)
                round_ = [job for split in tuned.values() for job in split.advance()]
        for split in tuned.values():
            if split.problem is not None:
                elsewhere += [split.problem.text] if split.problem.outcome == "left" else []
                of_model[split.final.card.name].note(split.final, split.problem)
    except BaseException as error:
        reason = "interrupted" if isinstance(error, KeyboardInterrupt) else tracking.in_one_line(error)
        with contextlib.suppress(Exception):
            tracking.close_dead_runs(store, context.task, reason, mine=True)
        raise
    return found, elsewhere


def _do_round(plan: Plan, engine: Engine, jobs: Sequence[Job]) -> Iterator[tuple[Job, Result]]:
    """Do jobs that wait for no other, show their progress, and yield each with its result as it comes."""
    at_once = plan.concurrency.at_once
    if plan.cluster is None and at_once == 1:
        yield from run_jobs(iter(jobs), engine)
        return
    if at_once > 1:  # the longest first: the last ones then leave no core idle for long
        jobs = sorted(jobs, key=lambda job: cost(job.card), reverse=True)
    with progress.JobBar(jobs, engine.room) as bar:
        for job, result in run_jobs(iter(jobs), engine, bar.begin):
            bar.end(job, result)
            yield job, result


def _open_split(plan: Plan, store: Store, job: Job, trials: Sequence[Job]) -> TunedSplit:
    """Open the run of a tuned split, which its trials belong to."""
    parent = tracking.Parent(store, job.parent_id, job.experiment)
    claimed = tracking.claim(parent, job.title, job.params, job.tags)
    experiment = tracking.persist(lambda: store.make_experiment(trials[0].tags["task"]))
    belonging = [
        replace(trial, parent_id=claimed.run_id, experiment=experiment, of_split=job.fingerprint) for trial in trials
    ]
    return TunedSplit(job, belonging, halving.rungs(job.config.epochs, plan.request.halving))


def _make_engine(plan: Plan, context: JobContext, store: Store, working: contextlib.ExitStack) -> Engine:
    """Return the engine for the jobs; `working` ends after it."""
    concurrency = plan.concurrency
    if plan.cluster is not None:
        plan.cluster.share(context, concurrency.at_once)
        return plan.cluster
    if concurrency.at_once > 1:
        folder = working.enter_context(store.scratch())
        return Local(context, concurrency.at_once, Path(folder))
    torch.set_num_threads(concurrency.threads)
    try:
        return Sequential(Worker(context, store))
    except torch.OutOfMemoryError:
        raise datasets.DatasetError(
            f"{plan.data.name} does not fit into the GPU's memory; lower --device-memory"
        ) from None


def _known_as_finished(store: Store, task: str) -> set[str]:
    """Fingerprints of the splits whose results are in the store."""
    runs = tracking.persist(lambda: analysis.load_runs([task], store.uri))
    return set(runs.loc[runs["status"] == "FINISHED", "fingerprint"])


def _catch_up(context: JobContext, store: Store, of_models: Sequence[ModelRuns]) -> None:
    """Write everything that waited for the store, once it is back."""
    kept = {key: title for runs in of_models for key, title in runs.kept.items()}

    def catch_up() -> None:
        refused = journal.send_all(store)[1]
        tracking.persist(lambda: tracking.close_dead_runs(store, context.task, "its worker was lost", mine=True))
        finished = _known_as_finished(store, context.task) if kept else set()
        for runs in of_models:
            runs.catch_up(finished, refused)

    if not tracking.attempt(catch_up):
        waiting = f"; the results of {', '.join(kept.values())} are kept in {store.state}" if kept else ""
        raise tracking.StoreError(f"{store.label} is away{waiting}; the same command goes on when it is back")
