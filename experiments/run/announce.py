"""Messages of a run besides the progress of its jobs."""

import sys
from collections.abc import Sequence

import datasets
from experiments.jobs.progress import console, count
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
    request, data, concurrency = plan.request, plan.data, plan.concurrency
    config, task, chosen = request.config, request.task, request.splits
    first = plan.splits[chosen[0]]
    _, _, size, channels = data.images.shape
    networks = [model for model in plan.models if model.card.name not in BASELINES]
    baselines = [model.card.name for model in plan.models if model.card.name in BASELINES]
    # forward and backward of a training image cost three times a forward pass
    epochs = request.longest_epochs(config)
    passes = (3 * len(first.train) + len(first.val)) * epochs * len(chosen)
    macs = sum(model.card.macs for model in networks) * passes * request.seeds
    seeds = sorted({config.split_seed, config.train_seed})
    of_what = f"seed {seeds[0]}" if len(seeds) == 1 else f"split seed {config.split_seed}, seed {config.train_seed}"
    tuning = {}
    if request.tune:
        rungs = halving.rungs(config.epochs, request.halving)[:-1]
        stops = f"; the worse half stops after epoch {' and '.join(map(str, rungs))}" if rungs else ""
        tuning["tuning"] = f"{request.tune} configurations of {space_text(space_of(request))}{stops}"
    looks = f", looks after {', '.join(map(str, request.looks))}" if request.looks else ""
    console.print(f"[bold]{task.name}[/bold]  {task.question}")
    weights = [
        f"{name}: {each.label}{f'; fresh: {each.left_out}' * bool(each.left_out)}"
        for name, each in plan.weights.items()
    ]
    reason = kernels.why_not() if config.device == "cpu" and config.precision != "fp16" else ""
    lines = {
        "data": f"{data.name}: {len(data.labels):,} images of {len(data.classes)} classes, {size}x{size}x{channels}",
        "protocol": f"{task.protocol.name}, {len(chosen)} of {request.n_splits} splits"
        f"{looks}; train {len(first.train):,}, validation {len(first.val):,}, test {len(first.test):,}",
        "models": ", ".join(model.card.name for model in networks)
        + (f"; baselines {', '.join(baselines)}, in seconds" if baselines else ""),
        "training": f"AdamW lr {config.lr:g}, weight decay {config.weight_decay:g}, batch {config.batch_size}, "
        f"up to {config.epochs} epochs, patience {config.patience}, "
        f"{'augmented' if config.augment else 'not augmented'}{', heads only' * config.freeze}, {of_what}",
        **({"weights": "; ".join(weights)} if weights else {}),
        **tuning,
        "hardware": f"{config.device}, {config.precision}, {count(concurrency.threads, 'thread')} a job"
        + (f"; slower than it could be, since {reason} (models/kernels)" if reason else ""),
        "jobs": concurrency.why or f"{concurrency.at_once} at once",
        "work": f"{count(len(networks), 'model')} x {count(len(chosen), 'split')} x "
        f"{f'{request.seeds} seeds x ' if request.seeds > 1 else ''}up to "
        f"{count(epochs, 'epoch')}, at most {macs / 1e12:,.3g} T multiply-accumulates",
        **({} if seconds is None else {"time": f"at most about {in_words(seconds)}, by one step of each model"}),
        "store": store,
    }
    for label, text in lines.items():
        console.print(f"  {label:9s} {text}", markup=False, soft_wrap=True)
    account = list(datasets.account(data))
    if len(account) > MOST_LINES:
        rest = count(len(account) - MOST_LINES, "more line")
        account[MOST_LINES:] = [f"{rest}: python -m datasets info, with the task or the folder"]
    for label, text in zip(["files", *[""] * MOST_LINES], account, strict=False):
        console.print(f"  {label:9s} {text}", markup=False, soft_wrap=True)
    for text in datasets.notes(data, first):
        console.print(f"! {text}", markup=False, soft_wrap=True)
    said = "; ".join(plan.unusable)
    for sentence in [*plan.unusable, *(each for each in unusable_sentences() if each not in said)]:
        print(f"! {sentence}", file=sys.stderr)


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
