# `make demo` and `make test` need Python 3.12, make and a package registry; both prepare .venv.
BIN := .venv/bin
READY := .venv/.ready
LOCK := --generate-hashes --no-emit-index-url --no-annotate --no-header --python-version 3.12

.PHONY: env test check demo format lock options clean

demo: env
	$(BIN)/ropewalk train tiny

test: env
	$(BIN)/pytest -q -n 2

check: env
	$(BIN)/ruff format --check --output-format concise
	$(BIN)/ruff check --output-format concise
	$(BIN)/pyright
	$(BIN)/lint-imports --no-logo
	$(BIN)/pytest -q tests/structure

format: env
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

env: $(READY)

# uv on PATH may be missing, or a shim that does not run here: then the pinned one goes into .venv.
$(READY): requirements.txt pyproject.toml
	@echo "Preparing .venv (about 1 GB, once)"
	@if uv --version >/dev/null 2>&1; then \
		test -x $(BIN)/python || uv venv --quiet --python 3.12 .venv; \
	elif ! test -x $(BIN)/uv; then \
		python3.12 -m venv .venv && \
		sed -n '/^uv==/,/[^\\]$$/p' requirements.txt > .venv/uv.txt && \
		$(BIN)/python -m pip install --quiet --require-hashes -r .venv/uv.txt; \
	fi
	@uv=uv; uv --version >/dev/null 2>&1 || uv=$(BIN)/uv; export VIRTUAL_ENV=$(CURDIR)/.venv; \
	$$uv pip install --quiet --require-hashes -r requirements.txt && \
	$$uv pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

lock: env
	$(BIN)/uv pip compile --quiet $(LOCK) --group dev pyproject.toml --output-file requirements.txt

options: env
	$(BIN)/python -m tests.structure.options

clean:
	rm -rf .venv .ruff_cache .pytest_cache .import_linter_cache .hypothesis build dist
