# Two commands do all set-up: `make run` trains, `make test` tests. Both install first if needed.
# CPU machine: make install PIP_ARGS='--extra-index-url https://download.pytorch.org/whl/cpu'

PYTHON ?= python3
PIP_ARGS ?=
JOBS ?= 2
VENV := .venv
STAMP := $(VENV)/.installed
DOCS_STAMP := $(VENV)/.installed-docs

.DEFAULT_GOAL := help
.PHONY: help install test test-slow test-processors run lint types lowest wheel docs clean-venv

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "  variables: PYTHON=python3.12 (3.11 to 3.13), PIP_ARGS='--extra-index-url https://download.pytorch.org/whl/cpu', JOBS=4"

install: $(STAMP) ## make .venv and install zofed in it, editable, with the development tools
	@echo "zofed is installed in $(VENV); next: make run, or . $(VENV)/bin/activate"

# The stamp is younger than these files only after an installation that ended well.
$(STAMP): pyproject.toml requirements.txt requirements-dev.txt
	@command -v $(PYTHON) >/dev/null || { echo "zofed: no '$(PYTHON)' found; install Python 3.11, 3.12 or 3.13, or name one: make install PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 11) <= v <= (3, 13) or sys.exit("zofed: Python %d.%d is not supported, only 3.11 to 3.13; name another one: make install PYTHON=python3.12" % v)' || exit 2
	@test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install $(PIP_ARGS) -e '.[dev]'
	@touch $(STAMP)

test: $(STAMP) ## run the fast tests, JOBS=2 at a time
	$(VENV)/bin/pytest -n $(JOBS) --dist loadfile --durations=10

test-slow: $(STAMP) ## run the slow tests: Flower with Ray, processes killed, real data
	$(VENV)/bin/pytest -m slow --durations=25

# What a forward pass computes depends on the instructions that torch uses and on MKL's mode; equalities must not.
test-processors: $(STAMP) ## run the tests of equal bits with other instruction sets and another mode of MKL
	@for setting in ATEN_CPU_CAPABILITY=default ATEN_CPU_CAPABILITY=avx2 \
	    'ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE' 'ATEN_CPU_CAPABILITY=avx2 MKL_CBWR=COMPATIBLE'; do \
	    echo "-- $$setting"; env $$setting $(VENV)/bin/pytest -q -m bits -n $(JOBS) --dist loadfile || exit 1; \
	done

run: $(STAMP) ## adapt a small model through `flwr run`: 4 clients, the data that ship with the project
	$(VENV)/bin/zofed quickstart

lint: $(STAMP) ## check style, format and who imports whom
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports

types: $(STAMP) ## check the types
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

# uv ends with 2 where no index answers, with 1 where the bounds cannot be met.
lowest: $(STAMP) ## resolve the requirements at their lower bounds, into build/lowest.txt
	@mkdir -p build
	@$(VENV)/bin/uv pip compile --quiet --python $(VENV)/bin/python --resolution lowest-direct \
	    --output-file build/lowest.txt requirements.txt; status=$$?; \
	if [ $$status -eq 2 ]; then echo "no package index answers uv: the lower bounds are not checked"; \
	elif [ $$status -ne 0 ]; then exit $$status; fi

wheel: $(STAMP) ## build the source distribution and, from it, the wheel into dist/, and check both
	@rm -rf dist
	$(VENV)/bin/python -m build --no-isolation
	$(VENV)/bin/python -m twine check --strict dist/*

docs: $(DOCS_STAMP) ## build the documentation site into site/
	$(VENV)/bin/mkdocs build --strict --quiet
	@echo "the site is built: open site/index.html"

$(DOCS_STAMP): $(STAMP) requirements-docs.txt
	$(VENV)/bin/python -m pip install $(PIP_ARGS) -r requirements-docs.txt
	@touch $(DOCS_STAMP)

clean-venv: ## remove .venv, so that the next command installs anew
	rm -rf $(VENV)
