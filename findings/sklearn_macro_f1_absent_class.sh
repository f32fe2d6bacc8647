#!/usr/bin/env bash
# Expected: two models that are wrong on one of 100 images have nearly the same macro-F1.
# Happens:  the mean is over all classes that occur as truth or as prediction. If the wrong answer is a class of which
#           this test part has no image, that class joins the mean with F1 = 0, without a warning: 0.99 becomes 0.66.
# Matters:  on small splits the two models of a pair are averaged over different classes, and one image decides which
#           is better by 33 points. With labels= the mean is over the same classes for both.
# Seen with scikit-learn 1.9.1, NumPy 2.4.6, Python 3.11:
#   one image of 100 wrong, macro-F1: 0.990 as another class, 0.663 as one without images; 0 warnings;
#   over the classes with images 0.995
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet "scikit-learn==1.9.1" "numpy==2.4.6" 2>/dev/null
"$folder/env/bin/python" - <<'PYTHON'
import warnings

import numpy as np
from sklearn.metrics import f1_score

true = np.repeat([0, 1], 50)  # of three classes; the third has no image in this part
other, absent = true.copy(), true.copy()
other[0], absent[0] = 1, 2
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    scores = [f1_score(true, predicted, average="macro") for predicted in (other, absent)]
named = f1_score(true, absent, average="macro", labels=[0, 1])
print(
    f"one image of 100 wrong, macro-F1: {scores[0]:.3f} as another class, {scores[1]:.3f} as one without images; "
    f"{len(caught)} warnings; over the classes with images {named:.3f}"
)
raise SystemExit(not (abs(scores[0] - 0.990) < 1e-3 and abs(scores[1] - 0.663) < 1e-3 and not caught and named > 0.99))
PYTHON
