"""Figures of tuning: the score against the budget, and against the values that were tried."""

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from analysis.figures import STYLE, WIDTH, colour, log_axis
from analysis.tuning import TuningCurve, budgets

LABEL = "expected validation\naccuracy (%)"


def curves_figure(curves: Sequence[TuningCurve]) -> Figure:
    """Draw the tuning curves by number of configurations and by compute: mean and ±1 sd over splits.

    A cross is the task's own configuration alone.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.9), layout="constrained")
        panels = figure.subplots(2, 1, sharey=True)
        for axes, by_compute in zip(panels, (False, True), strict=True):
            for curve in curves:
                x, shade = budgets(curve, by_compute), colour(curve.model)
                mean, sd = 100 * curve.mean, 100 * np.nan_to_num(curve.sd)
                axes.plot(x, mean, ".-", color=shade, label=curve.model, markersize=4)
                axes.fill_between(x, mean - sd, mean + sd, color=shade, alpha=0.15, linewidth=0)
                axes.plot(x[:1], [100 * curve.own], "x", color=shade, markersize=4)
            axes.set_ylabel(LABEL)
        panels[0].set_xlabel("configurations (×: the task's own)")
        panels[0].xaxis.set_major_locator(MaxNLocator(integer=True))
        log_axis(panels[1], EngFormatter(sep=""))
        panels[1].set_xlabel("multiply-accumulates of one split")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    return figure


def values_figure(trials: pd.DataFrame, tuned: Sequence[str]) -> Figure:
    """Draw each trial's score against the values of its settings; chosen ones are filled. One row a model."""
    models = sorted(trials["model"].unique())
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.6 + 1.25 * len(models)), layout="constrained")
        grid = figure.subplots(len(models), len(tuned), sharex="col", sharey="row", squeeze=False)
        for model, row in zip(models, grid, strict=True):
            own = trials[trials["model"] == model]
            for key, axes in zip(tuned, row, strict=True):
                numbers = pd.api.types.is_numeric_dtype(own[key]) and not pd.api.types.is_bool_dtype(own[key])
                x = own[key].astype(float) if numbers else own[key].astype(str)
                for chosen, face in ((False, "none"), (True, colour(model))):
                    kind = own["chosen"] == chosen
                    axes.plot(x[kind], 100 * own.loc[kind, "score"], "o", markerfacecolor=face, markersize=3.5,
                              markeredgecolor=colour(model), markeredgewidth=0.6, alpha=0.8)  # fmt: skip
                if numbers and x.min() > 0 and x.max() / x.min() > 10:
                    log_axis(axes, "{x:g}", (1,))
            row[0].set_ylabel(f"{model}\nval. accuracy (%)")
        for key, axes in zip(tuned, grid[-1], strict=True):
            axes.set_xlabel(key)
        figure.suptitle("trials; filled: chosen on its split", fontsize=7)
    return figure
