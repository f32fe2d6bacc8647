#!/usr/bin/env bash
# Expected: a mixed model with a random intercept by split takes care of splits that share images, at a size of 5 %.
# Happens:  it takes care of what a split does to all models. What it does to one (that model profits from these
#           training images) counts as noise of single seeds, and more seeds make any difference significant. The true
#           null, equal models, is rejected in half of all cases.
# Matters:  this is the model that comes to mind for "5 splits x 5 seeds". Means over the seeds and a paired t-test
#           hold 5 %, and so does the mixed model with a second variance component, model within split.
# Seen with statsmodels 0.15.0, NumPy 2.4.6, SciPy 1.17.1, pandas 3.1.1, Python 3.11:
#   equal models, rejected at 5 %: random intercept 0.46, with model within split 0.00, paired t-test of means 0.05
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet "statsmodels==0.15.0" "numpy==2.4.6" "scipy==1.17.1" "pandas==3.1.1" 2>/dev/null
"$folder/env/bin/python" - 2>/dev/null <<'PYTHON'
import numpy as np
import pandas as pd
from scipy.stats import ttest_rel
from statsmodels.formula.api import mixedlm

SPLITS = SEEDS = 5
rng = np.random.default_rng(0)


def p_values():
    """Of equally good models, in points: spread of 5 by split, 2 by model within split, 1 by seed."""
    by_split, by_both = rng.normal(0, 5, (SPLITS, 1)), rng.normal(0, 2, (2, SPLITS, 1))
    scores = 80 + by_split + by_both + rng.normal(0, 1, (2, SPLITS, SEEDS))
    model, split, _ = np.indices(scores.shape).reshape(3, -1)
    data = pd.DataFrame({"model": model, "split": split, "accuracy": scores.ravel()})
    intercept = mixedlm("accuracy ~ model", data, groups="split").fit()
    within = mixedlm("accuracy ~ model", data, groups="split", vc_formula={"own": "0 + C(model)"}).fit()
    return intercept.pvalues["model"], within.pvalues["model"], ttest_rel(*scores.mean(2)).pvalue


intercept, within, paired = np.mean(np.array([p_values() for _ in range(100)]) < 0.05, axis=0)
print(
    f"equal models, rejected at 5 %: random intercept {intercept:.2f}, with model within split {within:.2f}, "
    f"paired t-test of means {paired:.2f}"
)
raise SystemExit(not (intercept > 0.35 and max(within, paired) < 0.15))  # Monte Carlo error 0.05 and 0.02
PYTHON
