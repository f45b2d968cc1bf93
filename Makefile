# Two commands do all set-up: `make run` trains, `make test` tests. Both install first if needed.
# CPU machine: make install PIP_ARGS='--extra-index-url https://download.pytorch.org/whl/cpu'

PYTHON ?= python3
PIP_ARGS ?=
JOBS ?= 2
LOCK ?= requirements.lock
VENV := .venv
LOCKED := $(VENV)/lock
STAMP := $(VENV)/.installed
DOCS_STAMP := $(VENV)/.installed-docs

.DEFAULT_GOAL := help
.PHONY: help install test test-slow test-processors run lint types lowest lock lock-check wheel sbom audit docs clean-venv

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "  variables: PYTHON=python3.12 (3.11 to 3.13), PIP_ARGS='--extra-index-url https://download.pytorch.org/whl/cpu', JOBS=4,"
	@echo "  LOCK=/dev/null (install the newest releases within the bounds, not those of requirements.lock)"

install: $(STAMP) ## make .venv and install zofed in it, editable, in the locked versions, with the development tools
	@echo "zofed is installed in $(VENV); next: make run, or . $(VENV)/bin/activate"

PINS := sed -n 's/^\([A-Za-z0-9._-]*==[^+ ;]*\).*/\1/p'

# The stamp is younger than these files only after an installation that ended well.
$(STAMP): pyproject.toml requirements.txt requirements-dev.txt $(LOCK)
	@command -v $(PYTHON) >/dev/null || { echo "zofed: no '$(PYTHON)' found; install Python 3.11, 3.12 or 3.13, or name one: make install PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 11) <= v <= (3, 13) or sys.exit("zofed: Python %d.%d is not supported, only 3.11 to 3.13; name another one: make install PYTHON=python3.12" % v)' || exit 2
	@test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	@mkdir -p $(LOCKED)
	@$(PINS) $(LOCK) > $(LOCKED)/versions.txt
	$(VENV)/bin/python -m pip install $(PIP_ARGS) --constraint $(LOCKED)/versions.txt -e '.[dev]'
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

# The hashes are those of every file that the index holds of a version: the lock serves all systems that zofed runs on.
COMPILE := $(VENV)/bin/uv pip compile --quiet --python $(VENV)/bin/python --universal --python-version 3.11 \
	--generate-hashes --no-header --no-annotate requirements.txt

lock: $(STAMP) ## write requirements.lock: the versions installed here, which the tests ran with, and their hashes
	@mkdir -p $(LOCKED)
	@$(VENV)/bin/python -m pip freeze --exclude-editable | $(PINS) > $(LOCKED)/tested.txt
	$(COMPILE) --constraint $(LOCKED)/tested.txt --upgrade --output-file requirements.lock

# A release may get files that it did not have: a hash that the index has and the lock has not is no fault. Then a few
# small packages are installed as the lock says, each file held against its hashes.
HASHED := pydantic pydantic-core typing-extensions typer safetensors tomli-w h11
lock-check: $(STAMP) ## check that requirements.lock fits requirements.txt, and its hashes the package index
	@mkdir -p $(LOCKED)
	@$(PINS) requirements.lock > $(LOCKED)/versions.txt; rm -f $(LOCKED)/again.txt; \
	$(COMPILE) --constraint $(LOCKED)/versions.txt --output-file $(LOCKED)/again.txt; status=$$?; \
	if [ $$status -eq 2 ]; then echo "no package index answers uv: the lock is not checked against it"; exit 0; \
	elif [ $$status -ne 0 ]; then exit $$status; fi; \
	for file in requirements.lock $(LOCKED)/again.txt; do \
	    grep '==' $$file > $(LOCKED)/$${file##*/}.pins; \
	    grep -o 'sha256:[0-9a-f]*' $$file | sort -u > $(LOCKED)/$${file##*/}.hashes; done; \
	diff $(LOCKED)/requirements.lock.pins $(LOCKED)/again.txt.pins && \
	test -z "$$(comm -23 $(LOCKED)/requirements.lock.hashes $(LOCKED)/again.txt.hashes)" \
	    || { echo "requirements.lock does not fit: make lock, then run the tests" >&2; exit 1; }; \
	for name in $(HASHED); do sed -n "/^$$name==/,/[^\\]$$/p" requirements.lock; done > $(LOCKED)/hashed.txt; \
	rm -rf $(LOCKED)/hashed; \
	$(VENV)/bin/uv pip install --quiet --python $(VENV)/bin/python --no-deps --require-hashes --no-cache \
	    --target $(LOCKED)/hashed --requirement $(LOCKED)/hashed.txt && echo "requirements.lock fits"

wheel: $(STAMP) ## build the source distribution and, from it, the wheel into dist/, check both and the wheel's extras, list what they need
	@rm -rf dist
	$(VENV)/bin/python -m build --no-isolation
	$(VENV)/bin/python -m twine check --strict dist/*
	@mkdir -p build
	@for extra in $$(sed -n 's/^optional-dependencies\.\([a-z]*\) .*/\1/p' pyproject.toml); do \
	    echo "zofed[$$extra] @ file://$$(echo $(CURDIR)/dist/*.whl)" \
	        | $(VENV)/bin/uv pip compile --quiet --python $(VENV)/bin/python --output-file build/extra-$$extra.txt -; \
	    status=$$?; \
	    if [ $$status -eq 2 ]; then echo "no package index answers uv: the extras are not resolved"; break; \
	    elif [ $$status -ne 0 ]; then echo "pip install 'zofed[$$extra]' of the wheel would fail: see above" >&2; exit 1; fi; \
	    echo "zofed[$$extra]: $$(grep -c == build/extra-$$extra.txt) packages"; \
	done
	@$(MAKE) --no-print-directory sbom

sbom: $(STAMP) ## write dist/zofed.cdx.json: all that the lock holds, with hashes, in CycloneDX's form
	@mkdir -p dist
	@if $(CYCLONEDX) --version >/dev/null 2>&1; then \
	    $(CYCLONEDX) requirements requirements.lock --pyproject pyproject.toml --mc-type library \
	        --output-reproducible --index-url https://pypi.org/simple --output-file dist/zofed.cdx.json; \
	else echo "no package index answers uv: no list of components is written"; fi
CYCLONEDX := $(VENV)/bin/uv tool run --quiet --from cyclonedx-bom==7.5.0 cyclonedx-py

audit: $(STAMP) ## hold the lock against the known vulnerabilities; needs pypi.org itself, a mirror does not tell them
	$(VENV)/bin/uv tool run --quiet --from pip-audit==2.10.1 pip-audit --strict --require-hashes --disable-pip \
	    --requirement requirements.lock

docs: $(DOCS_STAMP) ## build the documentation site into site/
	$(VENV)/bin/mkdocs build --strict --quiet
	@echo "the site is built: open site/index.html"

$(DOCS_STAMP): $(STAMP) requirements-docs.txt
	$(VENV)/bin/python -m pip install $(PIP_ARGS) -r requirements-docs.txt
	@touch $(DOCS_STAMP)

clean-venv: ## remove .venv, so that the next command installs anew
	rm -rf $(VENV)
