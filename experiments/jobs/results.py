"""The results of a split as they are stored: metrics under their keys, and files."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

import datasets
from datasets import ImageData, Split
from experiments.jobs.job import DIVERGED, Curve
from experiments.training.cross_fitting import evaluation_of
from experiments.training.evaluation import Evaluation
from experiments.training.fit import EpochRecord
from tracking import keys
from tracking.checkpoints import Checkpoint
from tracking.predictions import PartPredictions, Predictions, of_classes
from tracking.scores import SCORES

THUMBNAIL_SIZE = 64  # pixels


def epoch_entry(record: EpochRecord) -> dict[str, Any]:
    """An epoch as it stands in a history: its number, the time in ms, and its metrics under their keys."""
    metrics = {
        "train/loss": record.train_loss,
        "train/accuracy": record.train_accuracy,
        **{f"val/{score}": value for score, value in record.val.scores().items()},
        **({} if record.lr is None else {"lr": record.lr}),
        "epoch_seconds": record.seconds,
    }
    halves = {} if record.half_losses is None else {"half_losses": record.half_losses}
    return {"epoch": record.epoch, "time": time.time_ns() // 1_000_000, "metrics": metrics, **halves}


def best_entry(history: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The epoch with the lowest validation loss; of equal ones the first, whose weights are kept."""
    return min(history, key=lambda entry: entry["metrics"]["val/loss"])


def epochs_of_halves(history: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """The epochs that score half 0 and half 1 of the validation part: each has the lowest loss on the other half."""
    first, second = (min(history, key=lambda entry: entry["half_losses"][other])["epoch"] for other in (1, 0))
    return first, second


def curve_of(history: Sequence[Mapping[str, Any]], stopped: str = "") -> Curve:
    """The validation losses of a trial's history, by which trials are compared; a divergence is an infinite epoch.

    `stopped` is the tag of the trial (`tracking.keys`).
    """
    curve: Curve = tuple((entry["metrics"]["val/loss"], *entry["half_losses"]) for entry in history)
    return (*curve, DIVERGED) if keys.is_divergence(stopped) else curve


def cross_val_scores(predictions: Predictions) -> dict[str, float]:
    """The scores of the cross-fitted validation part under their keys; none from a file of an earlier version."""
    if predictions.cross_val is None:
        return {}
    return {f"cross_val/{name}": value for name, value in evaluation_of(predictions.cross_val).scores().items()}


def final_metrics(
    history: Sequence[Mapping[str, Any]],
    test: Evaluation | None,
    cross_val: Mapping[str, float],
    images: int,
    leaks: Mapping[str, float],
) -> dict[str, float]:
    """The metrics of a finished split under their keys; `cross_val` and `leaks` are passed on. A trial has neither.

    `images` are those of an epoch: training and validation.
    """
    if not history:  # of a trial that diverged at once
        return {}
    best, last = best_entry(history), history[-1]
    seconds = sum(entry["metrics"]["epoch_seconds"] for entry in history)
    return {
        **{f"best_val/{score}": best["metrics"][f"val/{score}"] for score in SCORES},
        **{f"last_val/{score}": last["metrics"][f"val/{score}"] for score in SCORES},
        **({f"test/{score}": value for score, value in test.scores().items()} if test else {}),
        **cross_val,
        "best_epoch": best["epoch"],
        "epochs_run": len(history),
        "train_seconds": seconds,
        "images_per_second": images * len(history) / seconds,
        **leaks,
    }


def count_leaks(groups: np.ndarray, split: Split) -> dict[str, int]:
    """Count the validation and test images of which a near duplicate is trained on, under their keys."""
    val, test = (len(datasets.leaking(groups, split.train, part)) for part in (split.val, split.test))
    return {"leaking_images": val + test, "leaking_test": test}


def dataset_entry(data: ImageData) -> tuple[str, str, str]:
    """Name, digest and profile of the images, as `Run.log_dataset` takes them."""
    profile = {"images": len(data.labels), "classes": len(data.classes), "shape": data.images.shape[1:]}
    return data.name, data.digest, json.dumps(profile)


def predictions_of(
    split: Split,
    labels: np.ndarray,
    half: np.ndarray | None,
    evaluations: Mapping[str, Evaluation | None],
    of_halves: Sequence[Evaluation | None],
) -> Predictions:
    """The predictions of a split.

    Parameters
    ----------
    split : Split
    labels : numpy.ndarray of int64, shape (N,)
        Of all images.
    half : numpy.ndarray of uint8, shape (n_val,), or None
        From `datasets.halve`; None leaves the cross-fitted predictions out, as earlier versions do.
    evaluations : mapping
        Of `val` and `test` at the best epoch; `test` may be None.
    of_halves : sequence of Evaluation or None
        Of the validation part, by the models that score half 0 and half 1; None where it is that of the best epoch.
    """
    first = evaluations["val"]
    assert first is not None
    nothing = Evaluation(0.0, first.confusion, first.predicted[:0], first.log_probs[:0])
    val, test = (
        _part(split_part, labels, evaluations[part] or nothing)
        for part, split_part in (("val", split.val), ("test", split.test))
    )
    assert val.log_probs is not None
    if half is None:
        return Predictions(val, test)
    log_probs = val.log_probs.copy()
    for number, result in enumerate(of_halves):
        if result is not None:
            log_probs[half == number] = result.log_probs.cpu().numpy()[half == number]
    other = np.array([result is not None for result in of_halves])
    return Predictions(val, test, of_classes(val.index, val.true, log_probs), half, other)


def _part(index: np.ndarray, labels: np.ndarray, result: Evaluation) -> PartPredictions:
    arrays = (each.cpu().numpy() for each in (result.predicted, result.probability, result.log_probs))
    return PartPredictions(index, labels[index], *arrays)


def write_history(folder: Path, history: Sequence[Mapping[str, Any]]) -> None:
    """Write the history to a folder: the only file of a trial."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / keys.HISTORY).write_text(json.dumps(history), encoding="utf-8")


def write_files(
    folder: Path,
    data: ImageData,
    split: Split,
    checkpoint: Checkpoint,
    history: Sequence[Mapping[str, Any]],
    results: Mapping[str, Evaluation | None],
    predictions: Predictions,
) -> None:
    """Write checkpoint, history, split, predictions, confusion matrices and the worst mistakes to a folder.

    `results` are the evaluations of `val` and `test` at the best epoch; the latter is None without a test part.
    """
    from analysis import figures, fonts  # late: matplotlib takes half a second, and the first epoch comes first

    confusions = {part: result.confusion for part, result in results.items() if result}
    checkpoint.save(folder / keys.CHECKPOINT)
    predictions.write(folder / keys.PREDICTIONS)
    np.savez_compressed(folder / keys.SPLIT, train=split.train, val=split.val, test=split.test)
    numbers = {"classes": data.classes, **{part: counts.tolist() for part, counts in confusions.items()}}
    # the loss follows from no file but the checkpoint, and from that not everywhere to the last bit
    numbers["loss"] = {part: result.loss for part, result in results.items() if result}
    (folder / keys.CONFUSION).write_text(json.dumps(numbers), encoding="utf-8")
    write_history(folder, history)
    part = "test" if "test" in confusions else "val"
    shown = predictions.test if part == "test" else predictions.val
    of_part = pd.DataFrame(
        {"index": shown.index, "true": shown.true, "pred": shown.predicted, "prob": shown.probability}
    )
    worst = figures.most_confused(of_part)["index"].to_numpy()
    np.savez_compressed(folder / keys.THUMBNAILS, index=worst, pixels=thumbnails(data, worst))
    title = f"{checkpoint.model}, {'test' if part == 'test' else 'validation'} part, epoch {checkpoint.epoch}"
    figure = figures.confusion_figure(confusions[part], data.classes, title)
    with fonts.quiet_about_glyphs():
        figure.savefig(folder / keys.CONFUSION_FIGURE)


def thumbnails(data: ImageData, indices: np.ndarray) -> np.ndarray:
    """Shrink some images for reports made from the store alone: uint8, shape (n, side, side, C)."""
    size, channels = data.images.shape[2:]
    side = min(size, THUMBNAIL_SIZE)
    chosen = (Image.fromarray(data.images[index].squeeze()) for index in indices)
    small = [image.resize((side, side), Image.Resampling.BOX) for image in chosen]
    return np.array(small, dtype=np.uint8).reshape(len(indices), side, side, channels)
