#!/usr/bin/env bash
# Expected: DeLong's test of a model against itself gives p = 1: the areas under the curve are equal.
# Happens:  the variance of the difference is 0, so the bootstrap takes over. All 5000 differences are 0, and p is 0.
#           Scores that rank the images alike (a half of the others) give the same.
# Matters:  a model and its calibrated copy, or the export of a network and the network, are reported as different
#           beyond doubt. Where nothing differs, p has to be said before the test.
# Seen with MLstatkit 0.1.91, scikit-learn 1.9.1, SciPy 1.17.1, NumPy 2.4.6, Python 3.11:
#   AUC 0.8218 and 0.8218, method bootstrap:
#   p = 0.0 for the same scores, 0.0 for their halves, 0.48 with noise of 0.001
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet \
    "MLstatkit==0.1.91" "scikit-learn==1.9.1" "scipy==1.17.1" "numpy==2.4.6" 2>/dev/null
"$folder/env/bin/python" - <<'PYTHON'
import numpy as np
from MLstatkit import Delong_test

rng = np.random.default_rng(0)
true = rng.integers(0, 2, 140)
scores = 0.3 * true + 0.7 * rng.uniform(size=140)
noisy = scores + rng.normal(0, 1e-3, 140)
same, halves, other = (Delong_test(true, scores, second) for second in (scores, scores / 2, noisy))
print(
    f"AUC {same[4]:.4f} and {same[5]:.4f}, method {same[6]['method']}: p = {same[1]} for the same scores, "
    f"{halves[1]} for their halves, {other[1]:.2f} with noise of 0.001"
)
raise SystemExit(not (same[4] == same[5] and same[1] == halves[1] == 0 and 0.3 < other[1] < 0.7))
PYTHON
