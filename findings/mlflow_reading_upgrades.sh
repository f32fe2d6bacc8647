#!/usr/bin/env bash
# Expected: MlflowClient.search_experiments() reads a SQLite store and leaves it as it is.
# Happens:  if an earlier MLflow made the store, the new one upgrades its schema in place, without a question or a
#           backup, and the earlier MLflow refuses the file from then on.
# Matters:  one look by a colleague with a newer version takes the results away from everybody else.
# Seen with MLflow 2.22.0 (SQLAlchemy 2.0.x) and MLflow 3.17.2, Python 3.11, SQLite 3:
#   schema before the look 0584bdc529eb, after it dc11669786a5; then 2.22.0 ends in a traceback of alembic,
#   "Can't locate revision identified by 'dc11669786a5'".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export MLFLOW_DISABLE_TELEMETRY=true PIP_QUIET=1
python3 -m venv "$folder/old" && "$folder/old/bin/pip" install "mlflow-skinny==2.22.0" "sqlalchemy==2.0.44" "alembic<2" \
    pandas numpy flask 2>/dev/null
python3 -m venv "$folder/new" && "$folder/new/bin/pip" install "mlflow==3.17.2" 2>/dev/null
store="sqlite:///$folder/mlflow.db"
schema() {
    python3 -c 'import sqlite3, sys; print(sqlite3.connect(sys.argv[1]).execute("SELECT * FROM alembic_version").fetchone()[0])' \
        "$folder/mlflow.db"
}
look='import sys; from mlflow import MlflowClient; print(len(MlflowClient(sys.argv[1]).search_experiments()))'
"$folder/old/bin/python" -c "$look" "$store" >/dev/null 2>&1
before=$(schema)
"$folder/new/bin/python" -c "$look" "$store" >/dev/null 2>&1
after=$(schema)
if "$folder/old/bin/python" -c "$look" "$store" >"$folder/again" 2>&1; then again=opens; else again=refuses; fi
echo "before $before, after a look by the newer version $after; the older one $again the store"
[ "$before" = 0584bdc529eb ] && [ "$after" = dc11669786a5 ] && [ "$again" = refuses ] &&
    grep -q "Can't locate revision identified by 'dc11669786a5'" "$folder/again"
