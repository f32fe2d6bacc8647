"""Comparison tables: one row a model, over the splits of one comparison group."""

from typing import TYPE_CHECKING

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table

from tracking.keys import GROUP_PARAMS, MEAN, PARTS, SAMPLE, SCORES, SD

if TYPE_CHECKING:
    from tracking import Store

GROUP = ("task", "dataset_digest", "device_kind", *GROUP_PARAMS)
AVERAGED = (*(f"{part}/{score}" for part in PARTS for score in SCORES), "best_epoch", "epochs_run", "train_seconds")


def comparison_groups(runs: pd.DataFrame) -> list[pd.DataFrame]:
    """Divide runs into comparison groups: same task, data, protocol, seed, configuration, precision, kind of device.

    Returns
    -------
    list of pandas.DataFrame
        Rows of `runs`, one frame a group; the newest first, but those without a finished run last.
    """
    if runs.empty:
        return []
    keyed = runs.assign(device_kind=runs["device"].str.split(":").str[0])
    groups = [group for _, group in keyed.groupby(list(GROUP), dropna=False, sort=False)]
    groups.sort(key=lambda group: group["start_time"].max(), reverse=True)
    return sorted(groups, key=lambda group: _finished(group).empty)  # stable: the newest stay in front


def _finished(group: pd.DataFrame) -> pd.DataFrame:
    """The runs with a result; of a split that was run again, the newest."""
    return group[group["status"] == "FINISHED"].drop_duplicates(["model", "split"], keep="last")


def comparison_table(runs: pd.DataFrame, metric: str = "test/accuracy") -> pd.DataFrame:
    """Average the finished splits of each model, for the newest comparison group in `runs`.

    Parameters
    ----------
    runs : pandas.DataFrame
        From `load_runs`.
    metric : str
        A final metric: what `mean` and `sd` show and rows are sorted by.

    Returns
    -------
    pandas.DataFrame
        Indexed by `model`, best first: `n` finished splits of `n_expected`, `mean` and `sd` (ddof 1) of the metric,
        `mean/<key>` and `sd/<key>` of all scores, epochs and seconds, `parameters`, `macs`. A split that was run
        again counts once, with its newest run.

    Raises
    ------
    ValueError
        No finished run, or none that has the metric.
    """
    groups = comparison_groups(runs)
    group = groups[0] if groups else runs
    finished = _finished(group)
    if finished.empty:
        raise ValueError("no split of the newest comparison group has finished yet")
    if metric not in AVERAGED:
        raise ValueError(f"unknown metric {metric!r}; there are {', '.join(AVERAGED)}")
    if finished[metric].isna().all():
        raise ValueError(f"no run of the newest comparison group has {metric}; try best_val/accuracy")
    rows = {}
    for model, splits in finished.groupby("model"):
        row: dict[str, float] = {"n": len(splits), "n_expected": int(splits["n_splits"].iloc[0])}
        for key in AVERAGED:  # a missing value makes the mean missing, too: none is dropped in silence
            row |= {MEAN + key: splits[key].mean(skipna=False), SD + key: splits[key].std(skipna=False)}
        row |= {"mean": row[MEAN + metric], "sd": row[SD + metric]}
        rows[model] = row | {"parameters": splits["parameters"].iloc[0], "macs": splits["macs"].iloc[0]}
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("model")
    return table.sort_values("mean", ascending=False)


def what_is_wrong(group: pd.DataFrame) -> list[str]:
    """Say in sentences what a reader of a group's table must know."""
    finished = _finished(group)
    notes = []
    if group["dataset"].iloc[0].startswith(SAMPLE):
        notes.append("These are generated images: the scores say nothing about the real task.")
    for model, splits in group.groupby("model"):
        done = set(finished.loc[finished["model"] == model, "split"])
        expected = int(splits["n_splits"].iloc[0])
        if len(done) < expected:
            missing = ", ".join(str(number) for number in range(expected) if number not in done)
            notes.append(f"{model} has {len(done)} of {expected} splits; missing: {missing}.")
    for split, count in finished.groupby("split")["split_hash"].nunique().items():
        if count > 1:
            notes.append(f"Models were not scored on the same images in split {split}; they cannot be compared.")
    shared = finished["source_digest"].str.split("-").str[0]
    if shared.nunique() > 1 or finished.groupby("model")["source_digest"].nunique().gt(1).any():
        notes.append("Not all of these runs were made by the same version of the code.")
    return notes


def print_table(store: "Store", task: str) -> None:
    """Print the newest comparison group of a task, what is wrong with it, and where the numbers live.

    Parameters
    ----------
    store : Store
    task : str
        Key of `tracking.EXPERIMENTS`.
    """
    from analysis.query import load_runs

    console = Console(highlight=False, markup=False, soft_wrap=True)
    groups = comparison_groups(load_runs([task], store.uri))
    if not groups or _finished(groups[0]).empty:
        console.print(f"{task}: no finished run in {store.label}")
        return
    part = "test" if groups[0]["test/accuracy"].notna().any() else "best_val"
    first = groups[0].iloc[0]
    shown = "test part at the best epoch" if part == "test" else "validation part: there is no test part"
    console.print(f"\n{task}: {first['dataset']}, {first['protocol']}", style="bold")
    console.print(f"{shown}, mean±sd over splits in %")
    console.print(_rich_table(groups[0], part))
    console.print("sd over splits is no standard error; micro-F1 equals accuracy where an image has one label")
    for note in what_is_wrong(groups[0]):
        console.print(f"! {note}")
    if len(groups) > 1:
        console.print(f"This is the newest of {len(groups)} configurations in the store; they are never mixed.")
    console.print(f"numbers    {store.label}")
    console.print(f"in the UI  {store.runs_link(task)}")
    if store.ui_command:
        console.print(f"           once it is served: {store.ui_command}")


def _rich_table(group: pd.DataFrame, part: str) -> Table:
    frame = comparison_table(group, f"{part}/accuracy")
    table = Table(box=box.SIMPLE_HEAD, padding=0)  # all columns fit a terminal of 80 characters
    table.add_column("model", no_wrap=True)
    headers = ("splits", "accuracy", "micro-F1", "macro-F1", "val.\naccuracy", "para-\nmeters", "s per\nsplit")
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)
    for model, row in frame.iterrows():
        keys = [f"{part}/{score}" for score in ("accuracy", "f1_micro", "f1_macro")] + ["best_val/accuracy"]
        table.add_row(
            str(model),
            f"{row['n']:.0f} of {row['n_expected']:.0f}",
            *(_percent(row[MEAN + key], row[SD + key]) for key in keys),
            f"{row['parameters'] / 1e6:.2f} M",
            f"{row[MEAN + 'train_seconds']:.0f}",
        )
    return table


def _percent(mean: float, sd: float) -> str:
    return f"{100 * mean:.1f}" + (f"±{100 * sd:.1f}" if pd.notna(sd) else "")
