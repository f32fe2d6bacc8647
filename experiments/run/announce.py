"""Messages of a run besides the progress of its jobs."""

import sys
from collections.abc import Sequence

import datasets
from experiments.jobs.progress import console, count
from experiments.request import Request
from experiments.run.forecast import in_words
from experiments.run.plan import Plan, space_of
from experiments.tuning import halving
from experiments.tuning.space import space_text
from models import BASELINES, kernels, unusable_sentences
from tracking import Store
from tracking.store import prefixed

MOST_LINES = 12  # of the account of a folder; `python -m datasets info` prints all


def announce(plan: Plan, store: str, seconds: float | None) -> None:
    """Print the task, the settings, the store's label, and how much work it is: `seconds` at most, if that is known."""
    task = plan.request.task
    console.print(f"[bold]{task.name}[/bold]  {task.question}")
    lines = {
        "data": _data(plan.data),
        "protocol": _protocol(plan),
        "models": _models(plan),
        "training": _training(plan.request),
        "weights": _weights(plan),
        "tuning": _tuning(plan.request),
        "hardware": _hardware(plan),
        "jobs": plan.concurrency.why or f"{plan.concurrency.at_once} at once",
        "work": _work(plan),
        "time": "" if seconds is None else f"at most about {in_words(seconds)}, by one step of each model",
        "store": store,
    }
    for label, text in lines.items():
        if text:
            _print_line(label, text)
    _print_account(plan.data)
    for text in datasets.notes(plan.data, _first_split(plan)):
        console.print(f"! {text}", markup=False, soft_wrap=True)
    said = "; ".join(plan.unusable)
    for sentence in [*plan.unusable, *(each for each in unusable_sentences() if each not in said)]:
        print(f"! {sentence}", file=sys.stderr)


def _data(data: datasets.ImageData) -> str:
    _, _, size, channels = data.images.shape
    return f"{data.name}: {len(data.labels):,} images of {len(data.classes)} classes, {size}x{size}x{channels}"


def _protocol(plan: Plan) -> str:
    request, first = plan.request, _first_split(plan)
    looks = f", looks after {', '.join(map(str, request.looks))}" if request.looks else ""
    repeated = f" ({request.repetitions} repetitions of {request.n_splits} folds)" if request.repetitions > 1 else ""
    return (
        f"{request.task.protocol.name}, {len(request.splits)} of {request.all_splits} splits{repeated}{looks}; "
        f"train {len(first.train):,}, validation {len(first.val):,}, test {len(first.test):,}"
    )


def _models(plan: Plan) -> str:
    names = [model.card.name for model in plan.models]
    networks = ", ".join(name for name in names if name not in BASELINES)
    baselines = ", ".join(name for name in names if name in BASELINES)
    return networks + (f"; baselines {baselines}, in seconds" if baselines else "")


def _training(request: Request) -> str:
    config = request.config
    seeds = (
        f"seed {config.split_seed}"
        if config.split_seed == config.train_seed
        else f"split seed {config.split_seed}, seed {config.train_seed}"
    )
    return (
        f"AdamW lr {config.lr:g}, weight decay {config.weight_decay:g}, batch {config.batch_size}, "
        f"up to {config.epochs} epochs, patience {config.patience}, "
        f"{'augmented' if config.augment else 'not augmented'}{', heads only' * config.freeze}, {seeds}"
    )


def _weights(plan: Plan) -> str:
    return "; ".join(
        f"{name}: {weights.label}{f'; fresh: {weights.left_out}' * bool(weights.left_out)}"
        for name, weights in plan.weights.items()
    )


def _tuning(request: Request) -> str:
    if not request.tune:
        return ""
    rungs = halving.rungs(request.config.epochs, request.halving)[:-1]
    stops = f"; the worse half stops after epoch {' and '.join(map(str, rungs))}" if rungs else ""
    return f"{request.tune} configurations of {space_text(space_of(request))}{stops}"


def _hardware(plan: Plan) -> str:
    config = plan.request.config
    reason = kernels.why_not() if config.device == "cpu" and config.precision != "fp16" else ""
    slower = f"; slower than it could be, since {reason} (models/kernels)" if reason else ""
    timed = "; cuDNN chooses by timing: no equal bits" * config.cudnn_benchmark
    return f"{config.device}, {config.precision}, {count(plan.concurrency.threads, 'thread')} a job{timed}{slower}"


def _work(plan: Plan) -> str:
    request, first = plan.request, _first_split(plan)
    networks = [model for model in plan.models if model.card.name not in BASELINES]
    epochs = request.longest_epochs(request.config)
    # forward and backward of a training image cost three times a forward pass
    passes = (3 * len(first.train) + len(first.val)) * epochs * len(request.splits) * request.seeds
    macs = sum(model.card.macs for model in networks) * passes
    seeds = f"{request.seeds} seeds x " if request.seeds > 1 else ""
    return (
        f"{count(len(networks), 'model')} x {count(len(request.splits), 'split')} x {seeds}"
        f"up to {count(epochs, 'epoch')}, at most {macs / 1e12:,.3g} T multiply-accumulates"
    )


def _first_split(plan: Plan) -> datasets.Split:
    return plan.splits[plan.request.splits[0]]


def _print_line(label: str, text: str) -> None:
    console.print(f"  {label:9s} {text}", markup=False, soft_wrap=True)


def _print_account(data: datasets.ImageData) -> None:
    account = list(datasets.account(data))
    if len(account) > MOST_LINES:
        rest = count(len(account) - MOST_LINES, "more line")
        account[MOST_LINES:] = [f"{rest}: python -m datasets info, with the task or the folder"]
    for label, text in zip(["files", *[""] * MOST_LINES], account, strict=False):
        _print_line(label, text)


def sent_later(sent: int, refused: Sequence[str]) -> None:
    """Say that results of an earlier command were sent to the result database, and which were refused."""
    if sent:
        console.print(f"sent to the result database what was kept for it: {count(sent, 'split')}")
    for sentence in refused:
        print(sentence, file=sys.stderr)


def left_alone(finished: int, elsewhere: Sequence[str]) -> None:
    """Name the splits that were not run: finished before, or done by another process."""
    if finished:
        console.print(f"finished before and kept: {count(finished, 'split')}; --fresh trains again")
    if elsewhere:
        console.print(f"left to others: {', '.join(elsewhere)}", markup=False, soft_wrap=True)


def announce_champion(store: Store, task: str, sentence: str) -> None:
    """Say which model is the best of its task now, and how it is used."""
    if sentence:
        command = f"python -m experiments predict {task} PHOTO{store.option}"
        console.print(f"champion   {sentence}", markup=False, soft_wrap=True)
        console.print(f"           to use it: {command}", markup=False, soft_wrap=True)


def announce_no_champion(task: str, reason: str) -> None:
    """Say why the best model was not registered; the results are not touched by that."""
    print(
        f"! the best model is not registered as models:/{prefixed(task)} ({reason}); all results are there",
        file=sys.stderr,
    )
