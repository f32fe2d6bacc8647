"""The data behind stored runs, and everything that is derived from them once for all runs."""

import torch

import datasets
from datasets import DatasetError, ImageData, Split
from experiments.task import Task
from experiments.training.images import DeviceImages
from experiments.verification.stored_run import SplitRecord
from tracking import StoreError
from tracking.commands import script_tasks


class Material:
    """A data set on the device that evaluates the runs, with its splits and near duplicates."""

    def __init__(self, task: Task, data: ImageData, device: str) -> None:
        self.task = task
        self.data = data
        self.device = device
        self.groups = datasets.duplicate_groups(data)
        self._splits: dict[tuple[str, int, int, int, bool], list[Split]] = {}
        try:
            self.images = DeviceImages.load(data, device)
        except torch.OutOfMemoryError:
            raise DatasetError(f"{data.name} does not fit into the GPU's memory; use --device cpu") from None

    def split(self, run: SplitRecord) -> Split:
        """Draw a run's split as the protocol does; a `StoreError` says why that fails."""
        params = run.params
        number: int = params["split"]
        name, n_splits, repetitions = params["protocol"], params["n_splits"], params.get("repetitions", 1)
        *_, seed, leak_free = key = name, n_splits, repetitions, int(run.row["split_seed"]), params["leak_free"]
        if name != self.task.protocol.name and self.task.name in script_tasks():
            raise StoreError(f"protocol is {name}, and {self.task.protocol.name} in {self.task.name}")
        if not 0 <= number < n_splits * repetitions:
            raise StoreError(f"split {number} is none of 0 to {n_splits * repetitions - 1}")
        if key not in self._splits:
            try:
                protocol = datasets.named_protocol(name, n_splits, repetitions)
                groups = self.groups if leak_free else None
                self._splits[key] = datasets.draw_splits(protocol, self.data, seed, groups)
            except (ValueError, DatasetError) as error:
                raise StoreError(f"its split cannot be made from the data: {error}") from None
        return self._splits[key][number]

    def holds(self, split: Split) -> bool:
        """Whether all of a split's indices are images."""
        return all(((indices >= 0) & (indices < len(self.data.labels))).all() for indices in split)
