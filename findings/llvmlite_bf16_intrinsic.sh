#!/usr/bin/env bash
# Expected: an intrinsic of LLVM keeps its type, so that a kernel that compiles with one llvmlite compiles with the next.
# Happens:  the conversion to bf16 of AVX512-BF16 gives <16 x i16> in llvmlite 0.44 (LLVM 15), which numba 0.61 needs;
#           <16 x bfloat>, its type since, is refused there. llvmlite 0.45 (LLVM 20, numba 0.62) accepts both.
# Matters:  numba kernels in bf16 pass all tests on one machine and end every training on another whose only difference
#           is numba's version; processors without AVX512-BF16 never show it.
# Seen with llvmlite 0.44.0 and 0.45.1, Python 3.11, on any processor:
#   0.44.0 (LLVM 15): <16 x i16> accepted, <16 x bfloat> refused
#   0.45.1 (LLVM 20): <16 x i16> accepted, <16 x bfloat> accepted
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
failed=0
for package in "llvmlite==0.44.0" "llvmlite==0.45.1"; do
    python3 -m venv "$folder/$package"
    "$folder/$package/bin/pip" install --quiet "$package" 2>/dev/null
    "$folder/$package/bin/python" - <<'PYTHON' || failed=1
import llvmlite
from llvmlite import binding


def verdict(kind):
    """Whether a module that calls the intrinsic with this type is valid."""
    name = "@llvm.x86.avx512bf16.cvtneps2bf16.512"
    source = f"""
        declare <16 x {kind}> {name}(<16 x float>)
        define <16 x {kind}> @convert(<16 x float> %x) {{
            %y = call <16 x {kind}> {name}(<16 x float> %x)
            ret <16 x {kind}> %y
        }}"""
    try:
        binding.parse_assembly(source).verify()
    except RuntimeError:
        return "refused"
    return "accepted"


found = [verdict(kind) for kind in ("i16", "bfloat")]
print(f"{llvmlite.__version__} (LLVM {binding.llvm_version_info[0]}): <16 x i16> {found[0]}, <16 x bfloat> {found[1]}")
old = llvmlite.__version__.startswith("0.44")
raise SystemExit(found != ["accepted", "refused" if old else "accepted"])
PYTHON
done
exit $failed
