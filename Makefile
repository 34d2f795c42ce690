# Every target installs what it needs into .venv the first time and reuses it from then on.
#   make test                     the tests (ARGS="-k sinkhorn" to choose)
#   make test-all                 the slow ones too: the spaces whole, of which `make test` takes a sample; about an hour
#   make tune GPU=a100            tune the standard set for a GPU, which need not be here
#   make tune GPU=a100 SHAPE=4096x4096x64 ARGS="--family sinkhorn"
#   make lint                     ruff, formatting, mypy
#   make golden                   regenerate the golden renders and docs/commands.md; read the diff
#   make gpu                      on a machine with an NVIDIA GPU: its tests, a measured tuning, the peers
#   make shipped                  tune the standard set for every GPU of the table into tuning_db/
#   make carried                  after an edit of a template: keep the shipped winners that render as before

PYTHON ?= python3
VENV ?= .venv
GPU ?= a100
JOBS ?= 2
RUN := $(VENV)/bin/python -m

.PHONY: test test-all tune lint golden gpu shipped carried clean

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	touch $@

$(VENV)/installed-bench: $(VENV)/installed
	$(RUN) pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[bench]'
	touch $@

test: $(VENV)/installed
	$(RUN) pytest -n $(JOBS) --dist worksteal $(ARGS)

test-all: $(VENV)/installed
	$(RUN) pytest -n $(JOBS) --dist worksteal --wide $(ARGS)

tune: $(VENV)/installed
	$(RUN) otgen tune --gpu $(GPU) $(foreach shape,$(SHAPE),--shape $(shape)) $(ARGS)

lint: $(VENV)/installed
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy

golden: $(VENV)/installed
	OTGEN_UPDATE_GOLDEN=1 $(RUN) pytest -q tests/test_render.py tests/test_commands.py

gpu: $(VENV)/installed-bench
	$(VENV)/bin/python benchmarks/gpu.py $(ARGS)

shipped: $(VENV)/installed
	$(VENV)/bin/python benchmarks/ship.py $(ARGS)

carried: $(VENV)/installed
	$(VENV)/bin/python benchmarks/ship.py --carry $(ARGS)

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
