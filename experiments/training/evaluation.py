"""Evaluation: the one way in which scores are computed, after each epoch and by `verify`."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from datasets import Split
from experiments.training import confusion, hardware
from experiments.training.images import DeviceImages, Part
from models.execution.inference import Inference, close_calls
from tracking.scores import SCORES

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# pixels and images in a batch of evaluation: on a CPU they fit the cache, but share a convolution's weights; on a GPU
# they fill the card
EVALUATION_BATCH = {"cpu": (256 * 28 * 28, 32), "cuda": (4096 * 28 * 28, 128)}


@dataclass(frozen=True)
class Evaluation:
    """A model's results on some images."""

    loss: float  # mean cross-entropy, in nats
    confusion: np.ndarray  # int64, shape (K, K): counts; rows are true classes
    predicted: Tensor  # int64, shape (n,), on the device, in the order of the indices
    log_probs: Tensor  # float32, shape (n, K): log-probabilities of all classes

    @property
    def probability(self) -> Tensor:
        """Probability of the predicted class: float32, shape (n,)."""
        return self.log_probs.gather(1, self.predicted[:, None])[:, 0].exp()

    def scores(self) -> dict[str, float]:
        """The scores by name, as they are registered."""
        return {name: SCORERS[name](self) for name in SCORES}

    def on_host(self) -> "Evaluation":
        """The same, with all tensors in the host's memory."""
        return Evaluation(self.loss, self.confusion, self.predicted.cpu(), self.log_probs.cpu())


SCORERS: dict[str, Callable[[Evaluation], float]] = {
    "accuracy": lambda evaluation: confusion.accuracy(evaluation.confusion),
    "f1_micro": lambda evaluation: confusion.f1_micro(evaluation.confusion),
    "f1_macro": lambda evaluation: confusion.f1_macro(evaluation.confusion),
    "loss": lambda evaluation: evaluation.loss,
}
if missing := SCORES.keys() ^ SCORERS.keys():
    raise TypeError(f"scores that are registered but not computed, or the other way round: {', '.join(missing)}")


@dataclass(frozen=True)
class Pass:
    """An evaluation before it is read back: sum of losses, flat confusion counts, predictions, log-probabilities.

    All are on the `exact_device`.
    """

    loss: Tensor
    confusion: Tensor
    predicted: Tensor
    log_probs: Tensor

    def clone(self) -> "Pass":
        """Copy of all four."""
        return Pass(self.loss.clone(), self.confusion.clone(), self.predicted.clone(), self.log_probs.clone())


@torch.inference_mode()
def evaluate_on_device(model: nn.Module, part: Part) -> Pass:
    """One pass over a part; in a precision below fp32 the images with the closest calls are seen again in fp32.

    In bf16 alone 0.1 to 0.6 % of the predictions differ from those in fp32: of images whose two likeliest classes are
    nearly as likely. How many are seen again is a fixed share, so nothing waits for the device.
    """
    pixels, images = EVALUATION_BATCH.get(part.labels.device.type, EVALUATION_BATCH["cpu"])
    size = max(images, pixels // part.size**2)
    network = Inference(model, part.dtype)
    logits = torch.cat([network(x).float() for x in part.slices(size)])  # (n, K)
    if part.dtype != torch.float32:
        network = Inference(model, torch.float32)
        first, second = logits.topk(2).values.unbind(1)
        closest = (first - second).topk(math.ceil(len(part) / close_calls(model)), largest=False).indices
        for positions in torch.split(closest, size):
            logits[positions] = network(part.exact(positions))
    exact = hardware.exact_device(logits.device)
    y, classes = part.labels.to(exact), logits.shape[1]
    log_probs = logits.to(exact).log_softmax(1)
    predicted = log_probs.argmax(1)
    loss = -log_probs.gather(1, y[:, None]).sum(dtype=torch.float64)
    # not bincount, which waits for the device to learn its output's size
    confusion = torch.zeros(classes * classes, dtype=torch.int64, device=y.device)
    confusion.scatter_add_(0, y * classes + predicted, torch.ones_like(y))
    return Pass(loss, confusion, predicted, log_probs)


def read_back(totals: Tensor, result: Pass) -> tuple[list[float], Evaluation]:
    """Bring totals, loss and confusion matrix to the host in one copy."""
    numbers = torch.cat([totals, result.loss[None], result.confusion.double()]).tolist()
    *first, loss = numbers[: len(totals) + 1]
    side = math.isqrt(len(result.confusion))
    confusion = np.array(numbers[len(totals) + 1 :], dtype=np.int64).reshape(side, side)
    return first, Evaluation(loss / int(confusion.sum()), confusion, result.predicted, result.log_probs)


def evaluate(
    model: nn.Module, data: DeviceImages, indices: np.ndarray, mean: Tensor, std: Tensor, precision: str
) -> Evaluation:
    """Evaluate a model as `fit` does after each epoch: same batches, same bits.

    The precision is `precision`, with BatchNorm folded into the convolutions and the closest calls in fp32.

    Parameters
    ----------
    model : nn.Module
        On the device of `data`, in its layout (in another one the last bits differ).
    data : DeviceImages
    indices : numpy.ndarray of int64, shape (n,)
    mean, std : Tensor of float32, shape (channels,)
        Of the model's training part (`DeviceImages.normalisation`).
    precision : str
        fp32, bf16 or fp16.
    """
    result = evaluate_on_device(model, Part(data, indices, mean, std, DTYPES[precision]))
    return read_back(torch.zeros(0, dtype=torch.float64, device=result.loss.device), result)[1]


def evaluate_test(
    model: nn.Module, data: DeviceImages, split: Split, mean: Tensor, std: Tensor, precision: str
) -> Evaluation | None:
    """Evaluate a model on the test part of a split; None if that is empty. Parameters are those of `evaluate`."""
    return evaluate(model, data, split.test, mean, std, precision).on_host() if len(split.test) else None
