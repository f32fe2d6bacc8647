"""Tables and sentences about tuning: the chosen values, the best of k, and where models change places."""

from collections.abc import Sequence

import pandas as pd

from analysis.evidence import Evidence
from analysis.groups import ComparisonError
from analysis.study import importances
from analysis.tables import ResultTable, identity, number, title, with_sd
from analysis.tuning import (
    METRIC,
    Order,
    TuningCurve,
    chosen_configurations,
    how_tuned,
    load_trials,
    orders,
    settings_of,
    space_of,
    tuning_curves,
)

SHOWN = (1, 2, 4, 8, 16, 32, 64, 128)  # k in the table; and the last


def chosen_table(evidence: Evidence) -> ResultTable:
    """Make the table of the configurations that were chosen, and how often."""
    chosen = chosen_configurations(evidence)
    tuned = settings_of(evidence.group)
    cells = pd.DataFrame({
        "model": chosen["model"],
        "number": chosen["chosen_trial"].astype(str),
        **{key: [setting_text(value) for value in chosen[key]] for key in tuned},
        "chosen": chosen["splits"].astype(str),
    })  # fmt: skip
    runs = evidence.runs[evidence.runs["chosen_trial"].notna()]
    runs = runs[["model", "split", "chosen_trial", "run_id"]].sort_values(["model", "split"], ignore_index=True)
    data = chosen.assign(**identity(evidence, METRIC))
    caption = f"Tuned: {how_tuned(evidence.group)}; how often each was chosen by the loss on the validation part"
    return ResultTable(title(evidence), caption, cells, data, [], runs)


def curve_table(evidence: Evidence) -> tuple[ResultTable, list[TuningCurve], pd.DataFrame]:
    """Make the table of tuning curves and its notes; return the curves and trials, too.

    Errors are those of `load_trials`.
    """
    trials, problems = load_trials(evidence)
    curves = tuning_curves(trials)
    most = max(len(curve.numbers) for curve in curves)
    shown = sorted({k for k in SHOWN if k < most} | {most})
    rows = [
        {
            "model": curve.model,
            "number 0": number(curve.own, METRIC),
            **{f"k = {k}": with_sd(curve.mean[k - 1], curve.sd[k - 1], METRIC) for k in shown},
            "T MACs": f"{curve.spent / 1e12:.3g}",
        }
        for curve in curves
    ]
    data = pd.concat([
        pd.DataFrame({
            "model": curve.model, "k": curve.numbers, "mean": curve.mean, "sd": curve.sd, "splits": len(curve.scores),
            "macs": curve.numbers * curve.spent,
        })
        for curve in curves
    ], ignore_index=True)  # fmt: skip
    caption = (
        "Tuning curves: accuracy on the validation part in %, expected of the best of k configurations (by validation "
        f"loss) out of the {most}, mean±sd over splits; k = 1 is one of them at random, number 0 the task's own "
        "settings alone; T MACs: 10^12 multiply-accumulates of one configuration"
    )
    notes = [
        "These images chose the configuration and the epoch, so the curves are optimistic, the more the larger k is."
    ]
    if evidence.group["halving"].eq(True).any():
        notes.append(
            "A configuration that stopped early, number 0 as well, counts with what it had reached and costs what it "
            "was trained: full trainings would score more at small k, and cost more."
        )
    notes += [*budget_sentences(curves), *_importance_sentences(trials, space_of(evidence.group)), *problems]
    source = trials[["model", "split", "replicate", "trial", *settings_of(evidence.group), "loss", "score", "run_id"]]
    table = ResultTable(
        title(evidence), caption, pd.DataFrame(rows), data.assign(**identity(evidence, METRIC)), notes, source
    )
    return table, curves, trials


def budget_sentences(curves: Sequence[TuningCurve]) -> list[str]:
    """Say for each pair of models whose order depends on the budget where it changes, and where compute changes it."""
    if len(curves) < 2:
        return []
    by_number = list(orders(curves))
    lines = [_change(order, "configurations", "k = {:.0f}", 1) for order in by_number if order.changes]
    if not lines:
        models = ", ".join(curve.model for curve in curves)
        lines = [f"No two curves cross by leads above their sd over the splits; at the end the order is {models}."]
    last = {frozenset((order.first, order.other)): order.last for order in by_number}
    for order in orders(curves, by_compute=True):
        low, high = (f"{end / 1e12:.3g}" for end in order.ends)
        if order.changes:
            lines.append(_change(order, "multiply-accumulates", "{:.3g} T", 1e12))
        elif low != high and order.last != last.get(frozenset((order.first, order.other))):
            lines.append(
                f"With equal compute, of {low} to {high} T multiply-accumulates, {order.first} leads {order.other}, by "
                f"{number(order.leads[1], METRIC)} points at the end."
            )
    return lines


def _change(order: Order, what: str, form: str, unit: float) -> str:
    places = " and ".join(form.format(budget / unit) for budget in order.changes)
    start, end = (form.format(budget / unit) for budget in order.ends)
    (lead, later), (n, n_later) = order.leads, order.in_splits
    return (
        f"Which of {order.first} and {order.other} is ahead depends on the number of {what}: it changes at {places}. "
        f"At {start} {order.first} leads by {number(lead, METRIC)} points (in {n} of {order.n_splits} splits), at "
        f"{end} {order.last} by {number(later, METRIC)} (in {n_later})."
    )


def _importance_sentences(trials: pd.DataFrame, space: str) -> list[str]:
    """Say which setting matters for each model, or once why that is not known."""
    lines = []
    for model, of_model in trials.groupby("model"):
        try:
            shares = importances(of_model, space)
        except ComparisonError as error:
            lines.append(f"Not said: {error}.")
            continue
        values = ", ".join(f"{key} {value:.2f}" for key, value in shares.items())
        lines.append(f"What matters for {model}: {values} (shares of the explained variance of accuracy, fANOVA).")
    return list(dict.fromkeys(lines))


def setting_text(value: object) -> str:
    """Format the value of a setting."""
    return f"{value:g}" if isinstance(value, float) else str(value)
