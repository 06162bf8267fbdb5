# Every target works in a fresh clone, in a path with spaces too. `make` alone lists them.
SHELL := /bin/bash
VENV_PYTHON := .venv/bin/python
PYTEST_WORKERS ?= 2
PYTEST_ARGS ?=
SLOW ?=
MINUTES ?=
CALL ?=
WHEELS ?=
FAKEGPU ?=
BENCH_ARGS ?=
SANITIZE_ARGS ?=
STAGES ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo test check format gpu test-gpu test-fakegpu sanitize-gpu bench-gpu constraints clean bench-cpu

help: ## list the targets
	@echo "Targets (PYTHON=/path/to/python3 chooses the interpreter):"
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1|\2/p' Makefile | awk -F'|' '{ printf "%-18s %s\n", $$1, $$2 }'

setup: .venv/.installed ## make .venv and install everything in it, once; again when pyproject.toml or constraints.txt changed

# The stamp is written last, so an interrupted installation is simply continued by the next `make`.
.venv/.installed: pyproject.toml constraints.txt setup.py
	@if ! $(VENV_PYTHON) -c 'import pip' 2>/dev/null; then \
	  found=; \
	  if [ -n "$(PYTHON)" ]; then set -- "$(PYTHON)"; else set -- python3 python3.13 python3.12 python3.11 python3.10 python; fi; \
	  for candidate; do \
	    if "$$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then found=$$candidate; break; fi; \
	  done; \
	  if [ -z "$$found" ]; then \
	    echo "make setup needs Python 3.10 or newer with its venv and ensurepip modules; tried: $$*." >&2; \
	    echo "On Debian or Ubuntu: apt install python3-venv. Or name another one: make setup PYTHON=/path/to/python3.11" >&2; \
	    exit 1; \
	  fi; \
	  echo "Making .venv with $$found ($$("$$found" --version 2>&1))"; \
	  "$$found" -m venv --clear .venv; \
	fi
	@echo "Installing sssd_fast and the pinned versions of what it needs into .venv: 3 GB with a CPU build of torch, more with CUDA; 2 to 15 minutes, pip stays quiet"
	@start=$$(date +%s) && \
	$(VENV_PYTHON) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt setuptools && \
	$(VENV_PYTHON) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-build-isolation --editable '.[all]' && \
	echo "Installed in $$(( $$(date +%s) - start )) s"
	@touch .venv/.installed

demo: setup ## pre-train, fine-tune and evaluate on synthetic slices, with a report in runs/demo
	$(VENV_PYTHON) -m sssd_fast run --config cpu_smoke --out runs/demo --overwrite

test: setup ## run the tests that need no GPU and no network; SLOW=1 includes those marked slow
	timeout --foreground -k 30 40m $(VENV_PYTHON) -m pytest -q -n $(PYTEST_WORKERS) --dist loadfile --no-loadscope-reorder --benchmark-disable \
	  $(if $(SLOW),,-m "not slow") $(PYTEST_ARGS)

check: setup ## check lint, formatting, import order and types
	$(VENV_PYTHON) -m ruff check
	$(VENV_PYTHON) -m ruff format --check
	$(dir $(VENV_PYTHON))lint-imports --no-logo
	$(VENV_PYTHON) -m mypy

format: setup ## fix lint and formatting with ruff
	$(VENV_PYTHON) -m ruff check --fix
	$(VENV_PYTHON) -m ruff format

bench-cpu: setup ## time the CPU hot paths and compare with the previous run (.benchmarks/)
	$(VENV_PYTHON) -m pytest tests/benchmarks/test_hot_paths.py -q -p no:xdist --benchmark-only --benchmark-autosave \
	  --benchmark-columns=median,iqr,rounds --benchmark-sort=name $(if $(wildcard .benchmarks/*/*.json),--benchmark-compare) $(PYTEST_ARGS)

gpu: ## what needs a GPU, in 8 minutes (CALL=2: reruns, tuning and counters in 4), results in OUT (runs/gpu); installs nothing
	OUT="$(OUT)" MINUTES="$(MINUTES)" PYTHON="$(PYTHON)" WHEELS="$(WHEELS)" benchmarks/gpu.sh $(or $(STAGES),$(CALL))

test-gpu: ## run the tests marked gpu with the torch of PYTHON (python3 if not given); installs nothing
	$(if $(PYTHON),"$(PYTHON)",python3) -m pytest -q -m gpu $(PYTEST_ARGS)

test-fakegpu: ## run the host's code for a GPU on a fake CUDA device: FAKEGPU is the command that provides one (docs/gpu.md)
	@if [ -z "$(FAKEGPU)" ]; then echo "skipped: FAKEGPU names no fake CUDA device (docs/gpu.md)"; exit 0; fi; \
	  PYTHONPATH=.:kernels $(FAKEGPU) python -m pytest -q -p no:cacheprovider tests/test_fakegpu.py $(PYTEST_ARGS)

sanitize-gpu: ## every kernel at small shapes under compute-sanitizer (of the CUDA toolkit); installs nothing
	$(if $(PYTHON),"$(PYTHON)",python3) tools/sanitize.py $(SANITIZE_ARGS)

bench-gpu: ## run all benchmarks on the GPU within MINUTES (9); every row is saved at once; installs nothing
	PYTHONPATH=.:kernels $(if $(PYTHON),"$(PYTHON)",python3) -m benchmarks all --device cuda --minutes $(or $(MINUTES),9) $(BENCH_ARGS)

constraints: ## for maintainers: resolve constraints.txt again (needs uv)
	@tmp=$$(mktemp -d) && trap 'rm -r "$$tmp"' EXIT && \
	uv pip compile pyproject.toml --extra all --universal --python-version 3.10 --no-header --no-annotate --quiet -o "$$tmp/pins" && \
	{ sed -n '/^#/p' constraints.txt && \
	  awk -F' ; ' '{ split($$1, a, "==") } NR == FNR { n[a[1]]++; next } { print n[a[1]] == 1 ? $$1 : $$0 }' "$$tmp/pins" "$$tmp/pins" | \
	  sed -E "s/ and \(?sys_platform.*//; s/ and python_full_version < '3\.15'//"; } > "$$tmp/constraints.txt" && \
	mv "$$tmp/constraints.txt" constraints.txt && git diff --stat -- constraints.txt

clean: ## remove .venv, caches and build products; runs/ stays
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .benchmarks
