"""A stored run: its database entries, its files, and the differences found in them."""

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd

import analysis
from datasets import Split
from experiments.jobs.rebuilt import Rebuilt, rebuild
from tracking import Store, StoreError, keys
from tracking.predictions import Predictions

T = TypeVar("T")


class Findings:
    """Numbers that were derived again for one run, and those that differ."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.numbers: set[str] = set()  # their names
        self.predictions = 0
        self.exact: bool | None = None  # whether its model must give the same bits here; None: not evaluated
        self.differences: dict[str, None] = {}  # lines in order, each once: several checks may trip over one file

    def differ(self, what: str) -> None:
        """Note a difference."""
        self.differences[f"{self.title}: {what}"] = None

    def compare(self, key: str, stored: float | None, derived: float | None, source: str, tolerance: float = 0) -> None:
        """Compare a number of the database with the one derived from `source`. None is missing; NaN equals nothing."""
        if stored is None and derived is None:
            return
        self.numbers.add(key)
        if stored is None or derived is None or not (stored == derived or abs(stored - derived) <= tolerance):
            self.differ(f"{key} is {_show(stored)} in the database, {_show(derived)} {source}")

    def compare_arrays(
        self, name: str, stored: np.ndarray, derived: np.ndarray, source: str, agreement: float = 1
    ) -> None:
        """Compare an array of a file with the derived one; `agreement` is the share that must be equal."""
        if stored.dtype != derived.dtype or stored.shape != derived.shape:
            self.differ(f"{name} has another shape or type than the values {source}")
        elif np.count_nonzero(stored == derived) < math.floor(agreement * stored.size):
            n = np.count_nonzero(stored != derived)
            self.differ(f"{n:,} of {stored.size:,} values of {name} are not those {source}")


class Record:
    """A run in the database."""

    def __init__(self, store: Store, run_id: str, title: str) -> None:
        run = store.client.get_run(run_id)
        self.store = store
        self.status: str = run.info.status
        self.texts: dict[str, str] = run.data.params  # as they are stored
        self.tags: dict[str, str] = run.data.tags
        self.metrics: dict[str, float] = run.data.metrics  # latest values
        self.datasets = [entered.dataset.digest for entered in run.inputs.dataset_inputs] if run.inputs else []
        self.findings = Findings(title)
        self.points: dict[str, list[tuple[int, int, float]]] = {}  # all steps, times and values that were logged
        for key, latest in self.metrics.items():
            history = store.client.get_metric_history(run_id, key)
            self.points[key] = sorted((point.step, point.timestamp, point.value) for point in history)
            newest = self.points[key][-1][2] if history else None
            if latest != newest:
                self.findings.differ(f"{key} is {_show(latest)} as the latest value, {_show(newest)} as logged")


class SplitRecord(Record):
    """A finished split. Its files are read when they are asked for, with a `StoreError` if that fails."""

    def __init__(self, store: Store, row: "pd.Series[Any]", title: str) -> None:
        super().__init__(store, row["run_id"], title)
        self.row = row
        self.trials: list[str] = []  # ids of those that decided it, once its choice is checked
        values = {key: row[key] for key in keys.PARAMS if key in self.texts and not pd.isna(row[key])}
        # json knows none of NumPy's numbers
        self.params = {key: value.item() if isinstance(value, np.generic) else value for key, value in values.items()}

    def path(self, name: str) -> Path:
        """Path of a file on this machine."""
        return analysis.local_artifact(self.row, name, self.store.uri)

    def _read(self, name: str, parse: Callable[[Path], T]) -> T:
        path = self.path(name)
        try:
            return parse(path)
        except Exception as error:  # noqa: BLE001 - readers raise whatever a damaged file makes them trip over
            raise StoreError(f"{name} is damaged ({type(error).__name__})") from None

    @functools.cached_property
    def split(self) -> Split:
        """Indices of its three parts."""
        return self._read(keys.SPLIT, _read_split)

    @functools.cached_property
    def predictions(self) -> Predictions:
        """Predictions as `results.predictions_of` makes them."""
        return self._read(keys.PREDICTIONS, Predictions.read)

    @functools.cached_property
    def history(self) -> list[dict[str, Any]]:
        """Entries as `results.epoch_entry` makes them; none of a trial that diverged at once."""
        history = self._read(keys.HISTORY, _read_history)
        if not history and "trial" not in self.params:
            raise StoreError(f"{keys.HISTORY} has no epoch")
        return history

    @functools.cached_property
    def confusions(self) -> dict[str, Any]:
        """Classes, and counts of `val` and `test`."""
        return self._read(keys.CONFUSION, _read_confusions)

    @functools.cached_property
    def rebuilt(self) -> Rebuilt:
        """The checkpoint, and the model that it describes, on the CPU."""
        return self._read(keys.CHECKPOINT, rebuild)


def _read_split(path: Path) -> Split:
    with np.load(path, allow_pickle=False) as arrays:
        split = Split(*(arrays[part] for part in Split._fields))
    if any(indices.dtype != np.int64 or indices.ndim != 1 for indices in split):
        raise TypeError("indices are int64")
    return split


def _read_history(path: Path) -> list[dict[str, Any]]:
    history: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    for entry in history:
        if not keys.EPOCH_METRICS.keys() - {"lr"} <= entry["metrics"].keys():  # a baseline has no learning rate
            raise ValueError("an epoch has all metrics")
        if not all(map(math.isfinite, [entry["epoch"], entry["time"], *entry["metrics"].values()])):
            raise ValueError("numbers are finite")
    return history


def _read_confusions(path: Path) -> dict[str, Any]:
    confusions: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if not confusions["classes"]:
        raise ValueError("there are classes")
    return confusions


def _show(value: float | None) -> str:
    return "missing" if value is None else repr(value)
