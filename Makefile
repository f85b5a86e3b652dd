# make demo   set up, then train teacher and students on generated data and write a report
# make demo-seg   the same for segmentation
# make test   set up, then run the tests
# make lint   check format and style (make format applies them)
.PHONY: setup demo demo-seg test lint format clean

VENV := .venv
BIN := $(VENV)/bin

setup:
	@sh tools/setup.sh $(VENV)

demo: setup
	$(BIN)/python demo/run.py detection

demo-seg: setup
	$(BIN)/python demo/run.py segmentation

test: setup
	$(BIN)/python -m pytest -q --numprocesses logical --dist worksteal --durations=10

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) work_dirs data build dist *.egg-info
