#!/bin/sh
# The CPU suite under AddressSanitizer and UndefinedBehaviorSanitizer (`make asan`): builds _cpu into a scratch folder and runs the tests on it.
# PYTHON: the interpreter with the library installed. CXX: GCC or clang with its sanitizers. Further arguments go to pytest.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
cxx=${CXX:-g++}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
include=$("$python" -c 'import pybind11, sysconfig; print("-I" + pybind11.get_include(), "-I" + sysconfig.get_paths()["include"])')
flags="-std=c++17 -O1 -g -ffp-contract=off -fno-math-errno -fPIC -fvisibility=hidden -fopenmp -fsanitize=address,undefined -fno-sanitize-recover=undefined"
for source in "$root"/csrc/cpu/*.cpp "$root"/csrc/bindings_cpu.cpp; do
    echo "$source"
done | xargs -P 2 -I{} sh -c "$cxx $flags $include -DMIUE_BUILD_FLAGS='\"asan\"' -I$root/csrc -c {} -o $scratch/\$(basename {}).o"
# shellcheck disable=SC2086
$cxx $flags -shared "$scratch"/*.o -o "$scratch/_cpu.so"

cat > "$scratch/run.py" <<EOF
import importlib.util, sys
import torch  # its OpenMP runtime first, as in a normal import
spec = importlib.util.spec_from_file_location("miue_fast._cpu", "$scratch/_cpu.so")
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
sys.modules["miue_fast._cpu"] = module
assert module.build == "asan"
import pytest
sys.exit(pytest.main(["-x", "-p", "no:cacheprovider", *sys.argv[1:]]))
EOF
cd "$root"
[ $# -gt 0 ] || set -- tests/ops/test_cpu_native.py tests/frozen/test_packed.py tests/frozen/test_matrix.py tests/frozen/test_batch_norm.py
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
LD_PRELOAD="$($cxx -print-file-name=libasan.so) $($cxx -print-file-name=libubsan.so)" "$python" "$scratch/run.py" "$@"
