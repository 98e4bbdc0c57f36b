# Everything the README names. `make demo` and `make test` do their own set-up on a machine with python3 and nothing else.
VENV ?= .venv
PY = $(VENV)/bin/python
PYTHON ?= python3

.PHONY: setup demo test lint bench busy full-size strength protection report fuzz asan install-check clean

setup: $(VENV)/.ready

# torch is pinned here and nowhere else: users' installs take any torch >= 2.11.
$(VENV)/.ready: requirements-dev.txt pyproject.toml setup.py $(wildcard csrc/*.* csrc/*/*.* csrc/*/*/*.*)
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q -r requirements-dev.txt
	$(PY) -m pip install -q -e .
	touch $@

demo: setup
	$(PY) -m miue_fast demo

# A worker per core up to two; whole files, so that what a file builds is built once.
test: setup
	$(PY) -m pytest -n 2 --dist loadfile

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	find csrc tests/shim -name "*.h" -o -name "*.cpp" -o -name "*.cu*" | xargs $(VENV)/bin/clang-format --dry-run -Werror
	$(VENV)/bin/ty check miue_fast

bench: setup
	$(PY) -m benchmarks.bench --out benchmarks/results/cpu.json
	$(PY) -m benchmarks.pages.readme --readme

# Eight minutes on a machine that does nothing else.
busy: setup
	$(PY) -m benchmarks.studies.busy --out benchmarks/results/busy.json

# Days on two cores, in pieces: Ctrl-C and the same command again. DATA has train/CLASS/* and test/CLASS/*.
full-size: setup
	OMP_WAIT_POLICY=PASSIVE $(PY) -m benchmarks.studies.full_size --data "$(DATA)" --out "$(or $(WORK),scratch/full-size)"
	$(PY) -m benchmarks.pages.readme --readme

# An hour and a half, in pieces as above: what poisons of 3,000 images withstand.
strength: setup
	OMP_WAIT_POLICY=PASSIVE $(PY) -m benchmarks.studies.strength --data "$(DATA)"
	$(PY) -m benchmarks.pages.readme --readme

# Hours on a machine that does nothing else, in pieces as above.
protection: setup
	OMP_WAIT_POLICY=PASSIVE $(PY) -m benchmarks.protection --data "$(DATA)"
	$(PY) -m benchmarks.protection --plot docs/protection.svg
	$(PY) -m benchmarks.pages.readme --readme

# Heavier checks, run by hand: 100,000 cases per op, 50 kills; sanitizers; numel > 2^31; isolated installs from the package index.
fuzz: setup
	MIUE_FUZZ=100000 MIUE_KILLS=50 $(PY) -m pytest -n 2 tests/ops/test_fuzz.py tests/generation/test_resume.py
	MIUE_HUGE=1 $(PY) -m pytest tests/ops/test_huge.py

asan: setup
	bash tests/asan.sh
	bash tests/sanitize_cuda_host.sh address,undefined
	bash tests/sanitize_cuda_host.sh thread

install-check:
	bash tests/install_matrix.sh

clean:
	rm -rf build dist *.egg-info miue_fast.egg-info $(VENV) miue_fast/_c*.so
