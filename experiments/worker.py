"""Doing jobs in one process: claiming a split, training, and writing what it leaves."""

import contextlib
import dataclasses
import functools
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import analysis
import models
import tracking
from datasets import ImageData, Split
from experiments import display, fingerprint, hardware, records
from experiments.baselines import fit_baseline
from experiments.config import Task, TrainingConfig
from experiments.jobs import Job, Result
from experiments.training import (
    DeviceImages,
    Evaluation,
    TrainingDivergedError,
    TrainingState,
    evaluate,
    fit,
    initialise,
    split_seed,
)
from models.layers import LayerStack
from tracking import Claim, Parent, Run, Store, journal
from tracking.artifacts import file_digests
from tracking.checkpoints import Checkpoint
from tracking.store import host

SAVE_EVERY = 1.0  # seconds, at least, from one save of a training to the next
SAVE_SHARE = 0.02  # of the time that training takes, which saves may take at most, but for the first and the last


@dataclasses.dataclass(frozen=True)
class Protocol:
    """What the jobs of one command share, wherever they are done.

    Attributes
    ----------
    task : Task
    config : TrainingConfig
        Resolved (`hardware.resolve`).
    threads : int
        CPU threads of a job.
    device_memory : float
        Share of the device's memory that the images may take; more are streamed from the host's.
    data : ImageData
    groups : numpy.ndarray of int64, shape (N,)
        Of near duplicates (`datasets.duplicate_groups`).
    uri, command, state
        Of the store (`tracking.open_store`).
    host : str
        The machine of the command.
    environment : dict of str to str
        What the store's client needs to know.
    """

    task: Task
    config: TrainingConfig
    threads: int
    device_memory: float
    data: ImageData
    groups: np.ndarray
    uri: str
    command: str
    state: Path
    host: str
    environment: Mapping[str, str]


def model_arguments(data: ImageData) -> dict[str, int]:
    """What `models.build` needs besides the name, for a data set."""
    _, _, size, channels = data.images.shape
    return {"in_channels": channels, "num_classes": len(data.classes), "image_size": size}


_workers: dict[str, "Worker"] = {}  # the one of this process, by its command


def do(protocol: Protocol, job: Job) -> Result:
    """Do a job in a process that is there for nothing else; whatever goes wrong is its result."""
    try:
        worker = _workers.get(protocol.command)
        if worker is None:
            display.console.quiet = True  # the command itself says what is to be said
            os.environ.update(protocol.environment)
            torch.set_num_threads(protocol.threads)
            hardware.prepare()
            # without a look at whether it is there: the command has looked, and training goes on while it is away
            store = tracking.open_store(protocol.uri, command=protocol.command, state=protocol.state, look=False)
            _workers.clear()  # Ray gives a process to several commands
            worker = _workers[protocol.command] = Worker(protocol, store)
        return worker.train(job)()
    except Exception as error:  # noqa: BLE001 - not every exception can travel to another process
        return Result("failed", f"{job.title}: {tracking.in_one_line(error)}", again=True)


class Worker:
    """Does jobs, one at a time.

    Parameters
    ----------
    protocol : Protocol
    store : Store

    Raises
    ------
    torch.OutOfMemoryError
        The images do not fit into the device's memory.
    """

    def __init__(self, protocol: Protocol, store: Store) -> None:
        self.protocol = protocol
        self.store = store
        self.images = DeviceImages.load(protocol.data, protocol.config.device, protocol.device_memory)
        self._away = False  # the store, when it was last asked
        # entries of the journal that are still to be sent, with their runs where they are open
        self._kept: list[tuple[Path, Run | None]] = []
        # on another machine the folder may be gone when the command ends: it waits for a store as long as that does
        self._patience = tracking.SHORT if host() == protocol.host else None
        self._model = ""  # of the last job; what follows is of it
        self._state: TrainingState | None = None  # what it recorded on a GPU serves the next split
        self._evidence: analysis.Evidence | None = None  # that the summary so far was made of

    def train(self, job: Job) -> Callable[[], Result]:
        """Train a job, unless it is finished or in other hands.

        Returns
        -------
        callable
            Writes its results, and says what became of it. It may be called in another thread.
        """
        if job.card.name != self._model:
            self._model, self._state, self._evidence = job.card.name, None, None
        parent = Parent(self.store, job.parent_id, job.experiment)
        parent.patience = tracking.SHORT
        device = self.protocol.config.device
        # what a cluster's node is may differ from where the command was given
        here = {"hardware": hardware.describe_device(device), "versions": fingerprint.versions()}
        job = dataclasses.replace(job, tags={**job.tags, **here})
        claimed = self._claim(parent, job)
        if not claimed.is_ours:
            left = Result("left", f"{job.title} ({claimed.owner})", again=claimed.elsewhere and not job.attempt)
            found = left if claimed.owner else Result("found")
            return lambda: found
        if journal.take(self.store, entry := journal.entry_path(self.store, job.tags["fingerprint"])):
            # of a worker that was lost before it had sent it
            return lambda: self._send_again(parent, job, claimed, entry)
        try:
            return self._train(parent, job, claimed)
        except TrainingDivergedError as error:
            failed = Result("failed", f"{job.title}: {error}")
        except RuntimeError as error:
            if not hardware.is_out_of_memory(error):
                raise
            failed = Result(
                "failed", f"{job.title} does not fit into {device}'s memory; lower --batch-size or --device-memory"
            )
            self._state = None  # recordings take room
        return lambda: self._failed(parent, job, failed)

    def _claim(self, parent: Parent, job: Job) -> Claim:
        patience = 0 if self._away else tracking.SHORT
        what = (job.title, job.params, job.tags)
        claimed = tracking.claim(parent, *what, patience=patience, without_store=True)
        if claimed.elsewhere and job.attempt:
            claimed = tracking.wait_and_claim(parent, *what, claimed)
        self._away = not claimed.run_id
        return claimed

    def _train(self, parent: Parent, job: Job, claimed: Claim) -> Callable[[], Result]:
        protocol, name = self.protocol, job.card.name
        arguments = model_arguments(protocol.data)
        with contextlib.ExitStack() as open_run:
            child = open_run.enter_context(tracking.child_run(self.store, claimed))
            seed = split_seed(protocol.config.seed, job.number)
            model = initialise(lambda: models.build(name, **arguments), seed, protocol.config.device)
            with display.SplitBar(job.title, protocol.config.epochs) as bar:
                if name in models.BASELINES:
                    history, best = self._fit_baseline(child, name, model, job.split, bar)
                else:
                    if self._state is not None and self._state.recordable:
                        self._state.restart(model, seed)
                    else:
                        self._state = TrainingState(model, protocol.config, seed)
                    model = self._state.model
                    keep = functools.partial(tracking.save_progress, claimed, job.tags)
                    history, best = self._fit(child, self._state, job.split, claimed.saved, keep, bar)
                mean, std = self.images.normalisation(job.split.train)
                test = None
                if len(job.split.test):
                    precision = protocol.config.precision
                    test = evaluate(model, self.images, job.split.test, mean, std, precision).on_host()
                best_epoch = records.best_entry(history)["epoch"]
                scores = display.scores(best_epoch, best, test)
                bar.finish(scores)
            weights = {key: value.cpu() for key, value in model.state_dict().items()}
            checkpoint = Checkpoint(name, arguments, best_epoch, best.loss, mean.cpu(), std.cpu(), weights)
            results = {"val": best.on_host(), "test": test}

            def write() -> Result:
                with still_open:
                    entry = self._write(claimed, job.split, checkpoint, history, results)
                    child.in_journal = True
                    return self._send(parent, job, scores, entry, child)

            still_open = open_run.pop_all()
        return write

    def _write(
        self,
        claimed: Claim,
        split: Split,
        checkpoint: Checkpoint,
        history: Sequence[Mapping[str, Any]],
        evaluations: Mapping[str, Evaluation | None],
    ) -> Path:
        data = self.protocol.data
        with self.store.scratch() as scratch:
            folder = Path(scratch) / "entry"
            files = folder / journal.FILES
            records.write_files(files, data, split, checkpoint, history, evaluations)
            leaks = records.count_leaks(self.protocol.groups, split)
            results = journal.Results(
                records.dataset_entry(data),
                history,
                records.final_metrics(history, evaluations["test"], split, leaks),
                {"file_digests": json.dumps(file_digests(files))},
            )
            return journal.write(self.store, claimed, results, folder)

    def _send_again(self, parent: Parent, job: Job, claimed: Claim, entry: Path) -> Result:
        with tracking.child_run(self.store, claimed) as child:
            child.in_journal = True
            return self._send(parent, job, "trained by an earlier attempt", entry, None)

    def _send(self, parent: Parent, job: Job, scores: str, entry: Path, run: Run | None) -> Result:
        """Send what is in the journal, in order, as far as the store is there; `entry` is this job's."""
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
        self._summarise(parent, job.card.name)
        return Result("trained", scores)

    def _failed(self, parent: Parent, job: Job, result: Result) -> Result:
        self._summarise(parent, job.card.name)
        return result

    def _summarise(self, parent: Parent, name: str) -> None:
        """Bring the parent up to date; where that cannot be done now, it is when the model's splits are done."""
        evidence = self._evidence if name == self._model else None

        def summarise() -> None:
            nonlocal evidence
            evidence = log_summary(self.store, self.protocol.task.name, parent, name, evidence)

        tracking.attempt(summarise)
        if name == self._model:
            self._evidence = evidence

    def _fit_baseline(
        self, child: Run, name: str, model: LayerStack, split: Split, bar: display.SplitBar
    ) -> tuple[list[dict[str, Any]], Evaluation]:
        """Fit a baseline; return its history of one epoch, and what it makes of the validation part."""
        record = fit_baseline(name, model, self.images, split, self.protocol.config.precision)
        history = [records.epoch_entry(record)]
        child.log_epochs(history)
        bar.update(history)
        return history, record.val

    def _fit(
        self,
        child: Run,
        state: TrainingState,
        split: Split,
        saved: Mapping[str, Any] | None,
        keep: Callable[[Sequence[Any], Mapping[str, Any]], None],
        bar: display.SplitBar,
    ) -> tuple[list[dict[str, Any]], Evaluation]:
        """Train a network to its end; return history and best validation.

        What makes it go on after a kill is kept, and its epochs are logged, as they end or, where they are short,
        several at once: what is trained since then is trained again.
        """
        history: list[dict[str, Any]] = []
        if saved:
            history = list(saved["history"])
            state.load_state_dict(saved["state"])
            bar.update(history)
        due = time.monotonic()
        for record in fit(state, self.images, split):
            history.append(records.epoch_entry(record))
            if state.is_done or time.monotonic() >= due:
                # first to the disk: the store may be away, and what it has must never be more than can go on
                started = time.monotonic()
                keep(history, state.state_dict())
                due = time.monotonic() + max(SAVE_EVERY, (time.monotonic() - started) / SAVE_SHARE)
                child.log_epochs(history)
            bar.update(history)
        child.log_epochs(history)
        assert state.best is not None  # the first finite loss is the best so far, and fit raises on any other
        return history, state.best


def log_summary(
    store: Store, task: str, parent: Parent, name: str, evidence: analysis.Evidence | None = None
) -> analysis.Evidence:
    """Write what the comparison table says of a model's splits so far to its parent, unless it stands there.

    Returns
    -------
    analysis.Evidence
        To be given the next time: what it has read is not read again.
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
