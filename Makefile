# make demo: the whole pipeline on an embedded sample.  make test: lint and every test.
# make test-kill: kills every stage 200 times at random moments.
# make bench: speed and memory of training against transformers' Trainer, into benchmarks/out; see docs/performance.md.
# make gate: GPT-2's published figures on WikiText-2, from the hub; fails when one is off by more than 0.1.
# All set up .venv first. PYTHON=python3.12 make demo takes another interpreter (3.11 or newer).
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed

.PHONY: demo test test-kill gate bench install clean
.DELETE_ON_ERROR:

demo: $(INSTALLED)
	@$(BIN)/python tools/demo.py

test: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest

test-kill: $(INSTALLED)
	KILLS=200 $(BIN)/python -m pytest tests/test_checkpoint.py -k random_moments --timeout 3600

gate: $(INSTALLED)
	@$(BIN)/python tools/published_perplexity.py

bench: $(INSTALLED)
	@$(BIN)/python -m benchmarks.train

install: $(INSTALLED)
	@echo "Activate the environment: . .venv/bin/activate"

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Error: Python 3.11 or newer is needed, this is " + sys.version)'
	$(PYTHON) -m venv .venv
	$(PYTHON) tools/heartbeat.py 'pip install' $(BIN)/python -m pip install --progress-bar off --constraint constraints.txt --editable '.[test]'
	@touch $@

clean:
	rm -rf .venv *.egg-info .pytest_cache .ruff_cache .hypothesis
