# PolicyLab in two commands: `make train` and `make test`. `make help` lists the rest.
#
#   make train ARGS="algo=reinforce seed=1"     arguments are passed to the command
#   make train VENV=$VIRTUAL_ENV                use an environment that you already have
#   make train PYTHON=python3.12                choose the interpreter of the new environment

VENV ?= .venv
# The first interpreter with a version that PolicyLab supports; python3 itself if it has one.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null \
	&& { echo $$python; break; }; done)
ARGS ?=

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.policylab-installed

.DEFAULT_GOAL := help
.PHONY: help install train test bench lint types format clean

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(INSTALLED) ## create the environment and install PolicyLab into it

train: $(INSTALLED) ## train; ARGS="algo=reinforce seed=1" is passed to train.py
	$(BIN)/python train.py $(ARGS)

test: $(INSTALLED) ## run the fast tests; ARGS="-m slow" runs the others
	$(BIN)/python -m pytest $(ARGS)

RESULTS := benchmarks/results
bench: $(INSTALLED) ## all benchmarks, for hours; ARGS="--model tiny" for one race against TRL
	$(BIN)/python -m pip install --quiet -e '.[bench]'
	$(BIN)/python benchmarks/vs_trl.py $(if $(ARGS),$(ARGS),--all) --out $(RESULTS)/vs_trl.csv
ifeq ($(ARGS),)
	for precision in fp32 bf16; do \
		$(BIN)/python benchmarks/where.py --model gpt2 --precision $$precision --out $(RESULTS)/where.csv || exit 1; done
	$(BIN)/python benchmarks/products.py --out $(RESULTS)/products.csv
	$(BIN)/python benchmarks/to_reward.py --out $(RESULTS)/to_reward.csv
	$(BIN)/python benchmarks/memory.py algo=grpo --out $(RESULTS)/memory.csv
	$(BIN)/python benchmarks/scaling.py --out $(RESULTS)/scaling
	$(BIN)/python benchmarks/plan.py --out $(RESULTS)/plan.csv
	for model in tiny gpt2 smollm2; do \
		$(BIN)/python benchmarks/faithfulness.py --model $$model --out $(RESULTS)/faithfulness.csv || exit 1; \
		for precision in fp32 bf16; do \
			$(BIN)/python benchmarks/rollout.py --model $$model --precision $$precision --out $(RESULTS)/rollout.csv \
				|| exit 1; \
		done; \
	done
endif

lint: $(INSTALLED) ## check style and formatting
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(INSTALLED) ## check the types
	$(BIN)/mypy

format: $(INSTALLED) ## fix what ruff can fix
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean: ## remove the environment that make created, and all caches; runs in logs/ are kept
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is newer than pyproject.toml when everything is installed, so a second call starts at once.
$(INSTALLED): pyproject.toml
	@test -x $(BIN)/python || test -n "$(PYTHON)" || { \
		echo "PolicyLab needs Python 3.11, 3.12 or 3.13; python3 is $$(python3 --version 2>&1)."; \
		echo "Install one of them, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12"; exit 2; }
	@echo "Installing PolicyLab into $(VENV); the first time takes a few minutes (PyTorch is large)."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	@touch $@
