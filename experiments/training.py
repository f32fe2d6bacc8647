"""Training and evaluation of one model on one split: `fit` yields one record an epoch and knows of no tracker.

Images are on the device, normalised once a split; a batch is a gather by index. Per epoch the host plans the order (and
the augmentation) with one generator, sends it in one copy, and reads loss and confusion matrix back once. How layers
are computed is chosen in models/execution.py, by device and kind of layer.
"""

import contextlib
import functools
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from datasets import ImageData, Split
from experiments import hardware, metrics
from experiments.config import DEVICE_MEMORY, TrainingConfig
from models.execution import Inference, Training, close_calls
from models.layers import LayerStack

Network = TypeVar("Network", bound=nn.Module)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# pixels and images of a batch of evaluation: what fits the cache, but enough to share a convolution's weights; what
# fills the card
EVALUATION_BATCH = {"cpu": (256 * 28 * 28, 32), "cuda": (4096 * 28 * 28, 128)}


class TrainingDivergedError(Exception):
    """The loss is not finite any more; the message has the epoch and which loss."""


@dataclass(frozen=True)
class DeviceImages:
    """A data set as training and evaluation use it.

    Attributes
    ----------
    pixels : Tensor of uint8, shape (N, height, width, channels)
        On the device; where they are too many for it (`resident` is false), in the host's memory.
    labels : Tensor of int64, shape (N,)
        On the device.
    moments : Tensor of int64, shape (2, N, channels)
        Sum and sum of squares of each image's pixels, from which every split's normalisation follows exactly; on the
        device.
    num_classes : int
    resident : bool
        Whether the device has room for the pixels and for a normalised copy of a split's.
    """

    pixels: Tensor
    labels: Tensor
    moments: Tensor
    num_classes: int
    resident: bool

    @classmethod
    def load(cls, data: ImageData, device: str, memory: float = DEVICE_MEMORY) -> "DeviceImages":
        """Copy a data set to the device, once for all models and splits, unless it takes more than `memory` of it.

        Pixels and their normalised copy (float32 at most) count; 1 is all the memory that the device has.
        """
        resident = 5 * data.images.nbytes <= memory * hardware.memory_of(device)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # a cluster's object store
            pixels = torch.from_numpy(data.images)
        on_gpu = torch.device(device).type == "cuda"
        if resident:
            pixels = pixels.to(device)
        elif on_gpu:
            pixels = pixels.pin_memory()
        moments = []
        for chunk in torch.split(pixels, 256):  # few at a time: int64 is 8 times as large
            x = chunk.to(device).long()
            moments.append(torch.stack([x.sum((1, 2)), x.square().sum((1, 2))]))
        labels = torch.tensor(data.labels, device=device)
        return cls(pixels, labels, torch.cat(moments, dim=1), len(data.classes), resident)

    @property
    def device(self) -> torch.device:
        """Where batches are."""
        return self.labels.device

    def normalisation(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel over the images at `indices`, in units of 0 to 255."""
        rows = torch.from_numpy(indices).to(self.device)
        total, squares = self.moments[:, rows].sum(1).double()
        count = len(indices) * self.pixels.shape[1] * self.pixels.shape[2]
        mean = total / count
        std = (squares / count - mean.square()).clamp_min(0).sqrt()
        return mean.float(), torch.where(std < 1e-6, 1.0, std).float()  # all pixels alike: nothing to scale


@dataclass(frozen=True)
class Evaluation:
    """What a model makes of some images.

    Attributes
    ----------
    loss : float
        Mean cross-entropy, in nats.
    confusion : numpy.ndarray of int64, shape (K, K)
        Counts; rows are true classes, columns predictions.
    predicted : Tensor of int64, shape (n,)
        On the device, in the order of the indices.
    probability : Tensor of float32, shape (n,)
        The model's probability of the predicted class.
    """

    loss: float
    confusion: np.ndarray
    predicted: Tensor
    probability: Tensor

    def scores(self) -> dict[str, float]:
        """The scores by name."""
        return {
            "accuracy": metrics.accuracy(self.confusion),
            "f1_micro": metrics.f1_micro(self.confusion),
            "f1_macro": metrics.f1_macro(self.confusion),
            "loss": self.loss,
        }

    def on_host(self) -> "Evaluation":
        """The same, with all tensors in the host's memory."""
        return Evaluation(self.loss, self.confusion, self.predicted.cpu(), self.probability.cpu())


@dataclass(frozen=True)
class EpochRecord:
    """One epoch of training.

    Attributes
    ----------
    epoch : int
        From 1.
    lr : float or None
        The learning rate of this epoch; None for a baseline, which has none.
    train_loss, train_accuracy : float
        Means over the epoch's batches, each before its own step.
    val : Evaluation
        After the epoch's last step.
    improved : bool
        Whether this is the lowest validation loss so far.
    seconds : float
        Since the last record was handed out: training, validation, and what the caller did with that record.
    """

    epoch: int
    lr: float | None
    train_loss: float
    train_accuracy: float
    val: Evaluation
    improved: bool
    seconds: float


class Part:
    """The images of one part of a split, normalised.

    Parameters
    ----------
    data : DeviceImages
    indices : numpy.ndarray of int64, shape (n,)
        Which images of the data set.
    mean, std : Tensor of float32, shape (channels,)
        Of the training part (`DeviceImages.normalisation`).
    dtype : torch.dtype
        Of the normalised images.
    keep : bool, optional
        Normalise all of them now, which pays where they are asked for in every epoch. Where the data set is not
        resident, batches are normalised as they come all the same.

    Attributes
    ----------
    labels : Tensor of int64, shape (n,)
        On the device.
    """

    def __init__(
        self, data: DeviceImages, indices: np.ndarray, mean: Tensor, std: Tensor, dtype: torch.dtype, keep: bool = False
    ) -> None:
        self.data = data
        self.dtype = dtype
        self.size = data.pixels.shape[1]
        self._arange = torch.arange(self.size, device=data.device)
        self._copies: torch.cuda.Stream | None = None  # beside the one that computes
        if data.device.type == "cuda" and not data.resident:
            self._copies = torch.cuda.Stream(data.device)  # type: ignore[no-untyped-call]
        self.rows = torch.empty(len(indices), dtype=torch.int64, device=data.pixels.device)
        self.labels = torch.empty(len(indices), dtype=torch.int64, device=data.device)
        self._scale, self._shift = torch.empty(2, len(mean), device=data.device)
        self._kept: Tensor | None = None
        if keep and data.resident:
            self._kept = torch.empty(len(indices), *data.pixels.shape[1:], dtype=dtype, device=data.device)
        self.fill(indices, mean, std)

    def fill(self, indices: np.ndarray, mean: Tensor, std: Tensor) -> None:
        """Hold other images, as many as before, in the same place; parameters are those of the class."""
        self.rows.copy_(torch.from_numpy(indices))
        self.labels.copy_(self.data.labels[self.rows.to(self.data.device)])
        self._scale.copy_(1 / std)
        self._shift.copy_(-mean / std)
        if self._kept is not None:
            for kept, rows in zip(torch.split(self._kept, 256), torch.split(self.rows, 256), strict=True):
                kept.copy_(self._normalise(self.data.pixels[rows], self.dtype))

    def __len__(self) -> int:
        return len(self.labels)

    def _normalise(self, pixels: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.addcmul(self._shift, pixels.float(), self._scale).to(dtype)

    def batches(self, plan: Sequence[Tensor], augment: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        """Images (n, C, H, W), in channels_last memory, and labels (n,) of each batch of a plan (see `plan_epoch`).

        Where the data set is not resident, a batch is on its way to a GPU while that still works on the one before:
        whoever asks for batches only queues work, and copies have a queue of their own.
        """
        for batch in plan:
            yield self._images(batch, augment), self.labels[batch[:, 0].to(self.data.device)]

    def slices(self, size: int) -> Iterator[Tensor]:
        """All images in order, at most `size` at a time; without a copy where they are kept."""
        plan = torch.arange(len(self), device=self.rows.device).view(-1, 1)
        if self._kept is not None:
            yield from (chunk.permute(0, 3, 1, 2) for chunk in torch.split(self._kept, size))
        else:
            yield from (images for images, _ in self.batches(torch.split(plan, size)))

    def exact(self, positions: Tensor) -> Tensor:
        """The images at `positions` in float32."""
        pixels = self.data.pixels[self.rows[positions.to(self.rows.device)]].to(self.data.device)
        return self._normalise(pixels, torch.float32).permute(0, 3, 1, 2)

    def _fetch(self, positions: Tensor) -> Tensor:
        """Pixels of a batch, which may still be on their way to the device."""
        pixels = self.data.pixels[self.rows[positions.to(self.rows.device)]]
        if self._copies is None:
            return pixels
        with torch.cuda.stream(self._copies):
            return pixels.pin_memory().to(self.data.device, non_blocking=True)

    def _images(self, batch: Tensor, augment: bool) -> Tensor:
        source, rows = self._kept, batch[:, 0]
        if source is None:
            fetched = self._fetch(rows)
            if self._copies is not None:
                torch.cuda.current_stream(self.data.device).wait_stream(self._copies)
                fetched.record_stream(torch.cuda.current_stream(self.data.device))
            source, rows = self._normalise(fetched, self.dtype), torch.arange(len(batch), device=self.data.device)
            if not augment:
                return source.permute(0, 3, 1, 2)
        if not augment:
            return source[rows].permute(0, 3, 1, 2)
        return self._augmented(source, rows, batch[:, 1:].to(self.data.device)).permute(0, 3, 1, 2)

    def _augmented(self, source: Tensor, rows: Tensor, moves: Tensor) -> Tensor:
        """Shift and flip images at `rows` of (N, H, W, C).

        `moves` has shape (n, 3): downwards, to the right (pixels), and 1 to flip. A shifted crop of an image padded
        by reflection is a gather with reflected coordinates, so nothing is padded.
        """
        down, right, flip = moves[:, :, None].unbind(1)  # (n, 1) each
        y = self._reflect(self._arange + down)
        x = self._reflect(self._arange + right)
        x = torch.where(flip == 1, self.size - 1 - x, x)
        return source[rows[:, None, None], y[:, :, None], x[:, None, :]]

    def _reflect(self, coordinates: Tensor) -> Tensor:
        coordinates = coordinates.abs()
        return self.size - 1 - (self.size - 1 - coordinates).abs()


def plan_epoch(n: int, size: int, augment: bool, generator: torch.Generator) -> Tensor:
    """Draw the order of an epoch and each image's augmentation.

    Returns
    -------
    Tensor of int64, shape (n, 4)
        Position of the image in the training part, shift down, shift right (up to an eighth of `size`), and whether to
        flip.
    """
    plan = torch.zeros(n, 4, dtype=torch.int64)
    plan[:, 0] = torch.randperm(n, generator=generator)
    if augment:
        reach = size // 8
        plan[:, 1:3] = torch.randint(-reach, reach + 1, (n, 2), generator=generator)
        plan[:, 3] = torch.randint(0, 2, (n,), generator=generator)
    return plan


def split_batches(plan: Tensor, batch_size: int) -> list[Tensor]:
    """Cut a plan into as few batches as `batch_size` allows, of equal size to within one image.

    A small last batch would move BatchNorm's running statistics, which evaluation uses, as far as a full one does,
    and BatchNorm cannot train on a single image at all: three images are one batch even where two were asked for.
    """
    count = min(math.ceil(len(plan) / batch_size), max(1, len(plan) // 2))
    return list(torch.tensor_split(plan, count))


def split_seed(seed: int, number: int) -> int:
    """Seed of everything random in one split of a run; all models share it, so they see the same batches."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])


def initialise(build: Callable[[], Network], seed: int, device: str) -> Network:
    """Build a model whose weights follow from the seed alone, on the device, in channels_last memory."""
    torch.manual_seed(seed)
    return build().to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


class TrainingState:
    """All that an epoch changes and the next one depends on: a training that goes on from it gives the same bits.

    Parameters
    ----------
    model : LayerStack
        On the device that trains it, in channels_last memory.
    config : TrainingConfig
        Resolved (no `auto`).
    seed : int
        Of batch order, augmentation, and dropout.

    Attributes
    ----------
    epoch, best_epoch : int
        Epochs done, and the one with the lowest validation loss; 0 before the first.
    best : Evaluation or None
        Of the validation part after the best epoch.
    best_weights : dict of str to Tensor
        Weights and buffers then, on the device.
    """

    def __init__(self, model: LayerStack, config: TrainingConfig, seed: int) -> None:
        self.model = model
        self.config = config
        self.device = next(model.parameters()).device
        self.dtype = DTYPES[config.precision]
        fast = self.device.type == "cpu" and self.dtype != torch.float16
        self._fast = Training(model, self.dtype) if fast else None
        self.recordable = self.device.type == "cuda" and self.dtype != torch.float16
        self._recorded: dict[int, _RecordedGradients] = {}  # by size of batch
        self._validation: _Validation | None = None
        self._begin(seed)

    def _begin(self, seed: int) -> None:
        torch.manual_seed(seed)  # dropout draws from the global generator
        config, parameters = self.config, self.model.parameters()
        self.generator = torch.Generator().manual_seed(seed)
        self.optimizer = torch.optim.AdamW(parameters, config.lr, weight_decay=config.weight_decay, fused=True)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, config.epochs)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")
        self.epoch = self.best_epoch = 0
        self.best: Evaluation | None = None
        self.best_weights = clone_state(self.model)

    def restart(self, model: LayerStack, seed: int) -> None:
        """Begin another split with the weights of a model of the same kind; what was recorded on a GPU stays valid."""
        self.model.load_state_dict(model.state_dict())
        self._begin(seed)

    def logits(self, x: Tensor) -> Tensor:
        """What the model, in training mode, makes of a batch: float32, shape (n, K)."""
        if self._fast is not None:
            return self._fast(x).float()
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.model(x).float()  # type: ignore[no-any-return]

    def gradients(self, x: Tensor, y: Tensor) -> Tensor:
        """Compute the gradients of a batch; return sum of losses and count of hits, on the device (float64).

        On a GPU the passes are recorded once for each size of batch, and replayed for all splits. Not so with fp16,
        whose scaler changes between steps, and for a model that cannot be recorded, because its layers wait for the
        device.
        """
        if self.recordable and len(x) not in self._recorded:
            with self._unless_it_waits():
                self._recorded[len(x)] = _RecordedGradients(self, x, y)
        if not self.recordable:
            return self.compute_gradients(x, y)
        return self._recorded[len(x)](x, y)

    def validation(self, data: DeviceImages, indices: np.ndarray, mean: Tensor, std: Tensor) -> Callable[[], "_Pass"]:
        """Prepare a validation part; what is returned evaluates the model on it, as it is then.

        On a GPU the pass is recorded at its first call and replayed, also for the next split's part where that has as
        many images. A part that is streamed from the host is evaluated batch by batch.
        """
        if not (self.recordable and data.resident):
            part = Part(data, indices, mean, std, self.dtype, keep=True)
            return lambda: _evaluate_on_device(self.model, part)
        if self._validation is not None and len(self._validation.part) == len(indices):
            self._validation.part.fill(indices, mean, std)
        else:
            self._validation = _Validation(self.model, Part(data, indices, mean, std, self.dtype, keep=True))

        def evaluate_part() -> _Pass:
            assert self._validation is not None
            if self.recordable:
                with self._unless_it_waits():
                    return self._validation()
            return _evaluate_on_device(self.model, self._validation.part)

        return evaluate_part

    @contextlib.contextmanager
    def _unless_it_waits(self) -> Iterator[None]:
        """Give recording up for a model whose layers wait for the device; layers are called one by one then."""
        try:
            yield
        except RuntimeError as error:
            if hardware.is_out_of_memory(error):
                raise
            self.recordable = False
            reason = str(error).splitlines()[0]
            warnings.warn(f"the passes are not recorded as CUDA graphs, which is slower: {reason}", stacklevel=2)

    def compute_gradients(self, x: Tensor, y: Tensor) -> Tensor:
        """Compute the gradients of a batch layer by layer."""
        self.optimizer.zero_grad(set_to_none=True)
        logits = self.logits(x)
        loss = cross_entropy(logits, y)
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            return torch.stack([loss * len(y), (logits.argmax(1) == y).sum()]).double()

    @property
    def is_done(self) -> bool:
        """Whether all epochs are done, or `patience` of them have not lowered the validation loss."""
        return self.epoch >= self.config.epochs or self.epoch - self.best_epoch >= self.config.patience

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` takes: tensors, numbers, and dicts and lists of them."""
        parts = {name: getattr(self, name).state_dict() for name in _STATEFUL}
        generators = {"generator": self.generator.get_state(), "torch": torch.get_rng_state()}
        if self.device.type == "cuda":
            generators["cuda"] = torch.cuda.get_rng_state(self.device)
        best = self.best and {**vars(self.best), "confusion": torch.from_numpy(self.best.confusion)}
        epochs = {"epoch": self.epoch, "best_epoch": self.best_epoch}
        return {**parts, **generators, **epochs, "best": best, "best_weights": self.best_weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there; tensors may lie on another device."""
        for name in _STATEFUL:
            getattr(self, name).load_state_dict(state[name])
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["torch"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"], self.device)
        self.epoch, self.best_epoch = state["epoch"], state["best_epoch"]
        best = state["best"]
        self.best = Evaluation(**{**best, "confusion": best["confusion"].numpy()}) if best else None
        self.best_weights = {key: value.to(self.device) for key, value in state["best_weights"].items()}


_STATEFUL = ("model", "optimizer", "schedule", "scaler")  # attributes with a state_dict of their own


def fit(state: TrainingState, data: DeviceImages, split: Split) -> Iterator[EpochRecord]:
    """Train a model on a split and yield one record an epoch; at the end the model has its best epoch's weights.

    AdamW, cosine schedule over `config.epochs`, early stopping on the validation loss. On the CPU the same seed and
    number of threads give the same numbers bit for bit, also where the state was saved between two epochs and
    loaded by another process.

    Parameters
    ----------
    state : TrainingState
        New, or loaded. When a record is handed out it is that of the record's epoch.
    data : DeviceImages
        On the model's device.
    split : Split
        Of which `train` is trained and `val` selected on; `test` is not looked at.

    Yields
    ------
    EpochRecord

    Raises
    ------
    TrainingDivergedError
        A loss is not finite.
    """
    model, config = state.model, state.config
    started = time.perf_counter()
    normalisation = data.normalisation(split.train)
    train = Part(data, split.train, *normalisation, state.dtype, keep=True)
    validate = state.validation(data, split.val, *normalisation)
    while not state.is_done:
        plan = plan_epoch(len(train), train.size, config.augment, state.generator)
        totals = _train_epoch(state, train, plan)
        passed = validate()
        lr = state.optimizer.param_groups[0]["lr"]
        state.schedule.step()
        (train_loss, correct), evaluation = _read_back(totals, passed)  # the epoch's one host sync
        state.epoch += 1
        for name, loss in (("training", train_loss), ("validation", evaluation.loss)):
            if not math.isfinite(loss):
                raise TrainingDivergedError(f"the {name} loss is {loss} in epoch {state.epoch}; a lower --lr may help")
        if improved := state.best is None or evaluation.loss < state.best.loss:
            state.best, state.best_epoch, state.best_weights = evaluation, state.epoch, clone_state(model)
        now = time.perf_counter()
        seconds, started = now - started, now
        n = len(split.train)
        yield EpochRecord(state.epoch, lr, train_loss / n, correct / n, evaluation, improved, seconds)
    model.load_state_dict(state.best_weights)


def clone_state(model: nn.Module) -> dict[str, Tensor]:
    """Copy of the weights and buffers, on their device."""
    return {key: value.clone() for key, value in model.state_dict().items()}


def _train_epoch(state: TrainingState, train: Part, plan: Tensor) -> Tensor:
    """One pass over the plan; returns the sum of losses and the count of hits, on the device (float64)."""
    config = state.config
    totals = torch.zeros(2, dtype=torch.float64, device=state.device)
    state.model.train()
    if train.data.resident:
        plan = plan.to(state.device, non_blocking=True)
    for x, y in train.batches(split_batches(plan, config.batch_size), config.augment):
        totals += state.gradients(x, y)
        state.scaler.step(state.optimizer)
        state.scaler.update()
    return totals


class _Recording:
    """A function of tensors that stay in their place, as a CUDA graph: a small network's kernels take less time than
    their launches.

    Recording calls the function a few times. What that does to BatchNorm's running statistics and to the generator is
    undone.
    """

    def __init__(self, function: Callable[[], Any], model: nn.Module, device: torch.device) -> None:
        buffers = [buffer.clone() for buffer in model.buffers()]
        drawn, drawn_by_host = torch.cuda.get_rng_state(device), torch.get_rng_state()
        try:
            stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                for _ in range(3):  # cuDNN chooses its algorithms, and autograd its buffers
                    function()
            torch.cuda.current_stream(device).wait_stream(stream)
            if not torch.equal(drawn_by_host, torch.get_rng_state()):
                raise RuntimeError("a layer draws numbers on the host, which a recording would repeat for ever")
            self.graph = torch.cuda.CUDAGraph()
            # of this thread alone: another may be busy with a file
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.result = function()
        finally:
            for buffer, kept in zip(model.buffers(), buffers, strict=True):
                buffer.copy_(kept)
            torch.cuda.set_rng_state(drawn, device)
            torch.set_rng_state(drawn_by_host)

    def __call__(self) -> Any:
        """Replay; the result is overwritten by the next call."""
        self.graph.replay()
        return self.result


class _RecordedGradients:
    """Forward and backward pass for one size of batch, recorded."""

    def __init__(self, state: "TrainingState", x: Tensor, y: Tensor) -> None:
        self.x, self.y = x.clone(memory_format=torch.preserve_format), y.clone()
        self.replay = _Recording(lambda: state.compute_gradients(self.x, self.y), state.model, state.device)
        self.gradients = [(parameter, parameter.grad) for parameter in state.model.parameters()]

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Replay on another batch; parameters have their gradients then."""
        self.x.copy_(x)
        self.y.copy_(y)
        totals: Tensor = self.replay()
        for parameter, gradient in self.gradients:
            parameter.grad = gradient
        return totals


class _Validation:
    """The evaluation of a part that is resident, recorded when it is first asked for."""

    def __init__(self, model: LayerStack, part: Part) -> None:
        self.model = model
        self.part = part
        self.replay: _Recording | None = None

    def __call__(self) -> "_Pass":
        if self.replay is None:
            evaluate_part = functools.partial(_evaluate_on_device, self.model, self.part)
            self.replay = _Recording(evaluate_part, self.model, self.part.labels.device)
        return self.replay().clone()  # type: ignore[no-any-return]


@dataclass(frozen=True)
class _Pass:
    """An evaluation before it is read back: sum of losses, flat confusion counts, predictions, probabilities."""

    loss: Tensor
    confusion: Tensor
    predicted: Tensor
    probability: Tensor

    def clone(self) -> "_Pass":
        """Copy of all four."""
        return _Pass(self.loss.clone(), self.confusion.clone(), self.predicted.clone(), self.probability.clone())


@torch.inference_mode()
def _evaluate_on_device(model: LayerStack, part: Part) -> _Pass:
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
    log_probability = logits.log_softmax(1)
    highest, predicted = log_probability.max(1)
    y, classes = part.labels, logits.shape[1]
    loss = -log_probability.gather(1, y[:, None]).sum(dtype=torch.float64)
    # not bincount, which waits for the device to learn its output's size
    confusion = torch.zeros(classes * classes, dtype=torch.int64, device=y.device)
    confusion.scatter_add_(0, y * classes + predicted, torch.ones_like(y))
    return _Pass(loss, confusion, predicted, highest.exp())


def _read_back(totals: Tensor, result: _Pass) -> tuple[list[float], Evaluation]:
    """Bring totals, loss and confusion matrix to the host in one copy."""
    numbers = torch.cat([totals, result.loss[None], result.confusion.double()]).tolist()
    *first, loss = numbers[: len(totals) + 1]
    side = math.isqrt(len(result.confusion))
    confusion = np.array(numbers[len(totals) + 1 :], dtype=np.int64).reshape(side, side)
    return first, Evaluation(loss / int(confusion.sum()), confusion, result.predicted, result.probability)


def evaluate(
    model: LayerStack, data: DeviceImages, indices: np.ndarray, mean: Tensor, std: Tensor, precision: str
) -> Evaluation:
    """Evaluate a model as `fit` does after each epoch: same batches, same bits.

    This is the one way in which scores are computed: in `precision`, with BatchNorm folded into the convolutions, and
    the closest calls in fp32.

    Parameters
    ----------
    model : LayerStack
        On the device of `data`, in channels_last memory (in another layout the last bits differ).
    data : DeviceImages
    indices : numpy.ndarray of int64, shape (n,)
        Which images.
    mean, std : Tensor of float32, shape (channels,)
        Of the model's training part (`DeviceImages.normalisation`).
    precision : str
        fp32, bf16 or fp16.
    """
    result = _evaluate_on_device(model, Part(data, indices, mean, std, DTYPES[precision]))
    return _read_back(torch.zeros(0, dtype=torch.float64, device=data.device), result)[1]
