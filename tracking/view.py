"""The columns of the runs page, as MLflow's UI reads them from a tag of the experiment.

MLflow describes the tag nowhere: this is what its UI itself writes for "Save view" (3.17). A UI that does not know it
shows its own columns.
"""

import json

from tracking.keys import METRIC_COLUMNS, PARAM_COLUMNS

NAME = "Models and splits"  # in the UI's list of views
RUN_NAME, CREATED = "attributes.`Run Name`", "runDateAndNestInfo"  # the two columns that always come first
WIDTHS = {RUN_NAME: 340, CREATED: 130}  # pixels


def shared_view() -> str:
    """Return the value of the tag: our columns, and newest first, the only order in which parents can be expanded."""
    columns = {
        f"{kind}.`{key}`": key
        for kind, keys in (("metrics", METRIC_COLUMNS), ("params", PARAM_COLUMNS))
        for key in keys
    }
    widths = {column: 30 + 13 * len(key) // 2 for column, key in columns.items()}  # as the headings need
    state = {
        "selectedColumns": list(columns),
        "columnOrder": [*WIDTHS, *columns],
        "columnWidths": WIDTHS | widths,
        "orderByKey": "attributes.start_time",
        "orderByAsc": False,
    }
    # the times are shown nowhere, and would make another value of it each time
    return json.dumps({"name": NAME, "createdAt": 0, "updatedAt": 0, "state": json.dumps(state)})
