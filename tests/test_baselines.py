"""The baselines: what they fit, that they are scored as networks are, and that their checkpoints hold all of it."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

import models
from datasets import ImageData, Split
from experiments.training.baselines import PENALTIES, fit_baseline
from experiments.training.evaluation import evaluate
from experiments.training.images import DeviceImages
from experiments.training.state import initialise
from tracking import keys


def images(size: int = 16, classes: int = 3, channels: int = 1) -> tuple[ImageData, Split]:
    """Classes that differ in which part of the image is bright, with noise; 60 to train on, 45 each to score."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(classes), 150 // classes).astype(np.int64)
    pixels = rng.normal(100, 60, (len(labels), size, size, channels))
    for row, label in zip(pixels, labels, strict=True):
        row[:, label * size // classes : (label + 1) * size // classes] += 30
    order = rng.permutation(len(labels))
    split = Split(*(np.sort(part) for part in np.split(order, [60, 105])))
    data = ImageData("d", pixels.clip(0, 255).astype(np.uint8), labels, tuple("abcdef"[:classes]), len(labels))
    return data, split


def fitted(name: str, data: ImageData, split: Split, precision: str = "fp32"):
    resident = DeviceImages.load(data, "cpu")
    _, size, _, channels = data.images.shape
    model = initialise(lambda: models.build(name, channels, len(data.classes), size), 0, "cpu")
    record, _ = fit_baseline(name, model, resident, split, precision)
    return model, resident, record


def test_registry_is_that_of_the_keys_and_apart_from_the_networks() -> None:
    assert tuple(models.BASELINES) == keys.BASELINES
    assert not set(models.BASELINES) & set(models.MODELS)


@pytest.mark.parametrize("classes", [2, 3])
def test_majority_is_the_most_frequent_class_of_the_training_part(classes: int) -> None:
    data, split = images(classes=classes)
    kept = split.train[data.labels[split.train] == 1]
    split = split._replace(train=np.sort(np.concatenate([kept, split.train[data.labels[split.train] != 1][::3]])))
    _, _, record = fitted("majority", data, split)
    counts = np.bincount(data.labels[split.train])
    assert record.val.predicted.unique().tolist() == [counts.argmax()]
    assert record.val.probability.numpy() == pytest.approx(counts.max() / counts.sum())
    expected = -np.log(counts[data.labels[split.val]] / counts.sum()).mean()
    assert record.val.loss == pytest.approx(expected, rel=1e-6)
    assert (record.epoch, record.lr, record.improved) == (1, None, True)


@pytest.mark.parametrize(("classes", "size", "channels"), [(2, 64, 3), (3, 16, 1)])
def test_linear_is_scikit_learns_with_the_best_of_the_penalties(classes: int, size: int, channels: int) -> None:
    data, split = images(size, classes, channels)
    model, resident, record = fitted("linear", data, split)
    mean, std = (part.numpy() for part in resident.normalisation(split.train))
    x = (data.images - mean) / std
    if size > 32:
        x = x.reshape(len(x), size // 2, 2, size // 2, 2, channels).mean((2, 4))
    x = x.transpose(0, 3, 1, 2).reshape(len(x), -1)
    losses = []
    for penalty in PENALTIES:
        oracle = LogisticRegression(C=1 / penalty, tol=1e-8, max_iter=10_000).fit(
            x[split.train], data.labels[split.train]
        )
        probabilities = oracle.predict_proba(x[split.val])
        losses.append(-np.log(probabilities[np.arange(len(split.val)), data.labels[split.val]]).mean())
    assert record.val.loss == pytest.approx(min(losses), rel=0.01, abs=0.002)  # tolerance of its optimiser
    assert record.val.scores()["accuracy"] > 1.3 / classes
    assert sum(parameter.numel() for parameter in model.parameters()) == (x.shape[1] + 1) * classes


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", models.BASELINES)
def test_weights_alone_give_the_same_predictions_again(name: str, precision: str) -> None:
    data, split = images()
    model, resident, record = fitted(name, data, split, precision)
    rebuilt = initialise(lambda: models.build(name, 1, 3, 16), 1, "cpu")
    rebuilt.load_state_dict({key: value.clone() for key, value in model.state_dict().items()})
    again = evaluate(rebuilt, resident, split.val, *resident.normalisation(split.train), precision)
    assert torch.equal(again.predicted, record.val.predicted) and torch.equal(again.probability, record.val.probability)
    assert again.loss == record.val.loss


def test_the_test_part_is_not_looked_at() -> None:
    data, split = images()
    changed = data.images.copy()
    changed[split.test] = 255 - changed[split.test]
    other = ImageData("d", changed, data.labels, data.classes, data.n_pool)
    first, second = (fitted("linear", part, split)[0].state_dict() for part in (data, other))
    assert all(torch.equal(first[key], second[key]) for key in first)
