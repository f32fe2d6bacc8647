"""Verifying the choice of a tuned split: derive it again from the trials, which must not have seen a test image."""

import json
from collections.abc import Mapping
from typing import Any

import pandas as pd

import analysis
from experiments.jobs import results
from experiments.jobs.job import Curve
from experiments.tuning import halving
from experiments.tuning.rounds import choose, is_over, lowest
from experiments.tuning.space import configurations, parse_tuned
from experiments.verification.stored_run import Record, SplitRecord
from tracking import StoreError, TrainingConfig, keys
from tracking.settings import TUNABLE


def check_choice(run: SplitRecord, parent: Record, trials: pd.DataFrame) -> None:
    """Draw the configurations again, and compare the trials with them and the split with the best trial.

    Parameters
    ----------
    run : SplitRecord
        Of a tuned split.
    parent : Record
    trials : pandas.DataFrame
        All finished trials of the task (`analysis.load_runs`).
    """
    findings = run.findings
    curves: dict[int, Curve] = {}
    drawn = _configurations(run, parent)
    for number, config in enumerate(drawn):
        found = _trial(run, trials, number, config)
        run.trials.append(found["run_id"])
        if any(pd.notna(found[key]) for key in keys.FINAL_METRICS if key.startswith("test/")):
            findings.differ(f"trial {number} was scored on the test part")
        curves[number] = _curve(found, run.store.uri)
    alive = _survivors(run, curves)
    chosen, *of_halves = choose({number: curves[number] for number in alive})
    findings.compare("chosen_trial", run.params["chosen_trial"], chosen, "from the trials")
    for key in sorted(keys.tuned_settings(run.params)):
        findings.compare(key, run.params[key], getattr(drawn[chosen], key), f"of trial {chosen}")
    if results.curve_of(run.history) != curves[chosen]:
        findings.differ(f"the losses in {keys.HISTORY} are not those of trial {chosen}")
    checkpoint = run.rebuilt.checkpoint
    stored = [checkpoint.epoch if each is None else each[0] for each in checkpoint.of_halves]
    derived = [_epoch(curves[number], place) for number, place in zip(of_halves, (2, 1), strict=True)]
    if stored != derived:
        findings.differ(f"the epochs of the halves in {keys.CHECKPOINT} are not those with the lowest losses")


def _configurations(run: SplitRecord, parent: Record) -> list[TrainingConfig]:
    """Return the configurations of trials 0, 1, ...; trial 0 has the usual settings."""
    tuned = {key: parse_tuned(key, parent.texts[key]) for key in sorted(keys.tuned_settings(run.params))}
    usual = TrainingConfig(**{**_untuned(run.params), **{key: value for key, (value, _) in tuned.items()}})
    space = {key: values for key, (_, values) in tuned.items()}
    return configurations(space, usual, run.params["tune"], run.params["split_seed"])


def _untuned(params: Mapping[str, Any]) -> dict[str, Any]:
    return {key: params[key] for key in TUNABLE if key not in keys.tuned_settings(params)}


def _trial(run: SplitRecord, trials: pd.DataFrame, number: int, config: TrainingConfig) -> "pd.Series[Any]":
    """The newest finished run of a trial: of this split and model, its data, its source, and the drawn settings."""
    same = trials["trial"].eq(number)
    for key in ("model", "split", "replicate", "split_hash", "dataset_digest", "source_digest", "epochs", "train_seed"):
        same &= trials[key].eq(run.row[key])
    for key in TUNABLE:
        same &= trials[key].eq(getattr(config, key))
    if not same.any():
        drawn = ", ".join(f"{key} {getattr(config, key)}" for key in sorted(keys.tuned_settings(run.params)))
        raise StoreError(f"trial {number} of {run.params['tune']}, for which {drawn} was drawn, has no finished run")
    return trials[same].iloc[-1]


def _curve(trial: "pd.Series[Any]", uri: str) -> Curve:
    path = analysis.local_artifact(trial, keys.HISTORY, uri)
    stopped = "" if pd.isna(trial[keys.STOPPED]) else trial[keys.STOPPED]
    return results.curve_of(json.loads(path.read_text(encoding="utf-8")), stopped)


def _survivors(run: SplitRecord, curves: dict[int, Curve]) -> list[int]:
    """The trials that stopped at no rung; a `StoreError` names one that should have gone on."""
    alive = list(curves)
    rungs = halving.rungs(run.params["epochs"], run.params["halving"])
    config = TrainingConfig(epochs=run.params["epochs"], patience=run.params["patience"])
    for number, rung in enumerate(rungs):
        for trial in alive:
            if len(curves[trial]) < rung and not is_over(curves[trial], config):
                raise StoreError(f"trial {trial} ended after {len(curves[trial])} epochs, but was to reach {rung}")
        if number < len(rungs) - 1:
            alive = halving.survivors({trial: lowest(curves[trial][:rung]) for trial in alive})
    return alive


def _epoch(curve: Curve, part: int) -> int:
    """The epoch with the lowest loss on a half of the validation part."""
    losses = [losses[part] for losses in curve]
    return 1 + losses.index(min(losses))
