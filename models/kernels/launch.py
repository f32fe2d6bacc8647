"""Kernels: compiled when they are first used, kept on disk, and run by torch's own threads.

A kernel is a function of addresses and numbers, made by a factory whose arguments are constants of the compiled code,
such as the size of a number in memory. A launch has a number of items, such as the images of a batch. Each thread takes
the next item until there is none. What an item writes does not depend on the thread, nor on the others: any number of
threads gives the same bits.

torch's operations run on the threads of an OpenMP library, which keep spinning for a while after an operation. A second
pool of threads would compete with them for the cores, so launches use that very library.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import llvmlite
import numba
import torch
from llvmlite import binding
from numba import types
from torch import Tensor

from models.kernels import openmp

FOLDER = Path(__file__).parent
ALIGNMENT = 64  # bytes, of scratch memory


class Kernel:
    """A compiled kernel."""

    def __init__(self, make: Callable[..., Any], constants: tuple[int, ...]) -> None:
        self._compiled = _compile(make, constants)  # the code lives as long as this
        self._entry = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self._compiled.address)

    def launch(self, items: int, *arguments: "int | Tensor | None", scratch: int = 0) -> None:
        """Run the kernel for `items` items, on as many threads as torch's operations use.

        Parameters
        ----------
        arguments : int or Tensor or None
            A tensor counts as the address of its first number, None as 0.
        scratch : int
            Bytes of memory for each thread.
        """
        threads = max(1, min(torch.get_num_threads(), items))
        scratch = -(-scratch // ALIGNMENT) * ALIGNMENT
        room = torch.empty(threads * scratch + ALIGNMENT if scratch else 0, dtype=torch.uint8)
        first = -(-room.data_ptr() // ALIGNMENT) * ALIGNMENT
        numbers = [value.data_ptr() if isinstance(value, Tensor) else value or 0 for value in arguments]
        block = (ctypes.c_int64 * (5 + len(numbers)))(0, items, 0, first, scratch, *numbers)  # see `vectors.take`
        run_in_threads = openmp()
        if threads > 1 and run_in_threads is not None:
            run_in_threads(self._entry, ctypes.addressof(block), threads, 0)
        else:
            self._entry(ctypes.addressof(block))


def kernel(factory: Callable[..., Any]) -> Callable[..., Kernel]:
    """Turn a factory of kernels into a function from its constants to the `Kernel`, compiled at the first call."""
    return functools.cache(lambda *constants: Kernel(factory, constants))


@functools.cache
def _cache_folder() -> Path | None:
    """Return a folder for compiled kernels that can be written: beside their source, or the user's; or None.

    Its name holds a digest of everything that compiled code depends on: numba itself looks at one file only.
    """
    # all files, since a change of a callee elsewhere leaves numba's own cache stale (findings/numba_stale_cache.sh)
    parts = [path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("*.py"))]
    parts += [numba.__version__, llvmlite.__version__, sys.version]
    parts += [binding.get_host_cpu_name(), binding.get_host_cpu_features().flatten()]
    parts += [os.environ.get(name, "") for name in ("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES", "NUMBA_OPT")]
    name = f"kernels-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}"
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "image-classifiers"
    for folder in (FOLDER / "__pycache__" / name, user / name):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError:
            continue
        return folder
    return None


@functools.cache
def _announce(kept: bool) -> None:
    """Say that something is compiled, once in a process."""
    how = "once" if kept else "in every process, since no folder of a cache can be written"
    print(f"compiling kernels for this processor, {how}; this takes about 10 s", file=sys.stderr, flush=True)


def _compile(make: Callable[..., Any], constants: tuple[int, ...]) -> Any:
    """Return a kernel's machine code; of processes that start at once one compiles it and the others wait."""
    folder = _cache_folder()
    if folder is None:
        _announce(kept=False)
        return _compiled(make(*constants), None)
    name = ".".join([*make.__module__.split(".")[-1:], make.__name__, *map(str, constants)])
    done = folder / f"{name}.done"
    with filelock.FileLock(folder / "lock") if not done.exists() else contextlib.nullcontext():
        if not done.exists():
            _announce(kept=True)
        code = _compiled(make(*constants), folder)
        done.touch()
    return code


def _compiled(function: Callable[..., None], folder: Path | None) -> Any:
    before = numba.config.CACHE_DIR  # type: ignore[attr-defined]  # which numba reads when a function is made
    numba.config.CACHE_DIR = str(folder or "")  # type: ignore[attr-defined]
    try:
        return numba.cfunc(types.void(types.int64), cache=folder is not None, error_model="numpy")(function)
    finally:
        numba.config.CACHE_DIR = before  # type: ignore[attr-defined]
