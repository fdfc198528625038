# make demo   install and run the demo: four models, two tasks, one report
# make test   install and pass the tests
# make test-oldest, make test-newest  the tests on the lowest releases that pyproject.toml allows, and on the newest
# make quick  the tests that tell most, in about a minute
# make check  the linters and the type checker
# make bench  measure every figure that the README quotes
# make bench-target  time until in-context regression is learned, ours and the public code's (six minutes)
# make bench-gpu  all that is measured on a machine with a GPU, and docs/gpu.md (eight minutes)
# make docs   the site, with the reports of its gallery made anew, into build/site
# make site   the same with the reports that are there
# make figures  draw the README's images again from a run of the demo

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

TESTS ?= tests
# A worker that has nothing left takes from the other's end; files stay together, so what they share is made once.
PYTEST := -m pytest -n 2 --dist worksteal

.PHONY: demo test quick test-oldest test-newest check docs site bench bench-target bench-gpu figures clean

demo: $(VENV)/.installed
	$(BIN)/contextlab run demo

test: $(VENV)/.installed-dev
	$(BIN)/python $(PYTEST)

# Each in an environment of its own. TESTS chooses some of them.
test-oldest: .venv-oldest/.installed
	@.venv-oldest/bin/python $(PYTEST) $(TESTS) || { \
		echo "FAILED on the lowest releases that pyproject.toml allows (.venv-oldest/constraints.txt lists them):"; \
		echo "mend what fails there, or raise the lowest release of what it needs in pyproject.toml"; exit 1; }

test-newest: .venv-newest/.installed
	@.venv-newest/bin/python $(PYTEST) $(TESTS) || { \
		echo "FAILED on the newest releases that pyproject.toml allows (.venv-newest/bin/pip list shows them):"; \
		echo "mend what fails there, or bound in pyproject.toml what is known to break"; exit 1; }

quick: $(VENV)/.installed-dev
	$(BIN)/python $(PYTEST) -m quick

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/.installed-docs
	$(BIN)/python docs/gallery.py
	$(MAKE) site

site: $(VENV)/.installed-docs
	$(BIN)/mkdocs build

bench: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/run.py

bench-target: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/target.py

bench-gpu: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/gpu.py --json docs/gpu.json --page docs/gpu.md

figures: $(VENV)/.installed-dev
	$(BIN)/python docs/figures.py

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "contextlab needs Python 3.11 or newer; choose one with: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch first and alone: the pinned version is then there before any other package asks for a newer one.
$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) install --constraint constraints.txt torch
	$(PIP) install --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) install --constraint constraints.txt --editable '.[dev]'
	@touch $@

# torch is that of constraints.txt in all environments: other releases come for Linux with CUDA only.
.venv-oldest/.installed: pyproject.toml constraints.txt .ci/oldest.py
	$(PYTHON) -m venv .venv-oldest
	$(PYTHON) .ci/oldest.py > .venv-oldest/constraints.txt
	.venv-oldest/bin/python -m pip --disable-pip-version-check --quiet install -c .venv-oldest/constraints.txt torch
	.venv-oldest/bin/python -m pip --disable-pip-version-check --quiet install -c .venv-oldest/constraints.txt --editable '.[test]'
	@touch $@

# Made anew each time that pyproject.toml changes, and by hand (rm -r .venv-newest) when the world has moved on.
.venv-newest/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear .venv-newest
	grep '^torch==' constraints.txt > .venv-newest/constraints.txt
	.venv-newest/bin/python -m pip --disable-pip-version-check --quiet install -c .venv-newest/constraints.txt torch
	.venv-newest/bin/python -m pip --disable-pip-version-check --quiet install --upgrade -c .venv-newest/constraints.txt --editable '.[test,image]'
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed-dev
	$(PIP) install --constraint constraints.txt --editable '.[docs]'
	@touch $@

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest build dist
