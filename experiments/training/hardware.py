"""Choice of device and precision, and settings of the process that make training fast."""

import ctypes
import dataclasses
import platform
import sys

import psutil
import torch

from tracking.settings import Precision, SettingError, TrainingConfig


def resolve(config: TrainingConfig) -> TrainingConfig:
    """Replace `auto` in device and precision.

    The rule: a CUDA device if there is one, else Apple's GPU (`mps`), else the CPU. bf16 if the hardware multiplies it
    (CUDA from compute capability 8.0; CPUs with AVX512-BF16 or AMX), else fp16 on a CUDA device and fp32 elsewhere.

    Raises
    ------
    SettingError
        The device is unknown or not there, or lacks the precision.
    """
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    there = ["auto", "cpu"]
    if torch.cuda.is_available():
        there += ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        there.append("mps")
    if name not in there:
        raise SettingError("device", f"{name!r} is not a device that can be used here; there are {', '.join(there)}")
    device = torch.device(name)
    precision = config.precision
    if precision == "auto":
        precision = _best_precision(device)
    if device.type == "mps" and precision != "fp32":
        raise SettingError("precision", f"{precision} is not used on mps; choose fp32, or auto")
    if config.cudnn_benchmark and device.type != "cuda":
        raise SettingError("cudnn_benchmark", f"the device is {device.type}, which has no cuDNN; leave it out")
    return dataclasses.replace(config, device=name, precision=precision)


def _best_precision(device: torch.device) -> Precision:
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    if device.type == "mps":
        return "fp32"
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "fp32"


def prepare() -> None:
    """Set the process up for speed; called once, before the first large tensor.

    On a GPU fp32 means fp32: convolutions would use the shorter TF32 otherwise. cuDNN chooses algorithms by its own
    rule and not by timing them (`benchmark`): that took 3 to 60 seconds a model, and two runs could choose differently.

    glibc gives every large block back to the system when it is freed, and the next one is faulted in page by page
    again: a third of the training time of a small network on a CPU. With these thresholds freed memory is kept for
    the next tensor, at the same peak. Without glibc nothing happens.
    """
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = False
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        mmap_max, top_pad, trim_threshold = -4, -2, -1  # names of malloc.h
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, -1)  # never
        mallopt(top_pad, 64 * 2**20)


def layout_of(device: str | torch.device) -> torch.memory_format:
    """The order of images and weights in memory: channels_last, which is faster, except on mps.

    There BatchNorm's gradients in channels_last are wrong, without an error (github.com/pytorch/pytorch/issues/175189).
    """
    return torch.contiguous_format if torch.device(device).type == "mps" else torch.channels_last


def exact_device(device: torch.device) -> torch.device:
    """Where sums over images are taken in float64: on the device, or on the host if it is mps, which has no float64."""
    return torch.device("cpu") if device.type == "mps" else device


def memory_of(device: str) -> int:
    """All the memory of a device, in bytes."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    if torch.device(device).type == "mps":
        return torch.mps.recommended_max_memory()
    return int(psutil.virtual_memory().total)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether there was no room for a tensor, on a GPU or in the host's memory."""
    said = ("DefaultCPUAllocator", "MPS backend out of memory")
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in said)


def describe_device(device: str) -> str:
    """Name the hardware behind a device, for the record."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    if torch.device(device).type == "mps":
        return torch.backends.mps.get_name()
    return str(torch.cpu.get_capabilities().get("cpu_name", "")) if hasattr(torch.cpu, "get_capabilities") else "CPU"
