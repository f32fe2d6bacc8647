"""The command of a task script."""

import gc
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer

from datasets import DatasetError
from experiments.jobs.engine import EngineError
from experiments.jobs.processes import start_server
from experiments.request import MOST_JOBS, Request
from experiments.task import Task, TaskError, check_name
from experiments.tuning.space import parse_space
from tracking import StoreError, in_one_line, is_mlflow_error
from tracking.commands import SCRIPTS, Uri, print_in_any_encoding, script_tasks
from tracking.keys import has_folds
from tracking.settings import (
    DEVICE_MEMORY,
    LARGEST_SEED,
    MEANINGS,
    Precision,
    SettingError,
    TrainingConfig,
    check_range,
)

Option = typer.Option


def main(task: Task) -> None:
    """Run a task's script: options to a request, the request to a run, and errors to one sentence each."""
    print_in_any_encoding()
    usual = task.training

    def command(
        model: Annotated[list[str] | None, Option("-m", "--model", help="repeatable; default: the task's models",
                                                  metavar="NAME")] = None,
        n_splits: Annotated[int, Option(help="holdouts or folds")] = task.protocol.n_splits,
        repetitions: Annotated[int, Option(metavar="N", help="of all folds, each shuffled anew: they extend the table")]
        = task.protocol.repetitions,
        looks: Annotated[str | None, Option(metavar="N,N,...", help="instead of --n-splits or --repetitions: stop at "
                                            "the first of these numbers of holdouts, or of all folds together, at "
                                            "which every pair of models is decided")] = None,
        split: Annotated[list[int] | None, Option(help="repeatable: only these splits, from 0", metavar="I")] = None,
        seeds: Annotated[int, Option(metavar="N", help="trainings of each model on each split, with other weights and "
                                     "batches")] = 1,
        baselines: Annotated[bool, Option(help="majority class and linear model on the same splits")] = True,
        lr: Annotated[float, Option(help=MEANINGS["lr"])] = usual.lr,
        weight_decay: Annotated[float, Option(help=MEANINGS["weight_decay"])] = usual.weight_decay,
        batch_size: Annotated[int, Option(help=MEANINGS["batch_size"])] = usual.batch_size,
        epochs: Annotated[int, Option(help=MEANINGS["epochs"])] = usual.epochs,
        patience: Annotated[int, Option(help=MEANINGS["patience"])] = usual.patience,
        augment: Annotated[bool, Option(help=MEANINGS["augment"])] = usual.augment,
        pretrained: Annotated[bool, Option("--pretrained", help="begin with the library's weights, which saw other "
                                           "images")] = bool(usual.pretrained),
        weights: Annotated[Path | None, Option(help="begin with the weights of this file, safetensors or a state dict",
                                               metavar="FILE", exists=True, dir_okay=False)] = None,
        freeze: Annotated[bool, Option("--freeze", help="train the head, the last layer, alone")] = usual.freeze,
        precision: Annotated[Precision, Option(help=MEANINGS["precision"])] = usual.precision,
        device: Annotated[str, Option(help=MEANINGS["device"])] = usual.device,
        cudnn_benchmark: Annotated[bool, Option("--cudnn-benchmark", help="have cuDNN choose its algorithms by timing "
                                                "them: no equal bits")] = usual.cudnn_benchmark,
        seed: Annotated[int | None, Option(help="sets --split-seed and --train-seed")] = None,
        split_seed: Annotated[int | None, Option(help=f"{MEANINGS['split_seed']}; default: {usual.split_seed}")]
        = None,
        train_seed: Annotated[int | None, Option(help=f"{MEANINGS['train_seed']}; default: {usual.train_seed}")]
        = None,
        data_dir: Annotated[Path | None, Option(envvar="DATA_DIR", exists=True, file_okay=False, help="folder with the "
                                                "data set under its published name, or with train/<class>/; only read")]
        = None,
        sample: Annotated[bool, Option("--sample", help="generated images instead of real data")] = False,
        leak_free: Annotated[bool, Option("--leak-free", help="keep near duplicates together; train on none of a test "
                                          "image")] = False,
        tune: Annotated[int, Option(metavar="N", min=0, help="train N configurations of each model on each split, 2 to "
                                    "1000, of which the validation part chooses one; 0: the task's own settings")] = 0,
        space: Annotated[list[str] | None, Option(metavar="NAME=VALUES", help="repeatable: tune a setting between "
                                                  "others than the task's values, as lr=1e-4..1e-2")]
        = None,
        halving: Annotated[bool, Option(help="stop the worse half of the configurations early, twice")] = True,
        dry_run: Annotated[bool, Option("--dry-run", help="print the plan and the expected time; train nothing")]
        = False,
        yes: Annotated[bool, Option("--yes", help="do not ask, however long it takes")] = False,
        fresh: Annotated[bool, Option("--fresh", help="train finished splits again")] = False,
        jobs: Annotated[str | None, Option(metavar="N", help="splits at once, or auto; default: 1 on this machine, all "
                                           "that have room on a cluster")] = None,
        backend: Annotated[Literal["local", "ray"], Option(help="run on this machine, or on a Ray cluster")] = "local",
        threads: Annotated[int | None, Option(help="CPU threads of a job; default: the cores are shared among the "
                                              "jobs")] = None,
        gpus_per_job: Annotated[float | None, Option(help="on a Ray cluster, such as 0.5; default: 1 if it has GPUs")]
        = None,
        device_memory: Annotated[float, Option(help="share of the device's memory for images; more are streamed to "
                                               "it")] = DEVICE_MEMORY,
        tracking_uri: Uri = None,
    ) -> None:  # fmt: skip
        # the imports make half a million objects that stay; looking for garbage among them as often as Python does
        # takes a sixth of the time until the first epoch
        gc.set_threshold(100_000)
        try:
            if (script := Path(sys.argv[0])).resolve().parent == SCRIPTS and script.stem in script_tasks():
                check_name(task, script.stem)
            if pretrained and weights:
                raise SettingError("weights", "it says what --pretrained says otherwise; leave one of them out")
            config = replace(
                usual, lr=lr, weight_decay=weight_decay, batch_size=batch_size, epochs=epochs, patience=patience,
                augment=augment, precision=precision, device=device, freeze=freeze, cudnn_benchmark=cudnn_benchmark,
                pretrained="file" if weights else "library" if pretrained else "",
                **_seeds(usual, seed, split_seed, train_seed),
            )  # fmt: skip
            planned: tuple[int, ...] = ()
            if looks is not None:
                folds, planned = has_folds(task.protocol.name), _parse_looks(looks)
                is_said = repetitions != task.protocol.repetitions if folds else n_splits != task.protocol.n_splits
                if split or is_said:
                    other = "--repetitions" if folds else "--n-splits"
                    raise SettingError("looks", f"they say which splits there are; leave out {other} and --split")
                if folds:
                    repetitions = max(1, planned[-1] // max(1, n_splits))
                else:
                    n_splits = planned[-1]
            request = Request(
                task=task,
                training=dict.fromkeys(_known_models(model) if model else task.models, config),
                n_splits=n_splits,
                repetitions=repetitions,
                splits=tuple(dict.fromkeys(split)) if split else range(n_splits * repetitions),
                looks=planned,
                seeds=seeds,
                baselines=task.baselines if baselines else (),
                weights=weights,
                leak_free=leak_free,
                data_dir=data_dir,
                sample=sample,
                tune=tune,
                space=parse_space(space or ()),
                halving=halving,
                dry_run=dry_run,
                yes=yes,
                fresh=fresh,
                jobs=_parse_jobs(jobs, backend),
                backend=backend,
                threads=threads,
                gpus_per_job=gpus_per_job,
                device_memory=device_memory,
                tracking_uri=tracking_uri,
            )
            code = _run(request)
        except TaskError as error:
            code = _fail(str(error))
        except SettingError as error:
            raise typer.BadParameter(error.reason, param_hint=f"'{error.option}'") from None
        raise typer.Exit(code)

    command.__doc__ = f"{task.question} {task.protocol.name}: {', '.join(task.models)}."
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command()(command)
    app()


def _seeds(usual: TrainingConfig, both: int | None, split: int | None, train: int | None) -> dict[str, int]:
    """Return the seeds: each by its own option, else by the option for both, else the task's."""
    if both is not None:
        check_range("seed", both, {"low": 0, "high": LARGEST_SEED})
    options = {"split_seed": split, "train_seed": train}
    return {
        key: next(seed for seed in (own, both, getattr(usual, key)) if seed is not None) for key, own in options.items()
    }


def _known_models(names: list[str]) -> list[str]:
    """Return models that are there, and those of files that cannot be imported: the run names them and goes on."""
    from models import why_unknown  # brings torch, which --help need not wait for

    for name in names:
        if reason := why_unknown(name):
            raise SettingError("model", reason)
    return list(dict.fromkeys(names))


def _parse_looks(text: str) -> tuple[int, ...]:
    from analysis.looks import parse_looks  # late: it brings pandas

    try:
        return parse_looks(text)
    except ValueError as error:
        raise SettingError("looks", str(error)) from None


def _parse_jobs(text: str | None, backend: str) -> int | None:
    """Return the number of jobs at once, or None for auto."""
    text = text or ("1" if backend == "local" else "auto")
    if text == "auto":
        return None
    if not text.isdecimal() or not 1 <= int(text) <= MOST_JOBS:
        raise SettingError("jobs", f"{text!r} is neither auto nor a number from 1 to {MOST_JOBS}")
    return int(text)


def _run(request: Request) -> int:
    """Run a request and return the exit code; an error becomes one sentence."""
    # a polite kill and a closed terminal end a run in the same order as Ctrl-C
    for name in ("SIGTERM", "SIGHUP"):
        signum = getattr(signal, name, None)
        if signum and signal.getsignal(signum) is not signal.SIG_IGN:  # as nohup has it
            signal.signal(signum, signal.default_int_handler)
    if request.backend == "local" and request.jobs != 1:
        start_server()  # it imports beside this process
    try:
        from experiments.run import run

        failures = run(request)
    except KeyboardInterrupt:
        how = ", without --fresh," if request.fresh else ""
        return _fail(f"interrupted; the same command{how} goes on where this one stopped", 130)
    except (DatasetError, StoreError, EngineError, TaskError) as error:
        return _fail(str(error))
    except Exception as error:
        if not isinstance(error, OSError) and not is_mlflow_error(error):
            raise
        # a full disk or a store that went away, while results were written
        reason = in_one_line(error)
        return _fail(
            f"the results cannot be written ({reason}); repair that, and the same command goes on where this one "
            "stopped"
        )
    for failure in failures:
        _fail(failure)
    return 1 if failures else 0


def _fail(message: str, code: int = 1) -> int:
    print(f"Error: {message}", file=sys.stderr)
    return code
