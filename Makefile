# Two commands set everything up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
TEXT ?= demo/corpus/python_docs.jsonl

.PHONY: demo test check fix bench clean

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: .venv/.installed    ## raw text to a Hugging Face folder, on two CPU processes, in minutes
	$(BIN)/python -m launcher.demo

test: .venv/.installed    ## the whole test suite, two files at a time
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

check: .venv/.installed   ## format, lint, types, import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

fix: .venv/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: .venv/.installed   ## what we claim, measured
	$(BIN)/python -m bench.data $(TEXT)
	$(BIN)/python -m bench.step $(TEXT) --layers 4 --hidden 256 --vocab-size 8000
	$(BIN)/python -m bench.heads --tokens 8192

clean:
	rm -rf .venv build *.egg-info
