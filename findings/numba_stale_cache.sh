#!/usr/bin/env bash
# Expected: after a change of the source, @njit(cache=True) compiles again.
# Happens:  the cache is checked against the file of the cached function alone. A function or a constant that it takes
#           from another file is compiled into it; once that file changes, the old result comes back, also in new
#           processes, until the text of the first file changes (a touch is not enough).
# Matters:  layers call shared helpers. A corrected helper is what the reader sees, runs as Python and tests alone,
#           and every training still computes with the old one; numbers are filed under a source that did not run.
# Seen with Numba 0.68.1, llvmlite 0.50.0, Python 3.11:
#   slope 0.1 in the source: by a callee -0.0, by a constant -0.0, as Python -0.1; after a touch -0.0;
#   after another text -0.1 and -0.1
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env" && "$folder/env/bin/pip" install --quiet "numba==0.68.1" "llvmlite==0.50.0" 2>/dev/null
cd "$folder"
unset NUMBA_CACHE_DIR NUMBA_DISABLE_JIT
cat >activation.py <<'PYTHON'
from numba import njit
SLOPE = 0.0

@njit
def activation(x): return max(x, SLOPE * x)
PYTHON
cat >layer.py <<'PYTHON'
from numba import njit
from activation import SLOPE, activation

@njit(cache=True)
def by_callee(x): return activation(x)

@njit(cache=True)
def by_constant(x): return max(x, SLOPE * x)
PYTHON
run() {
    env/bin/python -c "from layer import *; print(by_callee(-1.0), by_constant(-1.0), by_constant.py_func(-1.0))"
}
run >/dev/null
sed -i 's/SLOPE = 0.0/SLOPE = 0.10/' activation.py
read -r callee constant python < <(run)
touch layer.py
read -r touched _ < <(run)
echo "# another line" >>layer.py
read -r callee_after constant_after _ < <(run)
echo "slope 0.1 in the source: by a callee $callee, by a constant $constant, as Python $python;" \
    "after a touch $touched; after another text $callee_after and $constant_after"
[ "${callee#-} ${constant#-} ${touched#-}" = "0.0 0.0 0.0" ] &&
    [ "$python $callee_after $constant_after" = "-0.1 -0.1 -0.1" ]
