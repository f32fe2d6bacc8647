"""What a run leaves in the result database: metrics under their keys, and files."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

import analysis
import models
from analysis import figures
from datasets import ImageData, Split
from experiments.training import EpochRecord, Evaluation
from tracking import Run, Store, keys
from tracking.checkpoints import Checkpoint

THUMBNAIL_SIZE = 64  # pixels


def epoch_metrics(record: EpochRecord) -> dict[str, float]:
    """The metrics of an epoch under their keys."""
    return {
        "train/loss": record.train_loss,
        "train/accuracy": record.train_accuracy,
        **{f"val/{score}": value for score, value in record.val.scores().items()},
        **({} if record.lr is None else {"lr": record.lr}),
        "epoch_seconds": record.seconds,
    }


def final_metrics(
    records: list[EpochRecord], best: EpochRecord, test: Evaluation | None, images_an_epoch: int
) -> dict[str, float]:
    """The metrics of a finished split under their keys."""
    parts = {"best_val": best.val, "last_val": records[-1].val} | ({"test": test} if test else {})
    seconds = sum(record.seconds for record in records)
    return {
        **{f"{part}/{score}": value for part, result in parts.items() for score, value in result.scores().items()},
        "best_epoch": best.epoch,
        "epochs_run": len(records),
        "train_seconds": seconds,
        "images_per_second": images_an_epoch * len(records) / seconds,
    }


def log_dataset(run: Run, data: ImageData) -> None:
    """Enter the images under their digest."""
    profile = {"images": len(data.labels), "classes": len(data.classes), "shape": data.images.shape[1:]}
    run.log_dataset(data.name, data.digest, json.dumps(profile))


def log_model_card(parent: Run, card: models.ModelCard, data: ImageData) -> None:
    """Log what a report needs to explain the model and name the classes."""
    # a docstring's paragraphs are Markdown as they stand, its tables are not
    blocks = [f"```text\n{part}\n```" if part.startswith("===") else part for part in card.description.split("\n\n")]
    costs = f"{card.parameters:,} parameters, {card.macs:,} multiply-accumulates an image"
    text = "\n\n".join([f"# {card.name}", costs, f"`{card.layers}`", *blocks]) + "\n"
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / keys.MODEL_CARD).write_text(text, encoding="utf-8")
        (Path(folder) / keys.CLASSES).write_text(json.dumps(data.classes), encoding="utf-8")
        parent.log_files(Path(folder))


def log_artifacts(
    child: Run, data: ImageData, split: Split, checkpoint: Checkpoint, results: Mapping[str, Evaluation | None]
) -> None:
    """Log checkpoint, split, predictions, confusion matrices, and thumbnails of the worst mistakes.

    `results` has the parts `val` and `test`; the latter is None where there is no test part.
    """
    predictions: dict[str, np.ndarray] = {}
    confusions: dict[str, np.ndarray] = {}
    for part, indices in (("val", split.val), ("test", split.test)):
        result = results[part]
        predictions[f"{part}_index"] = indices
        predictions[f"{part}_true"] = data.labels[indices]
        predictions[f"{part}_pred"] = result.predicted.cpu().numpy() if result else np.empty(0, np.int64)
        predictions[f"{part}_prob"] = result.probability.cpu().numpy() if result else np.empty(0, np.float32)
        if result:
            confusions[part] = result.confusion
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint.save(folder / keys.CHECKPOINT)
        np.savez_compressed(folder / keys.PREDICTIONS, **predictions)  # type: ignore[arg-type]
        np.savez_compressed(folder / keys.SPLIT, train=split.train, val=split.val, test=split.test)
        numbers = {"classes": data.classes, **{part: counts.tolist() for part, counts in confusions.items()}}
        (folder / keys.CONFUSION).write_text(json.dumps(numbers), encoding="utf-8")
        part = "test" if "test" in confusions else "val"
        of_part = pd.DataFrame({key: predictions[f"{part}_{key}"] for key in ("index", "true", "pred", "prob")})
        worst = figures.most_confused(of_part)["index"].to_numpy()
        np.savez_compressed(folder / keys.THUMBNAILS, index=worst, pixels=thumbnails(data, worst))
        title = f"{checkpoint.model}, {'test' if part == 'test' else 'validation'} part, epoch {checkpoint.epoch}"
        figure = figures.confusion_figure(confusions[part], data.classes, title)
        figure.savefig(folder / keys.CONFUSION_FIGURE)
        child.log_files(folder)


def thumbnails(data: ImageData, indices: np.ndarray) -> np.ndarray:
    """Small versions of some images, for a report that has nothing but the store: uint8, shape (n, side, side, C)."""
    size, channels = data.images.shape[2:]
    side = min(size, THUMBNAIL_SIZE)
    chosen = (Image.fromarray(data.images[index].squeeze()) for index in indices)
    small = [image.resize((side, side), Image.Resampling.BOX) for image in chosen]
    return np.array(small, dtype=np.uint8).reshape(len(indices), side, side, channels)


def log_figures(store: Store, evidence: analysis.Evidence) -> None:
    """Log a group's figures to its parent runs: what compares to all of them, the rest to the model's own."""
    parents = evidence.runs.groupby("model")["parent_id"].last()
    with tempfile.TemporaryDirectory() as name:
        for figure_name, model, figure in figures.draw_figures(evidence, analysis.default_metric(evidence.runs)):
            for owner in parents.index if model is None else [model]:
                figures.save(figure, Path(name) / str(owner), figure_name)
        for owner, run_id in parents.items():
            Run(store, str(run_id)).log_files(Path(name) / str(owner), keys.FIGURES)
