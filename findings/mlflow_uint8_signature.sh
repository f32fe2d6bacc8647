#!/usr/bin/env bash
# Expected: a model whose signature says uint8 refuses pixels that are no whole numbers, as predict() does.
# Happens:  the scoring server turns the numbers of a JSON request into uint8 before the signature is looked at: 0.5 and
#           0.99 become 0, 254.9 becomes 254, with status 200 and without a word.
# Matters:  a client that sends images scaled to 0..1, as training code has them, gets answers about a black picture,
#           and code that was tried with predict() behaves otherwise once it is served.
# Seen with MLflow 3.17.2, NumPy 2.4.6, Python 3.11:
#   0.5, 0.99, 1.0 and 254.9: the server answers 200 with [0.0, 0.0, 1.0, 254.0]; predict() raises MlflowException
set -euo pipefail
export MLFLOW_DISABLE_TELEMETRY=true
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet "mlflow==3.17.2" "numpy==2.4.6" 2>/dev/null
"$folder/env/bin/python" - "$folder/model" 2>/dev/null <<'PYTHON'
import json
import sys

import mlflow
import numpy as np
from mlflow.models import ModelSignature
from mlflow.pyfunc.scoring_server import invocations
from mlflow.types import Schema, TensorSpec


class Pixels(mlflow.pyfunc.PythonModel):
    """Answers with the pixels that it is given."""

    def predict(self, context, model_input, params=None):
        return np.asarray(model_input, float).ravel()


schemas = [Schema([TensorSpec(np.dtype(dtype), shape)]) for dtype, shape in (("uint8", (-1, 2, 2)), ("float64", (-1,)))]
mlflow.pyfunc.save_model(sys.argv[1], python_model=Pixels(), signature=ModelSignature(*schemas))
model = mlflow.pyfunc.load_model(sys.argv[1])
images = [[[0.5, 0.99], [1.0, 254.9]]]
answer = invocations(json.dumps({"instances": images}), "application/json", model, model.metadata.get_input_schema())
try:
    called = str(model.predict(np.array(images)))
except mlflow.MlflowException as error:
    called = f"raises {type(error).__name__}"
seen = json.loads(answer.response)["predictions"]
print(f"0.5, 0.99, 1.0 and 254.9: the server answers {answer.status} with {seen}; predict() {called}")
raise SystemExit(not (answer.status == 200 and seen == [0, 0, 1, 254] and called == "raises MlflowException"))
PYTHON
