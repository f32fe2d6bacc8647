#!/usr/bin/env bash
# Expected: StratifiedGroupKFold makes folds of nearly equal size wherever groups allow it.
# Happens:  groups are placed in the order of how unequal their classes are. A large group with as many cats as dogs
#           comes last, when the folds are full already, and lands on top of one of them.
# Matters:  a series of near duplicates of both classes (one room, one studio) makes a fold of 72 images beside four of
#           32, though five of 40 exist; the mean over folds weighs its images least.
# Seen with scikit-learn 1.9.1, NumPy 2.4.6, Python 3.11:
#   one group of 40 and 160 single images, 5 folds: 72, 32, 32, 32, 32; the group of one class: 56, 36, 36, 36, 36
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet "scikit-learn==1.9.1" "numpy==2.4.6" 2>/dev/null
"$folder/env/bin/python" - <<'PYTHON'
import numpy as np
from sklearn.model_selection import StratifiedGroupKFold

groups = np.concatenate([np.zeros(40, int), np.arange(1, 161)])
balanced = np.arange(200) % 2
one_class = np.where(groups == 0, 0, balanced)


def sizes(labels):
    """Images in the folds, the largest first, for each of ten seeds."""
    splitters = [StratifiedGroupKFold(5, shuffle=True, random_state=seed) for seed in range(10)]
    return [sorted((len(val) for _, val in each.split(labels, labels, groups)), reverse=True) for each in splitters]


mixed, pure = sizes(balanced), sizes(one_class)
print(
    "one group of 40 and 160 single images, 5 folds:", ", ".join(map(str, mixed[0])) + "; the group of one class:",
    ", ".join(map(str, pure[0])),
)
raise SystemExit(not (all(found == [72, 32, 32, 32, 32] for found in mixed) and max(pure)[0] < 72))
PYTHON
