"""The columns of the UI's runs page, stored in a tag of the experiment.

The tag is undocumented: its content is that of "Save view" in the UI of MLflow 3.17. Other versions may ignore it.
"""

import json

from tracking.keys import METRIC_COLUMNS, PARAM_COLUMNS

NAME = "Models and splits"  # in the UI's list of views
RUN_NAME, CREATED = "attributes.`Run Name`", "runDateAndNestInfo"  # the first two columns are fixed
WIDTHS = {RUN_NAME: 340, CREATED: 130}  # pixels


def shared_view() -> str:
    """Return the tag's value: our columns, newest runs first (the only order in which parents can be expanded)."""
    columns = {
        f"{kind}.`{key}`": key
        for kind, keys in (("metrics", METRIC_COLUMNS), ("params", PARAM_COLUMNS))
        for key in keys
    }
    widths = {column: 30 + 13 * len(key) // 2 for column, key in columns.items()}  # to fit the headings
    state = {
        "selectedColumns": list(columns),
        "columnOrder": [*WIDTHS, *columns],
        "columnWidths": WIDTHS | widths,
        "orderByKey": "attributes.start_time",
        "orderByAsc": False,
    }
    # fixed times, which the UI does not show, keep the value constant
    return json.dumps({"name": NAME, "createdAt": 0, "updatedAt": 0, "state": json.dumps(state)})
