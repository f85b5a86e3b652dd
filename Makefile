# make demo   set up, then train teacher and students on generated data and write a report
# make demo-seg   the same for segmentation
# make test   set up, then run the tests (make test-fast: those that take no longer than seconds) but for these:
# make test-long   two steps of every config on COCO and Cityscapes, processes that are killed, what of the engine works, each scheme in
#             two processes and resumed, each method resumed, two processes that evaluate or train for long, comparisons and chains of own configs, a dry run of make gpu
# make test-kills   kill trainings twenty times (KILLS=20), at random moments, and compare what they end with
# make test-cluster   set up, then run the tests on several nodes and under a real Slurm; what cannot run here says why
# make test-matrix   the tests of test-fast with other versions, in .venv-matrix: an hour and 7 GB for each of three (make test-oldest:
#             one alone); see docs/versions.md
# make gpu    set up, then everything that only a GPU can show, in about ten minutes; writes docs/gpu.md
# make docs   build the documentation as a site, into site/; needs nothing but Python
# make lint   check format, style and the types of the core (make format applies them); needs nothing but Python
.PHONY: setup demo demo-seg test test-fast test-long test-kills test-cluster test-matrix test-oldest test-onedl test-python3.12 gpu docs lint format clean

VENV := .venv
REQUIREMENTS := requirements.txt
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest -q --numprocesses logical --dist worksteal
LINT := .venv-lint
DOCS := .venv-docs
PYTHON ?= python3
KILLS := 20

setup:
	@sh tools/setup.sh $(VENV) $(REQUIREMENTS)

demo: setup
	$(BIN)/python demo/run.py detection

demo-seg: setup
	$(BIN)/python demo/run.py segmentation

test: setup
	$(PYTEST) --durations=10 -m 'not cluster and not long'

test-fast: setup
	$(PYTEST) -m 'not slow and not cluster and not long'

test-cluster: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -rs --durations=0 tests/cluster

test-kills: setup
	$(PYTEST) tests/test_kills.py --kills $(KILLS)

test-long: setup
	$(PYTEST) --durations=10 -m 'long and not cluster'

test-matrix: test-oldest test-onedl test-python3.12

test-oldest:
	$(MAKE) test-fast VENV=.venv-matrix/oldest PYTHON=python3.10 REQUIREMENTS=tools/matrix/oldest.txt

test-onedl:
	$(MAKE) test-fast VENV=.venv-matrix/onedl PYTHON=python3.11 REQUIREMENTS=tools/matrix/onedl.txt

test-python3.12:
	$(MAKE) test-fast VENV=.venv-matrix/python3.12 PYTHON=python3.12

gpu: setup
	$(BIN)/python tools/gpu.py

$(DOCS)/ready: docs/requirements.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip --disable-pip-version-check install --quiet -r docs/requirements.txt
	touch $@

docs: $(DOCS)/ready
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --quiet --strict
	@echo "site/index.html"

$(LINT)/ready: requirements.txt
	$(PYTHON) -m venv $(LINT)
	$(LINT)/bin/python -m pip --disable-pip-version-check install --quiet $$(grep -E '^(ruff|mypy)==' requirements.txt)
	touch $@

lint: $(LINT)/ready
	$(LINT)/bin/ruff check .
	$(LINT)/bin/ruff format --check .
	$(LINT)/bin/mypy

format: $(LINT)/ready
	$(LINT)/bin/ruff format .
	$(LINT)/bin/ruff check --fix .

clean:
	rm -rf $(VENV) .venv-matrix $(LINT) $(DOCS) site work_dirs data build dist *.egg-info
