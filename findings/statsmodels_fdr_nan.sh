#!/usr/bin/env bash
# Expected: p-values of a family are corrected, or the one that is missing (NaN) is refused or left out.
# Happens:  with method="fdr_bh" one NaN turns all corrected p-values to NaN, while the decisions beside them stay; with
#           "holm" and "bonferroni" only the missing one is NaN. It counts as a member of the family in each.
# Matters:  one pair of models that never differ has no p. A table of the others is empty then, or, if p < 0.05 is asked
#           of the corrected values, nothing is significant: comparisons with NaN are false.
# Seen with statsmodels 0.15.0, NumPy 2.4.6, SciPy 1.17.1, Python 3.11:
#   p 1e-06, 0.01, 0.5, nan; fdr_bh: nan, nan, nan, nan, rejects 2, below 0.05 are 0; holm: 4e-06, 0.03, 1, nan;
#   fdr_bh without the missing one: 3e-06, 0.015, 0.5
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet "statsmodels==0.15.0" "numpy==2.4.6" "scipy==1.17.1" 2>/dev/null
"$folder/env/bin/python" - <<'PYTHON'
import numpy as np
from statsmodels.stats.multitest import multipletests

p = [1e-6, 0.01, 0.5, np.nan]
rejects, corrected, *_ = multipletests(p, method="fdr_bh")
_, holm, *_ = multipletests(p, method="holm")
_, without, *_ = multipletests(p[:3], method="fdr_bh")


def show(values):
    return ", ".join(f"{value:.2g}" for value in values)


print(
    f"p {show(p)}; fdr_bh: {show(corrected)}, rejects {rejects.sum()}, below 0.05 are {(corrected < 0.05).sum()}; "
    f"holm: {show(holm)}; fdr_bh without the missing one: {show(without)}"
)
kept = np.allclose(holm[:3], [4e-6, 0.03, 1]) and np.allclose(without, [3e-6, 0.015, 0.5])
raise SystemExit(not (np.isnan(corrected).all() and rejects.tolist() == [True, True, False, False] and kept))
PYTHON
