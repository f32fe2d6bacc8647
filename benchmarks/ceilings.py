"""How close training and evaluation come to the limits of this machine, and where the rest of the time goes.

What      The ceilings: a 3x3 convolution of 128 channels (32x32 pixels, 64 images), in bf16 and fp32, and a copy of
          400 MB. Then one training step and the evaluation of each model, on random images: its multiply-accumulates
          (counted twice, and three times as many in training, though the first layer needs no gradient of its input)
          per second, as a share of the convolution's ceiling. Evaluation is a single one, normalisation included. And
          the profile of each: the share of the time that its kinds of operations take
Time      about 3 minutes on 2 CPU cores

    python benchmarks/ceilings.py
"""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch.nn.functional import conv2d
from torch.profiler import ProfilerActivity, profile

import models
from datasets import ImageData
from experiments import TrainingConfig
from experiments.training import hardware
from experiments.training.evaluation import DTYPES, evaluate
from experiments.training.images import DeviceImages, Part
from experiments.training.state import TrainingState, initialise

WORKS = (  # model, channels, classes, pixels, images of a batch, images evaluated
    *((name, 1, 10, 28, 234, 8192) for name in ("lenet5", "vggnet", "resnetcnn", "seresnet")),
    *(
        (name, 3, 2, 128, 128, 512)
        for name in ("lenet5", "vggnet", "resnetcnn", "efficientnet_lite", "efficientnet_b0")
    ),
)
KINDS = {  # part of an operation's name: its name in the table; the first match counts
    "batch_norm": "BatchNorm",
    "convolution_backward": "convolution, backward",
    "conv": "convolution",  # with the activation, and BatchNorm's second pass, which are done by oneDNN's convolution
    "pool": "pooling",
    "maximum": "pooling",
    "threshold": "activation", "silu": "activation", "tanh": "activation", "clamp": "activation",
    "mm": "matrix product", "linear": "matrix product",
    "adam": "optimizer",
}  # fmt: skip


def best_seconds(function: Callable[[], object], device: str, repeats: int = 7) -> float:
    """The shortest of several times, after two that do not count."""
    times = []
    for _ in range(repeats + 2):
        synchronise(device)
        started = time.perf_counter()
        function()
        synchronise(device)
        times.append(time.perf_counter() - started)
    return min(times[2:])


def synchronise(device: str) -> None:
    """Wait for a GPU."""
    if device != "cpu":
        torch.cuda.synchronize(device)


def convolution_ceiling(dtype: torch.dtype, device: str) -> float:
    """Operations per second of a 3x3 convolution, which is most of the work."""
    x = torch.randn(64, 128, 32, 32).to(device, dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(128, 128, 3, 3).to(device, dtype).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode(), torch.backends.cudnn.flags(benchmark=True):  # its fastest, whatever it takes to find
        return 2 * 64 * 32**2 * 128**2 * 9 / best_seconds(lambda: conv2d(x, weight, padding=1), device)


def copy_ceiling(device: str) -> float:
    """Bytes read and written per second by a copy."""
    x = torch.randn(10**8, device=device)
    y = torch.empty_like(x)
    return 2 * 4e8 / best_seconds(lambda: y.copy_(x), device, 3)


def time_model(
    work: tuple[str, int, int, int, int, int], config: TrainingConfig, ceiling: float
) -> tuple[list[str], Counter[str]]:
    """Cells of a model's row, and the seconds of its training step by kind of operation."""
    name, channels, classes, size, batch, n = work
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (n, size, size, channels)).astype(np.uint8)
    data = ImageData("noise", pixels, np.arange(n) % classes, tuple(map(str, range(classes))), n)
    images = DeviceImages.load(data, config.device)
    everything = np.arange(n)
    mean, std = images.normalisation(everything)
    model = initialise(lambda: models.build(name, channels, classes, size), 0, config.device)
    state = TrainingState(model, config, 0)
    part = Part(images, everything, mean, std, DTYPES[config.precision], keep=True)
    [(x, y)] = part.batches([torch.arange(batch, device=images.device).view(-1, 1)])

    def step() -> None:
        model.train()
        state.gradients(x, y)
        state.optimizer.step()

    macs = models.describe(name, channels, classes, size).macs
    trained = best_seconds(step, config.device)
    evaluated = best_seconds(lambda: evaluate(model, images, everything, mean, std, config.precision), config.device, 3)
    cells = [
        f"{name}, {size} px",
        f"{macs / 1e6:.3g}",
        f"{batch / trained:,.0f}",
        f"{6 * macs * batch / trained / ceiling:.0%}",
    ]
    cells += [f"{n / evaluated:,.0f}", f"{2 * macs * n / evaluated / ceiling:.0%}"]
    return cells, profile_step(step, config.device)


def profiled(function: Callable[[], object], device: str) -> list[tuple[float, Any]]:
    """Call a function; return microseconds of the device and the profiler's event for each kind of its operations."""
    on_cpu = device == "cpu"
    with profile(activities=[ProfilerActivity.CPU if on_cpu else ProfilerActivity.CUDA]) as seen:
        function()
        synchronise(device)
    return [
        (event.self_cpu_time_total if on_cpu else event.self_device_time_total, event) for event in seen.key_averages()
    ]


def profile_step(step: Callable[[], None], device: str) -> Counter[str]:
    """Microseconds of CPU or GPU time by kind of operation."""
    shares: Counter[str] = Counter()
    for spent, event in profiled(step, device):
        key = event.key.lower()
        kind = next((kind for part, kind in KINDS.items() if part in key), "other")
        shares[kind] += spent
    return shares


def main() -> None:
    """Print the ceilings and both tables."""
    parser = argparse.ArgumentParser(description="Measure ceilings and shares of them; see the module's docstring.")
    parser.add_argument("--device", default="auto")
    config = hardware.resolve(TrainingConfig(device=parser.parse_args().device))
    hardware.prepare()
    ceilings = {
        name: convolution_ceiling(DTYPES[name], config.device) for name in dict.fromkeys([config.precision, "fp32"])
    }
    for name, ceiling in ceilings.items():
        print(f"3x3 convolution in {name}: {ceiling / 1e9:,.0f} GFLOP/s")
    print(f"copy: {copy_ceiling(config.device) / 1e9:,.0f} GB/s\n")
    print("| model | M MACs | trained images/s | of the ceiling | evaluated images/s | of the ceiling |")
    print("|---|--:|--:|--:|--:|--:|")
    profiles = {}
    for work in WORKS:
        cells, shares = time_model(work, config, ceilings[config.precision])
        print(f"| {' | '.join(cells)} |", flush=True)
        profiles[cells[0]] = shares
    kinds = [*dict.fromkeys(KINDS.values()), "other"]
    print(f"\n| training step | {' | '.join(kinds)} |\n|---{'|--:' * len(kinds)}|")
    for title, shares in profiles.items():
        print(f"| {title} | {' | '.join(f'{shares[kind] / shares.total():.0%}' for kind in kinds)} |")


if __name__ == "__main__":
    main()
