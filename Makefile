# Two commands do everything on a fresh machine:  make serve  and  make test.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: venv serve test check format test-clients peers bench bench-fast bench-6b clean

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

# The engines that we are compared with, each in a virtual environment below .peers; llama.cpp is compiled.
peers: venv
	$(BIN)/python benchmarks/peers/environments.py

# Every figure of docs/performance.md: about three quarters of an hour on a machine that does nothing else.
bench: venv
	$(BIN)/python benchmarks/compare.py
	$(BIN)/python benchmarks/curves.py
	$(BIN)/python -m benchmarks.relay --json .benchmarks/relay.json
	$(BIN)/python benchmarks/report.py

# ChatGLM2-6B's real shape, for the same page: 13 GB on disk in .peers, 15 GB of memory.
bench-6b: venv
	test -d .peers/models/chatglm2-6b || $(BIN)/python benchmarks/make_checkpoint.py .peers/models/chatglm2-6b
	$(BIN)/python benchmarks/real_shape.py .peers/models/chatglm2-6b --json .benchmarks/real-shape-1.json
	$(BIN)/python benchmarks/real_shape.py .peers/models/chatglm2-6b --quantize int8 --json .benchmarks/real-shape-2.json
	$(BIN)/python benchmarks/real_shape.py .peers/models/chatglm2-6b --quantize int4 --json .benchmarks/real-shape-3.json
	$(BIN)/python benchmarks/report.py

# All but the large model in some minutes, with fewer points, to see that it works; the page is written beside the figures.
bench-fast: venv
	$(BIN)/python benchmarks/compare.py --fast --json .benchmarks/fast/comparison.json
	$(BIN)/python benchmarks/curves.py --fast --json .benchmarks/fast/curves.json
	$(BIN)/python benchmarks/report.py --figures .benchmarks/fast --docs .benchmarks/fast

clean:
	rm -rf $(VENV) .clients .mypy_cache .pytest_cache .ruff_cache .hypothesis
