# Two commands do everything on a fresh machine:  make serve  and  make test.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: venv serve test check format test-clients clean

venv: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

serve: venv
	$(BIN)/fastchat serve

test: venv
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

check: venv
	PATH="$(CURDIR)/$(BIN):$$PATH" scripts/check

format: venv
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test-clients: venv
	$(BIN)/python scripts/test_clients.py

clean:
	rm -rf $(VENV) .clients .mypy_cache .pytest_cache .ruff_cache .hypothesis
