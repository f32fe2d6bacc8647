"""The parent run of a model: told of its splits as they end, described once, and concluded with a summary."""

import json
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from pathlib import Path

import tracking
from datasets import ImageData
from experiments.jobs import results
from experiments.jobs.job import Job, JobContext, Result
from experiments.jobs.recorder import log_summary
from models import ModelCard
from tracking import Parent, Store, keys


@dataclass
class ModelRuns:
    """A model's parent run, and the state of its splits."""

    card: ModelCard
    parent: Parent
    left: int  # splits that have no result yet
    context: JobContext
    store: Store
    described: bool = field(init=False)  # whether the parent has its files about the model and the images
    concluded: bool = False
    kept: dict[str, str] = field(default_factory=dict)  # titles of splits that wait for the store, by fingerprint
    failures: list[str] = field(default_factory=list)  # a sentence for each split that failed

    def __post_init__(self) -> None:
        # the command that did the last split may have been killed before it described the parent
        self.described = self.parent.status == "FINISHED"

    def begin(self) -> None:
        """Say that this command works on it."""
        self.parent.begin()
        self.parent.patience = tracking.SHORT  # the rest is left to `catch_up`
        self.described = False

    def note(self, job: Job, result: Result) -> None:
        """Take in the result of a split."""
        self.left -= 1
        if result.outcome == "failed":
            self.failures.append(result.text)
        elif result.outcome == "kept":
            self.kept[job.fingerprint] = job.title
        elif result.outcome != "left" and not self.described:
            tracking.attempt(self._describe)
        if not self.left and not self.kept:  # else `catch_up` does it, once the store is back
            tracking.attempt(self._conclude)

    def catch_up(self, finished: AbstractSet[str], refused: Mapping[str, str]) -> None:
        """Conclude it after the store was away.

        `finished` has the fingerprints of splits in the store, `refused` a sentence for each that it did not take.
        """
        gone = "its results are on another machine; the same command trains it again"
        lost = {key: title for key, title in self.kept.items() if key not in finished}
        self.failures += [refused.get(key, f"{title}: {gone}") for key, title in lost.items()]
        self.kept.clear()
        if not self.concluded:
            self.parent.patience = None
            self._conclude()

    def _describe(self) -> None:
        log_model_card(self.parent, self.card, self.context.data)
        self.parent.log_dataset(*results.dataset_entry(self.context.data))
        self.described = True

    def _conclude(self) -> None:
        if not self.described:
            self._describe()
        # also without a new split: the command that did the last one may have been killed before
        log_summary(self.store, self.context.task, self.parent, self.card.name)
        failure = "; ".join(self.failures)
        self.parent.end("FAILED" if failure else "FINISHED", failure)
        self.concluded = True


def log_model_card(parent: Parent, card: ModelCard, data: ImageData) -> None:
    """Log the model's description and the class names, which a report shows."""
    # a docstring's paragraphs are Markdown as they stand, its tables are not
    blocks = [f"```text\n{part}\n```" if part.startswith("===") else part for part in card.description.split("\n\n")]
    costs = f"{card.parameters:,} parameters, {card.macs:,} multiply-accumulates an image"
    text = "\n\n".join([f"# {card.name}", costs, f"`{card.layers}`", *blocks]) + "\n"
    with parent.store.scratch() as folder:
        (Path(folder) / keys.MODEL_CARD).write_text(text, encoding="utf-8")
        (Path(folder) / keys.CLASSES).write_text(json.dumps(data.classes), encoding="utf-8")
        parent.log_files(Path(folder))
