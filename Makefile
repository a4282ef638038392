# `make demo` and `make test` need nothing but Python 3.11 or later and pip: they make .venv when it is missing.
SHELL := /bin/bash
# PyTorch's CPU build is not on every machine there for every Python: the pinned one is sure to be there for 3.11.
PYTHON ?= $(shell python3.11 -c 'import sys; print(sys.executable)' 2>/dev/null || command -v python3)
BIN := .venv/bin
# Tests of one file stay in one process, so that what a file sets up is set up once. Files with slow tests come first.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
PYTEST_ARGS ?=
EFFORT ?= 1
MINUTES ?= 5
# Of `make fuzz`; without it the clock gives the first seed.
SEED ?=
FUZZ_ARGS ?=

# The newest supported release of vLLM that has no CPU build.
CONTRACT := 0.33.0
CONTRACT_TESTS := tests/contract tests/cache tests/plugin/test_arguments.py tests/plugin/test_limits.py tests/engine/test_golden.py \
    tests/engine/test_no_memory.py

.PHONY: help .venv demo check test lint fuzz contract commands small-model
help:
	@echo "make demo    serve a small model with an AHN and ask it something longer than its window"
	@echo "make check   ruff, mypy and the tests that are not slow (some minutes)"
	@echo "make test    ruff, mypy and all tests (20 minutes on two quiet cores)"
	@echo "make fuzz    random engines and requests against the reference (MINUTES=5; SEED=...: from this seed)"
	@echo "make contract  some of the tests with the sources of vLLM $(CONTRACT)"
	@echo "make commands  every command of vLLM's, with and without an AHN, into docs/commands.md (half an hour)"
	@echo "make small-model  train that model and its memories anew, into build/small-model (1 3/4 hours; EFFORT=0.5: one)"
	@echo "make .venv   the environment of both, from requirements/"

.venv: $(BIN)/vllm-ahn

# The last thing that is installed, so it is missing as well when an earlier attempt was cut short.
$(BIN)/vllm-ahn:
	@echo "making .venv with $(PYTHON) (some minutes)"
	@requirements/make-venv.sh .venv "$(PYTHON)"

demo: $(BIN)/vllm-ahn
	@$(BIN)/python examples/demo.py

small-model: $(BIN)/vllm-ahn
	@$(BIN)/python examples/small_model/reproduce.py build/small-model --effort $(EFFORT)

lint: $(BIN)/vllm-ahn
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

check: lint
	@$(PYTEST) -m "not slow" $(PYTEST_ARGS)

test: lint
	@$(PYTEST) $(PYTEST_ARGS)

fuzz: $(BIN)/vllm-ahn
	@PYTHONPATH=$(CURDIR):$(CURDIR)/tests $(BIN)/python -m fuzz --minutes $(MINUTES) $(if $(SEED),--seed $(SEED)) $(FUZZ_ARGS)

commands: $(BIN)/vllm-ahn
	@mkdir -p docs
	@PYTHONPATH=$(CURDIR)/tests $(BIN)/python tests/commands/matrix.py docs/commands.md

.contract/vllm-%: requirements/vllm-sources.sh $(BIN)/vllm-ahn
	@PYTHON=$(BIN)/python requirements/vllm-sources.sh $* $@

contract: .contract/vllm-$(CONTRACT)
	@PYTHONPATH=$(CURDIR)/$<:$(CURDIR) AHN_CONTRACT_VLLM=$(CONTRACT) $(BIN)/python -m pytest $(CONTRACT_TESTS) $(PYTEST_ARGS)
