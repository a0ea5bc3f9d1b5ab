# make help shows what there is; everything runs in .venv, which `make setup` makes.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help setup demo demo-dreambooth check test torture load bench bench-gpu clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

setup: .venv/ready ## make .venv with posttrain and all it needs

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test,dev]'
	touch .venv/ready

demo: setup ## CPT -> SFT -> DPO on a real 135M model, on two cores, under 20 minutes
	$(BIN)/posttrain run python_expert

demo-dreambooth: setup ## a text-to-image model from scratch learns one new individual, four ways
	$(BIN)/python scripts/dreambooth_demo.py

check: setup ## format, lint, types, fast tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/pytest -q -m "not slow" -n 2

test: setup ## all tests
	$(BIN)/pytest -q -n 2

torture: setup ## at least 200 random kill -9 over all stages, each of which must end bit-identical
	$(BIN)/python scripts/torture.py --count 200

load: setup ## 10 million rows, 100,000 steps, 100 jobs, a recipe of 12 steps: memory and time of each
	$(BIN)/python scripts/load.py

bench: setup ## every stage side by side with TRL, into docs/benchmarks.md
	$(BIN)/python benchmarks/compare.py

bench-gpu: setup ## 8B in bfloat16 and NF4 beside TRL, its rollout, 65B in NF4: a line of JSON each
	$(BIN)/python benchmarks/gpu.py
	$(BIN)/python benchmarks/gpu.py --trl
	$(BIN)/python benchmarks/gpu.py --quant nf4
	$(BIN)/python benchmarks/gpu.py --quant nf4 --trl
	$(BIN)/python benchmarks/gpu.py --quant nf4 --tokens 2048 --documents 1
	$(BIN)/python benchmarks/gpu.py --quant nf4 --tokens 2048 --documents 1 --dense 32
	$(BIN)/python benchmarks/gpu.py --rollout --documents 32
	$(BIN)/python benchmarks/gpu.py --generate --documents 32
	$(BIN)/python benchmarks/gpu.py --shape 65b --quant nf4 --tokens 2048 --documents 1 --rank 64

clean: ## remove .venv and caches of the tools; runs/ stays
	rm -rf .venv .pytest_cache .ruff_cache build dist
