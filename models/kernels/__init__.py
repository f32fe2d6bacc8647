"""Fused kernels for a CPU: what stands between two matrix products, in as few passes as can be.

A processor with matrix instructions multiplies faster than it can fetch. Between two convolutions stand BatchNorm, an
activation, perhaps a 2x2 max pool, a sum or squeeze-and-excitation: a few operations on each number, for which each
number has to come from memory and go back. A step of such a network takes as long as its passes over memory, and the
way to a faster one is fewer of them. Library by library, a layer is

    z = convolution(x)                           write z
    mean, variance of z                          read z
    y = activation(scale * z + shift)            read z, write y
    d = g * activation'(scale * z + shift)       read g, z, write d       the way back, g the gradient of y
    sums of d and of d * (z - mean)              read d, z
    gz = p * d + q - r * z                       read d, z, write gz

What cannot be saved: BatchNorm's factors depend on all of z, and its gradient on two sums over all of d, so nothing
that needs them can start before z, or g, has been seen to its end. There are two passes forward and two backward, and
these kernels take no more: each applies everything pointwise while a number is in a register. d is never written; it
is computed twice from g and z, which are read anyway. Where a pool follows, y has a quarter of the pixels and g too.

In an inverted bottleneck (MBConv) the tensors between its three convolutions have 4 to 6 times the channels of those at
its ends. The kernels of `depthwise` and `excitation` and the order of work in `functions` save most of their passes:

- The depthwise convolution takes the raw output of the 1x1 convolution before it, and applies BatchNorm and SiLU to a
  map of 16 channels as it unpacks it into the cache; statistics of what it writes are taken on the way.
- Images go through in chunks that fit the second cache. What the 1x1 convolutions take and give lives there only: the
  excited map and its gradient are computed again rather than written and read.
- The derivatives of squeeze-and-excitation need sums over the map before the factors are differentiated. They are
  linear in what is unknown, so five sums, taken in one pass, are enough for them and for BatchNorm's two.

Forward, z1 and z2 are written once each, z1 is read once and z2 twice; backward, z2 and z1 are read twice each, and one
gradient is written and read. That is 11 passes over memory for expanded tensors; layer by layer they are about 40.

In evaluation oneDNN has bias and activation in the convolution already. What is left is the first layer (`stem`), whose
output is the largest map of a network and is never written, and pools and sums after other convolutions.

Sums are taken for each image, as differences from its first pixel, and joined in float64. They are more exact than
those of torch's BatchNorm, depend on no other image, and so not on the number of threads.

The rule: kernels are used if numba (0.62 or later) and llvmlite can be imported, the processor has AVX2 or NEON, the
threads of torch can be reached (on Linux; not on macOS and Windows), the precision is fp32 or bf16, and a layer is one
of the blocks of this package whose channels fill vectors of 16 (alone, or two pixels together). Everything else takes
torch's operations, as in `models.execution`. `NUMBA_DISABLE_JIT=1` turns kernels off. They are compiled when they are
first needed, and kept (`launch`).

`vectors` has the operations on 16 numbers at once; `launch` compiles and runs; `normalisation`, `depthwise`,
`excitation` and `stem` have the kernels; `functions` are the layers, forward and backward.
"""

import ctypes
import functools
import importlib.util
import os
import platform
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch

OLDEST = (0, 62)  # of numba: earlier ones refuse the kernels in bf16 (findings/llvmlite_bf16_intrinsic.sh)


@functools.cache
def why_not() -> str:
    """Say why kernels are not used on this machine; empty if they are."""
    for package in ("numba", "llvmlite"):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
    if tuple(map(int, metadata.version("numba").split(".")[:2])) < OLDEST:
        return f"numba {metadata.version('numba')} is older than {'.'.join(map(str, OLDEST))}"
    if os.environ.get("NUMBA_DISABLE_JIT", "0") != "0":
        return "NUMBA_DISABLE_JIT is set"
    on_arm = platform.machine().lower() in ("arm64", "aarch64")  # which always has NEON
    if torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "NO AVX") and not on_arm:
        return "the processor has neither AVX2 nor NEON"
    if openmp() is None:
        return "torch's threads cannot be reached on this system"
    try:
        from models.kernels import functions  # noqa: F401 - all kernels
    except Exception as error:  # noqa: BLE001 - of a numba that does not fit Python, NumPy or the system: any
        return f"numba cannot be imported ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    return ""


@functools.cache
def openmp() -> Callable[..., None] | None:
    """The function of torch's OpenMP library that runs a function in all threads; None where it cannot be had."""
    if sys.platform != "linux":  # other libraries, other names
        return None
    try:  # the library knows what it was linked to
        function = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")).GOMP_parallel
    except (OSError, AttributeError):
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    function.restype = None
    return function


def version() -> str:
    """What compiles the kernels, for the record; empty if they are not used."""
    return "" if why_not() else f"numba {metadata.version('numba')}"
