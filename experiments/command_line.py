"""The command line of the task scripts; its options are the fields of `TrainingConfig` and `RunOptions`."""

import dataclasses
import gc
import inspect
import math
import signal
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer

from datasets import DatasetError
from experiments.config import DEVICE_MEMORY, Task, TrainingConfig
from experiments.jobs import EngineError, Ray
from tracking import StoreError
from tracking.commands import Uri, not_one_of
from tracking.store import in_one_line

MOST_JOBS = 1000


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """What to run, on what, and where the results go."""

    model: Annotated[
        list[str] | None,
        typer.Option("-m", "--model", help="repeatable; all of the task's unless given", metavar="NAME"),
    ] = None
    n_splits: Annotated[int | None, typer.Option(min=1, help="holdouts or folds; the task's number unless given")] = (
        None
    )
    baselines: Annotated[bool, typer.Option(help="majority class and linear model on the same splits")] = True
    split: Annotated[list[int] | None, typer.Option(help="repeatable: only these splits, from 0", metavar="I")] = None
    data_dir: Annotated[
        Path | None,
        typer.Option(
            envvar="DATA_DIR",
            exists=True,
            file_okay=False,
            help="holds the data set under its published name, or train/<class>/; only read",
        ),
    ] = None
    leak_free: Annotated[
        bool, typer.Option("--leak-free", help="keep near duplicates together; train on none of a test image")
    ] = False
    fresh: Annotated[bool, typer.Option("--fresh", help="train again what is finished")] = False
    jobs: Annotated[
        str | None,
        typer.Option(metavar="N", help="splits at once, or auto; 1 here, and what it has room for on a cluster"),
    ] = None
    backend: Annotated[Literal["local", "ray"], typer.Option(help="where: on this machine, or on a Ray cluster")] = (
        "local"
    )
    threads: Annotated[
        int | None,
        typer.Option(min=1, max=1024, help="CPU threads of a job; the cores are shared among the jobs unless given"),
    ] = None
    gpus_per_job: Annotated[
        float | None, typer.Option(min=0, help="on a Ray cluster, such as 0.5; 1 where it has GPUs unless given")
    ] = None
    device_memory: Annotated[
        float, typer.Option(min=0, max=1, help="share of the device's memory for images; more are streamed to it")
    ] = DEVICE_MEMORY
    sample: Annotated[bool, typer.Option("--sample", help="generated images instead of real data")] = False
    tracking_uri: Uri = None


def main(task: Task) -> None:
    """Run a task's script: parse the options, run the protocol, and turn what goes wrong into one sentence."""

    def command(**values: Any) -> None:
        options = RunOptions(**{field.name: values.pop(field.name) for field in dataclasses.fields(RunOptions)})
        # the imports make half a million objects that stay, and to look for garbage among them as often as Python does
        # takes a sixth of the time until the first epoch
        gc.set_threshold(100_000)
        config = TrainingConfig(**values)
        asked, chosen, jobs = _resolve(task, options, config)
        raise typer.Exit(_run(asked, chosen, jobs, config, options, task.protocol.n_splits))

    defaults = {**dataclasses.asdict(RunOptions()), **dataclasses.asdict(task.training)}
    hints = get_type_hints(RunOptions, include_extras=True) | get_type_hints(TrainingConfig, include_extras=True)
    command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=defaults[name], annotation=hint)
            for name, hint in hints.items()
        ]
    )
    command.__doc__ = (
        f"{task.question} {task.protocol.name}, {task.protocol.n_splits} splits: {', '.join(task.models)}."
    )
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command()(command)
    app()


def _resolve(task: Task, options: RunOptions, config: TrainingConfig) -> tuple[Task, list[int], int | None]:
    """Check what the parser cannot; return the task as asked for, the splits, and the jobs at once (None is auto)."""
    try:
        protocol = dataclasses.replace(task.protocol, n_splits=options.n_splits or task.protocol.n_splits)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--n-splits") from None
    chosen = list(dict.fromkeys(options.split if options.split else range(protocol.n_splits)))
    for number in chosen:
        if not 0 <= number < protocol.n_splits:
            raise typer.BadParameter(f"{number} is not one of 0 to {protocol.n_splits - 1}", param_hint="--split")
    for key, value in (dataclasses.asdict(config) | dataclasses.asdict(options)).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise typer.BadParameter(f"{value} is not a finite number", param_hint=f"--{key.replace('_', '-')}")

    asked = options.jobs or ("1" if options.backend == "local" else "auto")
    jobs = None if asked == "auto" else int(asked) if asked.isdecimal() else 0
    if jobs is not None and not 1 <= jobs <= MOST_JOBS:
        reason = f"{asked!r} is neither auto nor a number from 1 to {MOST_JOBS}"
        raise typer.BadParameter(reason, param_hint="--jobs")
    if options.gpus_per_job is not None and options.backend != "ray":
        raise typer.BadParameter("only a Ray cluster gives a job a number of GPUs", param_hint="--gpus-per-job")
    gpus = options.gpus_per_job or 0.0
    if gpus and not 0.0001 <= gpus <= 1 and gpus != int(gpus):
        raise typer.BadParameter(
            f"{gpus:g} is neither a share of a GPU nor a whole number", param_hint="--gpus-per-job"
        )

    from models import MODELS  # brings torch, which --help need not wait for

    names = tuple(dict.fromkeys(options.model or task.models))
    for name in names:
        if name not in MODELS:
            raise typer.BadParameter(not_one_of(name, MODELS), param_hint="--model")
    baselines = task.baselines if options.baselines else ()
    return dataclasses.replace(task, models=names, baselines=baselines, protocol=protocol), chosen, jobs


def _resolve_config(config: TrainingConfig, options: RunOptions) -> tuple[TrainingConfig, Ray | None]:
    """Replace `auto` in the settings by what will be used where the jobs are done; return that cluster, too."""
    from experiments import hardware

    try:
        if options.backend != "ray":
            return hardware.resolve(config), None
        cluster = Ray(options.threads or 1, 0 if config.device == "cpu" else options.gpus_per_job)
        return cluster.call(hardware.resolve, config), cluster
    except hardware.UnusableDeviceError as error:
        raise typer.BadParameter(str(error), param_hint="--device") from None


def _run(
    task: Task, chosen: list[int], jobs: int | None, config: TrainingConfig, options: RunOptions, usual_splits: int
) -> int:
    """Run the protocol and return the exit code; what goes wrong is said in one sentence."""
    # a polite kill and a closed terminal end a run in the same order as Ctrl-C
    for name in ("SIGTERM", "SIGHUP"):
        signum = getattr(signal, name, None)
        if signum and signal.getsignal(signum) is not signal.SIG_IGN:  # as nohup has it
            signal.signal(signum, signal.default_int_handler)
    try:
        from mlflow.exceptions import MlflowException

        from experiments import protocol

        config, cluster = _resolve_config(config, options)
        what = protocol.ProtocolOptions(
            chosen,
            options.leak_free,
            options.fresh,
            options.device_memory,
            jobs,
            options.threads,
            cluster,
            usual_splits,
        )
        failures = protocol.run(task, config, what, options.data_dir, options.sample, options.tracking_uri)
    except KeyboardInterrupt:
        how = ", without --fresh," if options.fresh else ""
        return _fail(f"interrupted; the same command{how} goes on where this one stopped", 130)
    except (DatasetError, StoreError, EngineError) as error:
        return _fail(str(error))
    except (OSError, MlflowException) as error:  # a full disk or a store that went away, while results were written
        reason = in_one_line(error)
        return _fail(
            f"the results cannot be written ({reason}); repair that, and the same command goes on where this "
            "one stopped"
        )
    for failure in failures:
        _fail(failure)
    return 1 if failures else 0


def _fail(message: str, code: int = 1) -> int:
    print(f"Error: {message}", file=sys.stderr)
    return code
