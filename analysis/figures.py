"""Figures of a comparison group: one column (3.5 inches) wide, colour-blind safe, one colour per model."""

import contextlib
import hashlib
import io
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, Formatter, LogLocator, NullLocator
from PIL import Image

from analysis.comparison import NETWORKS, ROPE, tabulate
from analysis.evidence import Evidence, predicted_parts
from analysis.fonts import font_families, quiet_about_glyphs
from analysis.formats import shortened, shortened_apart
from analysis.looks import compare_as_planned
from analysis.query import load_curves, load_thumbnails
from analysis.scores import reliability
from tracking import StoreError
from tracking.keys import BASELINES, MEAN
from tracking.scores import score_of

WIDTH = 3.5  # inches: a column of a two-column page
SHOWN_MISTAKES = 20
LONGEST_NAME = 24  # characters of a class at a confusion matrix
KNOWN = ("lenet5", "vggnet", "resnetcnn", "seresnet", "efficientnet_lite", "efficientnet_b0")  # in palette order
MARKERS = "osD^vP*X<>phd"  # numbers follow, so that no two models of a figure have the same
LONGEST_MODEL = 24  # characters of a model's name at an axis; more where names would be alike
SHOWN_ROWS, SHOWN_CURVES = 50, 12  # models or pairs of a figure; the best are shown, and it says so
LONGEST_FILE_NAME = 80  # characters, without suffix
# file formats; without version and date the same figure always gives the same bytes
FORMS: Any = {"png": {"dpi": 200, "metadata": {"Software": None}}, "svg": {"metadata": {"Date": None}}}
PDF: Any = {"pdf": {"metadata": {"Creator": None, "Producer": None, "CreationDate": None}}}
PAPER = (*FORMS, *PDF)  # forms where a person asks for files; the end of every run does without PDF
# seaborn's palette for the colour-blind, without its gray
PALETTE = ("#0173b2", "#de8f05", "#029e73", "#d55e00", "#cc78bc", "#ca9161", "#fbafe4", "#ece133", "#56b4e9")
STYLE: Any = {
    "axes.grid": True, "axes.axisbelow": True, "axes.labelcolor": "0.15", "text.color": "0.15", "xtick.color": "0.15",
    "ytick.color": "0.15", "xtick.bottom": False, "ytick.left": False, "lines.solid_capstyle": "round",
    "font.size": 7, "axes.titlesize": 8, "axes.labelsize": 7, "xtick.labelsize": 6.5, "ytick.labelsize": 6.5,
    "legend.fontsize": 6.5, "axes.edgecolor": "0.4", "grid.color": "0.9", "grid.linewidth": 0.6,
    "axes.linewidth": 0.6, "lines.linewidth": 1.2, "xtick.major.width": 0.6, "ytick.major.width": 0.6,
    "pdf.fonttype": 42,  # TrueType: publishers refuse Type 3
    "svg.hashsalt": "comparison",  # fixed, likewise
}  # fmt: skip


def colour(model: str) -> str:
    """Return the colour of a model in every figure; baselines are gray."""
    if model in BASELINES:
        return "#737373"
    place = KNOWN.index(model) if model in KNOWN else len(KNOWN) + sum(model.encode()) % 3
    return PALETTE[place]


def encode(figure: Figure, form: str) -> bytes:
    """Return the bytes of a figure as a `png`, `svg` or `pdf` file, identical for identical figures."""
    with mpl.rc_context(STYLE), quiet_about_glyphs():
        figure.savefig(buffer := io.BytesIO(), format=form, **(FORMS | PDF)[form])
    # a palette takes a third of the size without a visible difference, except for photographs
    few_colours = form == "png" and not any(axes.images for axes in figure.axes)
    return _with_palette(buffer) if few_colours else buffer.getvalue()


def _with_palette(file: io.BytesIO) -> bytes:
    image = Image.open(file)
    drawn = image.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    drawn.save(smaller := io.BytesIO(), "png", optimize=True, dpi=image.info["dpi"])
    return smaller.getvalue()


def save(figure: Figure, folder: Path, name: str, forms: Iterable[str] = tuple(FORMS)) -> list[Path]:
    """Write a figure as PNG and SVG, or in other forms, and return the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{form}" for form in forms]
    for path in paths:
        path.write_bytes(encode(figure, path.suffix[1:]))
    return paths


def file_name(name: str) -> str:
    """Turn the name of a figure into that of a file, without suffix; other names give other files."""
    plain = re.sub(r"[^\w.-]+", "-", name)[:LONGEST_FILE_NAME]  # models may be called library:name
    return plain if plain == name else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def draw_figures(
    evidence: Evidence, metric: str, rope: float = ROPE, thumbnails: bool = True
) -> Iterator[tuple[str, str | None, Figure]]:
    """Draw all figures that the runs of a group allow; those with pictures of the data only with `thumbnails`.

    Yields
    ------
    name : str
        File name without suffix.
    model : str or None
        The only model in the figure; None if the figure compares models.
    figure : matplotlib.figure.Figure
    """
    table = tabulate(evidence, metric, intervals=False)
    networks = [str(model) for model in table.index if model not in BASELINES]
    curves = load_curves([evidence.task], evidence.tracking_uri)
    curves = curves.merge(evidence.runs[["run_id", "best_epoch"]], on="run_id")
    yield "scores_by_split", None, scores_figure(evidence, table, metric)
    if len(networks) > 1:
        yield "paired_differences", None, differences_figure(evidence, metric, rope)
    if networks:
        yield "accuracy_against_cost", None, cost_figure(table, metric)
    if np.isfinite(curves.loc[curves["model"].isin(networks), "val/loss"]).any():
        yield "learning_curves", None, curves_figure(curves, networks)
    part = metric.partition("/")[0]
    curves_of = {model: reliability(evidence, part, model) for model in networks if part != "last_val"}
    if certain := {model: curve for model, curve in curves_of.items() if curve is not None}:
        yield "reliability", None, reliability_figure(certain)
    classes, parts = evidence.classes, predicted_parts(metric)
    for model in networks:
        runs = evidence.of(model)
        predictions = evidence.pooled(model, parts)
        if predictions is None:
            continue
        confusion = confusion_counts(predictions["true"].to_numpy(), predictions["pred"].to_numpy(), len(classes))
        title = f"{model}, {_part_name(metric)} images, {f'{len(runs)} splits pooled' if len(runs) > 1 else '1 split'}"
        yield file_name(f"confusion_{model}"), model, confusion_figure(confusion, classes, title)
        if thumbnails and (sheet := _sheet_of_mistakes(evidence, model)) is not None:
            yield file_name(f"most_confused_{model}"), model, sheet


def confusion_counts(true: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Count predictions in a matrix of shape (K, K), true classes in rows."""
    return np.bincount(true * classes + predicted, minlength=classes * classes).reshape(classes, classes)


def most_confused(predictions: pd.DataFrame, count: int = SHOWN_MISTAKES) -> pd.DataFrame:
    """Return the most confident wrong predictions, at most one an image and `count` in all, most confident first.

    `predictions` are from `load_predictions`, of one or more splits.
    """
    wrong = predictions[predictions["true"] != predictions["pred"]]
    # the image number breaks ties, so that one split and all splits give the same choice
    wrong = wrong.sort_values(["prob", "index"], ascending=[False, True], kind="stable")
    return wrong.drop_duplicates("index").head(count)


def _sheet_of_mistakes(evidence: Evidence, model: str) -> Figure | None:
    """Draw the mistakes of the part whose pictures the runs keep: the test part or, without one, the validation part.

    It is the same for all metrics.
    """
    runs = evidence.of(model)
    part = "test" if runs["test/accuracy"].notna().any() else "val"
    predictions = evidence.pooled(model, (part,))
    if predictions is None:
        return None
    pictures: dict[int, np.ndarray] = {}
    for _, run in runs.iterrows():
        with contextlib.suppress(StoreError):
            pictures |= load_thumbnails(run, evidence.tracking_uri)
    title = f"{model}: its most confident mistakes, {'test' if part == 'test' else 'validation'} images"
    return mistakes_figure(predictions, pictures, evidence.classes, title)


def curves_figure(curves: pd.DataFrame, models: Sequence[str]) -> Figure:
    """Draw loss and accuracy by epoch, one row of panels per model.

    Mean and ±1 sd band over splits end with the shortest split: beyond it, the mean would cover only the splits that
    early stopping left. Thin lines are single splits, with a dot at the best epoch. Only the first models are drawn.
    """
    some = f"the best {SHOWN_CURVES} of {len(models)} models" if len(models) > SHOWN_CURVES else None
    models = models[:SHOWN_CURVES]
    names = shortened_apart(models, LONGEST_MODEL)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.55 + 1.15 * len(models)), layout="constrained")
        grid = figure.subplots(len(models), 2, sharex=True, sharey="col", squeeze=False)
        for model, row in zip(models, grid, strict=True):
            own = curves[curves["model"] == model]
            for axes, score in zip(row, ("loss", "accuracy"), strict=True):
                _draw_curves(axes, own, f"train/{score}", "0.5", "--")
                _draw_curves(axes, own, f"val/{score}", colour(model), "-")
                best = own[own["epoch"] == own["best_epoch"]]
                axes.plot(best["epoch"], _scale(score) * best[f"val/{score}"], ".", color=colour(model), markersize=4)
                axes.margins(x=0.02)
            row[0].set_ylabel(f"{names[model]}\nloss", parse_math=False)
            row[1].set_ylabel("accuracy (%)")
        top = curves[curves["model"].isin(models)][["val/loss", "train/loss"]]
        grid[0, 0].set_ylim(0, 1.1 * float(np.nanquantile(top.to_numpy(), 0.98)))  # robust to single outlying epochs
        handles = [Line2D([], [], color="0.5", linestyle="--"), Line2D([], [], color=colour(models[0]))]
        figure.legend(handles, ["train", "validation"], loc="outside upper center", ncols=2, frameon=False,
                      title=some, title_fontsize=6.5)  # fmt: skip
        for axes in grid[-1]:
            axes.set_xlabel("epoch")
    return figure


def _draw_curves(axes: Axes, curves: pd.DataFrame, key: str, shade: Any, line: str) -> None:
    wide = _scale(key) * curves.pivot(index="epoch", columns="run_id", values=key)
    axes.plot(wide.index, wide, color=shade, linewidth=0.4, alpha=0.35, linestyle=line)
    shared = wide.dropna()  # epochs that every split reached
    mean, sd = shared.mean(axis=1), shared.std(axis=1).fillna(0.0)
    axes.plot(shared.index, mean, color=shade, linestyle=line)
    axes.fill_between(shared.index.astype(float), mean - sd, mean + sd, color=shade, alpha=0.2, linewidth=0)


def reliability_figure(curves: Mapping[str, pd.DataFrame]) -> Figure:
    """Draw how often the predicted class is right, by its probability; from `analysis.scores.reliability` by model.

    The area of a dot is in proportion to its images. On the dashed line the probabilities are right.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, WIDTH), layout="constrained")
        axes = figure.subplots()
        axes.plot([0, 100], [0, 100], color="0.5", linestyle="--", linewidth=0.8)
        for model, curve in curves.items():
            x, y = 100 * curve["certainty"], 100 * curve["accuracy"]
            axes.plot(x, y, color=colour(model), label=model)
            axes.scatter(x, y, 60 * curve["images"] / curve["images"].sum(), color=colour(model), zorder=3)
        lowest = min(curve[["certainty", "accuracy"]].to_numpy().min() for curve in curves.values())
        axes.set_xlim(100 * lowest - 3, 101)
        axes.set_ylim(100 * lowest - 3, 101)
        axes.set_xlabel("probability of the predicted class (%)")
        axes.set_ylabel("predictions that are right (%)")
        axes.legend(frameon=False, loc="upper left")
    return figure


def scores_figure(evidence: Evidence, table: pd.DataFrame, metric: str) -> Figure:
    """Draw the score of every split, and each model's mean with its 95 % interval."""
    some = f"\nthe best {SHOWN_ROWS} of {len(table)} models" if len(table) > SHOWN_ROWS else ""
    table = table[:SHOWN_ROWS]
    splits = [evidence.of(str(model))[metric] for model in table.index]
    colours = [colour(str(model)) for model in table.index]
    names = shortened_apart(list(map(str, table.index)), LONGEST_MODEL).values()
    figure = _rows(names, splits, table[["mean", "low", "high"]], colours, _scale(metric))
    _label_below(figure, f"{_axis_name(metric)}\npoints: splits; bars: 95 % interval of the mean{some}")
    return figure


def differences_figure(evidence: Evidence, metric: str, rope: float) -> Figure:
    """Draw the differences of all pairs of networks by split, their means with interval, and the equivalence region.

    If there are more than `SHOWN_ROWS` pairs, only those of the best network are drawn.
    """
    tests, _ = compare_as_planned(evidence, metric, rope, families=(NETWORKS,))
    some = ""
    if len(tests) > SHOWN_ROWS:
        some = f"\nthe best network and others: {{}} of {len(tests):,} pairs"
        tests = tests[tests["model_a"] == tests["model_a"].iloc[0]][:SHOWN_ROWS]
        some = some.format(len(tests))
    pairs = list(zip(tests["model_a"], tests["model_b"], strict=True))
    splits = [evidence.differences(metric, *pair) for pair in pairs]
    short = shortened_apart(list(dict.fromkeys(itertools.chain(*pairs))), LONGEST_MODEL * 2 // 3)
    names, colours = [f"{short[a]} − {short[b]}" for a, b in pairs], [colour(a) for a, _ in pairs]
    reach = rope * _scale(metric)
    estimates = tests[["difference", "low", "high"]]
    estimates = estimates.clip(-1, 1) if score_of(metric).is_share else estimates
    figure = _rows(names, splits, estimates, colours, _scale(metric))
    figure.axes[0].axvspan(-reach, reach, color="0.88", linewidth=0, zorder=0)
    figure.axes[0].axvline(0, color="0.3", linewidth=0.8, zorder=1)
    label = f"difference of {_axis_name(metric, unit=False)} ({score_of(metric).difference_unit})"
    _label_below(figure, f"{label}\ngray: practically the same{some}")
    return figure


def _label_below(figure: Figure, text: str) -> None:
    """Label the axis below, over the whole width: beside long names it is wider than the axes."""
    figure.supxlabel(text, fontsize=STYLE["axes.labelsize"], color=STYLE["axes.labelcolor"])


def _rows(
    names: Iterable[str], splits: Sequence[pd.Series], estimates: pd.DataFrame, colours: Sequence[Any], scale: float
) -> Figure:
    """Draw mean and interval in a row for each name, and above them a point a split."""
    count = len(splits)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.75 + 0.32 * count), layout="constrained")
        axes = figure.subplots()
        for row, (values, estimate, shade) in enumerate(zip(splits, estimates.to_numpy(float), colours, strict=True)):
            spread = row - 0.18 - 0.06 * (np.arange(len(values)) % 4)  # keeps equal scores apart
            points = scale * values.to_numpy(float)
            axes.plot(points, spread, "o", color=shade, markersize=2.6, alpha=0.6, markeredgewidth=0)
            mean, low, high = scale * estimate
            if np.isfinite(low):
                axes.plot([low, high], [row, row], color="0.1", linewidth=1.1, zorder=3)
            axes.plot([mean], [row], "D", color="white", markeredgecolor="0.1", markersize=3.6, markeredgewidth=0.9,
                      zorder=4)  # fmt: skip
        axes.set_yticks(range(count), names, parse_math=False)
        axes.set_ylim(count - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
    return figure


def cost_figure(table: pd.DataFrame, metric: str) -> Figure:
    """Draw the score against parameters, multiply-accumulates and training time.

    The step line joins the networks that no cheaper one beats. Baselines within the range are horizontal lines.
    """
    costs = {"parameters": "parameters", "macs": "multiply-accumulates an image"}
    costs |= {f"{MEAN}train_seconds": "training and validation, seconds a split"}
    networks = table[~table["baseline"]].dropna(subset=["mean", *costs])
    lower_is_better = not score_of(metric).higher_is_better
    some = f"the best {SHOWN_ROWS} of {len(networks)} networks" if len(networks) > SHOWN_ROWS else None
    networks = networks[:SHOWN_ROWS]
    names = shortened_apart(list(map(str, networks.index)), 2 * LONGEST_MODEL)
    longest = max(map(len, names.values()), default=0)
    columns = 3 if longest <= 17 else 2 if longest <= 2 * LONGEST_MODEL - 20 else 1  # of names that fit the width
    extra = max(0, -(-len(networks) // columns) - 3)  # lines of the legend
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 5.0 + 0.14 * extra), layout="constrained")
        panels = figure.subplots(3, 1, sharey=True)
        for axes, (key, label) in zip(panels, costs.items(), strict=True):
            for number, (model, row) in enumerate(networks.iterrows()):
                marker = MARKERS[number] if number < len(MARKERS) else f"${number + 1}$"
                low, high = (abs(row["mean"] - row[end]) if pd.notna(row[end]) else 0.0 for end in ("low", "high"))
                reach = _scale(metric) * np.array([[low], [high]])
                style = {"marker": marker, "linestyle": "", "linewidth": 0.9, "color": colour(str(model))}
                style |= {"markersize": 4.5 if len(marker) == 1 else 7, "label": names[str(model)]}
                axes.errorbar(row[key], _scale(metric) * row["mean"], reach, **style)
            frontier = networks.sort_values([key, "mean"], ascending=[True, lower_is_better])
            best = frontier["mean"].cummin() if lower_is_better else frontier["mean"].cummax()
            frontier = frontier[frontier["mean"].eq(best) & ~best.duplicated()]
            axes.plot(frontier[key].astype(float), _scale(metric) * frontier["mean"], drawstyle="steps-post",
                      color="0.5", linewidth=0.8, zorder=0)  # fmt: skip
            log_axis(axes, "{x:g}" if key.endswith("seconds") else EngFormatter(sep=""))
            axes.margins(x=0.15)
            axes.set_xlabel(label)
        figure.supylabel(_axis_name(metric), fontsize=mpl.rcParams["axes.labelsize"])  # one: panels may be low
        panels[0].margins(y=0.15)
        bottom, top = panels[0].get_ylim()
        baselines = table.loc[table["baseline"], "mean"] * _scale(metric)
        for axes in panels:
            for base, level in baselines[baselines.between(bottom, top)].items():
                axes.axhline(level, color=colour(str(base)), linewidth=0.8, linestyle=":", zorder=0)
                x, side = (0.99, "right") if base == "linear" else (0.01, "left")  # apart, in case the levels are close
                axes.annotate(str(base), (x, level), xycoords=("axes fraction", "data"), ha=side, va="bottom",
                              fontsize=6, color=colour(str(base)))  # fmt: skip
        legend = figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=columns,
                               frameon=False, title=some, title_fontsize=6.5)  # fmt: skip
        for text in legend.get_texts():
            text.set_parse_math(False)
    return figure


def log_axis(axes: Axes, form: str | Formatter, labelled: Sequence[int] = (1, 2, 5)) -> None:
    """Make the x axis logarithmic, with labels at these multiples of each power of ten."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=labelled))
    axes.xaxis.set_major_formatter(form)
    axes.xaxis.set_minor_locator(NullLocator())


def confusion_figure(confusion: np.ndarray, classes: Sequence[str], title: str) -> Figure:
    """Draw a confusion matrix of counts, shape (K, K) with true classes in rows, coloured by share of the true class.

    Up to 4 classes, the numbers are counts; up to 20, per cent of the true class; beyond, numbers and overlapping names
    are left out. The width is one column, or up to 12 inches for many classes.
    """
    size = len(classes)
    side = min(12.0, max(WIDTH, 0.3 * size + 0.9))
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    numbers = np.full(shares.shape, "")
    if size <= 4:
        numbers = np.vectorize("{:,d}".format)(confusion)
    elif size <= 20:
        numbers = np.where(shares < 0.005, "", np.round(100 * shares).astype(int).astype(str))
        title += "\n% of the true class"
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(side, side), dpi=100, layout="constrained")
        axes = figure.subplots()
        axes.pcolormesh(shares, cmap="Blues", vmin=0, vmax=1, rasterized=size > 60)  # else an SVG of 17 MB
        axes.set(aspect="equal", ylim=(size, 0))
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        for (row, column), number in np.ndenumerate(numbers):
            shade = "white" if shares[row, column] > 0.5 else "0.15"
            if number:
                axes.text(column + 0.5, row + 0.5, number, ha="center", va="center", fontsize=6.5, color=shade)
        shown = range(0, size, 1 + size // 60)
        names = [shortened(classes[label], LONGEST_NAME) for label in shown]
        text = _any_text([*classes, title])
        ticks = [label + 0.5 for label in shown]
        axes.set_xticks(ticks, names, rotation=45, ha="right", rotation_mode="anchor", **text)
        axes.set_yticks(ticks, names, rotation=0, **text)
        axes.set_xlabel("predicted")
        axes.set_ylabel("true")
        # over the whole figure: over axes beside long names its end would be cut off
        figure.suptitle(title, fontsize=STYLE["axes.titlesize"], **text)
    return figure


def mistakes_figure(
    predictions: pd.DataFrame, pictures: dict[int, np.ndarray], classes: Sequence[str], title: str
) -> Figure | None:
    """Draw a contact sheet of the most confident mistakes; None if no thumbnail of them is stored."""
    worst = most_confused(predictions)
    worst = worst[worst["index"].isin(pictures)]
    if worst.empty:
        return None
    columns = 4
    rows = -(-len(worst) // columns)
    text = _any_text([*classes, title])
    # placed by hand, in inches: automatic layout of so many axes takes longer than all other figures
    side, below_title, between, margin = 0.8, 0.2, 0.25, 0.06
    height = below_title + rows * (side + between) + margin
    top = 1 - (below_title + between) / height
    place = {"left": margin / WIDTH, "right": 1 - margin / WIDTH, "bottom": margin / height, "top": top}
    place |= {"wspace": 0.05, "hspace": between / side}
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height))
        figure.suptitle(title, fontsize=8, y=1 - margin / height, **text)
        grid = figure.subplots(rows, columns, squeeze=False, gridspec_kw=place)
        for axes in grid.flat:
            axes.axis("off")
        for axes, (_, row) in zip(grid.flat, worst.iterrows(), strict=False):
            axes.imshow(pictures[int(row["index"])].squeeze(), cmap="gray", vmin=0, vmax=255)
            true, predicted = (shortened(classes[int(row[label])], 9) for label in ("true", "pred"))
            axes.set_title(f"is {true}\nsaid {predicted}, {_certainty(row['prob'])}", fontsize=5, pad=2, **text)
    return figure


def _certainty(probability: float) -> str:
    """Format as per cent, with 100 only for exactly 1."""
    return f"{min(100 * probability, 99.9 if probability < 1 else 100):.3g} %"


def _any_text(texts: Sequence[str]) -> dict[str, Any]:
    """Settings of a text with arbitrary names: fonts for their scripts, and no formula in "a$b$c"."""
    return {"fontfamily": font_families(texts), "parse_math": False}


def _scale(metric: str) -> float:
    return score_of(f"test/{metric.rpartition('/')[2]}").scale  # a curve's key, such as train/loss, has another part


def _part_name(metric: str) -> str:
    names = {
        "all": "validation and test",
        "test": "test",
        "best_val": "validation",
        "cross_val": "cross-fitted validation",
        "last_val": "last validation",
    }
    return names[metric.partition("/")[0]]


def _axis_name(metric: str, unit: bool = True) -> str:
    score = score_of(metric)
    return f"{_part_name(metric)} {score.label}" + (f" ({score.unit})" if unit else "")
