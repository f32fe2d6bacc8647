"""Digests of what decides a result: configuration, data, split, seed and source."""

import ast
import hashlib
import inspect
import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from datasets import Split

ROOT = Path(__file__).resolve().parent.parent
SHARED_SOURCES = (
    "datasets/images.py",
    "datasets/splits.py",
    "experiments/hardware.py",
    "experiments/metrics.py",
    "experiments/training.py",
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
    """Digest of the code behind a result: the files of the model's own modules, of splitting and of training.

    Taken from the syntax trees without docstrings, so that a comment, or a new model in a file of its own,
    changes nothing.
    """
    files = {ROOT / name for name in SHARED_SOURCES}
    for kind in {base for module in model.modules() for base in type(module).__mro__}:
        if kind.__module__.startswith("models."):
            files.add(Path(inspect.getfile(kind)).resolve())
    return digest({path.relative_to(ROOT).as_posix(): _bare_source(path) for path in files})


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
    """Digest of everything that a parent's splits share; `threads` and the GPU's number stay out of it."""
    settings = {key: value for key, value in params.items() if key != "threads"}
    settings["device"] = str(settings["device"]).split(":")[0]
    return digest([settings, dataset_digest, source])


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
