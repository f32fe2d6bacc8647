"""What a device without float64 and without channels_last needs: Apple's mps, which no test machine has.

Tensors that are described but not computed (torch's FakeTensorMode) can be on a CUDA device that is not there; it
stands in for mps.
"""

import dataclasses
import types
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import models
from datasets import ImageData
from experiments import TrainingConfig
from experiments.jobs.schedule import Concurrency, Load, decide
from experiments.training import hardware
from experiments.training.evaluation import evaluate_on_device
from experiments.training.images import DeviceImages, Part
from experiments.training.state import TrainingState
from tracking import SettingError


@pytest.fixture
def apple(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Mac, as far as it is asked what it has."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 12 * 2**30)
    monkeypatch.setattr(torch.backends.mps, "get_name", lambda: "Apple M4")


def test_mps_is_chosen_where_it_is(apple: None, monkeypatch: pytest.MonkeyPatch) -> None:
    auto = TrainingConfig()
    resolved = hardware.resolve(auto)
    assert (resolved.device, resolved.precision) == ("mps", "fp32")
    assert hardware.resolve(dataclasses.replace(auto, device="cpu")).device == "cpu"
    for precision in ("bf16", "fp16"):
        with pytest.raises(SettingError, match=f"{precision} is not used on mps; choose fp32"):
            hardware.resolve(dataclasses.replace(auto, precision=precision))
    assert hardware.memory_of("mps") == 12 * 2**30 and hardware.describe_device("mps") == "Apple M4"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert hardware.resolve(auto).device == "cuda"
    monkeypatch.undo()
    with pytest.raises(SettingError, match="'mps' is not a device that can be used here; there are auto, cpu"):
        hardware.resolve(dataclasses.replace(auto, device="mps"))


def test_choosing_by_timing_needs_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    timed = TrainingConfig(cudnn_benchmark=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(SettingError, match="--cudnn-benchmark: the device is cpu, which has no cuDNN; leave it out"):
        hardware.resolve(timed)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert hardware.resolve(timed) == dataclasses.replace(timed, device="cuda", precision="bf16")


def test_one_job_has_the_gpu_of_a_mac(apple: None) -> None:
    load = Load(models.describe("lenet5", 1, 10, 28), 256)
    assert decide(None, 2, "mps", [load] * 8) == Concurrency(1, 2, "auto: one job has the GPU")
    assert decide(2, 1, "mps", [load] * 8).at_once == 2


def test_no_memory_on_mps_is_no_memory() -> None:
    said = "MPS backend out of memory (MPS allocated: 9.06 GiB, other allocations: 1.2 MiB, max allowed: 9.07 GiB)"
    assert hardware.is_out_of_memory(RuntimeError(said)) and not hardware.is_out_of_memory(RuntimeError("MPS"))


def test_a_state_keeps_the_generator_of_mps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout draws from it."""
    drawn = [torch.arange(4, dtype=torch.uint8)]
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: drawn[0])
    monkeypatch.setattr(torch.mps, "set_rng_state", drawn.append)
    config = TrainingConfig(device="cpu", precision="fp32")
    states = [TrainingState(models.build("lenet5", 1, 3, 28), config, 0) for _ in range(2)]
    for state in states:
        state.device = types.SimpleNamespace(type="mps")
    states[1].load_state_dict(states[0].state_dict())
    assert torch.equal(drawn[1], drawn[0])


class Watch(TorchDispatchMode):
    """Notes operations whose result the device would not have."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, operation: Any, kinds: Any, arguments: Any = (), options: Any = None) -> Any:
        result = operation(*arguments, **(options or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type == "cuda":
                if tensor.dtype == torch.float64:
                    self.seen.add(f"float64: {operation}")
                if "conv" in str(operation) and tensor.stride(1) == 1 and min(tensor.shape[1:]) > 1:
                    self.seen.add(f"channels_last: {operation}")
        return result


@pytest.mark.parametrize(("name", "channels"), [("lenet5", 1), ("resnetcnn", 1), ("efficientnet_lite", 3)])
def test_nothing_needs_float64_or_channels_last(name: str, channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "memory_of", lambda device: 2**40)
    size = 28 if channels == 1 else 64
    pixels = np.random.default_rng(0).integers(0, 255, (12, size, size, channels), dtype=np.uint8)
    data = ImageData("noise", pixels, np.arange(12) % 3, ("a", "b", "c"), 12)
    config = TrainingConfig(device="cuda", precision="fp32")

    def walk() -> set[str]:
        with FakeTensorMode(allow_non_fake_inputs=True), Watch() as watch:
            images = DeviceImages.load(data, "cuda")
            with torch.device("cuda"):
                model = models.build(name, channels, 3, size)
            state = TrainingState(model, config, 0)
            part = Part(images, np.arange(8), *images.normalisation(np.arange(8)), torch.float32, keep=True)
            for x, _ in part.batches([torch.zeros(8, 4, dtype=torch.int64)], augment=True):
                assert state.logits(x).device.type == "cuda"
            passed = evaluate_on_device(model, part)
            exact = hardware.exact_device(images.device)
            assert {each.device.type for each in vars(passed).values()} == {exact.type}
            assert passed.loss.dtype == torch.float64
        return watch.seen

    assert {each.partition(":")[0] for each in walk()} == {"float64", "channels_last"}  # as CUDA does
    monkeypatch.setattr(hardware, "exact_device", lambda device: torch.device("cpu"))
    monkeypatch.setattr(hardware, "layout_of", lambda device: torch.contiguous_format)
    monkeypatch.setattr("models.execution.walk.UNFUSED", ("cuda",))
    assert not walk()
