"""Figures of a comparison group: made for a column of 3.5 inches, safe for colour-blind eyes, one colour a model."""

import contextlib
import io
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, LogLocator, NullLocator
from PIL import Image

from analysis.comparison import NETWORKS, Evidence, compare, predicted_part, tabulate
from analysis.fonts import font_families
from analysis.query import load_curves, load_thumbnails
from tracking import StoreError
from tracking.keys import BASELINES, MEAN
from tracking.scores import SCORES, score_of

WIDTH = 3.5  # inches: a column of a two-column page
SHOWN_MISTAKES = 20
KNOWN = ("lenet5", "vggnet", "resnetcnn", "seresnet", "efficientnet_lite", "efficientnet_b0")  # a fixed colour each
MARKERS = "osD^vP*X"
FORMS: Any = {  # of files; without the metadata that differs from one drawing to the next
    "png": {"dpi": 200, "metadata": {"Software": None}},
    "svg": {"metadata": {"Date": None}},
}
STYLE: Any = {
    "font.size": 7, "axes.titlesize": 8, "axes.labelsize": 7, "xtick.labelsize": 6.5, "ytick.labelsize": 6.5,
    "legend.fontsize": 6.5, "axes.edgecolor": "0.4", "grid.color": "0.9", "grid.linewidth": 0.6,
    "axes.linewidth": 0.6, "lines.linewidth": 1.2, "xtick.major.width": 0.6, "ytick.major.width": 0.6,
    "svg.hashsalt": "comparison",  # the same figure is the same file
}  # fmt: skip


def colour(model: str) -> tuple[float, float, float]:
    """The colour of a model in every figure; baselines are gray."""
    if model in BASELINES:
        return (0.45, 0.45, 0.45)
    palette = seaborn.color_palette("colorblind")
    place = KNOWN.index(model) if model in KNOWN else (6, 8, 9)[sum(model.encode()) % 3]  # 7 is gray
    red, green, blue = palette[place]
    return red, green, blue


@contextlib.contextmanager
def _style() -> Iterator[None]:
    with seaborn.axes_style("whitegrid"), mpl.rc_context(STYLE):
        yield


def encode(figure: Figure, form: str) -> bytes:
    """Return a figure as the content of a `png` or `svg` file, the same each time."""
    with mpl.rc_context(STYLE):
        figure.savefig(buffer := io.BytesIO(), format=form, **FORMS[form])
    # a third of the size, and no difference to the eye; photographs need all their colours
    few_colours = form == "png" and not any(axes.images for axes in figure.axes)
    return _with_palette(buffer) if few_colours else buffer.getvalue()


def _with_palette(file: io.BytesIO) -> bytes:
    image = Image.open(file)
    drawn = image.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    drawn.save(smaller := io.BytesIO(), "png", optimize=True, dpi=image.info["dpi"])
    return smaller.getvalue()


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write a figure as PNG and SVG, and return the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{form}" for form in FORMS]
    for path in paths:
        path.write_bytes(encode(figure, path.suffix[1:]))
    return paths


def draw_figures(
    evidence: Evidence, metric: str, rope: float = 0.01, thumbnails: bool = True
) -> Iterator[tuple[str, str | None, Figure]]:
    """Draw every figure that a group's runs allow.

    Parameters
    ----------
    evidence : Evidence
    metric : str
        One of `tracking.scores.METRICS`.
    rope : float
        Region of practical equivalence, in the metric's units.
    thumbnails : bool
        Whether to draw those that show pictures of the data.

    Yields
    ------
    name : str
        Of the file.
    model : str or None
        The one that the figure is about; None where it compares.
    figure : matplotlib.figure.Figure
    """
    table = tabulate(evidence, metric)
    networks = [str(model) for model in table.index if model not in BASELINES]
    curves = load_curves([evidence.runs["task"].iloc[0]], evidence.tracking_uri)
    curves = curves.merge(evidence.runs[["run_id", "best_epoch"]], on="run_id")
    yield "scores_by_split", None, scores_figure(evidence, table, metric)
    if len(networks) > 1:
        yield "paired_differences", None, differences_figure(evidence, metric, rope)
    if networks:
        yield "accuracy_against_cost", None, cost_figure(table, metric)
    if np.isfinite(curves.loc[curves["model"].isin(networks), "val/loss"]).any():
        yield "learning_curves", None, curves_figure(curves, networks)
    classes = evidence.classes
    part = predicted_part(metric)
    for model in networks:
        runs = evidence.of(model)
        predictions = evidence.pooled(model, part)
        if predictions is None:
            continue
        confusion = confusion_counts(predictions["true"].to_numpy(), predictions["pred"].to_numpy(), len(classes))
        name = "test" if part == "test" else "validation"
        title = f"{model}, {name} part, {len(runs)} splits pooled"
        yield f"confusion_{model}", model, confusion_figure(confusion, classes, title)
        if not thumbnails:
            continue
        pictures = _thumbnails(evidence, runs)
        sheet = mistakes_figure(predictions, pictures, classes, f"{model}: its most confident mistakes")
        if sheet is not None:
            yield f"most_confused_{model}", model, sheet


def confusion_counts(true: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Counts, shape (K, K), true classes in rows."""
    return np.bincount(true * classes + predicted, minlength=classes * classes).reshape(classes, classes)


def most_confused(predictions: pd.DataFrame, count: int = SHOWN_MISTAKES) -> pd.DataFrame:
    """Choose the images that were wrong with the most confidence.

    Parameters
    ----------
    predictions : pandas.DataFrame
        From `load_predictions`, of one or more splits.
    count : int
        How many images at most.

    Returns
    -------
    pandas.DataFrame
        The prediction of each image that was most confident while wrong, the most confident first.
    """
    wrong = predictions[predictions["true"] != predictions["pred"]]
    # the image number breaks ties, so that the choice is the same for one split and for all
    wrong = wrong.sort_values(["prob", "index"], ascending=[False, True], kind="stable")
    return wrong.drop_duplicates("index").head(count)


def _thumbnails(evidence: Evidence, runs: pd.DataFrame) -> dict[int, np.ndarray]:
    """Small pictures by image number, as far as these runs kept them."""
    pictures: dict[int, np.ndarray] = {}
    for _, run in runs.iterrows():
        with contextlib.suppress(StoreError):
            pictures |= load_thumbnails(run, evidence.tracking_uri)
    return pictures


def curves_figure(curves: pd.DataFrame, models: Sequence[str]) -> Figure:
    """Loss and accuracy by epoch, a row of panels a model.

    The line is the mean over splits and the band ±1 sd, as far as all splits were trained: beyond, the mean would be
    over the few that early stopping let go on. Each split's own curve is drawn thinly to its end, with a dot at its
    best epoch.
    """
    with _style():
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
            row[0].set_ylabel(f"{model}\nloss")
            row[1].set_ylabel("accuracy (%)")
        top = curves[curves["model"].isin(models)][["val/loss", "train/loss"]]
        grid[0, 0].set_ylim(0, 1.1 * float(np.nanquantile(top.to_numpy(), 0.98)))  # one wild epoch hides nothing
        handles = [Line2D([], [], color="0.5", linestyle="--"), Line2D([], [], color=colour(models[0]))]
        figure.legend(handles, ["train", "validation"], loc="outside upper center", ncols=2, frameon=False)
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


def scores_figure(evidence: Evidence, table: pd.DataFrame, metric: str) -> Figure:
    """Every split's score, and each model's mean with its 95 % interval."""
    with _style():
        figure = Figure(figsize=(WIDTH, 0.7 + 0.32 * len(table)), layout="constrained")
        axes = figure.subplots()
        for place, (model, row) in enumerate(table.iterrows()):
            scores = evidence.of(str(model))[metric].to_numpy(float)
            _draw_points(axes, place, scores, (row["mean"], row["low"], row["high"]), colour(str(model)), metric)
        axes.set_yticks(range(len(table)), table.index)
        axes.set_ylim(len(table) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(f"{_axis_name(metric)}\npoints: splits; bars: 95 % interval of the mean")
    return figure


def differences_figure(evidence: Evidence, metric: str, rope: float) -> Figure:
    """Differences of every pair of networks split by split, their mean with interval, and the region of equivalence."""
    tests = compare(evidence, metric, rope)
    tests = tests[tests["family"] == NETWORKS].reset_index(drop=True)
    with _style():
        figure = Figure(figsize=(WIDTH, 0.8 + 0.32 * len(tests)), layout="constrained")
        axes = figure.subplots()
        scale = _scale(metric)
        axes.axvspan(-rope * scale, rope * scale, color="0.88", linewidth=0, zorder=0)
        axes.axvline(0, color="0.3", linewidth=0.8, zorder=1)
        for place, row in tests.iterrows():
            values = evidence.differences(metric, row["model_a"], row["model_b"]).to_numpy(float)
            estimate = (row["difference"], row["low"], row["high"])
            _draw_points(axes, int(str(place)), values, estimate, colour(row["model_a"]), metric)
        axes.set_yticks(range(len(tests)), [f"{row['model_a']} − {row['model_b']}" for _, row in tests.iterrows()])
        axes.set_ylim(len(tests) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        unit = f" ({score_of(metric).difference_unit})"
        axes.set_xlabel(f"difference of {_axis_name(metric, unit=False)}{unit}\ngray: practically the same")
    return figure


def _draw_points(
    axes: Axes, place: int, values: np.ndarray, estimate: tuple[float, float, float], shade: Any, metric: str
) -> None:
    """One row: mean and interval, and above them a point a split, spread so that equal scores stay apart."""
    scale = _scale(metric)
    spread = place - 0.18 - 0.06 * (np.arange(len(values)) % 4)
    axes.plot(scale * values, spread, "o", color=shade, markersize=2.6, alpha=0.6, markeredgewidth=0)
    mean, low, high = (scale * value for value in estimate)
    if np.isfinite(low):
        axes.plot([low, high], [place, place], color="0.1", linewidth=1.1, zorder=3)
    axes.plot([mean], [place], "D", color="white", markeredgecolor="0.1", markersize=3.6, markeredgewidth=0.9, zorder=4)


def cost_figure(table: pd.DataFrame, metric: str) -> Figure:
    """Score against parameters, multiply-accumulates and training time.

    The step line joins the networks that no cheaper one beats. Baselines are lines where they lie among the networks.
    """
    costs = {
        "parameters": "parameters",
        "macs": "multiply-accumulates an image",
        f"{MEAN}train_seconds": "training and validation, seconds a split",
    }
    networks = table[~table["baseline"]].dropna(subset=["mean", *costs])
    lower_is_better = not score_of(metric).higher_is_better
    with _style():
        figure = Figure(figsize=(WIDTH, 5.0), layout="constrained")
        panels = figure.subplots(3, 1, sharey=True)
        for axes, (key, label) in zip(panels, costs.items(), strict=True):
            for (model, row), marker in zip(networks.iterrows(), itertools.cycle(MARKERS), strict=False):
                low, high = (abs(row["mean"] - row[end]) if pd.notna(row[end]) else 0.0 for end in ("low", "high"))
                reach = _scale(metric) * np.array([[low], [high]])
                axes.errorbar(row[key], _scale(metric) * row["mean"], reach, fmt=marker, color=colour(str(model)),
                              markersize=4.5, linewidth=0.9, label=model)  # fmt: skip
            frontier = networks.sort_values([key, "mean"], ascending=[True, lower_is_better])
            best = frontier["mean"].cummin() if lower_is_better else frontier["mean"].cummax()
            frontier = frontier[frontier["mean"].eq(best) & ~best.duplicated()]
            axes.plot(frontier[key].astype(float), _scale(metric) * frontier["mean"], drawstyle="steps-post",
                      color="0.5", linewidth=0.8, zorder=0)  # fmt: skip
            axes.set_xscale("log")
            axes.margins(x=0.15)
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter("{x:g}" if key.endswith("seconds") else EngFormatter(sep=""))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_xlabel(label)
            axes.set_ylabel(_axis_name(metric))
        panels[0].margins(y=0.15)
        bottom, top = panels[0].get_ylim()
        baselines = table.loc[table["baseline"], "mean"] * _scale(metric)
        for axes in panels:
            for base, level in baselines[baselines.between(bottom, top)].items():
                axes.axhline(level, color=colour(str(base)), linewidth=0.8, linestyle=":", zorder=0)
                x, side = (0.99, "right") if base == "linear" else (0.01, "left")  # they may lie close together
                axes.annotate(str(base), (x, level), xycoords=("axes fraction", "data"), ha=side, va="bottom",
                              fontsize=6, color=colour(str(base)))  # fmt: skip
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    return figure


def confusion_figure(confusion: np.ndarray, classes: Sequence[str], title: str) -> Figure:
    """Draw a confusion matrix, coloured by the share of the true class.

    Parameters
    ----------
    confusion : numpy.ndarray of int, shape (K, K)
        Counts; rows are true classes.
    classes : sequence of str
    title : str

    Returns
    -------
    matplotlib.figure.Figure
        A column wide, more for many classes (12 inches at most). The numbers are counts for up to four classes, then
        per cent of the true class; with more than 20 they, and names that would overlap, are left out.
    """
    size = len(classes)
    side = min(12.0, max(WIDTH, 0.3 * size + 0.9))
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    numbers: Any = False
    if size <= 4:
        numbers = np.vectorize("{:,d}".format)(confusion)
    elif size <= 20:
        numbers = np.where(shares < 0.005, "", np.round(100 * shares).astype(int).astype(str))
        title += "\n% of the true class"
    with _style():
        figure = Figure(figsize=(side, side), dpi=100, layout="constrained")
        axes = figure.subplots()
        seaborn.heatmap(shares, annot=numbers, fmt="", annot_kws={"fontsize": 6.5}, cmap="Blues", vmin=0, vmax=1,
                        cbar=False, square=True, ax=axes)  # fmt: skip
        shown = range(0, size, 1 + size // 60)
        names = [classes[label] for label in shown]
        text = _any_text([*classes, title])
        axes.set_xticks(
            [label + 0.5 for label in shown], names, rotation=45, ha="right", rotation_mode="anchor", **text
        )
        axes.set_yticks([label + 0.5 for label in shown], names, rotation=0, **text)
        axes.set_xlabel("predicted")
        axes.set_ylabel("true")
        axes.set_title(title, **text)
    return figure


def mistakes_figure(
    predictions: pd.DataFrame, pictures: dict[int, np.ndarray], classes: Sequence[str], title: str
) -> Figure | None:
    """Contact sheet of the images that were wrong with the most confidence; None where no picture was kept."""
    worst = most_confused(predictions)
    worst = worst[worst["index"].isin(pictures)]
    if worst.empty:
        return None
    columns = 4
    rows = -(-len(worst) // columns)
    text = _any_text([*classes, title])
    # Placed by hand, in inches: finding a layout for so many axes takes longer than all the other figures.
    side, below_title, between, margin = 0.8, 0.2, 0.25, 0.06
    height = below_title + rows * (side + between) + margin
    place = {
        "left": margin / WIDTH, "right": 1 - margin / WIDTH,
        "bottom": margin / height, "top": 1 - (below_title + between) / height,
        "wspace": 0.05, "hspace": between / side,
    }  # fmt: skip
    with _style():
        figure = Figure(figsize=(WIDTH, height))
        figure.suptitle(title, fontsize=8, y=1 - margin / height, **text)
        grid = figure.subplots(rows, columns, squeeze=False, gridspec_kw=place)
        for axes in grid.flat:
            axes.axis("off")
        for axes, (_, row) in zip(grid.flat, worst.iterrows(), strict=False):
            axes.imshow(pictures[int(row["index"])].squeeze(), cmap="gray", vmin=0, vmax=255)
            true, predicted = (_shortened(classes[int(row[label])]) for label in ("true", "pred"))
            axes.set_title(f"is {true}\nsaid {predicted}, {_certainty(row['prob'])}", fontsize=5, pad=2, **text)
    return figure


def _shortened(name: str) -> str:
    """A class name that fits above a small picture."""
    return name if len(name) <= 12 else f"{name[:11]}…"


def _certainty(probability: float) -> str:
    """Per cent, and 100 only where it is."""
    return f"{min(100 * probability, 99.9 if probability < 1 else 100):.3g} %"


def _any_text(texts: Sequence[str]) -> dict[str, Any]:
    """Settings of a text that holds names people chose: their script, and no formula where one is called "a$b$c"."""
    return {"fontfamily": font_families(texts), "parse_math": False}


def _scale(metric: str) -> float:
    """Factor to the number that is shown, of a metric or a score."""
    return SCORES[metric.rpartition("/")[2]].scale


def _axis_name(metric: str, unit: bool = True) -> str:
    part, score = metric.split("/")
    names = {"test": "test", "best_val": "validation", "last_val": "last validation"}
    return f"{names[part]} {SCORES[score].label}" + (f" ({SCORES[score].unit})" if unit else "")
