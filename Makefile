# make book [PROFILE=cpu] [ARGS="--set seed=1 --name other"]     make test
# Each sets up .venv by itself; PYTHON=... names another interpreter (3.11 or newer).
PROFILE ?= cpu
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: book test

book: $(READY)
	@$(BIN)/derta book --profile $(PROFILE) $(ARGS)

test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@# a process a core, four at most: the many small models gain nothing from more cores
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist worksteal

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed; name one with make PYTHON=...")'
	@echo "setting up .venv (a few minutes, once)"
	@$(BIN)/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@$(BIN)/python -c "from derta_lib.models import fetch_reference; fetch_reference()"
	@touch $@
