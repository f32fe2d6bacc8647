"""Disturbances of training in processes that a test does not start itself: a gate to wait at, and a signal to die of.

`DISTURB` in the environment describes them in JSON: `gate`, a folder, and `after`, the epoch after which each training
enters a file named by its process and waits for the file `open`; and `die`, the signal of each split's worker. The
file imports the standard library only, because each worker imports it at its start.
"""

import importlib.abc
import importlib.machinery
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

MODULE = "experiments.jobs.worker"
OPEN = "open"


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _disturb(module, json.loads(os.environ["DISTURB"]))

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Disturb the worker module as soon as it is imported."""
    if "DISTURB" in os.environ:
        sys.meta_path.insert(0, _Finder())


def _disturb(worker: Any, settings: dict[str, Any]) -> None:
    if "gate" in settings:
        worker.fit = _gated(worker.fit, Path(settings["gate"]), settings["after"])
    if "die" in settings:
        worker.Worker._train = _deadly(worker.Worker._train, settings["die"])


def _gated(fit: Any, gate: Path, after: int) -> Any:
    def gated(*arguments: Any) -> Iterator[Any]:
        for record in fit(*arguments):
            yield record  # its epoch has been saved and logged, if that was due, when the next one is asked for
            if record.epoch == after and not (gate / OPEN).exists():
                (gate / str(os.getpid())).touch()
                while not (gate / OPEN).exists():
                    time.sleep(0.02)

    return gated


def _deadly(train: Any, signals: dict[str, str]) -> Any:
    def deadly(self: Any, job: Any, claimed: Any) -> Any:
        if name := signals.get(str(job.number)):
            os.kill(os.getpid(), getattr(signal, name))
        return train(self, job, claimed)

    return deadly
