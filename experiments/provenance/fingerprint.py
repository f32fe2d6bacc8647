"""Fingerprints: digests of all that decides a result; and the commit and the versions beside them."""

import hashlib
import json
import platform
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from datasets import Split
from experiments.provenance import definitions
from experiments.provenance.definitions import Definition
from experiments.provenance.sources import ROOT
from models import BASELINES, kernels
from tracking.keys import has_open_end

SHARED = (  # train and score every model; splits and images have digests of their own
    Definition("experiments.training.fit", "fit"),
    Definition("experiments.training.evaluation", "evaluate"),
    Definition("experiments.training.evaluation", "evaluate_test"),
    Definition("experiments.training.images", "DeviceImages"),
    Definition("experiments.training.state", "TrainingState"),
    Definition("experiments.training.state", "initialise"),
    Definition("experiments.training.state", "seed_of_split"),
    Definition("experiments.training.hardware", "prepare"),
    Definition("models.layers", "compute_wide_layers_in_fp32"),
)
LIBRARY = Definition("models.library", "build")  # the library's own source counts by its version
BASELINE = Definition("experiments.training.baselines", "fit_baseline")


class Source(NamedTuple):
    """The source behind a model's results: its digest, as `shared-own`, and the files it stands in."""

    digest: str
    files: frozenset[str]


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


def source_of(model: nn.Module) -> Source:
    """Digest the source behind a model's results: of training and evaluation, and of the model's own layers.

    Of a library's layers name and version of the library count, and the name of the architecture.
    """
    kinds = {base for module in model.modules() for base in type(module).__mro__}
    roots = [
        Definition(kind.__module__, kind.__qualname__.split(".")[0])
        for kind in kinds
        if definitions.is_ours(kind.__module__)
    ]
    origins = sorted(str(module.origin) for module in model.modules() if hasattr(module, "origin"))  # of a library
    if not roots and not origins:
        raise LookupError(f"{type(model).__name__} is not defined in this repository")
    own, files = definitions.digest([*roots, *([LIBRARY] if origins else [])])
    if origins:
        own = digest([own, *origins])
    if isinstance(model, tuple(BASELINES.values())):
        fitting, more = definitions.digest([BASELINE], _is_boundary)
        own, files = digest([own, fitting]), files | more
    shared, shared_files = _shared()
    return Source(f"{shared[:32]}-{own[:32]}", frozenset(shared_files | files))


@cache
def _shared() -> tuple[str, set[str]]:
    """Digest of `SHARED`. Layers count by name: those of a model are in its own digest."""
    return definitions.digest(SHARED, _is_boundary)


def _is_boundary(definition: Definition) -> bool:
    """Whether a definition counts by name: layers are in their models' own digests; of tracking, names decide."""
    value = getattr(sys.modules.get(definition.module), definition.name, None)
    is_layer = definition.module.startswith("models.") and isinstance(value, type) and issubclass(value, nn.Module)
    return is_layer or definition.module.startswith("tracking.")


def configuration_fingerprint(params: Mapping[str, Any], dataset_digest: str, source: str) -> str:
    """Digest of everything that a parent's splits share; which of several GPUs computed stays out of it.

    So does the number of holdouts: the first ones stay as they are when there are more.
    """
    settings = {**params, "device": str(params["device"]).split(":")[0]}
    if has_open_end(str(params["protocol"])):
        del settings["n_splits"]
    return digest([settings, dataset_digest, source])


def earlier_configuration_fingerprint(params: Mapping[str, Any], dataset_digest: str, source: str) -> str:
    """The digest of earlier versions, which took in the number of holdouts."""
    return digest([{**params, "device": str(params["device"]).split(":")[0]}, dataset_digest, source])


def split_fingerprint(configuration: str, number: int, split_hash: str, replicate: int = 0) -> str:
    """Digest of everything that decides a run's result; `configuration` is its parent's."""
    return digest([configuration, number, split_hash, *([replicate] if replicate else [])])


def trial_fingerprint(split: str, number: int) -> str:
    """Digest of everything that decides a trial; `split` is that of a run with the trial's own settings."""
    return digest([split, "trial", number])


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
    """Name the versions of the libraries that compute."""
    # as they are installed: importing the last two takes seconds, and not every run needs them
    installed = [f"{name} {metadata.version(name)}" for name in ("torchvision", "scikit-learn")]
    compiler = filter(None, [kernels.version()])  # its kernels decide the last bits
    return ", ".join([f"Python {platform.python_version()}", f"torch {torch.__version__}", *installed, *compiler])
