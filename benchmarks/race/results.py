"""Table and figure of the race's raw results: medians, ratios, and whether the scores agree."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median, variance
from typing import Any

from benchmarks.race.works import CONTESTANTS, OURS, PLAIN, WORKS

DISTURBED = 0.2  # cores in use by other processes; our own driver and the kernel take some hundredths
Raw = Mapping[str, Any]  # of one work, as the driver writes it to race.json

COLUMNS = (
    "work", "contestant", "epoch, s: median (min–max)", "ratio", "whole run, s", "ratio", "val accuracy, %",
    "peak memory, GB",
)  # fmt: skip


@dataclass(frozen=True)
class Spread:
    """Median and range over repeats."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        """Summarise some values."""
        return cls(median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{seconds(self.median)} ({seconds(self.low)}–{seconds(self.high)})"


@dataclass(frozen=True)
class Line:
    """A contestant's results in a work.

    Attributes
    ----------
    epoch, whole : Spread
        Seconds of an epoch from the second on, of each repeat its median; and from process start to exit.
    accuracies : list of float
        Of the validation part at the best epoch, of each repeat.
    memory : float
        Peak of the largest process, in GB.
    """

    epoch: Spread
    whole: Spread
    accuracies: list[float]
    memory: float


def seconds(value: float) -> str:
    """Write seconds with three digits that count."""
    return f"{value:.0f}" if value >= 100 else f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"


def lines(raw: Raw) -> dict[str, Line]:
    """Summarise a work by contestant, in the order of `CONTESTANTS`."""
    found = {}
    for name in CONTESTANTS:
        if runs := [run for run in raw["runs"] if run["contestant"] == name]:
            found[name] = Line(
                Spread.of([median(run["epoch_seconds"][1:]) for run in runs]),
                Spread.of([run["whole_seconds"] for run in runs]),
                [run["val_accuracy"] for run in runs],
                max(run["peak_gb"] for run in runs),
            )
    return found


def advantage(summary: Mapping[str, Line]) -> tuple[float, float] | None:
    """How many times as fast ours is as the better of the plain loops: an epoch, the whole run; None without both."""
    plain = [summary[name] for name in PLAIN if name in summary]
    if not plain or OURS not in summary:
        return None
    ours = summary[OURS]
    return (
        min(line.epoch.median for line in plain) / ours.epoch.median,
        min(line.whole.median for line in plain) / ours.whole.median,
    )


def plain_accuracies(summary: Mapping[str, Line]) -> list[float]:
    """Accuracies of the plain loops, all repeats."""
    return [accuracy for name in PLAIN if name in summary for accuracy in summary[name].accuracies]


def tolerance(raw: Raw, summary: Mapping[str, Line]) -> float | None:
    """How far from the plain loops an accuracy may be by chance: see the package's `__main__`.

    None if no plain loop ran, or no peer ran twice: the noise is unknown then.
    """
    reference = plain_accuracies(summary)
    peers = [line.accuracies for name, line in summary.items() if name != OURS]
    variances = [variance(accuracies) for accuracies in peers if len(accuracies) > 1]
    if not reference or not variances:
        return None
    share = fmean(reference)
    floor = math.sqrt(share * (1 - share) / raw["sizes"]["val"])
    return 3 * math.sqrt(2) * max(math.sqrt(fmean(variances)), floor)


def disagreements(raw: Raw) -> list[str]:
    """One sentence for each contestant whose accuracy is not that of the plain loops within seed noise."""
    summary = lines(raw)
    limit = tolerance(raw, summary)
    if limit is None:
        return []
    expected = fmean(plain_accuracies(summary))
    return [
        f"{raw['name']}: {name} reaches {fmean(line.accuracies):.1%}, plain {expected:.1%}; "
        f"by chance they may be {100 * limit:.1f} points apart"
        for name, line in summary.items()
        if abs(fmean(line.accuracies) - expected) > limit
    ]


def _rows(raw: Raw) -> Iterator[tuple[str, ...]]:
    summary = lines(raw)
    ours = summary.get(OURS)
    for name in CONTESTANTS:
        if name not in summary:
            if name in raw["absent"]:
                yield (raw["name"], name, *["-"] * (len(COLUMNS) - 2))
            continue
        line = summary[name]
        by_epoch, by_run = ("-", "-")
        if ours:
            by_epoch, by_run = (
                f"{theirs.median / mine.median:.1f}"
                for theirs, mine in ((line.epoch, ours.epoch), (line.whole, ours.whole))
            )
        accuracy = f"{fmean(line.accuracies):.1%}".rstrip("%")
        yield raw["name"], name, str(line.epoch), by_epoch, str(line.whole), by_run, accuracy, f"{line.memory:.2f}"


def _markdown(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]], texts: int) -> list[str]:
    """Lines of a table whose first columns are texts, the others numbers."""
    rule = ["---" if place < texts else "--:" for place in range(len(columns))]
    return ["| " + " | ".join(cells) + " |" for cells in (columns, rule, *rows)]


def _ordered(raws: Mapping[str, Raw]) -> list[Raw]:
    return [{"name": name, **raws[name]} for name in WORKS if name in raws]


def table(raws: Mapping[str, Raw]) -> str:
    """Write all results as Markdown.

    Parameters
    ----------
    raws : mapping of str to Raw
        Content of race.json, by work.
    """
    ordered = _ordered(raws)
    where: dict[str, list[str]] = {}
    for raw in ordered:
        where.setdefault(f"{raw['machine']}; {raw['date']}", []).append(raw["name"])
    text = [f"{machine}: {', '.join(names)}." for machine, names in where.items()]
    rows = []
    for raw in ordered:
        if faster := advantage(lines(raw)):
            goal = WORKS[raw["name"]].goal if raw["device"] == "cpu" else None  # goals are a CPU's
            rows.append((raw["name"], f"{faster[0]:.1f}", f"{goal:g}" if goal else "-", f"{faster[1]:.1f}"))
    header = ("the better plain loop / ours", "epoch", "goal", "whole run")
    text += ["", *_markdown(header, rows, texts=1), ""]
    text += _markdown(COLUMNS, [row for raw in ordered for row in _rows(raw)], texts=2)
    text += ["", "A ratio says how many times as fast ours is. Memory is that of the largest process of a run."]
    for raw in ordered:
        parts = ", ".join(f"{count:,} {part}" for part, count in raw["sizes"].items() if count)
        text.append(
            f"- {raw['name']}: {parts}; {raw['epochs']} epochs, repeated {raw['repeats']} times; "
            f"{raw['note'] + '; ' if raw['note'] else ''}what ours does once for a data set, decoding and the search "
            f"for near duplicates, took {seconds(raw['once_seconds'])} s and is not in the table."
        )
    text += filter(None, map(_disturbance, ordered))
    text += ["", verdict(raws)]
    return "\n".join(text) + "\n"


def _disturbance(raw: Raw) -> str:
    """Name the runs that other processes disturbed; empty if there were none."""
    disturbed = [run for run in raw["runs"] if run["others"] > DISTURBED]
    if not disturbed:
        return ""
    worst = max(disturbed, key=lambda run: run["others"])
    return (
        f"- {raw['name']} was disturbed: other processes used more than {DISTURBED:g} cores during {len(disturbed)} of "
        f"{len(raw['runs'])} runs, at most {worst['others']:.1f} ({worst['contestant']}). "
        "Its times are not to be relied on."
    )


def verdict(raws: Mapping[str, Raw]) -> str:
    """Say whether the final scores agree."""
    limits = {raw["name"]: tolerance(raw, lines(raw)) for raw in _ordered(raws)}
    judged = ", ".join(f"{name} {100 * limit:.1f}" for name, limit in limits.items() if limit is not None)
    unknown = ", ".join(name for name, limit in limits.items() if limit is None)
    text = []
    if found := [line for raw in _ordered(raws) for line in disagreements(raw)]:
        text += ["Accuracies do not agree:", *(f"- {line}" for line in found)]
    elif judged:
        text += [f"All accuracies agree with the plain loops' within seed noise (in points: {judged})."]
    if unknown:
        text += [f"Accuracies are not judged without a plain loop and a second repeat: {unknown}."]
    return "\n".join(text)


def draw(raws: Mapping[str, Raw], folder: Path) -> None:
    """Draw the seconds of an epoch as `race.svg` and `race.png` in a folder."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    ordered = _ordered(raws)
    style: Any = {"font.size": 8, "svg.hashsalt": "race", "axes.spines.right": False, "axes.spines.top": False}
    with mpl.rc_context(style):
        heights = [len(lines(raw)) for raw in ordered]
        figure = Figure((6.5, 0.8 + sum(0.22 * height + 0.5 for height in heights)), layout="constrained")
        panels = figure.subplots(len(ordered), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
        for axes, raw in zip(panels, ordered, strict=True):
            _draw_work(axes, raw)
        panels[-1].set_xlabel("seconds of an epoch: training, validation, logging (log scale)")
        figure.savefig(folder / "race.svg", metadata={"Date": None})
        figure.savefig(folder / "race.png", dpi=200, metadata={"Software": None})


def _draw_work(axes: Any, raw: Raw) -> None:
    """Bars of one work, with the range over repeats, and how many times as long as ours each takes."""
    summary = lines(raw)
    ours = summary.get(OURS)
    for place, (name, line) in enumerate(summary.items()):
        mine = name == OURS
        axes.barh(place, line.epoch.median, height=0.72, color="#0173b2" if mine else "#b9bec6")
        axes.plot([line.epoch.low, line.epoch.high], [place, place], color="0.2", linewidth=1)
        label = f"{seconds(line.epoch.median)} s"
        if ours and not mine:
            label += f"   {line.epoch.median / ours.epoch.median:.1f}x"
        weight = "bold" if mine else "normal"
        axes.annotate(
            label, (line.epoch.high, place), (4, 0), textcoords="offset points", va="center", fontweight=weight
        )
    axes.set_yticks(range(len(summary)), list(summary))
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    low, high = min(line.epoch.low for line in summary.values()), max(line.epoch.high for line in summary.values())
    axes.set_xlim(low / 2, high * 4)  # a bar on a log scale starts anywhere; room for the labels
    axes.set_title(raw["name"], loc="left", fontweight="bold")
