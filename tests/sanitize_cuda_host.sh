#!/bin/sh
# The CUDA kernels on the host (tests/shim) under a sanitizer. Usage: tests/sanitize_cuda_host.sh thread|address,undefined [csrc]
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
sources=${2:-$root/csrc}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for file in "$sources"/cuda/*.cu "$sources"/cuda/hopper/*.cu "$root/tests/shim/sanitize.cpp"; do
    "${CXX:-g++}" -std=c++20 -O1 -g -fsanitize="$1" -fno-sanitize-recover=all -ffp-contract=off -fno-strict-aliasing -DMIUE_CHUNK=128 -DMIUE_SPANS=6 -DMIUE_MEMBERS=2 -DMIUE_BLOCKS=3 -DMIUE_MULTIPROCESSORS=4 \
        -DMIUE_HOPPER -DMIUE_LARGE_ROWS=8 \
        -I "$root/tests/shim" -I "$sources" -include shim.h -x c++ -c "$file" -o "$folder/$(basename "$file").o" &
done
wait
"${CXX:-g++}" -fsanitize="$1" -pthread "$folder"/*.o -o "$folder/run"
TSAN_OPTIONS="halt_on_error=1 report_thread_leaks=0" ASAN_OPTIONS=detect_stack_use_after_return=1 "$folder/run"
