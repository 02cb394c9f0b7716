# Everything a reader or a continuous-integration job runs. `make help` lists the targets.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

# One environment in three layers, each installed when a target first needs it.
RUNTIME    := $(VENV)/.runtime
EVERYTHING := $(VENV)/.everything
LAB        := $(VENV)/.lab
PINNED     := pyproject.toml requirements.txt constraints.txt
# Bytecode is written when a module is first imported: to compile all of PyTorch takes longer than to install it.
INSTALL    := $(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt

# `make setup TORCH=cpu` takes PyTorch, and nothing else, from PyTorch's own index, which has builds without CUDA.
TORCH     ?=
CPU_BUILDS := https://download.pytorch.org/whl/cpu
ifneq ($(filter-out cpu,$(TORCH)),)
$(error TORCH is "$(TORCH)": leave it out for the usual PyTorch, or say TORCH=cpu)
endif
ifeq ($(shell uname -sm)$(TORCH),Linux x86_64)
SIZE := several GB where PyTorch comes with its CUDA libraries (with TORCH=cpu 280 MB, 470 MB with all tools)
else
SIZE := about 280 MB, 470 MB with all tools
endif

# How many processes `make test` runs in; a module or notebook stays in one. Each takes up to 2 GB of memory.
JOBS ?= 2

# What `make bench` measures; for example `make bench MODEL=smollm2-135m BATCH=16`.
MODEL ?= random:gpt2
BATCH ?= 4
DATA  ?= reviews
SEED  ?= 0
# Guessed from the model's name; for an encoder that is called otherwise: `make bench MODEL=... KIND=encoder`.
KIND  ?= $(if $(findstring bert,$(MODEL))$(findstring minilm,$(MODEL)),encoder,decoder)

# Where `make results` finds corpora as TSV files of their names; left out, they are fetched through `datasets`. Which grid it does.
TEXTS  ?=
GRID   ?= cpu
TABLES = $(BIN)/dager table $(wildcard docs/results/[!d]*/rows.jsonl) \
	--markdown docs/results/tables.md --html docs/results/tables.html

.DEFAULT_GOAL := help
.PHONY: help setup demo test book slides pdf handouts pages serve refresh lab bench results results-gpu lint format clean

help: ## List the targets.
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(EVERYTHING) ## Create .venv and install the package and all tools into it (TORCH=cpu: without CUDA).

$(RUNTIME): $(PINNED)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "make: $(PYTHON) is older than 3.11; try: make setup PYTHON=python3.12" >&2; exit 1; }
	@echo "make: to fetch: $(SIZE)"
	@$(PYTHON) -m venv $(VENV)
	$(if $(TORCH),$(INSTALL) --extra-index-url $(CPU_BUILDS) torch)
	$(INSTALL) --editable .
	@touch $@

$(EVERYTHING): $(RUNTIME)
	$(INSTALL) --editable '.[dev,book]'
	@touch $@

$(LAB): $(RUNTIME)
	$(INSTALL) --editable '.[lab]'
	@touch $@

demo: $(RUNTIME) ## Watch a real language model's gradient give up eight private notes.
	@$(BIN)/dager demo

test: setup ## Run the tests, the examples in the docstrings and every notebook of the book (JOBS: in how many processes).
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadscope

book: setup ## Build the book into _build/html; a warning is an error.
	$(BIN)/python book/_tools/vendor.py
	$(BIN)/jupyter-book build . -W --keep-going --quiet

slides: book ## Build the book, and a deck of slides from each chapter.
	$(BIN)/python book/_tools/slides.py

pdf: book ## Print the whole book into one PDF, which the site links to; needs a Chromium.
	$(BIN)/python book/_tools/pdf.py

handouts: setup ## Write each chapter for students, without solutions and answers, and for instructors.
	$(BIN)/python book/_tools/notebooks.py handouts

pages: slides pdf ## Look at every page of the book and every slide in a headless browser.
	DAGER_PAGES=1 $(BIN)/python -m pytest tests/test_pages.py tests/test_audit_page.py

serve: slides ## Show the book at http://localhost:8000.
	$(BIN)/python -m http.server --directory _build/html 8000

refresh: setup ## Execute every notebook again and store what it prints.
	$(BIN)/python book/_tools/notebooks.py refresh

lab: $(LAB) ## Open the book's notebooks in JupyterLab.
	$(BIN)/jupyter lab book/intro.ipynb

bench: $(RUNTIME) ## Measure the attack, beside the textbook version, and as batches grow (MODEL, BATCH, DATA, SEED).
ifeq ($(KIND),encoder)
	$(BIN)/dager bench encoder --model $(MODEL) --batch-size $(BATCH) --data $(DATA) --seed $(SEED) --batches 1 --cap 2000
else
	$(BIN)/dager bench decoder --model $(MODEL) --batch-size $(BATCH) --data $(DATA) --seed $(SEED)
	$(BIN)/dager bench scaling --model $(MODEL) --data $(DATA) --seed $(SEED)
endif

results: $(RUNTIME) ## Make again the rows of docs/results that one core can make, then the tables (GRID, TEXTS).
	$(BIN)/dager sweep docs/results/$(GRID).yaml --rows docs/results/$(GRID) $(if $(TEXTS),--texts $(TEXTS))
	$(TABLES)

results-gpu: $(RUNTIME) ## Make the rows that want a GPU of 80 GB, go on where it stopped, then the tables.
	$(BIN)/dager sweep docs/results/gpu.yaml --rows docs/results/gpu --device cuda $(if $(TEXTS),--texts $(TEXTS))
	$(TABLES)

lint: setup ## Check style, formatting, types, and who imports whom.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache --no-logo

format: setup ## Rewrite the code in the project's format.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove the environment and everything that was built.
	rm -rf $(VENV) _build _vendor build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
