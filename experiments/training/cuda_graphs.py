"""Passes over a network recorded as CUDA graphs, and replayed for all batches and splits."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from experiments.training.evaluation import Pass, evaluate_on_device
from experiments.training.images import Part


class Recording:
    """A function of tensors that stay in their place, as a CUDA graph: a small network's kernels take less time than
    their launches.

    Recording calls the function a few times, and undoes the effect on BatchNorm's running statistics and on the
    generator.
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


class RecordedGradients:
    """Forward and backward pass for one size of batch, recorded."""

    def __init__(self, compute: Callable[[Tensor, Tensor], Tensor], model: nn.Module, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x.clone(memory_format=torch.preserve_format), y.clone()
        self.replay = Recording(lambda: compute(self.x, self.y), model, x.device)
        self.gradients = [(parameter, parameter.grad) for parameter in model.parameters()]

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Replay on another batch; parameters have their gradients then."""
        self.x.copy_(x)
        self.y.copy_(y)
        totals: Tensor = self.replay()
        for parameter, gradient in self.gradients:
            parameter.grad = gradient
        return totals


class RecordedValidation:
    """The evaluation of a part that is resident, recorded when it is first asked for."""

    def __init__(self, model: nn.Module, part: Part) -> None:
        self.model = model
        self.part = part
        self.replay: Recording | None = None

    def __call__(self) -> Pass:
        """Evaluate the model as it is now."""
        if self.replay is None:
            evaluate_part = functools.partial(evaluate_on_device, self.model, self.part)
            self.replay = Recording(evaluate_part, self.model, self.part.labels.device)
        return self.replay().clone()  # type: ignore[no-any-return]
