"""What decides a result: digests of configuration, data, split, seed and source; commit and versions."""

import ast
import hashlib
import inspect
import json
import platform
import subprocess
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from datasets import Split
from models import BASELINES

ROOT = Path(__file__).resolve().parent.parent
SHARED_SOURCES = (
    "datasets/images.py",
    "datasets/splits.py",
    "experiments/hardware.py",
    "experiments/metrics.py",
    "experiments/training.py",
    "models/execution.py",
)


def digest(value: Any) -> str:
    """SHA-256 of a JSON value, with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def split_hash(split: Split) -> str:
    """SHA-256 over the indices of the three parts."""
    parts = hashlib.sha256()
    for indices in (split.train, split.val, split.test):
        parts.update(len(indices).to_bytes(8, "little"))
        parts.update(np.ascontiguousarray(indices, dtype="<i8").data)
    return parts.hexdigest()


def source_digest(model: nn.Module) -> str:
    """Digest of the code behind a result, as `shared-own`: of splitting and training, and of the model's own modules.

    Taken from the syntax trees without docstrings, so that a comment, or a new model in a file of its own,
    changes nothing.
    """
    kinds = {base for module in model.modules() for base in type(module).__mro__}
    own = {Path(inspect.getfile(kind)).resolve() for kind in kinds if kind.__module__.startswith("models.")}
    if isinstance(model, tuple(BASELINES.values())):
        own.add(ROOT / "experiments" / "baselines.py")
    return f"{_digest_files(ROOT / name for name in SHARED_SOURCES)[:32]}-{_digest_files(own)[:32]}"


def _digest_files(paths: Iterable[Path]) -> str:
    return digest({path.relative_to(ROOT).as_posix(): _bare_source(path) for path in paths})


@cache
def _bare_source(path: Path) -> str:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and ast.get_docstring(node) is not None
        ):
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def configuration_fingerprint(params: Mapping[str, Any], dataset_digest: str, source: str) -> str:
    """Digest of everything that a parent's splits share; which of several GPUs computed stays out of it."""
    settings = {**params, "device": str(params["device"]).split(":")[0]}
    return digest([settings, dataset_digest, source])


@cache
def git_commit() -> str:
    """The commit that HEAD points to, with `-dirty` where tracked files differ; empty outside a git checkout."""
    try:
        described = subprocess.run(
            ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return ""
    return described.stdout.strip()


def versions() -> str:
    """Name the versions of what computes."""
    # as they are installed: to import the last two takes seconds, and not every run needs them
    installed = [f"{name} {metadata.version(name)}" for name in ("torchvision", "scikit-learn")]
    return ", ".join([f"Python {platform.python_version()}", f"torch {torch.__version__}", *installed])
