# make help shows what there is; everything runs in .venv, which `make setup` makes.
PYTHON ?= python3
BIN := .venv/bin
GOLDEN ?= runs/golden.json

.PHONY: audit help setup demo demo-dreambooth check lint fast test slow docs site lowest newest golden mutate house torture load models bench bench-gpu clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 18

setup: .venv/ready ## make .venv with posttrain and all it needs

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test,dev]'
	touch .venv/ready

demo: setup ## CPT -> SFT -> DPO on a real 135M model, on two cores, under 20 minutes
	$(BIN)/posttrain run python_expert

demo-dreambooth: setup ## a text-to-image model from scratch learns one new individual, four ways
	$(BIN)/python scripts/dreambooth_demo.py

check: lint fast ## what a commit has to pass: format, lint, types, fast tests

lint: setup ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

fast: setup ## the fast tests
	$(BIN)/pytest -q -m "not slow" -n 2 --dist worksteal

slow: setup ## the slow tests, which wait for processes for a third of their time; with the fast ones these are all
	$(BIN)/pytest -q -m slow -n 3 --dist worksteal

test: setup ## all tests
	$(BIN)/pytest -q -n 2 --dist worksteal

docs: setup ## the pages of docs/ that are made: configuration, commands, losses, formats, templates, gpu, api
	$(BIN)/python scripts/configuration_page.py
	$(BIN)/python scripts/api_pages.py
	$(BIN)/python scripts/reference_pages.py
	$(BIN)/python scripts/templates_page.py
	$(BIN)/python scripts/gpu_page.py

site: setup ## docs/ as a site, into build/site; it opens from the disk
	$(BIN)/python -m mkdocs build --strict

lowest: setup ## the lowest versions that pyproject.toml allows, in a venv of their own, and the tests that use them most
	$(BIN)/python scripts/versions.py lowest

newest: setup ## the same of the newest versions that the registry has
	$(BIN)/python scripts/versions.py newest

golden: setup ## record small runs of everything, to the last bit; where GOLDEN is there already, compare with it
	mkdir -p $(dir $(GOLDEN))
	$(BIN)/python scripts/golden.py $(if $(wildcard $(GOLDEN)),compare,record) $(GOLDEN)

audit: setup ## known holes of the installed packages, asked of the package index: needs a network
	$(BIN)/python -m pip install --quiet --disable-pip-version-check pip-audit
	$(BIN)/python -m pip_audit --skip-editable

mutate: setup ## put named faults into the code, one at a time: which does no test see?
	$(BIN)/python scripts/mutate.py

house: setup ## the structure in figures: long files and functions, missing docstrings, rooms that know each other
	$(BIN)/python scripts/house.py

torture: setup ## at least 300 random kill -9 over all stages, recipes, sweeps, merge, compose, caches: each ends bit-identical
	$(BIN)/python scripts/torture.py --count 200
	$(BIN)/python scripts/torture_commands.py --count 100

load: setup ## 10 million rows, 100,000 steps, 100 jobs, a recipe of 12 steps: memory and time of each
	$(BIN)/python scripts/load.py

models: setup ## every causal class of transformers, tiny, through every stage and method, into docs/models.md
	$(BIN)/python scripts/models_matrix.py

bench: setup ## every stage side by side with TRL, into docs/benchmarks.md
	$(BIN)/python benchmarks/compare.py

bench-gpu: setup ## 1B to 65B, SFT lora, qlora, full, rollouts, beside TRL, Unsloth and torchtune where they install: one JSON, goals judged
	$(BIN)/python benchmarks/gpu_all.py --to benchmarks/seen/gpu.json

clean: ## remove .venv and caches of the tools; runs/ stays
	rm -rf .venv .pytest_cache .ruff_cache build dist
