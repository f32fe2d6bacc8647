"""Reading the result database, comparison tables and figures; needs nothing but the store.

`load_runs` gives one row a run, `comparison_table` one row a model. `python -m analysis table TASK` prints it.
"""

from analysis.plots import confusion_figure, font_families
from analysis.query import load_runs
from analysis.tables import comparison_groups, comparison_table, print_table

__all__ = [
    "comparison_groups",
    "comparison_table",
    "confusion_figure",
    "font_families",
    "load_runs",
    "print_table",
]
