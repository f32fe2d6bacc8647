#!/usr/bin/env bash
# Expected: a perfectly calibrated model has a calibration error near 0.
# Happens:  on the 140 images of a small test part ECE with 15 bins is 0.076 on average and never below 0.04, and the
#           smooth one (smECE) is 0.048. Noise of the counts in a bin adds up, since errors are absolute values.
# Matters:  "ECE 7 %, badly calibrated" is what perfect probabilities look like here, and of two models that with fewer
#           images looks worse. A number needs this baseline, for its own n, beside it.
# Seen with relplot 1.0.3, NumPy 2.4.6, SciPy 1.17.1, Python 3.11:
#   perfectly calibrated, 140 images: ECE 0.076 (least 0.043), smECE 0.048; 14000 images: ECE 0.007, smECE 0.009
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet "relplot==1.0.3" "numpy==2.4.6" "scipy==1.17.1" 2>/dev/null
"$folder/env/bin/python" - 2>/dev/null <<'PYTHON'
import numpy as np
from relplot.metrics import binnedECE, smECE

rng = np.random.default_rng(0)


def errors(images, draws):
    """ECE and smECE, shape (draws, 2), where a confidence of c is right with probability c."""
    found = []
    for _ in range(draws):
        confidence = rng.uniform(0.5, 1, images)
        right = (rng.uniform(size=images) < confidence).astype(float)
        found.append((binnedECE(confidence, right, nbins=15), smECE(confidence, right)))
    return np.array(found)


few, many = errors(140, 100), errors(14_000, 5)
(ece, smooth), (ece_many, smooth_many) = few.mean(0), many.mean(0)
print(
    f"perfectly calibrated, 140 images: ECE {ece:.3f} (least {few[:, 0].min():.3f}), smECE {smooth:.3f}; "
    f"14000 images: ECE {ece_many:.3f}, smECE {smooth_many:.3f}"
)
close = abs(ece - 0.076) < 0.01 and abs(smooth - 0.048) < 0.01  # Monte Carlo error 0.002
raise SystemExit(not (close and few[:, 0].min() > 0.03 and max(ece_many, smooth_many) < 0.015))
PYTHON
