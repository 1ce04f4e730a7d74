# make train   install, then train a recipe on local ranks (default: the tiny one, two CPU ranks)
# make test    install with test extras, then run the CPU test-suite
# make lint    ruff and pyright
# make clean   remove .venv, caches and build outputs (runs/ stays)

PYTHON ?= python3
RECIPE ?= recipes/tiny/video_mirai.yaml
NPROC  ?= 2
RUN_DIR ?=
ARGS   ?=
TEST_WORKERS ?= 2

VENV := .venv
BIN  := $(VENV)/bin
# errors only: the lines printed below say what happens
PIP  := $(BIN)/python -m pip --disable-pip-version-check -qq
TORCH := $(shell sed -n 's/^\(torch==[0-9.]*\).*/\1/p' constraints.txt)
DESCRIPTION := setup.cfg pyproject.toml constraints.txt

.DELETE_ON_ERROR:
.PHONY: train test lint clean help

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

train: $(VENV)/.installed-train
	@$(BIN)/mirai train $(RECIPE) --nproc $(NPROC) $(if $(RUN_DIR),--run-dir $(RUN_DIR)) --resume auto $(ARGS)

# One thread a process: the tests start several ranks each, and two cores are all they may count on.
test: $(VENV)/.installed-test
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile $(ARGS)

lint: $(VENV)/.installed-test
	@echo "lint: ruff"
	@$(BIN)/ruff check .
	@echo "lint: pyright"
	@$(BIN)/pyright --warnings

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis mirai_dist.egg-info
	find mirai_dist launcher kernels tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  found=$$($(PYTHON) --version 2>/dev/null) || found="no Python"; \
	  echo "mirai_dist needs Python >= 3.11, and '$(PYTHON)' is $$found. Name another: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; \
	  exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
	  echo "install: creating $(VENV) with $$($(PYTHON) --version)"; \
	  $(PYTHON) -m venv $(VENV) || { \
	    echo "'$(PYTHON) -m venv' failed: install its venv module (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }; }
	@touch $@

# torch first: whatever needs torch then takes the installed one instead of downloading the newest.
$(VENV)/.installed-torch: constraints.txt | $(VENV)/.created
	@echo "install: $(TORCH)"
	@$(PIP) install $(TORCH) -c constraints.txt
	@touch $@

$(VENV)/.installed-train: $(DESCRIPTION) | $(VENV)/.installed-torch
	@echo "install: mirai-dist[train], editable"
	@$(PIP) install -c constraints.txt -e '.[train]'
	@touch $@

$(VENV)/.installed-test: $(DESCRIPTION) | $(VENV)/.installed-torch
	@echo "install: mirai-dist[train,dev], editable"
	@$(PIP) install -c constraints.txt -e '.[train,dev]'
	@touch $@ $(VENV)/.installed-train
