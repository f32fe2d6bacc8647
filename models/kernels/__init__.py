"""Fused kernels for training on a CPU: what stands between two matrix products, in as few passes as can be."""

import functools
import importlib.util

import torch


@functools.cache
def why_not() -> str:
    """Say why the kernels are not used on this machine; empty if they are."""
    for package in ("numba", "llvmlite"):
        try:
            if importlib.util.find_spec(package) is None:
                return f"{package} is not installed"
        except ValueError:
            return f"{package} cannot be imported"
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if not any(capabilities.get(name) for name in ("avx2", "neon", "asimd")):
        return "the processor has neither AVX2 nor NEON"
    return ""
