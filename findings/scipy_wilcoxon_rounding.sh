#!/usr/bin/env bash
# Expected: wilcoxon() gives the same p for ten pairs of accuracies and for the same pairs counted in images.
# Happens:  0.72 - 0.67 and 0.91 - 0.86 are the same five images, but not the same floating-point number. Ties of the
#           differences are broken by rounding errors, ranks become others, and so does p.
# Matters:  accuracies are shares of the same number of test images, so ties are the rule. "Significant" may hang on
#           whether per cent, shares or counts were given; counts (or differences that are rounded) are right.
# Seen with SciPy 1.17.1, NumPy 2.4.6, Python 3.11:
#   p in counts of 100 images 0.0488, as shares 0.0547, as rounded shares 0.0488
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet "scipy==1.17.1" "numpy==2.4.6" 2>/dev/null
"$folder/env/bin/python" - <<'PYTHON'
import numpy as np
from scipy.stats import wilcoxon

first = np.array([72, 70, 72, 79, 72, 71, 76, 86, 83, 76])  # right ones of 100 test images, ten splits
second = np.array([67, 67, 69, 74, 68, 72, 78, 82, 82, 78])
counts, shares = wilcoxon(first, second).pvalue, wilcoxon(first / 100, second / 100).pvalue
rounded = wilcoxon(np.round(first / 100 - second / 100, 9)).pvalue
print(f"p in counts of 100 images {counts:.4f}, as shares {shares:.4f}, as rounded shares {rounded:.4f}")
raise SystemExit(not (abs(counts - 0.0488) < 1e-4 and abs(shares - 0.0547) < 1e-4 and rounded == counts))
PYTHON
