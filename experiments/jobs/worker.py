"""Doing jobs in one process: a job is trained, and its results are recorded."""

import contextlib
import dataclasses
import functools
import os
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import models
import tracking
from experiments.jobs import progress, results
from experiments.jobs.job import Job, JobContext, Result, Tuned, model_arguments
from experiments.jobs.recorder import History, Recorder, Trained, TrialOver
from experiments.provenance import fingerprint, sources
from experiments.training import hardware
from experiments.training.baselines import fit_baseline
from experiments.training.cross_fitting import SCORES_HALF, WHOLE, Snapshot
from experiments.training.evaluation import evaluate_test
from experiments.training.fit import TrainingDivergedError, fit
from experiments.training.images import DeviceImages
from experiments.training.normalisation import NormalisedImages
from experiments.training.state import TrainingState, initialise, seed_of_split
from models.layers import LayerStack
from tracking import Claim, Run, Store
from tracking.checkpoints import Checkpoint

SAVE_EVERY = 1.0  # seconds, at least, from one save of a training to the next
SAVE_SHARE = 0.02  # of the training's time, which saves may take at most, but for the first and the last


class ChangedSourceError(Exception):
    """The source of a worker is not that of its command."""

    def __init__(self, files: set[str]) -> None:
        verb = "was" if len(files) == 1 else "were"
        super().__init__(f"{', '.join(sorted(files))} {verb} edited after the command began; run it again")


_workers: dict[str, "Worker"] = {}  # the one of this process, by its command


def do_job(context: JobContext, job: Job) -> Result:
    """Do a job in a process of its own; whatever goes wrong becomes the result."""
    try:
        worker = _workers.get(context.command)
        if worker is None:
            progress.console.quiet = True  # the command itself prints
            os.environ.update(context.environment)
            torch.set_num_threads(context.threads)
            hardware.prepare()
            # without a look at whether it is there: the command has looked, and training goes on while it is away
            store = tracking.open_store(context.uri, command=context.command, state=context.state, look=False)
            _workers.clear()  # Ray gives a process to several commands
            worker = _workers[context.command] = Worker(context, store)
        return worker.record(worker.train(job))
    except Exception as error:  # noqa: BLE001 - not every exception can travel to another process
        return Result("failed", f"{job.title}: {tracking.in_one_line(error)}", again=True)


def _source_line(error: BaseException) -> str:
    """Name the innermost line of our source, such as that of a model, in which an error was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    places = [(frame.filename.removeprefix(f"{sources.ROOT}/"), frame.lineno) for frame in frames]
    return next((f"{file}, line {line}" for file, line in reversed(places) if file in sources.TEXTS), "no line of ours")


@dataclass(frozen=True)
class Attempt:
    """A job between its training and the recording of its results."""

    job: Job
    claimed: Claim | None = None
    result: Result | None = None  # of a job that was not trained to its end
    entry: Path | None = None  # in the journal, left by a worker that was lost
    trained: Trained | TrialOver | None = None
    child: Run | None = None  # the open run
    open_run: contextlib.ExitStack = dataclasses.field(default_factory=contextlib.ExitStack)


class Opened(NamedTuple):
    """A job whose run is open."""

    job: Job
    claimed: Claim
    child: Run
    bar: progress.SplitBar
    images: DeviceImages  # normalised as its model expects


class Worker:
    """Does jobs: `train` one at a time, and `record` one at a time, possibly in another thread.

    Raises
    ------
    torch.OutOfMemoryError
        The images do not fit into the device's memory.
    """

    def __init__(self, context: JobContext, store: Store) -> None:
        self.context = context
        self.recorder = Recorder(context, store)
        self.images = DeviceImages.load(context.data, context.device, context.device_memory)
        # all is imported now, and nothing of it later: files that were edited until now may be what was imported
        self._edited = sources.changed_on_disk(sources.TEXTS)
        self._state: tuple[str, TrainingState] | None = None  # recordings on a GPU serve the model's next split

    def train(self, job: Job) -> Attempt:
        """Train a job, unless it is finished or in other hands."""
        device = job.config.device
        # a cluster's node may differ from the machine of the command
        here = {"hardware": hardware.describe_device(device), "versions": fingerprint.versions()}
        job = dataclasses.replace(job, tags={**job.tags, **here})
        claimed = self.recorder.claim(job)
        if not claimed.is_ours:
            left = Result("left", f"{job.title} ({claimed.owner})", again=claimed.elsewhere and not job.attempt)
            curve = () if claimed.owner or job.trial is None else self.recorder.curve_of(claimed.run_id)
            return Attempt(job, result=left if claimed.owner else Result("found", curve=curve))
        if entry := self.recorder.entry_of_lost_worker(job):
            return Attempt(job, claimed, entry=entry)
        try:
            return self._train(job, claimed)
        except (TrainingDivergedError, ChangedSourceError) as error:
            reason = f"{job.title}: {error}"
        except (tracking.StoreError, OSError):
            raise
        except Exception as error:  # a model's own code may raise anything
            if tracking.is_mlflow_error(error):
                raise
            self._state = None  # recordings take room
            if isinstance(error, RuntimeError) and hardware.is_out_of_memory(error):
                reason = f"{job.title} does not fit into {device}'s memory; lower --batch-size or --device-memory"
            else:
                reason = f"{job.title}: {type(error).__name__}: {tracking.in_one_line(error)} ({_source_line(error)})"
        return Attempt(job, result=Result("failed", reason))

    def record(self, attempt: Attempt) -> Result:
        """Write the results of an attempt to the store, and return the result of the job."""
        job, claimed = attempt.job, attempt.claimed
        if attempt.trained and claimed and attempt.child:
            with attempt.open_run:
                if isinstance(attempt.trained, TrialOver):
                    return self.recorder.record_trial(job, claimed, attempt.child, attempt.trained)
                return self.recorder.record(job, claimed, attempt.child, attempt.trained)
        if attempt.entry and claimed:
            return self.recorder.record_entry(job, claimed, attempt.entry)
        result = attempt.result
        assert result is not None
        return self.recorder.record_failure(job, result) if result.outcome == "failed" else result

    def _train(self, job: Job, claimed: Claim) -> Attempt:
        config, name = job.config, job.card.name
        torch.backends.cudnn.benchmark = config.cudnn_benchmark
        freeze = config.freeze and name not in models.BASELINES
        arguments = model_arguments(self.context.data, freeze)
        images = self.images
        if "normalisation" in job.params:
            images = NormalisedImages.of(images, job.params["normalisation"])
        with contextlib.ExitStack() as open_run:
            child = open_run.enter_context(tracking.child_run(self.recorder.store, claimed))
            seed = seed_of_split(config.train_seed, job.number, job.replicate or 0)
            build = functools.partial(self._build, name, arguments)
            model = initialise(build, seed, config.device)
            self._refuse_other_source(job, model)
            with progress.SplitBar(job.title, config.epochs) as bar:
                opened = Opened(job, claimed, child, bar, images)
                if isinstance(model, LayerStack) and name in models.BASELINES:
                    history, chosen = self._fit_baseline(name, model, opened)
                else:
                    state = self._begin(name, model, job, seed)
                    model = state.model
                    if job.trial is not None:
                        return self._try(state, opened, open_run)
                    saved = claimed.saved
                    if saved is None and job.tuned:
                        saved = self._progress_of(job.tuned.chosen, job)
                    history = []
                    chosen = self._fit(state, opened, saved, history)
                    if job.tuned:
                        chosen = self._cross_fitted(chosen, job.tuned, opened, build, seed)
                mean, std = images.normalisation(job.split.train)
                test = evaluate_test(model, images, job.split, mean, std, config.precision)
                best = chosen[WHOLE]
                scores = progress.scores(best.epoch, best.val, test)
                bar.finish(scores)
            weights = {id(each): {key: value.cpu() for key, value in each.weights.items()} for each in chosen}
            of_halves = tuple(
                None if each is best else (each.epoch, weights[id(each)]) for each in (chosen[h] for h in SCORES_HALF)
            )
            checkpoint = Checkpoint(
                name, arguments, best.epoch, best.val.loss, mean.cpu(), std.cpu(), weights[id(best)], of_halves
            )
            evaluations = {"val": best.val.on_host(), "test": test}
            halves = [chosen[h].val if chosen[h] is not best else None for h in SCORES_HALF]
            predictions = results.predictions_of(job.split, self.context.data.labels, job.half, evaluations, halves)
            trained = Trained(checkpoint, history, evaluations, predictions, scores)
            return Attempt(job, claimed, trained=trained, child=child, open_run=open_run.pop_all())

    def _build(self, name: str, arguments: Mapping[str, Any]) -> nn.Module:
        """A model that begins with fresh weights or, if the command says so, with others."""
        model = models.build(name, **arguments)
        if name in self.context.weights:
            self.context.weights[name].load_into(model)
        return model

    def _refuse_other_source(self, job: Job, model: nn.Module) -> None:
        """Refuse to train with source that differs from the command's: the fingerprint would be wrong."""
        source = fingerprint.source_of(model)
        edited = [file for file in self._edited if file in source.files]
        if edited or source.digest != job.tags["source_digest"]:
            changed = {*edited, *sources.changed_since(self.context.sources, source.files)}
            raise ChangedSourceError(changed or {"the source"})

    def _begin(self, name: str, model: nn.Module, job: Job, seed: int) -> TrainingState:
        """A state at its first epoch; on a GPU the recordings of the model's last split go on to be used."""
        if self._state is not None and self._state[0] == name:
            state = self._state[1]
            if state.recordable and state.config == job.config:
                state.restart(model, seed)
                return state
        state = TrainingState(model, job.config, seed)
        self._state = name, state
        return state

    def _fit_baseline(self, name: str, model: LayerStack, opened: Opened) -> tuple[History, list[Snapshot]]:
        """Fit a baseline; return its history of one epoch, and the choices of the validation part and its halves."""
        job = opened.job
        record, chosen = fit_baseline(name, model, opened.images, job.split, job.config.precision, job.half)
        history = [results.epoch_entry(record)]  # logged with its results, since a baseline cannot go on from it
        opened.bar.update(history)
        return history, chosen

    def _try(self, state: TrainingState, opened: Opened, open_run: contextlib.ExitStack) -> Attempt:
        """Train a trial up to its rung."""
        job, claimed, child, bar, _ = opened
        history: History = []
        stopped = ""
        try:
            chosen = self._fit(state, opened, claimed.saved, history)
        except TrainingDivergedError as error:
            stopped = text = str(error)
        else:
            text = progress.scores(chosen[WHOLE].epoch, chosen[WHOLE].val, None)
            if job.ends and not state.is_done:
                stopped = str(state.epoch)
        over = TrialOver(history, stopped, text)
        bar.finish(text)
        if stopped or state.is_done:
            return Attempt(job, claimed, trained=over, child=child, open_run=open_run.pop_all())
        child.pauses = True
        return Attempt(job, result=Result("paused", text, curve=over.curve))

    def _progress_of(self, trial: Job, job: Job) -> dict[str, Any] | None:
        """The last save of a trial of a split, if it was trained on this machine."""
        made = {key: job.tags[key] for key in ("hardware", "versions")}
        return tracking.load_progress(self.recorder.store, {**trial.tags, **made})

    def _cross_fitted(
        self, chosen: list[Snapshot], tuned: Tuned, opened: Opened, build: Callable[[], nn.Module], seed: int
    ) -> list[Snapshot]:
        """Replace the choices of the halves among the epochs of one trial by those among the epochs of all trials."""
        chosen = list(chosen)
        for place, trial in zip(SCORES_HALF, tuned.of_halves, strict=True):
            if trial.trial != tuned.chosen.trial:
                state = TrainingState(initialise(build, seed, trial.config.device), trial.config, seed)
                if saved := self._progress_of(trial, opened.job):
                    state.load_state_dict(saved["state"])
                for _ in fit(state, opened.images, trial.split, trial.half):
                    pass  # on another machine than that of the trial, all of it again
                chosen[place] = state.chosen[place]
        return chosen

    def _fit(
        self, state: TrainingState, opened: Opened, saved: Mapping[str, Any] | None, history: History
    ) -> list[Snapshot]:
        """Train a network to its end, or a trial to its rung; return the choices of the validation part and its halves.

        The state is saved and epochs are logged as they end; short epochs several at once. After a kill the training
        goes on from the last save. Epochs are appended to `history`, which outlives a divergence. Those of a trial,
        from which a tuned split goes on, are logged with its results: only the trial could go on from them.
        """
        job, claimed, child, bar, images = opened
        if saved:
            history += saved["history"]
            state.load_state_dict(saved["state"])
            bar.update(history)
        due = time.monotonic()
        for record in fit(state, images, job.split, job.half, job.until):
            history.append(results.epoch_entry(record))
            if state.is_done or state.epoch == job.until or time.monotonic() >= due:
                due = self._save(claimed, history, state.state_dict(), child)
            bar.update(history)
        return state.chosen

    @staticmethod
    def _save(claimed: Claim, history: History, state: Mapping[str, Any], child: Run) -> float:
        """Save a training and log its epochs; return when the next save is due."""
        # first to the disk: the store may be away, and it must never hold more than a training can go on from
        started = time.monotonic()
        tracking.save_progress(claimed, claimed.run.tags, history, state)
        due = time.monotonic() + max(SAVE_EVERY, (time.monotonic() - started) / SAVE_SHARE)
        child.log_epochs(history)
        return due
