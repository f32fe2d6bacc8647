#!/usr/bin/env bash
# Expected: the log loss of a wrong answer with probability 0 is infinite, or one stated bound.
# Happens:  probabilities are clipped at the machine epsilon of their dtype: 6.9 for float16, 15.9 for float32, 36.0
#           for float64, from equal probabilities.
# Matters:  one sure and wrong image in 140 moves the mean by 0.05 to 0.26. A model that is evaluated in half precision
#           gets the better loss for the same answers; clip by a rule of your own first.
# Seen with scikit-learn 1.9.1, NumPy 2.4.6, Python 3.11:
#   log loss of probability 0: float16 6.930, float32 15.942, float64 36.044
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet "scikit-learn==1.9.1" "numpy==2.4.6" 2>/dev/null
"$folder/env/bin/python" - <<'PYTHON'
import numpy as np
from sklearn.metrics import log_loss

losses = {
    dtype.__name__: log_loss([0], np.array([[0, 1]], dtype), labels=[0, 1])
    for dtype in (np.float16, np.float32, np.float64)
}
print("log loss of probability 0:", ", ".join(f"{dtype} {loss:.3f}" for dtype, loss in losses.items()))
raise SystemExit(not np.allclose(list(losses.values()), [6.930, 15.942, 36.044], atol=1e-3))
PYTHON
