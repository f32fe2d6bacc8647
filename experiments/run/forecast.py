"""How long a run will take: one step and a part of one evaluation of each model, measured here and now."""

import dataclasses
import time

import numpy as np
import torch

import models
from datasets import ImageData, Split
from experiments.jobs.job import model_arguments
from experiments.run.plan import ModelPlan, Plan
from experiments.training.evaluation import evaluate
from experiments.training.fit import fit
from experiments.training.images import DeviceImages
from experiments.training.state import TrainingState, initialise

EVALUATED = 512  # images, at most, of which the time of a validation part follows


def longest_seconds(plan: Plan) -> float | None:
    """Seconds of all trainings of a plan if none stops by patience; None on a cluster, whose machines may differ."""
    if plan.cluster is not None:
        return None
    torch.set_num_threads(plan.concurrency.threads)
    networks = [model for model in plan.models if model.card.name not in models.BASELINES]
    epochs = [len(each.jobs) * plan.request.longest_epochs(each.config) for each in networks]
    total = sum(count * epoch_seconds(plan, each) for count, each in zip(epochs, networks, strict=True))
    return total / min(plan.concurrency.at_once, max(1, len(plan.jobs)))


def in_words(seconds: float) -> str:
    """A time to one or two digits, in the unit that people would use."""
    for unit, size in (("hour", 3600), ("minute", 60)):
        if seconds >= 1.5 * size:
            number = seconds / size
            return f"{number:.2g} {unit}s" if number < 10 else f"{number:,.0f} {unit}s"
    return f"{max(seconds, 1):.0f} seconds"


def epoch_seconds(plan: Plan, model: ModelPlan) -> float:
    """Seconds of an epoch, training and validation, on the first split."""
    split, config = model.jobs[0].split, dataclasses.replace(model.config, epochs=2, patience=2)
    train, val = split.train[: config.batch_size], split.val[:EVALUATED]
    few = _images_of(plan.data, np.concatenate([train, val]))
    rows = np.arange(len(train) + len(val))
    part = Split(rows[: len(train)], rows[len(train) :], rows[:0])
    images = DeviceImages.load(few, config.device, plan.request.device_memory)
    arguments = model_arguments(few, config.freeze)
    network = initialise(lambda: models.build(model.card.name, **arguments), 0, config.device)
    *_, second = fit(TrainingState(network, config, 0), images, part)  # the first epoch prepares much
    validation = _evaluation_seconds(network, images, part, config.precision)
    training = max(second.seconds - validation, 0.0)
    return training * len(split.train) / len(train) + validation * len(split.val) / len(val)


def _images_of(data: ImageData, rows: np.ndarray) -> ImageData:
    return dataclasses.replace(data, images=data.images[rows], labels=data.labels[rows])


def _evaluation_seconds(network: torch.nn.Module, images: DeviceImages, split: Split, precision: str) -> float:
    mean, std = images.normalisation(split.train)
    started = time.perf_counter()
    evaluate(network, images, split.val, mean, std, precision)  # it reads the counts back, and so waits for a GPU
    return time.perf_counter() - started
