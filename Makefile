# Every target makes .venv first; nothing else has to be done by hand.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEVICE ?= cpu
BENCH ?= benchmarks
GOLDEN := --probe-config=golden/demo/probe.yaml --probe-golden-dir=golden \
	--probe-rollouts=golden/demo/e.jsonl --probe-update-rollouts=golden/demo/u.jsonl

# Some hundred processes read what the first has compiled.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: acceptance test lint matrix fuzz mutants bench demo picture site clean
.DELETE_ON_ERROR:

acceptance: $(READY)
	$(BIN)/pytest --probe-checkpoint=demo -m acceptance probe-checks
	$(BIN)/pytest --probe-checkpoint=demo $(GOLDEN) -m golden probe-checks

# A file's tests stay together, so that what they share is made once; the longest files begin (tests/conftest.py).
test: $(READY)
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports

matrix: $(READY)
	.ci/wheel build/matrix
	PROBE_MATRIX=$(CURDIR)/build/matrix $(BIN)/pytest -n 2 tests/matrix

fuzz: $(READY)
	$(BIN)/python tests/fuzz/run.py $(FUZZ)

mutants: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutants/run.py $(MUTANTS)

bench: $(READY)
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/pytest $(BENCH) -c benchmarks/pytest.ini --device=$(DEVICE) \
		--results=benchmarks/results/$(DEVICE).json

demo: $(READY)
	$(BIN)/python -m entropy_probe.demo.train

picture: $(READY)
	$(BIN)/python docs/picture.py

# The documentation, in build/site: a link or an anchor that leads nowhere is an error.
site: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "make: $(PYTHON) is older than 3.11; run: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile \
		--constraint constraints.txt --editable '.[dev,docs]'
	@touch $@

clean:
	rm -rf $(VENV) dist build
