# Each target works on a fresh clone: the virtual environment is made on first use.
# Override what you need: make test PYTHON=python3.12 VENV=/path/to/venv
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$p" && break; done)
VENV ?= .venv

BIN := $(abspath $(VENV))/bin
INSTALLED := $(VENV)/.installed

.PHONY: help demo bench test fuzz lint format clean

help:
	@echo "make demo    prepare Book-Crossing, fit MF, train CCF-LLM, evaluate and rank (into runs/demo)"
	@echo "make bench   measure every speed figure on MovieLens-1M (about an hour)"
	@echo "make test    lint, types and all tests, the slow ones included"
	@echo "make fuzz    an hour of random damage to every input"
	@echo "make lint    ruff and mypy only"
	@echo "make format  rewrite the code as ruff would have it"
	@echo "make clean   remove build files and caches (runs/ and the virtual environment stay)"

$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or newer found; set PYTHON=..." >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,app,serve]"
	@touch $@

demo: $(INSTALLED)
	PATH="$(BIN):$$PATH" examples/demo.sh

# What is measured is made first, where it is missing.
bench: $(INSTALLED)
	test -d runs/bench/data || $(BIN)/ccf-llm prepare ml-1m --out runs/bench/data
	test -d runs/bench/cf || $(BIN)/ccf-llm fit-cf mf --data runs/bench/data --out runs/bench/cf
	test -d runs/bench/data-signed || $(BIN)/ccf-llm prepare ml-1m --histories signed --out runs/bench/data-signed
	$(BIN)/ccf-llm train benchmarks/workload.yaml
	for part in packing training ranking same_labels around scale; do \
		PATH="$(BIN):$$PATH" $(BIN)/python benchmarks/$$part.py || exit 1; done
	PATH="$(BIN):$$PATH" $(BIN)/python benchmarks/same_labels.py --cf-logit
	$(BIN)/python benchmarks/tokens.py --data runs/bench/data-signed
	$(BIN)/python benchmarks/summary.py
	$(BIN)/python benchmarks/readme.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Two processes of one thread each: tiny models leave a second thread nothing to do.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --durations 20

fuzz: $(INSTALLED)
	CCF_LLM_FUZZ_SECONDS=3600 CCF_LLM_FUZZ_SEED=$$(date +%s) $(BIN)/python -m pytest -s tests/bad_input/test_fuzz.py

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist *.egg-info src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -not -path './$(VENV)/*' -prune -exec rm -rf {} +
