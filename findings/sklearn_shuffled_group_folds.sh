#!/usr/bin/env bash
# Expected: StratifiedGroupKFold(shuffle=True) stratifies as it does without shuffling; a seed changes which images meet.
# Happens:  up to scikit-learn 1.7 shuffling breaks the stratification: of 80 rare images in five folds the fullest has
#           24 and the emptiest 10, where shuffle=False gives 16 to each. 1.8 gives 16 to each in both cases.
# Matters:  the rare class of one fold is scored on 10 images and that of another on 24, so that scores by fold differ
#           for no reason of the model's; and the same seed gives other folds after an update.
# Seen with scikit-learn 1.7.2 and 1.8.0, NumPy 2.3.5, Python 3.11:
#   1.7.2: shuffled 10, 11, 17, 18, 24; not shuffled 16, 16, 16, 16, 16
#   1.8.0: shuffled 16, 16, 16, 16, 16; not shuffled 16, 16, 16, 16, 16
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
failed=0
for package in "scikit-learn==1.7.2" "scikit-learn==1.8.0"; do
    python3 -m venv "$folder/$package"
    "$folder/$package/bin/pip" install --quiet "$package" "numpy==2.3.5" 2>/dev/null
    "$folder/$package/bin/python" - <<'PYTHON' || failed=1
import numpy as np
import sklearn
from sklearn.model_selection import StratifiedGroupKFold

groups = np.concatenate([np.arange(200) // 2, np.arange(200, 400)])  # 100 pairs and 200 single images
labels = np.random.default_rng(0).permutation(np.repeat([0, 1], [320, 80]))


def rare(splitter):
    """Images of the rare class in the folds, in order."""
    return sorted(int(labels[val].sum()) for _, val in splitter.split(labels, labels, groups))


shuffled = [rare(StratifiedGroupKFold(5, shuffle=True, random_state=seed)) for seed in range(20)]
worst = max(shuffled, key=lambda counts: counts[-1] - counts[0])
plain = rare(StratifiedGroupKFold(5))
texts = [", ".join(map(str, counts)) for counts in (worst, plain)]
print(f"{sklearn.__version__}: shuffled {texts[0]}; not shuffled {texts[1]}")
even = [16] * 5
broken = sklearn.__version__.startswith("1.7")
raise SystemExit(not (plain == even and (worst == [10, 11, 17, 18, 24] if broken else worst == even)))
PYTHON
done
exit $failed
