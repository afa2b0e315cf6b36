# make help   lists the targets.
#
# Everything is installed into $(VENV) and nowhere else. `make VENV= TARGET` uses the Python environment that is active
# and installs nothing, for machines without a network.
PYTHON ?= python3
VENV ?= .venv
# The torch to install; any from 2.11 on. TORCH_INDEX is the address of another package index to take it from, for example
# the one with CPU builds that the PyTorch site names.
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
# Further arguments for every pip call, e.g. a mirror.
PIP_ARGS ?=
# Arguments of the main job, of pytest and of the benchmarks.
ARGS ?=

ifeq ($(VENV),)
  PY := $(PYTHON)
  READY :=
  READY_LINT :=
else
  PY := $(VENV)/bin/python
  READY := $(VENV)/.ready
  READY_LINT := $(VENV)/.ready-lint
endif
PIP := $(PY) -m pip --disable-pip-version-check
SAY := printf '\n== %s\n'

CPP_FILES = $(shell find csrc tests/cpp -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.DEFAULT_GOAL := help
.PHONY: help run test bench lint format build gpu-check clean FORCE

help:  ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile
	@echo "Variables: TORCH=$(TORCH) TORCH_INDEX= PIP_ARGS= ARGS=; VENV= uses the active environment and installs nothing."

run: build  ## The main job: one weight decay per weight of a network, tuned on real data (ARGS="--help" for options)
	@$(SAY) "python -m nestopt_ext tune $(ARGS)"
	@$(PY) -m nestopt_ext tune $(ARGS)

test: build  ## The whole test suite
	@$(SAY) "pytest $(ARGS)"
	@$(PY) -m pytest -q $(ARGS)

bench: build  ## The kernel benchmarks, each checked against its reference before it is timed
	@$(SAY) "bench/run.py $(ARGS)"
	@$(PY) bench/run.py $(ARGS)

lint: $(READY_LINT)  ## Formatting, lint rules and types
	@$(SAY) "ruff, clang-format, mypy"
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(if $(VENV),$(VENV)/bin/,)clang-format --dry-run -Werror $(CPP_FILES)
	@$(PY) -m mypy

format: $(READY_LINT)  ## Rewrites the sources in the house's format
	@$(PY) -m ruff check --fix -q .
	@$(PY) -m ruff format .
	@$(if $(VENV),$(VENV)/bin/,)clang-format -i $(CPP_FILES)

build: $(READY)  ## The native library, in place; falls back to pure PyTorch, and says so, where it cannot be compiled
	@$(SAY) "building the native library"
	@mkdir -p build && $(PY) setup.py -q build_ext --inplace > build/build.log 2>&1 || { cat build/build.log; exit 1; }
	@$(PY) -c "import nestopt_ext; print(nestopt_ext.native_status())"

gpu-check:  ## On a machine with an NVIDIA GPU: build, test, compute-sanitizer, benchmarks; in the active environment
	@PYTHON=$(PYTHON) bash .ci/gpu_check

clean:  ## Removes what was built; the environment stays
	@rm -rf build dist *.egg-info nestopt_ext/_C*.so nestopt_ext/_build_report.json

$(VENV)/bin/python:
	@$(SAY) "making the environment $(VENV)"
	@$(PYTHON) -m venv $(VENV)

# Holds the torch that was asked for, so that asking for another one installs it.
$(VENV)/.torch: FORCE | $(VENV)/bin/python
	@echo '$(TORCH) $(TORCH_INDEX)' | cmp -s - $@ || echo '$(TORCH) $(TORCH_INDEX)' > $@

$(VENV)/.ready: $(VENV)/.torch requirements/build.txt requirements/experiments.txt requirements/test.txt requirements/peers.txt
	@$(SAY) "installing $(TORCH)"
	@index="$(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))"; \
	if $(PIP) install -q --dry-run --report - $(PIP_ARGS) $$index "$(TORCH)" 2> /dev/null | grep -q '"name": "nvidia'; then \
	  echo "This is a CUDA build: with its libraries several GB will be downloaded. For a CPU build stop now and give the"; \
	  echo "package index that the PyTorch site names for it: make TORCH_INDEX=..."; \
	fi; \
	$(PIP) install -q $(PIP_ARGS) $$index "$(TORCH)"
	@$(SAY) "installing the tools that build and test (requirements/*.txt)"
	@$(PIP) install -q $(PIP_ARGS) $(addprefix -r ,$(filter-out %/peers.txt,$(filter requirements/%,$^)))
	@$(SAY) "installing the packages to compare with (requirements/peers.txt)"
	@$(PIP) install -q --no-deps $(PIP_ARGS) -r requirements/peers.txt || echo "Not installed: comparisons with them are left out."
	@touch $@

$(VENV)/.ready-lint: requirements/lint.txt | $(READY)
	@$(SAY) "installing the linters"
	@$(PIP) install -q $(PIP_ARGS) -r $<
	@touch $@
