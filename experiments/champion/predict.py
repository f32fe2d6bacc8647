"""Predictions of a task's champion for photographs."""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from mlflow.exceptions import MlflowException
from torch import nn

import tracking
from datasets.decoding import Depth, NoImageError, decode, quiet_libraries, why_undecoded
from datasets.names import readable_name
from experiments.champion import export
from tracking import Store, StoreError, registry
from tracking.commands import script_of
from tracking.keys import SAMPLE
from tracking.store import prefixed

BATCH = 64  # photos that are decoded and pass the model at once


@dataclass(frozen=True)
class Predictor:
    """The registered model of a task, and where it came from."""

    program: nn.Module  # images, uint8 of shape (N, size, size, channels), to probabilities, float32 of shape (N, K)
    classes: list[str]
    size: int  # of its images, in pixels
    channels: int
    depth: Depth  # of its training images, if they had 16 or 32 bits a channel (`decode`)
    model: str  # its name; empty if its run was removed
    origin: str  # model, split, version and run, in words
    run_id: str  # of that split
    is_of_sample: bool  # whether it was trained on generated images

    @classmethod
    def load(cls, store: Store, task: str) -> "Predictor":
        """Read the champion of a task.

        Raises
        ------
        StoreError
            There is none, or its files are gone.
        """
        held = tracking.persist(lambda: registry.read_champion(store, task))
        if held is None:
            raise StoreError(
                f"{task} has no champion in {store.label}; python {script_of(task)} registers one when a model has "
                "all its splits (finished ones are not trained again)"
            )
        with tempfile.TemporaryDirectory() as scratch:  # of files that are a server's; the store may be read-only
            program, about = export.load(registry.fetch_champion(store, task, held, Path(scratch)))
        version = f"version {held.version} of models:/{prefixed(task)}, run {held.run_id}"
        try:
            params = tracking.persist(lambda: store.client.get_run(held.run_id)).data.params
        except MlflowException:  # it was removed; the model stands alone
            return cls(program, **about, model="", origin=version, run_id=held.run_id, is_of_sample=False)
        dataset = str(params.get("dataset"))
        model = str(params.get("model"))
        origin = f"{model}, split {params.get('split')} on {dataset}: {version}"
        is_of_sample = dataset.startswith(SAMPLE)
        return cls(program, **about, model=model, origin=origin, run_id=held.run_id, is_of_sample=is_of_sample)

    def predict(self, photos: Sequence[Path]) -> Iterator[tuple[Path, str, float]]:
        """Classify photos of any format and size; yield path, most probable class, and its probability.

        An unreadable photo gets a sentence in place of the class, and NaN.
        """
        for first in range(0, len(photos), BATCH):
            decoded = self.decode(photos[first : first + BATCH])
            images = [image for _, image in decoded if isinstance(image, np.ndarray)]
            answers = iter(self._answers(np.stack(images)) if images else [])
            for path, image in decoded:
                yield (path, *next(answers)) if isinstance(image, np.ndarray) else (path, image, np.nan)

    def _answers(self, images: np.ndarray) -> list[tuple[str, float]]:
        with torch.inference_mode():
            probabilities, labels = self.program(torch.from_numpy(images)).max(1)
        return [(self.classes[label], p) for label, p in zip(labels.tolist(), probabilities.tolist(), strict=True)]

    def decode(self, photos: Sequence[Path]) -> list[tuple[Path, np.ndarray | str]]:
        """Return each photo as the model sees it, uint8 of shape (size, size, channels), or why there is none."""
        with quiet_libraries():
            return [(path, self._decode(path)) for path in photos]

    def _decode(self, path: Path) -> np.ndarray | str:
        name = readable_name(str(path))
        try:
            if not path.is_file():
                what = "no regular file" if path.exists() else "not there"
                return f"{name} is {'a folder; name the photos in it' if path.is_dir() else what}"
            return decode(path, self.size, self.channels, self.depth)
        except NoImageError:
            return f"{name} is no image"
        except Exception as error:  # noqa: BLE001 - Pillow's parsers raise whatever a broken file makes them trip over
            return f"{name} cannot be read as an image ({readable_name(why_undecoded(path, error))[:300]})"
