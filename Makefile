# Every target sets up .venv first. PYTHON=python3.12 make demo takes another interpreter (3.11 or newer).
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
PYTEST = $(BIN)/python -m pytest -n 2 --dist loadfile

unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test test-all test-slow test-kill test-models test-peers test-web test-oldest verify table bench install clean
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(INSTALLED) ## run the whole pipeline on the embedded sample, with LoRA and with QLoRA, and compare them
	@$(BIN)/python tools/demo.py

test: $(INSTALLED) ## lint, and run the tests that tell quickly: about 5 minutes
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(PYTEST) -m "not slow"

test-all: test test-slow ## run every test

test-slow: $(INSTALLED) ## run the tests that `make test` leaves out: kills, clones, experiments, fuzzing
	$(PYTEST) -m slow

test-kill: $(INSTALLED) ## kill every stage 200 times at random moments
	KILLS=200 $(BIN)/python -m pytest tests/reliability/test_killed.py -k random_moments --timeout 3600

test-models: $(INSTALLED) ## train and evaluate a small model of every type that transformers knows: half an hour
	EVERY_MODEL=1 $(PYTEST) tests/model/test_every_model.py

test-peers: $(INSTALLED) ## compare with lm-evaluation-harness and transformers' Trainer; installs the extra `peers`
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[test,peers]'
	$(BIN)/python -m pytest tests/peers

test-web: $(INSTALLED) ## use the page of `gpt2lora play` in a headless Chromium: needs the package chromium
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[test,browser]'
	$(BIN)/python -m pytest tests/inference

test-oldest: BIN := .venv-oldest/bin
test-oldest: ## run the tests of `make test` with the oldest torch, transformers and peft of pyproject.toml: a download of 3 GB
	$(PYTHON) -m venv .venv-oldest
	sed -n 's/^ *"\(torch\|transformers\|peft\)>=\([^"]*\)",.*/\1==\2.*/p' pyproject.toml > .venv-oldest/constraints.txt
	$(BIN)/python -m pip install --quiet --no-compile --constraint .venv-oldest/constraints.txt --editable '.[test]'
	$(PYTEST) -m "not slow"

verify: $(INSTALLED) ## check GPT-2's published perplexities on WikiText-2: needs the hub, and a GPU or patience
	@$(BIN)/python tools/published_perplexity.py

table: $(INSTALLED) ## train GPT-2 with every method and score it by every protocol: needs the hub and a GPU, 30 minutes
	@$(BIN)/python -m benchmarks.gpt2_table

bench: $(INSTALLED) ## measure training against transformers' Trainer, plain and compiled: see docs/performance.md
	@$(BIN)/python -m benchmarks.training

install: $(INSTALLED) ## set up .venv only
	@echo "Activate the environment: . .venv/bin/activate"

# pip is upgraded first, and Python files are compiled when they are first imported: both make the install shorter.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Error: Python 3.11 or newer is needed, this is " + sys.version)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(PYTHON) tools/heartbeat.py 'pip install' $(BIN)/python -m pip install --progress-bar off --no-compile --constraint constraints.txt --editable '.[test]'
	@touch $@

clean: ## remove .venv and all caches of tools
	rm -rf .venv .venv-oldest *.egg-info .pytest_cache .ruff_cache .hypothesis
