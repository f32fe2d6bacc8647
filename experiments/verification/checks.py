"""The checks of a split's run. Each compares one kind of stored value with its source: a file, the data or the model.

A file that is missing or damaged is a difference, too, and ends that check.
"""

import functools
import hashlib
import itertools
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from sklearn.metrics import confusion_matrix
from torch import Tensor

import datasets
from experiments.jobs import results
from experiments.jobs.job import model_arguments
from experiments.jobs.progress import count
from experiments.provenance import fingerprint
from experiments.training import hardware
from experiments.training.cross_fitting import evaluation_of
from experiments.training.evaluation import Evaluation, evaluate
from experiments.tuning.rounds import is_over
from experiments.verification.choice import check_choice
from experiments.verification.material import Material
from experiments.verification.stored_run import Record, SplitRecord
from models.weights import parse_normalisation
from tracking import StoreError, keys
from tracking.errors import StoreAwayError
from tracking.predictions import PartPredictions, Predictions
from tracking.scores import SCORES
from tracking.settings import LATER, TrainingConfig

ROUNDING = 1e-6  # nats, of a loss that was summed up on a device, and from the stored probabilities
NO_FILE = f"since {keys.PREDICTIONS} has no probabilities"
LOSS_TOLERANCE = 1e-3  # nats, if the bits need not be the same
AGREEMENT = 0.999  # of the predictions, likewise
FILES = (
    keys.CHECKPOINT, keys.CONFUSION, keys.CONFUSION_FIGURE, keys.HISTORY, keys.PREDICTIONS, keys.SPLIT, keys.THUMBNAILS
)  # fmt: skip
OPTIONAL = (
    "seed", "repetitions", "replicate", "tune", "space", "halving", "trial", "chosen_trial", "normalisation",
    *keys.SEEDS, *LATER,
)  # fmt: skip
NEEDED_PARAMS = tuple(key for key in keys.PARAMS if key not in OPTIONAL)
NEEDED_TAGS = ("task", "fingerprint", "split_hash", "dataset_digest", "source_digest", "hardware", "versions")
SCORED = {"val": "best_val", "cross_val": "cross_val", "test": "test"}  # part of the predictions: prefix of its scores


def check_run(run: SplitRecord, parent: Record, material: Material | None, trials: pd.DataFrame) -> None:
    """Run all checks of a split that are possible; `trials` are those of its task."""
    checks: list[Callable[[], None]] = [functools.partial(_check_files, run)]
    seeds = ("seed",) if "seed" in run.params else keys.SEEDS  # older runs have one seed for both
    missing = [key for key in (*NEEDED_PARAMS, *seeds) if key not in run.params]
    missing += [key for key in NEEDED_TAGS if key not in run.tags]
    if missing:
        run.findings.differ(f"it has no {', '.join(missing)}, without which nothing follows from its files")
    else:
        checks += [functools.partial(_check_params, run, parent)]
        checks += [functools.partial(check, run) for check in CHECKS]
        if "chosen_trial" in run.params:
            checks += [functools.partial(check_choice, run, parent, trials)]
        if material is not None:
            checks += [functools.partial(check, run, material) for check in DATA_CHECKS]
    _run_checks(checks, run)


def check_trial(trial: SplitRecord) -> None:
    """Check that a trial's metrics follow from its history, its only file."""
    files = functools.partial(_check_files, trial, (keys.HISTORY,))
    _run_checks(
        [files, *(functools.partial(check, trial) for check in (_check_epochs, _check_final_metrics, _check_end))],
        trial,
    )


def _run_checks(checks: Iterable[Callable[[], None]], run: SplitRecord) -> None:
    for check in checks:
        try:
            check()
        except StoreAwayError:
            raise
        except StoreError as error:
            run.findings.differ(str(error))


def _check_files(run: SplitRecord, needed: Iterable[str] = FILES) -> None:
    """Compare each file with the digest that was noted before it was copied into the store."""
    try:
        digests = dict(json.loads(run.tags["file_digests"]))
    except KeyError:
        raise StoreError(
            "it has no file_digests, so nothing proves its files; run its task again with --fresh"
        ) from None
    except (TypeError, ValueError):
        raise StoreError("its file_digests cannot be read; run its task again with --fresh") from None
    for name in needed:
        if name not in digests:
            run.findings.differ(f"file_digests lacks {name}")
    for name, digest in digests.items():
        try:
            if hashlib.sha256(run.path(name).read_bytes()).hexdigest() != digest:
                run.findings.differ(f"{name} is not the file that was logged: its SHA-256 is another")
        except OSError as error:
            run.findings.differ(f"{name} cannot be read ({error.strerror})")
        except StoreAwayError:
            raise
        except StoreError as error:
            run.findings.differ(str(error))


def _check_params(run: SplitRecord, parent: Record) -> None:
    """Compare the params with the parent's and with the fingerprint, which is a digest of them all."""
    shared = {key: value for key, value in run.params.items() if key not in keys.CHILD_PARAMS}
    # of several GPUs, another one may have begun; and with fewer holdouts
    may_differ = {"device"} | ({"n_splits"} if keys.has_open_end(run.params["protocol"]) else set())
    tuned = keys.tuned_settings(run.params)  # they have a range in the parent run
    for key in shared.keys() - may_differ - tuned:
        if run.texts[key] != parent.texts.get(key):
            run.findings.differ(f"{key} is {run.texts[key]}, in its parent run {parent.texts.get(key, 'missing')}")
    tags = run.tags
    numbers = run.params["split"], tags["split_hash"], run.params.get("replicate", 0)
    ranges = {key: parent.texts.get(key) for key in tuned}
    for digest in (fingerprint.configuration_fingerprint, fingerprint.earlier_configuration_fingerprint):
        configuration = digest({**shared, **ranges}, tags["dataset_digest"], tags["source_digest"])
        own = fingerprint.split_fingerprint(configuration, *numbers)
        if tags["fingerprint"] == own and parent.tags.get("fingerprint") == configuration:
            break
    else:
        run.findings.differ("fingerprint does not follow from params, data, source and split: one of them was changed")
    if run.datasets != [tags["dataset_digest"][:36]]:
        run.findings.differ("the data set that was entered has another digest than dataset_digest")


def _check_split(run: SplitRecord) -> None:
    """Compare the parts with the database, and check that they have no image in common."""
    split = run.split
    if fingerprint.split_hash(split) != run.tags["split_hash"]:
        run.findings.differ(f"{keys.SPLIT} is not the split that split_hash was made of")
    for part, indices in split._asdict().items():
        run.findings.compare(f"n_{part}", run.params[f"n_{part}"], len(indices), f"in {keys.SPLIT}")
        if (np.diff(indices) <= 0).any():
            run.findings.differ(f"{part} in {keys.SPLIT} is not sorted, or has an image twice")
    for (one, ours), (other, theirs) in itertools.combinations(split._asdict().items(), 2):
        if n := len(np.intersect1d(ours, theirs)):
            run.findings.differ(f"{keys.SPLIT} has {count(n, 'image')} of {other} in {one}, too")


def _check_epochs(run: SplitRecord) -> None:
    """Compare the curves, point by point, with the history."""
    history = {entry["epoch"]: entry for entry in run.history}
    if list(history) != list(range(1, len(run.history) + 1)):
        run.findings.differ(f"{keys.HISTORY} does not have each epoch once, from 1")
    for key in keys.EPOCH_METRICS:
        logged: defaultdict[int, list[tuple[int, float]]] = defaultdict(list)
        for epoch, at, value in run.points.get(key, []):
            logged[epoch].append((at, value))
        for epoch in sorted(logged.keys() | history):
            title, points, entry = f"{key} of epoch {epoch}", logged[epoch], history.get(epoch)
            derived = entry["metrics"].get(key) if entry else None
            run.findings.compare(title, points[-1][1] if points else None, derived, f"in {keys.HISTORY}")
            if len(points) > 1:
                run.findings.differ(f"{title} was logged {len(points)} times")
            elif points and entry and points[0][0] != entry["time"]:
                run.findings.differ(f"{title} has another time than in {keys.HISTORY}")


def _check_final_metrics(run: SplitRecord) -> None:
    """Compare the final metrics that follow from the history; and that there are no others than expected."""
    derived = results.final_metrics(run.history, None, {}, run.params["n_train"] + run.params["n_val"], {})
    for key, value in derived.items():
        run.findings.compare(key, run.metrics.get(key), value, f"from {keys.HISTORY}")
    for key in run.metrics.keys() - keys.EPOCH_METRICS.keys() - keys.FINAL_METRICS.keys():
        run.findings.differ(f"the metric {key} follows from nothing")
    for key in keys.FINAL_METRICS:
        if len(run.points.get(key, [])) > 1 and "trial" not in run.params:  # a stopped trial may go on, and end again
            run.findings.differ(f"{key} was logged {len(run.points[key])} times")
    if not run.params["n_test"]:
        for key in (f"test/{score}" for score in SCORES):
            run.findings.compare(key, run.metrics.get(key), None, "since there is no test part")


def _check_end(trial: SplitRecord) -> None:
    """Check that a trial ended where it says: among the worse ones, by divergence, or at its end."""
    stopped = trial.tags.get(keys.STOPPED, "")
    config = TrainingConfig(epochs=trial.params["epochs"], patience=trial.params["patience"])
    own_end = is_over(results.curve_of(trial.history, stopped), config)
    if not (int(stopped) == len(trial.history) if stopped.isdecimal() else own_end):
        trial.findings.differ(f"{keys.STOPPED} is {stopped!r}, and it has {count(len(trial.history), 'epoch')}")


def _check_predictions(run: SplitRecord) -> None:
    """Compare the predictions' images with the split, their counts with the file, their scores with the database."""
    classes = len(run.confusions["classes"])
    for name, prefix in SCORED.items():
        part = run.predictions.part(name)
        if part is None:
            for score in SCORES:  # of an earlier version
                run.findings.compare(f"{prefix}/{score}", run.metrics.get(f"{prefix}/{score}"), None, NO_FILE)
            continue
        of_split = name.removeprefix("cross_")
        run.findings.compare_arrays(
            f"{name}_index in {keys.PREDICTIONS}",
            part.index,
            getattr(run.split, of_split),
            f"of {of_split} in {keys.SPLIT}",
        )
        if any(((labels < 0) | (labels >= classes)).any() for labels in (part.true, part.predicted)):
            run.findings.differ(f"{name} in {keys.PREDICTIONS} has labels that are no class")
            continue
        if part.log_probs is not None and part.log_probs.shape[1] != classes:
            run.findings.differ(f"{name} in {keys.PREDICTIONS} has probabilities of {part.log_probs.shape[1]} classes")
            continue
        counts = confusion_matrix(part.true, part.predicted, labels=range(classes)) if len(part) else None
        if name != "cross_val" and run.confusions.get(name) != (None if counts is None else counts.tolist()):
            run.findings.differ(f"the counts of {name} in {keys.CONFUSION} are not those of {keys.PREDICTIONS}")
        if counts is None:
            continue
        _check_probabilities(run, name, part)
        loss, source = _stored_loss(run, name, part)
        none = torch.empty(0)
        for score, value in Evaluation(loss, counts, none, none).scores().items():
            key, origin = f"{prefix}/{score}", source if score == "loss" else keys.PREDICTIONS
            run.findings.compare(key, run.metrics.get(key), value, f"from {origin}")


def _check_probabilities(run: SplitRecord, name: str, part: PartPredictions) -> None:
    """Compare the predicted classes, and the loss, with the probabilities of all classes."""
    if part.log_probs is None:
        return
    if n := int((part.log_probs.argmax(1) != part.predicted).sum()):
        run.findings.differ(f"{count(n, 'predicted class')} of {name} in {keys.PREDICTIONS} are not the likeliest")
    if name != "cross_val":
        key = f"{SCORED[name]}/loss"
        run.findings.compare(key, run.metrics.get(key), part.loss, f"from {keys.PREDICTIONS}", ROUNDING)


def _stored_loss(run: SplitRecord, name: str, part: PartPredictions) -> tuple[float, str]:
    """The loss of a part and where it is from: that of `val` and `test` was summed up on the device."""
    if name == "cross_val":
        return part.loss, keys.PREDICTIONS
    stored = run.confusions.get("loss", {})  # older files have none
    return stored.get(name, run.metrics.get(f"{SCORED[name]}/loss")), keys.CONFUSION


def _check_checkpoint(run: SplitRecord) -> None:
    """Compare the checkpoint's own entries, and the cost of its model, with the database."""
    checkpoint, card, _ = run.rebuilt
    source = f"in {keys.CHECKPOINT}"
    if checkpoint.model != run.params["model"]:
        run.findings.differ(f"model is {run.params['model']} in the database, {checkpoint.model} {source}")
    for key, derived in (("best_epoch", checkpoint.epoch), ("best_val/loss", checkpoint.score)):
        run.findings.compare(key, run.metrics.get(key), derived, source)
    for key, derived in (("parameters", card.parameters), ("macs", card.macs)):
        run.findings.compare(key, run.params[key], derived, f"of the model {source}")
    # in a tuned split another trial may score a half (`check_choice`)
    if checkpoint.of_halves and "tune" not in run.params and all("half_losses" in entry for entry in run.history):
        stored = [checkpoint.epoch if each is None else each[0] for each in checkpoint.of_halves]
        if stored != list(results.epochs_of_halves(run.history)):
            run.findings.differ(
                f"the epochs of the halves {source} are not those with the lowest losses in {keys.HISTORY}"
            )


def _check_protocol(run: SplitRecord, material: Material) -> None:
    """Compare the split with the one that the protocol draws from the data."""
    if run.tags["task"] != material.task.name:
        run.findings.differ(f"it is tagged as a run of {run.tags['task']}")
    for part, indices in material.split(run)._asdict().items():
        name, stored = f"{part} in {keys.SPLIT}", getattr(run.split, part)
        run.findings.compare_arrays(name, stored, indices, "that the protocol draws from the data")


def _check_leaks(run: SplitRecord, material: Material) -> None:
    """Count the near duplicates across the split's parts again."""
    if not material.holds(run.split):
        run.findings.differ(f"{keys.SPLIT} has indices that are no images")
        return
    for key, derived in results.count_leaks(material.groups, run.split).items():
        run.findings.compare(key, run.metrics.get(key), derived, "from the images")


def _check_model(run: SplitRecord, material: Material) -> None:
    """Evaluate the checkpoint's model again, and compare its scores and every prediction."""
    checkpoint, split, findings = run.rebuilt.checkpoint, run.split, run.findings
    if run.confusions["classes"] != list(material.data.classes):
        findings.differ(f"the classes in {keys.CONFUSION} are not those of the data")
    freeze = bool(run.params.get("freeze")) and run.params["model"] not in keys.BASELINES
    if checkpoint.arguments != model_arguments(material.data, freeze):
        raise StoreError(f"the model in {keys.CHECKPOINT} is for other images or classes than those of the data")
    if not material.holds(split):
        return  # as the check before said
    moments, source = material.images.normalisation(split.train), "that follow from the training images"
    if text := run.params.get("normalisation"):
        moments, source = parse_normalisation(text), "of the param normalisation"
    for name, moment in zip(("mean", "std"), moments, strict=True):
        stored = getattr(checkpoint, name)
        findings.compare_arrays(f"{name} in {keys.CHECKPOINT}", stored.numpy(), moment.cpu().numpy(), source)
    exact = findings.exact = _same_bits(run, material.device)
    findings.predictions = len(split.val) + len(split.test)
    derived = _predict(run, material)
    source = f"from {keys.CHECKPOINT}"
    for name, prefix in SCORED.items():
        evaluation = derived.evaluations.get(name)
        for score, value in evaluation.scores().items() if evaluation else ():
            if exact or score == "loss":
                key = f"{prefix}/{score}"
                findings.compare(key, run.metrics.get(key), value, source, 0 if exact else LOSS_TOLERANCE)
    stored, arrays = run.predictions.arrays(), derived.predictions.arrays()
    for name in stored.keys() - arrays.keys():
        findings.differ(f"{name} in {keys.PREDICTIONS} does not follow {source}")
    for name, array in arrays.items():
        if name not in stored:
            continue  # of an earlier version
        # no tolerance is set for probabilities: the loss speaks for them
        agreement = 1 if exact else {"pred": AGREEMENT, "prob": 0, "probs": 0}.get(name.rpartition("_")[2], 1)
        findings.compare_arrays(f"{name} in {keys.PREDICTIONS}", stored[name], array, source, agreement)


class _Derived(NamedTuple):
    """The predictions of the models of a checkpoint for a run's images."""

    evaluations: dict[str, Evaluation | None]  # of the parts in `SCORED`
    predictions: Predictions


def _predict(run: SplitRecord, material: Material) -> _Derived:
    """Evaluate as the run did: its precision, its normalisation, its number of threads."""
    checkpoint, _, model = run.rebuilt
    threads = torch.get_num_threads()
    mean, std = checkpoint.mean.to(material.device), checkpoint.std.to(material.device)

    def evaluate_on(indices: np.ndarray, weights: Mapping[str, Tensor]) -> Evaluation:
        model.load_state_dict(weights)
        return evaluate(model, material.images, indices, mean, std, run.params["precision"]).on_host()

    try:
        if _has_threads(run.params["threads"]):
            torch.set_num_threads(run.params["threads"])
        layout = hardware.layout_of(material.device)
        model.to(device=material.device, memory_format=layout)  # type: ignore[call-overload]
        of_halves = [each and evaluate_on(run.split.val, each[1]) for each in checkpoint.of_halves]
        evaluations = {
            part: evaluate_on(indices, checkpoint.state_dict) if len(indices) else None
            for part, indices in (("val", run.split.val), ("test", run.split.test))
        }
    except RuntimeError as error:  # images of another size, a device without memory
        raise StoreError(f"its model cannot be evaluated: {' '.join(str(error).split())[:200]}") from None
    finally:
        torch.set_num_threads(threads)
    labels = material.data.labels
    half = datasets.halve(run.split.val, labels, material.groups) if checkpoint.of_halves else None
    predictions = results.predictions_of(run.split, labels, half, evaluations, of_halves)
    if predictions.cross_val is not None:
        evaluations["cross_val"] = evaluation_of(predictions.cross_val)
    return _Derived(evaluations, predictions)


def _has_threads(count: int) -> bool:
    return 1 <= count <= (os.cpu_count() or 1)


def _same_bits(run: SplitRecord, device: str) -> bool:
    """Whether a run's model must give the same bits on a device: a GPU's libraries promise none."""
    return (
        run.params["device"] == device == "cpu"
        and _has_threads(run.params["threads"])
        and run.tags["hardware"] == hardware.describe_device(device)
        and run.tags["versions"] == fingerprint.versions()
    )


CHECKS = (_check_split, _check_epochs, _check_final_metrics, _check_predictions, _check_checkpoint)
DATA_CHECKS = (_check_protocol, _check_leaks, _check_model)
