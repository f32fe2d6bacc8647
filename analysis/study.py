"""The trials of a tuned model as a study of Optuna: a file for optuna-dashboard, and which setting matters."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from analysis.evidence import Evidence
from analysis.groups import ComparisonError, group_id
from analysis.query import load_curves
from analysis.tuning import METRIC, load_trials, space_of
from tracking.keys import STOPPED, is_divergence, trials_of
from tracking.settings import TYPES

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

NEEDED = "needs Optuna: .venv/bin/pip install -r requirements-tuning.txt"
# With fewer, fANOVA takes a setting that hardly matters for the one that decides (benchmarks/importance.py)
FEWEST_CONFIGURATIONS, FEWEST_SPLITS = 16, 5


def write_study(evidence: Evidence, model: str, path: Path) -> str:
    """Write the trials of a model on all splits as a study into an SQLite file, which may hold other studies.

    Returns
    -------
    str
        The name of the study.

    Raises
    ------
    ComparisonError
        If Optuna is not installed, the model was not tuned, or the file has this study or is none of Optuna's; and as
        `load_trials`.

    Notes
    -----
    The value of a trial is its lowest validation loss, by which trials were compared, and its intermediate values are
    the losses of its epochs. One that stopped early is PRUNED, one that diverged is FAIL. `split`, `replicate`,
    `trial`, `chosen`, `run_id` and the accuracy are user attributes.
    """
    optuna = _optuna("the study")
    trials, _ = load_trials(evidence)
    of_model = trials[trials["model"] == model]
    if of_model.empty:
        raise ComparisonError(f"{model!r} is no tuned model here; there are {', '.join(trials['model'].unique())}")
    task, name = evidence.task, f"{evidence.task} {model} {group_id(evidence.group)}"
    curves = load_curves([trials_of(task)], evidence.tracking_uri).set_index(["run_id", "epoch"])["val/loss"]
    distributions = _distributions(of_model, space_of(evidence.group))
    none = pd.Series(dtype=float)  # of a trial that diverged at once
    frozen = [_frozen(row, curves.get(row["run_id"], none), distributions) for _, row in of_model.iterrows()]
    if path.exists() and path.read_bytes()[:16] not in (b"", b"SQLite format 3\0"):
        raise ComparisonError(f"{path} is there and no study of Optuna; name another file")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        study = optuna.create_study(storage=f"sqlite:///{path}", study_name=name, direction="minimize")
    except optuna.exceptions.DuplicatedStudyError:
        raise ComparisonError(f"{path} has the study {name!r} already; name another file") from None
    except Exception as error:
        if not type(error).__module__.startswith(("sqlalchemy", "alembic")):
            raise
        raise ComparisonError(f"{path} is there and no study of Optuna; name another file") from None
    study.set_user_attr("task", task)
    study.set_user_attr("model", model)
    study.add_trials(frozen)
    return name


def importances(trials: pd.DataFrame, space: str) -> dict[str, float]:
    """Estimate which tuned setting matters for the accuracy of a model on the validation part, by fANOVA.

    Parameters
    ----------
    trials : pandas.DataFrame
        Of one model, from `load_trials`. Trials that stopped early count with what they had reached.
    space : str
        From `space_of`.

    Returns
    -------
    dict of str to float
        Shares of the variance of the score that is explained, the largest first; they sum to 1.

    Raises
    ------
    ComparisonError
        If Optuna is not installed, or there are too few trials.

    References
    ----------
    Hutter, Hoos, Leyton-Brown (2014). An efficient approach for assessing hyperparameter importance. ICML 2014.
    """
    configurations, splits = trials["trial"].nunique(), trials["split"].nunique()
    if configurations < FEWEST_CONFIGURATIONS or splits < FEWEST_SPLITS:
        raise ComparisonError(
            f"which setting matters takes {FEWEST_CONFIGURATIONS} configurations on {FEWEST_SPLITS} splits, and here "
            f"are {configurations} on {splits}"
        )
    if len(space.split()) < 2:
        raise ComparisonError(f"which setting matters takes two of them, and only {space} was tuned")
    optuna = _optuna("which setting matters")
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    distributions = _distributions(trials, space)
    score = trials["score"] - trials.groupby("split")["score"].transform("mean")  # what a split adds is no setting's
    study = optuna.create_study(direction="maximize")
    study.add_trials([
        optuna.trial.create_trial(value=float(value), params=_params(row, distributions), distributions=distributions)
        for (_, row), value in zip(trials.iterrows(), score, strict=True)
    ])  # fmt: skip
    # named, since Optuna's default changes from version to version, and the ranking with it
    return dict(get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0)))


def _optuna(what: str) -> Any:
    try:
        import optuna
    except ImportError:
        raise ComparisonError(f"{what} {NEEDED}") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def _distributions(trials: pd.DataFrame, space: str) -> "dict[str, BaseDistribution]":
    """Read the distributions from a space, as wide as the trials: number 0 and a model's own range may lie outside."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    found: dict[str, BaseDistribution] = {}
    for part in space.split():
        key, _, text = part.partition("=")
        values = [TYPES[key](value) for value in trials[key]]
        if ".." in text:
            ends = [*map(float, text.split("..")), *values]
            found[key] = FloatDistribution(min(ends), max(ends), log=min(ends) > 0)
        else:
            found[key] = CategoricalDistribution(sorted(set(values)))
    return found


def _params(row: pd.Series, distributions: "dict[str, BaseDistribution]") -> dict[str, Any]:
    return {key: TYPES[key](row[key]) for key in distributions}


def _frozen(row: pd.Series, losses: pd.Series, distributions: "dict[str, BaseDistribution]") -> "FrozenTrial":
    from optuna.trial import TrialState, create_trial

    stopped = "" if pd.isna(row[STOPPED]) else str(row[STOPPED])
    state = TrialState.FAIL if is_divergence(stopped) else TrialState.PRUNED if stopped else TrialState.COMPLETE
    known = losses.dropna()
    finite = dict(zip(known.index.astype(int).tolist(), known.tolist(), strict=True))
    trial = create_trial(
        state=state,
        value=None if state == TrialState.FAIL else float(row["loss"]),
        params=_params(row, distributions),
        distributions=distributions,
        user_attrs={
            **{key: int(row[key]) for key in ("split", "replicate", "trial")},
            "chosen": bool(row["chosen"]), METRIC: float(row["score"]), "run_id": str(row["run_id"]), STOPPED: stopped,
        },
        intermediate_values=finite,
    )  # fmt: skip
    trial.datetime_start = row["start_time"].to_pydatetime().replace(tzinfo=None)
    trial.datetime_complete = row["end_time"].to_pydatetime().replace(tzinfo=None)
    return trial
