"""How long the tables of a store with many models take, and a report of two tasks, beside an earlier commit.

What      a store with 40 models on 10 splits of 68,600 scored images and 10 classes, drawn at random, as `--jobs` would
          have left it; then `analysis table` and `analysis compare` of the earlier commit and of the working tree, by
          turns. Likewise `analysis report` of two tasks of four models, of the sizes of task 1 and task 3. Seconds are
          those of the processor, which other programs hardly change
Time      about 20 minutes on 1 CPU core, and 2 GB of disk; `--models`, `--splits` and `--images` shorten it

    python benchmarks/many_models.py
"""

import argparse
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

import tracking
from tracking import keys
from tracking.predictions import PartPredictions, Predictions, of_classes
from tracking.scores import METRICS

ROOT = Path(__file__).resolve().parent.parent
EARLIER = "6888448"  # as in benchmarks/targets.py
TRAIN = 1400
SETTINGS = {
    "dataset": "noise", "protocol": "repeated holdout 2:49:49", "leak_free": False, "lr": 1e-3, "weight_decay": 0.01,
    "batch_size": 256, "epochs": 30, "patience": 7, "augment": False, "precision": "fp32", "device": "cpu",
    "threads": 1, "seed": 0, "split_seed": 0, "train_seed": 0,
}  # fmt: skip
TAGS = {"question": "?", "dataset_digest": "0" * 64, "source_digest": "0" * 32, "git_commit": "0" * 40}


def fill(folder: Path, task: str, classes: int, models: int, splits: int, images: int) -> None:
    """Write the runs into the store of a folder: better models have larger numbers, splits share their images."""
    store = tracking.open_store(f"sqlite:///{folder}/mlflow.db", create=True)
    labels = np.random.default_rng(0).integers(0, classes, images + TRAIN)
    difficulty = np.random.default_rng(1).standard_normal((len(labels), classes), np.float32)
    tags = TAGS | {"task": task}
    for number in range(models):
        model = f"model{number:02d}"
        params = SETTINGS | {"model": model, "n_splits": splits, "parameters": 1000 * (number + 1), "macs": 10_000}
        with tracking.parent_run(store, task, model, params, tags | {"fingerprint": f"{task} {model}"}) as parent:
            for split in range(splits):
                index = np.random.default_rng(split).permutation(len(labels))[:images]
                rng = np.random.default_rng([number, split])
                logits = 2 * difficulty[index] + rng.standard_normal((images, classes), np.float32)
                logits += np.float32(3 + 0.05 * number) * (labels[index, None] == np.arange(classes))
                scored = of_classes(*_sorted(index, labels[index], _log_softmax(logits)))
                _log_split(parent, params, tags, split, scored)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def _sorted(index: np.ndarray, *others: np.ndarray) -> tuple[np.ndarray, ...]:
    order = np.argsort(index)
    return index[order], *(other[order] for other in others)


def _log_split(
    parent: tracking.Parent, params: dict[str, object], tags: dict[str, str], split: int, scored: PartPredictions
) -> None:
    """Log a run whose validation and test parts are every other image."""
    val, test = (
        of_classes(scored.index[first::2], scored.true[first::2], scored.log_probs[first::2])  # type: ignore[index]
        for first in (0, 1)
    )
    half = (np.arange(len(val)) % 2).astype(np.uint8)
    sizes = {"split": split, "n_train": TRAIN, "n_val": len(val), "n_test": len(test)}
    tags = tags | {"split_hash": str(split), "fingerprint": f"{tags['task']} {params['model']} {split}"}
    accuracies = {part: float(np.mean(each.true == each.predicted)) for part, each in (("val", val), ("test", test))}
    finals = dict.fromkeys(keys.FINAL_METRICS, 1.0)
    finals |= {key: accuracies["test" if key.startswith("test/") else "val"] for key in METRICS}
    claimed = tracking.claim(parent, f"{params['model']} split {split}", params | sizes, tags)
    with tracking.child_run(parent.store, claimed) as child, tempfile.TemporaryDirectory() as files:
        Predictions(val, test, val, half, np.zeros(2, bool)).write(Path(files) / keys.PREDICTIONS)
        child.log_files(Path(files))
        child.log_epochs([{"epoch": 1, "time": 1, "metrics": dict.fromkeys(keys.EPOCH_METRICS, 1.0)}], wait=True)
        child.log_metrics(finals)


def seconds(source: Path, command: list[str]) -> float:
    """Return the seconds of the processor that a command of the code in a folder takes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    line = [sys.executable, "-m", "analysis", *command]
    done = subprocess.run(line, cwd=source, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(line)} failed in {source}: {done.stderr[-500:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Tables of many models; see the module's docstring.")
    parser.add_argument("--models", type=int, default=40)
    parser.add_argument("--splits", type=int, default=10)
    parser.add_argument("--images", type=int, default=68_600, help="scored images of a split, of both parts")
    parser.add_argument("--commit", default=EARLIER, help=f"to compare with; default: {EARLIER}")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        earlier = Path(folder) / "earlier"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(earlier)], check=True)
        subprocess.run(["git", "-C", str(earlier), "checkout", "--quiet", "--detach", arguments.commit], check=True)
        many, two = Path(folder) / "many", Path(folder) / "two"
        fill(many, "task3", 10, arguments.models, arguments.splits, arguments.images)
        fill(two, "task1", 2, 4, 5, 363)
        fill(two, "task3", 10, 4, arguments.splits, arguments.images)
        print("| command | before, s | now, s | ratio |\n|---|--:|--:|--:|", flush=True)
        for store, words in (
            (many, ["table", "task3"]),
            (many, ["compare", "task3"]),
            (two, ["report", "task1", "task3", "--out", f"{folder}/report.html"]),
        ):
            command = [*words, "--tracking-uri", f"sqlite:///{store}/mlflow.db"]
            old, new = (seconds(source, command) for source in (earlier, ROOT))
            print(f"| `analysis {' '.join(words[:3])}` | {old:.1f} | {new:.1f} | {old / new:.1f} |", flush=True)


if __name__ == "__main__":
    main()
