#!/bin/sh
# The tracking server: what the container, README.md and the tests start, so that it is the same one.
#
#   MLFLOW_BACKEND_STORE_URI      the database, such as postgresql+psycopg://mlflow@127.0.0.1/mlflow. Its password is read
#                                 by PostgreSQL's own client: PGPASSWORD, or ~/.pgpass
#   MLFLOW_ARTIFACTS_DESTINATION  where files go: s3://BUCKET, or a folder's absolute path
#   MLFLOW_SERVER_ALLOWED_HOSTS   Host headers that are answered, port included; * stands for anything
#
# What is not set here is mlflow's own: MLFLOW_HOST (127.0.0.1), MLFLOW_PORT (5000), MLFLOW_WORKERS (4), and for S3
# MLFLOW_S3_ENDPOINT_URL and the AWS_ variables. Arguments are handed on to `mlflow server`.
set -eu

# mlflow reads it from the environment; as an option, with a password in it, every user of the machine would see it
: "${MLFLOW_BACKEND_STORE_URI:?names no database; see deploy/README.md}"
export MLFLOW_BACKEND_STORE_URI

# jobs are functions that anybody who reaches the server could have it run
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false
export MLFLOW_DISABLE_TELEMETRY=true

# mlflow's own list has all private addresses as patterns (10.*), which names such as 10.example.org fit, too
exec mlflow server \
    --serve-artifacts \
    --artifacts-destination "${MLFLOW_ARTIFACTS_DESTINATION:?names no place for files; see deploy/README.md}" \
    --allowed-hosts "${MLFLOW_SERVER_ALLOWED_HOSTS:-localhost:*,127.0.0.1:*}" \
    "$@"
