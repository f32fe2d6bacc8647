"""Profile of one epoch of a model: the operations of a processor, or the kernels of a GPU, by their time.

What      one epoch of a task's own training on its first split, validation included, after two that do not count; its
          wall time, the busy time of the device, and its operations
Time      some epochs

    python benchmarks/epoch.py task3 lenet5 --data-dir DIR
"""

import argparse
import dataclasses
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import datasets
import models
from benchmarks.ceilings import profiled
from experiments import task
from experiments.jobs.job import model_arguments
from experiments.training import hardware
from experiments.training.fit import fit
from experiments.training.images import DeviceImages
from experiments.training.state import TrainingState, initialise, seed_of_split
from tracking.commands import script_tasks

SHOWN = 15


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Profile an epoch; see the module's docstring.")
    parser.add_argument("task", choices=script_tasks())
    parser.add_argument("model", choices=models.MODELS)
    parser.add_argument("--data-dir", type=Path, default=os.environ.get("DATA_DIR"))
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    hardware.prepare()
    chosen = task.find(arguments.task)
    config = hardware.resolve(dataclasses.replace(chosen.training, device=arguments.device, epochs=9, patience=9))
    data = datasets.load(chosen.data, arguments.data_dir)
    images = DeviceImages.load(data, config.device)
    seed = seed_of_split(0, 0)
    model = initialise(lambda: models.build(arguments.model, **model_arguments(data)), seed, config.device)
    epochs = fit(TrainingState(model, config, 0), images, datasets.draw_splits(chosen.protocol, data, 0)[0])
    for _ in range(2):
        next(epochs)
    started = time.perf_counter()
    next(epochs)
    plain = time.perf_counter() - started
    events = profiled(lambda: next(epochs), config.device)
    busy = sum(spent for spent, _ in events) / 1e6
    print(f"{arguments.model} on {arguments.task}, {hardware.describe_device(config.device)}, {config.precision}:")
    print(f"an epoch takes {1e3 * plain:.1f} ms; in a profiled one the device is busy for {1e3 * busy:.1f} ms\n")
    print("| operation | calls | ms | share |\n|---|--:|--:|--:|")
    for spent, event in sorted(events, key=lambda item: -item[0])[:SHOWN]:
        print(f"| `{event.key[:70]}` | {event.count} | {spent / 1e3:.2f} | {spent / 1e6 / busy:.0%} |")


if __name__ == "__main__":
    main()
