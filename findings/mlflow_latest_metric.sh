#!/usr/bin/env bash
# Expected: a run's "latest" value of a metric is the one that was logged last.
# Happens:  among values of the same step and millisecond it is the largest one, and the history comes in ascending
#           order. log_batch with one time for all, and without steps, is such a case.
# Matters:  of a falling loss the first value is shown, compared and searched for as the result; of an accuracy it is
#           the best one of all epochs. Only a step or a time that differs keeps the order.
# Seen with MLflow 3.17.2, Python 3.11, SQLite 3:
#   logged 0.9, 0.7, 0.5: latest 0.9, history [0.5, 0.7, 0.9]; with steps: latest 0.5, [0.9, 0.7, 0.5]
set -euo pipefail
export MLFLOW_DISABLE_TELEMETRY=true
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet "mlflow==3.17.2" 2>/dev/null
"$folder/env/bin/python" - "sqlite:///$folder/mlflow.db" 2>/dev/null <<'PYTHON'
import sys
import time

from mlflow import MlflowClient
from mlflow.entities import Metric

client = MlflowClient(sys.argv[1])
experiment = client.create_experiment("losses")
now = time.time_ns() // 1_000_000


def stored(steps):
    """Log a falling loss in one batch; the latest value and the history of the run."""
    run = client.create_run(experiment).info.run_id
    client.log_batch(run, [Metric("loss", loss, now, step) for loss, step in zip((0.9, 0.7, 0.5), steps)])
    history = [point.value for point in client.get_metric_history(run, "loss")]
    return client.get_run(run).data.metrics["loss"], history


equal, counted = stored((0, 0, 0)), stored((1, 2, 3))
print(f"logged 0.9, 0.7, 0.5: latest {equal[0]}, history {equal[1]}; with steps: latest {counted[0]}, {counted[1]}")
raise SystemExit(not (equal == (0.9, [0.5, 0.7, 0.9]) and counted == (0.5, [0.9, 0.7, 0.5])))
PYTHON
