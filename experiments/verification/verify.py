"""Verification of a task's finished runs: every stored number is derived again, by the checks in checks.py."""

import dataclasses
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console
from rich.progress import track

import analysis
import datasets
import tracking
from analysis.groups import group_id
from datasets import DatasetError, ImageData, Source
from experiments.jobs.progress import count
from experiments.task import Task
from experiments.training import hardware
from experiments.verification.checks import AGREEMENT, LOSS_TOLERANCE, check_run, check_trial
from experiments.verification.material import Material
from experiments.verification.stored_run import Findings, Record, SplitRecord
from experiments.verification.stored_task import source_of
from tracking import StoreError, keys
from tracking.commands import script_of


@dataclasses.dataclass
class Report:
    """The checks of a task, and the differences that they found."""

    task: str
    finished: int  # runs that there are
    runs: int  # those that were checked
    numbers: int = 0  # derived again
    predictions: int = 0  # derived again
    exact: int = 0  # runs whose model must give the same bits here
    near: int = 0  # runs whose model was evaluated elsewhere
    seconds: float = 0.0  # wall time
    differences: list[str] = dataclasses.field(default_factory=list)

    def add(self, findings: Findings) -> None:
        """Add the findings of a run."""
        self.numbers += len(findings.numbers)
        self.predictions += findings.predictions
        self.exact += findings.exact is True
        self.near += findings.exact is False
        self.differences += findings.differences

    def summary(self) -> str:
        """Sum up the checks, and how strict they were, in one line."""
        limits = f"loss within {LOSS_TOLERANCE:g} and {AGREEMENT:.1%} of predictions"
        tolerance = f"{limits}: other device, threads or versions"
        match self.exact, self.near:
            case 0, 0:
                how = "no model was evaluated"
            case _, 0:
                how = "exact: same kind of device and threads"
            case 0, _:
                how = tolerance
            case _:
                how = f"{count(self.exact, 'run')} exact; {count(self.near, 'run')} by {tolerance}"
        runs = count(self.runs, "run") if self.runs == self.finished else f"{self.runs} of {self.finished} runs"
        return (
            f"{self.task}: {runs}, {self.numbers:,} numbers and {self.predictions:,} predictions derived again, "
            f"{count(len(self.differences), 'difference')} ({how}), {self.seconds:.0f} s"
        )


def verify(
    task: Task,
    device: str,
    data_dir: Path | None = None,
    tracking_uri: str | None = None,
    sample_splits: int | None = None,
) -> Report:
    """Derive everything that is stored of a task's finished runs again, and compare; superseded runs are left out.

    Parameters
    ----------
    task : Task
    device : str
        On which the models are evaluated. On a CPU of the same kind, with the same number of threads and versions, as
        a run was made with, everything must be equal to the last bit. Elsewhere the loss may differ by
        `LOSS_TOLERANCE`, and `AGREEMENT` of the predictions must be the same.
    data_dir, tracking_uri : see `datasets.load` and `tracking.check_uri`
    sample_splits : int, optional
        Check only so many runs, always the same ones, of as many models as possible.

    Raises
    ------
    StoreError
        The store cannot be read, or has no finished run of the task.
    """
    started = time.perf_counter()
    hardware.prepare()
    uri = tracking.check_uri(tracking_uri)
    runs = analysis.load_runs([task.name], uri)
    store = tracking.open_store(uri)
    done = runs[runs["status"] == "FINISHED"]
    done = done[~done["superseded_by"].isin(done["run_id"])]  # superseded runs are in no table
    if done.empty:
        raise StoreError(f"{task.name} has no finished run in {store.label}; run {script_of(task.name)} first")
    chosen = done if sample_splits is None else _sample(done, sample_splits)
    trials = pd.DataFrame({"parent_id": [], "run_id": []})
    if chosen["tune"].notna().any():
        trials = analysis.load_runs([keys.trials_of(task.name)], uri)
        trials = trials[trials["status"] == "FINISHED"]
    report = Report(task.name, len(done), len(chosen))
    report.differences += _unequal_splits(runs)
    parents = {}
    for parent_id, of_parent in chosen.groupby("parent_id"):
        parents[parent_id] = Record(store, str(parent_id), f"{of_parent['model'].iloc[0]}, all splits")
        _check_summary(parents[parent_id], runs[runs["parent_id"] == parent_id])
        report.add(parents[parent_id].findings)
    walk = _with_material(task, chosen, data_dir, device, uri, report)
    deciding: set[str] = set()  # trials
    bar = Console(stderr=True)
    for row, material in track(walk, task.name, len(chosen), console=bar, disable=not bar.is_terminal, transient=True):
        run = SplitRecord(store, row, _title(row, done))
        check_run(run, parents[row["parent_id"]], material, trials)
        report.add(run.findings)
        deciding.update(run.trials)  # some may have been taken over by another tuned run
    checked = trials[trials["parent_id"].isin(chosen["run_id"]) | trials["run_id"].isin(deciding)]
    for _, row in checked.iterrows():
        trial = SplitRecord(store, row, f"{_title(row, done)} trial {row['trial']}")
        check_trial(trial)
        report.add(trial.findings)
    report.seconds = time.perf_counter() - started
    return report


def _sample(runs: pd.DataFrame, count: int) -> pd.DataFrame:
    """Choose runs by lot, the same ones each time: one of each model, then a second of each, and so on."""
    shuffled = runs.sample(frac=1, random_state=0)
    rounds = shuffled.groupby("model").cumcount().to_numpy()
    return shuffled.iloc[np.argsort(rounds, kind="stable")[:count]]


def _title(row: "pd.Series[Any]", runs: pd.DataFrame) -> str:
    """Name a run; with its id if others did the same split of the same model."""
    same = (runs[list(keys.IDENTITY)] == row[list(keys.IDENTITY)]).all(axis=1)
    name = f"{row['model']} split {row['split']}" + (
        f" replicate {row['replicate']}" if pd.notna(row["replicate"]) and row["replicate"] else ""
    )
    return name + (f" (run {row['run_id'][:8]})" if same.sum() > 1 else "")


def _unequal_splits(runs: pd.DataFrame) -> Iterator[str]:
    """Name the splits in which the models of a comparison group did not have the same images."""
    for group in analysis.comparison_groups(runs):
        for number, same in analysis.finished(group).groupby("split"):
            if same["split_hash"].nunique(dropna=False) > 1:
                names = ", ".join(same["model"])
                yield f"split {number} of comparison group {group_id(group)}: {names} were not given the same images"


def _with_material(
    task: Task, runs: pd.DataFrame, data_dir: Path | None, device: str, uri: str, report: Report
) -> "Iterator[tuple[pd.Series[Any], Material | None]]":
    """Yield each run with its data, one data set after the other, or with None if they are not there."""
    for name, on_name in runs.groupby(runs["dataset"].fillna("")):
        material: Material | None = None
        loaded: Source | None = None
        problem = ""
        for digest, on_data in on_name.groupby(on_name["dataset_digest"].fillna("")):
            try:
                source = source_of(on_data.iloc[0], task, uri)
                if source != loaded:  # the runs of a script have one, loaded once
                    material, loaded, problem = None, source, ""
                    material = Material(task, _load(task, source, str(name), data_dir), device)
            except DatasetError as error:
                material, loaded, problem = None, None, str(error)
            fits = material is not None and material.data.digest == digest
            if not fits:
                found = problem or f"those here have the digest {material.data.digest[:12] if material else ''}"
                report.differences.append(
                    f"{count(len(on_data), 'run')} could not be evaluated: the data are {name or 'unknown'} with the "
                    f"digest {str(digest)[:12]}, and {found}"
                )
            for _, row in on_data.iterrows():
                yield row, material if fits else None


def _load(task: Task, source: Source, name: str, data_dir: Path | None) -> ImageData:
    sample = name.startswith(keys.SAMPLE)
    if not sample and data_dir is None and name != task.data.name:
        raise DatasetError("they are no published data; name their folder in --data-dir")
    return datasets.load(source, data_dir, sample)


def _check_summary(parent: Record, children: pd.DataFrame) -> None:
    """Compare a parent's metrics with its splits, unless a process is working on them."""
    if parent.status == "RUNNING":
        return
    evidence = analysis.Evidence(children, parent.store.uri)
    summary = analysis.summarise(evidence, parent.texts["model"])
    derived = {key: float(value) for key, value in summary.items() if math.isfinite(value)}
    keys_of_both = derived.keys() | parent.metrics
    if children["cross_val/accuracy"].isna().any():  # earlier versions estimated intervals in another way
        keys_of_both = {key for key in keys_of_both if not key.startswith((keys.LOW, keys.HIGH))}
    for key in sorted(keys_of_both):
        parent.findings.compare(key, parent.metrics.get(key), derived.get(key), "from its splits")
