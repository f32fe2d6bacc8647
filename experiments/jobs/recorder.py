"""Recording jobs in the result database: claims, results through the journal, and the parent's summary."""

import functools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import analysis
import tracking
from experiments.jobs import results
from experiments.jobs.job import Curve, Job, JobContext, Result
from experiments.training.evaluation import Evaluation
from tracking import Claim, Parent, Run, Store, journal, keys
from tracking.artifacts import file_digests
from tracking.checkpoints import Checkpoint
from tracking.predictions import Predictions
from tracking.process import host

History = list[dict[str, Any]]


@dataclass(frozen=True)
class Trained:
    """The result of a training: its best weights, its epochs, and evaluations (`test` is None without a test part)."""

    checkpoint: Checkpoint
    history: History
    evaluations: Mapping[str, Evaluation | None]  # of `val` and `test`
    predictions: Predictions
    scores: str  # for the screen


@dataclass(frozen=True)
class TrialOver:
    """The outcome of a trial that is finished or stopped early."""

    history: History
    stopped: str  # see `tracking.keys.TAGS`
    text: str  # for the screen

    @property
    def curve(self) -> Curve:
        """Its losses."""
        return results.curve_of(self.history, self.stopped)


class Recorder:
    """Writes the results of jobs, possibly in another thread than the training's, but in one at a time."""

    def __init__(self, context: JobContext, store: Store) -> None:
        self.context = context
        self.store = store
        self._away = False  # the store, when it was last asked
        # entries of the journal that are still to be sent, with their runs where they are open
        self._kept: list[tuple[Path, Run | None]] = []
        # on another machine the folder may be gone when the command ends: it waits for a store as long as that does
        self._patience = tracking.SHORT if host() == context.host else None
        self._evidence: tuple[str, analysis.Evidence | None] = ("", None)  # model, and the evidence of its last summary

    def parent_of(self, job: Job) -> Parent:
        """The parent run of a job."""
        parent = Parent(self.store, job.parent_id, job.experiment)
        parent.patience = tracking.SHORT
        return parent

    def claim(self, job: Job) -> Claim:
        """Claim the job's split, unless it is finished or in other hands."""
        split = self.parent_of(job), job.title, job.params, job.tags
        patience = 0 if self._away else tracking.SHORT
        claimed = tracking.claim(*split, patience=patience, without_store=True, until=job.until)
        if claimed.elsewhere and job.attempt:
            claimed = tracking.wait_and_claim(*split, claimed, job.until)
        self._away = not claimed.run_id
        return claimed

    def curve_of(self, run_id: str) -> Curve:
        """The losses of a finished trial, from the store."""

        def read() -> Curve:
            stopped = self.store.client.get_run(run_id).data.tags.get(keys.STOPPED, "")
            path = analysis.local_artifact(run_id, keys.HISTORY, self.store.uri)
            return results.curve_of(json.loads(path.read_text(encoding="utf-8")), stopped)

        return tracking.persist(read)

    def entry_of_lost_worker(self, job: Job) -> Path | None:
        """The job's entry in the journal, if a worker was lost before it had sent it."""
        entry = journal.entry_path(self.store, job.fingerprint)
        return entry if journal.take(self.store, entry) else None

    def record(self, job: Job, claimed: Claim, child: Run, trained: Trained) -> Result:
        """Put the results of a split into the journal, and send them to the store if it is there."""
        entry = self._write(job, claimed, trained)
        child.in_journal = True
        return self._send(job, trained.scores, entry, child)

    def record_trial(self, job: Job, claimed: Claim, child: Run, over: "TrialOver") -> Result:
        """Write the outcome of a trial to the journal."""
        metrics = results.final_metrics(over.history, None, {}, _images_per_epoch(job), {})
        write_files = functools.partial(results.write_history, history=over.history)
        entry = self._enter(claimed, over.history, metrics, write_files, {keys.STOPPED: over.stopped})
        child.in_journal = True
        return replace(self._send(job, over.text, entry, child), curve=over.curve)

    def record_entry(self, job: Job, claimed: Claim, entry: Path) -> Result:
        """Send the journal entry of a lost worker."""
        with tracking.child_run(self.store, claimed) as child:
            child.in_journal = True
            found = journal.read_results(entry)  # it is gone once it is sent
            curve = () if job.trial is None else results.curve_of(found.history, found.tags[keys.STOPPED])
            return replace(self._send(job, "trained by an earlier attempt", entry, None), curve=curve)

    def record_failure(self, job: Job, result: Result) -> Result:
        """Bring the parent's summary up to date after a failure."""
        if job.trial is None:
            self._summarise(job)
        return result

    def _write(self, job: Job, claimed: Claim, trained: Trained) -> Path:
        leaks = results.count_leaks(self.context.groups, job.split)
        cross_val = results.cross_val_scores(trained.predictions)
        metrics = results.final_metrics(
            trained.history, trained.evaluations["test"], cross_val, _images_per_epoch(job), leaks
        )

        def write_files(folder: Path) -> None:
            results.write_files(
                folder,
                self.context.data,
                job.split,
                trained.checkpoint,
                trained.history,
                trained.evaluations,
                trained.predictions,
            )

        return self._enter(claimed, trained.history, metrics, write_files, {})

    def _enter(
        self,
        claimed: Claim,
        history: History,
        metrics: Mapping[str, float],
        write_files: Callable[[Path], None],
        tags: Mapping[str, str],
    ) -> Path:
        """Make an entry of the journal, whose files `write_files` writes to a folder."""
        with self.store.scratch() as scratch:
            folder = Path(scratch) / "entry"
            write_files(folder / journal.FILES)
            digests = json.dumps(file_digests(folder / journal.FILES))
            dataset = results.dataset_entry(self.context.data)
            content = journal.Results(dataset, history, metrics, {"file_digests": digests, **tags})
            return journal.write(self.store, claimed, content, folder)

    def _send(self, job: Job, scores: str, entry: Path, run: Run | None) -> Result:
        """Send the entries of the journal, in order, as far as the store is there; `entry` is this job's."""
        self._kept.append((entry, run))
        while self._kept:
            oldest, of_run = self._kept[0]
            patience = 0 if self._away and self._patience else self._patience
            try:
                self._away = not journal.try_to_send(self.store, oldest, patience, of_run)
            except Exception:
                self._kept.pop(0)  # it stays in the journal, and is sent, or named, at the end of the command
                if oldest == entry:
                    raise
                continue
            if self._away:
                return Result("kept", scores)
            self._kept.pop(0)
        if job.trial is None:
            self._summarise(job)
        return Result("trained", scores)

    def _summarise(self, job: Job) -> None:
        """Bring the parent's summary up to date; if that fails now, it is done when the model's splits are done."""
        model, evidence = self._evidence
        if model != job.card.name:
            evidence = None

        def summarise() -> None:
            nonlocal evidence
            evidence = log_summary(self.store, self.context.task, self.parent_of(job), job.card.name, evidence)

        tracking.attempt(summarise)
        self._evidence = job.card.name, evidence


def _images_per_epoch(job: Job) -> int:
    """Return the number of training and validation images."""
    return len(job.split.train) + len(job.split.val)


def log_summary(
    store: Store, task: str, parent: Parent, name: str, evidence: analysis.Evidence | None = None
) -> analysis.Evidence:
    """Write the comparison table's values of a model's splits so far to its parent, unless they are there.

    Pass the returned evidence on the next time: files that it has read are not read again.
    """

    def gather() -> tuple[analysis.Evidence, dict[str, float]]:
        gathered = analysis.Evidence(analysis.load_runs([task], store.uri, parent.id), store.uri, evidence)
        return gathered, analysis.summarise(gathered, name)

    gathered, values = tracking.persist(gather, parent.patience)
    summary = {key: value for key, value in values.items() if math.isfinite(value)}
    if not summary.items() <= parent.metrics.items():
        parent.log_metrics(summary)
        parent.metrics |= summary
    return gathered
