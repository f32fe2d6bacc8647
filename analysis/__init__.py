"""Which model is better, by how much, and is it real? Read from the result database alone.

`load_runs`, `load_curves` and `load_predictions` give tidy frames; `comparison_table` one row a model;
`pairwise_tests` one row a pair; `analysis.figures` draws. `python -m analysis` makes tables, figures and the report;
comparison.ipynb teaches the rest. The statistics are explained in docs/statistics.md.
"""

from analysis.comparison import comparison_table, pairwise_tests, summarise
from analysis.evidence import Evidence, default_metric
from analysis.formats import print_scores
from analysis.groups import choose_group, comparison_groups, finished
from analysis.query import load_curves, load_predictions, load_runs, local_artifact

__all__ = [
    "Evidence",
    "choose_group",
    "comparison_groups",
    "comparison_table",
    "default_metric",
    "finished",
    "load_curves",
    "load_predictions",
    "load_runs",
    "local_artifact",
    "pairwise_tests",
    "print_scores",
    "summarise",
]
