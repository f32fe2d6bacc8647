"""The state of a training between two epochs, and the gradients of a batch."""

import contextlib
import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from experiments.training import hardware
from experiments.training.cross_fitting import SCORES_HALF, WHOLE, Snapshot, by_place
from experiments.training.cuda_graphs import RecordedGradients, RecordedValidation
from experiments.training.evaluation import DTYPES, Evaluation, Pass, evaluate_on_device
from experiments.training.images import DeviceImages, Part
from models.execution.training import Training
from tracking.settings import TrainingConfig

Network = TypeVar("Network", bound=nn.Module)


class AdamW(torch.optim.AdamW):
    """AdamW (Loshchilov and Hutter 2019) without torch's compiler, which torch's methods import to keep it off: 2 s."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))
    add_param_group = inspect.unwrap(torch.optim.AdamW.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.AdamW.zero_grad)
    state_dict = inspect.unwrap(torch.optim.AdamW.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.AdamW.load_state_dict)


def seed_of_split(train_seed: int, number: int, replicate: int = 0) -> int:
    """Seed of weights, batches and augmentation of one split; all models share it, so they see the same batches."""
    # the first replicate has the seed of a split that is trained once
    return int(np.random.SeedSequence([train_seed, number, replicate][: 3 if replicate else 2]).generate_state(1)[0])


def initialise(build: Callable[[], Network], seed: int, device: str) -> Network:
    """Build a model whose weights follow from the seed alone, on the device, in its layout."""
    torch.manual_seed(seed)
    layout = hardware.layout_of(device)
    return build().to(device=device, memory_format=layout)  # type: ignore[call-overload,no-any-return]


def clone_state(model: nn.Module) -> dict[str, Tensor]:
    """Copy of the weights and buffers, on their device."""
    return {key: value.clone() for key, value in model.state_dict().items()}


class TrainingState:
    """All that an epoch changes and the next one depends on: a training that goes on from it gives the same bits.

    Parameters
    ----------
    model : nn.Module
        On the device that trains it, in its layout.
    config : TrainingConfig
        Resolved (no `auto`).
    seed : int
        Of batch order, augmentation and dropout.
    """

    def __init__(self, model: nn.Module, config: TrainingConfig, seed: int) -> None:
        self.model = model
        self.config = config
        self.device = next(model.parameters()).device
        self.dtype = DTYPES[config.precision]
        fast = self.device.type == "cpu" and self.dtype != torch.float16
        self._fast = Training(model, self.dtype) if fast else None
        self.recordable = self.device.type == "cuda" and self.dtype != torch.float16
        self._recorded: dict[int, RecordedGradients] = {}  # by size of batch
        self._validation: RecordedValidation | None = None
        self._begin(seed)

    def _begin(self, seed: int) -> None:
        torch.manual_seed(seed)  # dropout draws from the global generator
        config, parameters = self.config, self.model.parameters()
        self.generator = torch.Generator().manual_seed(seed)
        self.optimizer = AdamW(parameters, config.lr, weight_decay=config.weight_decay, fused=True)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, config.epochs)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")
        self.epoch = 0  # epochs done
        # after the first epoch: the best by the whole validation part; those that score half 0 and half 1
        self.chosen: list[Snapshot] = []
        self.lowest = [math.inf] * (1 + len(SCORES_HALF))  # loss that chose each of them

    def restart(self, model: nn.Module, seed: int) -> None:
        """Begin another split with the weights of a model of the same kind; recordings on a GPU stay valid."""
        self.model.load_state_dict(model.state_dict())
        self._begin(seed)

    def logits(self, x: Tensor) -> Tensor:
        """Logits of a batch in training mode: float32, shape (n, K)."""
        if self._fast is not None:
            return self._fast(x).float()
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.model(x).float()  # type: ignore[no-any-return]

    def gradients(self, x: Tensor, y: Tensor) -> Tensor:
        """Compute the gradients of a batch; return sum of losses and count of hits, on the device (float32).

        On a GPU the passes are recorded once for each size of batch, and replayed for all splits. Not so with fp16,
        whose scaler changes between steps, and for a model that cannot be recorded, because its layers wait for the
        device.
        """
        if self.recordable and len(x) not in self._recorded:
            with self._unless_it_waits():
                self._recorded[len(x)] = RecordedGradients(self.compute_gradients, self.model, x, y)
        if not self.recordable:
            return self.compute_gradients(x, y)
        return self._recorded[len(x)](x, y)

    def validation(self, data: DeviceImages, indices: np.ndarray, mean: Tensor, std: Tensor) -> Callable[[], Pass]:
        """Prepare a validation part; return a function that evaluates the model on it, as it is then.

        On a GPU the pass is recorded at its first call and replayed, also for the next split's part if that has as
        many images. A part that is streamed from the host is evaluated batch by batch.
        """
        if not (self.recordable and data.resident):
            part = Part(data, indices, mean, std, self.dtype, keep=True)
            return lambda: evaluate_on_device(self.model, part)
        if self._validation is not None and len(self._validation.part) == len(indices):
            self._validation.part.fill(indices, mean, std)
        else:
            self._validation = RecordedValidation(self.model, Part(data, indices, mean, std, self.dtype, keep=True))

        def evaluate_part() -> Pass:
            assert self._validation is not None
            if self.recordable:
                with self._unless_it_waits():
                    return self._validation()
            return evaluate_on_device(self.model, self._validation.part)

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
            return torch.stack([loss * len(y), (logits.argmax(1) == y).sum()])

    def choose(self, val: Evaluation, half_losses: tuple[float, float]) -> bool:
        """Keep the model as it is now wherever it has the lowest loss so far; return whether it is the best."""
        better = [loss < low for loss, low in zip(by_place(val.loss, half_losses), self.lowest, strict=True)]
        if any(better):
            now = Snapshot(self.epoch, val, clone_state(self.model))
            former = self.chosen or [now] * len(better)
            self.chosen = [now if is_better else kept for is_better, kept in zip(better, former, strict=True)]
            self.lowest = [min(pair) for pair in zip(by_place(val.loss, half_losses), self.lowest, strict=True)]
        return better[WHOLE]

    @property
    def best_epoch(self) -> int:
        """The epoch with the lowest validation loss; 0 before the first."""
        return self.chosen[WHOLE].epoch if self.chosen else 0

    @property
    def is_done(self) -> bool:
        """Whether all epochs are done, or `patience` of them have not lowered the validation loss."""
        return self.epoch >= self.config.epochs or self.epoch - self.best_epoch >= self.config.patience

    def state_dict(self) -> dict[str, Any]:
        """The state for `load_state_dict`: tensors, numbers, and dicts and lists of them."""
        parts = {name: getattr(self, name).state_dict() for name in _STATEFUL}
        generators = {"generator": self.generator.get_state(), "torch": torch.get_rng_state()}
        if self.device.type == "cuda":
            generators["cuda"] = torch.cuda.get_rng_state(self.device)
        elif self.device.type == "mps":
            generators["mps"] = torch.mps.get_rng_state()
        snapshots = {
            each.epoch: {
                "val": {**vars(each.val), "confusion": torch.from_numpy(each.val.confusion)},
                "weights": each.weights,
            }
            for each in self.chosen
        }
        choice = {"snapshots": snapshots, "chosen": [each.epoch for each in self.chosen], "lowest": self.lowest}
        return {**parts, **generators, **choice, "epoch": self.epoch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there; tensors may lie on another device."""
        for name in _STATEFUL:
            getattr(self, name).load_state_dict(state[name])
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["torch"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"], self.device)
        elif self.device.type == "mps":
            torch.mps.set_rng_state(state["mps"])
        snapshots = {}
        for epoch, kept in state["snapshots"].items():
            val = Evaluation(**{**kept["val"], "confusion": kept["val"]["confusion"].numpy()})
            weights = {key: value.to(self.device) for key, value in kept["weights"].items()}
            snapshots[epoch] = Snapshot(epoch, val, weights)
        self.chosen = [snapshots[epoch] for epoch in state["chosen"]]
        self.epoch, self.lowest = state["epoch"], list(state["lowest"])


_STATEFUL = ("model", "optimizer", "schedule", "scaler")  # attributes with a state_dict of their own
