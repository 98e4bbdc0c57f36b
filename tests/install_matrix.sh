#!/usr/bin/env bash
# Isolated installs from the package index, each into its own environment, used from another folder (`make install-check`; slow).
# With the development set-up's torch; the last two with the oldest that is promised, and with what the index gives a user: gigabytes.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
use='import torch, miue_fast; print("miue_fast", miue_fast.__version__, "torch", torch.__version__)
loss = miue_fast.nt_xent(torch.eye(4), torch.tensor([0, 0, 1, 1])); assert loss.isfinite(), loss'

# check NAME BACKENDS INSTALL-ARGUMENTS...: installs, then asks the registry that exactly these backends serve the CPU.
check() {
  local name=$1 wanted=$2
  shift 2
  echo "== $name"
  "$python" -m venv "$work/$name"
  "$work/$name/bin/python" -m pip install -q "$@"
  (cd "$work" && "$work/$name/bin/python" -c "$use
from miue_fast.dispatch.registry import OPS
got = ' '.join(i.backend for i in OPS['nt_xent'].impls if 'cpu' in i.devices and i.missing() is None)
assert got == '$wanted', got" && "$work/$name/bin/python" -m miue_fast info >"$work/$name.txt")
  rm -rf "${work:?}/$name"
}

git -C "$root" ls-files -z --cached --others --exclude-standard | (cd "$root" && xargs -0 tar cf - --ignore-failed-read) | (mkdir "$work/src" && tar xf - -C "$work/src")
src=$work/src
torch=$(grep '^torch==' "$src/requirements-dev.txt")

MIUE_BUILD=none check pure "reference" "$src" "$torch"
MIUE_BUILD=auto check wheel "cpu reference" "$src" "$torch"
MIUE_BUILD=cpu check editable "cpu reference" -e "$src" "$torch"

(cd "$src" && "$python" -m venv "$work/tools" && "$work/tools/bin/python" -m pip install -q -U setuptools pybind11 ninja)
(cd "$src" && MIUE_BUILD=none "$work/tools/bin/python" setup.py -q sdist -d "$work/sdist")
MIUE_BUILD=cpu check sdist "cpu reference" "$work"/sdist/*.tar.gz "$torch"
MIUE_BUILD=cpu check oldest-torch "cpu reference" "$src" "torch==2.11.*"
MIUE_BUILD=auto check newest-torch "cpu reference" "$src"
echo "all installs work"
